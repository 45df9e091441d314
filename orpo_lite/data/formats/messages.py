"""Convert messages of all known forms to a text or a list of {role, content}."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orpo_lite.data.formats.names import ALIASES, KNOWN, plain_name

ROLES = {  # in lower case
    **dict.fromkeys(("system", "developer"), "system"),  # developer: OpenAI's newer name
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "ai"), "assistant"),
    "model": "assistant",  # Gemini's and Gemma's
}
SPEAKERS = ("role", "from", "speaker")  # keys of a message
CONTENTS = ("content", "value", "text")
ANSWER_KEYS = ("response", "answer", "completion", "generation", "output", "text", "content",
               "message", "messages")  # fmt: skip
# Keys of an answer's score, in order of preference. -1: the lowest is the best.
MEASURES = {"overall_score": 1, "score": 1, "rating": 1, "reward": 1, "rank": -1}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # reasoning outside the reply
# Keys of content that belongs to a pair but is not read.
UNREAD_KEYS = (*REASONING_KEYS, "tools", "functions", "documents", "image", "images", "video",
               "videos", "audio", "audios")  # fmt: skip
TOOL_CALLS = ("tool_calls", "function_call")  # keys of a message
# Keys under which an object may hold a text or messages.
_WRAPPER_KEYS = dict.fromkeys((*ALIASES["conversation"], *ANSWER_KEYS, "value"))


def is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and any(item.get(key) is not None for key in SPEAKERS)


def role_of(item: Any) -> str | None:
    """Return the role of a message (system, user or assistant): ``{"from": "human"}`` -> ``user``.

    Returns None if the role is unknown or the item is not a message.
    """
    if not is_message(item):
        return None
    name = next(item[key] for key in SPEAKERS if item.get(key) is not None)
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def normalize(value: Any, column: str = "") -> Any:
    """Return a value as a text or as messages {role, content}. Other values are returned unchanged.

    These forms are converted:

    - messages {from, value}, as in ShareGPT, and a single message
    - turns {input, output}
    - a text in parts: [{"type": "text", "text": ...}, ...]
    - an object of lists, as in a table: {"role": [...], "content": [...]}
    - an object that contains a text or messages: {"text": ..., "score": 9}, {"messages": [...]}
    - a list of pairs [user, assistant], only in a column with the name history
    """
    if isinstance(value, Mapping):
        return _unwrap(value, column)
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(item, Mapping) and item.get("type") == "text" for item in value):
        parts = [item.get("text") for item in value]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else value
    if all(map(_is_input_output, value)):
        return _pairs_to_turns((item["input"], item["output"]) for item in value)
    if plain_name(column) == "history" and is_pair_list(value):
        return _pairs_to_turns(value)
    return [_message(item) if is_message(item) else item for item in value]


def _is_input_output(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("input") is not None and "output" in item


def is_pair_list(value: Any) -> bool:
    """Return whether a value is a list of pairs of texts: [["a", "b"], ["c", "d"]]."""
    return isinstance(value, list) and all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str]
        for pair in value
    )


def _pairs_to_turns(pairs: Iterable[Sequence[Any]]) -> list[Mapping[str, Any]]:
    """Return the turns of user and assistant. A missing reply is skipped."""
    turns: list[Mapping[str, Any]] = []
    for question, reply in pairs:
        turns.append({"role": "user", "content": question})
        if reply is not None:
            turns.append({"role": "assistant", "content": reply})
    return turns


def _message(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the message with the keys role and content. Other keys and unknown roles are kept."""
    speaker = next(key for key in SPEAKERS if item.get(key) is not None)
    # A table of several datasets has the content keys of all of them. All keys but one are null.
    present = [key for key in CONTENTS if key in item]
    filled = [key for key in present if item[key] is not None]
    key = (filled or present or [""])[0]
    content = {"content": normalize(item[key])} if key else {}
    others = {name: value for name, value in item.items() if name != key}
    return {**others, "role": role_of(item) or item[speaker], **content}


def is_sharegpt(turns: Any) -> bool:
    return any("from" in turn for turn in turns if is_message(turn))


def _unwrap(value: Mapping[str, Any], column: str) -> Any:
    """Return the text or messages inside an object. A single message becomes a list."""
    for speaker, content in (("role", "content"), ("from", "value")):
        roles, texts = value.get(speaker), value.get(content)
        if isinstance(roles, list) and isinstance(texts, list) and len(roles) == len(texts):
            return [
                _message({speaker: role, content: text})
                for role, text in zip(roles, texts, strict=True)
            ]
    if is_message(value):
        # In an unknown column it may be something else: {"from": "a forum", "text": ...}.
        has_content = any(key in value for key in CONTENTS)
        is_ours = has_content and (role_of(value) or plain_name(column) in KNOWN)
        return [_message(value)] if is_ours else value
    keys = [key for key in _WRAPPER_KEYS if value.get(key) is not None]
    has_question = value.keys() & {*ALIASES["prompt"]} - {"context"}
    if len(keys) != 1 or has_question:
        return value
    inner = normalize(value[keys[0]])
    system = {key: value[key] for key in ALIASES["system"] if value.get(key)}
    unread = {key: value[key] for key in UNREAD_KEYS if value.get(key)}
    others = {key: other for key, other in value.items() if key not in (*keys, *system, *unread)}
    if any(key in TOOL_CALLS or not _is_label(other) for key, other in others.items()):
        return value  # it contains more than the reply
    if isinstance(inner, str):
        return value if system or unread else inner
    if not isinstance(inner, list) or not inner or not all(map(is_message, inner)):
        return value
    if role_of(inner[0]) == "system":
        system = {}
    system_turns = [{"role": "system", "content": text} for text in system.values()]
    return [*system_turns, *inner[:-1], {**unread, **inner[-1]}]


def _is_label(value: Any) -> bool:
    """Return whether a value may be an id, a score or a name. Texts with spaces are not."""
    return not isinstance(value, str) or re.fullmatch(r"[\w.:/+-]*", value, re.ASCII) is not None
