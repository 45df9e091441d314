"""From prepared inputs to an adapter.

Order: gradient, state, checkpoint, session, faults, result, step, loop.
"""
