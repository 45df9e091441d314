"""The commands that show what a training did: eval, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orpo_lite.cli.app import RESULTS, AsJson, app
from orpo_lite.cli.completion import complete_run, complete_run_or_key
from orpo_lite.cli.console import err, out, print_evaluation, print_json
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import hush, quiet
from orpo_lite.errors import RecipeError

if TYPE_CHECKING:
    from orpo_lite.evaluation.report import ReportResult


@app.command("eval", rich_help_panel=RESULTS, epilog="Example: orpo-lite eval runs/demo")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [data.KEY=VALUE]...",
            help="Runs; also merged folders and hub names. data.dataset_name=PAIRS scores other "
            "pairs than those that the first run held out.",
            autocompletion=complete_run_or_key,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|base", help="What to compare with; by default the base of each run."
        ),
    ] = None,
    as_json: AsJson = False,
    base_path: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the base lies now, if it was moved."),
    ] = None,
) -> None:
    """Say whether a run got better than its base: on held-out pairs, with 95% intervals."""
    data = [word for word in models if word.startswith("data.") and "=" in word]
    names = [word for word in models if word not in data]
    with quiet():
        from orpo_lite.evaluation.evaluate import evaluate_events

        updates = evaluate_events(*names, data=data, against=against, base_path=base_path)
        evaluation = draw(updates, silent=as_json)
    if as_json:
        print_json(evaluation.to_json())
    else:
        print_evaluation(evaluation)


@app.command(rich_help_panel=RESULTS, epilog="Example: orpo-lite report runs/demo")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, also of one that is going on.",
            autocompletion=complete_run,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="RUN/report.html by default; of several ./report.html."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve it on 127.0.0.1, and follow the run.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of --live; a free one by default.")
    ] = None,
) -> None:
    """Write one HTML file that shows what a training did: verdict, curves, data, answers."""
    if port is not None and not live:
        raise RecipeError(
            where="--port", found="without --live", expected="--live --port", fix="add --live"
        )
    if to is not None and live:
        raise RecipeError(
            where="--to", found="with --live", expected="one of the two", fix="leave --live out"
        )
    hush()
    if live:
        from orpo_lite.evaluation.live import live_events

        try:
            draw(live_events(runs, port=port), plain=True)
        except KeyboardInterrupt:
            err.print("stopped; the run itself goes on")
        return
    from orpo_lite.evaluation.report import report as write_report

    _print_result(write_report(*runs, to=to))


def _print_result(result: "ReportResult") -> None:
    """Print the verdicts, and where the report is."""
    for run, findings in result.health.items():
        prefix = f"{run}: " if len(result.health) > 1 else ""
        for text in result.verdicts[run]:
            out.print(f"{prefix}{text}")
        for finding in findings:
            out.print(f"{prefix}{finding.title.lower()}: {finding.reason}")
            if finding.name != "healthy":
                out.print(f"{prefix}  {finding.advice}")
    out.print(f"wrote {result.file}; open it in a browser")
