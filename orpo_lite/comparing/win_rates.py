"""Compute how often the judge prefers the answers of one arm to those of another, with intervals.

For each prompt, round and seed, the arm whose answer has the higher reward wins; a tie is half a
win. The win rate is the mean. Its 95% interval is that of a bootstrap and a jackknife over prompts:
see :mod:`orpo_lite.evaluation.intervals`. From three seeds on, the interval also covers the
t-interval of the win rates of the single seeds.

The length-controlled win rate asks how often an arm would win if both answers had the same length.
It follows the idea of AlpacaEval 2 (arXiv 2404.04475) without its terms for single prompts: the
chance to win is modelled as ``σ(a + b tanh(d / s))``, where d is the difference of the lengths in
tokens and s its standard deviation. The win rate at d = 0 is ``σ(a)``. Two half ties at
``tanh(d / s) = ±1`` are added to the data, so that a and b stay finite if one arm always wins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orpo_lite.evaluation.intervals import (
    RESAMPLES,
    Interval,
    Mean,
    Numbers,
    mean_over_pairs,
    pairs_needed,
    resample_sums,
    share_interval,
    t_quantile,
)

FEWEST_PROMPTS = 6
"""With fewer prompts, a two-sided sign test does not reach 5%, even if all prompts agree."""
FEWEST_SEEDS = 3
"""With fewer seeds, the interval does not cover the spread over seeds."""
FITTED_AT_ONCE = 1 << 20  # weights of answers in memory at once
NEWTON_STEPS = 25

Outcome = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Sampled:
    """The answers of one arm, as numbers. S seeds, R rounds, P prompts."""

    name: str
    rewards_SRP: Numbers
    """NaN: the prompt has no answer, or the answer no reward."""
    tokens_SRP: Numbers
    """The lengths of the answers in tokens."""


@dataclass(frozen=True)
class WinRate:
    """How often one arm wins against another."""

    model: str
    against: str
    rate: Interval
    by_round: Sequence[float]
    """The win rate of each round, over all seeds."""
    by_seed: Sequence[float]
    """The win rate of each seed, over all rounds."""
    length_controlled: Interval
    tokens: tuple[float, float]
    """The mean length of the answers of the two arms."""
    prompts: int
    """Number of prompts with answers of both arms."""
    outcome: Outcome
    prompts_needed: int | None
    """About how many prompts would be needed for a clear outcome, if the true rate is the measured
    one. None if the outcome is clear, or if the rate is 50%."""

    @property
    def round_sd(self) -> float | None:
        """The standard deviation over rounds; None for one round."""
        return _sd(self.by_round)

    @property
    def seed_sd(self) -> float | None:
        """The standard deviation over seeds; None for one seed."""
        return _sd(self.by_seed)


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def win_rate(one: Sampled, other: Sampled) -> WinRate:
    """Return how often the arm ``one`` wins against ``other``.

    The two arms have the same numbers of seeds, rounds and prompts.
    """
    difference_SRP = one.rewards_SRP - other.rewards_SRP
    known_SRP = np.isfinite(difference_SRP)
    win_SRP = np.where(known_SRP, 0.5 + 0.5 * np.sign(np.nan_to_num(difference_SRP)), 0.0)
    prompts = int(known_SRP.any((0, 1)).sum())
    if not prompts:
        unknown = Interval(None, None, None)
        return WinRate(
            model=one.name,
            against=other.name,
            rate=unknown,
            by_round=[],
            by_seed=[],
            length_controlled=unknown,
            tokens=(mean_tokens(one), mean_tokens(other)),
            prompts=0,
            outcome="cannot tell",
            prompts_needed=None,
        )
    keep_P = known_SRP.any((0, 1))
    win_SRP, known_SRP = win_SRP[..., keep_P], known_SRP[..., keep_P]
    count_P, wins_P = known_SRP.sum((0, 1)), win_SRP.sum((0, 1))
    (mean,) = mean_over_pairs(wins_P[None], count_P[None].astype(np.float64), range(prompts))
    by_seed, by_round = (
        [float(w / c) for w, c in zip(win_SRP.sum(axes), known_SRP.sum(axes), strict=True) if c]
        for axes in ((1, 2), (0, 2))
    )
    rate = _with_seeds(share_interval(mean), by_seed)
    longer_SRP = (one.tokens_SRP - other.tokens_SRP)[..., keep_P]
    at_equal_length = rate  # if one arm wins always, lengths cannot explain any win
    if mean.value not in (0, 1):
        at_equal_length = share_interval(length_controlled(win_SRP, longer_SRP, known_SRP))
    outcome: Outcome = "cannot tell"
    if prompts >= FEWEST_PROMPTS and rate.low is not None and rate.high is not None:
        outcome = "better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else outcome
    from_half = Mean(mean.value - 0.5, mean.resampled_B - 0.5, mean.without_M - 0.5)
    return WinRate(
        model=one.name,
        against=other.name,
        rate=rate,
        by_round=by_round,
        by_seed=by_seed,
        length_controlled=at_equal_length,
        tokens=(mean_tokens(one), mean_tokens(other)),
        prompts=prompts,
        outcome=outcome,
        prompts_needed=pairs_needed(from_half, prompts) if outcome == "cannot tell" else None,
    )


def mean_tokens(arm: Sampled) -> float:
    """Return the mean length of an arm's answers that have a reward; 0 if there are none."""
    tokens_A = arm.tokens_SRP[np.isfinite(arm.rewards_SRP)]
    return float(tokens_A.mean()) if len(tokens_A) else 0.0


