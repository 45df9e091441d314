"""Low-memory operations on tensors. They read no files and no recipe.

Order: devices, meta_attention, segments, blockwise_attention, attention, layers, lora, outputs,
head.
"""
