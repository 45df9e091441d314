"""The command line: parse, call, render, and chain the verbs as the recipe asks. The only place that prints.

torch and its kin are imported inside the commands, so that ``--help`` answers at once.
"""

import contextlib
import json
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from orpo_lite.errors import OrpoLiteError, RecipeError

if TYPE_CHECKING:
    from orpo_lite.recipe import Recipe
    from orpo_lite.run import Update
    from orpo_lite.train import TrainResult

app = typer.Typer(
    name="orpo-lite",
    help="Preference-tune a language model on the one GPU you own: ORPO on a 4-bit base with LoRA, merged for export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(no_args_is_help=True, help="The shipped recipes: list, show, copy.")
app.add_typer(recipes_app, name="recipes")


class _Console(Console):
    """Whoever reads the output may go away (`| head`); the work goes on, and writes to nowhere."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


out = _Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

BUG = 70  # EX_SOFTWARE of sysexits.h
PLAIN_LINES = 50  # step lines in a log file, besides the evaluations


def main() -> None:
    """Run the command line; errors people cause end with their exit code and no traceback."""
    try:
        app()
    except OrpoLiteError as error:
        # Every process of a launch meets the same fault, or one of its own: the others say it in a line.
        err.print(str(error) if _is_main_process() else f"process {os.environ['RANK']}: {error.found}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("stopped; nothing further was saved")
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        err.print("\nThis is a fault of orpo-lite. Please report it with the traceback above and the run's train.log.")
        sys.exit(BUG)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from orpo_lite import __version__

        out.print(__version__)
        raise typer.Exit


# --- the verbs ------------------------------------------------------------------------------------------------------


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any key of the recipe, e.g. lora.r=8.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped name (see `recipes ls`), or a .yaml path.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every value and its source; do nothing.")] = False,
) -> None:
    """Train an adapter as a recipe says, then merge it and show what changed."""
    chosen = _choose_recipe(recipe, resume, overrides or [])
    if dry_run:
        _print_values(chosen)
        return
    with _quiet():
        from orpo_lite.train import training

        updates = training(chosen, resume=resume is not None)
        result = _draw(updates)
        if _is_main_process():
            _finish(chosen, result)


@app.command()
def merge(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]) -> None:
    """Merge a run's adapter into its base: RUN/merged is a plain transformers folder."""
    with _quiet():
        _merge(run)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from orpo_lite.recipe import load_recipe, shipped_recipes

    rows = [("recipe", "base", "beta", "what for")]
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        headline = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append((name, recipe.model.model_name_or_path, f"{recipe.loss.beta:g}", headline))
    _print_columns(rows)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped name or a path.")]) -> None:
    """Print a recipe with every key, its value and what it means."""
    from orpo_lite.recipe import load_recipe

    out.print(load_recipe(name).to_yaml(comments=True), end="")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped name or a path.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where to write it.")],
) -> None:
    """Copy a recipe, every key commented, to edit."""
    from orpo_lite.recipe import find_recipe, load_recipe

    text = load_recipe(name).to_yaml(comments=True)
    path = path / f"{find_recipe(name).stem}.yaml" if path.is_dir() else path
    if path.exists():
        raise RecipeError(str(path), "exists", "a new file", "remove it or choose another name")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(str(path), f"cannot be written ({error.strerror})", "a folder that exists") from None
    runnable = str(path) if "/" in str(path) else f"./{path}"
    out.print(f"wrote {path}; run it with: orpo-lite train --recipe {shlex.quote(runnable)}")


# --- what they share ------------------------------------------------------------------------------------------------


def _choose_recipe(name: str | None, resume: Path | None, overrides: list[str]) -> "Recipe":
    from orpo_lite.recipe import load_recipe
    from orpo_lite.run import read_recipe

    if resume is not None:
        if name or overrides:
            found = "given with " + (f"--recipe {name}" if name else " ".join(overrides))
            raise RecipeError("--resume", found, "the run's own recipe", f"orpo-lite train --resume {resume}")
        recipe = read_recipe(resume)
        return recipe.override({"training.output_dir": str(resume)})  # the folder may have been moved
    if name is None:
        words = [text for text in overrides if "=" not in text]
        remedy = f"orpo-lite train --recipe {words[0] if words else 'demo'}"
        raise RecipeError("orpo-lite train", "no recipe given", "--recipe NAME, or --resume RUN", remedy)
    return load_recipe(name, overrides)


def _print_values(recipe: "Recipe") -> None:
    from orpo_lite.recipe import to_text

    _print_columns([("key", "value", "from"), *((k, to_text(v), recipe.sources[k]) for k, v in recipe.items())])


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, never cut: a table of rich's shortens long values to the width of the terminal, or to 80."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        out.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _merge(run: Path) -> Path:
    from orpo_lite.merge import merge as merge_run

    out.print(f"merging {run}/adapter into its base")
    result = merge_run(run)
    out.print(f"merged model: {result.folder} ({result.bytes / 2**20:,.1f} MiB)")
    return result.folder


