"""Detect the format of a dataset and convert its rows to pairs.

Order: text, names, messages, values, readers, columns, column_map, unused_columns, verdicts,
refuse, detect.
"""
