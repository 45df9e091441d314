"""Two answers and a verdict: which columns they are, and what each value of the verdict says."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from orpo_lite.data.columns import MANY, NUMBERED, PAIRS, Look, map_line, map_lines, plain_name, shown, words
from orpo_lite.data.guesses import MEASURING
from orpo_lite.data.kinds import USABLE
from orpo_lite.errors import DataError

ANSWER_WORDS = ("response", "answer", "completion", "output", "reply", "generation", "conv", "messages", "human_ref")
SIGNED = ("preference_strength", "overall_preference")  # HelpSteer: -3, the first is much better, to 3, the second is
VERDICTS = ("better", "winner", "better_response_id", "safer_response_id", "labels", *SIGNED)
TIES = ("tie", "tie (bothbad)", "both_bad")


def two_answers(look: Look) -> tuple[str, str] | None:
    if {"response_a", "response_b"} <= look.mapped:
        return "response_a", "response_b"
    stems: dict[str, dict[str, str]] = {}
    for column in look.columns:
        match = NUMBERED.fullmatch(column)
        if match and look.kind(column) in USABLE and any(word in match[1].lower() for word in ANSWER_WORDS):
            stems.setdefault(match[1], {})[match[2].lower()] = column
    pairs = [tuple(ends[end] for end in sorted(ends)) for ends in stems.values() if len(ends) == 2]
    if len(pairs) > 1:
        found = " and ".join(f"{shown(a)} with {shown(b)}" for a, b in pairs) + " could each be the two answers"
        lines = " or ".join(map_line(response_a=a, response_b=b) for a, b in pairs)
        raise DataError("data.column_map", found, "two answers", lines)
    return (pairs[0][0], pairs[0][1]) if pairs else None


def meaning_of(look: Look, column: str, answers: tuple[str, str]) -> Callable[[Any], str | None] | None:
    """What a column's values say of the two answers, where that is documented or they name one of them."""
    ends = [match[2].lower() if (match := NUMBERED.fullmatch(answer)) else answer for answer in answers]
    table: dict[str, str] = {}
    if column in answers or look.kind(column) not in ("text", "number"):
        return None
    if plain_name(column) in SIGNED:
        if ends == ["1", "2"]:
            table = {str(i): "a" if i < 0 else "b" if i > 0 else "tie" for i in range(-3, 4)}
    elif plain_name(column) == "labels":
        if answers == ("human_ref_A", "human_ref_B"):  # SHP: 1, the first is preferred
            table = {"1": "a", "0": "b"}
    else:
        for verdict, end, answer in zip("ab", ends, answers, strict=True):
            table |= dict.fromkeys((end, answer.lower(), f"model_{end}"), verdict)
        table |= dict.fromkeys(TIES, "tie")

    def says(value: Any) -> str | None:
        return table.get(_plain_verdict(value))

    return says if look.share(lambda value: says(value) is not None, column) >= MANY else None


def _plain_verdict(value: Any) -> str:
    return str(value).strip().lower().removesuffix(".0")


def refuse_verdict(look: Look, answers: tuple[str, str], verdicts: Sequence[str]) -> NoReturn:
    two = shown(*answers)
    found = f"{two} are two answers, and no column is known to say which is the better"
    remedy = f"no setting helps: {PAIRS}"
    if [column for column in verdicts if plain_name(column) in VERDICTS]:
        found = f"{shown(*verdicts)} could each say which of {two} is the better"
    elif not verdicts and (measures := _measures(look, answers)):
        found += f"; {' and '.join(shown(*pair) for pair in measures)} measure them"
        remedy += ", by those numbers: only you know whether the higher or the lower is the better"
    raise DataError("data.column_map", found, "one verdict", map_lines("better", verdicts) or remedy)


def refuse_unsigned(look: Look, column: str, answers: tuple[str, str]) -> None:
    """Without a value below 0 it may as well be the number of the better answer, and then 1 says the reverse."""
    signed = plain_name(column) in SIGNED and "preference_strength" not in look.mapped
    if signed and look.share(lambda value: _plain_verdict(value).startswith("-"), column) == 0:
        found = f"{shown(column)} is below 0 in no row: a strength, by which the first is never the better, or the "
        found += f"number of the better one of {shown(*answers)}"
        remedy = f"{map_line(preference_strength=column)} if it is a strength, or {map_line(better=column)} if a number"
        raise DataError("data.column_map", found, "strengths on both sides of 0", remedy)


def _measures(look: Look, answers: tuple[str, str]) -> list[tuple[str, str]]:
    """Columns of numbers that mirror the two answers: score_0 and score_1 beside answer_0 and answer_1."""
    ends = {match[2].lower() for answer in answers if (match := NUMBERED.fullmatch(answer))}
    stems: dict[str, list[str]] = {}
    for column in look.columns:
        if (match := NUMBERED.fullmatch(column)) and match[2].lower() in ends and MEASURING & set(words(match[1])):
            stems.setdefault(match[1], []).append(column)
    return [(pair[0], pair[1]) for pair in stems.values() if len(pair) == 2]
