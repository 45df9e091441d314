"""Will it fit, how fast, and what to change. Order inside the wing: cards, lengths, ways, counted, lines, search."""
