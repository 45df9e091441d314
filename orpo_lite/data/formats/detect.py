"""Detect the format of a dataset by the structure of its first rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from orpo_lite.data.formats.columns import (
    ALLOWED_TYPES,
    NEARLY_ALL,
    NOTABLE_SHARE,
    ColumnProfile,
    refuse_templated,
)
from orpo_lite.data.formats.messages import MEASURES, is_sharegpt, role_of
from orpo_lite.data.formats.names import KNOWN, OPENAI, REPLIES, join_names, plain_name
from orpo_lite.data.formats.readers import (
    READERS,
    Reader,
    has_unread_fields,
    pair_without_reply,
    texts_after_prompt,
    without_repeated_prompt,
)
from orpo_lite.data.formats.refuse import (
    could_be_prompt,
    refuse_mapped,
    refuse_order,
    refuse_python,
    refuse_ranking,
    refuse_unknown,
)
from orpo_lite.data.formats.text import begins_with, common_words, is_whole_dialogue
from orpo_lite.data.formats.unused_columns import refuse_unused
from orpo_lite.data.formats.values import (
    LISTS,
    TEXTS,
    USABLE,
    contains_in_order,
    has_user_turn,
    is_from_start,
    is_templated,
    texts_in,
)
from orpo_lite.data.formats.verdicts import (
    EITHER_VERDICT,
    VERDICTS,
    find_verdict,
    refuse_labels,
    two_answers,
)
from orpo_lite.data.pair import Pair, Row, RowError
from orpo_lite.errors import DataError, Overrides, one_of

TEXT_FORMATS = ("explicit", "orca", "alpaca")  # prompt and replies are texts


@dataclass(frozen=True, slots=True)
class Detected:
    """A format, the reason why it was detected, and its reader.

    The reader takes rows to which data.column_map was applied.
    """

    name: str
    because: str
    read: Reader
    columns: dict[str, str]
    """Standard name -> the column that it is read from, for all columns that the reader uses."""
    is_json: bool = False
    """True if replies are read from JSON texts. data.format=explicit reads them as plain texts."""

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
    """Return the format of the first rows: ``name``, or the detected format if ``name`` is auto.

    This function does not report a row that differs from the other rows. The reader reports it.

    Args:
        rows: the first rows, after data.column_map was applied.
        name: data.format: a key of READERS, or auto. The columns are detected in both cases.
        mapped: data.column_map for these rows: standard name -> the column that is read for it.
        plain: True if data.chat_template is none. Otherwise, texts must not have template markers.
        others: the part of data.column_map for other datasets; errors suggest a map with it.

    Raises DataError if no format fits, if the rows can be read in two ways, or if a chat template
    was already applied to the texts. The error names the setting to use.
    """
    requested = name != "auto"
    profile = ColumnProfile(rows, mapped, plain, others)
    refuse_mapped(profile)
    refuse_python(profile)
    if requested:
        because = "data.format says so"
        _find_columns(profile, name)
    else:
        refuse_labels(profile)
        name, because = _apply_rules(profile)
    if name in TEXT_FORMATS and profile.type_of(profile.assigned.get("prompt", "prompt")) in TEXTS:
        # If data.format names such a format, chosen and rejected are always read as texts.
        profile.texts = REPLIES if requested else ()
    replies = _reply_columns(profile, name)
    for reply in replies:
        profile.find(reply)
    _find_input(profile)
    _find_history(profile)
    system = _find_system(profile)
    templated = profile.templated()
    if templated and not plain:
        refuse_templated(profile, templated)
    is_json = not requested and profile.replies_are_json()
    if is_json:
        because += " (JSON in texts; data.format=explicit would read the texts unchanged)"
    if system and profile.type_of(system) != "null" and name != "orca":
        because += f"; {join_names(system)} is put in front as a system turn "
        because += "if the conversation has none"
    read = _make_reader(profile, name, replies)
    refuse_unused(profile, name, requested=requested)
    prompt_type = profile.type_of(profile.assigned.get("prompt", ""))
    if not requested and _is_doubled(profile, name, read):
        if name in ("explicit", "orca") and prompt_type in TEXTS:
            name = "doubled"
        because += ", and both replies begin with the prompt again, which is removed"

        def read_once(row: Row, where: str) -> Pair:
            return without_repeated_prompt(read(row, where))

        return Detected(name, because, read_once, profile.assigned)
    return Detected(name, because, read, profile.assigned, is_json)


def _apply_rules(profile: ColumnProfile) -> tuple[str, str]:
    """Return the format of the first rule that fits, and why. Raises DataError if none fits."""
    rules = (_judged, *RULES) if _is_judged(profile) else RULES
    for rule in rules:
        if found := rule(profile):
            return found
    return refuse_unknown(profile)


def _make_reader(profile: ColumnProfile, name: str, replies: Sequence[str]) -> Reader:
    """Return the function that reads a row of this dataset in this format."""
    is_whole = name == "sharegpt" and not profile.assigned.keys() & {"prompt", "conversation"}
    reader = READERS["implicit" if is_whole else name]

    def read(row: Row, where: str) -> Pair:
        renamed = profile.renamed(row, where)
        try:
            pair = pair_without_reply(renamed, replies, where) or reader(renamed, where)
        except RowError as error:
            error.where = profile.with_source_column(error.where)
            raise
        return replace(pair, has_unread=True) if has_unread_fields(renamed) else pair

    return read


def _is_doubled(profile: ColumnProfile, name: str, read: Reader) -> bool:
    """Return whether both replies begin with the prompt in nearly all rows.

    Raises DataError if only some rows repeat it, or if often only one reply does.
    """
    rests = [
        texts_after_prompt(pair) for pair in _readable_pairs(profile, read) if pair.drop is None
    ]
    chosen = [one is not None for one, _ in rests]
    rejected = [other is not None for _, other in rests]
    total = max(1, len(rests))
    both = sum(map(all, zip(chosen, rejected, strict=True))) / total
    only_one = sum(one != other for one, other in zip(chosen, rejected, strict=True)) / total
    if NOTABLE_SHARE <= both < NEARLY_ALL or only_one >= 0.5:
        shares = f"{sum(chosen) / total:.0%} of chosen and {sum(rejected) / total:.0%} of rejected "
        fix = Overrides({"data.format": name}, " to leave it in the replies")
        if name in TEXT_FORMATS:
            fix = Overrides({"data.format": "doubled"}, f" to remove the prompt, or {fix}")
        raise DataError(
            where="data.format",
            found=f"{len(rests)} rows checked: {shares}begin with the prompt",
            expected="the prompt at the start of all replies, or of none",
            fix=fix,
        )
    return both >= NEARLY_ALL


def _readable_pairs(profile: ColumnProfile, read: Reader) -> Iterator[Pair]:
    for row in profile.rows:
        with suppress(DataError):  # reported later, by the reader
            yield read(row, "")


def is_known(column: str) -> bool:
    """Return whether a column with this name can change which format is detected."""
    return plain_name(column) in KNOWN or plain_name(column) in VERDICTS


Found = tuple[str, str] | None  # a format and the reason; None if the rule does not fit


def _openai(profile: ColumnProfile) -> Found:
    if {*map(profile.type_of, OPENAI)} == {"messages"}:
        profile.assign(dict(zip(("conversation", *REPLIES), OPENAI, strict=True)))
        return "openai", "input, preferred_output and non_preferred_output are lists of messages"
    return None


def _dialogues(profile: ColumnProfile) -> Found:
    if not all(profile.type_of(reply) == "dialogue" for reply in REPLIES):
        return None
    if not _holds_dialogues(profile) and profile.type_of("prompt") in TEXTS:
        profile.find("prompt")
        return "hh_rlhf", "chosen and rejected are texts with Assistant: turns that reply to prompt"
    return "hh_rlhf", "chosen and rejected are texts with Human: and Assistant: turns"


def _holds_dialogues(profile: ColumnProfile) -> bool:
    """Return whether chosen holds dialogues that include the turns before the reply."""
    return (
        profile.type_of("chosen") == "dialogue" and profile.share(is_whole_dialogue, "chosen") > 0
    )


def _conversations(profile: ColumnProfile) -> Found:
    lists = [reply for reply in REPLIES if profile.type_of(reply) == "messages"]
    if not lists or not all(profile.type_of(reply) in ("text", "messages") for reply in REPLIES):
        return None
    replies = "chosen and rejected are lists of messages"
    if len(lists) == 1:
        other = "rejected" if lists == ["chosen"] else "chosen"
        replies = f"{other} is a text and {lists[0]} a list of messages"
    sharegpt = "sharegpt" if profile.share(is_sharegpt, lists[0]) > 0.5 else ""
    if profile.type_of("prompt") == "messages" and "conversation" not in profile.mapped:
        profile.find("prompt")
        return sharegpt or "explicit", f"prompt is a list of messages and {replies}"
    whole = max(profile.share(is_from_start, reply) for reply in lists)
    if whole < 1 or "conversation" in profile.mapped:
        found = _find_prompt(profile)
        if found is not None and found[0] == "conversation":
            column = join_names(found[1])
            return sharegpt or "conversation", f"{replies} and {column} is a list of messages"
        if found is not None:
            return sharegpt or "messages", f"{replies} and {join_names(found[1])} is a text"
    if whole > 0 and profile.type_of("prompt") in TEXTS:
        return sharegpt or "messages", f"{replies} and prompt is a text"
    # An unknown role is reported later, by the reader.
    for reply in lists:
        if profile.share(_has_unknown_role, reply) > 0 or profile.share(has_user_turn, reply) > 0:
            return sharegpt or "implicit", f"{replies} that contain their prompt"
    return None


def _has_unknown_role(turns: Sequence[Any]) -> bool:
    return any(role_of(turn) is None for turn in turns)


def _texts(profile: ColumnProfile) -> Found:
    if not all(profile.type_of(reply) in TEXTS for reply in REPLIES):
        return None
    found = _find_prompt(profile)
    if found is None:
        reason = "chosen and rejected are texts that begin alike and there is no prompt"
        return ("implicit", reason) if _begin_with_prompt(profile) else None
    canonical, column = found
    name = join_names(column)
    if profile.type_of(column) == "messages":
        reason = f"{name} is a list of messages and chosen and rejected are texts"
        if canonical != "conversation":
            return "explicit", reason
        is_mostly_sharegpt = profile.share(is_sharegpt, column) > 0.5
        return "sharegpt" if is_mostly_sharegpt else "conversation", reason
    if profile.type_of(column) == "dialogue":
        dialogue = f"{name} is a text with Human: and Assistant: turns"
        return "hh_rlhf", f"{dialogue}, and chosen and rejected are texts"
    if profile.is_alpaca() and profile.agree(column, "instruction"):
        present = "input" if profile.type_of("input") != "missing" else "history"
        extra = profile.find("input") or present
        return "alpaca", f"{name}, chosen and rejected are texts and there is a column {extra}"
    reason = f"{name}, chosen and rejected are texts"
    system = _find_system(profile)
    if system and profile.type_of(system) != "null":
        return "orca", f"{join_names(system)}, {reason}"
    return "explicit", reason


def _begin_with_prompt(profile: ColumnProfile) -> bool:
    """Return whether chosen and rejected probably both begin with their prompt.

    Returns False if an unused column could be the prompt, or if the common start may be a phrase.
    """
    replies = [profile.column_named(reply) for reply in REPLIES]
    others = [column for column in profile.columns if column not in replies]
    if any(could_be_prompt(profile, column) for column in others):
        return False
    starts = [common_words(*texts) for texts in profile.values(*REPLIES)]
    if not starts or sum(map(bool, starts)) < NEARLY_ALL * len(starts):
        return False
    # A start that is the same in many rows is a phrase such as "I think", not a prompt.
    most_frequent = max(Counter(starts).values())
    is_phrase = most_frequent > 2 and most_frequent > len(starts) / 2
    return not (is_phrase and any(profile.type_of(column) in TEXTS for column in others))


def _two_outputs(profile: ColumnProfile) -> Found:
    if profile.type_of("chosen") != "missing" or profile.type_of("output") not in LISTS:
        return None
    if not profile.find("prompt") or profile.type_of("instruction") == "missing":
        return None
    if profile.share(lambda output: len(output) == 2, "output") < 1:
        return None
    profile.find("input")
    return "alpaca", "instruction is a text and output holds two texts, first chosen, then rejected"


def _ranked(profile: ColumnProfile, *, requested: bool = False) -> Found:
    if profile.type_of("rejected") in USABLE and not requested:
        return None
    completions = profile.find("completions")
    if completions is None:
        return None
    if profile.type_of(completions) in LISTS:
        others = [held for column, held in profile.types.items() if column != completions]
        if not any(held in ALLOWED_TYPES["scores"] for held in others):
            return None
        measure = _find_scores(profile, completions)
        reason = (
            f"{join_names(completions)} is a list of texts and "
            f"{join_names(measure)} is a list of their scores or ranks"
        )
    else:
        measure = _find_measure(profile, completions)
        reason = f"{join_names(completions)} is a list of answers, each with its {measure}"
    _find_prompt(profile)
    return "ranked", reason


def _find_scores(profile: ColumnProfile, completions: str) -> str:
    """Return the column with the answers' scores or ranks. Raises DataError unless one is clear."""
    wanted = [name for name in ("scores", "ranks") if name in profile.mapped]
    wanted = wanted or ["scores", "ranks"]
    columns = [column for name in wanted if (column := profile.find(name))]
    is_rank = bool(columns) and columns[0] == profile.assigned.get("ranks")
    if is_rank and "ranks" not in profile.mapped:
        refuse_order(profile, completions, columns[0])
    if len(columns) != 1:
        settings = [
            profile.setting(**{name: column}) for name, column in zip(wanted, columns, strict=False)
        ]
        found = f"texts with {join_names(*columns) or 'no known scores'}"
        refuse_ranking(profile, completions, found, settings)
    return columns[0]


