"""Will it fit, how fast, and what to change. Order inside the wing: cards, counted, lines, search."""
