"""PairLogps: what a model says of pairs, and all that an objective reads."""

from typing import NamedTuple

import torch
from torch import Tensor


class PairLogps(NamedTuple):
    """Log-probabilities of P pairs; everything that a loss on them needs, nothing it does not."""

    chosen_P: Tensor
    """Mean log-probability of the chosen response's tokens, Eq. 3; float32 or float64."""
    rejected_P: Tensor
    """The same of the rejected response."""
    nll_P: Tensor
    """Negative log-likelihood of the counted tokens of the chosen sequence, summed (not averaged)."""
    nll_tokens_P: Tensor
    """How many tokens that sum counts."""


def at_least_float32(values: Tensor) -> Tensor:
    """float64 stays, any other dtype becomes float32."""
    return values if values.dtype == torch.float64 else values.float()
