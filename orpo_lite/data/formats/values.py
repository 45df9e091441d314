"""Determine the type and the texts of a value, and whether a chat template was applied to it."""

import ast
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from orpo_lite.data.formats.messages import (
    ANSWER_KEYS,
    MEASURES,
    is_message,
    is_pair_list,
    normalize,
    role_of,
)
from orpo_lite.data.formats.text import is_dialogue, is_numeric
from orpo_lite.data.pair import NotJson

ValueType = Literal[
    "missing", "null", "text", "dialogue", "Python text of a list", "messages", "completions",
    "texts", "numbers as texts", "pairs of texts", "numbers", "number", "true or false",
    "something else",
]  # fmt: skip
TEXTS: tuple[ValueType, ...] = ("text", "dialogue")
# Lists of texts. Answers may be numbers, and scores may be texts.
LISTS: tuple[ValueType, ...] = ("texts", "numbers as texts")
USABLE: tuple[ValueType, ...] = (*TEXTS, "messages")  # as chosen or rejected
STRUCTURED: tuple[ValueType, ...] = ("messages", "completions")  # a table holds these as JSON
# A table holds these as JSON too, but an ordinary text may look like one. A column has such a type
# only if every cell has.
PLAIN_LISTS: tuple[ValueType, ...] = (*LISTS, "pairs of texts", "numbers")
SCALARS: tuple[ValueType, ...] = ("missing", "null", "number", "true or false")


def value_type(value: Any, column: str = "") -> ValueType:
    """Return the type of a value. If the value is a JSON text, return the type of its content."""
    match unpack_json(value, column):
        case None | []:
            return "null"
        case str(text) if not text.strip():
            return "null"  # a csv has no other way to write it
        case str(text):
            return _text_type(text)
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case list(items):
            return _list_type(items)
        case _:
            return "something else"


def _text_type(text: str) -> ValueType:
    if _PYTHON.match(text) and _parsed(text) is None:
        return "Python text of a list"
    return "dialogue" if is_dialogue(text) else "text"


def _list_type(items: Sequence[Any]) -> ValueType:
    if all(isinstance(item, Mapping) for item in items):
        return _object_list_type(items)
    if all(isinstance(item, str) for item in items):
        return "numbers as texts" if all(map(is_numeric, items)) else "texts"
    if is_pair_list(items):
        return "pairs of texts"
    if all(item is None or type(item) in (int, float, NotJson) for item in items):
        return "numbers"
    return "something else"


def _object_list_type(items: Sequence[Mapping[str, Any]]) -> ValueType:
    are_rated = len(items) > 1 and all(
        role_of(item) == "assistant" and item.keys() & {*MEASURES} for item in items
    )
    if all(map(is_message, items)) and not are_rated:
        return "messages"
    are_answers = all(any(key in item for key in ANSWER_KEYS) for item in items)
    return "completions" if are_answers else "something else"


def usual_type(values: Sequence[Any], column: str) -> ValueType:
    """Return the most frequent type of a column's values. Empty values do not count."""
    counts = Counter(value_type(value, column) for value in values)
    del counts["null"]
    if not counts:
        return "null"
    usual = counts.most_common(1)[0][0]
    if usual in (*PLAIN_LISTS, "something else") and are_texts(values):
        alike: Collection[ValueType] = PLAIN_LISTS if usual in PLAIN_LISTS else (usual,)
        if not counts.keys() <= set(alike):
            return "text"
    return usual


def are_texts(values: Sequence[Any]) -> bool:
    """Return whether most values are texts (in a csv file, all are). Empty values are ignored."""
    filled = [value for value in values if not is_blank(value)]
    return sum(isinstance(value, str) for value in filled) > len(filled) / 2


def is_blank(value: Any) -> bool:
    """Return whether a value is empty (type "null"): None, [], "[]" or a blank text."""
    return value.strip() in ("", "[]") if isinstance(value, str) else value is None or value == []


