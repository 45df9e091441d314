"""What a trained model says.

Order: samples, verify.
"""
