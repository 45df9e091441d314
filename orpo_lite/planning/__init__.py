"""Will it fit, how fast, and what to change.

Order: gpus, meter, on_meta, route, measure, extrapolate, search, choose, plan.
"""
