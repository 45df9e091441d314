"""Which format a set has, found by the structure of its first rows; or the refusal, with the line that helps.

A new format is one ``read_*`` in readers.py and one clause here. The polarity of a pair is never guessed: chosen and
rejected are taken by exactly these names, scores and verdicts only where their meaning is documented.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from orpo_lite.data.columns import (
    ALIASES,
    CHAT,
    KNOWN,
    SOME,
    TEXTS,
    USABLE,
    Look,
    asks,
    contents,
    is_sharegpt,
    map_line,
    map_lines,
    refuse_templated,
)
from orpo_lite.data.readers import (
    COLUMNS,
    MEASURES,
    PROMPTS_DIFFER,
    READERS,
    Message,
    Pair,
    Reader,
    Row,
    shared_start,
    shared_words,
)
from orpo_lite.errors import DataError

__all__ = ["COLUMNS", "PROMPTS_DIFFER", "READERS", "Detected", "Message", "Pair", "Reader", "Row", "detect_format",
           "shared_start"]  # fmt: skip

MANY = 0.9  # of the rows: a habit of the whole set
PAIRS = "write each pair as prompt, chosen and rejected"


@dataclass(frozen=True, slots=True)
class Detected:
    """A format, the structure that gave it away, and its reader, which takes rows as data.column_map left them."""

    name: str
    because: str
    read: Reader

    @property
    def sentence(self) -> str:
        return f"detected {self.name} because {self.because}"


def detect_format(
    rows: Sequence[Row], *, name: str = "auto", mapped: Iterable[str] = (), plain: bool = False
) -> Detected:
    """The format that the first rows share, by what their columns hold; a row that deviates is its reader's to report.

    Args:
        name: a name of READERS when the person has set data.format; its columns are still looked for.
        mapped: the canonical columns that data.column_map has set; nothing else is a candidate for them.
        plain: data.chat_template is none, so already-templated text is what the person wants.

    Raises DataError, with the line to write, when nothing fits, when two readings are possible, and when a template
    is in the text already.
    """
    look = Look(rows, frozenset(mapped), plain)
    _refuse_python(look)
    if name == "auto":
        fitting = (found for clause in CLAUSES if (found := clause(look)))
        name, because = next(fitting, None) or _refuse_unknown(look)
    else:
        because = "data.format says so"
        _find_columns(look, name)
    system = look.find("system")
    templated = look.templated()
    if templated and not plain:
        refuse_templated(look, templated)
    if system and "prompt" in templated:
        del look.taken["system"]  # the templated prompt has it inside
    elif system and name != "orca":
        because += f"; {system} goes in front as a system turn"
    return Detected(name, because, lambda row, where: READERS[name](look.renamed(row, where), where))


# --- the clauses: each says its format's name and the reason, or None; the first that fits is taken

Found = tuple[str, str] | None


def _openai(look: Look) -> Found:
    outputs = (look.kind("preferred_output"), look.kind("non_preferred_output"))
    if look.kind("input") == "request" and all(kind in ("message", "messages") for kind in outputs):
        return "openai", "input holds messages beside preferred_output and non_preferred_output"
    return None


def _dialogues(look: Look) -> Found:
    if look.kind("chosen") == look.kind("rejected") == "dialogue":
        return "hh_rlhf", "chosen and rejected are texts with Human: and Assistant: turns"
    return None


def _conversations(look: Look) -> Found:
    if not all(look.kind(side) in ("message", "messages") for side in ("chosen", "rejected")):
        return None
    sides = f"chosen and rejected are {'lists of' if look.kind('chosen') == 'messages' else 'single'} messages"
    style = "sharegpt" if look.share(is_sharegpt, "chosen") > 0.5 else None
    if style:
        sides += " in from and value"
    if look.kind("prompt") in CHAT:
        look.find("prompt")
        return style or "explicit", f"prompt is a list of messages and {sides}"
    whole = look.share(asks, "chosen")
    if whole < 1 and (before := _find_before(look)):
        canonical, column = before
        if canonical == "conversation":
            return style or "conversation", f"{sides}, and {column} is a list of messages"
        return style or "messages", f"{sides} beside {column}, a text"
    if whole > 0 and look.kind("prompt") in TEXTS:
        return style or "messages", f"{sides} beside prompt, a text"
    return (style or "implicit", f"{sides} and there is no prompt") if whole > 0 else None


def _texts(look: Look) -> Found:
    if not all(look.kind(side) in TEXTS for side in ("chosen", "rejected")):
        return None
    before = _find_before(look)
    if before is None:
        # Two replies can begin alike by chance, and what they reply to may be what was not taken.
        begin_alike = look.share(lambda one, other: bool(shared_words(one, other)), "chosen", "rejected") >= MANY
        unread = look.kind("prompt") not in ("missing", "null")
        unread = unread or any(look.kind(name) in CHAT for name in ALIASES["conversation"])
        reason = "chosen and rejected are texts that begin alike and there is no prompt"
        return ("implicit", reason) if begin_alike and not unread else None
    canonical, column = before
    if look.kind(column) in CHAT:
        style = "sharegpt" if look.share(is_sharegpt, column) > 0.5 else "conversation"
        reason = f"{column} is a list of messages and chosen and rejected are texts"
        return style if canonical == "conversation" else "explicit", reason
    if look.kind(column) == "dialogue":
        return "hh_rlhf", f"{column} is a text with Human: and Assistant: turns, and chosen and rejected are texts"
    if look.is_alpaca() and look.agree(column, "instruction"):
        about = look.find("input") or ("input" if "input" in look.columns else "history")
        return "alpaca", f"{column}, chosen and rejected are texts beside {about}"
    doubled = look.share(lambda p, c, r: c.startswith(p) and r.startswith(p), column, "chosen", "rejected")
    if SOME <= doubled < MANY:
        found = f"chosen and rejected begin with {column} again in {doubled:.0%} of the first {len(look.rows)} rows"
        remedy = "data.format=doubled to take it off where it is, or data.format=explicit to leave it in the replies"
        raise DataError("data.format", found, "the prompt once, and all rows alike", remedy)
    reason = f"{column}, chosen and rejected are texts"
    if doubled >= MANY:
        return "doubled", f"{reason}, and chosen and rejected begin with {column} again"
    if (system := look.find("system")) and "prompt" not in look.templated():
        return "orca", f"{system}, {reason}"
    return "explicit", reason


def _two_outputs(look: Look) -> Found:
    if look.kind("chosen") != "missing" or look.kind("output") != "texts" or not look.find("prompt"):
        return None
    if "instruction" not in look.columns or look.share(lambda output: len(output) == 2, "output") < 1:
        return None
    look.find("input")
    return "alpaca", "instruction is a text and output holds two texts, the chosen one and the rejected"


def _ranked(look: Look) -> Found:
    completions = None if look.kind("rejected") in USABLE else look.find("completions")
    if completions is None:
        return None
    if look.kind(completions) == "texts":
        if "numbers" not in look.kinds.values():
            return None
        wanted = [name for name in ("scores", "ranks") if name in look.mapped] or ["scores", "ranks"]
        measures = [column for name in wanted if (column := look.find(name))]
        if len(measures) != 1:
            lines = [map_line(**{name: column}) for name, column in zip(wanted, measures, strict=False)]
            _refuse_ranking(look, completions, f"texts beside {' and '.join(measures) or 'no known scores'}", lines)
        reason = f"{completions} is a list of texts and {measures[0]} of their numbers"
    else:
        held = {key for (answers,) in look.values(completions) for answer in answers for key in answer}
        measures = [key for key in MEASURES if key in held]
        if not measures or (len(measures) > 1 and measures[0] != "overall_score"):
            _refuse_ranking(look, completions, f"answers with {' and '.join(measures) or 'no known score'}")
        reason = f"{completions} is a list of answers, each with its {measures[0]}"
    _find_before(look)
    return "ranked", reason


def _judged(look: Look) -> Found:
    answers = None if look.kind("rejected") in USABLE else _two_answers(look)
    if answers is None:
        return None
    columns = ["better"] if "better" in look.mapped else look.columns
    meanings = {column: says for column in columns if (says := _meaning(look, column, answers))}
    verdicts = [column for column in meanings if column.lower() in VERDICTS]
    if len(verdicts) != 1:
        _refuse_verdict(answers, verdicts, [*meanings])
    if look.share(asks, answers[0]) < 1:
        _find_before(look)
    look.taken |= {"response_a": answers[0], "response_b": answers[1], "better": verdicts[0]}
    look.verdict = meanings[verdicts[0]]
    return "judged", f"{answers[0]} and {answers[1]} are two answers and {verdicts[0]} says which is the better"


CLAUSES = (_openai, _dialogues, _conversations, _texts, _two_outputs, _ranked, _judged)


# --- the columns of a format


def _find_columns(look: Look, name: str) -> None:
    """Of a format that the person has named, whatever the structure says."""
    if name == "ranked":
        _ranked(look)
    elif name == "judged":
        _judged(look)
    elif name in ("conversation", "sharegpt"):
        if look.share(asks, "chosen") < 1:
            _find_before(look)
    elif name not in ("implicit", "openai"):
        # Conversations and dialogues that are whole need no prompt, so no rival of it matters.
        whole = look.kind("chosen") == "dialogue" if name == "hh_rlhf" else look.share(asks, "chosen") == 1
        if not whole or name in ("explicit", "alpaca"):
            look.find("prompt")
    if name == "alpaca":
        look.find("input")


def _find_before(look: Look) -> tuple[str, str] | None:
    """What stands before the reply, (canonical, column): a conversation that waits for it, else a prompt."""
    conversation = look.find("conversation")
    if conversation is None or "prompt" in look.mapped:
        look.taken.pop("conversation", None)
        prompt = look.find("prompt")
        return ("prompt", prompt) if prompt else None
    strangers = [] if "conversation" in look.mapped else look.candidates("prompt")
    strangers = [column for column in strangers if look.share(_holds_turn, conversation, column) < 1]
    if strangers:
        found = f"{' and '.join([conversation, *strangers])} could each stand before the reply, and they differ"
        remedy = f"{map_lines('conversation', [conversation])} or {map_lines('prompt', strangers)}"
        raise DataError("data.column_map", found, "one conversation, or one prompt", remedy)
    return "conversation", conversation


def _holds_turn(turns: Any, prompt: Any) -> bool:
    return turns == prompt or (isinstance(prompt, str) and prompt.strip() in [text.strip() for text in contents(turns)])


# --- two answers and a verdict

ANSWER_WORDS = ("response", "answer", "completion", "output", "reply", "generation", "conversation", "human_ref")
VERDICTS = ("better", "winner", "better_response_id", "safer_response_id", "labels", "preference_strength",
            "overall_preference")  # fmt: skip
TIES = ("tie", "tie (bothbad)", "both_bad")
_END = re.compile(r"(.*?)[ _-]?([012ab])", re.IGNORECASE)  # response_0, response1, human_ref_A


def _two_answers(look: Look) -> tuple[str, str] | None:
    if {"response_a", "response_b"} <= look.mapped:
        return "response_a", "response_b"
    stems: dict[str, dict[str, str]] = {}
    for column in look.columns:
        match = _END.fullmatch(column)
        if match and look.kind(column) in USABLE and any(word in match[1].lower() for word in ANSWER_WORDS):
            stems.setdefault(match[1], {})[match[2].lower()] = column
    pairs = [tuple(ends[end] for end in sorted(ends)) for ends in stems.values() if len(ends) == 2]
    if len(pairs) > 1:
        found = " and ".join(f"{a} with {b}" for a, b in pairs) + " could each be the two answers"
        lines = " or ".join(map_line(response_a=a, response_b=b) for a, b in pairs)
        raise DataError("data.column_map", found, "two answers", lines)
    return (pairs[0][0], pairs[0][1]) if pairs else None


def _meaning(look: Look, column: str, answers: tuple[str, str]) -> Callable[[Any], str | None] | None:
    """What a column's values say of the two answers, where that is documented or they name one of them."""
    ends = [match[2].lower() if (match := _END.fullmatch(answer)) else answer for answer in answers]
    table: dict[str, str] = {}
    if column in answers or look.kind(column) not in ("text", "number"):
        return None
    if column.lower() in ("preference_strength", "overall_preference"):
        if ends == ["1", "2"]:  # HelpSteer: -3, the first is much better, to 3, the second is
            table = {str(i): "a" if i < 0 else "b" if i > 0 else "tie" for i in range(-3, 4)}
    elif column.lower() == "labels":
        if answers == ("human_ref_A", "human_ref_B"):  # SHP: 1, the first is preferred
            table = {"1": "a", "0": "b"}
    else:
        for verdict, end, answer in zip("ab", ends, answers, strict=True):
            table |= dict.fromkeys((end, answer.lower(), f"model_{end}"), verdict)
        table |= dict.fromkeys(TIES, "tie")

    def says(value: Any) -> str | None:
        return table.get(str(value).strip().lower().removesuffix(".0"))

    return says if look.share(lambda value: says(value) is not None, column) >= MANY else None


