"""Define the command ``train``."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orpo_lite.cli.app import DURING, RecipeName, app, choose_recipe, recipe_keys
from orpo_lite.cli.completion import complete_run
from orpo_lite.cli.console import out, print_columns
from orpo_lite.cli.finish import finish
from orpo_lite.cli.plan_view import print_memory_settings
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import is_first_process, quiet

if TYPE_CHECKING:
    from orpo_lite.recipe.schema import Recipe

RESUME = (
    "Resume the run in this folder. KEY=VALUE may change its learning rate (learning_rate, "
    "lr_scheduler_type, warmup_steps), its length (max_steps, num_train_epochs, "
    "early_stopping_patience), eval_steps, load_best_model_at_end, full_determinism, report_to, "
    "model.device, memory.* and output.*. Each change is recorded with its step. From then on, "
    "each step has the learning rate that it would have if the run had begun with the new values."
)


PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@app.command(rich_help_panel=DURING, epilog="Example: orpo-lite train --recipe demo")
def train(
    overrides: Annotated[list[str] | None, recipe_keys("lora.r=8")] = None,
    recipe: RecipeName = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help=RESUME, autocompletion=complete_run)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every value and its source; do not train.")
    ] = False,
) -> None:
    """Train an adapter with a recipe, merge it into the base and show what changed."""
    chosen = choose_recipe(recipe, resume, overrides or [])
    if dry_run:
        if resume is not None and (resume / "lock.json").is_file():
            from orpo_lite.runs.changes import find_changes

            chosen, _ = find_changes(resume, chosen)
        _print_values(chosen)
        if resume is None:  # a run has copies of its adapters
            _print_missing_adapters(chosen)
        return
    _end_with_launcher()
    with quiet():
        from orpo_lite.api import train_events

        updates = train_events(chosen, resume=resume is not None)
        result = draw(updates, silent=not is_first_process())
        if is_first_process():
            finish(chosen, result)


def _end_with_launcher() -> None:
    """Make Linux send SIGTERM to a process of `orpo-lite launch` when the launcher is killed.

    Otherwise the processes would train on and hold their GPUs. SIGTERM saves the step first.
    """
    from orpo_lite.runs.commands import LAUNCHER

    if LAUNCHER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _print_values(recipe: "Recipe") -> None:
    from orpo_lite.recipe.text import to_text

    print_columns(
        [("key", "value", "from"), *((k, to_text(v), recipe.sources[k]) for k, v in recipe.items())]
    )
    print_memory_settings(recipe)


def _print_missing_adapters(recipe: "Recipe") -> None:
    from orpo_lite.base.adapter import missing_adapters

    for error in missing_adapters(recipe).values():
        out.print(f"\nwarning: this recipe cannot be trained yet. {error}")
