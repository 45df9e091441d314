"""Will it fit, how fast, and what to change.

Order: device, gpus, meter, on_meta, route, measure, extrapolate, search, choose, plan.
"""