# --- what is refused


def _refuse_python(look: Look) -> None:
    columns = [column for column, kind in look.kinds.items() if kind == "Python text of a list" and column in KNOWN]
    if columns:
        found = f"{' and '.join(columns)} hold lists as Python prints them, which is not JSON"
        remedy = "write the column with json.dumps, or save the set as .jsonl or .parquet"
        raise DataError("data.format", found, "texts, or lists as JSON", remedy)


def _refuse_verdict(answers: tuple[str, str], verdicts: Sequence[str], naming: Sequence[str]) -> NoReturn:
    two = " and ".join(answers)
    found = f"{two} are two answers, and no column is known to say which is the better"
    if verdicts:
        found = f"{' and '.join(verdicts)} could each say which of {two} is the better"
    remedy = map_lines("better", verdicts or naming) or f"no setting helps: {PAIRS}"
    raise DataError("data.column_map", found, "one verdict", remedy)


def _refuse_ranking(look: Look, completions: str, found: str, lines: Sequence[str] = ()) -> NoReturn:
    numbers = [column for column, kind in look.kinds.items() if kind == "numbers"]
    if not lines and look.kind(completions) == "texts":
        lines = [f"{map_lines('scores', [column])} if the highest is the best" for column in numbers]
        lines += [f"{map_lines('ranks', [column])} if the lowest is the best" for column in numbers]
    expected = f"in each answer one of {', '.join(MEASURES)}; or texts with scores or ranks"
    found = f"{completions} holds {found}: nothing says which answer is the best"
    raise DataError("data.column_map", found, expected, " or ".join(lines) or f"no setting helps: {PAIRS}")


