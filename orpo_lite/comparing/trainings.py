"""Train the judge and the arms, one after another. Finished runs are kept, stopped ones resumed."""

import gc
import shutil
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import torch

from orpo_lite.api import train_events
from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.comparing.arms import name_arm
from orpo_lite.comparing.split import ARMS, JUDGE
from orpo_lite.comparing.task import Run, Task
from orpo_lite.errors import OrpoLiteError
from orpo_lite.runs.changes import recipe_to_resume
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import RESULT
from orpo_lite.updates import Update

AGAIN = "run the same command again to continue"


def train_all(task: Task, base: Path | str, sizes: dict[str, int]) -> Generator[Update, None, None]:
    """Train each run of a task that is not finished.

    Args:
        task: the task.
        base: the base model.
        sizes: name of each part of the data -> its number of pairs.

    Raises:
        OrpoLiteError: a training cannot begin or cannot go on.
    """
    seen: set[str] = set()
    for number, run in enumerate(task.runs, 1):
        if is_finished(run.path):
            continue
        _reset_peak_memory()
        label = f"training {run.name} ({number} of {len(task.runs)})"
        pairs = sizes[JUDGE if run is task.judge else ARMS]
        try:
            yield from _train(task, run, base, pairs, label, seen)
        except Interrupted as stop:
            stop.fix = AGAIN
            raise
        except OrpoLiteError as error:
            words = task.words.of_arm.get(run.arm.name, ())
            name_arm(error, run.name, run.arm.name, [word.partition("=")[0] for word in words])
            raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_finished(path: Path) -> bool:
    """Return whether the training of a run has ended and its adapter was saved."""
    return (path / RESULT).is_file() and (path / "adapter" / ADAPTER_WEIGHTS).is_file()


def _train(
    task: Task, run: Run, base: Path | str, pairs: int, label: str, seen: set[str]
) -> Generator[Update, None, None]:
    """Begin or resume a training. Yield its steps as one stage, and each note only once."""
    yield Update("stage", label)
    is_begun = (run.path / "recipe.yaml").is_file()
    if is_begun:
        recipe = recipe_to_resume(run.path)
    else:
        # A process that was killed may have left a folder that is not a run yet.
        shutil.rmtree(run.path, ignore_errors=True)
        recipe = task.run_recipe(run, base, pairs)
    for update in train_events(recipe, resume=is_begun):
        if update.kind == "step":
            yield Update("stage", label, update.step, update.steps)
        elif update.kind == "stage":
            yield update
        elif update.kind == "note" and update.text not in seen:
            seen.add(update.text)
            yield update


def _reset_peak_memory() -> None:
    """Set the process's peak memory to its present memory, so that each run has its own peak.

    On a GPU the training does this itself. On a CPU, Linux can do it; other systems cannot.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
