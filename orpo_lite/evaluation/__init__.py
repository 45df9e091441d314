"""Evaluate a trained model. ``model/held_out.py`` computes the metrics on held-out pairs.

A module imports only modules with an earlier place in the import order. Import order: intervals,
gain, compare, judge, score, open_run, evaluate, rewards, samples, verify, graders, answers, chat,
curves, health, run_record, charts, report_texts, report, live.
"""
