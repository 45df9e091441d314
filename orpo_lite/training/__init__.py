"""From prepared inputs to an adapter.

Order: texts, state, checkpoint, session, faults, result, step, loop.
"""
