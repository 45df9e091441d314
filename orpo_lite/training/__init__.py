"""Train an adapter on prepared inputs.

Order: adapter_files, state, checkpoint, session, faults, result, step, loop.
"""
