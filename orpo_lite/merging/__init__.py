"""Merge an adapter into the weights of its base.

Order: names, deltas, plan, merge.
"""
