"""Two answers and a verdict: which columns they are, and what each value of the verdict says."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from orpo_lite.data.formats.columns import MANY, PAIRS, ColumnProfile
from orpo_lite.data.formats.names import NUMBERED, SIDES, is_answer, names_better, plain_name, shown
from orpo_lite.data.formats.values import USABLE
from orpo_lite.errors import DataError, one_of, reworded

SIGNED = ("preference_strength", "overall_preference")  # HelpSteer: -3, the first is much better, to 3, the second is
VERDICTS = ("better", "winner", "better_response_id", "safer_response_id", "labels", *SIGNED)
TIES = ("tie", "tie_(bothbad)", "both_bad", "both", "neither")
JUDGING = ("text", "number")
LABEL = 24  # characters; a longer verdict is a text that nobody may want on the screen
EITHER_VERDICT = ("better", "preference_strength")


def two_answers(profile: ColumnProfile) -> tuple[str, str] | None:
    if {"response_a", "response_b"} <= profile.mapped.keys():
        return "response_a", "response_b"
    stems: dict[str, dict[str, str]] = {}
    for column in profile.columns:
        match = NUMBERED.fullmatch(column)
        if match and profile.kind(column) in USABLE and is_answer(column):
            stems.setdefault(match[1], {})[match[2].lower()] = column
    pairs = [tuple(ends[end] for end in sorted(ends)) for ends in stems.values() if len(ends) == 2]
    if len(pairs) > 1:
        raise DataError(
            where="data.column_map",
            found=" and ".join(f"{shown(a)} with {shown(b)}" for a, b in pairs) + " could each be the two answers",
            expected="two answers",
            fix=one_of(profile.line(response_a=a, response_b=b) for a, b in pairs),
        )
    return (pairs[0][0], pairs[0][1]) if pairs else None


def refuse_labels(profile: ColumnProfile) -> None:
    """Raise DataError where chosen and rejected only name two other columns, which are the answers."""
    labels = [(plain_verdict(one), plain_verdict(other)) for one, other in profile.values(*SIDES)]
    if (
        not labels
        or profile.mapped.keys() & {*EITHER_VERDICT}
        or any(not label or len(label) > LABEL for both in labels for label in both)
    ):
        return
    texts = [column for column in profile.columns if column not in SIDES and profile.kind(column) in USABLE]
    named = [column for column in texts if any(plain_name(column) in both for both in labels)]
    answers = (named[0], named[1]) if len(named) == 2 else two_answers(profile)
    both = [_meaning(profile, profile.column(side), answers) for side in SIDES] if answers else []
    if answers is None or not all(both):
        return
    columns = {} if is_answer(answers[0]) else {"response_a": answers[0], "response_b": answers[1]}
    raise DataError(
        where="data.column_map",
        found=f"{shown(*map(profile.column, SIDES))} name {shown(*answers)}, and hold no replies themselves",
        expected="the better reply in chosen, and the worse in rejected",
        fix=profile.line(**columns, better=profile.column("chosen")),
    )


Says = Callable[[Any], str | None]  # a verdict's value -> a, b, tie; None where it says none of these


def find_verdict(profile: ColumnProfile, answers: tuple[str, str]) -> tuple[str, Says]:
    """The column that says which answer is the better, and what its values say; refused where that is not clear."""
    columns = [name for name in EITHER_VERDICT if name in profile.mapped] or profile.columns
    meanings = {column: says for column in columns if (says := _meaning(profile, column, answers))}
    verdicts = [column for column in meanings if plain_name(column) in VERDICTS]
    if len(verdicts) != 1:
        named = verdicts or [column for column in meanings if names_better(column)]
        unclear = [column for column in columns if plain_name(column) in VERDICTS]
        unclear = [column for column in unclear if column in profile.mapped or profile.kind(column) in JUDGING]
        if unclear and not named:
            _refuse_values(profile, unclear[0], answers)
        _refuse_verdict(profile, answers, named)
    _refuse_unsigned(profile, verdicts[0], answers)
    return verdicts[0], meanings[verdicts[0]]


def _meaning(profile: ColumnProfile, column: str, answers: tuple[str, str]) -> Says | None:
    """What a column's values say of the two answers, where that is documented or they name one of them."""
    ends = [match[2].lower() if (match := NUMBERED.fullmatch(answer)) else answer for answer in answers]
    names = [profile.mapped.get(answer, answer).lower() for answer in answers]
    matches = [match for name in names if (match := NUMBERED.fullmatch(name))]
    named = [match[2] for match in matches] if len({match[1] for match in matches}) == len(matches) - 1 else names
    values = {plain_verdict(value) for (value,) in profile.values(column)}
    table: dict[str, str] = {}
    if column in answers or profile.kind(column) not in JUDGING:
        return None
    if plain_name(column) in SIGNED:
        if ends == ["1", "2"] or set(answers) <= profile.mapped.keys():
            table = {str(i): "a" if i < 0 else "b" if i > 0 else "tie" for i in range(-3, 4)}
    elif plain_name(column) == "labels":
        if answers == ("human_ref_A", "human_ref_B"):  # SHP: 1, the first is preferred
            table = {"1": "a", "0": "b"}
    else:
        other = {("1", "2"): ("0", "2"), ("0", "1"): ("2", "0")}.get((named[0], named[1]))
        if other and other[0] in values and other[1] not in values:
            return None  # it counts from 0 where the names count from 1, or the other way round: 1 is either
        numbers = ("1", "2") if "2" in values and "0" not in values and not set("012") & set(named) else ("", "")
        for verdict, *words_for in zip("ab", ends, answers, names, named, numbers, strict=True):
            for word in {verdict, *words_for, f"model_{words_for[0]}"}:
                table[word] = verdict if table.get(word, verdict) == verdict else ""  # the one and the other: neither
        table |= dict.fromkeys(TIES, "tie")
    known = plain_name(column) in VERDICTS

    def says(value: Any) -> str | None:
        return table.get(plain_verdict(value)) or None

    share = profile.share(lambda value: says(value) is not None, column)
    return says if share > 0.5 and (known or share >= MANY) else None


