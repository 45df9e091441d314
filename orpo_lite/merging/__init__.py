"""The adapter merged into the base's weights.

Order: deltas, merge.
"""
