"""Compute confidence intervals of means over pairs, by a bootstrap that resamples prompts.

The pairs of one prompt are not independent, so a resample draws whole prompts with all their pairs
(the cluster bootstrap). All means of one table are computed on the same resamples, so the
difference of two models is paired. The random numbers have a fixed seed.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 2000
POWER = 0.8
SEED = 0
DRAWS_AT_ONCE = 1 << 16  # random numbers in memory at once, so that they fit a cache

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval.

    ``low`` and ``high`` are None where fewer than two prompts are known; all are None where there
    are no pairs or a score is not finite.
    """

    value: float | None
    low: float | None
    high: float | None

    def excludes_zero(self) -> bool:
        """Return whether the whole interval is on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Mean:
    """A mean over pairs: as observed, in each resample, and without each prompt in turn."""

    value: float
    resampled_B: Numbers
    without_M: Numbers
    """The value without the pairs of prompt m (the jackknife)."""

    def __sub__(self, other: "Mean") -> "Mean":
        return Mean(
            self.value - other.value,
            self.resampled_B - other.resampled_B,
            self.without_M - other.without_M,
        )

    def interval(self) -> Interval:
        """Return the value with its 95% interval.

        Its ends are the outer ones of two intervals. The percentile interval of the bootstrap
        follows a skewed distribution, but it is too narrow for a share on few prompts: in
        simulations with 10 prompts it contained the truth in 87%, and BCa in less. The t-interval
        of the jackknife contained it in 96% there. With 100 prompts the two are nearly the same.
        """
        prompts = len(self.without_M)
        if prompts == 0 or not math.isfinite(self.value):
            return Interval(None, None, None)
        if prompts == 1:
            return Interval(self.value, None, None)
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(self.resampled_B, [tail, 1 - tail])
        reach = t_quantile(prompts - 1) * self.standard_error()
        return Interval(
            self.value, min(float(low), self.value - reach), max(float(high), self.value + reach)
        )

    def standard_error(self) -> float:
        """Return the standard error, by the jackknife over prompts. NaN for a single prompt."""
        prompts = len(self.without_M)
        if prompts < 2:
            return math.nan
        deviations_M = self.without_M - self.without_M.mean()
        return math.sqrt((prompts - 1) / prompts * float(deviations_M @ deviations_M))


def mean_over_pairs(
    numerators_KP: Numbers, denominators_KP: Numbers, prompts_P: Sequence[Hashable]
) -> list[Mean]:
    """Return K means over P pairs; each is the sum of its numerators by that of its denominators.

    Args:
        numerators_KP: what a pair adds to the numerator of each mean.
        denominators_KP: what it adds to the denominator: 1, or its number of tokens.
        prompts_P: the prompt of each pair.
    """
    index: dict[Hashable, int] = {}
    prompt_P = np.array([index.setdefault(prompt, len(index)) for prompt in prompts_P], dtype=int)
    means, prompts = len(numerators_KP), len(index)
    if not prompts:
        return [Mean(math.nan, np.empty(0), np.empty(0))] * means
    both_SP = np.concatenate([numerators_KP, denominators_KP])
    columns = [np.bincount(prompt_P, weights=row_P, minlength=prompts) for row_P in both_SP]
    sums_MS: Numbers = np.stack(columns, 1).astype(np.float64)
    total_S = sums_MS.sum(0)
    resampled_BS = resample_sums(sums_MS)
    without_MS = total_S - sums_MS
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for mean in range(means):
            parts = (
                sums[..., mean] / sums[..., means + mean]
                for sums in (total_S, resampled_BS, without_MS)
            )
            value, resampled_B, without_M = parts
            found.append(Mean(float(value), resampled_B, without_M))
    return found


def share_interval(mean: Mean) -> Interval:
    """Return the interval of a share of pairs.

    If all pairs agree, all resamples do too. The end that they could reach is then the exact
    binomial one of as many prompts.
    """
    found, prompts = mean.interval(), len(mean.without_M)
    if found.value is None or found.low is None or found.high is None:
        return found
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / prompts)
    if found.value in (0, 1):
        return Interval(found.value, found.value * (1 - reach), max(found.value, reach))
    return Interval(found.value, max(found.low, 0.0), min(found.high, 1.0))


def resample_sums(sums_MS: Numbers) -> Numbers:
    """Return the sums of S columns over M prompts that are drawn with replacement: (B, S)."""
    prompts = len(sums_MS)
    generator = np.random.default_rng(SEED)
    rows = max(1, DRAWS_AT_ONCE // prompts)
    resampled = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        drawn_BM = generator.integers(prompts, size=(count, prompts), dtype=np.int32)
        drawn_BM += np.arange(count, dtype=np.int32)[:, None] * prompts
        times_BM = np.bincount(drawn_BM.ravel(), minlength=count * prompts)
        resampled.append(times_BM.reshape(count, prompts).astype(np.float64) @ sums_MS)
    return np.concatenate(resampled)


def pairs_needed(mean: Mean, pairs: int) -> int | None:
    """Return how many pairs would show that a difference is not 0, if it is as large as observed.

    That many pairs of the same kind exclude 0 from the 95% interval with a probability of 80%. None
    if the observed difference is 0 or unknown.
    """
    error = mean.standard_error()
    if mean.value == 0 or not math.isfinite(error):
        return None
    normal = NormalDist()
    needed = normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)
    return math.ceil(pairs * (needed * error / mean.value) ** 2)


def t_quantile(freedom: int) -> float:
    """Return the two-sided 95% quantile of Student's t distribution.

    By the approximation of Wallace (1959), which is within 1% from 4 degrees of freedom on.
    """
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(normal**2 / freedom))
