"""Evaluate a trained model. ``model/held_out.py`` computes the metrics on held-out pairs.

A module imports only modules that come before it in this list. Import order: intervals, gain,
compare, judge, score, open_run, evaluate, samples, verify, answers, chat, health, run_record,
charts, report_texts, report, live.
"""
