"""Where a training stands: what the loop changes, and what a checkpoint's state.json holds."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from orpo_lite.errors import CheckpointError

VERSION = 1
"""Of the JSON form. Version 0 had no number, and other names: :data:`NAMES_OF_0`."""
NAMES_OF_0 = {
    "evaluated": "evaluated_step",
    "worse": "worse_in_a_row",
    "bad": "bad_in_a_row",
    "levers": "memory",
}


@dataclass
class TrainState:
    """A training after ``step`` finished optimizer steps."""

    step: int = 0
    evaluated_step: int | None = None
    """The step of the last evaluation."""
    best_step: int | None = None
    """The step of the lowest held-out loss."""
    best_loss: float | None = None
    worse_in_a_row: int = 0
    """Evaluations in a row that were no better than the best one."""
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step; {} without held-out pairs."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the best step."""
    latest: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation."""
    bad_in_a_row: int = 0
    """Steps in a row of which loss or gradient was not finite."""
    num_tokens: int = 0
    """Tokens of all pairs so far, both replies with their prompts."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Settings of ``memory`` that a step which ran out of memory was done again with."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The optimizer's scalars, in a checkpoint alone; its tensors have a file of their own."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """The state of the loss scaler, in a checkpoint alone; {} where activations are not float16."""

    def count_step(self, tokens: int, *, finite: bool) -> None:
        """Count a step on so many tokens."""
        self.step += 1
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.num_tokens += tokens

    def note_evaluation(self, metrics: dict[str, float]) -> bool:
        """Note the held-out metrics of this step, {} where no pairs are held out; return whether they are the best."""
        self.evaluated_step = self.step
        if not metrics:
            return False
        self.latest = metrics
        if self.step == 0:
            self.before = metrics
        if not metrics["eval_loss"] < (
            math.inf if self.best_loss is None else self.best_loss
        ):  # which no NaN is
            self.worse_in_a_row += 1
            return False
        self.best_loss, self.best_step, self.worse_in_a_row, self.after = (
            metrics["eval_loss"],
            self.step,
            0,
            metrics,
        )
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the version."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Self:
        """Read :meth:`to_json` back, of this version or an earlier one. Raises :class:`CheckpointError`."""
        known = dict(value)
        version = known.pop("version", 0)
        if version == 0:
            known = {NAMES_OF_0.get(name, name): entry for name, entry in known.items()}
        names = {each.name for each in fields(cls)}
        if version not in range(VERSION + 1) or known.keys() != names:
            raise CheckpointError(
                where=where,
                found=f"is of version {version}"
                if version not in range(VERSION + 1)
                else "has other fields",
                expected=f"version {VERSION} or an earlier one",
                fix="go on with the version of orpo-lite that lock.json names",
            )
        return cls(**known)