def plain_verdict(value: Any) -> str:
    """a, of A; response_a, of Response A; 1, of 1.0."""
    return "_".join(str(value).lower().removesuffix(".0").rstrip(".").split())


def _refuse_values(profile: ColumnProfile, column: str, answers: tuple[str, str]) -> NoReturn:
    values = dict.fromkeys(plain_verdict(value) for (value,) in profile.values(column))
    theirs, names = profile.mapped.get(column, column), [profile.mapped.get(answer, answer) for answer in answers]
    held = ", ".join(repr(value) for value in list(values)[:5])
    if profile.kind(column) not in JUDGING or any(len(value) > LABEL for value in values):
        held = profile.kind(column)
    raise DataError(
        where="data.column_map",
        found=f"{shown(theirs)} is to say which of {shown(*names)} is the better, and holds {held}",
        expected=f"a or {names[0]} for the first, b or {names[1]} for the second, or tie",
        fix=f"no setting helps: write {shown(theirs)} so, or {PAIRS}",
    )


def _refuse_verdict(profile: ColumnProfile, answers: tuple[str, str], verdicts: Sequence[str]) -> NoReturn:
    two = shown(*answers)
    found = f"{two} are two answers, and no column is known to say which is the better"
    fix = f"no setting helps: {PAIRS}"
    if [column for column in verdicts if plain_name(column) in VERDICTS]:
        found = f"{shown(*verdicts)} could each say which of {two} is the better"
    raise DataError(
        where="data.column_map", found=found, expected="one verdict", fix=profile.lines("better", verdicts) or fix
    )


def _refuse_unsigned(profile: ColumnProfile, column: str, answers: tuple[str, str]) -> None:
    """Without a value below 0 it may as well be the number of the better answer, and then 1 says the reverse."""
    signed = plain_name(column) in SIGNED and "preference_strength" not in profile.mapped
    if signed and profile.share(lambda value: plain_verdict(value).startswith("-"), column) == 0:
        found = f"{shown(column)} is below 0 in no row: a strength, by which the first is never the better, or the "
        found += f"number of the better one of {shown(*answers)}"
        strength, number = profile.line(preference_strength=column), profile.line(better=column)
        raise DataError(
            where="data.column_map",
            found=found,
            expected="strengths on both sides of 0",
            fix=reworded(strength, f"{strength} if it is a strength, or {number} if a number"),
        )
