"""What a value of a row holds: its kind, its texts, and whether somebody's chat template stands in them."""

import ast
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from orpo_lite.data.formats.messages import ANSWER_KEYS, MEASURES, is_message, is_pairs, normal, role_of
from orpo_lite.data.formats.text import is_dialogue, numeric
from orpo_lite.data.pair import NotJson

Kind = Literal[
    "missing", "null", "text", "dialogue", "Python text of a list", "messages", "completions",
    "texts", "numbers as texts", "pairs of texts", "numbers", "number", "true or false", "something else",
]  # fmt: skip
TEXTS: tuple[Kind, ...] = ("text", "dialogue")
LISTS: tuple[Kind, ...] = ("texts", "numbers as texts")  # of texts; answers may be numbers, and scores texts
USABLE: tuple[Kind, ...] = (*TEXTS, "messages")  # as chosen or rejected
STRUCTURED: tuple[Kind, ...] = ("messages", "completions")  # a table holds these as JSON
# So it does these, and here and there a text looks like one: a column holds them where every cell of it does.
PLAIN_LISTS: tuple[Kind, ...] = (*LISTS, "pairs of texts", "numbers")
SCALARS: tuple[Kind, ...] = ("missing", "null", "number", "true or false")


def kind_of(value: Any, column: str = "") -> Kind:
    match unpacked(value, column):
        case None | []:
            return "null"
        case str(text) if not text.strip():
            return "null"  # all that a csv can write for it
        case str(text):
            python = _PYTHON.match(text) and _parsed(text) is None
            return "Python text of a list" if python else "dialogue" if is_dialogue(text) else "text"
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case list(items) if all(isinstance(item, Mapping) for item in items):
            return _kind_of_list(items)
        case list(items) if all(isinstance(item, str) for item in items):
            return "numbers as texts" if all(map(numeric, items)) else "texts"
        case list(items) if is_pairs(items):
            return "pairs of texts"
        case list(items) if all(item is None or type(item) in (int, float, NotJson) for item in items):
            return "numbers"
        case _:
            return "something else"


def usual_kind(values: Sequence[Any], column: str) -> Kind:
    """What most of a column's values hold, the empty ones aside."""
    kinds = Counter(kind_of(value, column) for value in values)
    del kinds["null"]
    if not kinds:
        return "null"
    usual = kinds.most_common(1)[0][0]
    in_doubt = usual in (*PLAIN_LISTS, "something else")
    alike: Collection[Kind] = PLAIN_LISTS if usual in PLAIN_LISTS else (usual,)
    return "text" if in_doubt and are_texts(values) and not kinds.keys() <= set(alike) else usual


def are_texts(values: Sequence[Any]) -> bool:
    """Most of them, as in a table."""
    held = [value for value in values if not is_blank(value)]
    return sum(isinstance(value, str) for value in held) > len(held) / 2


def is_blank(value: Any) -> bool:
    """It holds nothing, also as a table has to write that: kind_of says null."""
    return value.strip() in ("", "[]") if isinstance(value, str) else value is None or value == []


def _kind_of_list(items: Sequence[Mapping[str, Any]]) -> Kind:
    answers = len(items) > 1 and all(role_of(item) == "assistant" and item.keys() & {*MEASURES} for item in items)
    if all(map(is_message, items)) and not answers:
        return "messages"
    return "completions" if all(any(key in item for key in ANSWER_KEYS) for item in items) else "something else"


def unpacked(value: Any, column: str = "") -> Any:
    """A text that holds JSON of something that a format reads, as a table has to, as what it is; any other as is."""
    held = normal(_parsed(value), column)
    objects = isinstance(held, list) and all(isinstance(item, Mapping) for item in held)
    return held if objects or (held is not None and kind_of(held) in (*STRUCTURED, *PLAIN_LISTS)) else value


def alone(value: Any) -> str | None:
    """The text in a list of one text, as a table or Python holds it; None of anything else, JSON in a text among it."""
    if isinstance(value, str) and _PYTHON.match(value) and not _is_json(value):
        value = _parsed(value)
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else None


def is_conversation(text: str) -> bool:
    """JSON that is a list of messages beyond doubt: each has a role that is known, and a text."""
    turns = normal(_parsed(text)) if text.lstrip()[:1] == "[" else None
    return isinstance(turns, list) and bool(turns) and all(role_of(turn) and turn.get("content") for turn in turns)


# Lists as Python prints them, which pandas writes into a table; NumPy's have no commas, and cannot be read.
_PYTHON = re.compile(
    r"""\s*(?:array\(\s*)?(?:\[\s*[\[({]?\s*['"]|\{\s*['"](?:role|content|from|value|messages)['"]\s*:)"""
)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(value: Any) -> Any:
    """The list or the object that a text is as JSON, or as Python prints it; None of any other value."""
    if not isinstance(value, str) or (value.lstrip()[:1], value.rstrip()[-1:]) not in (("[", "]"), ("{", "}")):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip()) if _PYTHON.match(value) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # literals alone: no code of the text runs
        return None


def contents(value: Any) -> list[str]:
    """The texts in a value: its own, or those of its messages or answers."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in contents(item)]
    if isinstance(value, Mapping):
        return [text for key in ANSWER_KEYS for text in contents(value.get(key))]
    return []


def asks(turns: Sequence[Any]) -> bool:
    """It holds a user's turn: a whole conversation, not only the reply."""
    return any(role_of(turn) == "user" for turn in turns)