def _find_measure(profile: ColumnProfile, completions: str) -> str:
    """Return the key of the score in each answer. Raises DataError if several keys could be it."""
    keys = {
        key for (answers,) in profile.values(completions) for answer in answers for key in answer
    }
    measures = [key for key in MEASURES if key in keys]
    if not measures or (len(measures) > 1 and measures[0] != "overall_score"):
        found = f"answers with {' and '.join(measures) or 'no known score'}"
        refuse_ranking(profile, completions, found)
    return measures[0]


def _is_judged(profile: ColumnProfile) -> bool:
    """Return whether data.column_map names a verdict. If so, chosen and rejected are ignored."""
    return bool(profile.mapped.keys() & {*EITHER_VERDICT})


def _judged(profile: ColumnProfile, *, requested: bool = False) -> Found:
    requested = requested or _is_judged(profile)
    if profile.type_of("rejected") in USABLE and not requested:
        return None
    answers = two_answers(profile)
    if answers is None:
        return None
    verdict, profile.verdict = find_verdict(profile, answers)
    if profile.share(is_from_start, answers[0]) < 1 or "conversation" in profile.mapped:
        _find_prompt(profile)
    profile.assigned |= {"response_a": answers[0], "response_b": answers[1], "better": verdict}
    named = join_names(*answers)
    return "judged", f"{named} are two answers and {join_names(verdict)} says which is better"


