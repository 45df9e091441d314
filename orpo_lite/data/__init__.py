"""Rows to pairs to tokens to batches. Order inside the wing: formats, rows, pairs, packing."""
