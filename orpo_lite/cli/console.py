"""Where everything is printed: columns, tables, progress."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Generator

    from orpo_lite.evaluation.verify import Verdict
    from orpo_lite.objectives.objective import Metric
    from orpo_lite.progress import Update


PLAIN_LINES = 50  # step lines in a log file, besides the evaluations

Result = TypeVar("Result")


class _Console(Console):
    """Whoever reads the output may go away (`| head`); the work goes on, and writes to nowhere."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


out = _Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def escape_the_rest() -> None:
    """What the output's encoding does not have is written as Python and JSON escape it; data may hold any character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """In ASCII where the output's encoding has not all that JSON can hold."""
    out.print(json.dumps(value, indent=2, ensure_ascii=not out.encoding.startswith("utf")))


def print_columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> None:
    """Aligned columns, never cut: a table of rich's shortens long values to the width of the terminal, or to 80.

    ``right`` aligns all but the first column to the right, as numbers should be.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(rest, widths[1:], strict=True)
        ]
        out.print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def print_before_after(before: Mapping[str, float], after: Mapping[str, float], metrics: "Sequence[Metric]") -> None:
    """The held-out metrics before the first step, and those of the adapter that was kept."""
    table: list[tuple[str, ...]] = [("held-out pairs", "before", "after")]
    for metric in metrics:
        values = [found[f"eval_{metric.name}"] for found in (before, after)]
        table.append((metric.label, *(f"{100 * v:.1f}%" if metric.is_share else f"{v:.4f}" for v in values)))
    print_columns(table)


def print_verdict(verdict: "Verdict") -> None:
    """What base, adapter and the merged model say of the same pairs."""
    kind = "held-out pairs" if verdict.held_out else "training pairs, for none were held out"
    rows = [(f"{verdict.pairs} {kind}", "reward accuracy", "margin", "log-prob of chosen")]
    rows += [(r.model, f"{r.accuracy:.1%}", f"{r.margin:+.4f}", f"{r.chosen:.4f}") for r in verdict.rows]
    print_columns(rows)
    out.print(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.said}")


def draw(updates: "Generator[Update, None, Result]", *, silent: bool = False, plain: bool = False) -> Result:
    """Show each update; returns the generator's result. Live on a terminal, plain lines elsewhere, or where asked."""
    from orpo_lite.progress import run_to_end

    if silent:
        return run_to_end(updates, lambda _: None)
    if plain or not out.is_terminal:
        return run_to_end(updates, _PlainLines().show)
    screen = _Screen()
    with Live(screen.layout, console=out, refresh_per_second=4, transient=True):
        return run_to_end(updates, screen.show)


class _PlainLines:
    """A line for an evaluation, one for a stage and for each quarter of a long one, and some fifty for the steps."""

    def __init__(self) -> None:
        self.stage, self.quarter, self.began = "", 1, 0.0

    def show(self, update: "Update") -> None:
        if update.kind == "step":
            if self.began == 0.0:
                self.began = time.monotonic()
            elif update.step % max(1, update.steps // PLAIN_LINES) == 0 or update.step == update.steps:
                each = (time.monotonic() - self.began) / max(1, update.step - 1)
                left = f"  {_clock(each * (update.steps - update.step))} left"
                out.print(f"step {update.step}/{update.steps}  {_figures(update)}{left}")
        elif update.kind != "stage":
            out.print(_line(update))
        elif update.text != self.stage:
            self.stage, self.quarter = update.text, 1
            out.print(f"{update.text} ...")
        elif update.steps and 4 * update.step >= self.quarter * update.steps and update.step < update.steps:
            self.quarter = 1 + 4 * update.step // update.steps
            out.print(f"{update.text} ... {update.step:,} of {update.steps:,}")


class _Screen:
    """The last step's figures over a bar for the training and one for what interrupts it; the rest scrolls above."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=out
        )
        self.figures = Text()
        self.layout = Group(self.figures, self.progress)
        self.tasks: dict[str, TaskID] = {}

    def show(self, update: "Update") -> None:
        if update.kind in ("note", "eval"):
            out.print(_line(update))
            return
        if update.metrics:
            self.figures.plain = _figures(update)
        text = "training" if update.kind == "step" else update.text
        if text not in self.tasks:
            self.tasks[text] = self.progress.add_task(text, total=update.steps or None)
        for name, task in self.tasks.items():
            self.progress.update(task, visible=name == text or (name == "training" and update.steps > 0))
        self.progress.update(self.tasks[text], completed=update.step, total=update.steps or None)


def _figures(update: "Update") -> str:
    metrics = update.metrics
    return f"{update.text}  {metrics['tokens_per_second']:,.0f} tok/s  {metrics['memory_gib']:.2f} GiB"


def _line(update: "Update") -> str:
    if update.kind == "note" or not update.metrics:
        return update.text
    return f"held-out at step {update.step}/{update.steps}: {update.text}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
