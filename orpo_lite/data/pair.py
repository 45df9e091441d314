"""Define a row, a pair of replies and a pair of token sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo_lite.errors import DataError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


Message = dict[str, str]  # {"role": system, user or assistant, "content": text}
Row = Mapping[str, Any]

# Our names of columns.
COLUMNS = (
    "prompt",  # what the reply answers: a text, or a list of messages
    "chosen",  # the better and the worse reply, or the whole conversations that end with them
    "rejected",
    "system",  # a text that goes in front as a system turn; blank for none
    "conversation",  # the messages before the reply
    "history",  # turns before those: messages, or [[user, assistant], ...]
    "input",  # alpaca: what the instruction is about
    "completions",  # any number of answers: {response, overall_score}, {answer, rank}, or texts
    "scores",  # the texts' scores, the highest the best, or their ranks, 1 the best
    "ranks",
    "response_a",  # two answers, and the name of the better one
    "response_b",
    "better",
    "preference_strength",  # instead of better: below 0 for the first, above 0 for the second
)

# Reasons to leave a pair out.
EMPTY_CHOSEN = "empty chosen"
EMPTY_REJECTED = "empty rejected"
PROMPTS_DIFFER = "prompts of chosen and rejected differ"
SYSTEMS_DIFFER = "system turns of chosen and rejected differ"
TIED = "no answer is better than another"
TOO_FEW = "fewer than two ranked answers"
UNJUDGED = "no verdict"


class NotJson(float):
    """A NaN or infinity in a JSON file. JSON does not allow them, but Python writes them.

    It is an error only if a pair needs the value.
    """


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one conversation."""

    messages: tuple[Message, ...]
    """Everything before the reply."""
    chosen: str
    """The last reply only."""
    rejected: str
    where: str
    """The place of the row, "pairs.jsonl:12" or "train[11]", for error messages."""
    prompt_text: str | None = None
    """The prompt as plain text, if the row has it: for data.chat_template=none."""
    drop: str | None = None
    """The reason to leave this pair out, if its row already shows it."""
    has_unread: bool = False
    """The row has content that is not read, such as reasoning, tools or images."""


class RowError(DataError):
    """An error of one row. The row is counted and left out, up to ``data.max_bad_rows``.

    Any other error stops the command.
    """


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as two whole sequences, prompt + response + end token, each cut at data.max_length."""

    chosen_ids: Sequence[int] | NDArray[numpy.int32]
    rejected_ids: Sequence[int] | NDArray[numpy.int32]
    chosen_start: int
    """The index of the first response token."""
    rejected_start: int
    where: str
    prompt: bytes = b""
    """split.prompt_key. Pairs are held out by prompt."""
    chosen_cut: int = 0
    """The number of tokens beyond data.max_length."""
    rejected_cut: int = 0
    remarks: tuple[str, ...] = ()
    """What the chat template changed, as names of figures (``statistics.WARNINGS``)."""


def common_prefix(one: NDArray[numpy.int32], other: NDArray[numpy.int32]) -> int:
    """Return the number of tokens that two sequences share at their start.

    It includes the prompt, the boundary and a common opening of the replies.
    """
    shorter = min(len(one), len(other))
    differ = (one[:shorter] != other[:shorter]).nonzero()[0]
    return int(differ[0]) if len(differ) else shorter
