"""Train an adapter on prepared inputs.

Import order: adapter_files, state, trackers, checkpoint, session, reference, faults, result, step,
ppo, loop.
"""