def _refuse_unknown(look: Look) -> NoReturn:
    kinds = {side: look.kind(side) for side in ("prompt", "chosen", "rejected")}
    found = ", ".join(
        f"{side} {'is' if kind in ('missing', 'null') else 'holds'} {kind}" for side, kind in kinds.items()
    )
    found += f"; the columns are {', '.join(map(repr, look.columns)) or 'none'}"
    guesses: dict[str, str | None] = {side: _guess(look, side) for side in ("chosen", "rejected")}
    if not any(guesses.values()) and (single := _single_reply(look)):
        expected = "a pair needs two replies to one prompt, a better and a worse one"
        raise DataError("data.format", f"{single}; {found}", expected, f"no setting helps: {PAIRS}")
    prompts = [column for column in look.candidates("prompt") if column not in guesses.values()]
    guesses["prompt"] = prompts[0] if prompts else None
    unfit = [side for side, kind in kinds.items() if kind not in (USABLE if side != "prompt" else (*TEXTS, *CHAT))]
    if look.candidates("conversation") and unfit != ["prompt"]:
        unfit = [side for side in unfit if side != "prompt"]
    expected = "chosen and rejected, both texts or both lists of messages, with or without a prompt"
    remedy = "name the columns: " + map_line(**{side: guesses[side] or "COLUMN" for side in unfit or kinds})
    if unfit == ["prompt"] and kinds["chosen"] in TEXTS:
        remedy += " or data.format=implicit if both texts begin with the prompt"
    raise DataError("data.format", f"no known format: {found}", expected, remedy)


