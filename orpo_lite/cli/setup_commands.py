"""Define the commands for use before a training: recipes, data, plan and doctor."""

import shlex
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orpo_lite.cli.app import (
    BEFORE,
    AsJson,
    RecipeName,
    ShippedName,
    app,
    choose_recipe,
    recipe_keys,
)
from orpo_lite.cli.console import err, out, print_columns, print_json
from orpo_lite.cli.data_view import print_preview
from orpo_lite.cli.doctor_view import print_checks
from orpo_lite.cli.plan_view import print_plan
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import hush, quiet
from orpo_lite.errors import FitError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Generator

    from orpo_lite.recipe.schema import Recipe
    from orpo_lite.runs.inputs import Preview
    from orpo_lite.updates import Update

recipes_app = typer.Typer(no_args_is_help=True, help="List, show or copy the shipped recipes.")
app.add_typer(recipes_app, name="recipes", rich_help_panel=BEFORE)


@app.command(
    rich_help_panel=BEFORE, epilog="Example: orpo-lite plan --recipe demo memory.budget=8GiB"
)
def plan(
    overrides: Annotated[list[str] | None, recipe_keys("memory.budget=12GiB")] = None,
    recipe: RecipeName = None,
    with_data: Annotated[
        bool,
        typer.Option(
            "--with-data",
            help="Read the data, and plan for its longest pairs instead of pairs of "
            "data.max_length tokens.",
        ),
    ] = False,
    processes: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Plan for N GPUs of one machine too, a process on each."
        ),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Show whether a recipe fits a GPU, how fast it is and what to change. Reads no weights."""
    chosen = choose_recipe(recipe, None, overrides or [], command="plan")
    with quiet(reads_data=with_data):
        from orpo_lite.planning.fit import does_not_fit
        from orpo_lite.planning.plan import plan_events

        events = plan_events(chosen, with_data=with_data, processes=processes)
        report = draw(events, silent=as_json)
    if as_json:
        print_json(report.to_json())
    else:
        # The plan prints its own memory.shard.
        keys = [word for word in overrides or [] if not word.startswith("memory.shard=")]
        print_plan(report, shlex.join([recipe or "NAME", *keys]))
    if report.is_verdict and not report.fits:
        least = report.processes[-1] if report.processes else None
        shards = least.shards if least else chosen.memory.shards
        raise does_not_fit(least.memory if least else report.plan, report.changes, shards)


@app.command(
    rich_help_panel=BEFORE, epilog="Example: orpo-lite data --recipe demo data.max_length=64"
)
def data(
    overrides: Annotated[list[str] | None, recipe_keys("data.max_length=1024")] = None,
    recipe: RecipeName = None,
    row: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Show this row, for example pairs.csv:3.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the data as the model will see it: a pair, the format, lengths, and rows left out."""
    if as_json and row:
        raise RecipeError(
            where="--row",
            found="is given together with --json",
            expected="only one of --row and --json, because --json prints the figures of all rows",
            fix="remove --row or --json",
        )
    chosen = choose_recipe(recipe, None, overrides or [], command="data")
    hush()
    preview = draw(_preview(chosen, row), silent=as_json)
    if as_json:
        print_json(preview.figures | {"samples": preview.samples, "warnings": preview.warnings})
        for warning in preview.warnings:
            err.print(warning)
        return
    print_preview(preview.figures, preview.samples, preview.warnings, chosen.data.max_length)


@app.command(rich_help_panel=BEFORE, epilog="Example: orpo-lite doctor --recipe demo")
def doctor(
    overrides: Annotated[list[str] | None, recipe_keys("memory.budget=12GiB")] = None,
    recipe: RecipeName = None,
    as_json: AsJson = False,
    as_report: Annotated[
        bool,
        typer.Option(
            "--bug-report",
            help="Print the results as text for a bug report, without your name, paths and "
            "access tokens.",
        ),
    ] = False,
) -> None:
    """Check packages, GPU, kernels, memory, disk and hub. With --recipe, check the recipe too."""
    from orpo_lite.doctor.bug_report import bug_report
    from orpo_lite.doctor.run import doctor_events

    chosen = None
    if recipe is not None or overrides:
        chosen = choose_recipe(recipe, None, overrides or [], command="doctor")
    with ExitStack() as stack:
        with suppress(Exception):  # if a library cannot be imported, a check says so
            stack.enter_context(quiet())
        is_silent = as_json or as_report or not out.is_terminal
        checks = draw(doctor_events(chosen), silent=is_silent)
    faults = sum(check.state == "fault" for check in checks)
    if as_report:
        out.print(bug_report(checks), end="")
    elif as_json:
        rows = [{"name": c.name, "state": c.state, "found": c.found, "fix": c.fix} for c in checks]
        print_json({"faults": faults, "checks": rows})
    else:
        print_checks(checks)
    if faults:
        raise typer.Exit(FitError.exit_code)


@recipes_app.command("ls", epilog="Example: orpo-lite recipes ls")
def recipes_ls() -> None:
    """List the shipped recipes, with the GPU that each needs according to its plan."""
    from orpo_lite.recipe.checks import LOSSES_WITHOUT
    from orpo_lite.recipe.reader import gpu_sizes, load_recipe, shipped_recipes

    rows = [("recipe", "base", "loss", "beta", "GPU", "what for")]
    sizes = gpu_sizes()
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        headline = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append(
            (
                name,
                recipe.model.model_name_or_path,
                recipe.loss.type,
                "" if recipe.loss.type in LOSSES_WITHOUT["beta"] else f"{recipe.loss.beta:g}",
                sizes.get(name, "?"),
                headline,
            )
        )
    print_columns(rows)


@recipes_app.command("show", epilog="Example: orpo-lite recipes show demo")
def recipes_show(name: ShippedName) -> None:
    """Print a recipe with every key, its value and its meaning."""
    from orpo_lite.recipe.reader import load_recipe

    out.print(load_recipe(name).to_yaml(comments=True), end="")


@recipes_app.command("cp", epilog="Example: orpo-lite recipes cp demo mine.yaml")
def recipes_cp(
    name: ShippedName,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file or folder to write to.")],
) -> None:
    """Copy a recipe to a file that you can edit. Every key has a comment."""
    from orpo_lite.recipe.reader import find_recipe, load_recipe

    text = load_recipe(name).to_yaml(comments=True)
    path = path / f"{find_recipe(name).stem}.yaml" if path.is_dir() else path
    if path.exists():
        raise RecipeError(
            where=str(path),
            found="exists already",
            expected="a new file",
            fix="remove the file, or choose another name",
        )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            where=str(path),
            found=f"cannot be written ({error.strerror})",
            expected="a file that can be written, in a folder that exists",
        ) from None
    runnable = str(path) if "/" in str(path) else f"./{path}"
    out.print(f"wrote {path}; run it with: orpo-lite train --recipe {shlex.quote(runnable)}")


def _preview(recipe: "Recipe", row: str | None) -> "Generator[Update, None, Preview]":
    """Preview the data. If the recipe uses the demo, first make its tokenizer and pairs."""
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
