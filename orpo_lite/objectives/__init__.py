"""What is trained for: from the log-probabilities of pairs to a loss and its metrics.

One file an objective, named as ``loss.type`` names it. Order: objective, orpo; further ones above them.
"""
