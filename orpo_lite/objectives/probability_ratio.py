"""The probability ratio, which the ORPO paper compares with the odds ratio (Appendix B)."""

from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.pairwise import PairwiseObjective, smoothed_log_sigmoid, times_tokens
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.loss import LossSection


class ProbabilityRatio(PairwiseObjective):
    """ORPO with the probability ratio, ``L = NLL - beta * log σ(log P_w - log P_l)`` (Eq. 16).

    P is the mean or the summed log-probability of a response: see ``loss.ratio_of``.
    """

    title = "Probability ratio"
    paper = "https://arxiv.org/abs/2403.07691"
    formula = "L = NLL + λ · -log σ(log P(chosen) - log P(rejected)), Appendix B of ORPO's paper."

    def __init__(self, settings: LossSection) -> None:
        super().__init__(settings)
        self.averages_logps = settings.ratio_of == "mean"

    @property
    def nll_weight(self) -> float:
        """1: the NLL is the main part of the loss."""
        return 1.0

    def scores(self, logps: PairScores, facts: PairFacts) -> tuple[Tensor, Tensor]:
        """Return the mean or the summed log-probabilities."""
        if self.settings.ratio_of == "mean":
            return logps.chosen_P, logps.rejected_P
        return times_tokens(logps.chosen_P, logps.rejected_P, facts)

    def pair_loss(self, difference_P: Tensor) -> Tensor:
        """Return the loss of each pair, shape (P,)."""
        return self.settings.beta * smoothed_log_sigmoid(difference_P, 0.0)

    def described(self) -> list[tuple[str, str]]:
        """Return λ, which log-probability the ratio compares, and which tokens the NLL counts."""
        return [
            ("λ (`loss.beta`)", f"{self.settings.beta:g}"),
            ("log-probability of a response", self.settings.ratio_of),
            self.nll_setting(),
        ]


OBJECTIVE = ProbabilityRatio
