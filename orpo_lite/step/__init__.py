"""The step's mathematics: pure tensors, no files, no recipe. Order inside the wing: losses, head.

Letters in tensor names: P pairs, R = 2P rows (chosen first, then rejected), T tokens of a padded row, V vocabulary.
"""
