"""SFT: supervised fine-tuning on the chosen responses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.objective import Divisors, Metric, Objective, mean_nll
from orpo_lite.ops.outputs import PairScores


class Sft(Objective):
    """The NLL of the chosen responses. The rejected responses do not go through the model."""

    title = "SFT"
    paper = "https://arxiv.org/abs/2203.02155"
    formula = "L = NLL of the chosen answers."
    needs = frozenset()
    parts = ("nll_loss", "mean_logps/chosen")
    shown = (
        Metric("loss", "loss", "loss: the NLL of the chosen", "loss"),
        Metric(
            "mean_logps/chosen", "log-prob of chosen", "mean log-probability of a token, chosen"
        ),
    )

    def loss(
        self, logps: PairScores, facts: PairFacts, divisors: Divisors
    ) -> tuple[Tensor, Tensor]:
        """Return the micro-batch's share of the step's NLL, and of each of ``parts``."""
        nll = mean_nll(logps, divisors, self.settings.nll_reduction)
        return nll, torch.stack([nll, logps.chosen_P.sum() / divisors.pairs]).detach()

    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return the loss and the mean log-probability of the chosen responses."""
        named = dict(zip(self.parts, parts, strict=True))
        return {"loss": named["nll_loss"], **named}

    def described(self) -> list[tuple[str, str]]:
        """Return which tokens the NLL counts."""
        return [self.nll_setting()]


OBJECTIVE = Sft
