"""SimPO: preference optimization by mean log-probabilities with a margin (arXiv 2405.14734)."""

from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.pairwise import PairwiseObjective, smoothed_log_sigmoid
from orpo_lite.ops.outputs import PairScores


class SimPo(PairwiseObjective):
    """The SimPO objective, ``L = -log σ(β (P_w - P_l) - γ)`` with mean log-probabilities P.

    ``cpo_alpha`` adds the NLL of the chosen responses (CPO-SimPO), as in TRL's CPOTrainer. The
    paper uses β from 2 to 10, far above TRL's default.
    """

    title = "SimPO"
    paper = "https://arxiv.org/abs/2405.14734"
    formula = "L = -log σ(β · (mean log-prob of chosen - of rejected) - γ), Eq. 6 of the paper."
    averages_logps = True

    @property
    def nll_weight(self) -> float:
        """``loss.cpo_alpha``, or 0 if it is null."""
        return self.settings.cpo_alpha or 0.0

    def scores(self, logps: PairScores, facts: PairFacts) -> tuple[Tensor, Tensor]:
        """Return the mean log-probabilities."""
        return logps.chosen_P, logps.rejected_P

    def pair_loss(self, difference_P: Tensor) -> Tensor:
        """Return the loss of each pair, shape (P,)."""
        logits_P = self.settings.beta * difference_P - self.settings.simpo_gamma
        return smoothed_log_sigmoid(logits_P, self.settings.label_smoothing)

    def described(self) -> list[tuple[str, str]]:
        """Return the settings of the loss, with the target margin."""
        return [*super().described(), ("γ (`loss.simpo_gamma`)", f"{self.settings.simpo_gamma:g}")]


OBJECTIVE = SimPo
