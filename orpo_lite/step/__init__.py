"""The step's mathematics: pure tensors, no files, no recipe. Order inside the wing: memory, losses, head,
attention, lora, layers.

Letters in tensor names: P pairs, R = 2P padded rows (chosen first, then rejected), T tokens of a row, N scored rows of
hidden states, V vocabulary, D hidden size, I and O a linear layer's sides, H heads, K key heads, E head size.
"""
