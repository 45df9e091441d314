"""Predict whether a training fits a GPU, and how fast it runs. Propose changes if it does not fit.

Import order: device, gpus, meter, gathers, on_meta, route, measure, extrapolate, search, share,
fit, choose, processes, plan.
"""
