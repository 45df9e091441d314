"""Compute how much of an adapter's gain on pairs is kept: merged, and in an exported file."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from orpo_lite.evaluation.intervals import Interval, Numbers, mean_over_pairs
from orpo_lite.objectives.orpo import log_odds

ENOUGH = 0.9  # a smaller share of the gain is worth a warning


@dataclass(frozen=True)
class Kept:
    """The gain of one model, as a share of the gain of the adapter as trained.

    The gain is the mean log odds ratio of the chosen to the rejected replies (Eq. 5 of the ORPO
    paper), minus that of the base that the model rests on.
    """

    model: str
    gain: Interval
    share: Interval
    """1 is the gain as trained."""
    is_known: bool
    """False if the gain as trained cannot be distinguished from 0, so that a share means nothing.
    """

    @property
    def is_enough(self) -> bool:
        """Whether the model keeps at least 90% of the gain, or it cannot be told."""
        return not self.is_known or self.share.value is None or self.share.value >= ENOUGH

    @property
    def text(self) -> str:
        """The share in words."""
        value, low, high = self.share.value, self.share.low, self.share.high
        if not self.is_known or value is None or low is None or high is None:
            gain = "unknown" if self.gain.value is None else f"{self.gain.value:+.3f}"
            return f"cannot tell ({gain} in log odds)"
        return f"{value:.1%} ({low:.1%} to {high:.1%})"


def pair_log_odds(scores_2P: Tensor) -> Numbers:
    """Return the log odds ratio of each pair: (P,), from the mean log-probabilities (2, P)."""
    values: Numbers = log_odds(*scores_2P).double().numpy()
    return values


def kept_gain(
    model: str, gain_P: Numbers, trained_gain_P: Numbers, prompts_P: Sequence[Hashable]
) -> Kept:
    """Return how much of the gain as trained a model keeps, with 95% intervals over prompts.

    Args:
        model: its name in tables.
        gain_P: the model's log odds ratio of each pair minus that of its base.
        trained_gain_P: the same of the adapter as it was trained.
        prompts_P: the prompt of each pair; pairs of one prompt are not independent.
    """
    ones_P = np.ones_like(gain_P)
    gain, trained, share = mean_over_pairs(
        np.stack([gain_P, trained_gain_P, gain_P]),
        np.stack([ones_P, ones_P, trained_gain_P]),
        prompts_P,
    )
    reference = trained.interval()
    return Kept(model, gain.interval(), share.interval(), (reference.low or 0) > 0)
