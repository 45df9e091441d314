"""Read rows from local files and from hub datasets.

Order: lines, encoding, json_rows, csv_rows, arrow_rows, files, source, local, hub, find.
"""
