"""What a format would leave unread: nothing of which the name or the turns say that it belongs before the reply."""

from collections.abc import Iterable, Sequence
from typing import Any

from orpo_lite.data.formats.columns import SOME, ColumnProfile
from orpo_lite.data.formats.messages import normal
from orpo_lite.data.formats.names import ABOUT, ALIASES, SIDES, plain_name, shown, words
from orpo_lite.data.formats.values import (
    SCALARS,
    TEXTS,
    Kind,
    contents,
    ends_with,
    is_templated,
    one_after_another,
    up_to_question,
    waits_for_reply,
)
from orpo_lite.errors import DataError, Overrides, reworded

# What may stand in a column of that name, and what is read there. A number is no prompt, but the id of one.
FITS: dict[str, tuple[tuple[Kind, ...], str]] = {
    **dict.fromkeys(
        (*ALIASES["prompt"], *ALIASES["conversation"]),
        ((*SCALARS, *TEXTS, "messages"), "a text, or a list of messages {role, content}"),
    ),
    "history": (("missing", "null", *TEXTS, "messages", "pairs of texts"), "messages, or pairs [user, assistant]"),
    **dict.fromkeys(ALIASES["system"], (("missing", "null", *TEXTS), "a text")),
}
WHOLE = ("implicit", "messages", "sharegpt", "hh_rlhf")  # formats whose replies may be whole conversations
APART = ("input", "context", "history")  # say something beside a prompt; the other names all mean the prompt


def refuse_unused(profile: ColumnProfile, name: str, *, said: bool) -> None:
    """Raise DataError, with the lines to choose from.

    Args:
        profile: the first rows.
        name: the format that they are read in.
        said: the person has named the format.
    """
    whole = said and name == "implicit"  # so all that stands before the reply is in chosen and rejected
    decided = whole or bool(profile.mapped.keys() & {"prompt", "conversation"})
    _refuse_misfits(profile, name, decided=decided)
    if not whole:
        _refuse_prompts(profile, name, decided=decided)
    if not decided:
        _refuse_turns(profile, name)


def _refuse_misfits(profile: ColumnProfile, name: str, *, decided: bool) -> None:
    """A name that is known, over what is not read there."""
    for column in _unused(profile, FITS):
        fitting, expected = FITS[plain_name(column)]
        is_prompt = plain_name(column) != "history" and plain_name(column) not in ALIASES["system"]
        if profile.kind(column) in fitting or (decided and is_prompt):
            continue
        without = _without(profile, name) if is_prompt else ""
        leave = f"{without} to leave it out" if without else "no setting helps: leave the column out"
        raise DataError(
            where="data.column_map",
            found=f"{shown(column)} holds {profile.kind(column)}, and that is not read",
            expected=expected,
            fix=reworded(without, f"{leave}, or write it as {expected}"),
        )


def _refuse_prompts(profile: ColumnProfile, name: str, *, decided: bool) -> None:
    """A prompt beside whole conversations, most of which do not hold it; or what stands apart from a list of turns."""
    listed = profile.kind(profile.taken.get("prompt", "")) == "messages" and not decided
    if not listed and (name not in (*WHOLE, "judged") or profile.taken.keys() & {"prompt", "conversation"}):
        return
    columns = [column for column in _unused(profile, ALIASES["prompt"]) if profile.kind(column) in TEXTS]
    apart = [column for column in columns if plain_name(column) in APART]
    same = [] if listed else [column for column in columns if column not in apart]
    for group in [same, *([column] for column in apart)]:
        held = []
        for row in profile.rows:
            sides = [contents(row.get(profile.column(side))) for side in (*SIDES, *profile.taken.values())]
            asked = [text for column in group if isinstance(text := row.get(column), str) and text.strip()]
            held += [any(_holds(side, text) for text in asked for side in sides)] if asked else []
        if held.count(False) > len(held) / 2:
            free = profile.kind(profile.taken.get("system", "system")) in ("missing", "null")
            before = profile.line(system=group[0]) if free else ""
            left_out = Overrides({"data.format": "implicit"}) if name in WHOLE else "take the column out"
            without = _without(profile, name) if listed else left_out
            leave = f"{without} to leave it out" if without else "take the column out"
            put = f"{before} to put it in front as a system turn, or " if before else ""
            if profile.replies_are_json():
                before = Overrides({"data.format": "explicit"})
                put = f"{before} to read the replies as the texts that they are, or {put}"
            raise DataError(
                where="data.column_map",
                found=f"{shown(*group)}: not in the conversations, in {held.count(False)} of {len(held)} rows",
                expected="conversations that hold their prompt",
                fix=reworded(before or without, put + leave),
            )


