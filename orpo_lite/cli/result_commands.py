"""Define the commands that show what a training did: eval, score, report, generate and chat."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orpo_lite.cli.app import RESULTS, AsJson, app
from orpo_lite.cli.chat_loop import converse, is_terminal
from orpo_lite.cli.completion import complete_run, complete_run_or_key
from orpo_lite.cli.console import err, out, print_evaluation, print_json
from orpo_lite.cli.finish import STOPPED
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import hush, quiet
from orpo_lite.errors import RecipeError

if TYPE_CHECKING:
    from orpo_lite.evaluation.report import ReportResult

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="The folder of a finished run or of a merged model, or the name of a hub model.",
        autocompletion=complete_run,
    ),
]
BasePath = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="The folder of the base, if the base was moved."),
]


@app.command("eval", rich_help_panel=RESULTS, epilog="Example: orpo-lite eval runs/demo")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [data.KEY=VALUE]...",
            help="Folders of runs, folders of merged models, or hub names. The models are scored "
            "on the held-out pairs of the first run; with data.dataset_name=PAIRS, on PAIRS.",
            autocompletion=complete_run_or_key,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|base", help="The model to compare with. Default: the base of each run."
        ),
    ] = None,
    as_json: AsJson = False,
    base_path: BasePath = None,
) -> None:
    """Show whether a run is better than its base on held-out pairs, with 95% intervals."""
    data = [word for word in models if "=" in word and not Path(word).exists()]
    names = [word for word in models if word not in data]
    with quiet():
        from orpo_lite.evaluation.evaluate import evaluate_events

        updates = evaluate_events(*names, data=data, against=against, base_path=base_path)
        evaluation = draw(updates, silent=as_json)
    if as_json:
        print_json(evaluation.to_json())
    else:
        print_evaluation(evaluation)


@app.command(
    rich_help_panel=RESULTS, epilog="Example: orpo-lite score runs/reward --data answers.jsonl"
)
def score(
    run: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A file, a folder or a hub dataset. A row has a prompt and a reply, a list of "
            "replies, or a pair of replies.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[data.KEY=VALUE]...",
            help="Settings of the dataset, for example data.dataset_train_split=test.",
            autocompletion=complete_run_or_key,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write. Default: a file in RUN/rewards."),
    ] = None,
    base_path: BasePath = None,
) -> None:
    """Write a reward for each reply of a dataset, by a reward model (loss.type=reward)."""
    with quiet():
        from orpo_lite.evaluation.rewards import score_events

        try:
            updates = score_events(run, data, to=to, settings=settings or [], base_path=base_path)
            result = draw(updates)
        except KeyboardInterrupt:
            err.print("stopped; run the same command again to continue")
            raise typer.Exit(STOPPED) from None
    noun = "reply" if result.replies == 1 else "replies"
    mean = f"mean reward {result.mean:+.3f}"
    out.print(f"{result.replies:,} {noun} scored, {mean}: {result.file}")
    if result.accuracy is not None:
        out.print(
            f"the chosen reply has the higher reward in {result.accuracy:.1%} of "
            f"{result.pairs:,} pairs"
        )


@app.command(rich_help_panel=RESULTS, epilog="Example: orpo-lite report runs/demo")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs. A run may still be training.",
            autocompletion=complete_run,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file to write. Default: RUN/report.html, or ./report.html for several runs.",
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="Serve the report on 127.0.0.1 and update it during the training."
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="The port for --live. Default: 8790 if it is free, else any free port.",
        ),
    ] = None,
) -> None:
    """Write one HTML file that shows what a training did: verdict, curves, data, answers."""
    if port is not None and not live:
        raise RecipeError(
            where="--port",
            found="is given without --live",
            expected="--live as well, because --port is the port of the live report",
            fix="add --live",
        )
    if to is not None and live:
        raise RecipeError(
            where="--to",
            found="is given together with --live",
            expected="only one of --to and --live",
            fix="remove --to or --live",
        )
    hush()
    if live:
        from orpo_lite.evaluation.live import live_events

        try:
            draw(live_events(runs, port=port), plain=True)
        except KeyboardInterrupt:
            err.print("the report is no longer served; the run is not affected")
        return
    from orpo_lite.evaluation.report import report as write_report

    _print_result(write_report(*runs, to=to))


def _print_result(result: "ReportResult") -> None:
    """Print the verdicts, and the path of the report."""
    for note in result.notes:
        out.print(f"note: {note}")
    for run, findings in result.health.items():
        prefix = f"{run}: " if len(result.health) > 1 else ""
        for text in result.verdicts[run]:
            out.print(f"{prefix}{text}")
        for finding in findings:
            out.print(f"{prefix}{finding.title.lower()}: {finding.reason}")
            if finding.name != "healthy":
                out.print(f"{prefix}  {finding.advice}")
    out.print(f"wrote {result.file}; open it in a browser")


@app.command(
    rich_help_panel=RESULTS,
    epilog="Example: orpo-lite generate runs/demo --prompts prompts.jsonl",
)
def generate(
    run: Model,
    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A jsonl, json or csv file with a prompt in each row."),
    ],
    grader: Annotated[
        Literal["alpaca_eval", "mt_bench", "ifeval", "jsonl"],
        typer.Option(
            "--for",
            help="Read prompts and write answers in the format of this grader. jsonl: no grader.",
        ),
    ] = "jsonl",
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write. Default: a file in RUN/answers."),
    ] = None,
    adapter: Annotated[
        Literal["on", "off"],
        typer.Option(help="on: answer with the run's adapter. off: answer with its base."),
    ] = "on",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Largest number of tokens in an answer. Default: depends on --for (jsonl: 512).",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            help="The temperature of sampling; 0: no sampling. "
            "Default: depends on --for (jsonl: 0).",
        ),
    ] = None,
    base_path: BasePath = None,
) -> None:
    """Answer a file of prompts in batches. To continue a stopped command, run it again."""
    with quiet():
        from orpo_lite.api import generate_events

        try:
            result = draw(
                generate_events(
                    run,
                    prompts,
                    grader=grader,
                    to=to,
                    adapter=adapter == "on",
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    base_path=base_path,
                )
            )
        except KeyboardInterrupt:
            err.print("stopped; run the same command again to continue")
            raise typer.Exit(STOPPED) from None
    speed = f", {result.tokens / result.seconds:,.0f} tokens/s" if result.tokens else ""
    out.print(f"{result.prompts:,} prompts answered{speed}: {result.file}")


@app.command(rich_help_panel=RESULTS, epilog="Example: orpo-lite chat runs/demo --compare")
def chat(
    run: Model,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Let the base answer each turn too, before the trained model."
        ),
    ] = False,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="The system text of the conversation.")
    ] = "",
    temperature: Annotated[
        float, typer.Option(metavar="T", help="The temperature of sampling; 0: no sampling.")
    ] = 0.7,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Largest number of tokens in an answer.")
    ] = 512,
    base_path: BasePath = None,
) -> None:
    """Chat with a run. If the input is a file or a pipe, answer its lines one by one."""
    with quiet():
        from orpo_lite.api import chat_events
        from orpo_lite.evaluation.answers import check_decoding
        from orpo_lite.model.generate import Decoding

        check_decoding(max_new_tokens, temperature)
        decoding = Decoding(max_new_tokens, temperature)
        updates = chat_events(run, decoding, compare=compare, system=system, base_path=base_path)
        conversation = draw(updates, silent=not is_terminal())
        with conversation:
            converse(conversation)
