"""Convert rows to pairs, to tokens and to batches.

Order: pair, cache, packing, sources, formats, chat_template, pairs, render_process, split,
statistics, tokenize, dataset, prepare.
"""
