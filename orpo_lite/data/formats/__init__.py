"""Which format a set of rows has, and its pairs.

Order: text, readers, values, columns, column_map, name_hints, unused_columns, verdicts, refuse, detect.
"""
