"""Define the types of a row, a pair of replies and a pair of token sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo_lite.errors import DataError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


Message = dict[str, str]  # {"role": system, user or assistant, "content": text}
Row = Mapping[str, Any]

# The standard column names (``ours`` in variable names). data.column_map assigns columns to them.
COLUMNS = (
    "prompt",  # what the reply answers: a text, or a list of messages
    "chosen",  # the better and the worse reply, or the whole conversations that end with them
    "rejected",
    "system",  # the text of a system turn before the conversation; may be blank
    "conversation",  # the messages before the reply
    "history",  # turns before the prompt or conversation: messages, or [[user, assistant], ...]
    "input",  # in Alpaca: the text that the instruction refers to
    "completions",  # any number of answers: {response, overall_score}, {answer, rank}, or texts
    "scores",  # of completions that are texts: the highest score is the best
    "ranks",  # instead of scores: rank 1 is the best
    "response_a",  # two answers, and the name of the better one
    "response_b",
    "better",
    "preference_strength",  # instead of better: below 0 if response_a is better, else above 0
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
    """A NaN or infinity in a JSON file. JSON does not allow these values, but Python writes them.

    Such a value is an error only if a pair needs it.
    """


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse reply to the same conversation."""

    messages: tuple[Message, ...]
    """All turns before the reply."""
    chosen: str
    """The better reply, without the turns before it."""
    rejected: str
    """The worse reply, without the turns before it."""
    where: str
    """The place of the row for error messages, such as "pairs.jsonl:12" or "train[11]"."""
    prompt_text: str | None = None
    """The prompt as one plain text, for data.chat_template=none. None if the row has none."""
    drop: str | None = None
    """The reason to leave this pair out, if the reader of the row found one."""
    has_unread: bool = False
    """True if the row has more content, such as reasoning, tools or images, that is not read."""


class RowError(DataError):
    """An error in one row.

    The row is counted and left out. The command stops only if there are more such rows than
    ``data.max_bad_rows`` allows. Any other DataError stops the command.
    """


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as two token sequences: prompt + response + end token, cut at data.max_length."""

    chosen_ids: Sequence[int] | NDArray[numpy.int32]
    rejected_ids: Sequence[int] | NDArray[numpy.int32]
    chosen_start: int
    """The index of the first response token in ``chosen_ids``."""
    rejected_start: int
    where: str
    prompt: bytes = b""
    """The hash of the prompt (``split.prompt_key``). Pairs with equal hashes stay in one split."""
    chosen_cut: int = 0
    """The number of tokens that were cut off because of data.max_length."""
    rejected_cut: int = 0
    remarks: tuple[str, ...] = ()
    """Changes that the chat template made, as keys of ``statistics.WARNINGS``."""
    ref_chosen: float = math.nan
    """The mean log-probability of the chosen response under the reference model. NaN: unknown."""
    ref_rejected: float = math.nan


def common_prefix(one: NDArray[numpy.int32], other: NDArray[numpy.int32]) -> int:
    """Return the number of tokens that two sequences share at their start.

    The tokens of the prompt are counted. If both replies begin with the same tokens, these tokens
    are counted too.
    """
    shorter = min(len(one), len(other))
    differ = (one[:shorter] != other[:shorter]).nonzero()[0]
    return int(differ[0]) if len(differ) else shorter
