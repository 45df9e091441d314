"""The run folder: the contract between verbs.

Order: atomic, commands, inputs, interrupt, records, lock, changes, folder.
"""
