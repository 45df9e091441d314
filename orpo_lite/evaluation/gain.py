"""Compute the share of an adapter's gain that a merged model or an exported file keeps."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from orpo_lite.evaluation.intervals import Interval, Numbers, mean_over_pairs
from orpo_lite.objectives.orpo import log_odds

ENOUGH = 0.9  # a smaller share of the gain is worth a warning


@dataclass(frozen=True)
class Kept:
    """The share of the trained adapter's gain that a model keeps.

    A model's gain is its mean log odds ratio of chosen to rejected replies (Eq. 5 of the ORPO
    paper), minus the mean log odds ratio of its base. The base of a merged model or an exported
    file is the base that the adapter was merged into. The base of the trained adapter is the base
    of the training, such as the 4-bit base.
    """

    model: str
    gain: Interval
    share: Interval
    """The model's gain divided by the trained adapter's gain. 1 means that nothing is lost."""
    is_known: bool
    """False if the trained adapter's gain may be 0. Then ``share`` has no meaning."""

    @property
    def is_enough(self) -> bool:
        """True if ``share`` is at least 90%, or if the share is not known."""
        return not self.is_known or self.share.value is None or self.share.value >= ENOUGH

    def sentence(self, name: str) -> str:
        """Return a sentence that says how much of the gain the model ``name`` keeps."""
        value, low, high = self.share.value, self.share.low, self.share.high
        if not self.is_known or value is None or low is None or high is None:
            gain = "unknown" if self.gain.value is None else f"{self.gain.value:+.3f}"
            return (
                f"cannot tell how much of the adapter's gain {name} keeps (its gain in log odds: "
                f"{gain})"
            )
        share = f"{value:.1%} ({low:.1%} to {high:.1%})"
        return f"{name} keeps {share} of the adapter's gain in log odds"


def pair_log_odds(scores_2P: Tensor) -> Numbers:
    """Return the log odds ratio of each pair, shape (P,).

    ``scores_2P`` holds the mean log-probabilities of the chosen and of the rejected replies.
    """
    values: Numbers = log_odds(*scores_2P).double().numpy()
    return values


def kept_gain(
    model: str, gain_P: Numbers, trained_gain_P: Numbers, prompts_P: Sequence[Hashable]
) -> Kept:
    """Return a model's gain, and this gain divided by the trained adapter's gain.

    Both have 95% intervals. See :class:`Kept`.

    Args:
        model: the model's name in tables.
        gain_P: for each pair, the model's log odds ratio minus the base's.
        trained_gain_P: for each pair, the trained adapter's log odds ratio minus the base's.
        prompts_P: the prompt of each pair. The bootstrap resamples prompts.
    """
    ones_P = np.ones_like(gain_P)
    gain, trained, share = mean_over_pairs(
        np.stack([gain_P, trained_gain_P, gain_P]),
        np.stack([ones_P, ones_P, trained_gain_P]),
        prompts_P,
    )
    reference = trained.interval()
    return Kept(model, gain.interval(), share.interval(), (reference.low or 0) > 0)
