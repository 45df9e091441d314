"""Define the objectives that compare the scores of a pair's two responses."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.objective import LOSS, NLL, Divisors, Metric, Objective, mean_nll
from orpo_lite.ops.outputs import PairScores, at_least_float32


class PairwiseObjective(Objective):
    """A loss ``mean of f(score of chosen - score of rejected) + weight * NLL``.

    A subclass defines the scores and f. A reward is beta times a score. The metrics have the names
    that TRL's trainers use. ``mean_logps/*`` are mean log-probabilities of a token, which are
    comparable between objectives.
    """

    parts = (
        "pair_loss",
        "nll_loss",
        "logps/chosen",
        "logps/rejected",
        "mean_logps/chosen",
        "mean_logps/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
    )
    shown = (
        LOSS,
        NLL,
        Metric(
            "rewards/margins", "reward margin", "reward of the chosen minus the rejected answer",
            short="margin", sign="+", digits=3,
        ),
        Metric(
            "mean_logps/chosen", "log-prob of chosen", "mean log-probability of a token, chosen"
        ),
        Metric(
            "mean_logps/rejected", "log-prob of rejected",
            "mean log-probability of a token, rejected",
        ),
        Metric(
            "rewards/accuracies", "reward accuracy",
            "share of pairs whose chosen answer has the higher reward",
            short="accuracy", digits=3, is_share=True,
        ),
    )  # fmt: skip
    averages_logps = False
    """True: ``logps/*`` are means over a response's tokens. False: they are sums."""

    @property
    def nll_weight(self) -> float:
        """Weight of the chosen responses' NLL in the loss."""
        return 0.0

    @abstractmethod
    def scores(self, logps: PairScores, facts: PairFacts) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen and the rejected responses; each has shape (P,)."""

    def difference(self, chosen_P: Tensor, rejected_P: Tensor, facts: PairFacts) -> Tensor:
        """Return the difference of the two scores that f compares, shape (P,)."""
        return chosen_P - rejected_P

    @abstractmethod
    def pair_loss(self, difference_P: Tensor) -> Tensor:
        """Return f of :meth:`difference`, shape (P,)."""

    def loss(
        self, logps: PairScores, facts: PairFacts, divisors: Divisors
    ) -> tuple[Tensor, Tensor]:
        """Return the micro-batch's share of the step's loss, and of each of ``parts``."""
        logps = logps._replace(
            chosen_P=at_least_float32(logps.chosen_P),
            rejected_P=at_least_float32(logps.rejected_P),
        )
        chosen_P, rejected_P = self.scores(logps, facts)
        difference_P = self.difference(chosen_P, rejected_P, facts)
        pair_loss = self.pair_loss(difference_P).sum() / divisors.pairs
        nll = mean_nll(logps, divisors, self.settings.nll_reduction)
        loss = pair_loss + self.nll_weight * nll if self.nll_weight else pair_loss
        with torch.no_grad():
            means = logps.chosen_P, logps.rejected_P
            shown = means if self.averages_logps else times_tokens(*means, facts)
            rewards = self.settings.beta * chosen_P, self.settings.beta * rejected_P
            accurate_P = (rewards[0] > rewards[1]).to(chosen_P.dtype)
            per_pair = [*shown, *means, *rewards, accurate_P]
            shares = [values_P.sum() / divisors.pairs for values_P in per_pair]
            parts = torch.stack([pair_loss, nll, *shares])
        return loss, parts

    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return the loss, the parts and the reward margin."""
        named = dict(zip(self.parts, parts, strict=True))
        loss = named.pop("pair_loss") + self.nll_weight * named["nll_loss"]
        margin = named["rewards/chosen"] - named["rewards/rejected"]
        return {"loss": loss, **named, "rewards/margins": margin}

    def described(self) -> list[tuple[str, str]]:
        """Return beta, and the NLL's weight and tokens if it is part of the loss."""
        rows = [("β (`loss.beta`)", f"{self.settings.beta:g}")]
        if self.nll_weight:
            rows += [("weight of the NLL", f"{self.nll_weight:g}"), self.nll_setting()]
        if self.settings.label_smoothing:
            rows.append(("label smoothing", f"{self.settings.label_smoothing:g}"))
        return rows


def times_tokens(chosen_P: Tensor, rejected_P: Tensor, facts: PairFacts) -> tuple[Tensor, Tensor]:
    """Return means over the tokens of the responses as sums over these tokens, shape (P,)."""
    return (
        chosen_P * facts.chosen_tokens_P.to(chosen_P.dtype),
        rejected_P * facts.rejected_tokens_P.to(rejected_P.dtype),
    )


def smoothed_log_sigmoid(logits_P: Tensor, label_smoothing: float) -> Tensor:
    """Return ``-(1 - s) log σ(x) - s log σ(-x)`` for label smoothing s, shape (P,).

    This is the conservative DPO loss (https://ericmitchell.ai/cdpo.pdf). s = 0 is -log σ(x).
    """
    loss_P = -F.logsigmoid(logits_P)
    if not label_smoothing:
        return loss_P
    return (1 - label_smoothing) * loss_P - label_smoothing * F.logsigmoid(-logits_P)
