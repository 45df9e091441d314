"""Rows to pairs to tokens to batches.

Order inside the wing: readers, columns, formats, files, rows, pairs, templates, tokens, cache, sides,
packing, preview.
"""
