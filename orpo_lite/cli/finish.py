"""Run merge, push and verify for the command line, and print the results of a training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orpo_lite.cli.console import err, harmless, out, print_before_after, print_verdict
from orpo_lite.cli.progress import draw
from orpo_lite.errors import CheckpointError, ModelError, OrpoLiteError, RecipeError, reworded

if TYPE_CHECKING:
    from orpo_lite.recipe.schema import Recipe
    from orpo_lite.runs.commands import Weights
    from orpo_lite.training.result import TrainResult


STOPPED = 130  # 128 + SIGINT
LONGEST = 400  # most characters of a prompt or an answer that are printed


def merge_run(run: Path, **options: Any) -> None:
    """Merge a run and print the folder of the merged model."""
    from orpo_lite.merging.merge import merge_events

    result = draw(merge_events(run, **options))
    of_all = f"{result.changed} of {result.targets} adapted matrices changed"
    out.print(f"merged model: {result.folder} ({result.bytes / 2**20:,.1f} MiB; {of_all})")


def merge_if_changed(run: Path) -> None:
    """Merge a run. If its adapter changes no weights, print a line instead of raising an error.

    After a trial of one or two steps, the adapter may change no weights.
    """
    from orpo_lite.merging.merge import UnchangedError

    try:
        merge_run(run)
    except UnchangedError as error:
        out.print(f"not merged: {error.where} {error.found}")


def verify_run(run: Path, weights: "Weights", base_path: Path | None) -> None:
    """Compare the merged model with its base and adapter, and print the result.

    Raises :class:`ModelError` if the merged model's log-probabilities differ too much.
    """
    from orpo_lite.api import verify_events

    verdict = draw(verify_events(run, weights=weights, base_path=base_path))
    print_verdict(verdict)
    if verdict.kept and not verdict.kept.is_enough and weights == "original":
        out.print(
            "warning: that is less than 90%; to merge onto the weights that the training used, "
            "add `--base dequantized`"
        )
    if verdict.outcome == "FAILED":
        raise ModelError(
            where=f"{run}, merged",
            found=f"differs from the base with the adapter: {verdict.explanation}",
            expected="the log-probabilities of the base with the adapter",
            fix="please report this bug with the run's lock.json",
        )


def verify_export(run: Path, folder: Path, weights: "Weights") -> None:
    """Print what share of the adapter's gain an exported file keeps. Warn if it is below 90%."""
    from orpo_lite.api import verify_export_events

    kept, pairs = draw(verify_export_events(run, folder, weights=weights))
    out.print(f"{kept.sentence(kept.model)} ({pairs} pairs)")
    if not kept.is_enough:
        out.print(
            "warning: that is less than 90%; a type with more bits keeps more (--outtype q6_k or "
            "q8_0), and a longer training may help too"
        )


def push_run(run: Path, repository: str, **options: Any) -> None:
    """Push a run and print the page of the repository."""
    from orpo_lite.publishing.push import push_events

    # plain: the hub's client draws its own progress bars during the upload.
    result = draw(push_events(run, repository, **options), plain=True)
    visibility = "public" if options.get("is_public") else "private"
    out.print(f"pushed {len(result.files)} files: {result.page} ({visibility})")


def _print_warnings(run: Path) -> None:
    """Print the health verdicts of a run that are serious or warnings."""
    from orpo_lite.evaluation.run_record import RunRecord

    for finding in RunRecord.read(run).health:
        if finding.gravity in ("serious", "warning"):
            out.print(f"{finding.title.lower()}: {finding.reason} {finding.advice}")


def finish(recipe: "Recipe", result: "TrainResult") -> None:
    """Print the results of a training. Merge and push the adapter if the recipe says so.

    The adapter is already saved. If the merge or the push fails, the message names the adapter's
    folder and the commands that the person can still run.
    """
    from orpo_lite.demo import builtin_remark
    from orpo_lite.objectives.objective import find_objective
    from orpo_lite.runs.commands import merge_command

    out.print(f"adapter of step {result.kept_step}: {result.run}/adapter")
    if result.before:
        print_before_after(result.before, result.after, find_objective(recipe.loss))
    if result.verdict:
        for comparison in result.verdict["comparisons"]:
            out.print(comparison["text"])
    _print_warnings(result.run)
    _print_samples(result)
    safe = (
        f"the adapter is safe in {result.run}/adapter; continue with: {merge_command(result.run)}"
    )
    if recipe.output.push_to_hub:
        safe += f", and {push_line(recipe, result)}"
    try:
        if recipe.output.merge:
            merge_if_changed(result.run)
    except OrpoLiteError as error:
        error.fix = reworded(error.fix, f"{error.fix}\n  {safe}" if error.fix else safe)
        raise
    except KeyboardInterrupt:
        err.print(f"stopped; {safe}")
        raise typer.Exit(STOPPED) from None
    minutes, seconds = divmod(round(result.seconds), 60)
    out.print(
        f"{result.steps} steps in {minutes}m{seconds:02d}s; "
        f"the metrics of every step are in {result.run}/metrics.jsonl"
    )
    if recipe.output.report:
        out.print(f"curves, verdicts and answers: open {result.run}/report.html in a browser")
    if remark := builtin_remark(recipe):
        out.print(remark)
    if recipe.output.push_to_hub:
        _push_result(recipe, result)


def _push_result(recipe: "Recipe", result: "TrainResult") -> None:
    safe = f"the adapter is safe in {result.run}/adapter"
    try:
        push_run(
            result.run,
            str(recipe.output.hub_model_id),
            is_public=not recipe.output.hub_private_repo,
        )
    except OrpoLiteError as error:
        if isinstance(error, RecipeError | CheckpointError):
            safe += f"; after you have fixed this, run: {push_line(recipe, result)}"
        error.fix = reworded(error.fix, f"{error.fix}\n  {safe}" if error.fix else safe)
        raise
    except KeyboardInterrupt:
        err.print(f"stopped; {safe}; continue with: {push_line(recipe, result)}")
        raise typer.Exit(STOPPED) from None


def push_line(recipe: "Recipe", result: "TrainResult") -> str:
    """Return the command that pushes the run to the repository that its recipe names."""
    from orpo_lite.publishing.push import push_command

    return push_command(
        result.run, str(recipe.output.hub_model_id), is_public=not recipe.output.hub_private_repo
    )


def _print_samples(result: "TrainResult") -> None:
    """Print the answers to held-out prompts; without them, the answers to neutral prompts."""
    shown = [sample for sample in result.samples if sample.source == "held-out"] or [
        *result.samples
    ]
    if not shown:
        return
    more = len(result.samples) - len(shown)
    rest = f"; {more} more, to neutral prompts, in {result.run}/samples.jsonl" if more else ""
    out.print(
        f"\nanswers, sampled at temperature {shown[0].temperature}, "
        f"before and after the training{rest}"
    )
    for sample in shown:
        out.print(
            f"\n  prompt  {_flat(sample.prompt)}"
            f"\n  before  {_flat(sample.before)}\n  after   {_flat(sample.after)}"
        )
    out.print()


def _flat(text: str) -> str:
    line = harmless(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
