"""Merge an adapter into the weights of its base.

Import order: names, deltas, plan, merge.
"""
