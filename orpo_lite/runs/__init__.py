"""Read and write the run folder, which holds all that one command leaves for the next.

Order: atomic, commands, inputs, interrupt, records, lock, changes, folder.
"""