def unpack_json(value: Any, column: str = "") -> Any:
    """Parse a text that contains a list or messages: "[1, 2]" -> [1, 2].

    The text is JSON, or Python has printed it: "['a']" -> ["a"]. For example, a cell of a csv table
    contains such a text. Any other value is returned unchanged.
    """
    parsed = normalize(_parsed(value), column)
    if isinstance(parsed, list) and all(isinstance(item, Mapping) for item in parsed):
        return parsed
    is_list = parsed is not None and value_type(parsed) in (*STRUCTURED, *PLAIN_LISTS)
    return parsed if is_list else value


def single_text(value: Any) -> str | None:
    """Return the text in a list of exactly one text: ["a"] -> "a". Return None for other values.

    A text that contains such a list in Python's notation is read too: "['a']" -> "a". A text that
    contains the list as JSON is not read: '["a"]' -> None.
    """
    if isinstance(value, str) and _PYTHON.match(value) and not _is_json(value):
        value = _parsed(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return None


def is_conversation(text: str) -> bool:
    """Return whether a text is a JSON list of messages, each with content and with a known role."""
    if text.lstrip()[:1] != "[":
        return False
    turns = normalize(_parsed(text))
    if not isinstance(turns, list) or not turns:
        return False
    return all(role_of(turn) and turn.get("content") for turn in turns)


# Lists as Python prints them, which pandas writes into a table. NumPy prints lists without commas,
# and they cannot be read back.
_PYTHON = re.compile(
    r"""\s*(?:array\(\s*)?(?:\[\s*[\[({]?\s*['"]"""
    r"""|\{\s*['"](?:role|content|from|value|messages)['"]\s*:)"""
)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(value: Any) -> Any:
    """Return the list or object in a text that is JSON or printed by Python; None for others."""
    if not isinstance(value, str):
        return None
    brackets = (value.lstrip()[:1], value.rstrip()[-1:])
    if brackets not in (("[", "]"), ("{", "}")):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if not _PYTHON.match(value):
        return None
    try:
        return ast.literal_eval(value.strip())  # only literals: no code in the text is run
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def texts_in(value: Any) -> list[str]:
    """Return the texts in a value: the value itself, or the texts of its messages or answers."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    if isinstance(value, Mapping):
        return [text for key in ANSWER_KEYS for text in texts_in(value.get(key))]
    return []


def has_user_turn(turns: Sequence[Any]) -> bool:
    """Return whether messages include a user turn. A reply alone has no user turn."""
    return any(role_of(turn) == "user" for turn in turns)


def is_single_reply(value: Any) -> bool:
    """Return whether a value is a list of one message with the role assistant."""
    return isinstance(value, list) and [role_of(item) for item in value] == ["assistant"]


def is_from_start(turns: Any) -> bool:
    """Return whether a conversation begins with a user's turn, perhaps after a system turn."""
    if not isinstance(turns, list):
        return False
    roles = [role_of(turn) for turn in turns[:2]]
    return roles[:1] == ["user"] or roles == ["system", "user"]


def contains_in_order(parts: Sequence[str], text: str) -> bool:
    """Return whether a text contains all parts in this order."""
    position = 0
    for part in parts:
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return bool(parts)


def ends_with(turns: Any, *replies: Any) -> bool:
    """Return whether the last text of ``turns`` is also the last text of one of ``replies``."""
    return texts_in(turns)[-1:] in [texts_in(reply)[-1:] for reply in replies]


def texts_up_to_question(turns: Any) -> list[str]:
    """Return the texts of a conversation up to and including the last user turn."""
    if not isinstance(turns, list):
        return []
    questions = [i for i, turn in enumerate(turns) if role_of(turn) == "user"]
    return texts_in(turns[: questions[-1] + 1]) if questions else []


def waits_for_reply(turns: Sequence[Any]) -> bool:
    return role_of(turns[-1]) == "user"


_START = re.compile(
    r"\s*(?:<s>(?![\s\S]*</s>[\s\S]*\S)|(?:<s>\s*)?(?:"  # <s>old</s> new: of HTML
    r"<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>|<\|im_start\|>"
    r"|\[INST\]|<<SYS>>"
    r"|<\|im_(?:user|system|assistant|middle)\|>|<\|header_start\|>|<\|start_of_role\|>"
    r"|<\|channel\|>"
    r"|<\|start\|>(?:user|system|developer|assistant)|\[\|(?:user|system|assistant)\|\]"
    r"|\[SYSTEM_PROMPT\]|<\|start_header_id\|>|<start_of_turn>|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|(?:user|system|assistant)\|>|<｜(?:User|Assistant)｜>"
    r"|#{2,3} ?(?:Instruction|Human|User|System|Input|Question)s?:"
    r"|Below is an instruction that describes"
    r"|(?:USER|User|Human|ASSISTANT|Assistant|GPT4 Correct User): "
    r"|<(?:human|bot)>:|A chat between a curious (?:user|human) and an artificial intelligence))"
)
# Several turns in one text, with or without a system text before them: a marker that is searched
# first, and the pattern that the text must match if it has the marker.
_TURNS = {
    "<extra_id_": re.compile(r"(?:\A|\n)<extra_id_[01]>(?:System|User|Assistant)\n"),  # HelpSteer2
    "ASSISTANT:": re.compile(r"(?:\A|\s)USER: .*\sASSISTANT:", re.DOTALL),  # Vicuna
    "Instruct": re.compile(r"\A\s*Instruct(?:ion)?:.*\n\s*(?:Output|Response):", re.DOTALL),  # Phi
    "Answer:": re.compile(r"\A\s*Question: .*\n\nAnswer:\s*\Z", re.DOTALL),  # StackLLaMA
}
# The marker of a reply at the end of a text.
_REPLY_MARKER = re.compile(
    r"(?:\s(?:ASSISTANT|<bot>|#{2,3} ?(?:Response|Assistant|Answer)):|\n\s*Assistant:|\[/INST\]"
    r"|<\|assistant\|>|<\|im_start\|>assistant|<\|im_assistant\|>assistant<\|im_middle\|>"
    r"|<\|start\|>assistant|\[\|assistant\|\]"
    r"|(?:<\|start_of_role\|>|<\|header_start\|>)assistant(?:<\|end_of_role\|>|<\|header_end\|>)"
    r"|<start_of_turn>model)\Z"
)
_MAX_MARKER = 48  # characters; no marker at the end of a text is longer
_END_MARKER = re.compile(
    r"(?:<extra_id_1>|</s>|<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|<\|endoftext\|>"
    r"|<end_of_turn>|<eos>|<\|end\|>|<\|eot\|>|<\|return\|>|\[\|endofturn\|\]"
    r"|<\|END_OF_TURN_TOKEN\|>|<\|end_of_turn\|>|<｜end▁of▁sentence｜>)\Z"
)


def is_templated(value: Any) -> bool:
    """Return whether a chat template was probably applied to one of the texts in a value.

    Such a text has a template's marker, such as <|im_end|>, at its start or end, or has the markers
    of several turns in their order. A single marker inside a text is usually not enough, because a
    question about templates may contain a marker.
    """
    return begins_templated(value) or end_marker(value) is not None


def begins_templated(value: Any) -> bool:
    """Return whether a text in a value looks like the output of a chat template.

    Such a text has a template's marker at its start, the markers of several turns, or the marker
    of a reply at its end: "Hi<|assistant|>" -> True. A marker that ends a reply is not enough:
    "Yes.<|im_end|>" -> False. For this text, :func:`is_templated` returns True.
    """
    return any(_begins_templated(text) and not is_dialogue(text) for text in texts_in(value))


def _begins_templated(text: str) -> bool:
    if any(marker in text and pattern.search(text) for marker, pattern in _TURNS.items()):
        return True
    return bool(_START.match(text) or _REPLY_MARKER.search(_last_characters(text)))


def _last_characters(text: str) -> str:
    return text.rstrip()[-_MAX_MARKER:]


def end_marker(value: Any) -> str | None:
    """Return the marker at the end of a text in ``value``, such as <|im_end|>.

    If several texts end with a marker, return the marker of the last of these texts. If no text
    ends with a marker, return None.
    """
    for text in reversed(texts_in(value)):
        marker = None if is_dialogue(text) else _end_marker(text)
        if marker:
            return marker
    return None


def _end_marker(text: str) -> str | None:
    match = _END_MARKER.search(_last_characters(text))
    if match is None:
        return None
    is_html = match[0] == "</s>" and text.strip().rfind("<s>") > 0
    return None if is_html else match[0]
