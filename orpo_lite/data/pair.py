"""A row, a pair of replies and a pair of token sequences."""

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

COLUMNS = (
    "prompt",  # what the reply answers: a text, or a list of messages
    "chosen",  # the better and the worse reply, or the whole conversations that end with them
    "rejected",
    "system",  # a text that goes in front as a system turn; blank for none
    "conversation",  # the messages before the reply
    "history",  # turns before those: messages, or [[user, assistant], ...]
    "input",  # alpaca: what the instruction is about
    "completions",  # any number of answers: {response, overall_score}, {answer, rank}, or plain texts
    "scores",  # the texts' scores, the highest the best, or their ranks, 1 the best
    "ranks",
    "response_a",  # two answers, and the name of the better one
    "response_b",
    "better",
    "preference_strength",  # in place of better: below 0, the first one is; above 0, the second
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
    """NaN or an infinity, which JSON does not have and Python writes all the same: a fault only where it is read."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one conversation."""

    messages: tuple[Message, ...]  # everything before the reply
    chosen: str  # the last reply only
    rejected: str
    where: str  # "pairs.jsonl:12" or "train[11]", for error messages
    prompt_text: str | None = (
        None  # the prompt as plain text, when the row held text: for data.chat_template=none
    )
    drop: str | None = None  # why this pair cannot be trained on, when its row already shows it
    has_unread: bool = (
        False  # its row says more than is read here: reasoning beside a message, tools, images
    )


class RowError(DataError):
    """A fault of one row: counted and left out, up to ``data.max_bad_rows``. Any other fault stops the command."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as two whole sequences, prompt + response + end token, each cut at data.max_length."""

    chosen_ids: Sequence[int] | NDArray[numpy.int32]
    rejected_ids: Sequence[int] | NDArray[numpy.int32]
    chosen_start: int  # index of the first response token
    rejected_start: int
    where: str
    prompt: bytes = b""  # split.prompt_key: the held-out side is split by it
    chosen_cut: int = 0  # tokens beyond data.max_length
    rejected_cut: int = 0
    remarks: tuple[
        str, ...
    ] = ()  # what the chat template did to the pair, by the names of the figures


def common_prefix(one: NDArray[numpy.int32], other: NDArray[numpy.int32]) -> int:
    """How many tokens two sequences begin with in common; prompt, boundary and shared openings of replies alike."""
    shorter = min(len(one), len(other))
    differ = (one[:shorter] != other[:shorter]).nonzero()[0]
    return int(differ[0]) if len(differ) else shorter
