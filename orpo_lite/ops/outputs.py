"""Define PairLogps, the log-probabilities of pairs. An objective reads no other model output."""

from typing import NamedTuple

import torch
from torch import Tensor


class PairLogps(NamedTuple):
    """The log-probabilities of P pairs, from which an objective computes its loss."""

    chosen_P: Tensor
    """Mean log-probability of the chosen response's tokens (Eq. 3 of ORPO); float32 or float64."""
    rejected_P: Tensor
    """Mean log-probability of the rejected response's tokens; float32 or float64. NaN: the pair has
    no rejected sequence."""
    nll_P: Tensor
    """Negative log-likelihood of the chosen sequence: a sum over tokens, not a mean.

    The batch decides whether the prompt's tokens are included.
    """
    nll_tokens_P: Tensor
    """Number of tokens in the sum ``nll_P``."""


def at_least_float32(values: Tensor) -> Tensor:
    """Return float64 values unchanged, and values of other dtypes as float32."""
    return values if values.dtype == torch.float64 else values.float()
