"""ORPO's loss on the log-probabilities of pairs (arXiv 2403.07691)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor


class PairLogps(NamedTuple):
    """What a model says of P pairs; everything the loss needs, nothing it does not."""

    chosen_P: Tensor
    """Mean log-probability of the chosen response's tokens, Eq. 3; float32 or float64."""
    rejected_P: Tensor
    """The same of the rejected response."""
    nll_P: Tensor
    """Negative log-likelihood of the counted tokens of the chosen sequence, summed (not averaged)."""
    nll_tokens_P: Tensor
    """How many tokens that sum counts."""


class Divisors(NamedTuple):
    """What the sums of one optimizer step are divided by, over all its micro-batches and processes.

    Known before the first forward pass, so that the same pairs give the same gradient however they are cut up.
    """

    pairs: int
    nll_tokens: int


# One row of figures a step; each is a sum over pairs divided by the step's divisors, so rows of micro-batches add up.
PARTS = ("nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected", "rewards/accuracies")


def log1mexp(logp: Tensor) -> Tensor:
    """``log(1 - exp(logp))`` for logp <= 0, any shape, in at least float32; finite gradient up to logp = 0.

    The argument is clamped below zero before both branches: ``where`` multiplies the gradient of the branch not
    taken by zero, and zero times infinity is NaN. Branches after Mächler, "Accurately computing log(1 - exp(-|a|))".
    """
    logp = at_least_float32(logp)
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_zero = logp > -0.693  # ln 2: below it log1p keeps the digits, above it expm1 does
    return torch.where(near_zero, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))


def log_odds(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """``log(odds(chosen) / odds(rejected))`` of mean log-probabilities, Eq. 4 and 5; shape (P,)."""
    chosen_P, rejected_P = at_least_float32(chosen_P), at_least_float32(rejected_P)
    return (chosen_P - rejected_P) - (log1mexp(chosen_P) - log1mexp(rejected_P))


def orpo_loss(
    logps: PairLogps, divisors: Divisors, *, beta: float, nll_reduction: Literal["token", "pair"] = "token"
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of ``L = NLL + beta * L_OR``, Eq. 6 and 7.

    Args:
        logps: of the P pairs of this micro-batch.
        divisors: of the whole optimizer step. Shares of all micro-batches and processes add up to the step's loss.
        beta: λ in the paper.
        nll_reduction: ``token``: mean over all counted tokens of the step, as the authors' code; ``pair``: mean per
            response, then over pairs, as the paper's text.

    Returns:
        The scalar to run backward on, and the detached :data:`PARTS` as a tensor of shape (6,).
    """
    odds_P = log_odds(logps.chosen_P, logps.rejected_P)
    ratio_P = F.logsigmoid(odds_P)  # -L_OR, Eq. 7
    if nll_reduction == "token":
        nll = logps.nll_P.sum() / divisors.nll_tokens
    else:
        nll = (logps.nll_P / logps.nll_tokens_P).sum() / divisors.pairs
    loss = nll - beta * ratio_P.sum() / divisors.pairs
    with torch.no_grad():
        accurate_P = (logps.chosen_P > logps.rejected_P).to(ratio_P.dtype)
        per_pair = [ratio_P, odds_P, logps.chosen_P, logps.rejected_P, accurate_P]
        parts = torch.stack([nll, *(values_P.sum() / divisors.pairs for values_P in per_pair)])
    return loss, parts


def named_parts(parts: list[float], *, beta: float) -> dict[str, float]:
    """The summed :data:`PARTS` of a step under the names that TRL's ORPOTrainer logs; rewards are beta * logps."""
    named = dict(zip(PARTS, parts, strict=True))
    chosen, rejected = beta * named["logps/chosen"], beta * named["logps/rejected"]
    loss = named["nll_loss"] - beta * named["log_odds_ratio"]
    rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    return {"loss": loss, **named, **rewards}


def at_least_float32(values: Tensor) -> Tensor:
    """float64 stays, any other dtype becomes float32."""
    return values if values.dtype == torch.float64 else values.float()