def is_single_reply(value: Any) -> bool:
    """A list of one message, the assistant's."""
    return isinstance(value, list) and [role_of(item) for item in value] == ["assistant"]


def opens(turns: Any) -> bool:
    """A conversation from its start: a user's turn is the first, or the first behind a system turn."""
    roles = [role_of(turn) for turn in turns] if isinstance(turns, list) else []
    return roles[:1] == ["user"] or roles[:2] == ["system", "user"]


def one_after_another(parts: Sequence[str], text: str) -> bool:
    """A text holds all of these, in this order."""
    at = 0
    for part in parts:
        if (at := text.find(part, at)) < 0:
            return False
        at += len(part)
    return bool(parts)


def ends_with(turns: Any, *replies: Any) -> bool:
    """A conversation whose last text is one of these replies."""
    return contents(turns)[-1:] in [contents(reply)[-1:] for reply in replies]


def up_to_question(turns: Any) -> list[str]:
    """The texts of a conversation up to the last that a user says: without the reply, where it ends with one."""
    asked = [i for i, turn in enumerate(turns, start=1) if role_of(turn) == "user"] if isinstance(turns, list) else []
    return contents(turns[: asked[-1]]) if asked else []


def waits_for_reply(turns: Sequence[Any]) -> bool:
    return role_of(turns[-1]) == "user"


_START = re.compile(
    r"\s*(?:<s>(?![\s\S]*</s>[\s\S]*\S)|(?:<s>\s*)?(?:"  # <s>old</s> new: of HTML
    r"<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>|<\|im_start\|>|\[INST\]|<<SYS>>"
    r"|<\|im_(?:user|system|assistant|middle)\|>|<\|header_start\|>|<\|start_of_role\|>|<\|channel\|>"
    r"|<\|start\|>(?:user|system|developer|assistant)|\[\|(?:user|system|assistant)\|\]"
    r"|\[SYSTEM_PROMPT\]|<\|start_header_id\|>|<start_of_turn>|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|(?:user|system|assistant)\|>|<｜(?:User|Assistant)｜>"
    r"|#{2,3} ?(?:Instruction|Human|User|System|Input|Question)s?:"
    r"|Below is an instruction that describes|(?:USER|User|Human|ASSISTANT|Assistant|GPT4 Correct User): "
    r"|<(?:human|bot)>:|A chat between a curious (?:user|human) and an artificial intelligence))"
)
# Its turns within one text, behind a system text or not: what has to be in the text at all, and how it stands there.
_TURNS = {
    "<extra_id_": re.compile(r"(?:\A|\n)<extra_id_[01]>(?:System|User|Assistant)\n"),  # HelpSteer2
    "ASSISTANT:": re.compile(r"(?:\A|\s)USER: .*\sASSISTANT:", re.DOTALL),  # Vicuna
    "Instruct": re.compile(r"\A\s*Instruct(?:ion)?:.*\n\s*(?:Output|Response):", re.DOTALL),  # Phi
    "Answer:": re.compile(r"\A\s*Question: .*\n\nAnswer:\s*\Z", re.DOTALL),  # StackLLaMA
}
_WAITING = re.compile(  # for the reply, at the end
    r"(?:\s(?:ASSISTANT|<bot>|#{2,3} ?(?:Response|Assistant|Answer)):|\n\s*Assistant:|\[/INST\]|<\|assistant\|>"
    r"|<\|im_start\|>assistant|<\|im_assistant\|>assistant<\|im_middle\|>|<\|start\|>assistant|\[\|assistant\|\]"
    r"|(?:<\|start_of_role\|>|<\|header_start\|>)assistant(?:<\|end_of_role\|>|<\|header_end\|>)|<start_of_turn>model)\Z"
)
_LONGEST = 48  # characters of a marker at the end, and more
_END = re.compile(
    r"(?:<extra_id_1>|</s>|<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|<\|endoftext\|>|<end_of_turn>|<eos>|<\|end\|>"
    r"|<\|eot\|>|<\|return\|>|\[\|endofturn\|\]"
    r"|<\|END_OF_TURN_TOKEN\|>|<\|end_of_turn\|>|<｜end▁of▁sentence｜>)\Z"
)


def is_templated(value: Any) -> bool:
    """Anchored at the text's start and end, or markers in their order, so that a question about templates is none."""
    return is_opened(value) or end_marker(value) is not None


def is_opened(value: Any) -> bool:
    """It begins with a template's marker, holds its turns, or waits behind the marker of a reply."""
    return any(_is_opened(text) and not is_dialogue(text) for text in contents(value))


def _is_opened(text: str) -> bool:
    turns = any(marker in text and pattern.search(text) for marker, pattern in _TURNS.items())
    return turns or bool(_START.match(text) or _WAITING.search(_end(text)))


def _end(text: str) -> str:
    return text.rstrip()[-_LONGEST:]


def end_marker(value: Any) -> str | None:
    """A template's marker at the end of the last text that has one there."""
    ends = (_end_marker(text) for text in reversed(contents(value)) if not is_dialogue(text))
    return next(filter(None, ends), None)


def _end_marker(text: str) -> str | None:
    match = _END.search(_end(text))
    is_html = match is not None and match[0] == "</s>" and text.strip().rfind("<s>") > 0
    return match[0] if match and not is_html else None
