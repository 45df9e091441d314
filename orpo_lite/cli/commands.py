"""The commands: parse, call, show.

torch and its kin are imported inside the commands, so that ``--help`` answers at once.
"""

import os
import shlex
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from orpo_lite.cli.completion import complete_key, complete_recipe, complete_run, complete_target
from orpo_lite.cli.console import err, out, print_columns, print_json, protect_output
from orpo_lite.cli.data_view import print_preview
from orpo_lite.cli.finish import STOPPED, finish, merge_run, push_run, verify_run
from orpo_lite.cli.plan_view import print_memory_settings, print_plan
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import hush, is_first_process, quiet
from orpo_lite.errors import Command, OrpoLiteError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Generator

    from orpo_lite.recipe.schema import Recipe
    from orpo_lite.runs.inputs import Preview
    from orpo_lite.updates import Update


BEFORE, DURING, AFTER = "Before training", "Train", "After training"
ORDER = ("recipes", "data", "plan", "train", "merge", "export", "push")


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
app.add_typer(recipes_app, name="recipes", rich_help_panel=BEFORE)

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
            "\nThis is a fault of orpo-lite. Please report it with the traceback above and "
            "the run's train.log."
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


RESUME = (
    "Resume the run in this folder. KEY=VALUE may change its learning rate (learning_rate, "
    "lr_scheduler_type, warmup_steps), its length (max_steps, num_train_epochs, "
    "early_stopping_patience), eval_steps, "
    "load_best_model_at_end, full_determinism, model.device, memory.* and output.*: each change is "
    "recorded with its step. From then on each step has the learning rate that it would have in a "
    "run that began with the new values."
)


def _keys(example: str) -> Any:
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


@app.command(rich_help_panel=DURING, epilog="Example: orpo-lite train --recipe demo")
def train(
    overrides: Annotated[list[str] | None, _keys("lora.r=8")] = None,
    recipe: RecipeName = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help=RESUME, autocompletion=complete_run)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every value and its source; do nothing.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says, then merge it and show what changed."""
    chosen = _choose_recipe(recipe, resume, overrides or [])
    if dry_run:
        if resume is not None and (resume / "lock.json").is_file():
            from orpo_lite.runs.changes import find_changes

            chosen, _ = find_changes(resume, chosen)
        _print_values(chosen)
        return
    with quiet():
        from orpo_lite.api import train_events

        updates = train_events(chosen, resume=resume is not None)
        result = draw(updates, silent=not is_first_process())
        if is_first_process():
            finish(chosen, result)


@app.command(
    rich_help_panel=BEFORE, epilog="Example: orpo-lite plan --recipe demo memory.budget=8GiB"
)
def plan(
    overrides: Annotated[list[str] | None, _keys("memory.budget=12GiB")] = None,
    recipe: RecipeName = None,
    with_data: Annotated[
        bool,
        typer.Option(
            "--with-data", help="Read the data, and plan for its longest pairs, not for max_length."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show whether a recipe fits a GPU, how fast it is and what to change. Reads no weights."""
    chosen = _choose_recipe(recipe, None, overrides or [], verb="plan")
    with quiet():
        from orpo_lite.planning.plan import plan_events
        from orpo_lite.planning.search import does_not_fit

        report = draw(plan_events(chosen, with_data=with_data), silent=as_json)
    if as_json:
        print_json(report.to_json())
    else:
        print_plan(report)
    if report.is_verdict and not report.plan.fits:
        raise does_not_fit(report.plan, report.changes)


@app.command(
    rich_help_panel=BEFORE, epilog="Example: orpo-lite data --recipe demo data.max_length=64"
)
def data(
    overrides: Annotated[list[str] | None, _keys("data.max_length=1024")] = None,
    recipe: RecipeName = None,
    row: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Show this row, e.g. pairs.csv:3.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the model will see of the data: format, one pair, lengths, cuts, dropped rows."""
    if as_json and row:
        raise RecipeError(
            where="--row",
            found="given with --json",
            expected="one of them: the figures are those of all rows",
            fix="leave one out",
        )
    chosen = _choose_recipe(recipe, None, overrides or [], verb="data")
    hush()
    preview = draw(_previewing(chosen, row), silent=as_json)
    if as_json:
        print_json(preview.figures | {"samples": preview.samples, "warnings": preview.warnings})
        for warning in preview.warnings:
            err.print(warning)
        return
    print_preview(preview.figures, preview.samples, preview.warnings, chosen.data.max_length)


@app.command(rich_help_panel=AFTER, epilog="Example: orpo-lite merge runs/demo --verify")
def merge(
    run: RunFolder,
    base: Annotated[
        Literal["original", "dequantized"],
        typer.Option(
            help="The base's own 16-bit weights; or those that 4 bit left of them, as in training."
        ),
    ] = "original",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Then compare the model with base and adapter on held-out pairs."
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of a file of weights.")
    ] = "5GB",
    base_path: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the base lies now, if it was moved."),
    ] = None,
) -> None:
    """Merge a run's adapter into its base, block by block. RUN/merged is a transformers folder."""
    with quiet():
        merge_run(run, weights=base, max_shard_size=max_shard_size, base_path=base_path)
        if verify:
            verify_run(run, base, base_path)


@app.command(rich_help_panel=AFTER, epilog="Example: orpo-lite push runs/demo me/demo")
def push(
    run: RunFolder,
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="owner/name; a name alone is yours.")
    ],
    merged: Annotated[
        bool, typer.Option("--merged", help="Push RUN/merged, not the adapter.")
    ] = False,
    base: Annotated[
        Literal["original", "dequantized"], typer.Option(help="Which merge.")
    ] = "original",
    public: Annotated[
        bool, typer.Option("--public", help="Everybody can see it; private without.")
    ] = False,
    samples: Annotated[
        int,
        typer.Option(
            min=0, max=20, help="Show so many prompts of the data, with answers, in the model card."
        ),
    ] = 0,
) -> None:
    """Push a run's adapter, or its merged model, to the hub, with a model card."""
    hush()
    if base == "dequantized" and not merged:
        raise RecipeError(
            where="--base dequantized",
            found="without --merged",
            expected="it says which merged model",
            fix="add --merged",
        )
    options: dict[str, Any] = {
        "merged": base if merged else None,
        "is_public": public,
        "samples": samples,
    }
    try:
        push_run(run, repository, **options)
    except KeyboardInterrupt:
        from orpo_lite.publishing.push import push_command

        err.print(f"stopped; then: {push_command(run, repository, **options)}")
        raise typer.Exit(STOPPED) from None


