"""Show the progress of a command: live on a terminal, as plain lines in a file or pipe."""

import time
from typing import TYPE_CHECKING, TypeVar

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from orpo_lite.cli.console import out

if TYPE_CHECKING:
    from collections.abc import Generator

    from orpo_lite.updates import Update


PLAIN_LINES = 50  # a training prints about this many lines on steps to a file or pipe

Result = TypeVar("Result")


def draw(
    updates: "Generator[Update, None, Result]", *, silent: bool = False, plain: bool = False
) -> Result:
    """Run a command, show its updates, and return its result.

    Args:
        updates: the generator of the running command.
        silent: show nothing.
        plain: print plain lines, also on a terminal.
    """
    from orpo_lite.updates import run_to_end

    if silent:
        return run_to_end(updates, lambda _: None)
    if plain or not out.is_terminal:
        return run_to_end(updates, _PlainLines().show)
    screen = _Screen()
    with Live(screen.layout, console=out, refresh_per_second=4, transient=True):
        return run_to_end(updates, screen.show)


class _PlainLines:
    """Print updates as lines: each note and evaluation, each stage, and about fifty steps.

    A stage that reports its progress gets a line for each quarter.
    """

    def __init__(self) -> None:
        self.stage, self.quarter, self.began = "", 1, 0.0
        self.seen: set[str] = set()

    def show(self, update: "Update") -> None:
        if update.kind == "step":
            if self.began == 0.0:
                self.began = time.monotonic()
            elif (
                update.step % max(1, update.steps // PLAIN_LINES) == 0
                or update.step == update.steps
            ):
                each = (time.monotonic() - self.began) / max(1, update.step - 1)
                left = f"  {_clock(each * (update.steps - update.step))} left"
                out.print(f"step {update.step}/{update.steps}  {_figures(update)}{left}")
        elif update.kind != "stage":
            out.print(_line(update))
        elif update.text != self.stage:
            is_new = update.text not in self.seen  # some stages repeat at each evaluation
            self.stage, self.quarter = update.text, 1 if is_new else 5
            self.seen.add(update.text)
            if is_new:
                out.print(f"{update.text} ...")
        elif (
            update.steps
            and 4 * update.step >= self.quarter * update.steps
            and update.step < update.steps
        ):
            self.quarter = 1 + 4 * update.step // update.steps
            out.print(f"{update.text} ... {update.step:,} of {update.steps:,}")


class _Screen:
    """Show progress bars and the last step's figures at the bottom of the terminal.

    Notes and evaluations are printed above them.
    """

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=out,
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
            self.progress.update(
                task, visible=name == text or (name == "training" and update.steps > 0)
            )
        self.progress.update(self.tasks[text], completed=update.step, total=update.steps or None)


def _figures(update: "Update") -> str:
    metrics = update.metrics
    return (
        f"{update.text}  {metrics['tokens_per_second']:,.0f} tok/s  {metrics['memory_gib']:.2f} GiB"
    )


def _line(update: "Update") -> str:
    if update.kind == "note" or not update.metrics:
        return update.text
    return f"held-out at step {update.step}/{update.steps}: {update.text}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
