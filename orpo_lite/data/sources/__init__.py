"""Where rows come from: local files and sets of the hub.

Order: lines, encoding, json_rows, csv_rows, arrow_rows, files, source, local, hub, find.
"""
