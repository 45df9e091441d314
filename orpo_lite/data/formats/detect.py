"""Which format a set has, found by the structure of its first rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from orpo_lite.data.formats.columns import (
    FITTING,
    MANY,
    SOME,
    ColumnProfile,
    refuse_templated,
    side_columns,
)
from orpo_lite.data.formats.messages import MEASURES, is_sharegpt, role_of
from orpo_lite.data.formats.names import KNOWN, OPENAI, SIDES, plain_name, shown
from orpo_lite.data.formats.readers import READERS, Reader, repeated, says_more, undoubled, without_reply
from orpo_lite.data.formats.refuse import (
    could_ask,
    refuse_mapped,
    refuse_order,
    refuse_python,
    refuse_ranking,
    refuse_unknown,
)
from orpo_lite.data.formats.text import begins_with, is_whole_dialogue, shared_words
from orpo_lite.data.formats.unused_columns import refuse_unused
from orpo_lite.data.formats.values import (
    LISTS,
    TEXTS,
    USABLE,
    asks,
    contents,
    is_templated,
    one_after_another,
    opens,
)
from orpo_lite.data.formats.verdicts import EITHER_VERDICT, VERDICTS, find_verdict, refuse_labels, two_answers
from orpo_lite.data.pair import Pair, Row, RowError
from orpo_lite.errors import DataError, Overrides, one_of

SAID = "data.format says so"
AS_TEXTS = ("explicit", "orca", "alpaca")  # formats of replies that are texts, beside a prompt that is one


@dataclass(frozen=True, slots=True)
class Detected:
    """A format, the structure that gave it away, and its reader, which takes rows as data.column_map left them."""

    name: str
    because: str
    read: Reader
    columns: dict[str, str]
    """Canonical name -> the column it is read from: all that the reader uses, and nothing else."""
    is_json: bool = False
    """The replies are JSON in texts, which ``data.format: explicit`` would read as they are."""

    @property
    def sentence(self) -> str:
        return f"detected {self.name} because {self.because}"


def detect_format(
    rows: Sequence[Row],
    *,
    name: str = "auto",
    mapped: Mapping[str, str] = {},
    plain: bool = False,
    others: Mapping[str, Sequence[str]] = {},
) -> Detected:
    """The format that the first rows share, by what their columns hold; a row that deviates is its reader's to report.

    Args:
        name: a name of READERS when the person has set data.format; its columns are still looked for.
        mapped: data.column_map: our name -> the column that has it in these rows; nothing else is a candidate for it.
        plain: data.chat_template is none, so already-templated text is what the person wants.
        others: what data.column_map says beside that, of other sets: to be kept in a line that is to be written.

    Raises DataError, with the line to write, when nothing fits, when two readings are possible, and when a template
    is in the text already.
    """
    said = name != "auto"
    profile = ColumnProfile(rows, mapped, plain, others)
    refuse_mapped(profile)
    refuse_python(profile)
    if not said:
        refuse_labels(profile)
        clauses = (_judged, *CLAUSES) if _is_judged(profile) else CLAUSES
        fitting = (found for clause in clauses if (found := clause(profile)))
        name, because = next(fitting, None) or refuse_unknown(profile)
    else:
        because = SAID
        _find_columns(profile, name)
    if name in AS_TEXTS and profile.kind(profile.taken.get("prompt", "prompt")) in TEXTS:
        # Once named, these formats take chosen and rejected for the texts that they are, whatever they look like.
        profile.texts = SIDES if said else ()
    for reply in _replies(profile, name):
        profile.find(reply)
    asked = profile.taken.get("prompt")
    if asked and ("input" in profile.mapped or (profile.is_alpaca() and profile.agree(asked, "instruction"))):
        profile.find("input")  # what the instruction is about
    _find_history(profile)
    system = _find_system(profile)
    if (templated := profile.templated()) and not plain:
        refuse_templated(profile, templated)
    is_json = not said and profile.replies_are_json()
    if is_json:
        because += " (JSON in texts, which data.format=explicit would read as they are)"
    if system and profile.kind(system) != "null" and name != "orca":
        because += f"; {shown(system)} goes in front as a system turn where the conversation has none"
    sides = _replies(profile, name)
    whole = name == "sharegpt" and not profile.taken.keys() & {"prompt", "conversation"}
    reader = READERS["implicit" if whole else name]

    def read(row: Row, where: str) -> Pair:
        named = profile.renamed(row, where)
        try:
            pair = without_reply(named, sides, where) or reader(named, where)
        except RowError as error:
            error.where = profile.in_its_words(error.where)
            raise
        return replace(pair, beside=True) if says_more(named) else pair

    refuse_unused(profile, name, said=said)
    if not said and _is_doubled(profile, name, read):
        texts = profile.kind(profile.taken.get("prompt", "")) in TEXTS
        name = "doubled" if texts and name in ("explicit", "orca") else name
        because += ", and both replies begin with the prompt again, which is taken off"
        return Detected(name, because, lambda row, where: undoubled(read(row, where)), profile.taken)
    return Detected(name, because, read, profile.taken, is_json)


def _is_doubled(profile: ColumnProfile, name: str, read: Reader) -> bool:
    """Both replies begin with what they reply to, as a habit of the set; refused where some do and others do not."""
    ends = [repeated(pair) for pair in _pairs(profile, read) if pair.drop is None]
    doubled = [sum(end is not None for end in both) for both in ends]
    both, one = (doubled.count(n) / max(1, len(doubled)) for n in (2, 1))
    if SOME <= both < MANY or one >= 0.5:
        shares = [sum(end is not None for end in side) / len(ends) for side in zip(*ends, strict=True)]
        chosen, rejected = (f"{share:.0%}" for share in shares)
        found = f"{chosen} of chosen and {rejected} of rejected repeat the prompt in the first {len(ends)} rows"
        fix = Overrides({"data.format": name}, " to leave it in the replies")
        if name in AS_TEXTS:
            fix = Overrides({"data.format": "doubled"}, f" to take it off where it is, or {fix}")
        raise DataError(where="data.format", found=found, expected="the prompt once, and all rows alike", fix=fix)
    return both >= MANY


def _pairs(profile: ColumnProfile, read: Reader) -> Iterator[Pair]:
    for row in profile.rows:
        with suppress(DataError):  # its reader will report it
            yield read(row, "")


def is_known(column: str) -> bool:
    """Whether detection goes by a column's name at all; a person may have any number of others."""
    return plain_name(column) in KNOWN or plain_name(column) in VERDICTS


