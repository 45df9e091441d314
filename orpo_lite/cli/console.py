"""Print texts, tables and JSON to standard output and standard error."""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from itertools import compress
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from orpo_lite.evaluation.compare import Evaluation
    from orpo_lite.evaluation.intervals import Interval
    from orpo_lite.evaluation.verify import Verdict
    from orpo_lite.objectives.objective import Objective


out = Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class _Output(FileIO):
    """An output stream that never raises an error. Data that cannot be written is dropped.

    The reader of a pipe may end early (`| head`), the terminal may be closed, or the disk may be
    full. None of these should stop a training.
    """

    def write(self, data: Any) -> int:
        try:
            written: int | None = super().write(data)
            # write() returns None if the output would block. The data is dropped then.
            return len(data) if written is None else written
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def protect_output() -> None:
    """Replace stdout and stderr by streams that never raise an error.

    Output that cannot be written, for example to a closed pipe, is dropped.
    If the encoding of the output lacks a character, the character is written as ``\\uXXXX``.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        with suppress(OSError):  # a stream in memory has no file descriptor
            buffer = BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            output = TextIOWrapper(
                buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
            )
            setattr(sys, name, output)


# Control characters, and characters that change the direction of a text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Return ``text`` with control characters escaped, so that it cannot control the terminal."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_json(value: Any) -> None:
    """Print a value as JSON. If the output's encoding is not Unicode, print only ASCII."""
    out.print(json.dumps(value, indent=2, ensure_ascii=not out.encoding.startswith("utf")))


def print_columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> None:
    """Print rows as aligned columns.

    Long values are printed in full. rich's tables would cut them to the width of the terminal.
    ``right=True`` is for numbers: it aligns all columns except the first to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width in zip(rest, widths[1:], strict=True)
        ]
        out.print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def print_before_after(
    before: Mapping[str, float], after: Mapping[str, float], objective: "Objective"
) -> None:
    """Print a table of the held-out metrics before the training and with the saved adapter.

    If all rewards are 0 before the training, no reply has the higher reward: the share is "-". The
    saved adapter may be that of step 0.
    """
    table: list[tuple[str, ...]] = [("held-out pairs", "before", "after")]
    for metric in objective.shown:
        texts = []
        for found in (before, after):
            value = found[f"eval_{metric.name}"]
            text = f"{100 * value:.1f}%" if metric.is_share else f"{value:.4f}"
            is_unknown = metric.is_share and objective.rewards_start_at_zero and found == before
            texts.append("-" if is_unknown else text)
        table.append((metric.label, *texts))
    print_columns(table)


def print_verdict(verdict: "Verdict") -> None:
    """Print how a merged model was verified: the scores of each model, and the outcome."""
    noun = "pair" if verdict.pairs == 1 else "pairs"
    kind = f"held-out {noun}" if verdict.held_out else f"training {noun} (none were held out)"
    score = "reward" if verdict.quantity == "rewards" else "log-prob"
    rows = [(f"{verdict.pairs:,} {kind}", "reward accuracy", "margin", f"{score} of chosen")]
    rows += [
        (r.model, f"{r.accuracy:.1%}", f"{r.margin:+.4f}", f"{r.chosen:.4f}") for r in verdict.rows
    ]
    print_columns(rows)
    out.print(f"{verdict.outcome}: {verdict.explanation}")
    if verdict.kept:
        out.print(verdict.kept.sentence("the merged model"))


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print a table of each model's metrics with intervals, then each comparison in words."""
    kind = "held-out pair" if evaluation.held_out else "pair"
    kind += "" if evaluation.pairs == 1 else "s"
    short = max(model.shorter_chosen.pairs for model in evaluation.models)
    head = ("reward accuracy", "margin", "log odds", "NLL", f"accuracy, chosen shorter ({short:,})")
    rows: list[tuple[str, ...]] = [(f"{evaluation.pairs:,} {kind}", *head)]
    for model in evaluation.models:
        shares = [_interval(one, 100, 1) for one in (model.accuracy, model.shorter_chosen.accuracy)]
        others = [_interval(one, 1, 3) for one in (model.margin, model.log_odds, model.nll)]
        rows.append((model.name, shares[0], *others, shares[1]))
    # A reward model has no odds and no NLL.
    known = [{row[place] for row in rows[1:]} != {"-"} for place in range(len(head) + 1)]
    print_columns([[*compress(row, known)] for row in rows])
    rule = evaluation.length_rule
    if rule.accuracy is not None:
        out.print(f"a rule that prefers the longer reply has an accuracy of {rule.accuracy:.1%}")
    for comparison in evaluation.comparisons:
        out.print(comparison.text)


def _interval(found: "Interval", factor: int, digits: int) -> str:
    """Return an interval, multiplied by ``factor``, as text: ``value [low, high]``."""
    if found.value is None:
        return "-"
    value = f"{factor * found.value:.{digits}f}"
    if found.low is None or found.high is None:
        return value
    return f"{value} [{factor * found.low:.{digits}f}, {factor * found.high:.{digits}f}]"
