"""ORPO: preference optimization without a reference model (Hong et al., arXiv 2403.07691)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.objective import LOSS, NLL, Divisors, Metric, Objective, mean_nll
from orpo_lite.ops.outputs import PairScores, at_least_float32


class Orpo(Objective):
    """The ORPO objective, ``L = NLL + beta * L_OR`` (Eq. 6 of the paper).

    It raises the probability of the chosen responses. It also raises the odds of the chosen
    responses relative to the odds of the rejected responses.
    """

    title = "ORPO"
    paper = "https://arxiv.org/abs/2403.07691"
    formula = "L = NLL + λ · L_OR, Eq. 6 of the paper."
    parts = (
        "nll_loss",
        "log_odds_ratio",
        "log_odds_chosen",
        "logps/chosen",
        "logps/rejected",
        "rewards/accuracies",
    )
    shown = (
        LOSS,
        NLL,
        Metric(
            "log_odds_chosen", "log odds chosen : rejected", "log odds, chosen to rejected",
            short="log odds", sign="+", digits=3,
        ),
        Metric("logps/chosen", "log-prob of chosen", "mean log-probability, chosen"),
        Metric("logps/rejected", "log-prob of rejected", "mean log-probability, rejected"),
        Metric(
            "rewards/accuracies", "reward accuracy",
            "share of pairs whose chosen answer is more likely than the rejected one",
            short="accuracy", digits=3, is_share=True,
        ),
    )  # fmt: skip

    def loss(
        self, logps: PairScores, facts: PairFacts, divisors: Divisors
    ) -> tuple[Tensor, Tensor]:
        """Return :func:`orpo_loss` with the recipe's settings."""
        return orpo_loss(
            logps, divisors, beta=self.settings.beta, nll_reduction=self.settings.nll_reduction
        )

    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return name -> value of the loss, its parts and the rewards.

        TRL's ORPOTrainer uses the same names. A reward is beta times the mean log-probability of a
        response.
        """
        beta = self.settings.beta
        named = dict(zip(self.parts, parts, strict=True))
        chosen, rejected = beta * named["logps/chosen"], beta * named["logps/rejected"]
        loss = named["nll_loss"] - beta * named["log_odds_ratio"]
        rewards = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
        }
        return {"loss": loss, **named, **rewards}

    def described(self) -> list[tuple[str, str]]:
        """Return two settings for the model card: λ, and which tokens the NLL counts."""
        return [("λ (`loss.beta`)", f"{self.settings.beta:g}"), self.nll_setting()]


def orpo_loss(
    logps: PairScores,
    divisors: Divisors,
    *,
    beta: float,
    nll_reduction: Literal["token", "pair"] = "token",
) -> tuple[Tensor, Tensor]:
    """Return this micro-batch's share of ``L = NLL + beta * L_OR`` (Eq. 6 and 7 of the paper).

    Args:
        logps: log-probabilities of the P pairs of this micro-batch.
        divisors: divisors of the whole optimizer step. The shares of all micro-batches and
            processes add up to the step's loss.
        beta: λ in the paper.
        nll_reduction: ``token``: mean over all counted tokens of the step, as in the authors' code.
            ``pair``: first the mean of each chosen sequence, then the mean over pairs, as in the
            paper's text.

    Returns:
        A scalar for the backward pass, and the values named in :attr:`Orpo.parts` as a detached
        tensor of shape (6,).
    """
    log_odds_P = log_odds(logps.chosen_P, logps.rejected_P)
    log_sigmoid_P = F.logsigmoid(log_odds_P)  # -L_OR, Eq. 7
    nll = mean_nll(logps, divisors, nll_reduction)
    loss = nll - beta * log_sigmoid_P.sum() / divisors.pairs
    with torch.no_grad():
        accurate_P = (logps.chosen_P > logps.rejected_P).to(log_sigmoid_P.dtype)
        per_pair = [log_sigmoid_P, log_odds_P, logps.chosen_P, logps.rejected_P, accurate_P]
        parts = torch.stack([nll, *(values_P.sum() / divisors.pairs for values_P in per_pair)])
    return loss, parts


def log1mexp(logp: Tensor) -> Tensor:
    """Return ``log(1 - exp(logp))`` for logp <= 0 of any shape, in at least float32.

    Values close to zero and other values use different formulas (Mächler, "Accurately computing
    log(1 - exp(-|a|))"). The gradient is finite even at logp = 0, because logp is first clamped
    below zero. Without the clamp, the gradient could be NaN: ``torch.where`` multiplies the
    gradient of the unused formula by zero, and zero times infinity is NaN.
    """
    logp = at_least_float32(logp)
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_zero = logp > -0.693  # -ln 2: log1p is accurate below, expm1 above
    return torch.where(near_zero, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))


def log_odds(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return ``log(odds(chosen) / odds(rejected))`` from mean log-probabilities.

    This is Eq. 4 and 5 of the paper. All tensors have shape (P,).
    """
    chosen_P, rejected_P = at_least_float32(chosen_P), at_least_float32(rejected_P)
    return (chosen_P - rejected_P) - (log1mexp(chosen_P) - log1mexp(rejected_P))


OBJECTIVE = Orpo
