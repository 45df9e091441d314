"""Which format a set of rows has, and its pairs.

Order: text, names, messages, values, readers, columns, column_map, unused_columns, verdicts, refuse, detect.
"""
