"""Read the texts of rows: dialogues, the common beginning of two texts, and missing values."""

import math
import re
from collections.abc import Mapping

from orpo_lite.data.pair import Message, NotJson, Row, RowError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character. A text with one has no UTF-8 form and no tokens."""
_TURN_MARKER = re.compile(
    r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?"
)  # "Human:" within a line is only text
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_HUMAN_MARKER = "\n\nHuman:"
ASSISTANT_MARKER = "\n\nAssistant:"
STARTS_WITH_MARKER = re.compile(r"\A\s*Assistant:")  # a reply that contains its marker


def _plain_ends(text: str) -> str:
    r"""Replace Windows line ends (\r\n) by \n, because a turn marker follows two \n."""
    return text.replace("\r\n", "\n")


def begins_dialogue(text: str) -> bool:
    """Return whether a text is clearly a dialogue.

    Such a text begins with a turn marker, such as "Human:", and has an assistant turn. A text with
    markers only in the middle may be a text about dialogues.
    """
    return bool(_TURN_MARKER.match(text)) and ASSISTANT_MARKER in _plain_ends(text)


def is_whole_dialogue(text: str) -> bool:
    """Return whether a text is a dialogue with a human turn. A single reply has no human turn."""
    has_human_turn = text.lstrip().startswith("Human:") or _HUMAN_MARKER in _plain_ends(text)
    return begins_dialogue(text) and has_human_turn


def is_dialogue(text: str) -> bool:
    """Return whether a text is a dialogue, with or without a system text in front.

    Use it only to test whether most texts of a column are dialogues. It is not reliable for one
    text.
    """
    text = _plain_ends(text)
    return begins_dialogue(text) or ASSISTANT_MARKER in text.partition(_HUMAN_MARKER)[2]


def read_dialogue_prompt(row: Row, where: str) -> tuple[tuple[Message, ...], str]:
    """Return the turns and the text of a prompt that is a dialogue in one text.

    The returned text ends with an assistant marker. If the prompt does not end with an assistant
    marker, but chosen begins with one, an assistant marker is added to the prompt. Raises RowError
    if the result is not a dialogue that ends with an assistant marker.
    """
    text = _plain_ends(text_of(row, "prompt", where))
    if not text.rstrip().endswith(ASSISTANT_MARKER) and STARTS_WITH_MARKER.match(
        text_of(row, "chosen", where)
    ):
        text = text.rstrip() + ASSISTANT_MARKER
    _, turns, rest = split_dialogue({"prompt": text}, "prompt", where)
    if rest.strip():
        expected = r'"\n\nAssistant:" at the end, and the replies in chosen and rejected'
        raise row_error(where, "prompt", "the dialogue ends with a reply", expected)
    return turns, text


def split_dialogue(row: Row, field: str, where: str) -> tuple[str, tuple[Message, ...], str]:
    """Split a dialogue after its last assistant marker.

    Returns the text up to and including the marker, the turns before the marker, and the reply
    after the marker. Raises RowError if the text is not a dialogue, or if its last turn is the
    human's.
    """
    text = _plain_ends(text_of(row, field, where))
    head, marker, reply = text.rpartition(ASSISTANT_MARKER)
    lead, *parts = _TURN_MARKER.split(head)
    if (
        not marker
        or not parts
        or (lead.strip() and not head[len(lead) :].startswith(_HUMAN_MARKER))
    ):
        found = "the text does not begin with a turn" if marker else "there is no assistant turn"
        raise row_error(where, field, found, r'"\n\nHuman: ... \n\nAssistant: ..."')
    if _HUMAN_MARKER in reply:
        raise row_error(
            where,
            field,
            "the last turn is the human's",
            "a dialogue that ends with the assistant's reply",
        )
    lead = lead.strip().removeprefix("System:").strip()
    turns: list[Message] = [{"role": "system", "content": lead}] if lead else []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = _SPEAKERS[speaker]
        if turns and turns[-1]["role"] == role:  # chat templates require roles to alternate
            turns[-1]["content"] = "\n\n".join(filter(None, (turns[-1]["content"], content)))
        else:
            turns.append({"role": role, "content": content})
    return head + marker, tuple(turns), reply


_WORD = re.compile(r"\S+")


def text_after(prompt: str, text: str) -> str | None:
    """Return the part of a text after the prompt; None if the text does not begin with the prompt.

    The text and the prompt are compared word by word, so the white space between words may differ.
    """
    *words, last = prompt.split() or [""]
    found = _WORD.finditer(text)
    for word in words:
        match = next(found, None)
        if match is None or match[0] != word:
            return None
    match = next(found, None)
    if not last or match is None or not match[0].startswith(last):
        return None
    return text[match.start() + len(last) :]


def begins_with(words: str, text: str) -> bool:
    """Return whether ``text`` begins with ``words``, followed by white space or nothing.

    For the words "a b": text "a b c" -> True, text "a bc" -> False.
    """
    end = text_after(words, text)
    return end is not None and not end[:1].strip()


def common_start(one: str, other: str) -> str:
    """Return the longest common beginning of two texts, compared by characters."""
    if other.startswith(one):  # the usual case, and far faster
        return one
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:i]
    return other


def common_words(one: str, other: str) -> str:
    """Return the common beginning of two texts, in whole words.

    "The sky is blue" and "The sky is black" -> "The sky is".
    """
    shared = common_start(one, other)
    if one == other or shared[-1:].isspace():
        return shared.rstrip()
    *words, _ = shared.rsplit(maxsplit=1) or [""]
    return "".join(words)


# What datasets write for a missing score.
ABSENT = ("", "n/a", "na", "nan", "none", "null", "#n/a", "<na>")


def is_absent(text: str) -> bool:
    """Return whether a text is a common name of a missing value: NULL, None, NaN or N/A."""
    return text.strip().lower() in ABSENT[1:]


def is_numeric(text: str) -> bool:
    """Return whether a text is a finite number, or means a missing value: "" or N/A."""
    try:
        return text.strip().lower() in ABSENT or math.isfinite(float(text))
    except ValueError:
        return False


def text_of(row: Row, field: str, where: str, label: str = "") -> str:
    """Return the text in a field. Raises RowError if the field holds no valid text.

    ``label``: the field's name in the error.
    """
    value = row.get(field)
    if not isinstance(value, str):
        parts = ', or only parts {"type": "text", "text": ...}' if isinstance(value, list) else ""
        raise row_error(where, label or field, describe(row, field), f"text{parts}")
    if not value.isascii() and (broken := LONE_SURROGATE.search(value)):
        found = f"a lone surrogate (half a character) at position {broken.start()}"
        raise row_error(where, label or field, found, "text", "write the data as UTF-8 again")
    return value


def describe(row: Row, field: str) -> str:
    """Describe the value of a field without its content, which may be offensive or private."""
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


def row_error(
    where: str, field: str, found: str, expected: str, fix: str = "correct or remove the row"
) -> RowError:
    """Return the RowError for one field of a row."""
    return RowError(where=f"{where}, field {field}", found=found, expected=expected, fix=fix)