def _finish(recipe: "Recipe", result: "TrainResult") -> None:
    """After the adapter is safe: the table, the merge, the answers. A failure here costs no training."""
    from orpo_lite.demo import builtin_remark

    out.print(f"adapter of step {result.kept_step}: {result.run}/adapter")
    if result.before:
        _print_columns(_before_after(result.before, result.after))
    safe = f"the adapter is safe in {result.run}/adapter; then: orpo-lite merge {shlex.quote(str(result.run))}"
    try:
        if recipe.output.merge:
            merged = _merge(result.run)
            if result.prompts:
                _print_samples(recipe, result, merged)
    except OrpoLiteError as error:
        error.remedy = f"{error.remedy}\n  {safe}" if error.remedy else safe
        raise
    except KeyboardInterrupt:
        err.print(f"stopped; {safe}")
        raise typer.Exit(130) from None
    minutes, seconds = divmod(round(result.seconds), 60)
    out.print(f"{result.steps} steps in {minutes}m{seconds:02d}s; every step is in {result.run}/metrics.jsonl")
    if remark := builtin_remark(recipe):
        out.print(remark)


def _before_after(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, ...]]:
    rows = {
        "loss": "eval_loss",
        "NLL of the chosen": "eval_nll_loss",
        "log odds chosen : rejected": "eval_log_odds_chosen",
        "log-prob of chosen": "eval_logps/chosen",
        "log-prob of rejected": "eval_logps/rejected",
        "reward accuracy": "eval_rewards/accuracies",
    }
    table: list[tuple[str, ...]] = [("held-out pairs", "before", "after")]
    for label, key in rows.items():
        shown = [f"{100 * m[key]:.1f}%" if "accuracies" in key else f"{m[key]:.4f}" for m in (before, after)]
        table.append((label, *shown))
    return table


def _print_samples(recipe: "Recipe", result: "TrainResult", merged: Path) -> None:
    from orpo_lite.generate import generate
    from orpo_lite.run import read_lock, write_text

    base = Path(read_lock(result.run)["base"]["path"])
    options: dict[str, Any] = {
        "tokenizer_folder": merged,
        "max_new_tokens": recipe.output.max_new_tokens,
        "seed": recipe.training.seed,
    }
    before, after = generate(base, result.prompts, **options), generate(merged, result.prompts, **options)
    out.print("\nanswers, sampled at temperature 0.7, of the base and of the merged model")
    rows = []
    for (prompt, old), (_, new) in zip(before, after, strict=True):
        rows.append({"prompt": prompt, "before": old, "after": new})
        out.print(f"\n  prompt  {_flat(prompt)}\n  before  {_flat(old)}\n  after   {_flat(new)}")
    write_text(result.run / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    out.print()


def _flat(text: str) -> str:
    return " ".join(text.split())


# --- progress -------------------------------------------------------------------------------------------------------


def _draw(updates: "Generator[Update, None, TrainResult]") -> "TrainResult":
    """Show each update; returns the generator's result. Live on a terminal, plain lines elsewhere."""
    from orpo_lite.run import drain

    if not _is_main_process():
        return drain(updates, lambda _: None)
    if not out.is_terminal:
        return drain(updates, _PlainLines().show)
    screen = _Screen()
    with Live(screen.layout, console=out, refresh_per_second=4, transient=True):
        return drain(updates, screen.show)


class _PlainLines:
    """A line for a stage or an evaluation, and some fifty for the steps."""

    def __init__(self) -> None:
        self.stage, self.began = "", 0.0

    def show(self, update: "Update") -> None:
        if update.kind == "step":
            if self.began == 0.0:
                self.began = time.monotonic()
            elif update.step % max(1, update.steps // PLAIN_LINES) == 0 or update.step == update.steps:
                each = (time.monotonic() - self.began) / max(1, update.step - 1)
                left = f"  {_clock(each * (update.steps - update.step))} left"
                out.print(f"step {update.step}/{update.steps}  {_figures(update.metrics)}{left}")
        elif update.kind != "stage":
            out.print(_line(update))
        elif update.text != self.stage:
            self.stage = update.text
            out.print(f"{update.text} ...")


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
            self.figures.plain = _figures(update.metrics)
        text = update.text or "training"
        if text not in self.tasks:
            self.tasks[text] = self.progress.add_task(text, total=update.steps or None)
        for name, task in self.tasks.items():
            self.progress.update(task, visible=name == text or (name == "training" and update.steps > 0))
        self.progress.update(self.tasks[text], completed=update.step)


def _figures(metrics: Mapping[str, float]) -> str:
    return (
        f"loss {metrics['loss']:.4f}  nll {metrics['nll_loss']:.4f}  log odds {metrics['log_odds_chosen']:+.3f}  "
        f"accuracy {metrics['rewards/accuracies']:.2f}  {metrics['tokens_per_second']:,.0f} tok/s  "
        f"{metrics['memory_gib']:.2f} GiB"
    )


def _line(update: "Update") -> str:
    if update.kind == "note" or not update.metrics:
        return update.text
    m = update.metrics
    return (
        f"held-out at step {update.step}/{update.steps}: loss {m['eval_loss']:.4f}  nll {m['eval_nll_loss']:.4f}  "
        f"log odds {m['eval_log_odds_chosen']:+.3f}  accuracy {m['eval_rewards/accuracies']:.3f}  {update.text}"
    ).rstrip()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _is_main_process() -> bool:
    """Under `accelerate launch` only the first process talks."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Library noise goes to the logging tree (and so to the run's train.log), not to the screen.

    bitsandbytes prints while it is imported; transformers, datasets and peft log and draw bars. The bars of
    huggingface_hub stay: a download of gigabytes should be seen.
    """
    warnings.simplefilter("default")
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.NullHandler())  # without a handler Python prints warnings to stderr
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        import bitsandbytes  # noqa: F401
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for logger in (transformers.utils.logging, datasets.logging):
        with contextlib.suppress(AttributeError):
            logger.disable_default_handler()
            logger.enable_propagation()
    yield
