"""What a trained model says. The metrics on held-out pairs are computed in ``model/held_out.py``.

Order: open_run, samples, verify, answers, chat.
"""
