"""Compute a loss and its metrics from the scores of pairs.

Each objective is one file, named after its value of ``loss.type``: ``orpo`` -> ``orpo.py``.
Import order: objective, pairwise; further objectives come last and do not import each other.
"""
