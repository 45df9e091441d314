"""Define the interface of an objective for training, planning, evaluation and reports.

To add an objective, add a file to this package, and add the file's name to the values of
``orpo_lite.recipe.loss.LossType``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from orpo_lite.data.packing import PairFacts, nll_tokens
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import Overrides, RecipeError
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.loss import LossSection
from orpo_lite.recipe.values import is_on_hub

Need = Literal["rejected", "reference"]
"""What an objective can need in addition to the chosen responses' log-probabilities.

rejected: the log-probabilities of the rejected responses. reference: both log-probabilities under
the reference model."""


class Divisors(NamedTuple):
    """The numbers by which a loss divides its sums over an optimizer step.

    They are known before the first forward pass. Therefore the gradient does not depend on how the
    pairs are split into micro-batches.
    """

    pairs: int
    """Number of pairs in the step."""
    nll_tokens: int
    """Number of tokens that the step's NLL counts."""


class Metric(NamedTuple):
    """A metric, and the format in which it is printed."""

    name: str
    """Key in metrics.jsonl. Metrics of held-out pairs have the prefix ``eval_``."""
    label: str
    """Name in the table that is printed after a training."""
    meaning: str
    """Description in the model card, for people who did not train the model."""
    short: str = ""
    """Name in the progress lines; "" if these lines do not show the metric."""
    sign: Literal["", "+"] = ""
    """``+``: print a plus sign too, because the value may be negative."""
    digits: int = 4
    """Digits after the decimal point in the progress lines."""
    is_share: bool = False
    """True if the metric is a share of the pairs. A share is printed in percent."""


LOSS = Metric("loss", "loss", "loss", "loss")
NLL = Metric("nll_loss", "NLL of the chosen", "NLL of the chosen", "nll")


class Objective(ABC):
    """A loss on preference pairs with the settings of one recipe."""

    title: ClassVar[str]
    """Name of the objective, for instance ORPO."""
    paper: ClassVar[str]
    """URL of the paper that defines the objective."""
    formula: ClassVar[str]
    """The formula of the loss, as a sentence."""
    needs: ClassVar[frozenset[Need]] = frozenset({"rejected"})
    """What the objective needs in addition to the chosen responses' log-probabilities."""
    parts: ClassVar[tuple[str, ...]]
    """Names of the values that :meth:`loss` returns in addition to the loss.

    Each value is a sum over pairs, divided by a divisor of the whole step. The step's value is
    therefore the sum of the values of all micro-batches and processes.
    """
    shown: ClassVar[tuple[Metric, ...]]
    """The metrics shown to people, in order."""

    def __init__(self, settings: LossSection) -> None:
        self.settings = settings

    @property
    def rewards_start_at_zero(self) -> bool:
        """True if every reward is 0 before the first step, so that pairs have no preferred reply.

        Rounding may give rewards close to 0 instead.
        """
        return False

    def divisors(self, pairs: Sequence[TokenizedPair]) -> Divisors:
        """Return the divisors of the loss: the number of pairs, and the number of NLL tokens.

        ``pairs``: all pairs of an optimizer step or of an evaluation.
        """
        only = self.settings.counts_only_completion
        tokens = sum(nll_tokens(pair, completion_only_loss=only) for pair in pairs)
        return Divisors(len(pairs), tokens)

    @abstractmethod
    def loss(
        self, scores: PairScores, facts: PairFacts, divisors: Divisors
    ) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's shares of the step's loss and of the values named in ``parts``.

        The shares of all micro-batches and processes add up to the step's loss. The planner calls
        this method on the meta device, where tensors have no values. So an objective must not
        branch on a value, and must not use a boolean mask or ``.item()``.

        Args:
            scores: log-probabilities of the P pairs of this micro-batch, or rewards if
                ``loss.type`` trains a reward model. If the objective does not need ``rejected``,
                the rejected scores are NaN in a training step.
            facts: the lengths of the P pairs. If the objective needs ``reference``, also their
                log-probabilities under the reference model.
            divisors: the numbers of pairs and of NLL tokens in the whole optimizer step. The loss
                divides its sums over the micro-batch by them.

        Returns:
            The share of the loss as a scalar for the backward pass, and the shares of the values
            named in ``parts`` as a detached tensor of shape (len(parts),).
        """

    @abstractmethod
    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return name -> value of each metric of a step or evaluation. One metric is ``loss``.

        ``parts``: the values that ``self.parts`` names, in the same order. Each value is already
        summed over all micro-batches and processes.
        """

    def described(self) -> list[tuple[str, str]]:
        """Return a (name, value) pair for each setting of the loss, for the model card."""
        return []

    def nll_setting(self) -> tuple[str, str]:
        """Return which tokens the NLL counts, as an item of :meth:`described`."""
        only_response = self.settings.counts_only_completion
        scope = "the chosen response" if only_response else "prompt and chosen response"
        is_by_token = self.settings.nll_reduction == "token"
        mean = "all tokens of a step" if is_by_token else "each response, then over pairs"
        return "NLL counts", f"{scope}; mean over {mean}"

    def to_json(self) -> dict[str, Any]:
        """Return a description of the objective. lock.json stores it for the model card."""
        metrics = {f"eval_{metric.name}": metric.meaning for metric in self.shown}
        named = {"title": self.title, "paper": self.paper, "formula": self.formula}
        return {**named, "settings": dict(self.described()), "metrics": metrics}

    def line(self, metrics: Mapping[str, float], prefix: str = "") -> str:
        """Return the metrics as one line of text. ``prefix`` is ``eval_`` for held-out pairs."""
        texts = []
        for metric in self.shown:
            if metric.short:
                value = metrics[prefix + metric.name]
                texts.append(f"{metric.short} {value:{metric.sign}.{metric.digits}f}")
        return "  ".join(texts)


def mean_nll(logps: PairScores, divisors: Divisors, reduction: Literal["token", "pair"]) -> Tensor:
    """Return a micro-batch's share of the step's NLL, a scalar.

    ``reduction``: ``token``: mean over all counted tokens of the step. ``pair``: first the mean of
    each chosen sequence, then the mean over pairs.
    """
    if reduction == "token":
        return logps.nll_P.sum() / divisors.nll_tokens
    return (logps.nll_P / logps.nll_tokens_P).sum() / divisors.pairs


def reference_setting(settings: LossSection) -> tuple[str, str]:
    """Return the reference model, as an item of :meth:`Objective.described`.

    A path of an adapter is private and is not named.
    """
    named = settings.reference_adapter_name_or_path
    text = "the model before the training"
    if named == "base":
        text = "the base"
    elif named:
        text = f"the base with {named if is_on_hub(named) else 'another adapter'}"
    return "reference model", text


def find_objective(settings: LossSection) -> Objective:
    """Return the objective for the recipe's ``loss`` settings.

    Its class is ``OBJECTIVE`` in the module that ``loss.type`` names: the type ``orpo`` ->
    ``OBJECTIVE`` in ``orpo.py``.

    Raises:
        RecipeError: the objective needs an output that no model returns.
    """
    module = import_module(f"orpo_lite.objectives.{settings.type}")
    objective: Objective = module.OBJECTIVE(settings)
    if missing := objective.needs.difference(get_args(Need)):
        raise RecipeError(
            where="loss.type",
            found=f"{settings.type} needs {', '.join(sorted(missing))}, which no model returns",
            expected=f"an objective that needs only {', '.join(get_args(Need))}",
            fix=Overrides({"loss.type": LossSection().type}),
        )
    return objective