RULES = (_openai, _dialogues, _conversations, _texts, _two_outputs, _ranked, _judged)


def _find_columns(profile: ColumnProfile, name: str) -> None:
    """Find the columns of the format in data.format, without a check that the format fits."""
    if name == "ranked":
        _ranked(profile, requested=True)
    elif name == "judged":
        _judged(profile, requested=True)
    elif name in ("conversation", "sharegpt"):
        if profile.share(is_from_start, "chosen") < 1 or "conversation" in profile.mapped:
            _find_prompt(profile)
    elif name == "openai":
        profile.assign(dict(zip(("conversation", *REPLIES), OPENAI, strict=True)))
    elif name != "implicit":
        # Whole conversations and dialogues need no prompt, so several candidates do not matter.
        is_whole = profile.share(is_from_start, "chosen") == 1
        if name == "hh_rlhf":
            is_whole = _holds_dialogues(profile)
        if not is_whole or name in ("explicit", "alpaca"):
            profile.find("prompt")
    if name == "alpaca":
        profile.find("input")


def _reply_columns(profile: ColumnProfile, name: str) -> tuple[str, ...]:
    if name == "alpaca" and profile.type_of("chosen") == "missing":
        return ("output",)
    return () if name in ("ranked", "judged") else REPLIES


def _find_input(profile: ColumnProfile) -> None:
    """Find the column with the text that the instruction refers to."""
    prompt = profile.assigned.get("prompt")
    if not prompt:
        return
    is_alpaca = profile.is_alpaca() and profile.agree(prompt, "instruction")
    if is_alpaca or "input" in profile.mapped:
        profile.find("input")


