"""Refusals of a set whose format is not clear, each with the setting that helps."""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from orpo_lite.data.formats.columns import FITTING, MANY, PAIRS, ColumnProfile, holds
from orpo_lite.data.formats.messages import MEASURES
from orpo_lite.data.formats.names import (
    ABOUT,
    ALIASES,
    KNOWN,
    PROMPT,
    SIDES,
    is_answer,
    plain_name,
    shown,
    side_of,
    words,
)
from orpo_lite.data.formats.text import shared_words
from orpo_lite.data.formats.values import LISTS, SCALARS, TEXTS, USABLE, waits_for_reply
from orpo_lite.errors import DataError, Overrides, one_of, reworded


def refuse_python(profile: ColumnProfile) -> None:
    columns = [column for column, kind in profile.kinds.items() if kind == "Python text of a list"]
    if columns := [column for column in columns if plain_name(column) in KNOWN or is_answer(column)]:
        raise DataError(
            where="data.format",
            found=f"{holds(*columns)} lists as NumPy prints them, which cannot be read back",
            expected="texts, or lists as JSON",
            fix="write the column with json.dumps, or save the set as .jsonl or .parquet",
        )


def refuse_mapped(profile: ColumnProfile) -> None:
    """A column that was given a name of ours and holds what cannot be that."""
    for ours, theirs in profile.mapped.items():
        kind, fitting = profile.kind(ours), FITTING.get(ours, ()) if ours != "prompt" else ()
        if fitting and kind not in (*fitting, "missing", "null"):
            others = [
                column for column in profile.columns if column not in profile.mapped and profile.kind(column) in fitting
            ]
            others = [column for column in others if profile.kind(column) != "null" and column not in SIDES]
            lines = profile.lines(ours, others) if ours in ("completions", "scores", "ranks") else ""
            raise DataError(
                where="data.column_map",
                found=f"{shown(theirs)} is to be {ours}, and holds {kind}",
                expected=" or ".join(one for one in fitting if one not in ("null", "dialogue")),
                fix=lines or f"no setting helps: write {shown(theirs)} so, or name another column",
            )


def refuse_order(profile: ColumnProfile, completions: str, ranks: str) -> None:
    """From 0 on they may as well say which answer comes first, which second: 2, 0, 1 is another order then."""
    if profile.share(lambda numbers: sorted(map(str, numbers)) == [str(i) for i in range(len(numbers))], ranks) == 1:
        line = profile.line(ranks=ranks)
        found = f"{shown(ranks)} counts from 0: the rank of each of {shown(completions)}, or their order, best first"
        raise DataError(
            where="data.column_map",
            found=found,
            expected="ranks from 1 on",
            fix=reworded(line, f"{line} if they are ranks, the lowest the best; write an order as ranks"),
        )


def refuse_ranking(profile: ColumnProfile, completions: str, found: str, lines: Sequence[str] = ()) -> NoReturn:
    numbers = [column for column, kind in profile.kinds.items() if kind in FITTING["scores"] and column != completions]
    if not lines and profile.kind(completions) in LISTS:
        settings = [(profile.line(scores=column), "highest") for column in numbers]
        settings += [(profile.line(ranks=column), "lowest") for column in numbers]
        lines = [reworded(line, f"{line} if the {best} is the best") for line, best in settings]
    found = f"{shown(completions)} holds {found}: nothing says which answer is the best"
    raise DataError(
        where="data.column_map",
        found=found,
        expected=f"in each answer one of {', '.join(MEASURES)}; or texts with scores or ranks",
        fix=one_of(lines) or f"no setting helps: {PAIRS}",
    )


def refuse_unknown(profile: ColumnProfile) -> NoReturn:
    """Raise DataError for a set that fits no format, with what its columns hold and what would make a pair of it."""
    kinds = {side: profile.kind(side) for side in ("prompt", *SIDES)}
    found = ", ".join(
        f"{side} {'is' if kind in ('missing', 'null') else 'holds'} {kind}" for side, kind in kinds.items()
    )
    found += f"; the columns are {', '.join(map(repr, profile.columns)) or 'none'}"
    lacking = [side for side in SIDES if kinds[side] not in USABLE]
    odd = [profile.column(side) for side in lacking if kinds[side] not in ("missing", "null")]
    listed = [profile.column(side) for side, kind in kinds.items() if kind in LISTS]
    expected = "chosen and rejected, both texts or both lists of messages, with or without a prompt"
    if len(lacking) == len(SIDES) and not odd and (single := single_reply(profile)):
        found, expected = f"{single}; {found}", "a pair needs two replies to one prompt, a better and a worse one"
        fix = f"no setting helps: {PAIRS}"
    elif listed or odd:
        found = f"{holds(*listed)} lists of texts; {found}" if listed else found
        expected = "in each of prompt, chosen and rejected a text, or messages {role, content}"
        names = shown(*dict.fromkeys([*listed, *odd]))
        fix = f"write {names} as texts{' without a list around them' if listed else ''}, or as messages"
        texts = all(isinstance(row.get(column), str) for row in profile.raw for column in (*listed, *odd))
        fix = Overrides({"data.format": "explicit"}, f" to read them as they are; else {fix}") if texts else fix
    else:
        fix = _name_sides(profile) if lacking else _name_prompt(profile)
    if any(column.rstrip()[-1:] in ".?!" or len(column.split()) > 4 for column in profile.columns):
        fix = f"write a line with the columns' names above the first one, if that is a row; else {fix}"
    raise DataError(where="data.format", found=f"no known format: {found}", expected=expected, fix=fix)


