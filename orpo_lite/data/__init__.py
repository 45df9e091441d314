"""Rows to pairs to tokens to batches.

Order: pair, cache, packing, sources, formats, chat_template, pairs, render_process, split, statistics, tokenize,
dataset, prepare.
"""
