"""CPO: contrastive preference optimization, DPO without a reference model (arXiv 2401.08417)."""

from torch import Tensor

from orpo_lite.data.packing import PairFacts
from orpo_lite.objectives.pairwise import PairwiseObjective, smoothed_log_sigmoid, times_tokens
from orpo_lite.ops.outputs import PairScores


class Cpo(PairwiseObjective):
    """The CPO objective, ``L = -log σ(β (log π(y_w|x) - log π(y_l|x))) + cpo_alpha * NLL``."""

    title = "CPO"
    paper = "https://arxiv.org/abs/2401.08417"
    formula = "L = -log σ(β · (log-prob of chosen - log-prob of rejected)) + α · NLL of chosen."

    @property
    def nll_weight(self) -> float:
        """``loss.cpo_alpha``, or 1 if it is null."""
        return 1.0 if self.settings.cpo_alpha is None else self.settings.cpo_alpha

    def scores(self, logps: PairScores, facts: PairFacts) -> tuple[Tensor, Tensor]:
        """Return the summed log-probabilities."""
        return times_tokens(logps.chosen_P, logps.rejected_P, facts)

    def pair_loss(self, difference_P: Tensor) -> Tensor:
        """Return the loss of each pair, shape (P,)."""
        beta = self.settings.beta
        return smoothed_log_sigmoid(beta * difference_P, self.settings.label_smoothing)


OBJECTIVE = Cpo
