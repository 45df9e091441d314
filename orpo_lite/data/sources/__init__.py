"""Read rows from local files and from hub datasets.

Import order: lines, encoding, json_rows, csv_rows, arrow_rows, files, source, local, hub, find.
"""
