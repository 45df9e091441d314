"""Write and read the JSON files of a run: metrics, scores of pairs, samples, single objects."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from orpo_lite.errors import CheckpointError
from orpo_lite.runs.atomic import explain_write_errors, write_text

ValueTypes = Mapping[str, type | UnionType]
"""Required keys -> the type of their values. A key may be missing if its type includes None."""
FIGURE = int | float
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SCORES = "pair_scores.jsonl"


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
    check_values(value, needed or {}, str(file))
    return value


def check_values(value: Mapping[str, Any], needed: ValueTypes, where: str) -> None:
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
    known = {
        key: _known(value) if isinstance(value, float) else value for key, value in row.items()
    }
    _append(path / METRICS, known)


def append_scores(
    path: Path,
    step: int,
    chosen: Sequence[float],
    rejected: Sequence[float],
    nll: Sequence[float],
    nll_tokens: Sequence[float],
) -> None:
    """Append one line to pair_scores.jsonl: the scores of each held-out pair, in order.

    Args:
        path: the run folder.
        step: the step that was evaluated.
        chosen: mean log-probability of each chosen reply.
        rejected: the same of each rejected reply.
        nll: negative log-likelihood of each chosen sequence's counted tokens, summed.
        nll_tokens: the number of those tokens.
    """
    numbers = {"chosen": chosen, "rejected": rejected, "nll": nll}
    rounded = {name: [_rounded(value) for value in values] for name, values in numbers.items()}
    _append(
        path / SCORES, {"step": step, **rounded, "nll_tokens": [int(count) for count in nll_tokens]}
    )


def _append(file: Path, row: Mapping[str, Any]) -> None:
    with explain_write_errors(file, file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    """Return a float32 in as few digits as identify it."""
    return _known(float(f"{value:.9g}"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics.jsonl, [] if there is none.

    Raises:
        CheckpointError: a line is damaged, or a value is neither a number nor null.
    """
    return _read_rows(path / METRICS, {"step": int}, FIGURE | None)


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


def read_before_after(path: Path) -> list[dict[str, Any]]:
    """Return the prompts of samples.jsonl in order, each with its first and its last answer.

    The keys are source, prompt, before, after and temperature. A row holds either both answers, or
    ``answer`` at a ``step``; step 0 is before the training.

    Raises:
        CheckpointError: a line is damaged.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in _read_rows(path / SAMPLES, {"prompt": str}, object):
        place = (row.get("source", "held-out"), row["prompt"])
        both = {key: row.get(key, row.get("answer")) for key in ("before", "after")}
        needed: ValueTypes = {"before": str, "after": str, "temperature": FIGURE | None}
        both["temperature"] = row.get("temperature")
        check_values(both, needed, str(path / SAMPLES))
        known = found.setdefault(place, {"source": place[0], "prompt": place[1], **both})
        known["after"] = both["after"]
    return [*found.values()]


def readable_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of metrics.jsonl that can be read, and how many lines cannot.

    A last line without its line feed is still being written. It is not counted.
    """
    file = path / "metrics.jsonl"
    rows, damaged = [], 0
    lines = _lines(file)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            check_values(row, {**dict.fromkeys(row, FIGURE | None), "step": int}, str(file))
        except (ValueError, TypeError, AttributeError, CheckpointError):
            damaged += number < len(lines) or file.read_bytes().endswith(b"\n")
        else:
            rows.append(row)
    return rows, damaged


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
        check_values(row, {**dict.fromkeys(row, others), **needed}, f"{file}:{number}")
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


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Return all rows of pair_scores.jsonl, [] if there is none.

    Raises:
        CheckpointError: a line is damaged.
    """
    lists = dict.fromkeys(("chosen", "rejected", "nll", "nll_tokens"), list)
    return _read_rows(path / SCORES, {"step": int, **lists}, object)


def cut_records(path: Path, step: int, evaluated: int | None) -> None:
    """Remove the rows of metrics.jsonl and pair_scores.jsonl that a resumed run writes again.

    These are steps after ``step`` and evaluations after ``evaluated`` (None: all evaluations).
    """
    last_evaluation = -1 if evaluated is None else evaluated
    for name, mark in ((METRICS, "eval_loss"), (SCORES, "nll_tokens")):
        file = path / name
        if not file.is_file():
            continue
        kept = []
        for line in _lines(file):
            try:
                row = json.loads(line)
            except ValueError:  # cut off when the process was killed
                break
            if row["step"] <= (last_evaluation if mark in row else step):
                kept.append(line)
        write_text(file, "".join(f"{line}\n" for line in kept))
