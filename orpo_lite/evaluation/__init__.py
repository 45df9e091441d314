"""Evaluate a trained model. Metrics on held-out pairs are computed in ``model/held_out.py``.

Order: intervals, gain, compare, judge, score, open_run, evaluate, samples, verify, answers, chat,
health, run_record, charts, report_texts, report, live.
"""
