"""What a trained model says. The metrics on held-out pairs are computed in ``model/held_out.py``.

Order: intervals, compare, judge, score, open_run, evaluate, samples, verify, answers, chat.
"""
