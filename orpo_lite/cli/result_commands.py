"""The commands that look at a trained model: eval, generate, chat."""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orpo_lite.cli.app import RESULTS, AsJson, app
from orpo_lite.cli.completion import complete_run, complete_run_or_key
from orpo_lite.cli.console import err, harmless, out, print_evaluation, print_json
from orpo_lite.cli.finish import STOPPED
from orpo_lite.cli.progress import draw
from orpo_lite.cli.quiet import quiet
from orpo_lite.errors import OrpoLiteError

if TYPE_CHECKING:
    from orpo_lite.evaluation.chat import Chat

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="The folder of a finished run, a merged folder, or a hub name.",
        autocompletion=complete_run,
    ),
]
BasePath = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where the base lies now, if it was moved."),
]


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
    base_path: BasePath = None,
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


@app.command(
    rich_help_panel=RESULTS,
    epilog="Example: orpo-lite generate runs/demo --prompts prompts.jsonl",
)
def generate(
    run: Model,
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help="Rows with a prompt each: jsonl, json or csv.")
    ],
    grader: Annotated[
        Literal["alpaca_eval", "mt_bench", "ifeval", "jsonl"],
        typer.Option("--for", help="Whose prompts they are, and who reads the answers."),
    ] = "jsonl",
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="In RUN/answers by default.")
    ] = None,
    adapter: Annotated[
        Literal["on", "off"], typer.Option(help="off: the base of the run answers.")
    ] = "on",
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of an answer; as usual there.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 is greedy; as usual there by default.")
    ] = None,
    base_path: BasePath = None,
) -> None:
    """Answer a file of prompts in batches. If it is stopped, the same command goes on."""
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
            err.print("stopped; the same command goes on where it was")
            raise typer.Exit(STOPPED) from None
    speed = f", {result.tokens / result.seconds:,.0f} tokens/s" if result.tokens else ""
    out.print(f"{result.prompts:,} prompts answered{speed}: {result.file}")


@app.command(rich_help_panel=RESULTS, epilog="Example: orpo-lite chat runs/demo --compare")
def chat(
    run: Model,
    compare: Annotated[
        bool, typer.Option("--compare", help="The base answers too, before the tuned model.")
    ] = False,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system text.")] = "",
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.7,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of an answer.")
    ] = 512,
    base_path: BasePath = None,
) -> None:
    """Talk with a run. Piped lines are answered one by one, without a terminal."""
    with quiet():
        from orpo_lite.api import chat_events
        from orpo_lite.evaluation.answers import check_decoding
        from orpo_lite.model.generate import Decoding

        check_decoding(max_new_tokens, temperature)
        decoding = Decoding(max_new_tokens, temperature)
        updates = chat_events(run, decoding, compare=compare, system=system, base_path=base_path)
        conversation = draw(updates, silent=not _is_terminal())
        with conversation:
            for line in _lines():
                if not line.startswith("/"):
                    _answer(conversation, line)
                elif not _obey(conversation, *line[1:].partition(" ")[::2]):
                    return


COMMANDS = """/reset        forget all turns
/system TEXT  set the system text, and forget all turns
/save FILE    write the conversation as JSON
/quit         end (also Ctrl-D); Ctrl-C stops an answer"""


def _is_terminal() -> bool:
    return sys.stdin.isatty() and out.is_terminal


def _lines() -> Iterator[str]:
    """Yield the lines of the user, without empty ones."""
    if not _is_terminal():
        yield from filter(None, (line.strip() for line in sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines with it
    out.print("/help lists the commands; Ctrl-C stops an answer; Ctrl-D ends")
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            out.print("\nCtrl-D ends")
            continue
        if line:
            yield line


def _answer(conversation: "Chat", line: str) -> None:
    """Print the answer of each speaker as it comes. Ctrl-C stops one answer."""
    for speaker in conversation.speakers:
        try:
            ids, dropped = conversation.prompt(speaker, line)
            if dropped:
                err.print(f"the {dropped} oldest turns are dropped: there is no room for more")
            if len(conversation.speakers) > 1:
                out.out(f"{speaker.name}: ", end="", highlight=False)
            with closing(conversation.answer(speaker, line, ids)) as pieces:
                for piece in pieces:
                    out.out(harmless(piece), end="", highlight=False)
            out.out("", highlight=False)
        except KeyboardInterrupt:
            out.out("", highlight=False)
            err.print("stopped")
        except OrpoLiteError as error:
            err.print(str(error))


def _obey(conversation: "Chat", command: str, text: str) -> bool:
    """Do what a command says; return False for the one that ends."""
    text = text.strip()
    if command == "reset":
        conversation.reset()
    elif command == "system":
        conversation.reset(text)
    elif command == "save" and text:
        try:
            conversation.save(Path(text).expanduser())
        except (OrpoLiteError, OSError) as error:
            err.print(str(error))
        else:
            err.print(f"wrote {text}")
    elif command in ("quit", "exit"):
        return False
    else:
        err.print(COMMANDS)
    return True
