"""Predict if a training fits a GPU and how fast it is, and propose changes that help.

Order: device, gpus, meter, on_meta, route, measure, extrapolate, search, choose, plan.
"""
