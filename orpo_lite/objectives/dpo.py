"""DPO: direct preference optimization against a reference model (arXiv 2305.18290)."""

import torch
from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.objective import reference_setting
from orpo_lite.objectives.pairwise import PairwiseObjective, smoothed_log_sigmoid, times_tokens
from orpo_lite.ops.outputs import PairScores


class Dpo(PairwiseObjective):
    """The DPO objective, ``L = -log σ(β (r_w - r_l))``, with ``r = log π(y|x) - log π_ref(y|x)``.

    The functions for ``loss.dpo_loss_type`` are those of TRL's DPOTrainer. ``ipo`` divides the
    log-ratio of a response by the number of its tokens, as IPO's authors do (arXiv 2310.12036).
    """

    title = "DPO"
    paper = "https://arxiv.org/abs/2305.18290"
    formula = "L = -log σ(β · (log-ratio of chosen - log-ratio of rejected)), Eq. 7 of the paper."
    needs = frozenset({"rejected", "reference"})

    @property
    def nll_weight(self) -> float:
        """``loss.rpo_alpha``, or 0 if it is null."""
        return self.settings.rpo_alpha or 0.0

    @property
    def rewards_start_at_zero(self) -> bool:
        """True if the reference is the model before the training."""
        return self.settings.reference_adapter_name_or_path is None

    def scores(self, logps: PairScores, facts: PairFacts) -> tuple[Tensor, Tensor]:
        """Return the log-ratios to the reference model, summed over a response's tokens."""
        chosen_P = logps.chosen_P - facts.ref_chosen_P.to(logps.chosen_P.dtype)
        rejected_P = logps.rejected_P - facts.ref_rejected_P.to(logps.rejected_P.dtype)
        return times_tokens(chosen_P, rejected_P, facts)

    def difference(self, chosen_P: Tensor, rejected_P: Tensor, facts: PairFacts) -> Tensor:
        """Return the difference of the log-ratios. For ``ipo`` they are means over tokens."""
        if self.settings.dpo_loss_type == "ipo":
            chosen_P = chosen_P / facts.chosen_tokens_P.to(chosen_P.dtype)
            rejected_P = rejected_P / facts.rejected_tokens_P.to(rejected_P.dtype)
        return chosen_P - rejected_P

    def pair_loss(self, difference_P: Tensor) -> Tensor:
        """Return the loss of each pair, shape (P,)."""
        beta = self.settings.beta
        if self.settings.dpo_loss_type == "ipo":
            return (difference_P - 1 / (2 * beta)) ** 2
        if self.settings.dpo_loss_type == "hinge":
            return torch.relu(1 - beta * difference_P)
        return smoothed_log_sigmoid(beta * difference_P, self.settings.label_smoothing)

    def described(self) -> list[tuple[str, str]]:
        """Return the settings of the loss, its function, and the reference model."""
        function = ("function (`loss.dpo_loss_type`)", self.settings.dpo_loss_type)
        return [*super().described(), function, reference_setting(self.settings)]


OBJECTIVE = Dpo
