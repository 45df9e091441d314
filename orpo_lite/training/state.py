"""Define the state of a training. The loop changes it, and a checkpoint stores it in state.json."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from orpo_lite.errors import CheckpointError

VERSION = 2
"""Version of state.json. Files of version 0 have no version number. Version 2 added kl_coef."""
NAMES_OF_0 = {
    "evaluated": "evaluated_step",
    "worse": "worse_in_a_row",
    "bad": "bad_in_a_row",
    "levers": "memory",
}
"""Names of fields in version 0 -> names now."""


@dataclass
class TrainState:
    """The state of a training after ``step`` finished optimizer steps."""

    step: int = 0
    evaluated_step: int | None = None
    """The step of the last evaluation; None before the first one."""
    best_step: int | None = None
    """The step with the lowest held-out loss."""
    best_loss: float | None = None
    """The held-out loss of the step ``best_step``."""
    worse_in_a_row: int = 0
    """Number of evaluations in a row without a lower held-out loss."""
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step; {} without held-out pairs."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the best step. After the training: of the step whose adapter is kept."""
    latest: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation."""
    bad_in_a_row: int = 0
    """Number of steps in a row whose loss or gradient was not finite."""
    num_tokens: int = 0
    """Number of tokens in all pairs so far. A pair has two replies, each with its prompt."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Settings of ``memory`` that were changed because a step ran out of memory."""
    kl_coef: float | None = None
    """The weight of PPO's KL penalty in the next step. None: ``loss.kl_coef``."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Scalars of the optimizer's state. {} except in a checkpoint, which stores the state's tensors
    in another file."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the loss scaler. {} except in a checkpoint if activations are float16."""

    def count_step(self, tokens: int, *, finite: bool) -> None:
        """Add a step with ``tokens`` tokens to the counts.

        ``finite``: whether loss and gradient of the step were finite.
        """
        self.step += 1
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.num_tokens += tokens

    def note_evaluation(self, metrics: dict[str, float]) -> bool:
        """Record the held-out metrics of this step. Return whether the loss is the lowest so far.

        ``metrics`` is {} if no pairs are held out. The result is then False.
        """
        self.evaluated_step = self.step
        if not metrics:
            return False
        self.latest = metrics
        if self.step == 0:
            self.before = metrics
        loss = metrics["eval_loss"]
        is_best = loss < (math.inf if self.best_loss is None else self.best_loss)  # False for NaN
        if not is_best:
            self.worse_in_a_row += 1
            return False
        self.best_loss, self.best_step, self.after = loss, self.step, metrics
        self.worse_in_a_row = 0
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the content of state.json: the fields and the version number."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Self:
        """Return the state that a state.json describes. Older versions of the file are read too.

        Args:
            value: the JSON object in the file.
            where: the file's path, for the error.

        Raises:
            CheckpointError: the version is unknown, or fields are missing or unknown.
        """
        values = dict(value)
        version = values.pop("version", 0)
        if version == 0:
            values = {NAMES_OF_0.get(name, name): entry for name, entry in values.items()}
        if version in (0, 1):
            values.setdefault("kl_coef", None)
        found = ""
        if version not in range(VERSION + 1):
            found = f"has version {version}"
        elif values.keys() != {field.name for field in fields(cls)}:
            found = "has missing or unknown fields"
        if found:
            raise CheckpointError(
                where=where,
                found=found,
                expected=f"the fields of version {VERSION} or of an earlier version",
                fix="resume with the version of orpo-lite that lock.json names",
            )
        return cls(**values)
