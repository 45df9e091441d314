"""Low-memory tensor operations: pure tensors, no files, no recipe.

Order: devices, attention, layers, lora, outputs, head.
"""
