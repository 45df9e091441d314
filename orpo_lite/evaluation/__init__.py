"""Evaluate a trained model. Metrics on held-out pairs are computed in ``model/held_out.py``.

Order: samples, verify.
"""
