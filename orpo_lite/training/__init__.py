"""Train an adapter on prepared inputs.

Order: adapter_files, state, trackers, checkpoint, session, faults, result, step, loop.
"""
