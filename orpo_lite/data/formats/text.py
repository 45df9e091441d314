"""Texts of rows: dialogues with turn markers, shared beginnings, numbers, what a field holds."""

import math
import re
from collections.abc import Mapping

from orpo_lite.data.pair import Message, NotJson, Row, RowError

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")  # "Human:" within a line is only text
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_ASK = "\n\nHuman:"
REPLY = "\n\nAssistant:"
MARKED = re.compile(r"\A\s*Assistant:")  # a reply that brings its marker along


def _plain_ends(text: str) -> str:
    """With the line ends of Windows as all others, for the markers stand behind two."""
    return text.replace("\r\n", "\n")


def begins_dialogue(text: str) -> bool:
    """Beyond doubt: a text that only holds such turns may be about them."""
    return bool(_TURN.match(text)) and REPLY in _plain_ends(text)


def is_whole_dialogue(text: str) -> bool:
    """The same, with a human's turn: not only the reply behind its marker."""
    return begins_dialogue(text) and (text.lstrip().startswith("Human:") or _ASK in _plain_ends(text))


def is_dialogue(text: str) -> bool:
    """The same, or with a system text in front: for a column, of which most rows must be such."""
    text = _plain_ends(text)
    return begins_dialogue(text) or REPLY in text.partition(_ASK)[2]


def read_dialogue_prompt(row: Row, where: str) -> tuple[tuple[Message, ...], str]:
    text = _plain_ends(text_of(row, "prompt", where))
    if not text.rstrip().endswith(REPLY) and MARKED.match(text_of(row, "chosen", where)):
        text = text.rstrip() + REPLY
    _, turns, rest = split_dialogue({"prompt": text}, "prompt", where)
    if rest.strip():
        expected = r'"\n\nAssistant:" at the end, and the replies in chosen and rejected'
        raise fault(where, "prompt", "the dialogue ends with a reply", expected)
    return turns, text


def split_dialogue(row: Row, field: str, where: str) -> tuple[str, tuple[Message, ...], str]:
    """The text up to the last assistant marker, its turns, and the text after the marker."""
    text = _plain_ends(text_of(row, field, where))
    head, marker, reply = text.rpartition(REPLY)
    lead, *parts = _TURN.split(head)
    if not marker or not parts or (lead.strip() and not head[len(lead) :].startswith(_ASK)):
        found = "the text does not begin with a turn" if marker else "there is no assistant turn"
        raise fault(where, field, found, r'"\n\nHuman: ... \n\nAssistant: ..."')
    if _ASK in reply:
        raise fault(where, field, "the last turn is the human's", "a dialogue that ends with the assistant's reply")
    lead = lead.strip().removeprefix("System:").strip()
    turns: list[Message] = [{"role": "system", "content": lead}] if lead else []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = _SPEAKERS[speaker]
        if turns and turns[-1]["role"] == role:  # chat templates want roles to alternate
            turns[-1]["content"] = "\n\n".join(filter(None, (turns[-1]["content"], content)))
        else:
            turns.append({"role": role, "content": content})
    return head + marker, tuple(turns), reply


_WORD = re.compile(r"\S+")


def behind(prompt: str, text: str) -> str | None:
    """What follows the prompt in a text that begins with it; None of any other.

    Compared by words: the white space between them may be of any kind and amount.
    """
    *words, last = prompt.split() or [""]
    found = _WORD.finditer(text)
    for word in words:
        if (match := next(found, None)) is None or match[0] != word:
            return None
    match = next(found, None)
    if not last or match is None or not match[0].startswith(last):
        return None
    return text[match.start() + len(last) :]


def begins_with(words: str, text: str) -> bool:
    """It begins with these words, and not only with a part of the last."""
    end = behind(words, text)
    return end is not None and not end[:1].strip()


def shared_start(one: str, other: str) -> str:
    """The longest common beginning, to the character."""
    if other.startswith(one):
        return one
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))]


def shared_words(one: str, other: str) -> str:
    """The common beginning in whole words: "The sky is", of "The sky is blue" and "The sky is black"."""
    shared = shared_start(one, other)
    if one == other or shared[-1:].isspace():
        return shared.rstrip()
    *words, _ = shared.rsplit(maxsplit=1) or [""]
    return "".join(words)


ABSENT = ("", "n/a", "na", "nan", "none", "null", "#n/a", "<na>")  # what is written where nobody scored


def says_nothing(text: str) -> bool:
    """A word that programs write for what is not there: NULL, None, NaN or N/A."""
    return text.strip().lower() in ABSENT[1:]


def numeric(text: str) -> bool:
    """A number written as text, or what stands for none."""
    try:
        return text.strip().lower() in ABSENT or math.isfinite(float(text))
    except ValueError:
        return False


def text_of(row: Row, field: str, where: str, label: str = "") -> str:
    value = row.get(field)
    if not isinstance(value, str):
        parts = ', or parts {"type": "text", "text": ...} alone' if isinstance(value, list) else ""
        raise fault(where, label or field, seen(row, field), f"text{parts}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"a lone surrogate (half a character) at position {error.start}"
            raise fault(where, label or field, found, "text", "write the data as UTF-8 again") from None
    return value


def seen(row: Row, field: str) -> str:
    """What stands in a field, without its content: data sets can hold text that nobody wants on the screen."""
    if field not in row:
        return f"missing; the columns are {', '.join(map(repr, row))}"
    match row[field]:
        case None:
            return "null"
        case bool():
            return "true or false"
        case NotJson():
            return "NaN or an infinity, which is not JSON"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case []:
            return "an empty list"
        case list(parts) if any(isinstance(part, Mapping) and "type" in part for part in parts):
            return "a list of parts that are not all texts"
        case list():
            return "a list"
        case _:
            return "an object"


def fault(where: str, field: str, found: str, expected: str, fix: str = "mend or remove the row") -> RowError:
    """Return the fault of one row's field."""
    return RowError(where=f"{where}, field {field}", found=found, expected=expected, fix=fix)
