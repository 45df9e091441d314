"""Read rows from local files and from datasets of the hub.

Order: lines, encoding, json_rows, csv_rows, arrow_rows, files, source, local, hub, find.
"""
