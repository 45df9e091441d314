"""Read replies to score: rows with one or several replies to a prompt, or with a pair of replies.

A row of the first kind has a prompt (or an instruction, a question) and a response (or an output,
an answer, a completion), or a list of them; or it has the messages of a conversation that ends with
a reply. All other rows are read as preference pairs, as in a training.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from orpo_lite.data.formats.messages import ANSWER_KEYS, normalize
from orpo_lite.data.formats.names import plain_name
from orpo_lite.data.formats.values import is_blank
from orpo_lite.data.pair import Message, Row
from orpo_lite.data.pairs import Drops, PairReader
from orpo_lite.data.sources.source import Source
from orpo_lite.errors import DataError, raise_all
from orpo_lite.recipe.schema import DataSection

PROMPTS = ("prompt", "instruction", "question", "query")
REPLIES = ("response", "output", "completion", "answer", "reply", "generation")
LISTS = tuple(f"{name}s" if name != "reply" else "replies" for name in REPLIES)
CONVERSATIONS = ("messages", "conversation", "conversations")
PAIR = ("chosen", "rejected")
COLUMNS = "a prompt with a response, with a list of responses, or with chosen and rejected"


@dataclass(frozen=True)
class Replies:
    """A row with replies to one prompt."""

    where: str
    """The place of the row, such as answers.jsonl:3."""
    messages: tuple[Message, ...]
    """All turns before the replies."""
    prompt_text: str | None
    """The prompt as one plain text, for data.chat_template=none."""
    texts: tuple[str, ...]
    """The replies. Of a pair: chosen, rejected. "" for a reply that is no text."""
    row: Mapping[str, Any]
    """The columns to write in front of the rewards."""
    kind: Literal["one", "list", "pair"]
    reason: str = ""
    """Why no reply of the row can be scored; "" if the reader of the row found no reason."""


def read_replies(data: DataSection, sources: Sequence[Source], drops: Drops) -> Iterator[Replies]:
    """Yield the rows of the datasets in order.

    Args:
        data: the settings of the data. With data.format or data.column_map, all rows are pairs.
        sources: the datasets.
        drops: counts the pairs that are left out, by reason.

    Raises:
        DataError: rows cannot be read, or the columns are unknown.
    """
    for source in sources:
        first = next(iter(source.rows([])), None)
        is_pair = data.format != "auto" or data.columns or first is None or not _column(first[1])
        yield from _pairs(data, source, drops) if is_pair else _rows(data, source)


def _column(row: Row) -> str:
    """Return the column with the replies of a row; "" if the row has none, or has a pair."""
    names = {plain_name(name): name for name in row}
    if all(name in names for name in PAIR):
        return ""
    has_prompt = any(name in names for name in PROMPTS)
    wanted = (*REPLIES, *LISTS) if has_prompt else CONVERSATIONS
    return next((names[name] for name in wanted if name in names), "")


def _pairs(data: DataSection, source: Source, drops: Drops) -> Iterator[Replies]:
    reader = PairReader(data, [source])
    reader.drops = drops
    for pair in reader:
        replies = {
            name: [{"role": "assistant", "content": text}]
            for name, text in zip(PAIR, (pair.chosen, pair.rejected), strict=True)
        }
        row = {"where": pair.where, "prompt": [*pair.messages], **replies}
        texts = (pair.chosen, pair.rejected)
        yield Replies(pair.where, pair.messages, pair.prompt_text, texts, row, "pair")


def _rows(data: DataSection, source: Source) -> Iterator[Replies]:
    broken: list[DataError] = []
    for where, row in islice(source.rows(broken), data.max_samples):
        yield _read_row(row, where)
    raise_all(broken)


def _read_row(row: Row, where: str) -> Replies:
    """Return the replies of a row. If the row has none, the result has the reason."""
    column = _column(row)
    if not column:
        return Replies(where, (), None, (), row, "one", "no column with a reply")
    names = {plain_name(key): key for key in row}
    if plain_name(column) in CONVERSATIONS:
        *turns, last = _messages(row[column]) or [{"role": "", "content": ""}]
        reason = "" if last["role"] == "assistant" else "the last turn is not a reply"
        return _checked(where, turns, [last["content"]], row, "one", reason)
    prompt = row[next(names[key] for key in PROMPTS if key in names)]
    extra = row.get(names.get("input", ""))
    if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra}"  # Alpaca: the text that the instruction refers to
    value = row[column]
    is_list = isinstance(value, list) and (plain_name(column) in LISTS or _are_texts(value))
    texts = [_text(one) for one in (value if is_list else [value])]
    return _checked(where, _messages(prompt), texts, row, "list" if is_list else "one")


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _checked(
    where: str,
    turns: Sequence[Message],
    texts: Sequence[str],
    row: Row,
    kind: Literal["one", "list"],
    reason: str = "",
) -> Replies:
    if not reason and (not turns or not turns[-1]["content"].strip()):
        reason = "empty prompt"
    prompt = "\n".join(turn["content"] for turn in turns)
    return Replies(where, tuple(turns), prompt, tuple(texts), row, kind, reason)


def _messages(value: Any) -> list[Message]:
    """Return a text as one user turn, and messages of any known form as {role, content}."""
    found = normalize(value)
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    if not isinstance(found, list) or not all(isinstance(turn, Mapping) for turn in found):
        return []
    turns = [{key: turn.get(key) for key in ("role", "content")} for turn in found]
    is_known = all(isinstance(text, str) for turn in turns for text in turn.values())
    return turns if is_known else []


def _text(value: Any) -> str:
    """Return a reply's text: a text, a message, or an object such as {"response": text}."""
    found = normalize(value)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, Mapping):
        found = next((found[key] for key in ANSWER_KEYS if not is_blank(found.get(key))), "")
    return found if isinstance(found, str) else ""
