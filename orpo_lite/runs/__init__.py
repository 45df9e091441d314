"""Read and write the run folder. Commands such as merge read there what train has written.

Import order: atomic, commands, inputs, interrupt, records, lock, changes, folder.
"""