Found = tuple[str, str] | None


def _openai(profile: ColumnProfile) -> Found:
    if {*map(profile.kind, OPENAI)} == {"messages"}:
        profile.take(dict(zip(("conversation", *SIDES), OPENAI, strict=True)))
        return "openai", "input holds messages beside preferred_output and non_preferred_output"
    return None


def _dialogues(profile: ColumnProfile) -> Found:
    if profile.kind("chosen") == profile.kind("rejected") == "dialogue":
        if not _is_whole(profile) and profile.kind("prompt") in TEXTS:
            profile.find("prompt")
            return "hh_rlhf", "chosen and rejected are texts with Assistant: turns, which reply to prompt"
        return "hh_rlhf", "chosen and rejected are texts with Human: and Assistant: turns"
    return None


def _is_whole(profile: ColumnProfile) -> bool:
    """The dialogues hold what they reply to."""
    return profile.kind("chosen") == "dialogue" and profile.share(is_whole_dialogue, "chosen") > 0


def _conversations(profile: ColumnProfile) -> Found:
    lists = [side for side in SIDES if profile.kind(side) == "messages"]
    if not lists or not all(profile.kind(side) in ("text", "messages") for side in SIDES):
        return None
    sides = "chosen and rejected are lists of messages"
    if len(lists) == 1:
        sides = f"{'rejected' if lists == ['chosen'] else 'chosen'} is a text, {lists[0]} a list of messages"
    style = "sharegpt" if profile.share(is_sharegpt, lists[0]) > 0.5 else ""
    if profile.kind("prompt") == "messages" and "conversation" not in profile.mapped:
        profile.find("prompt")
        return style or "explicit", f"prompt is a list of messages and {sides}"
    whole = max(profile.share(opens, side) for side in lists)
    if (whole < 1 or "conversation" in profile.mapped) and (before := _find_before(profile)):
        canonical, column = before
        if canonical == "conversation":
            return style or "conversation", f"{sides}, and {shown(column)} is a list of messages"
        return style or "messages", f"{sides} beside {shown(column)}, a text"
    if whole > 0 and profile.kind("prompt") in TEXTS:
        return style or "messages", f"{sides} beside prompt, a text"
    # A role that nobody has here is its reader's to report.
    strange = any(profile.share(_strange, side) > 0 for side in lists)
    hold = strange or any(profile.share(asks, side) > 0 for side in lists)
    return (style or "implicit", f"{sides} that hold their prompt") if hold else None


