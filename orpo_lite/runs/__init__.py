"""Reading and writing the run folder, through which the commands pass on their results.

Order: atomic, commands, inputs, interrupt, records, lock, changes, folder.
"""
