"""What the person chooses.

Order: text, schema, checks, foreign, reader.
"""
