"""Read the JSON files of a run with checks: metrics.jsonl, samples.jsonl and single objects."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from orpo_lite.errors import CheckpointError
from orpo_lite.runs.atomic import explain_write_errors, write_text

ValueTypes = Mapping[str, type | UnionType]
"""Required keys -> the type of their values. A key may be missing if its type includes None."""
FIGURE = int | float
SAMPLES = "samples.jsonl"


def read_json(file: Path, needed: ValueTypes | None = None) -> dict[str, Any]:
    """Return the JSON object in a file of the run.

    Raises:
        CheckpointError: it is missing, damaged or lacks a needed value.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file), found=f"cannot be read ({error})", expected="the file as it was saved"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            where=str(file), found="is not a JSON object", expected="the file as it was saved"
        )
    refuse_lacking(value, needed or {}, str(file))
    return value


def refuse_lacking(value: Mapping[str, Any], needed: ValueTypes, where: str) -> None:
    """Raise :class:`CheckpointError` unless each needed key holds a value of its type."""
    for key, value_type in needed.items():
        if not isinstance(value.get(key), value_type):
            raise CheckpointError(
                where=where,
                found=f"{key} is {json.dumps(value[key])[:40]}" if key in value else f"lacks {key}",
                expected="the value that the training wrote",
                fix="restore the original value",
            )


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl. NaN and infinite values become null, as in JSON."""
    known = dict(row)
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            known[key] = None
    file = path / "metrics.jsonl"
    with explain_write_errors(file, file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(known) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics.jsonl, [] if there is none.

    Raises:
        CheckpointError: a line is damaged, or a value is neither a number nor null.
    """
    return _read_rows(path / "metrics.jsonl", {"step": int}, FIGURE | None)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return all rows of samples.jsonl, [] if there is none.

    Raises:
        CheckpointError: a line is damaged.
    """
    return _read_rows(
        path / SAMPLES,
        {"prompt": str, "before": str, "after": str, "temperature": FIGURE | None},
        object,
    )


def _read_rows(file: Path, needed: ValueTypes, others: type | UnionType) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                where=f"{file}:{number}",
                found=f"cannot be read ({error})",
                expected="the line as it was written",
            ) from error
        if not isinstance(row, dict):
            raise CheckpointError(
                where=f"{file}:{number}",
                found="is not a JSON object",
                expected="the line as it was written",
            )
        refuse_lacking(row, {**dict.fromkeys(row, others), **needed}, f"{file}:{number}")
        rows.append(row)
    return rows


def _lines(file: Path) -> list[str]:
    """Return the lines of a file, split at line feeds only.

    str.splitlines also splits at characters that a JSON string may contain.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file), found=f"cannot be read ({error})", expected="a file of the run"
        ) from error
    return [line for line in text.split("\n") if line.strip()]


def cut_metrics(path: Path, step: int, evaluated: int | None) -> None:
    """Remove the rows that a resumed run writes again.

    These are steps after ``step`` and evaluations after ``evaluated`` (None: all evaluations).
    """
    file = path / "metrics.jsonl"
    if not file.is_file():
        return
    kept = []
    last_evaluation = -1 if evaluated is None else evaluated
    for line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:  # cut off when the process was killed
            break
        last = last_evaluation if "eval_loss" in row else step
        if row["step"] <= last:
            kept.append(line)
    write_text(file, "".join(f"{line}\n" for line in kept))
