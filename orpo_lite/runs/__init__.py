"""Read and write the run folder. Commands such as merge read there what train has written.

Order: atomic, commands, inputs, interrupt, records, lock, changes, folder.
"""
