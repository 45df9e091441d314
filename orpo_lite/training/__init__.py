"""From prepared inputs to an adapter.

Order: state, checkpoint, session, faults, result, step, loop.
"""
