"""Find two columns of answers; find and read the column that says which answer is better."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from orpo_lite.data.formats.columns import NEARLY_ALL, WRITE_PAIRS, ColumnProfile
from orpo_lite.data.formats.names import (
    NUMBERED,
    REPLIES,
    is_answer,
    join_names,
    names_better,
    plain_name,
)
from orpo_lite.data.formats.values import USABLE
from orpo_lite.errors import DataError, one_of, reworded

# HelpSteer: -3 means that the first answer is much better, 3 that the second answer is.
SIGNED_VERDICTS = ("preference_strength", "overall_preference")
VERDICTS = (
    "better",
    "winner",
    "better_response_id",
    "safer_response_id",
    "labels",
    *SIGNED_VERDICTS,
)
TIES = ("tie", "tie_(bothbad)", "both_bad", "both", "neither")
VERDICT_TYPES = ("text", "number")
MAX_LABEL = 24  # characters; a longer verdict is a text, whose content is not shown
EITHER_VERDICT = ("better", "preference_strength")

ReadVerdict = Callable[[Any], str | None]
"""Converts the value of a verdict to a, b or tie; to None if its meaning is unknown."""


def two_answers(profile: ColumnProfile) -> tuple[str, str] | None:
    """Return the two columns with answers, such as response_1 and response_2; else None.

    Raises DataError if several pairs of columns could be the answers.
    """
    if {"response_a", "response_b"} <= profile.mapped.keys():
        return "response_a", "response_b"
    by_stem: dict[str, dict[str, str]] = {}
    for column in profile.columns:
        match = NUMBERED.fullmatch(column)
        if match and profile.type_of(column) in USABLE and is_answer(column):
            by_stem.setdefault(match[1], {})[match[2].lower()] = column
    pairs = []
    for by_number in by_stem.values():
        if len(by_number) == 2:
            first, second = sorted(by_number)
            pairs.append((by_number[first], by_number[second]))
    if len(pairs) > 1:
        named = ", ".join(f"{join_names(a)} with {join_names(b)}" for a, b in pairs)
        raise DataError(
            where="data.column_map",
            found=f"several pairs of columns could be the two answers: {named}",
            expected="one pair of columns with answers",
            fix=one_of(profile.setting(response_a=a, response_b=b) for a, b in pairs),
        )
    return pairs[0] if pairs else None


def refuse_labels(profile: ColumnProfile) -> None:
    """Raise DataError if chosen and rejected hold names of two answer columns, not replies."""
    if profile.mapped.keys() & {*EITHER_VERDICT}:
        return
    labels = [
        (normalize_verdict(chosen), normalize_verdict(rejected))
        for chosen, rejected in profile.values(*REPLIES)
    ]
    if not labels or any(not label or len(label) > MAX_LABEL for row in labels for label in row):
        return
    named = [
        column
        for column in profile.columns
        if column not in REPLIES
        and profile.type_of(column) in USABLE
        and any(plain_name(column) in row for row in labels)
    ]
    answers = (named[0], named[1]) if len(named) == 2 else two_answers(profile)
    if answers is None:
        return
    columns = [profile.column_named(reply) for reply in REPLIES]
    if not all(_verdict_reader(profile, column, answers) for column in columns):
        return
    named_answers = {"response_a": answers[0], "response_b": answers[1]}
    raise DataError(
        where="data.column_map",
        found=f"{join_names(*columns)} hold labels; the replies are in {join_names(*answers)}",
        expected="the better reply in chosen, and the worse reply in rejected",
        fix=profile.setting(**{} if is_answer(answers[0]) else named_answers, better=columns[0]),
    )


def find_verdict(profile: ColumnProfile, answers: tuple[str, str]) -> tuple[str, ReadVerdict]:
    """Return the column that says which answer is better, and the function that reads its values.

    Raises DataError if the column or the meaning of its values is not clear.
    """
    columns = [name for name in EITHER_VERDICT if name in profile.mapped] or profile.columns
    readers: dict[str, ReadVerdict] = {}
    for column in columns:
        if read := _verdict_reader(profile, column, answers):
            readers[column] = read
    verdicts = [column for column in readers if plain_name(column) in VERDICTS]
    if len(verdicts) != 1:
        named = verdicts or [column for column in readers if names_better(column)]
        unclear = [
            column
            for column in columns
            if plain_name(column) in VERDICTS
            and (column in profile.mapped or profile.type_of(column) in VERDICT_TYPES)
        ]
        if unclear and not named:
            _refuse_values(profile, unclear[0], answers)
        _refuse_verdict(profile, answers, named)
    _refuse_unsigned(profile, verdicts[0], answers)
    return verdicts[0], readers[verdicts[0]]


def _verdict_reader(
    profile: ColumnProfile, column: str, answers: tuple[str, str]
) -> ReadVerdict | None:
    """Return the function that reads a column's values as verdicts on the two answers.

    Returns None if the meaning of the values is unknown: they are not the names of the answers, and
    the column is not from a known dataset.
    """
    if column in answers or profile.type_of(column) not in VERDICT_TYPES:
        return None
    name = plain_name(column)
    if name in SIGNED_VERDICTS:
        table = _signed_verdicts(profile, answers)
    elif name == "labels":
        # SHP: 1 means that the first answer is preferred.
        table = {"1": "a", "0": "b"} if answers == ("human_ref_A", "human_ref_B") else {}
    else:
        table = _named_verdicts(profile, column, answers)

    def read(value: Any) -> str | None:
        return table.get(normalize_verdict(value)) or None

    share = profile.share(lambda value: read(value) is not None, column)
    if name in VERDICTS:
        return read if share > 0.5 else None
    return read if share >= NEARLY_ALL else None


def _signed_verdicts(profile: ColumnProfile, answers: tuple[str, str]) -> dict[str, str]:
    """Return strength (-3 to 3) -> a, b or tie; {} if the order of the two answers is unclear."""
    if _ends(answers) != ["1", "2"] and not set(answers) <= profile.mapped.keys():
        return {}
    first = dict.fromkeys(("-3", "-2", "-1"), "a")
    return first | {"0": "tie"} | dict.fromkeys(("1", "2", "3"), "b")


def _ends(answers: Sequence[str]) -> list[str]:
    """Return the number or letter at the end of each name; the name itself if it has none."""
    matches = [NUMBERED.fullmatch(answer) for answer in answers]
    return [
        match[2].lower() if match else answer
        for match, answer in zip(matches, answers, strict=True)
    ]


def _named_verdicts(
    profile: ColumnProfile, column: str, answers: tuple[str, str]
) -> dict[str, str]:
    """Return value -> a, b or tie, for values that name an answer; {} if they are ambiguous."""
    ends = _ends(answers)
    names = [profile.mapped.get(answer, answer).lower() for answer in answers]
    matches = [match for name in names if (match := NUMBERED.fullmatch(name))]
    share_stem = len({match[1] for match in matches}) == len(matches) - 1
    named = [match[2] for match in matches] if share_stem else names
    values = {normalize_verdict(value) for (value,) in profile.values(column)}
    # The values may count from 0 and the names from 1, or the reverse: then 1 may be either answer.
    other_count = {("1", "2"): ("0", "2"), ("0", "1"): ("2", "0")}.get((named[0], named[1]))
    if other_count and other_count[0] in values and other_count[1] not in values:
        return {}
    count_from_one = "2" in values and "0" not in values and not set("012") & set(named)
    numbers = ("1", "2") if count_from_one else ("", "")
    table: dict[str, str] = {}
    for i, verdict in enumerate("ab"):
        words = {verdict, ends[i], answers[i], names[i], named[i], numbers[i], f"model_{ends[i]}"}
        for word in words:
            is_ambiguous = table.get(word, verdict) != verdict
            table[word] = "" if is_ambiguous else verdict
    return table | dict.fromkeys(TIES, "tie")


def normalize_verdict(value: Any) -> str:
    """Return a verdict in one form: ``A.`` -> ``a``, ``Response A`` -> ``response_a``, 1.0 -> 1."""
    return "_".join(str(value).lower().removesuffix(".0").rstrip(".").split())


def _refuse_values(profile: ColumnProfile, column: str, answers: tuple[str, str]) -> NoReturn:
    values = dict.fromkeys(normalize_verdict(value) for (value,) in profile.values(column))
    theirs = join_names(profile.mapped.get(column, column))
    names = [profile.mapped.get(answer, answer) for answer in answers]
    held = ", ".join(repr(value) for value in list(values)[:5])
    if profile.type_of(column) not in VERDICT_TYPES or any(len(v) > MAX_LABEL for v in values):
        held = profile.type_of(column)
    raise DataError(
        where="data.column_map",
        found=f"{theirs} should say which of {join_names(*names)} is better, but holds {held}",
        expected=f"a or {names[0]} if {names[0]} is better; b or {names[1]} if {names[1]} is "
        "better; or tie",
        fix=f"no setting helps: write the expected values into {theirs}, or {WRITE_PAIRS}",
    )


def _refuse_verdict(
    profile: ColumnProfile, answers: tuple[str, str], verdicts: Sequence[str]
) -> NoReturn:
    two = join_names(*answers)
    found = f"{two} are two answers, and no known column says which is better"
    if any(plain_name(column) in VERDICTS for column in verdicts):
        found = f"{join_names(*verdicts)} could each say which of {two} is better"
    raise DataError(
        where="data.column_map",
        found=found,
        expected="one column that says which answer is better",
        fix=profile.settings("better", verdicts) or f"no setting helps: {WRITE_PAIRS}",
    )


def _refuse_unsigned(profile: ColumnProfile, column: str, answers: tuple[str, str]) -> None:
    """Raise DataError if a strength is never below 0.

    Such a column may hold the number of the better answer instead. Then 1 would mean that the first
    answer is better. As a strength, 1 means that the second one is.
    """
    if plain_name(column) not in SIGNED_VERDICTS or "preference_strength" in profile.mapped:
        return
    if profile.share(lambda value: normalize_verdict(value).startswith("-"), column) > 0:
        return
    strength, number = profile.setting(preference_strength=column), profile.setting(better=column)
    raise DataError(
        where="data.column_map",
        found=f"{join_names(column)} is never below 0: it may say how strongly an answer is "
        f"preferred, or which of {join_names(*answers)} is better",
        expected="some strengths below 0, and some above 0",
        fix=reworded(
            strength,
            f"{strength} if the column holds strengths, or {number} if the column holds the number "
            "of the better answer",
        ),
    )
