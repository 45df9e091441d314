"""Detect the format of a dataset and convert its rows to pairs.

Import order: text, names, messages, values, readers, column_map, columns, unused_columns, verdicts,
refuse, detect.
"""
