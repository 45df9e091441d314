"""Low-memory tensor operations: pure tensors, no files, no recipe.

Order: devices, meta_attention, segments, blockwise_attention, attention, layers, lora, outputs,
head.
"""
