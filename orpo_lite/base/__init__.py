"""Find, download and check base models and adapters. Read and write safetensors files.

Import order: download, config, adapter, find, generation, blocks, weights.
"""
