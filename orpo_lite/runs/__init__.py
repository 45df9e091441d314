"""Read and write the run folder: files that train writes and that other commands read later.

Import order: atomic, commands, inputs, interrupt, records, lock, changes, folder.
"""