def _holds(turns: Sequence[str], prompt: str) -> bool:
    """The prompt is among the turns, or it is all of them before the reply, as somebody's template renders them."""
    words, before = _spaced(prompt), [_spaced(text) for text in turns[:-1]]
    rendered = len(before) > 2 or is_templated(prompt)
    return words in _spaced(" ".join(turns)) or (rendered and one_after_another(before, words))


def _refuse_turns(profile: ColumnProfile, name: str) -> None:
    """A conversation of which turns before the reply are not read: earlier turns, most likely, or a system turn."""
    known = profile.named(*ALIASES["conversation"])
    others = [column for column in profile.columns if column not in known and not ABOUT & set(words(column))]
    for column in _unused(profile, map(plain_name, (*known, *others))):
        if profile.kind(column) not in ("messages", "pairs of texts") or plain_name(column) == "history":
            continue  # the prompt may have history inside
        waits = profile.share(waits_for_reply, column) > 0.5
        stranger = waits and column not in known  # where it shares no turn, it may be about anything
        values = [normal(row.get(column), "history") for row in profile.rows]  # pairs [user, assistant] too
        lost = [_is_lost(profile, i, value, stranger=stranger) for i, value in enumerate(values) if value]
        if lost and sum(lost) >= SOME * len(lost):
            in_line = _in_front(profile, column, waits=waits)
            without = _without(profile, name)
            first = f"{in_line} to put them in front" if in_line else "write them into the prompt"
            second = f"{without} to leave them out" if without else "take the column out"
            fix = reworded(in_line or without, f"{first}, or {second}")
            raise DataError(
                where="data.column_map",
                found=f"{shown(column)} holds turns that are not in what is read",
                expected="all that stands before the reply in what is read",
                fix=fix,
            )


def _is_lost(profile: ColumnProfile, i: int, conversation: Any, *, stranger: bool) -> bool:
    """Its turns before the reply are not among those that are read in row i, nor in a text that has them inside."""
    before = _spoken(up_to_question(conversation))
    read = {column: _spoken(contents(profile.rows[i].get(column))) for column in profile.taken.values()}
    turns = {text for texts in read.values() for text in texts}
    inside = any(
        one_after_another(before, text)
        for column, texts in read.items()
        for text in texts
        if profile.kind(column) == "dialogue" or len(before) > 1
    )
    shared = inside or bool(turns & {*_spoken(contents(conversation))})
    missed = not inside and not turns.issuperset(before)
    return missed and shared if stranger else missed or not shared


def _in_front(profile: ColumnProfile, column: str, *, waits: bool) -> str:
    """The setting by which these turns stand before the reply; "" where none would have each of them once."""
    replies = [profile.column(side) for side in SIDES]
    if (waits or profile.share(ends_with, column, *replies) > 0.5) and "conversation" not in profile.mapped:
        return profile.line(conversation=column)
    prompt = profile.taken.get("prompt")
    asked = prompt is not None and profile.share(_asks_again, column, prompt) > 0
    return "" if asked or "history" in profile.mapped else profile.line(history=column)


def _asks_again(turns: Any, prompt: Any) -> bool:
    return _spaced(" ".join(contents(prompt)[-1:])) in _spoken(contents(turns))


def _without(profile: ColumnProfile, name: str) -> str:
    """The setting by which nothing else stands before the reply than what is read now; "" where there is none."""
    if conversation := profile.taken.get("conversation"):
        return profile.line(conversation=conversation)
    prompts = [profile.taken["prompt"]] if "prompt" in profile.taken else profile.candidates("prompt")
    return profile.lines("prompt", prompts) or (Overrides({"data.format": "implicit"}) if name in WHOLE else "")


def _unused(profile: ColumnProfile, names: Iterable[str]) -> list[str]:
    """Neither read nor named in data.column_map, by which it has been read."""
    others = {*profile.taken.values(), *(set(profile.mapped.values()) - profile.mapped.keys())}
    return [column for column in profile.named(*names) if column not in others]


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _spoken(texts: Iterable[str]) -> list[str]:
    return [spaced for text in texts if (spaced := _spaced(text))]
