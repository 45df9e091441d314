"""The forms in which rows hold a text or messages, brought to one: a text, or a list of {role, content}."""

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
ANSWER_KEYS = ("response", "answer", "completion", "generation", "output", "text", "content", "message", "messages")
MEASURES = {"overall_score": 1, "score": 1, "rating": 1, "reward": 1, "rank": -1}  # -1: the lowest is the best
APART = ("reasoning_content", "reasoning", "thinking")  # keys of what is said before the reply, apart from it
# Keys of what belongs to a pair for those who made it, and is not read.
BESIDE = (*APART, "tools", "functions", "documents", "image", "images", "video", "videos", "audio", "audios")
TOOL_CALLS = ("tool_calls", "function_call")  # keys of a message
_HELD = dict.fromkeys((*ALIASES["conversation"], *ANSWER_KEYS, "value"))  # keys of an object around these


def is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and any(item.get(key) is not None for key in SPEAKERS)


def role_of(item: Any) -> str | None:
    """system, user or assistant, whatever this set calls them; None for another speaker, and for no message."""
    name = next((item[key] for key in SPEAKERS if item.get(key) is not None), None) if is_message(item) else None
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def normal(value: Any, column: str = "") -> Any:
    """Return the text or the messages {role, content} that a value holds in any form; any other value as it is.

    The forms: ShareGPT's {from, value}; a single message; turns {input, output}; a text in parts; a struct of lists, as
    in a table; an object around one of these ({"text": ..., "score": 9}, {"messages": [...]}); and in a column history
    pairs [user, assistant].
    """
    if isinstance(value, Mapping):
        return _held(value, column)
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(item, Mapping) and item.get("type") == "text" for item in value):
        parts = [item.get("text") for item in value]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else value
    if all(isinstance(item, Mapping) and item.get("input") is not None and "output" in item for item in value):
        return _turns((item["input"], item["output"]) for item in value)
    if plain_name(column) == "history" and is_pairs(value):
        return _turns(value)
    return [_message(item) if is_message(item) else item for item in value]


def is_pairs(value: Any) -> bool:
    """A list of lists of two texts."""
    return isinstance(value, list) and all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str] for pair in value
    )


def _turns(pairs: Iterable[Sequence[Any]]) -> list[Mapping[str, Any]]:
    """The turns of a user and of the assistant; the last reply may be missing."""
    turns: list[Mapping[str, Any]] = []
    for asked, reply in pairs:
        turns.append({"role": "user", "content": asked})
        turns += [{"role": "assistant", "content": reply}] if reply is not None else []
    return turns


def _message(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message under the keys role and content; its other keys stay, and so does a role of another name."""
    speaker = next(key for key in SPEAKERS if item.get(key) is not None)
    present = [key for key in CONTENTS if key in item]  # a table of several sets has the keys of all, null but for one
    said = next((key for key in present if item[key] is not None), present[0] if present else "")
    content = {"content": normal(item[said])} if said else {}
    others = {key: value for key, value in item.items() if key != said}
    return {**others, "role": role_of(item) or item[speaker], **content}


def is_sharegpt(turns: Any) -> bool:
    return any("from" in turn for turn in turns if is_message(turn))


def _held(value: Mapping[str, Any], column: str) -> Any:
    """What an object is around, or the list of the message that it is."""
    for speaker, said in (("role", "content"), ("from", "value")):
        roles, texts = value.get(speaker), value.get(said)
        if isinstance(roles, list) and isinstance(texts, list) and len(roles) == len(texts):
            return [_message({speaker: role, said: text}) for role, text in zip(roles, texts, strict=True)]
    if is_message(value):  # of a column that is not ours it may be about anything: {"from": "a forum", "text": ...}
        is_said = any(key in value for key in CONTENTS) and (role_of(value) or plain_name(column) in KNOWN)
        return [_message(value)] if is_said else value
    held = [key for key in _HELD if value.get(key) is not None]
    if len(held) != 1 or value.keys() & {*ALIASES["prompt"]} - {"context"}:  # it holds a question as well
        return value
    inner = normal(value[held[0]])
    system = {key: value[key] for key in ALIASES["system"] if value.get(key)}
    beside = {key: value[key] for key in BESIDE if value.get(key)}
    others = {key: other for key, other in value.items() if key not in (*held, *system, *beside)}
    if any(key in TOOL_CALLS or not _is_label(other) for key, other in others.items()):  # it says more than the reply
        return value
    if isinstance(inner, str):
        return value if system or beside else inner
    if not isinstance(inner, list) or not inner or not all(map(is_message, inner)):
        return value
    in_front = [{"role": "system", "content": text} for text in system.values() if role_of(inner[0]) != "system"]
    return [*in_front, *inner[:-1], {**beside, **inner[-1]}]


def _is_label(value: Any) -> bool:
    """What may be an id, a score or a name, and no text of its own."""
    return not isinstance(value, str) or re.fullmatch(r"[\w.:/+-]*", value, re.ASCII) is not None
