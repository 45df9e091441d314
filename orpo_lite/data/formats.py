"""Rows to pairs: one reader per format, all with one signature, and detection by structure.

A new format is one ``read_*`` function, its line in READERS and its clause in ``detect_format``. A reader raises
DataError for a row that does not hold the format; a row that holds it but cannot be trained on becomes a pair with
``drop``, which is counted, not an error.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orpo_lite.errors import DataError

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
PROMPTS_DIFFER = "prompts of chosen and rejected differ"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one conversation."""

    messages: tuple[Message, ...]  # everything before the reply
    chosen: str  # the last reply only
    rejected: str
    where: str  # "pairs.jsonl:12" or "train[11]", for error messages
    prompt_text: str | None = None  # the prompt as plain text, when the row held text: for data.chat_template=none
    drop: str | None = None  # why this pair cannot be trained on, when its row already shows it


Reader = Callable[[Row, str], Pair]


@dataclass(frozen=True, slots=True)
class Detected:
    """A format, the structure that gave it away, and its reader."""

    name: str
    because: str
    read: Reader

    @property
    def sentence(self) -> str:
        return f"detected {self.name} because {self.because}"


def read_explicit(row: Row, where: str) -> Pair:
    """TRL's explicit prompt: prompt, chosen and rejected are all texts, or all lists of messages."""
    if isinstance(row.get("prompt"), list):
        before, good, bad = (_messages(row, field, where) for field in ("prompt", "chosen", "rejected"))
        return _join(before, good, bad, where)
    prompt, chosen, rejected = (_text(row, field, where) for field in ("prompt", "chosen", "rejected"))
    return Pair(_user(prompt), chosen, rejected, where, prompt_text=prompt)


def read_messages(row: Row, where: str) -> Pair:
    """UltraFeedback binarized: chosen and rejected are whole conversations, prompt repeats their user turn as text."""
    chosen, rejected = (_messages(row, side, where) for side in ("chosen", "rejected"))
    has_prompt = any(message["role"] == "user" for message in chosen)
    prompt = () if has_prompt else _user(_text(row, "prompt", where))  # never the prompt twice
    return _join(prompt, chosen, rejected, where)


def read_implicit(row: Row, where: str) -> Pair:
    """TRL's implicit prompt: chosen and rejected begin alike, as lists of messages or as texts."""
    if isinstance(row.get("chosen"), list):
        good, bad = (_messages(row, side, where) for side in ("chosen", "rejected"))
        return _join((), good, bad, where)
    chosen, rejected = (_text(row, side, where) for side in ("chosen", "rejected"))
    if _is_hh_rlhf(chosen):
        return read_hh_rlhf(row, where)
    prompt = _shared_words(chosen, rejected)
    drop = None if prompt or chosen == rejected else PROMPTS_DIFFER
    return Pair(_user(prompt), chosen[len(prompt) :], rejected[len(prompt) :], where, prompt_text=prompt, drop=drop)


def read_hh_rlhf(row: Row, where: str) -> Pair:
    """Anthropic's HH-RLHF: chosen and rejected are dialogues in one text, told apart by their turn markers.

    The reply follows the last assistant marker. The space after a marker belongs to the marker.
    """
    (prompt, turns, chosen), (other, other_turns, rejected) = (
        _split_dialogue(row, side, where) for side in ("chosen", "rejected")
    )
    if chosen.startswith(" ") and rejected.startswith(" "):
        prompt, other, chosen, rejected = prompt + " ", other + " ", chosen[1:], rejected[1:]
    drop = None if turns == other_turns else PROMPTS_DIFFER
    return Pair(turns, chosen, rejected, where, prompt_text=prompt, drop=drop)


READERS: dict[str, Reader] = {
    "explicit": read_explicit,
    "implicit": read_implicit,
    "messages": read_messages,
    "hh_rlhf": read_hh_rlhf,
}


