"""The adapter merged into the base's weights.

Order: names, deltas, plan, merge.
"""
