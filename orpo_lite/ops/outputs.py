"""Define PairScores, a model's output for pairs. An objective reads no other model output."""

from typing import NamedTuple

import torch
from torch import Tensor


class PairScores(NamedTuple):
    """The scores of P pairs, from which an objective computes its loss.

    A language model scores a response by its log-probability, a reward model by its reward.
    """

    chosen_P: Tensor
    """Mean log-probability of the chosen response's tokens (Eq. 3 of ORPO), or the reward of the
    chosen response; float32 or float64."""
    rejected_P: Tensor
    """The same of the rejected response. NaN: the pair has no rejected sequence."""
    nll_P: Tensor
    """Negative log-likelihood of the chosen sequence: a sum over tokens, not a mean. NaN: the model
    is a reward model.

    The batch decides whether the prompt's tokens are included.
    """
    nll_tokens_P: Tensor
    """Number of tokens in the sum ``nll_P``; 0 for a reward model."""

    @property
    def are_rewards(self) -> bool:
        """True if the scores are those of a reward model."""
        return not self.nll_tokens_P.any()


def pair_rewards(rewards_2P: Tensor) -> PairScores:
    """Return the scores of P pairs from the rewards of their responses, chosen first, (2, P)."""
    chosen_P, rejected_P = rewards_2P
    nothing_P = torch.zeros_like(chosen_P, dtype=torch.long)
    return PairScores(chosen_P, rejected_P, torch.full_like(chosen_P, torch.nan), nothing_P)


def at_least_float32(values: Tensor) -> Tensor:
    """Return float64 values unchanged, and values of other dtypes as float32."""
    return values if values.dtype == torch.float64 else values.float()
