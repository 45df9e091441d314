"""PPO: proximal policy optimization against a reward model (arXiv 1707.06347, 2203.02155).

This module holds the formulas. :mod:`orpo_lite.training.ppo` samples answers and takes the steps.
The defaults of the loss are those of Table 5 of the ORPO paper, or of TRL at that time where it has
none. Batch, learning rate and answer length of the table are in the recipe paper-ppo.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.objective import (
    Divisors,
    Metric,
    Objective,
    mean_nll,
    reference_setting,
)
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.values import is_on_hub

MAX_KL_ERROR = 0.2  # arXiv 1909.08593, section 2.2


class Ppo(Objective):
    """The PPO objective with a clipped ratio, a clipped value loss and a KL penalty per token."""

    title = "PPO"
    paper = "https://arxiv.org/abs/1707.06347"
    formula = (
        "maximise the reward of sampled answers minus the KL to the reference model, by clipped "
        "ratios (Eq. 7 of the paper)."
    )
    needs = frozenset()
    parts = ("nll_loss",)
    shown = (
        Metric("loss", "negative reward with KL", "negative reward, with the KL penalty", "loss"),
        Metric("objective/scores", "reward", "mean reward of sampled answers", "reward", sign="+"),
        Metric("objective/kl", "KL to reference", "KL divergence from the reference model", "KL"),
        Metric("objective/length", "tokens of an answer", "mean number of tokens of an answer"),
    )

    def loss(
        self, scores: PairScores, facts: PairFacts, divisors: Divisors
    ) -> tuple[Tensor, Tensor]:
        """Return the NLL of given answers. The planner measures this pass.

        A policy pass of PPO needs the same memory, because its loss too is a function of the
        answer's log-probabilities.
        """
        nll = mean_nll(scores, divisors, "token")
        return nll, nll.detach().unsqueeze(0)

    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return the NLL of given answers as the loss."""
        return {"loss": parts[0]}

    def described(self) -> list[tuple[str, str]]:
        """Return reward model, reference model and the settings of the loss."""
        reward = self.settings.reward_adapter_name_or_path or ""
        models = [
            ("reward model", reward if is_on_hub(reward) else "a local adapter on the base"),
            reference_setting(self.settings),
        ]
        names = (
            "response_length", "temperature", "num_ppo_epochs", "ppo_mini_batch_size", "kl_coef",
            "kl_target", "kl_horizon", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef",
        )  # fmt: skip
        values = [(f"`loss.{name}`", str(getattr(self.settings, name))) for name in names]
        return models + values


def token_rewards(scores_R: Tensor, kl_N: Tensor, lengths: Sequence[int], kl_coef: float) -> Tensor:
    """Return the reward of each token of R answers, shape (N,).

    It is ``-kl_coef * kl``. The last token of an answer also gets the answer's score.

    Args:
        scores_R: the reward model's scores of the answers.
        kl_N: log-probability of each token under the policy minus that under the reference model.
        lengths: number of tokens of each answer; N in all.
        kl_coef: weight of the KL penalty.
    """
    rewards_N = -kl_coef * kl_N
    last_R = torch.tensor(lengths, device=kl_N.device).cumsum(0) - 1
    return rewards_N.index_add(0, last_R, scores_R.to(rewards_N.dtype))


def advantages(
    rewards_N: Tensor, values_N: Tensor, lengths: Sequence[int], gamma: float, lam: float
) -> Tensor:
    """Return the generalized advantage estimates (arXiv 1506.02438, Eq. 16), shape (N,).

    ``A_t = δ_t + gamma * lam * A_(t+1)`` with ``δ_t = r_t + gamma * V_(t+1) - V_t``. After the last
    token of an answer, value and advantage are 0.
    """
    rewards_RT, values_RT = (_padded(part_N, lengths) for part_N in (rewards_N, values_N))
    following_R = last_R = torch.zeros_like(values_RT[:, 0])
    columns = []
    for place in reversed(range(values_RT.shape[1])):
        delta_R = rewards_RT[:, place] + gamma * following_R - values_RT[:, place]
        last_R = delta_R + gamma * lam * last_R
        following_R = values_RT[:, place]
        columns.append(last_R)
    found_RT = torch.stack(columns[::-1], 1)
    return torch.cat([row_T[:length] for row_T, length in zip(found_RT, lengths, strict=True)])


def _padded(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the values of R answers as rows, with zeros at their ends."""
    return torch.nn.utils.rnn.pad_sequence(
        list(torch.split(values_N, list(lengths))), batch_first=True
    )


def whitened(values_N: Tensor) -> Tensor:
    """Return the values with mean 0 and variance 1."""
    return (values_N - values_N.mean()) * torch.rsqrt(values_N.var(unbiased=False) + 1e-8)


def policy_loss(
    logps_N: Tensor, old_N: Tensor, advantages_N: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped loss of each token, and the ratio of new to old probability, each (N,).

    ``max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange))``, the negative of Eq. 7.
    """
    ratio_N = torch.exp(logps_N - old_N)
    clipped_N = ratio_N.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(-advantages_N * ratio_N, -advantages_N * clipped_N), ratio_N


def value_loss(
    values_N: Tensor, old_N: Tensor, returns_N: Tensor, cliprange_value: float
) -> Tensor:
    """Return half of the squared error of each value, shape (N,).

    A value that moves away from its old value by more than ``cliprange_value`` gets no smaller
    loss.
    """
    near_N = torch.clamp(values_N, old_N - cliprange_value, old_N + cliprange_value)
    return 0.5 * torch.maximum((values_N - returns_N) ** 2, (near_N - returns_N) ** 2)


def adapted_kl_coef(
    kl_coef: float, kl: float, target: float | None, answers: int, horizon: int
) -> float:
    """Return the weight of the KL penalty for the next step (arXiv 1909.08593, section 2.2).

    Args:
        kl_coef: the weight of this step.
        kl: the mean KL divergence of an answer in this step, in nats.
        target: the KL divergence to reach. None: the weight stays the same.
        answers: number of answers of this step.
        horizon: number of answers over which the weight adapts.
    """
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coef * (1 + error * answers / horizon)


OBJECTIVE = Ppo
