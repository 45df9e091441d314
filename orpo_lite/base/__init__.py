"""The base and adapters on disk.

Order: download, adapter, find, generation, blocks.
"""