# Only ever a suggestion in an error message: by these words alone no column is taken.
POLAR = {
    "chosen": frozenset("chosen accepted accept preferred winner winning win good better best positive w".split()),
    "rejected": frozenset("rejected reject dispreferred loser losing lose bad worse worst negative l".split()),
}
NOT_A_REPLY = frozenset("model id score rating rank reason source name rationale feedback".split())


def _guess(look: Look, side: str) -> str | None:
    for column in sorted(look.columns, key=lambda column: column != side):
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", column)}
        meant = next((name for name, polar in POLAR.items() if words & polar), None)
        if meant == "chosen" and words & {"non", "not"}:
            meant = "rejected"
        if meant == side and look.kind(column) in USABLE and not words & NOT_A_REPLY:
            return column
    return None


def _single_reply(look: Look) -> str:
    """A sentence for the sets that have only one reply to each prompt, and are often taken for pairs."""
    by_name = {column.lower(): column for column in look.columns}

    def first(names: Iterable[str], *kinds: str) -> str | None:
        named = (by_name[name] for name in names if name in by_name)
        return next((column for column in named if not kinds or look.kind(column) in kinds), None)

    reply = first(("completion", "response", "output", "answer"), *USABLE)
    prompt = next((column for column in look.candidates("prompt") if column != reply), None)
    label = first(("label", "labels", "kto_tag"))
    chat = first(ALIASES["conversation"], *CHAT)
    if reply and prompt and label:
        return f"{prompt}, {reply} and {label} are unpaired preferences, one reply with a label, as for KTO"
    if reply and prompt:
        return f"{prompt} and {reply} are one reply to each prompt, as for supervised fine-tuning"
    if chat and label and look.kind("chosen") == "missing":
        return f"{chat} and {label} are unpaired preferences, one conversation with a label, as for KTO"
    if chat and look.kind("chosen") == "missing":
        return f"{chat} holds one conversation a row, as for supervised fine-tuning"
    return ""
