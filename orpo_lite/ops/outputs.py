"""Define PairLogps, the log-probabilities of pairs. An objective reads nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor


class PairLogps(NamedTuple):
    """The log-probabilities of P pairs, from which an objective computes its loss."""

    chosen_P: Tensor
    """Mean log-probability of the chosen response's tokens, Eq. 3; float32 or float64."""
    rejected_P: Tensor
    """The same of the rejected response."""
    nll_P: Tensor
    """Negative log-likelihood of the chosen sequence's counted tokens, summed (not averaged)."""
    nll_tokens_P: Tensor
    """Number of tokens in that sum."""


def at_least_float32(values: Tensor) -> Tensor:
    """Return float64 unchanged, any other dtype as float32."""
    return values if values.dtype == torch.float64 else values.float()
