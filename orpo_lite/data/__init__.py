"""Rows to pairs to tokens. Inside the wing, imports go one way: formats -> pairs."""