def _strange(turns: Sequence[Any]) -> bool:
    return any(role_of(turn) is None for turn in turns)


def _texts(profile: ColumnProfile) -> Found:
    if not all(profile.kind(side) in TEXTS for side in ("chosen", "rejected")):
        return None
    before = _find_before(profile)
    if before is None:
        reason = "chosen and rejected are texts that begin alike and there is no prompt"
        return ("implicit", reason) if _share_prompts(profile) else None
    canonical, column = before
    if profile.kind(column) == "messages":
        reason = f"{shown(column)} is a list of messages and chosen and rejected are texts"
        style = "sharegpt" if profile.share(is_sharegpt, column) > 0.5 else "conversation"
        return style if canonical == "conversation" else "explicit", reason
    if profile.kind(column) == "dialogue":
        reason = f"{shown(column)} is a text with Human: and Assistant: turns, and chosen and rejected are texts"
        return "hh_rlhf", reason
    if profile.is_alpaca() and profile.agree(column, "instruction"):
        about = profile.find("input") or ("input" if profile.kind("input") != "missing" else "history")
        return "alpaca", f"{shown(column)}, chosen and rejected are texts beside {about}"
    reason = f"{shown(column)}, chosen and rejected are texts"
    if (system := _find_system(profile)) and profile.kind(system) != "null":
        return "orca", f"{shown(system)}, {reason}"
    return "explicit", reason


def _share_prompts(profile: ColumnProfile) -> bool:
    """Both texts begin with their prompt, as far as one can tell.

    Two replies can begin alike by chance, and what they reply to may be what was not taken.
    """
    others = [column for column in profile.columns if column not in side_columns(profile)]
    unread = any(could_ask(profile, column) for column in others)
    starts = [shared_words(*texts) for texts in profile.values("chosen", "rejected")]
    usual = max(Counter(starts).values(), default=0)
    texts = any(profile.kind(column) in TEXTS for column in others)
    a_phrase = texts and usual > 2 and usual > len(starts) / 2  # "I think", whatever was asked
    return not unread and not a_phrase and sum(map(bool, starts)) >= MANY * len(starts) > 0


def _two_outputs(profile: ColumnProfile) -> Found:
    if profile.kind("chosen") != "missing" or profile.kind("output") not in LISTS or not profile.find("prompt"):
        return None
    if profile.kind("instruction") == "missing" or profile.share(lambda output: len(output) == 2, "output") < 1:
        return None
    profile.find("input")
    return "alpaca", "instruction is a text and output holds two texts, the chosen one and the rejected"


def _ranked(profile: ColumnProfile, *, said: bool = False) -> Found:
    completions = None if profile.kind("rejected") in USABLE and not said else profile.find("completions")
    if completions is None:
        return None
    if profile.kind(completions) in LISTS:
        if not any(kind in FITTING["scores"] for column, kind in profile.kinds.items() if column != completions):
            return None
        wanted = [name for name in ("scores", "ranks") if name in profile.mapped] or ["scores", "ranks"]
        measures = [column for name in wanted if (column := profile.find(name))]
        if measures and measures[0] == profile.taken.get("ranks") and "ranks" not in profile.mapped:
            refuse_order(profile, completions, measures[0])
        if len(measures) != 1:
            lines = [profile.line(**{name: column}) for name, column in zip(wanted, measures, strict=False)]
            refuse_ranking(profile, completions, f"texts beside {shown(*measures) or 'no known scores'}", lines)
        reason = f"{shown(completions)} is a list of texts and {shown(measures[0])} of their numbers"
    else:
        held = {key for (answers,) in profile.values(completions) for answer in answers for key in answer}
        measures = [key for key in MEASURES if key in held]
        if not measures or (len(measures) > 1 and measures[0] != "overall_score"):
            refuse_ranking(profile, completions, f"answers with {' and '.join(measures) or 'no known score'}")
        reason = f"{shown(completions)} is a list of answers, each with its {measures[0]}"
    _find_before(profile)
    return "ranked", reason


