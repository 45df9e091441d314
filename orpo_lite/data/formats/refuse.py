"""Refusals of a set whose format is not clear, each with the setting that helps."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from orpo_lite.data.formats.columns import (
    ALIASES,
    FITTING,
    KNOWN,
    PAIRS,
    SIDES,
    ColumnProfile,
    holds,
    plain_name,
    shown,
    side_columns,
)
from orpo_lite.data.formats.name_hints import could_ask, hint, prompt_hint, single_reply
from orpo_lite.data.formats.readers import MEASURES, ROLES, SHAREGPT_ROLES, TOOL_ROLES, WITHOUT_TOOLS, Reader
from orpo_lite.data.formats.values import CHAT, LISTS, TEXTS, USABLE, asks, is_message, is_sharegpt
from orpo_lite.data.formats.verdicts import is_answer
from orpo_lite.data.pair import ToolError
from orpo_lite.errors import DataError, Overrides, one_of


def refuse_python(profile: ColumnProfile) -> None:
    columns = [
        column for column, kind in profile.kinds.items() if kind in ("Python text of a list", "Python text of texts")
    ]
    if columns := [column for column in columns if plain_name(column) in KNOWN or is_answer(column)]:
        raise DataError(
            where="data.format",
            found=f"{holds(*columns)} lists as Python prints them, which is not JSON",
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
        found = f"{shown(ranks)} counts from 0: the rank of each of {shown(completions)}, or their order, best first"
        raise DataError(
            where="data.column_map",
            found=found,
            expected="ranks from 1 on",
            fix=f"{profile.line(ranks=ranks)} if they are ranks, the lowest the best; write an order as ranks",
        )


def refuse_ranking(profile: ColumnProfile, completions: str, found: str, lines: Sequence[str] = ()) -> NoReturn:
    numbers = [column for column, kind in profile.kinds.items() if kind in FITTING["scores"] and column != completions]
    if not lines and profile.kind(completions) in LISTS:
        lines = [f"{profile.lines('scores', [column])} if the highest is the best" for column in numbers]
        lines += [f"{profile.lines('ranks', [column])} if the lowest is the best" for column in numbers]
    found = f"{shown(completions)} holds {found}: nothing says which answer is the best"
    raise DataError(
        where="data.column_map",
        found=found,
        expected=f"in each answer one of {', '.join(MEASURES)}; or texts with scores or ranks",
        fix=one_of(lines) or f"no setting helps: {PAIRS}",
    )


def refuse_unknown(profile: ColumnProfile, as_texts: str) -> NoReturn:
    """``as_texts`` are the settings that would read the replies as texts, or ""."""
    kinds = {side: profile.kind(side) for side in ("prompt", *SIDES)}
    found = ", ".join(
        f"{side} {'is' if kind in ('missing', 'null') else 'holds'} {kind}" for side, kind in kinds.items()
    )
    found += f"; the columns are {', '.join(map(repr, profile.columns)) or 'none'}"
    _refuse_nested(profile, found)
    hints = {side: hint(profile, side) for side in ("chosen", "rejected")}
    if not any(hints.values()) and (single := single_reply(profile)):
        expected = "a pair needs two replies to one prompt, a better and a worse one"
        raise DataError(
            where="data.format", found=f"{single}; {found}", expected=expected, fix=f"no setting helps: {PAIRS}"
        )
    _refuse_roles(profile, as_texts)
    if listed := [profile.column(side) for side, kind in kinds.items() if kind in LISTS]:
        fix = "write a single text without the list around it, and turns as messages"
        before = f"{as_texts} if these texts are the replies; else" if as_texts else "no setting helps:"
        expected = "in each of prompt, chosen and rejected a text, or messages {role, content}"
        raise DataError(
            where="data.format",
            found=f"{holds(*listed)} lists of texts; {found}",
            expected=expected,
            fix=f"{before} {fix}",
        )
    hints["prompt"] = prompt_hint(profile, [column for column in hints.values() if column])
    unfit = [side for side, kind in kinds.items() if kind not in (USABLE if side != "prompt" else (*TEXTS, *CHAT))]
    sides = [column for side in ("chosen", "rejected") if (column := hints[side])]
    whole = len(sides) == 2 and all(profile.share(asks, column) == 1 for column in sides)
    if whole or (profile.candidates("conversation") and unfit != ["prompt"]):
        unfit = [side for side in unfit if side != "prompt"]
    expected = "chosen and rejected, both texts or both lists of messages, with or without a prompt"
    fix = "no setting helps: write chosen and rejected alike, as expected"
    if unfit:
        line = profile.line(**{side: hints[side] or "COLUMN" for side in unfit})
        fix = f"name the columns: {line}"
        fix = Overrides(line.values, text=fix) if all(hints[side] for side in unfit) else fix
    if not (hints["chosen"] or hints["rejected"]):
        fix += f"; or, where no column always holds the better reply, {PAIRS}"
    if odd := _odd(profile, [side for side in unfit if not hints[side]]):
        fix = f"no setting helps: write {shown(*odd)} as a text, or as a list of messages {{role, content}}"
    no_names = profile.columns and not any(hints.values()) and all(" " in column.strip() for column in profile.columns)
    if no_names or any(column.rstrip()[-1:] in ".?!" or len(column.split()) > 4 for column in profile.columns):
        fix += "; if the first line of the file is a row, write a line with the columns' names above it"
    if as_texts:
        fix = f"{as_texts} to take chosen and rejected for the texts that they are, though they look like JSON"
    if unfit == ["prompt"] and kinds["chosen"] in TEXTS:
        fix += "; or data.format=implicit if both texts begin with the prompt"
    raise DataError(where="data.format", found=f"no known format: {found}", expected=expected, fix=fix)


def _refuse_nested(profile: ColumnProfile, found: str) -> None:
    """Rows that hold the whole pair within one column, as in {"data": {"prompt": ..., "chosen": ...}}."""
    for column in profile.columns:
        held = [row[column] for row in profile.rows if isinstance(row.get(column), Mapping)]
        if held and all(item.keys() & {*SIDES} for item in held):
            found = f"{shown(column)} holds objects with a pair inside; {found}"
            raise DataError(
                where="data.format",
                found=found,
                expected="prompt, chosen and rejected as columns",
                fix="no setting helps: write what is inside as a row of its own",
            )


def _odd(profile: ColumnProfile, sides: Sequence[str]) -> list[str]:
    """The columns that are what is lacking, for all that one can tell, and that hold what cannot be read there."""
    named = [profile.column(side) for side in sides if profile.kind(side) not in ("missing", "null")]
    ours = (*side_columns(profile), profile.column("prompt"))
    others = [column for column in profile.columns if column not in ours]
    if sides == ["prompt"] and not named:
        others = [column for column in others if profile.kind(column) not in (*TEXTS, *CHAT)]
        return [column for column in others if could_ask(profile, column)]
    spare = any(profile.kind(column) in (*USABLE, *CHAT) for column in others)
    return named if len(named) == len(sides) and not spare else []


def refuse_no_messages(profile: ColumnProfile, read: Reader, as_texts: str) -> None:
    """Texts that are JSON with a role, or a from, and that most rows show to be no messages."""
    faults: list[DataError] = []
    for row in profile.rows:
        try:
            read(row, "")
        except ToolError:
            pass  # a message all the same
        except DataError as error:
            faults.append(error)
    if len(faults) > len(profile.rows) / 2:
        found = f"{shown(*SIDES)} look like messages in JSON, and are none in {len(faults)} of {len(profile.rows)} rows"
        found += f" ({faults[0].where.removeprefix(', ')}: {faults[0].found})"
        raise DataError(
            where="data.format",
            found=found,
            expected="messages that end with a reply, or texts",
            fix=f"{as_texts} if these texts are the replies as they should be; else mend the messages",
        )


def _refuse_roles(profile: ColumnProfile, as_texts: str) -> None:
    """Messages of tools and the like, which are nobody's turn here."""
    for column in profile.named("chosen", "rejected", "prompt", *ALIASES["conversation"]):
        messages = [
            item for (value,) in profile.values(column) for item in (value if isinstance(value, list) else [value])
        ]
        speaker, known = ("from", SHAREGPT_ROLES) if profile.share(is_sharegpt, column) > 0.5 else ("role", ROLES)
        roles = dict.fromkeys(str(item.get(speaker)) for item in messages if is_message(item))
        if strange := [f"{role!r:.24}" for role in roles if role not in known]:
            found = f"the messages of {shown(column)} have roles that are not known: {', '.join(strange[:5])}"
            fix = "leave out the rows that have others, or write their turns in these"
            if tools := [role for role in roles if role in TOOL_ROLES]:
                found, fix = f"{found}; turns of {' and '.join(tools)} are not read", WITHOUT_TOOLS
            fix = f"{as_texts} if these are texts; else {fix}" if as_texts else f"no setting helps: {fix}"
            raise DataError(where="data.format", found=found, expected=f"the roles {', '.join(known)}", fix=fix)
