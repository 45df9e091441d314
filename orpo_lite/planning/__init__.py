"""Predict whether a training fits a GPU and how fast it is, and propose changes.

Order: device, gpus, meter, on_meta, route, measure, extrapolate, search, choose, plan.
"""
