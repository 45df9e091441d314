"""Compare objectives on the same data: train each of them, sample answers, let a judge decide.

Import order: arms, split, task, trainings, answers, win_rates, diversity, cost, reward_models,
table, page, compare.
"""