def _is_judged(profile: ColumnProfile) -> bool:
    """The person has said which column is the verdict, whatever chosen and rejected hold."""
    return bool(profile.mapped.keys() & {*EITHER_VERDICT})


def _judged(profile: ColumnProfile, *, said: bool = False) -> Found:
    said = said or _is_judged(profile)
    answers = None if profile.kind("rejected") in USABLE and not said else two_answers(profile)
    if answers is None:
        return None
    verdict, profile.verdict = find_verdict(profile, answers)
    if profile.share(opens, answers[0]) < 1 or "conversation" in profile.mapped:
        _find_before(profile)
    profile.taken |= {"response_a": answers[0], "response_b": answers[1], "better": verdict}
    return "judged", f"{shown(*answers)} are two answers and {shown(verdict)} says which is the better"


CLAUSES = (_openai, _dialogues, _conversations, _texts, _two_outputs, _ranked, _judged)


def _find_columns(profile: ColumnProfile, name: str) -> None:
    """Of a format that the person has named, whatever the structure says."""
    if name == "ranked":
        _ranked(profile, said=True)
    elif name == "judged":
        _judged(profile, said=True)
    elif name in ("conversation", "sharegpt"):
        if profile.share(opens, "chosen") < 1 or "conversation" in profile.mapped:
            _find_before(profile)
    elif name == "openai":
        profile.take(dict(zip(("conversation", *SIDES), OPENAI, strict=True)))
    elif name != "implicit":
        # Conversations and dialogues that are whole need no prompt, so no rival of it matters.
        whole = _is_whole(profile) if name == "hh_rlhf" else profile.share(opens, "chosen") == 1
        if not whole or name in ("explicit", "alpaca"):
            profile.find("prompt")
    if name == "alpaca":
        profile.find("input")


def _replies(profile: ColumnProfile, name: str) -> tuple[str, ...]:
    if name == "alpaca" and profile.kind("chosen") == "missing":
        return ("output",)
    return () if name in ("ranked", "judged") else SIDES


def _find_history(profile: ColumnProfile) -> None:
    """Earlier turns, unless the prompt's text has them inside, or they go on to the prompt and the reply."""
    column, prompt = profile.find("history"), profile.taken.get("prompt")
    if column is None or prompt is None or profile.kind(prompt) not in TEXTS or "history" in profile.mapped:
        return
    inside = profile.share(lambda turns, text: one_after_another(contents(turns), text), column, prompt)
    beyond = profile.share(
        lambda turns, *told: contents(turns)[-2:] == [text for value in told for text in contents(value)[-1:]],
        column,
        prompt,
        "chosen",
    )
    if inside > 0.5 or beyond > 0.5:
        del profile.taken["history"]


def _find_system(profile: ColumnProfile) -> str | None:
    """The column of the system turn; None where the prompt has it inside already."""
    system, prompt = profile.find("system"), profile.taken.get("prompt")
    if system and prompt and profile.kind(prompt) in TEXTS:
        inside = profile.share(begins_with, system, prompt) >= MANY
        if inside or profile.share(is_templated, prompt) >= SOME:
            del profile.taken["system"]
            return None
    return system


def _find_before(profile: ColumnProfile) -> tuple[str, str] | None:
    """What stands before the reply, (canonical, column): a conversation that waits for it, else a prompt."""
    conversation = profile.find("conversation")
    if conversation is None or "prompt" in profile.mapped:
        profile.taken.pop("conversation", None)
        prompt = profile.find("prompt")
        return ("prompt", prompt) if prompt else None
    strangers = [] if "conversation" in profile.mapped else profile.candidates("prompt")
    strangers = [column for column in strangers if profile.share(_holds_turn, conversation, column) < 1]
    if strangers:
        raise DataError(
            where="data.column_map",
            found=f"{shown(conversation, *strangers)} could each stand before the reply, and they differ",
            expected="one conversation, or one prompt",
            fix=one_of([profile.line(conversation=conversation), profile.lines("prompt", strangers)]),
        )
    return "conversation", conversation


def _holds_turn(turns: Any, prompt: Any) -> bool:
    return turns == prompt or (isinstance(prompt, str) and prompt.strip() in [text.strip() for text in contents(turns)])
