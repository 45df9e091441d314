"""Read the user's lines in a chat, print the answers, and run the chat's commands."""

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
/quit         end the chat (or press Ctrl-D)
Ctrl-C        stop the answer"""


def converse(conversation: "Chat") -> None:
    """Answer the user's lines one after the other, until the user ends the chat."""
    for line in _lines():
        if not line.startswith("/"):
            _answer(conversation, line)
        elif not _obey(conversation, *line[1:].partition(" ")[::2]):
            return


def is_terminal() -> bool:
    """Return True if the input and the output are both terminals."""
    return sys.stdin.isatty() and out.is_terminal


def _lines() -> Iterator[str]:
    """Yield the user's lines that are not empty."""
    if not is_terminal():
        yield from filter(None, (line.strip() for line in sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - with it, input() has line editing
    out.print("/help lists the commands; Ctrl-C stops an answer; Ctrl-D ends the chat")
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            out.print("\nCtrl-D ends the chat")
            continue
        if line:
            yield line


def _answer(conversation: "Chat", line: str) -> None:
    """Print each speaker's answer while it is generated. Ctrl-C stops one answer."""
    for speaker in conversation.speakers:
        try:
            ids, dropped = conversation.prompt(speaker, line)
            if dropped:
                err.print(f"the context is full; number of old turns that are removed: {dropped}")
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
            if not is_terminal():  # each line of the input has a line of the output
                out.out("", highlight=False)


def _obey(conversation: "Chat", command: str, text: str) -> bool:
    """Run a command of the chat. Return False if it ends the chat."""
    text = text.strip()
    if command == "reset":
        conversation.reset()
    elif command == "system":
        conversation.reset(text)
    elif command == "save" and text and Path(text).expanduser().exists():
        err.print(f"{text} exists already: choose another file")
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
        if command != "help":
            err.print(f"/{command} is not a command. The commands are:")
        err.print(COMMANDS)
    return True
