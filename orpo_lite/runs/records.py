"""Write and read the JSON files of a run: metrics, scores of pairs, samples and single objects."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from orpo_lite.errors import CheckpointError
from orpo_lite.runs.atomic import explain_write_errors, write_text

ValueTypes = Mapping[str, type | UnionType]
"""Key -> the type of its value. If the type includes None, the key may be missing."""
FIGURE = int | float
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SCORES = "pair_scores.jsonl"
RESULT = "result.json"
REPORT = "report.html"


def read_json(file: Path, needed: ValueTypes | None = None) -> dict[str, Any]:
    """Return the JSON object in a file of the run.

    ``needed`` gives the keys that the object must have, and the types of their values.

    Raises:
        CheckpointError: the file is missing or damaged, or lacks a needed value.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file),
            found=f"cannot be read ({error})",
            expected="the file as orpo-lite wrote it",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            where=str(file), found="is not a JSON object", expected="the file as orpo-lite wrote it"
        )
    check_values(value, needed or {}, str(file))
    return value


def check_values(value: Mapping[str, Any], needed: ValueTypes, where: str) -> None:
    """Raise :class:`CheckpointError` if a needed key is missing or has a value of a wrong type.

    ``where`` is the place to show in the message, such as a file or "FILE:LINE".
    """
    for key, value_type in needed.items():
        if not isinstance(value.get(key), value_type):
            raise CheckpointError(
                where=where,
                found=f"{key} is {json.dumps(value[key])[:40]}" if key in value else f"lacks {key}",
                expected="the value that the training wrote",
                fix="restore the original value",
            )


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl.

    NaN and infinite values become null, because JSON has no such numbers.
    """
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
    """Append one line to pair_scores.jsonl: the scores of all held-out pairs, in their order.

    Args:
        path: the run folder.
        step: the step that was evaluated.
        chosen: for each pair, the mean log-probability of the chosen reply's tokens.
        rejected: for each pair, the mean log-probability of the rejected reply's tokens.
        nll: for each pair, the sum of the negative log-likelihoods of the tokens that the NLL term
            of the loss counts.
        nll_tokens: for each pair, the number of these tokens.
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
    """Return a float32 rounded to 9 significant digits, which identify it."""
    return _known(float(f"{value:.9g}"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics.jsonl, or [] if the file does not exist.

    Raises:
        CheckpointError: a line is damaged, or a value is neither a number nor null.
    """
    return _read_rows(path / METRICS, {"step": int}, FIGURE | None)


@dataclass(frozen=True)
class Sample:
    """A prompt, and its answers before, during and after a training.

    The answers have no special tokens.
    """

    source: str
    """Where the prompt is from: "neutral" (a fixed prompt of ours) or "held-out" (the data)."""
    prompt: str
    before: str
    """The answer of the base without the adapter, loaded as in the training (often in 4 bit)."""
    after: str
    """The answer of the kept adapter. While the run has no result.json, it is the newest answer."""
    temperature: float | None
    """Sampling temperature, or None if the run did not record it."""
    by_step: Mapping[int, str]
    """Step -> answer at this step, sorted by step. Empty for runs of older versions."""


def append_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to samples.jsonl with a single write."""
    file = path / SAMPLES
    with explain_write_errors(file, file), file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_samples(path: Path) -> list[Sample]:
    """Return the prompts in samples.jsonl with their answers, or [] if the file does not exist.

    Raises:
        CheckpointError: a line is damaged.
    """
    rows = _read_rows(path / SAMPLES, {"prompt": str, "temperature": FIGURE | None}, object)
    known = read_json(path / RESULT) if (path / RESULT).is_file() else {}
    answers: dict[tuple[str, str], dict[int, str]] = {}
    temperatures: dict[tuple[str, str], float | None] = {}
    samples = []
    for number, row in enumerate(rows, 1):
        source, prompt = row.get("source", "held-out"), row["prompt"]
        is_old = "before" in row
        needed: ValueTypes = (
            {"before": str, "after": str} if is_old else {"step": int, "answer": str}
        )
        check_values(row, needed, f"{path / SAMPLES}:{number}")
        if is_old:
            before, after = row["before"], row["after"]
            samples.append(Sample(source, prompt, before, after, row.get("temperature"), {}))
            continue
        answers.setdefault((source, prompt), {})[row["step"]] = row["answer"]
        temperatures[source, prompt] = row.get("temperature")
    for key, unsorted in answers.items():
        by_step = dict(sorted(unsorted.items()))
        last = [*by_step.values()][-1]
        after = by_step.get(known.get("kept_step", -1), last)
        before = by_step.get(0, "")
        samples.append(Sample(*key, before, after, temperatures[key], by_step))
    return samples


def readable_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return (rows, damaged): the readable rows of metrics.jsonl, and the number of damaged lines.

    If the last line has no line feed, it is still being written and does not count as damaged.
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
                expected="the line as orpo-lite wrote it",
            ) from error
        if not isinstance(row, dict):
            raise CheckpointError(
                where=f"{file}:{number}",
                found="is not a JSON object",
                expected="the line as orpo-lite wrote it",
            )
        check_values(row, {**dict.fromkeys(row, others), **needed}, f"{file}:{number}")
        rows.append(row)
    return rows


def _lines(file: Path) -> list[str]:
    """Return the lines of a file that are not empty. They are split only at line feeds.

    str.splitlines would also split at other characters, which a JSON string may contain.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file),
            found=f"cannot be read ({error})",
            expected="a readable file of the run",
        ) from error
    return [line for line in text.split("\n") if line.strip()]


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Return all rows of pair_scores.jsonl, or [] if the file does not exist.

    Raises:
        CheckpointError: a line is damaged.
    """
    lists = dict.fromkeys(("chosen", "rejected", "nll", "nll_tokens"), list)
    return _read_rows(path / SCORES, {"step": int, **lists}, object)


def cut_records(path: Path, step: int, evaluated: int | None) -> None:
    """Remove the rows of metrics, scores and samples that a resumed run will write again.

    Args:
        path: the run folder.
        step: the step of the checkpoint. Metrics and answers of later steps are removed.
        evaluated: the step of the last evaluation to keep. Later evaluations are removed. None:
            remove all evaluations.
    """
    last_evaluation = -1 if evaluated is None else evaluated

    def is_kept(row: Mapping[str, Any]) -> bool:
        is_evaluation = "eval_loss" in row or "nll_tokens" in row
        return bool(row.get("step", 0) <= (last_evaluation if is_evaluation else step))

    for name in (METRICS, SCORES, SAMPLES):
        if (path / name).is_file():
            _cut(path / name, is_kept)


def _cut(file: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    kept = []
    for line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:  # cut off when the process was killed
            break
        if is_kept(row):
            kept.append(line)
    write_text(file, "".join(f"{line}\n" for line in kept))
