"""Rows to pairs to tokens to batches.

Order inside the wing: readers, kinds, columns, guesses, verdicts, unread, formats, files, rows, mapped, sets, pairs,
templates, tokens, cache, sides, packing, preview.
"""
