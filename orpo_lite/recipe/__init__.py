"""Define, read and check recipes. A recipe is a YAML file with the settings of a training.

Import order: text, values, section, loss, schema, checks, foreign, reader.
"""
