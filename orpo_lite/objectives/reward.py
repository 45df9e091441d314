"""A reward model: the reward of the chosen response shall exceed that of the rejected one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.objective import LOSS, Divisors, Metric, Objective
from orpo_lite.ops.outputs import PairScores


class Reward(Objective):
    """The loss ``L = -log σ(r(x, y_w) - r(x, y_l))`` (Eq. 11 of the ORPO paper).

    The reward r is the output of a score head (:mod:`orpo_lite.model.score_head`). TRL's
    RewardTrainer has the same loss. It calls three of the metrics accuracy, margin and mean_reward.
    """

    title = "Reward model"
    paper = "https://arxiv.org/abs/2203.02155"
    formula = "L = -log σ(reward of chosen - reward of rejected), Eq. 1 of the paper."
    parts = ("pair_loss", "center_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
    shown = (
        LOSS,
        Metric(
            "rewards/margins", "reward margin", "reward of the chosen minus the rejected answer",
            short="margin", sign="+", digits=3,
        ),
        Metric("rewards/chosen", "reward of chosen", "mean reward, chosen", sign="+"),
        Metric("rewards/rejected", "reward of rejected", "mean reward, rejected", sign="+"),
        Metric(
            "rewards/accuracies", "reward accuracy",
            "share of pairs whose chosen answer has the higher reward",
            short="accuracy", digits=3, is_share=True,
        ),
    )  # fmt: skip

    def loss(
        self, scores: PairScores, facts: PairFacts, divisors: Divisors
    ) -> tuple[Tensor, Tensor]:
        """Return the micro-batch's share of the step's loss, and of each of ``parts``."""
        chosen_P, rejected_P = scores.chosen_P, scores.rejected_P
        pair_loss = -F.logsigmoid(chosen_P - rejected_P).sum() / divisors.pairs
        center_loss = ((chosen_P + rejected_P) ** 2).sum() / divisors.pairs
        weight = self.settings.center_rewards_coefficient
        loss = pair_loss + weight * center_loss if weight else pair_loss
        with torch.no_grad():
            accurate_P = (chosen_P > rejected_P).to(chosen_P.dtype)
            per_pair = (chosen_P, rejected_P, accurate_P)
            shares = [values_P.sum() / divisors.pairs for values_P in per_pair]
            parts = torch.stack([pair_loss, center_loss, *shares])
        return loss, parts

    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return the loss, the rewards and the accuracy, also under the names of TRL's trainer."""
        named = dict(zip(self.parts, parts, strict=True))
        center_loss = named.pop("center_loss")
        loss = named.pop("pair_loss")
        loss += (self.settings.center_rewards_coefficient or 0.0) * center_loss
        chosen, rejected = named["rewards/chosen"], named["rewards/rejected"]
        by_trl = {
            "accuracy": named["rewards/accuracies"],
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
        }
        return {"loss": loss, **named, "rewards/margins": chosen - rejected, **by_trl}

    def described(self) -> list[tuple[str, str]]:
        """Return the weight of the term that keeps the mean reward near 0, if it is used."""
        weight = self.settings.center_rewards_coefficient
        return [("weight of (r_w + r_l)²", f"{weight:g}")] if weight else []


OBJECTIVE = Reward
