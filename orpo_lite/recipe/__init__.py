"""The recipe: the settings that a person chooses.

Order: text, values, schema, checks, foreign, reader.
"""
