"""Where rows come from: local files and sets of the hub.

Order: lines, json_rows, tables, files, source, local, hub, find.
"""
