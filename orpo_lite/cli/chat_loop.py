"""Read the lines of a user, print the answers, and obey the commands of a chat."""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_lite.cli.console import err, harmless, out
from orpo_lite.errors import OrpoLiteError

if TYPE_CHECKING:
    from orpo_lite.evaluation.chat import Chat

COMMANDS = """/reset        forget all turns
/system TEXT  set the system text, and forget all turns
/save FILE    write the conversation as JSON
/quit         end (also Ctrl-D); Ctrl-C stops an answer"""


def converse(conversation: "Chat") -> None:
    """Answer the lines of the user, one after the other, until they end the chat."""
    for line in _lines():
        if not line.startswith("/"):
            _answer(conversation, line)
        elif not _obey(conversation, *line[1:].partition(" ")[::2]):
            return


def is_terminal() -> bool:
    """Return whether a person reads and writes."""
    return sys.stdin.isatty() and out.is_terminal


def _lines() -> Iterator[str]:
    """Yield the lines of the user, without empty ones."""
    if not is_terminal():
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