def _with_seeds(found: Interval, by_seed: Sequence[float]) -> Interval:
    """Return an interval that also covers the t-interval over seeds, if there are enough seeds."""
    if len(by_seed) < FEWEST_SEEDS or found.low is None or found.high is None:
        return found
    mean, error = np.mean(by_seed), np.std(by_seed, ddof=1) / math.sqrt(len(by_seed))
    reach = t_quantile(len(by_seed) - 1) * float(error)
    low, high = min(found.low, float(mean) - reach), max(found.high, float(mean) + reach)
    return Interval(found.value, max(low, 0.0), min(high, 1.0))


def length_controlled(win_SRP: Numbers, longer_SRP: Numbers, known_SRP: Numbers) -> Mean:
    """Return the win rate at equal lengths, with its values in resamples of the prompts.

    Args:
        win_SRP: 1, 0.5 or 0 for each seed, round and prompt.
        longer_SRP: by how many tokens the winner's answer would be longer: length of the first
            arm's answer minus length of the other's.
        known_SRP: False where there is no reward.
    """
    prompts = win_SRP.shape[-1]
    win_PN, known_PN = (a.reshape(-1, prompts).T for a in (win_SRP, known_SRP))
    longer_PN = longer_SRP.reshape(-1, prompts).T
    deviation = float(longer_PN[known_PN.astype(bool)].std())
    x_PN = np.tanh(longer_PN / deviation) if deviation else np.zeros_like(longer_PN)
    times_RP = resample_sums(np.identity(prompts))
    rows_WP = np.concatenate([np.ones((1, prompts)), times_RP, 1 - np.identity(prompts)])
    size = max(1, FITTED_AT_ONCE // win_PN.size)
    parts = [
        _fit(win_PN.ravel(), x_PN.ravel(), rows[:, :, None] * known_PN)
        for start in range(0, len(rows_WP), size)
        for rows in [rows_WP[start : start + size]]
    ]
    rates_W = np.concatenate(parts)
    return Mean(float(rates_W[0]), rates_W[1 : 1 + RESAMPLES], rates_W[1 + RESAMPLES :])


def _fit(win_A: Numbers, x_A: Numbers, weights_WPN: Numbers) -> Numbers:
    """Return σ(a) of a logistic regression for each of W weightings of the A answers.

    Newton's method is used. The loss is convex, and the added half ties bound its minimum.
    """
    weights_WA = weights_WPN.reshape(len(weights_WPN), -1)
    ties = np.array([0.5, 0.5])
    win_A, x_A = np.append(win_A, ties), np.append(x_A, [-1.0, 1.0])
    weights_WA = np.concatenate([weights_WA, np.full((len(weights_WA), 2), 0.5)], 1)
    a_W, b_W = np.zeros(len(weights_WA)), np.zeros(len(weights_WA))
    for _ in range(NEWTON_STEPS):
        p_WA = 1 / (1 + np.exp(-(a_W[:, None] + b_W[:, None] * x_A)))
        error_WA, curve_WA = weights_WA * (win_A - p_WA), weights_WA * p_WA * (1 - p_WA)
        slope_a, slope_b = error_WA.sum(1), error_WA @ x_A
        aa, ab, bb = curve_WA.sum(1), curve_WA @ x_A, curve_WA @ x_A**2
        determinant = aa * bb - ab**2
        step_a = (bb * slope_a - ab * slope_b) / determinant
        step_b = (aa * slope_b - ab * slope_a) / determinant
        # A full step from a flat place may go too far.
        scale = np.minimum(1.0, 2.0 / np.maximum(1e-12, np.hypot(step_a, step_b)))
        a_W, b_W = a_W + scale * step_a, b_W + scale * step_b
        if np.hypot(step_a, step_b).max() < 1e-9:
            break
    found: Numbers = 1 / (1 + np.exp(-a_W))
    return found
