"""The recipe: the settings that a person chooses.

Import order: text, values, schema, checks, foreign, reader.
"""