def _name_sides(profile: ColumnProfile) -> str:
    """The lines by which two columns are the replies, where there are just two that could be."""
    sides = {side: [column for column in profile.columns if side_of(column) == side] for side in SIDES}
    known = {side: columns[0] for side, columns in sides.items() if len(columns) == 1}
    apart = (*ALIASES["prompt"], *ALIASES["system"], *ALIASES["conversation"])
    could = [name for name in profile.columns if profile.kinds[name] in USABLE and plain_name(name) not in apart]
    could = [name for name in could if not profile.holds_labels(name) and not PROMPT & set(words(name))]
    known = {side: name for side, name in known.items() if name in could}
    others = [name for name in could if name not in known.values()]
    if len(could) > len(SIDES):
        return f"name the better and the worse reply, as chosen and rejected, in data.column_map: of {shown(*could)}"
    if len(could) < len(SIDES) or not others:
        return f"no setting helps: {PAIRS}"
    one, other = [*known.values(), *others]
    orders = [(one, other)] if "chosen" in known else [(other, one)] if known else [(one, other), (other, one)]
    asking = [] if profile.candidates("prompt") else [name for name in prompt_columns(profile) if name not in orders[0]]
    prompt = {"prompt": asking[0]} if len(asking) == 1 else {}
    lines = [profile.line(**prompt, chosen=better, rejected=worse) for better, worse in orders]
    ifs = (f" if {shown(better)} is always the better reply" for better, _ in orders)
    said = [reworded(line, line + words) for line, words in zip(lines, ifs, strict=True)]
    return said[0] if known else " or ".join(said)  # words alone: nobody but the person knows which


def _name_prompt(profile: ColumnProfile) -> str:
    """The lines by which a column, or the replies themselves, hold the prompt."""
    if profile.candidates("prompt"):
        return "no setting helps: write chosen and rejected alike, as expected"
    lines: list[str] = [profile.line(prompt=column) for column in prompt_columns(profile)[:3]]
    texts = all(profile.kind(side) in TEXTS for side in SIDES)
    if texts and profile.share(lambda *replies: bool(shared_words(*replies)), *SIDES) > 0:
        lines.append(Overrides({"data.format": "implicit"}, " if both texts begin with the prompt"))
    return (
        one_of(lines) or "no setting helps: write what the replies answer into a column prompt, as a text or messages"
    )


def prompt_columns(profile: ColumnProfile) -> list[str]:
    """The columns that could hold the prompt; those alone that are named like one, where there are any."""
    sides = [profile.column(side) for side in SIDES]
    could = [name for name in profile.columns if name not in sides and profile.kinds[name] in (*TEXTS, "messages")]
    could = [name for name in could if not ABOUT & set(words(name)) and not profile.holds_labels(name)]
    could = [name for name in could if profile.kinds[name] in TEXTS or profile.share(waits_for_reply, name) > 0.5]
    chats = [name for name in could if profile.kinds[name] == "messages"]
    by_word = [name for name in could if PROMPT & set(words(name))]
    return chats or by_word or [name for name in could if could_ask(profile, name)]


def could_ask(profile: ColumnProfile, column: str) -> bool:
    """It may hold the prompt, of any kind and under any name: what must not be lost where no prompt was found."""
    kind, named = profile.kind(column), plain_name(column) == "prompt"
    if kind in TEXTS:
        texts = [text for (text,) in profile.values(column)]
        many = sum(len(text.split()) > 1 or text.strip().isalpha() for text in texts) >= MANY * len(texts) > 0
        return named or (many and len(set(texts)) > len(texts) / 2 and not ABOUT & set(words(column)))
    return (named and kind != "null") or (kind not in (*SCALARS, "numbers") and not ABOUT & set(words(column)))


def single_reply(profile: ColumnProfile) -> str:
    """A sentence for the sets that have only one reply to each prompt, and are often taken for pairs."""

    def first(names: Iterable[str], *kinds: str) -> list[str]:
        return [column for column in profile.named(*names) if not kinds or profile.kind(column) in kinds][:1]

    reply = first(("completion", "response", "output", "answer"), *USABLE)
    prompt = [column for column in profile.candidates("prompt") if column not in reply][:1]
    label, chat = first(("label", "labels", "kto_tag")), first(ALIASES["conversation"], "messages")
    if not (reply and prompt):
        reply, prompt = chat, []
    if not reply:
        return ""
    if label:
        return f"{shown(*prompt, *reply, *label)} are unpaired preferences, one reply with a label, as for KTO"
    one = "are one reply to each prompt" if prompt else "holds one conversation a row"
    return f"{shown(*prompt, *reply)} {one}, as for supervised fine-tuning"
