"""Compute a loss and its metrics from the log-probabilities of pairs.

Each objective is one file, named like its ``loss.type``. Order: objective, orpo; further ones
follow.
"""
