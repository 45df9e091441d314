"""Read a run folder for the report. The run may still be training, or have damaged files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.errors import CheckpointError
from orpo_lite.evaluation.curves import Curves
from orpo_lite.evaluation.health import Finding, find_health
from orpo_lite.recipe.schema import SECTIONS
from orpo_lite.runs.atomic import sha256
from orpo_lite.runs.changes import Change, read_changes, values_in_force
from orpo_lite.runs.commands import new_run_command, quoted, resume_command
from orpo_lite.runs.folder import is_in_use
from orpo_lite.runs.lock import read_lock, read_recipe
from orpo_lite.runs.records import (
    METRICS,
    RESULT,
    Sample,
    read_json,
    read_samples,
    readable_metrics,
)

TRAINED_ON = (
    "These pairs are not known to be held out. If the run was trained on their prompts, its "
    "results look too good."
)
ADVICE = {
    "training": "The training still runs. Wait for more steps.",
    "stopped": "The training was stopped before its end. Continue it.",
}
"""State of an unfinished run -> the advice if it has too few steps for a verdict."""
VERDICTS = {"verdict.json": "At the end of the training", "eval.json": "Evaluated later"}
"""File in a run with the result of an evaluation -> when the evaluation was made."""


@dataclass
class RunRecord:
    """The content of a run folder, with a note for each file that cannot be read."""

    path: Path
    lock: Mapping[str, Any]
    settings: Mapping[str, Any]
    """``section.key`` -> its value, after the changes of resumed runs."""
    changes: Sequence[Change]
    rows: Sequence[Mapping[str, Any]]
    """The rows of metrics.jsonl. ``logps/*`` are means over tokens for every objective."""
    data: Mapping[str, Any]
    """The content of data.json, or {}."""
    plan: Mapping[str, Any]
    """The content of plan.json, or {}."""
    result: Mapping[str, Any]
    """The content of result.json, or {}. A finished training has this file."""
    verdicts: Mapping[str, Mapping[str, Any]]
    """When an evaluation was made -> the content of its file. See :data:`VERDICTS`."""
    answers: Sequence[Sample]
    """The answers of samples.jsonl."""
    is_in_use: bool = False
    """True if a process uses the folder, such as its training."""
    notes: list[str] = field(default_factory=list)
    """Sentences that say what could not be read."""

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read a run folder.

        Raises:
            CheckpointError: the folder is not a run.
        """
        notes: list[str] = []

        def optional(function: Any, *args: Any, default: Any) -> Any:
            try:
                return function(*args)
            except CheckpointError as error:
                notes.append(f"{error.where}: {error.found}")
                return default

        def object_in(name: str) -> dict[str, Any]:
            file = path / name
            return optional(read_json, file, default={}) if file.is_file() else {}

        recipe = dict(read_recipe(path).items())
        lock = optional(read_lock, path, default={})
        where = str(path / "lock.json")
        settings = optional(values_in_force, path, lock, default=recipe) if lock else recipe
        rows, damaged = optional(readable_metrics, path, default=([], 0))
        if not rows and (path / RESULT).is_file():
            notes.append(f"{path / METRICS}: is missing or empty, so there are no curves")
        if damaged:
            lines = f"{damaged} line{'' if damaged == 1 else 's'}"
            notes.append(f"{path / METRICS}: {lines} cannot be read")
        return cls(
            path=path,
            lock=lock,
            settings=settings,
            changes=optional(read_changes, lock, where, default=[]),
            rows=[_with_mean_logps(row) for row in rows],
            data=object_in("data.json"),
            plan=object_in("plan.json"),
            result=object_in(RESULT),
            verdicts={
                when: _about_run(found)
                for name, when in VERDICTS.items()
                if (found := object_in(name)) and _is_current(found, path, notes)
            },
            answers=optional(read_samples, path, default=[]),
            is_in_use=is_in_use(path),
            notes=notes,
        )

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.path.resolve().name

    @cached_property
    def steps(self) -> int:
        """The number of the last step in metrics.jsonl; 0 without metrics."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def is_finished(self) -> bool:
        """True if the training has ended, and was not continued after that."""
        steps = self.result.get("steps")
        return isinstance(steps, int) and steps >= self.steps

    @property
    def state(self) -> Literal["finished", "training", "stopped"]:
        """Whether the training has ended, goes on, or was stopped before its end."""
        if self.is_finished:
            return "finished"
        return "training" if self.is_in_use else "stopped"

    @property
    def planned_steps(self) -> int | None:
        """The number of steps of the whole training; None if unknown."""
        steps = self.settings.get("training.max_steps")
        if isinstance(steps, int) and steps > 0:
            return steps
        pairs, batch, epochs = (
            self.data.get("train_pairs"),
            self.settings.get("training.global_batch_size"),
            self.settings.get("training.num_train_epochs"),
        )
        if not (isinstance(pairs, int) and isinstance(batch, int) and batch):
            return None
        return math.ceil(float(epochs or 1) * math.ceil(pairs / batch))

    @cached_property
    def health(self) -> list[Finding]:
        """The verdicts on the curves, the gravest first."""
        findings = find_health(Curves.of(self.rows, self.settings, self.data))
        if self.is_finished:
            return findings
        return [
            replace(finding, advice=ADVICE[self.state], values={})
            if finding.name == "too-few-steps"
            else finding
            for finding in findings
        ]

    def command_for(self, finding: Finding, path: Path) -> str:
        """Return the command that ``finding`` advises; "" if it advises none.

        ``path`` is the run folder as the command should name it.
        """
        if finding.name == "too-few-steps" and self.state == "stopped":
            return resume_command(path).line
        return new_run_command(path, finding.values).line if finding.values else ""

    def held_out(self, step: int | None) -> Mapping[str, Any]:
        """Return the metrics of the last evaluation at ``step``; {} if there is none.

        If ``step`` is None, the last evaluation at any step is returned.
        """
        found = [
            row for row in self.rows if "eval_loss" in row and (step is None or row["step"] == step)
        ]
        return found[-1] if found else {}

    @property
    def kept(self) -> Mapping[str, Any]:
        """The held-out metrics of the kept adapter; during a run, the last held-out metrics."""
        kept = self.result.get("kept_step") if self.is_finished else None
        return self.held_out(kept if isinstance(kept, int) else None) or self.held_out(None)

    def source(self, key: str) -> str:
        """Return where the value of a setting comes from, such as ``command line``."""
        changed = [change for change in self.changes if change.key == key]
        if changed:
            return f"changed after step {changed[-1].after_step:,}"
        sources = self.lock.get("sources")
        if isinstance(sources, dict):
            return str(sources.get(key, "default"))
        # Runs of older versions did not record the sources.
        return "default" if self.settings[key] == default(key) else "recipe.yaml"


def _with_mean_logps(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row in which ``mean_logps/*``, if it has them, replace the sums ``logps/*``."""
    means = {key.replace("mean_logps", "logps"): row[key] for key in row if "mean_logps/" in key}
    return {**row, **means} if means else row


def default(key: str) -> Any:
    """Return the default value of a recipe key ``section.key``; None if there is no such key."""
    section, _, name = key.partition(".")
    fields = SECTIONS[section].model_fields if section in SECTIONS else {}
    return fields[name].default if name in fields else None


def rows_of(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the dicts in the list ``value[key]``, or [] if ``value[key]`` is not a list."""
    rows = value.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _is_current(found: Mapping[str, Any], path: Path, notes: list[str]) -> bool:
    """Return whether an evaluation is about the run's present adapter; else add a note."""
    weights = path / "adapter" / ADAPTER_WEIGHTS
    known = found.get("adapter")
    if known is None or (weights.is_file() and known == sha256(weights)):
        return True
    notes.append(
        f"eval.json is about an earlier adapter and is not shown: orpo-lite eval {quoted(path)} "
        "computes it again"
    )
    return False


def _about_run(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an evaluation with only the comparisons of this run, and with a warning if needed."""
    rows = [dict(row) for row in rows_of(found, "comparisons")]
    if "run" in found:
        rows = [row for row in rows if row.get("model") == found["run"]]
    if found.get("held_out") is False:
        for row in rows:
            row["text"] = f"{row.get('text', '')} {TRAINED_ON}"
    return {**found, "comparisons": rows}