def detect_format(rows: Sequence[Row]) -> Detected:
    """The format that the first rows share, by what their fields hold; a row that deviates is its reader's to report.

    Raises DataError, with the data.column_map line to write, when nothing fits or two readings are possible.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    prompt, chosen, rejected = (_usual_kind(rows, field) for field in ("prompt", "chosen", "rejected"))
    because = ""
    match (prompt, chosen, rejected):
        case ("messages", "messages", "messages"):
            name, because = "explicit", "prompt, chosen and rejected are lists of messages"
        case ("text", "messages", "messages"):
            name, because = "messages", "chosen and rejected are lists of messages beside a prompt text"
        case ("missing" | "null", "messages", "messages"):
            name, because = "implicit", "chosen and rejected are lists of messages and there is no prompt"
        case (_, "dialogue", "dialogue"):
            name, because = "hh_rlhf", "chosen and rejected are texts with Human: and Assistant: turns"
        case ("text" | "dialogue", "text" | "dialogue", "text" | "dialogue"):
            name, because = "explicit", "prompt, chosen and rejected are texts"
        case ("missing" | "null", "text", "text") if not _guess("prompt", columns) and _mostly_share_words(rows):
            name, because = "implicit", "chosen and rejected are texts that begin alike and there is no prompt"
    if because:
        return Detected(name, because, READERS[name])
    kinds = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    found = ", ".join(
        f"{field} {'is' if kind in ('missing', 'null') else 'holds'} {kind}" for field, kind in kinds.items()
    )
    raise DataError(
        "data.format",
        f"no known format: {found}; the columns are {', '.join(map(repr, columns)) or 'none'}",
        "chosen and rejected, both texts or both lists of messages, with or without a prompt",
        f"name the columns: {_column_map_line(kinds, columns)}",
    )


# What other sets call our fields; only ever a suggestion in an error message.
ALIASES = {
    "prompt": ("question", "instruction", "input", "query"),
    "chosen": ("accepted", "preferred", "winner", "good", "better", "response_chosen", "chosen_response"),
    "rejected": ("dispreferred", "loser", "bad", "worse", "response_rejected", "rejected_response"),
}


def _guess(field: str, columns: Sequence[str]) -> str | None:
    return next((column for column in columns if column.lower() in ALIASES[field]), None)


def _column_map_line(kinds: Mapping[str, str], columns: Sequence[str]) -> str:
    unfit = [field for field, kind in kinds.items() if kind not in ("text", "dialogue", "messages")]
    return "data.column_map=" + ",".join(f"{field}={_guess(field, columns) or 'COLUMN'}" for field in unfit or kinds)


Kind = Literal["missing", "null", "text", "dialogue", "messages", "something else"]


def _kind(value: Any) -> Kind:
    if isinstance(value, str):
        return "dialogue" if _is_hh_rlhf(value) else "text"
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "role" in item for item in value):
        return "messages"
    return "null" if value is None else "something else"


def _usual_kind(rows: Sequence[Row], field: str) -> Kind:
    """What most rows hold, the empty ones aside."""
    kinds = Counter(_kind(row[field]) for row in rows if field in row)
    held = kinds.most_common()
    return next((kind for kind, _ in held if kind != "null"), "null" if held else "missing")


def shared_start(one: str, other: str) -> str:
    """The longest common beginning, to the character."""
    if other.startswith(one):
        return one
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))]


def _shared_words(one: str, other: str) -> str:
    """The common beginning in whole words: "The sky is", of "The sky is blue" and "The sky is black"."""
    shared = shared_start(one, other)
    if one == other or shared[-1:].isspace():
        return shared.rstrip()
    *words, _ = shared.rsplit(maxsplit=1) or [""]
    return "".join(words)


def _mostly_share_words(rows: Sequence[Row]) -> bool:
    texts = [(row.get("chosen"), row.get("rejected")) for row in rows]
    pairs = [(one, other) for one, other in texts if isinstance(one, str) and isinstance(other, str)]
    return 2 * sum(bool(_shared_words(one, other)) for one, other in pairs) > len(pairs)


_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")  # "Human:" within a line is only text
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_REPLY = "\n\nAssistant:"


def _is_hh_rlhf(text: str) -> bool:
    return bool(_TURN.match(text)) and _REPLY in text


def _split_dialogue(row: Row, field: str, where: str) -> tuple[str, tuple[Message, ...], str]:
    """The text up to the last assistant marker, its turns, and the text after the marker."""
    text = _text(row, field, where)
    head, marker, reply = text.rpartition(_REPLY)
    lead, *parts = _TURN.split(head)
    if not marker or not parts or lead.strip():
        found = "the text does not begin with a turn" if marker else "there is no assistant turn"
        raise _fault(where, field, found, r'"\n\nHuman: ... \n\nAssistant: ..."')
    if "\n\nHuman:" in reply:
        raise _fault(where, field, "the last turn is the human's", "a dialogue that ends with the assistant's reply")
    turns: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = _SPEAKERS[speaker]
        if turns and turns[-1]["role"] == role:  # chat templates want roles to alternate
            turns[-1]["content"] = "\n\n".join(filter(None, (turns[-1]["content"], content)))
        else:
            turns.append({"role": role, "content": content})
    return head + marker, tuple(turns), reply


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _join(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message], where: str) -> Pair:
    """A pair of whole conversations; ``prompt`` goes before both unless they already begin with it."""
    whole = []
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            found = f"the last turn is the {side[-1]['role']}'s"
            raise _fault(where, field, found, "a conversation that ends with the assistant's reply")
        repeats = list(side[: len(prompt)]) == list(prompt)
        whole.append([*side] if repeats else [*prompt, *side])
    (*before, reply), (*other_before, other_reply) = whole
    if not before:
        raise _fault(where, "chosen", "nothing stands before the reply", "the user's turn, or a prompt")
    drop = None if before == other_before else PROMPTS_DIFFER
    return Pair(tuple(before), reply["content"], other_reply["content"], where, drop=drop)


def _messages(row: Row, field: str, where: str) -> list[Message]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise _fault(where, field, _seen(row, field), "a list of messages {role, content}")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise _fault(where, f"{field}[{i}]", _seen({"": item}, ""), "a message {role, content}")
        if item.get("role") not in ROLES:
            raise _fault(where, f"{field}[{i}].role", f"{item.get('role')!r}", f"one of {', '.join(ROLES)}")
        messages.append({"role": str(item["role"]), "content": _text(item, "content", where, f"{field}[{i}].content")})
    return messages


def _text(row: Row, field: str, where: str, label: str = "") -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise _fault(where, label or field, _seen(row, field), "text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"a lone surrogate (half a character) at position {error.start}"
            raise _fault(where, label or field, found, "text", "write the data as UTF-8 again") from None
    return value


def _seen(row: Row, field: str) -> str:
    """What stands in a field, without its content: data sets can hold text that nobody wants on the screen."""
    if field not in row:
        return f"missing; the columns are {', '.join(map(repr, row))}"
    match row[field]:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case _:
            return "an object"


def _fault(where: str, field: str, found: str, expected: str, remedy: str = "mend or remove the row") -> DataError:
    if found.startswith("missing") and field in ALIASES:
        remedy += f"; if every row has it under another name: data.column_map={field}=COLUMN"
    return DataError(f"{where}, field {field}", found, expected, remedy)