@app.command(rich_help_panel=AFTER, epilog="Example: orpo-lite export runs/demo --to vllm")
def export(
    run: RunFolder,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="gguf (llama.cpp), ollama or vllm.", autocompletion=complete_target
        ),
    ],
    outtype: Annotated[
        str | None,
        typer.Option(
            help="f32, f16, bf16, q8_0, q3_k_m, q4_k_m, q5_k_m or q6_k; as merged by default."
        ),
    ] = None,
    base: Annotated[
        Literal["original", "dequantized"], typer.Option(help="Which merge.")
    ] = "original",
) -> None:
    """Write a run for llama.cpp, Ollama or vLLM to RUN/export, and print how to use it."""
    with quiet():
        from orpo_lite.exporting.targets import export_events

        result = draw(export_events(run, to, outtype=outtype, weights=base))
    for note in result.notes:
        out.print(f"note: {note}")
    out.print(
        f"wrote {result.folder} ({result.bytes / 2**20:,.1f} MiB); use it with:\n{result.command}"
    )


@recipes_app.command("ls", epilog="Example: orpo-lite recipes ls")
def recipes_ls() -> None:
    """List the shipped recipes, with the memory of the GPU that each needs by its plan."""
    from orpo_lite.recipe.reader import gpu_sizes, load_recipe, shipped_recipes

    rows = [("recipe", "base", "beta", "GPU", "what for")]
    sizes = gpu_sizes()
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        headline = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append(
            (
                name,
                recipe.model.model_name_or_path,
                f"{recipe.loss.beta:g}",
                sizes.get(name, "?"),
                headline,
            )
        )
    print_columns(rows)


@recipes_app.command("show", epilog="Example: orpo-lite recipes show demo")
def recipes_show(name: ShippedName) -> None:
    """Print a recipe with every key, its value and what it means."""
    from orpo_lite.recipe.reader import load_recipe

    out.print(load_recipe(name).to_yaml(comments=True), end="")


@recipes_app.command("cp", epilog="Example: orpo-lite recipes cp demo mine.yaml")
def recipes_cp(
    name: ShippedName,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where to write it.")],
) -> None:
    """Copy a recipe, every key commented, to edit."""
    from orpo_lite.recipe.reader import find_recipe, load_recipe

    text = load_recipe(name).to_yaml(comments=True)
    path = path / f"{find_recipe(name).stem}.yaml" if path.is_dir() else path
    if path.exists():
        raise RecipeError(
            where=str(path),
            found="exists",
            expected="a new file",
            fix="remove it or choose another name",
        )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            where=str(path),
            found=f"cannot be written ({error.strerror})",
            expected="a folder that exists",
        ) from None
    runnable = str(path) if "/" in str(path) else f"./{path}"
    out.print(f"wrote {path}; run it with: orpo-lite train --recipe {shlex.quote(runnable)}")


def _previewing(recipe: "Recipe", row: str | None) -> "Generator[Update, None, Preview]":
    from orpo_lite.runs.inputs import preview

    if any(
        name.startswith("builtin:")
        for name in (recipe.model.model_name_or_path, *recipe.data.names)
    ):
        from orpo_lite import demo

        for _ in demo.make_builtin(recipe, weights=False):
            pass
        recipe = demo.resolve_builtin(recipe)
    return (yield from preview(recipe, row))


def _choose_recipe(
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


def _print_values(recipe: "Recipe") -> None:
    from orpo_lite.recipe.text import to_text

    print_columns(
        [("key", "value", "from"), *((k, to_text(v), recipe.sources[k]) for k, v in recipe.items())]
    )
    print_memory_settings(recipe)
