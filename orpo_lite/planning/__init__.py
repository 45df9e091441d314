"""Predict if a training fits a GPU and how fast it is, and propose changes that help.

Import order: device, gpus, meter, on_meta, route, measure, extrapolate, search, choose, plan.
"""
