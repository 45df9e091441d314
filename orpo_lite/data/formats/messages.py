"""The ways in which rows hold a text or messages, brought to one: a text, or a list of messages."""

from collections.abc import Mapping
from typing import Any

from orpo_lite.data.formats.names import ALIASES

ROLES = {  # in lower case
    **dict.fromkeys(("system", "developer"), "system"),  # developer: OpenAI's newer name
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "ai"), "assistant"),
    "model": "assistant",  # Gemini's and Gemma's
}
SPEAKERS = ("role", "from")  # keys of a message
CONTENTS = ("content", "value", "text")
ANSWER_KEYS = ("response", "answer", "completion", "generation", "output", "text")  # keys of an answer
APART = ("reasoning_content", "reasoning", "thinking")  # keys of what is said before the reply, apart from it
_WHOLE = ("messages", *ALIASES["conversation"])  # keys of an object that holds a conversation, or one text
_TEXTS = (*ANSWER_KEYS, "content", "value")


def is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and any(item.get(key) is not None for key in SPEAKERS)


def role_of(item: Any) -> str | None:
    """system, user or assistant, whatever this set calls them; None for another speaker, and for no message."""
    name = next((item[key] for key in SPEAKERS if item.get(key) is not None), None) if is_message(item) else None
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def said_key(item: Mapping[str, Any]) -> str:
    """The key of a message's text."""
    return next((key for key in CONTENTS if key in item), CONTENTS[0])


def reshaped(value: Any) -> Any:
    """The text or the list of messages that an object is around; any other value as it is.

    Objects around a text: ``{"text": ..., "score": 9}``. Around messages: ``{"messages": [...]}``, and
    ``{"role": [...], "content": [...]}``, as a struct of lists in a table. Not one that holds a question as well.
    """
    if isinstance(value, list):
        parts = bool(value) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value)
        if not parts or not all(isinstance(part.get("text"), str) for part in value):
            return value
        return "".join(part["text"] for part in value)
    if not isinstance(value, Mapping):
        return value
    for speaker, said in (("role", "content"), ("from", "value")):
        roles, texts = value.get(speaker), value.get(said)
        if isinstance(roles, list) and isinstance(texts, list) and len(roles) == len(texts):
            return [{speaker: role, said: text} for role, text in zip(roles, texts, strict=True)]
    held: list[Any] = [value[key] for key in dict.fromkeys((*_WHOLE, *_TEXTS)) if value.get(key) is not None]
    if is_message(value) or len(held) != 1 or value.keys() & {*ALIASES["prompt"]} - {"context"}:
        return value
    inner = reshaped(held[0])
    if any(
        isinstance(other, str) and other != held[0] and (" " in other or key in APART) for key, other in value.items()
    ):
        return value  # which says more than the reply
    listed = isinstance(inner, list) and bool(inner) and all(map(is_message, inner))
    return inner if listed or isinstance(inner, str) else value
