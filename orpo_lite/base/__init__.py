"""The base and adapters on disk.

Order: download, config, adapter, find, generation, blocks, weights.
"""
