"""The application: its order of commands, its exit codes, and the arguments that commands share.

torch and similar libraries are imported inside the commands, so that ``--help`` answers at once.
"""

import os
import shlex
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from orpo_lite.cli.completion import complete_key, complete_recipe, complete_run
from orpo_lite.cli.console import err, out, protect_output
from orpo_lite.cli.finish import STOPPED
from orpo_lite.cli.quiet import is_first_process
from orpo_lite.errors import Command, OrpoLiteError, RecipeError

if TYPE_CHECKING:
    from orpo_lite.recipe.schema import Recipe

BEFORE, DURING, RESULTS, AFTER = "Before training", "Train", "Results", "After training"
ORDER = (
    *("recipes", "data", "plan", "doctor"),
    "train",
    *("eval", "report", "generate", "chat"),
    *("merge", "export", "push"),
)


class _Commands(TyperGroup):
    """The commands in the order of the work. Typer would end at Ctrl-C without a word."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say_stopped()
            raise typer.Exit(STOPPED) from None


app = typer.Typer(
    name="orpo-lite",
    cls=_Commands,
    help="Preference-tune a language model on the one GPU you own: ORPO on a 4-bit base with "
    "LoRA, merged for export.",
    epilog="Example: orpo-lite train --recipe demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show or copy the shipped recipes.")

BUG = 70  # EX_SOFTWARE of sysexits.h


def main() -> None:
    """Run the command line; errors people cause end with their exit code and no traceback."""
    protect_output()
    try:
        app()
    except SystemExit as end:
        if end.code == STOPPED:
            _leave(STOPPED)
        raise
    except OrpoLiteError as error:
        # Each process of a launch meets the same error, or its own: the others print one line.
        err.print(
            str(error) if is_first_process() else f"process {os.environ['RANK']}: {error.found}"
        )
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say_stopped()
        _leave(STOPPED)
    except Exception:
        traceback.print_exc()
        err.print(
            "\nThis is a fault of orpo-lite. Please report it with the traceback above, the run's "
            "train.log, and what `orpo-lite doctor --bug-report` prints."
        )
        sys.exit(BUG)


def say_stopped() -> None:
    err.print("stopped; nothing further was saved")


def _leave(code: int) -> NoReturn:
    """End the process, without waiting for threads of libraries: an upload may hang for long."""
    if any(
        not thread.daemon
        for thread in threading.enumerate()
        if thread is not threading.main_thread()
    ):
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
    """Return the argument that takes keys of the recipe."""
    return typer.Argument(
        metavar="[KEY=VALUE]...",
        help=f"Any key of the recipe, e.g. {example}.",
        autocompletion=complete_key,
    )


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A shipped name (see `recipes ls`), or a .yaml path.",
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
        metavar="NAME", help="A shipped name or a path.", autocompletion=complete_recipe
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print all of it as JSON, and nothing else.")]


def choose_recipe(
    name: str | None, resume: Path | None, overrides: list[str], *, verb: str = "train"
) -> "Recipe":
    from orpo_lite.recipe.reader import load_recipe
    from orpo_lite.runs.changes import recipe_to_resume
    from orpo_lite.runs.commands import resume_command

    if resume is not None:
        if name:
            raise RecipeError(
                where="--resume",
                found=f"given with --recipe {name}",
                expected="the run's own recipe",
                fix=resume_command(resume),
            )
        return recipe_to_resume(
            resume.expanduser(), overrides
        )  # a shell leaves ~ alone in --resume=~/runs/a
    _refuse_file(name, overrides, verb)
    if name is None:
        words = [text for text in overrides if "=" not in text]
        raise RecipeError(
            where=f"orpo-lite {verb}",
            found="no recipe given",
            expected="--recipe NAME, or --resume RUN" if verb == "train" else "--recipe NAME",
            fix=Command(f"orpo-lite {verb} --recipe {words[0] if words else 'demo'}"),
        )
    return load_recipe(name, overrides)


def _refuse_file(name: str | None, overrides: list[str], verb: str) -> None:
    """A set of pairs named without its key."""
    from orpo_lite.data.sources.source import is_local
    from orpo_lite.recipe.reader import shipped_recipes

    words = [text for text in overrides if "=" not in text and not text.endswith((".yaml", ".yml"))]
    words = [
        word
        for word in words
        if word not in shipped_recipes() and not (Path(word) / "recipe.yaml").exists()
    ]
    if found := [word for word in words if is_local(word)]:
        others = [text for text in overrides if text not in found]
        parts = [
            "orpo-lite",
            verb,
            "--recipe",
            name or "demo",
            f"data.dataset_name={','.join(found)}",
            *others,
        ]
        raise RecipeError(
            where=f"argument {found[0]!r}",
            found="is not an override",
            expected="data.dataset_name=FILE",
            fix=Command(shlex.join(parts)),
        )
