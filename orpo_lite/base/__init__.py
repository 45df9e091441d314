"""Find, download and check base models and adapters on disk; read and write safetensors files.

Order: download, config, adapter, find, generation, blocks, weights.
"""
