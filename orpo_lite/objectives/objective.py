"""The contract of an objective: everything that training, planning, evaluation and the reports ask of it.

A new objective is a file of this package, named as ``LossSection.type`` names it.
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
"""What a model gives. policy_logps: :class:`PairLogps` of the model that is trained."""


class Divisors(NamedTuple):
    """What the sums of one optimizer step are divided by, over all its micro-batches and processes.

    Known before the first forward pass, so that the same pairs give the same gradient however they are cut up.
    """

    pairs: int
    nll_tokens: int


class Metric(NamedTuple):
    """How one metric is shown."""

    name: str
    """Its key in metrics.jsonl; held-out metrics have ``eval_`` in front."""
    label: str
    """In the table after a training."""
    meaning: str
    """In the model card, for people who did not train the model."""
    short: str = ""
    """In a line of progress; "" leaves it out there."""
    sign: Literal["", "+"] = ""
    """``+``: shown with its sign, for it may be below zero."""
    digits: int = 4
    """After the decimal point, in a line of progress."""
    is_share: bool = False
    """A share of the pairs, shown in per cent."""


class Objective(ABC):
    """A loss on preference pairs, of one recipe."""

    title: ClassVar[str]
    """Its name: ORPO."""
    paper: ClassVar[str]
    """The page that defines it."""
    formula: ClassVar[str]
    """The loss, in a sentence."""
    needs: ClassVar[frozenset[Need]] = frozenset({"policy_logps"})
    """What it needs of the model."""
    parts: ClassVar[tuple[str, ...]]
    """What :meth:`loss` returns besides the loss. Each is a sum over pairs divided by the step's divisors, so the parts
    of micro-batches and processes add up to those of the step."""
    shown: ClassVar[tuple[Metric, ...]]
    """The metrics for people, in their order."""

    def __init__(self, settings: LossSection) -> None:
        self.settings = settings

    def divisors(self, pairs: Sequence[TokenizedPair]) -> Divisors:
        """Return what the loss of a step on these pairs is divided by."""
        only = self.settings.completion_only_loss
        return Divisors(
            len(pairs), sum(nll_tokens(pair, completion_only_loss=only) for pair in pairs)
        )

    @abstractmethod
    def loss(self, logps: PairLogps, divisors: Divisors) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's share of the step's loss, to run backward on, and its detached ``parts``.

        A plan runs it on ``meta``, without values: no branch on a value, no boolean mask, no ``.item()``.

        Args:
            logps: of the P pairs of this micro-batch.
            divisors: of the whole optimizer step. Shares of all micro-batches and processes add up to the step's loss.
        """

    @abstractmethod
    def metrics(self, parts: Sequence[float]) -> dict[str, float]:
        """Return what is logged of a step, by the summed ``parts``; ``loss`` is among it."""

    def described(self) -> list[tuple[str, str]]:
        """Return the settings of the loss, each with its name, for the model card."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return what a model card says of it; lock.json keeps that with the run."""
        metrics = {f"eval_{metric.name}": metric.meaning for metric in self.shown}
        named = {"title": self.title, "paper": self.paper, "formula": self.formula}
        return {**named, "settings": dict(self.described()), "metrics": metrics}

    def line(self, metrics: Mapping[str, float], prefix: str = "") -> str:
        """Return the metrics of a step as one line; ``prefix`` is ``eval_`` for held-out ones."""
        known = ((metric, metrics[prefix + metric.name]) for metric in self.shown if metric.short)
        return "  ".join(
            f"{metric.short} {value:{metric.sign}.{metric.digits}f}" for metric, value in known
        )


def find_objective(settings: LossSection) -> Objective:
    """Return the ``OBJECTIVE`` of the file that ``loss.type`` names, with the recipe's settings.

    Raises:
        RecipeError: no model gives what it needs.
    """
    objective: Objective = import_module(f"orpo_lite.objectives.{settings.type}").OBJECTIVE(
        settings
    )
    if lacking := objective.needs.difference(get_args(Need)):
        raise RecipeError(
            where="loss.type",
            found=f"{settings.type} needs {', '.join(sorted(lacking))}",
            expected=f"an objective that needs no more than {', '.join(get_args(Need))}",
            fix=Overrides({"loss.type": LossSection().type}),
        )
    return objective
