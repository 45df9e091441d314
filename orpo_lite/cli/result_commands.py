"""The commands that show what a training did: eval."""

from pathlib import Path
from typing import Annotated

import typer

from orpo_lite.cli.app import RESULTS, AsJson, app
from orpo_lite.cli.completion import complete_run_or_key
from orpo_lite.cli.console import print_evaluation, print_json
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import quiet


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
