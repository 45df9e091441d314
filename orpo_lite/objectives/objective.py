"""Define the interface of an objective for training, planning, evaluation and reports.

A new objective is a file of this package, named like its ``LossSection.type``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from orpo_lite.data.packing import nll_tokens
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import Overrides, RecipeError
from orpo_lite.ops.outputs import PairLogps
from orpo_lite.recipe.schema import LossSection

Need = Literal["policy_logps"]
"""An output of a model. policy_logps: :class:`PairLogps` of the trained model."""


class Divisors(NamedTuple):
    """The numbers that the sums of an optimizer step are divided by.

    They are known before the first forward pass, so the gradient does not depend on how the pairs
    are split into micro-batches.
    """

    pairs: int
    nll_tokens: int


class Metric(NamedTuple):
    """A metric, and the format in which it is printed."""

    name: str
    """Its key in metrics.jsonl; held-out metrics have the prefix ``eval_``."""
    label: str
    """Its name in the table after a training."""
    meaning: str
    """Its description in the model card, for people who did not train the model."""
    short: str = ""
    """Its name in a line of progress; "" leaves it out there."""
    sign: Literal["", "+"] = ""
    """``+``: always shown with its sign, because it may be negative."""
    digits: int = 4
    """Digits after the decimal point in a line of progress."""
    is_share: bool = False
    """It is a share of the pairs, shown in percent."""


class Objective(ABC):
    """A loss on preference pairs with the settings of one recipe."""

    title: ClassVar[str]
    """Its name, for instance ORPO."""
    paper: ClassVar[str]
    """The URL of the paper that defines it."""
    formula: ClassVar[str]
    """The formula of the loss, as a sentence."""
    needs: ClassVar[frozenset[Need]] = frozenset({"policy_logps"})
    """The model outputs that it needs."""
    parts: ClassVar[tuple[str, ...]]
    """Names of the values that :meth:`loss` returns next to the loss. Each is a sum over pairs
    divided by the step's divisors, so the values of micro-batches and processes add up to those of
    the step."""
    shown: ClassVar[tuple[Metric, ...]]
    """The metrics shown to people, in order."""

    def __init__(self, settings: LossSection) -> None:
        self.settings = settings

    def divisors(self, pairs: Sequence[TokenizedPair]) -> Divisors:
        """Return the divisors of the loss of a step on these pairs."""
        only = self.settings.completion_only_loss
        tokens = sum(nll_tokens(pair, completion_only_loss=only) for pair in pairs)
        return Divisors(len(pairs), tokens)

    @abstractmethod
    def loss(self, logps: PairLogps, divisors: Divisors) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's share of the step's loss, to run backward on, and its detached
        parts.

        A plan runs it on the meta device, which has no values: do not branch on a value or use a
        boolean mask or ``.item()``.

        Args:
            logps: log-probabilities of the P pairs of this micro-batch.
            divisors: divisors of the whole optimizer step. The shares of all micro-batches and
                processes add up to the step's loss.

        Returns:
            A scalar, and the values of ``parts`` as a tensor of shape (len(parts),).
        """

    @abstractmethod
    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return the logged metrics of a step from its summed ``parts``; they include ``loss``."""

    def described(self) -> list[tuple[str, str]]:
        """Return (name, value) of each setting of the loss, for the model card."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return the description for the model card, which lock.json stores."""
        metrics = {f"eval_{metric.name}": metric.meaning for metric in self.shown}
        named = {"title": self.title, "paper": self.paper, "formula": self.formula}
        return {**named, "settings": dict(self.described()), "metrics": metrics}

    def line(self, metrics: Mapping[str, float], prefix: str = "") -> str:
        """Return a step's metrics as one line; ``prefix`` is ``eval_`` for held-out metrics."""
        texts = []
        for metric in self.shown:
            if metric.short:
                value = metrics[prefix + metric.name]
                texts.append(f"{metric.short} {value:{metric.sign}.{metric.digits}f}")
        return "  ".join(texts)


def find_objective(settings: LossSection) -> Objective:
    """Return the ``OBJECTIVE`` of the file that ``loss.type`` names, with the recipe's settings.

    Raises:
        RecipeError: it needs an output that no model has.
    """
    module = import_module(f"orpo_lite.objectives.{settings.type}")
    objective: Objective = module.OBJECTIVE(settings)
    if missing := objective.needs.difference(get_args(Need)):
        raise RecipeError(
            where="loss.type",
            found=f"{settings.type} needs {', '.join(sorted(missing))}",
            expected=f"an objective that needs only {', '.join(get_args(Need))}",
            fix=Overrides({"loss.type": LossSection().type}),
        )
    return objective
