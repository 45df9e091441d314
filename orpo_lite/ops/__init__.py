"""Low-memory tensor operations: pure tensors, no files, no recipe.

Order: devices, meta_attention, attention, layers, lora, outputs, head.
"""
