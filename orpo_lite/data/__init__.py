"""Read rows, convert them to pairs and tokens, and build batches.

Import order: pair, cache, reference_cache, packing, sources, formats, chat_template, pairs,
replies, render_process, split, statistics, tokenize, dataset, prepare.
"""
