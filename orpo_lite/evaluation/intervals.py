"""Compute confidence intervals of means over pairs, with a bootstrap that resamples prompts.

The pairs of one prompt are not independent. So a resample draws whole prompts with all their pairs
(the cluster bootstrap). All means of one table are computed on the same resamples, so two models
are compared pair by pair. The random numbers have a fixed seed.
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
DRAWS_AT_ONCE = 1 << 16  # random numbers in memory at once; this number fits the CPU's cache

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval.

    ``low`` and ``high`` are None if there are fewer than two prompts. ``value``, ``low`` and
    ``high`` are None if there are no pairs or if a score is not finite.
    """

    value: float | None
    low: float | None
    high: float | None

    def excludes_zero(self) -> bool:
        """Return True if the interval is known and does not contain 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Mean:
    """A mean over pairs, with the values that its interval is computed from."""

    value: float
    """The observed mean."""
    resampled_B: Numbers
    """The mean in each of B resamples (the bootstrap)."""
    without_M: Numbers
    """Element m is the mean without the pairs of prompt m (the jackknife)."""

    def __sub__(self, other: "Mean") -> "Mean":
        return Mean(
            self.value - other.value,
            self.resampled_B - other.resampled_B,
            self.without_M - other.without_M,
        )

    def interval(self) -> Interval:
        """Return the value with its 95% interval.

        Two intervals are computed: the percentile interval of the bootstrap, and the t-interval of
        the jackknife. The result goes from the lower of the two low ends to the higher of the two
        high ends.

        The percentile interval follows a skewed distribution, but is too narrow for a share with
        few prompts. In simulations with 10 prompts, the percentile interval contained the true
        value in 87% of the cases, and the t-interval in 96%. With 100 prompts, the two intervals
        are nearly the same.
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
        """Return the standard error by a jackknife over prompts; NaN for fewer than two prompts."""
        prompts = len(self.without_M)
        if prompts < 2:
            return math.nan
        deviations_M = self.without_M - self.without_M.mean()
        return math.sqrt((prompts - 1) / prompts * float(deviations_M @ deviations_M))


def mean_over_pairs(
    numerators_KP: Numbers, denominators_KP: Numbers, prompts_P: Sequence[Hashable]
) -> list[Mean]:
    """Return K means over P pairs: mean = sum of numerators / sum of denominators.

    Args:
        numerators_KP: what each pair adds to the numerator of each mean.
        denominators_KP: what each pair adds to the denominator, such as 1 or its token count.
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
    """Return a share of pairs with its 95% interval, which lies between 0 and 1.

    If the share is 0 or 1, all resamples have the same share. Then the exact binomial interval with
    one trial per prompt is used. It begins at 0 if the share is 0, and ends at 1 if the share is 1.
    """
    found, prompts = mean.interval(), len(mean.without_M)
    if found.value is None or found.low is None or found.high is None:
        return found
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / prompts)
    if found.value in (0, 1):
        return Interval(found.value, found.value * (1 - reach), max(found.value, reach))
    return Interval(found.value, max(found.low, 0.0), min(found.high, 1.0))


def share_difference(mean: Mean) -> Interval:
    """Return a difference of two shares with its 95% interval, which lies between -1 and 1.

    If every prompt has the same difference d, the bootstrap interval has no width. Then another
    interval is returned, from (1 - p) * d - p to (1 - p) * d + p.

    p is the largest share of prompts that may have another difference: 0.31 for 10 prompts. It is
    the upper end of the exact binomial interval. At the lower end, these prompts have the
    difference -1. At the upper end, these prompts have the difference 1.
    """
    found, prompts = mean.interval(), len(mean.without_M)
    if found.value is None or found.low is None or found.high is None:
        return found
    if found.low < found.high:
        return Interval(found.value, max(found.low, -1.0), min(found.high, 1.0))
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / prompts)
    low, high = found.value - reach * (found.value + 1), found.value + reach * (1 - found.value)
    return Interval(found.value, low, high)


def resample_sums(sums_MS: Numbers) -> Numbers:
    """Return the sums of B resamples, shape (B, S). B is RESAMPLES.

    A resample draws M prompts with replacement, and adds up the S numbers of the drawn prompts.

    Args:
        sums_MS: S numbers for each of the M prompts.
    """
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
    """Return how many pairs are needed to show that a difference is not 0.

    The true difference is assumed to be as large as the observed one. With the returned number of
    pairs, the 95% interval excludes 0 with a probability of 80%. Return None if the observed
    difference is 0 or unknown.

    Args:
        mean: the observed difference.
        pairs: the number of pairs on which the difference was observed.
    """
    error = mean.standard_error()
    if mean.value == 0 or not math.isfinite(error):
        return None
    normal = NormalDist()
    needed = normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)
    return math.ceil(pairs * (needed * error / mean.value) ** 2)


def t_quantile(freedom: int) -> float:
    """Return the two-sided 95% quantile of Student's t with ``freedom`` degrees of freedom.

    The approximation of Wallace (1959) is used. With 4 or more degrees of freedom, its error is
    below 1%.
    """
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(normal**2 / freedom))
