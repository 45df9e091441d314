"""The JSON files of a run: metrics.jsonl, samples.jsonl and single objects, read with checks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from orpo_lite.errors import CheckpointError
from orpo_lite.runs.atomic import explained, write_text

Kinds = Mapping[str, type | UnionType]
"""Keys that must be there, and of what kind their values are; one of None may lack."""
FIGURE = int | float
SAMPLES = "samples.jsonl"


def read_json(file: Path, needed: Kinds | None = None) -> dict[str, Any]:
    """A JSON object of the run. Raises :class:`CheckpointError` when it is missing, broken or lacks what is needed."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file), found=f"cannot be read ({error})", expected="a file of a finished save"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            where=str(file), found="is not a JSON object", expected="a file of a finished save"
        )
    refuse_lacking(value, needed or {}, str(file))
    return value


def refuse_lacking(value: Mapping[str, Any], needed: Kinds, where: str) -> None:
    """Raise :class:`CheckpointError` unless each key that is needed holds a value of its kind."""
    for key, kind in needed.items():
        if not isinstance(value.get(key), kind):
            raise CheckpointError(
                where=where,
                found=f"{key} is {json.dumps(value[key])[:40]}" if key in value else f"lacks {key}",
                expected="what the training wrote",
                fix="put it back as it was",
            )


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl; a figure that is not finite becomes null, for JSON has no word for it."""
    known = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    file = path / "metrics.jsonl"
    with explained(file, file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(known) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, figures or null; [] before the first. Raises :class:`CheckpointError`."""
    return _read_rows(path / "metrics.jsonl", {"step": int}, FIGURE | None)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """All lines of samples.jsonl, which may not be there. Raises :class:`CheckpointError`."""
    return _read_rows(
        path / SAMPLES,
        {"prompt": str, "before": str, "after": str, "temperature": FIGURE | None},
        object,
    )


def _read_rows(file: Path, needed: Kinds, others: type | UnionType) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                where=f"{file}:{number}",
                found=f"cannot be read ({error})",
                expected="a line as it was written",
            ) from error
        if not isinstance(row, dict):
            raise CheckpointError(
                where=f"{file}:{number}",
                found="is not a JSON object",
                expected="a line as it was written",
            )
        refuse_lacking(row, {**dict.fromkeys(row, others), **needed}, f"{file}:{number}")
        rows.append(row)
    return rows


def _lines(file: Path) -> list[str]:
    """Those that end with a line feed: a text in JSON may well hold what else Python takes for the end of a line."""
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file), found=f"cannot be read ({error})", expected="a file of the run"
        ) from error
    return [line for line in text.split("\n") if line.strip()]


def cut_metrics(path: Path, step: int, evaluated: int | None) -> None:
    """Forget what a resumed run will write again: steps after ``step``, evaluations after ``evaluated``."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return
    kept = []
    for line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:  # cut short by the kill
            break
        last = (-1 if evaluated is None else evaluated) if "eval_loss" in row else step
        if row["step"] <= last:
            kept.append(line)
    write_text(file, "".join(f"{line}\n" for line in kept))
