"""Low-memory operations on tensors. They read no files and no recipe.

Import order: devices, meta_attention, segments, blockwise_attention, attention, layers, lora,
outputs, head.
"""