def _find_history(profile: ColumnProfile) -> None:
    """Find the column of earlier turns. Skip it if they are in the prompt or end with the pair."""
    column, prompt = profile.find("history"), profile.assigned.get("prompt")
    if column is None or prompt is None or "history" in profile.mapped:
        return
    if profile.type_of(prompt) not in TEXTS:
        return

    def is_in_prompt(turns: Any, text: str) -> bool:
        return contains_in_order(texts_in(turns), text)

    def ends_with_pair(turns: Any, *prompt_and_reply: Any) -> bool:
        last = [text for value in prompt_and_reply for text in texts_in(value)[-1:]]
        return texts_in(turns)[-2:] == last

    is_inside = profile.share(is_in_prompt, column, prompt) > 0.5
    if is_inside or profile.share(ends_with_pair, column, prompt, "chosen") > 0.5:
        del profile.assigned["history"]


def _find_system(profile: ColumnProfile) -> str | None:
    """Return the column of the system turn; None if the prompt already contains its text."""
    system, prompt = profile.find("system"), profile.assigned.get("prompt")
    if system and prompt and profile.type_of(prompt) in TEXTS:
        is_inside = profile.share(begins_with, system, prompt) >= NEARLY_ALL
        if is_inside or profile.share(is_templated, prompt) >= NOTABLE_SHARE:
            del profile.assigned["system"]
            return None
    return system


def _find_prompt(profile: ColumnProfile) -> tuple[str, str] | None:
    """Return (prompt or conversation, column) for the column that the replies answer, or None.

    A conversation is preferred. Raises DataError if it lacks the texts of a prompt column.
    """
    conversation = profile.find("conversation")
    if conversation is None or "prompt" in profile.mapped:
        profile.assigned.pop("conversation", None)
        prompt = profile.find("prompt")
        return ("prompt", prompt) if prompt else None
    if "conversation" in profile.mapped:
        return "conversation", conversation
    rivals = [
        column
        for column in profile.candidates("prompt")
        if profile.share(_contains_turn, conversation, column) < 1
    ]
    if rivals:
        columns = join_names(conversation, *rivals)
        setting = profile.setting(conversation=conversation)
        raise DataError(
            where="data.column_map",
            found=f"each of {columns} could hold the prompt, but the columns have different texts",
            expected="one column with the conversation or the prompt",
            fix=one_of([setting, profile.settings("prompt", rivals)]),
        )
    return "conversation", conversation


def _contains_turn(turns: Any, prompt: Any) -> bool:
    if isinstance(prompt, str):
        return prompt.strip() in [text.strip() for text in texts_in(turns)]
    return bool(turns == prompt)
