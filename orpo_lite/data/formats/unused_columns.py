"""Raise errors for columns that seem to be part of the prompt but would not be read.

A column seems to be part of the prompt if it has a name such as ``context``, or if it contains
messages.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from orpo_lite.data.formats.columns import NOTABLE_SHARE, ColumnProfile
from orpo_lite.data.formats.messages import normalize
from orpo_lite.data.formats.names import (
    ALIASES,
    NOT_PROMPT_WORDS,
    REPLIES,
    join_names,
    plain_name,
    words,
)
from orpo_lite.data.formats.values import (
    SCALARS,
    TEXTS,
    ValueType,
    contains_in_order,
    ends_with,
    is_templated,
    texts_in,
    texts_up_to_question,
    waits_for_reply,
)
from orpo_lite.errors import DataError, Overrides, reworded

# Column name -> (value types that are no error, the types that can be read). A number is no error,
# because it is not a prompt but the id of a prompt.
READABLE_TYPES: dict[str, tuple[tuple[ValueType, ...], str]] = {
    **dict.fromkeys(
        (*ALIASES["prompt"], *ALIASES["conversation"]),
        ((*SCALARS, *TEXTS, "messages"), "a text, or a list of messages {role, content}"),
    ),
    "history": (
        ("missing", "null", *TEXTS, "messages", "pairs of texts"),
        "messages, or pairs [user, assistant]",
    ),
    **dict.fromkeys(ALIASES["system"], (("missing", "null", *TEXTS), "a text")),
}
# Formats in which a reply may be a whole conversation.
CONVERSATION_FORMATS = ("implicit", "messages", "sharegpt", "hh_rlhf")
# Columns whose content is added to a prompt. All other names mean the prompt itself.
ADDITIONS = ("input", "context", "history")


def refuse_unused(profile: ColumnProfile, name: str, *, requested: bool) -> None:
    """Raise DataError if a column seems to be part of the prompt, but is not read.

    The error lists the settings to choose from.

    Args:
        profile: the first rows, and the columns that are read.
        name: the format in which the rows are read.
        requested: True if data.format is set to another value than auto.
    """
    # In this format, chosen and rejected contain everything before the reply.
    is_implicit = requested and name == "implicit"
    is_decided = is_implicit or bool(profile.mapped.keys() & {"prompt", "conversation"})
    _refuse_wrong_types(profile, name, is_decided=is_decided)
    if not is_implicit:
        _refuse_prompts(profile, name, is_decided=is_decided)
    if not is_decided:
        _refuse_turns(profile, name)


def _refuse_wrong_types(profile: ColumnProfile, name: str, *, is_decided: bool) -> None:
    """Raise DataError for a column with a known name whose type of values cannot be read."""
    for column in _unused(profile, READABLE_TYPES):
        readable, expected = READABLE_TYPES[plain_name(column)]
        is_prompt = plain_name(column) not in ("history", *ALIASES["system"])
        if profile.type_of(column) in readable or (is_decided and is_prompt):
            continue
        without = _setting_without(profile, name) if is_prompt else ""
        leave = "no setting helps: leave the column out"
        if without:
            leave = f"{without} to leave it out"
        raise DataError(
            where="data.column_map",
            found=f"{join_names(column)} holds {profile.type_of(column)}: this type cannot be read",
            expected=expected,
            fix=reworded(without, f"{leave}, or write it as {expected}"),
        )


def _refuse_prompts(profile: ColumnProfile, name: str, *, is_decided: bool) -> None:
    """Raise DataError for a prompt column whose texts are not in most of the conversations.

    If the prompt is a list of turns, only columns in ADDITIONS are checked.
    """
    prompt_type = profile.type_of(profile.assigned.get("prompt", ""))
    is_list = prompt_type == "messages" and not is_decided
    if not is_list:
        has_own_prompt = bool(profile.assigned.keys() & {"prompt", "conversation"})
        if has_own_prompt or name not in (*CONVERSATION_FORMATS, "judged"):
            return
    columns = [c for c in _unused(profile, ALIASES["prompt"]) if profile.type_of(c) in TEXTS]
    additions = [column for column in columns if plain_name(column) in ADDITIONS]
    prompts = [] if is_list else [column for column in columns if column not in additions]
    for group in [prompts, *([column] for column in additions)]:
        found = _found_in_conversations(profile, group)
        if found.count(False) <= len(found) / 2:
            continue
        fix = _fix_prompts(profile, name, group[0], is_list=is_list)
        counts = f"{found.count(False)} of {len(found)} rows"
        raise DataError(
            where="data.column_map",
            found=f"in {counts}, no conversation contains the text in {join_names(*group)}",
            expected="conversations that contain this text",
            fix=fix,
        )


def _found_in_conversations(profile: ColumnProfile, columns: Sequence[str]) -> list[bool]:
    """Return, for each row with a text in these columns, whether a conversation contains it."""
    sources = [profile.column_named(name) for name in (*REPLIES, *profile.assigned.values())]
    found = []
    for row in profile.rows:
        conversations = [texts_in(row.get(source)) for source in sources]
        values = [row.get(column) for column in columns]
        texts = [text for text in values if isinstance(text, str) and text.strip()]
        if texts:
            found.append(any(_contains(turns, text) for text in texts for turns in conversations))
    return found


def _fix_prompts(profile: ColumnProfile, name: str, column: str, *, is_list: bool) -> str:
    """Return the settings that read a column as a system turn, or leave it out."""
    system_type = profile.type_of(profile.assigned.get("system", "system"))
    read: str = profile.setting(system=column) if system_type in ("missing", "null") else ""
    leave_out: str = ""
    if is_list:
        leave_out = _setting_without(profile, name)
    elif name in CONVERSATION_FORMATS:
        leave_out = Overrides({"data.format": "implicit"})
    words = [f"{read} to put it in front as a system turn"] if read else []
    if profile.replies_are_json():
        read = Overrides({"data.format": "explicit"})
        words.insert(0, f"{read} to read the replies as plain texts")
    words.append(f"{leave_out} to leave it out" if leave_out else "remove the column")
    return reworded(read or leave_out, ", or ".join(words))


def _contains(turns: Sequence[str], prompt: str) -> bool:
    """Return whether the turns contain a prompt.

    The prompt may also be one text with all turns before the reply, as a chat template writes them.
    """
    text, before = _single_spaced(prompt), [_single_spaced(turn) for turn in turns[:-1]]
    if text in _single_spaced(" ".join(turns)):
        return True
    is_rendered = len(before) > 2 or is_templated(prompt)
    return is_rendered and contains_in_order(before, text)


def _refuse_turns(profile: ColumnProfile, name: str) -> None:
    """Raise DataError for a column with turns that belong before the reply and are not read.

    Most likely, these are earlier turns or a system turn.
    """
    known = profile.columns_named(*ALIASES["conversation"])
    others = [
        column
        for column in profile.columns
        if column not in known and not NOT_PROMPT_WORDS & set(words(column))
    ]
    for column in _unused(profile, map(plain_name, (*known, *others))):
        if profile.type_of(column) not in ("messages", "pairs of texts"):
            continue
        if plain_name(column) == "history":
            continue  # the prompt may contain it
        waits = profile.share(waits_for_reply, column) > 0.5
        # A conversation in an unknown column may be unrelated, unless it shares a turn.
        may_be_unrelated = waits and column not in known
        # Pairs [user, assistant] count as turns too.
        values = [normalize(row.get(column), "history") for row in profile.rows]
        lost = [
            _is_lost(profile, i, value, may_be_unrelated=may_be_unrelated)
            for i, value in enumerate(values)
            if value
        ]
        if lost and sum(lost) >= NOTABLE_SHARE * len(lost):
            front = _setting_in_front(profile, column, waits=waits)
            without = _setting_without(profile, name)
            first = f"{front} to put them in front" if front else "write them into the prompt"
            second = f"{without} to leave them out" if without else "remove the column"
            raise DataError(
                where="data.column_map",
                found=f"{join_names(column)} is not read, but holds turns that no other column has",
                expected="a column that is read, for each turn before the reply",
                fix=reworded(front or without, f"{first}, or {second}"),
            )


def _is_lost(profile: ColumnProfile, i: int, conversation: Any, *, may_be_unrelated: bool) -> bool:
    """Return whether some turns of an unused ``conversation`` in row i are not read.

    Only turns before the reply count. A turn is read if it equals a turn in a column that is read,
    or if it is inside a text in such a column.
    """
    before = _nonblank(texts_up_to_question(conversation))
    row = profile.rows[i]
    read = {column: _nonblank(texts_in(row.get(column))) for column in profile.assigned.values()}
    turns = {text for texts in read.values() for text in texts}
    is_inside = any(
        contains_in_order(before, text)
        for column, texts in read.items()
        for text in texts
        if profile.type_of(column) == "dialogue" or len(before) > 1
    )
    shares_turn = is_inside or bool(turns & {*_nonblank(texts_in(conversation))})
    is_missing = not is_inside and not turns.issuperset(before)
    if may_be_unrelated:
        return is_missing and shares_turn
    return is_missing or not shares_turn


def _setting_in_front(profile: ColumnProfile, column: str, *, waits: bool) -> str:
    """Return the setting that adds a column's turns before the reply; "" if a turn would repeat."""
    replies = [profile.column_named(reply) for reply in REPLIES]
    is_whole = waits or profile.share(ends_with, column, *replies) > 0.5
    if is_whole and "conversation" not in profile.mapped:
        return profile.setting(conversation=column)
    prompt = profile.assigned.get("prompt")
    repeats_prompt = prompt is not None and profile.share(_contains_prompt, column, prompt) > 0
    if repeats_prompt or "history" in profile.mapped:
        return ""
    return profile.setting(history=column)


def _contains_prompt(turns: Any, prompt: Any) -> bool:
    return _single_spaced(" ".join(texts_in(prompt)[-1:])) in _nonblank(texts_in(turns))


def _setting_without(profile: ColumnProfile, name: str) -> str:
    """Return a setting that names the prompt columns in use, so that no others are read, or ""."""
    if conversation := profile.assigned.get("conversation"):
        return profile.setting(conversation=conversation)
    if "prompt" in profile.assigned:
        return profile.setting(prompt=profile.assigned["prompt"])
    if prompts := profile.candidates("prompt"):
        return profile.settings("prompt", prompts)
    return Overrides({"data.format": "implicit"}) if name in CONVERSATION_FORMATS else ""


def _unused(profile: ColumnProfile, names: Iterable[str]) -> list[str]:
    """Return the columns with these names that are neither read nor in data.column_map."""
    mapped = set(profile.mapped.values()) - profile.mapped.keys()
    used = {*profile.assigned.values(), *mapped}
    return [column for column in profile.columns_named(*names) if column not in used]


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


def _nonblank(texts: Iterable[str]) -> list[str]:
    """Return the texts that are not blank, with single spaces."""
    return [spaced for text in texts if (spaced := _single_spaced(text))]
