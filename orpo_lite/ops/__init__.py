"""Low-memory tensor operations: pure tensors, no files, no recipe.

Order: attention, lora, outputs, head, transfer, layers.
"""
