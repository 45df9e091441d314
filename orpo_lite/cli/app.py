"""Define the Typer application, its exit codes, and the arguments that several commands share.

torch and other slow libraries are imported inside the commands, so that ``--help`` is fast.
"""

import json
import os
import shlex
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from orpo_lite.cli.completion import complete_key, complete_recipe, complete_run
from orpo_lite.cli.console import err, out, protect_output
from orpo_lite.cli.finish import STOPPED
from orpo_lite.cli.quiet import is_first_process
from orpo_lite.errors import Command, LostProcessError, OrpoLiteError, RecipeError

if TYPE_CHECKING:
    from orpo_lite.recipe.schema import Recipe

BEFORE, DURING, RESULTS, AFTER = "Before training", "Train", "Results", "After training"
ORDER = (
    *("recipes", "data", "plan", "doctor"),
    *("train", "launch"),
    *("eval", "compare", "score", "report", "generate", "chat"),
    *("merge", "export", "push"),
)


class _Commands(TyperGroup):
    """A group that lists the commands in the order of use. At Ctrl-C it prints a message."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_stopped()
            raise typer.Exit(STOPPED) from None


app = typer.Typer(
    name="orpo-lite",
    cls=_Commands,
    help="Tune a language model on preference pairs with one GPU: train a LoRA adapter on a 4-bit "
    "base with ORPO or another objective, then merge and export it.",
    epilog="Example: orpo-lite train --recipe demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BUG = 70  # exit code of a bug: EX_SOFTWARE of sysexits.h


def main() -> None:
    """Run the command line.

    If an :class:`OrpoLiteError` is raised, print it without a traceback, and end the process with
    the exit code of the error. Any other exception is a bug: print the traceback.
    """
    protect_output()
    try:
        app()
    except SystemExit as end:
        if end.code == STOPPED:
            _leave(STOPPED)
        raise
    except OrpoLiteError as error:
        _report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print_stopped()
        _leave(STOPPED)
    except Exception as error:
        if _is_lost(error):
            lost = LostProcessError(
                where="this training",
                found="another process of it ended",
                fix="correct the error that the other process printed",
            )
            _report(lost)
            sys.exit(lost.exit_code)
        traceback.print_exc()
        err.print(
            "\nThis is a bug in orpo-lite. Please report it with the traceback above, the run's "
            "train.log, and the output of `orpo-lite doctor --bug-report`."
        )
        sys.exit(BUG)


def _report(error: OrpoLiteError) -> None:
    """Print an error. If several processes raise it, print it in full only once."""
    from orpo_lite.runs.commands import LAUNCHER
    from orpo_lite.runs.interrupt import Interrupted

    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    is_lost = isinstance(error, LostProcessError)
    is_stopped = isinstance(error, Interrupted)  # all processes stop at the same step
    if LAUNCHER in os.environ and file and not is_stopped:
        # `orpo-lite launch` prints the error of the process that failed first.
        if not is_lost:
            said = {
                "message": str(error),
                "timestamp": int(time.time()),
                "exit_code": error.exit_code,
            }
            Path(file).write_text(json.dumps(said), encoding="utf-8")
    elif is_first_process():
        err.print(str(error))
    elif not is_lost and not is_stopped:
        err.print(f"process {os.environ['RANK']}: {error.found}")


def _is_lost(error: Exception) -> bool:
    """Return whether an error was raised because another process of the training ended."""
    if not (isinstance(error, RuntimeError) and "RANK" in os.environ):
        return False
    from orpo_lite.ops.devices import is_lost

    return is_lost(error)


def print_stopped() -> None:
    """Print that the command was stopped by Ctrl-C."""
    if is_first_process():
        err.print("stopped; nothing more was saved")


def _leave(code: int) -> NoReturn:
    """End the process without waiting for threads of libraries, such as a slow upload."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if any(not thread.daemon for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from orpo_lite import __version__

        out.print(__version__)
        raise typer.Exit


def recipe_keys(example: str) -> Any:
    """Return the Typer argument for ``KEY=VALUE`` words. Its help text shows ``example``."""
    return typer.Argument(
        metavar="[KEY=VALUE]...",
        help=f"Set any key of the recipe, for example {example}.",
        autocompletion=complete_key,
    )


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="The name of a shipped recipe (see `recipes ls`), or the path of a .yaml file.",
        autocompletion=complete_recipe,
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="The folder of a finished run.", autocompletion=complete_run
    ),
]
ShippedName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="The name of a shipped recipe, or the path of a .yaml file.",
        autocompletion=complete_recipe,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON, for programs.")]


def choose_recipe(
    name: str | None, resume: Path | None, overrides: list[str], *, command: str = "train"
) -> "Recipe":
    """Return the recipe ``name`` or the recipe of the run ``resume``, with the overrides applied.

    Args:
        name: the value of ``--recipe``.
        resume: the value of ``--resume``: a run folder.
        overrides: the texts ``section.key=value``.
        command: the orpo-lite command that errors show, such as plan.

    Raises:
        RecipeError: no recipe is given, or the recipe or an override is wrong.
        CheckpointError: the folder ``resume`` is not a run.
    """
    from orpo_lite.recipe.reader import load_recipe
    from orpo_lite.runs.changes import recipe_to_resume
    from orpo_lite.runs.commands import resume_command

    if resume is not None:
        if name:
            raise RecipeError(
                where="--resume",
                found=f"is given together with --recipe {name}",
                expected="--resume without --recipe, because a run has its own recipe",
                fix=resume_command(resume),
            )
        # A shell does not expand the ~ of --resume=~/runs/a.
        return recipe_to_resume(resume.expanduser(), overrides)
    _refuse_file(name, overrides, command)
    if name is None:
        words = [text for text in overrides if "=" not in text]
        raise RecipeError(
            where=f"orpo-lite {command}",
            found="no recipe is given",
            expected="--recipe NAME, or --resume RUN" if command == "train" else "--recipe NAME",
            fix=Command(f"orpo-lite {command} --recipe {words[0] if words else 'demo'}"),
        )
    return load_recipe(name, overrides)


def _refuse_file(name: str | None, overrides: list[str], command: str) -> None:
    """Raise RecipeError if a data file is given without ``data.dataset_name=`` before it."""
    from orpo_lite.data.sources.source import is_local
    from orpo_lite.recipe.reader import shipped_recipes

    def is_recipe(word: str) -> bool:
        if word.endswith((".yaml", ".yml")) or word in shipped_recipes():
            return True
        return (Path(word) / "recipe.yaml").exists()

    words = [text for text in overrides if "=" not in text and not is_recipe(text)]
    if found := [word for word in words if is_local(word)]:
        others = [text for text in overrides if text not in found]
        parts = [
            "orpo-lite",
            command,
            "--recipe",
            name or "demo",
            f"data.dataset_name={','.join(found)}",
            *others,
        ]
        raise RecipeError(
            where=f"argument {found[0]!r}",
            found="is not KEY=VALUE",
            expected="data.dataset_name=FILE",
            fix=Command(shlex.join(parts)),
        )
