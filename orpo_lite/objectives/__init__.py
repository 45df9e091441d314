"""Compute a loss and its metrics from the log-probabilities of pairs.

Each objective is one file. The file's name is the objective's ``loss.type``.
Import order: objective, orpo; further ones follow.
"""
