"""The model in memory.

Order: optimizer, pair_model, adapter, generate, memory, parallel, held_out, probe, quantize, load.
"""
