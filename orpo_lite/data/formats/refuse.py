"""Raise errors for datasets whose format is not clear.

If a setting of the recipe can make the format clear, the fix in the error names the setting.
"""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from orpo_lite.data.formats.columns import (
    ALLOWED_TYPES,
    NEARLY_ALL,
    WRITE_PAIRS,
    ColumnProfile,
    columns_hold,
)
from orpo_lite.data.formats.messages import MEASURES
from orpo_lite.data.formats.names import (
    ALIASES,
    KNOWN,
    NOT_PROMPT_WORDS,
    PROMPT_WORDS,
    REPLIES,
    is_answer,
    join_names,
    plain_name,
    reply_named_by,
    words,
)
from orpo_lite.data.formats.text import common_words
from orpo_lite.data.formats.values import LISTS, SCALARS, TEXTS, USABLE, waits_for_reply
from orpo_lite.errors import DataError, Overrides, one_of, reworded


def refuse_python(profile: ColumnProfile) -> None:
    """Raise DataError if a needed column holds lists in NumPy's notation: ['a' 'b']."""
    columns = [
        column
        for column, held in profile.types.items()
        if held == "Python text of a list" and (plain_name(column) in KNOWN or is_answer(column))
    ]
    if columns:
        raise DataError(
            where="data.format",
            found=f"{columns_hold(*columns)} lists as NumPy prints them, which cannot be read back",
            expected="texts, or lists as JSON",
            fix="write the column with json.dumps, or save the dataset as .jsonl or .parquet",
        )


def refuse_mapped(profile: ColumnProfile) -> None:
    """Raise DataError if data.column_map names a column with values of the wrong type."""
    for ours, theirs in profile.mapped.items():
        held, allowed = profile.type_of(ours), ALLOWED_TYPES.get(ours, ())
        if ours == "prompt" or not allowed or held in (*allowed, "missing", "null"):
            continue
        fix = ""
        if ours in ("completions", "scores", "ranks"):
            others = [
                column
                for column in profile.columns
                if column not in (*profile.mapped, *REPLIES)
                and profile.type_of(column) in allowed
                and profile.type_of(column) != "null"
            ]
            fix = profile.settings(ours, others)
        name = join_names(theirs)
        expected = [one for one in allowed if one not in ("null", "dialogue")]
        raise DataError(
            where="data.column_map",
            found=f"{name} is mapped to {ours}, but holds {held}",
            expected=" or ".join(expected),
            fix=fix or f"no setting helps: change the values in {name}, or name another column",
        )


def refuse_order(profile: ColumnProfile, completions: str, ranks: str) -> None:
    """Raise DataError if the ranks in all rows count from 0, because their meaning is not clear.

    The list 2, 0, 1 may hold the rank of each answer. It may also hold answer indices, best first.
    The two meanings give different rankings.
    """

    def counts_from_zero(numbers: Sequence[object]) -> bool:
        return sorted(map(str, numbers)) == [str(i) for i in range(len(numbers))]

    if profile.share(counts_from_zero, ranks) == 1:
        setting = profile.setting(ranks=ranks)
        raise DataError(
            where="data.column_map",
            found=f"the numbers in {join_names(ranks)} count from 0: they may be the ranks of the "
            f"answers in {join_names(completions)}, or the indices of these answers, best first",
            expected="ranks that count from 1",
            fix=reworded(
                setting,
                f"{setting} if the numbers are ranks and the lowest rank is the best; if the "
                "numbers are indices, convert the indices to ranks",
            ),
        )


def refuse_ranking(
    profile: ColumnProfile, completions: str, found: str, settings: Sequence[str] = ()
) -> NoReturn:
    """Raise DataError because no score or rank clearly says which answer is the best."""
    if not settings and profile.type_of(completions) in LISTS:
        numbers = [
            column
            for column, held in profile.types.items()
            if held in ALLOWED_TYPES["scores"] and column != completions
        ]
        scores = [profile.setting(scores=column) for column in numbers]
        ranks = [profile.setting(ranks=column) for column in numbers]
        settings = [
            *(reworded(score, f"{score} if the highest is the best") for score in scores),
            *(reworded(rank, f"{rank} if the lowest is the best") for rank in ranks),
        ]
    raise DataError(
        where="data.column_map",
        found=f"{join_names(completions)} holds {found}: it is not clear which answer is the best",
        expected=f"answers with one of the keys {', '.join(MEASURES)}; or answers that are texts, "
        "and one other column with the scores or ranks of the answers",
        fix=one_of(settings) or f"no setting helps: {WRITE_PAIRS}",
    )


def refuse_unknown(profile: ColumnProfile) -> NoReturn:
    """Raise DataError because no format fits. The error lists the columns and their types."""
    types = {name: profile.type_of(name) for name in ("prompt", *REPLIES)}
    empty = ("missing", "null")
    found = ", ".join(
        f"{name} {'is' if held in empty else 'holds'} {held}" for name, held in types.items()
    )
    found += f"; the columns are {', '.join(map(repr, profile.columns)) or 'none'}"
    lacking = [reply for reply in REPLIES if types[reply] not in USABLE]
    odd = [profile.column_named(reply) for reply in lacking if types[reply] not in empty]
    listed = [profile.column_named(name) for name, held in types.items() if held in LISTS]
    expected = "chosen and rejected, both texts or both lists of messages, with or without a prompt"
    is_without_replies = len(lacking) == len(REPLIES) and not odd
    if is_without_replies and (single := single_reply(profile)):
        found = f"{single}; {found}"
        expected = "two replies to one prompt, a better and a worse one"
        fix = f"no setting helps: {WRITE_PAIRS}"
    elif listed or odd:
        if listed:
            found = f"{columns_hold(*listed)} lists of texts; {found}"
        expected = "a text, or messages {role, content}, in each of prompt, chosen and rejected"
        fix = _write_texts(profile, listed, odd)
    else:
        fix = _name_replies(profile) if lacking else _name_prompt(profile)
    if any(column.rstrip()[-1:] in ".?!" or len(column.split()) > 4 for column in profile.columns):
        fix = f"if the first line is a row, write a line with column names above it; else {fix}"
    raise DataError(
        where="data.format", found=f"no known format: {found}", expected=expected, fix=fix
    )


def _write_texts(profile: ColumnProfile, listed: Sequence[str], odd: Sequence[str]) -> str:
    """Return the fix for columns that hold neither texts nor messages."""
    columns = list(dict.fromkeys([*listed, *odd]))
    without_list = " without a list around them" if listed else ""
    fix = f"write {join_names(*columns)} as texts{without_list}, or as messages"
    if all(isinstance(row.get(column), str) for row in profile.raw for column in columns):
        return Overrides({"data.format": "explicit"}, f" to read them as they are; else {fix}")
    return fix


def _name_replies(profile: ColumnProfile) -> str:
    """Return the settings that name the two replies, if exactly two columns could be them."""
    not_replies = (*ALIASES["prompt"], *ALIASES["system"], *ALIASES["conversation"])
    possible = [
        name
        for name in profile.columns
        if profile.types[name] in USABLE
        and plain_name(name) not in not_replies
        and not profile.holds_labels(name)
        and not PROMPT_WORDS & set(words(name))
    ]
    known = {}
    for reply in REPLIES:
        named = [column for column in profile.columns if reply_named_by(column) == reply]
        if len(named) == 1 and named[0] in possible:
            known[reply] = named[0]
    others = [name for name in possible if name not in known.values()]
    if len(possible) > len(REPLIES):
        return (
            "set chosen and rejected in data.column_map to the columns of the better and the worse "
            f"reply: two of {join_names(*possible)}"
        )
    if len(possible) < len(REPLIES) or not others:
        return f"no setting helps: {WRITE_PAIRS}"
    one, other = [*known.values(), *others]
    if "chosen" in known:
        orders = [(one, other)]
    elif known:
        orders = [(other, one)]
    else:
        orders = [(one, other), (other, one)]
    prompt: dict[str, str] = {}
    if not profile.candidates("prompt"):
        columns = [name for name in prompt_columns(profile) if name not in orders[0]]
        if len(columns) == 1:
            prompt = {"prompt": columns[0]}
    options = []
    for better, worse in orders:
        setting = profile.setting(**prompt, chosen=better, rejected=worse)
        condition = f" if {join_names(better)} is always the better reply"
        options.append(reworded(setting, setting + condition))
    # If both orders are possible, the fix is only a text: a program cannot know which one is right.
    return options[0] if known else " or ".join(options)


def _name_prompt(profile: ColumnProfile) -> str:
    """Return the settings that read the prompt from a column, or from the replies themselves."""
    if profile.candidates("prompt"):
        return "no setting helps: write both chosen and rejected as texts, or both as messages"
    settings: list[str] = [profile.setting(prompt=name) for name in prompt_columns(profile)[:3]]
    are_texts = all(profile.type_of(reply) in TEXTS for reply in REPLIES)
    if are_texts and profile.share(lambda *texts: bool(common_words(*texts)), *REPLIES) > 0:
        implicit = Overrides({"data.format": "implicit"}, " if both texts begin with the prompt")
        settings.append(implicit)
    return one_of(settings) or (
        "no setting helps: add a column prompt with what the replies answer, a text or messages"
    )


def prompt_columns(profile: ColumnProfile) -> list[str]:
    """Return the columns that could hold the prompt.

    These are the columns with conversations. If no column has conversations, return the columns
    with a name such as question. If no column has such a name, return columns with varied texts.
    """
    replies = [profile.column_named(reply) for reply in REPLIES]
    possible = [
        name
        for name in profile.columns
        if name not in replies
        and _has_prompt_type(profile, name)
        and not NOT_PROMPT_WORDS & set(words(name))
        and not profile.holds_labels(name)
    ]
    chats = [name for name in possible if profile.types[name] == "messages"]
    named = [name for name in possible if PROMPT_WORDS & set(words(name))]
    return chats or named or [name for name in possible if could_be_prompt(profile, name)]


def _has_prompt_type(profile: ColumnProfile, column: str) -> bool:
    if profile.types[column] == "messages":
        return profile.share(waits_for_reply, column) > 0.5
    return profile.types[column] in TEXTS


def could_be_prompt(profile: ColumnProfile, column: str) -> bool:
    """Return whether a column could hold the prompt, judged by its values and its name.

    If no prompt was found but such a column exists, the dataset is refused.
    """
    held, is_named = profile.type_of(column), plain_name(column) == "prompt"
    if held in TEXTS:
        return is_named or _holds_varied_texts(profile, column)
    if is_named:
        return held != "null"
    return held not in (*SCALARS, "numbers") and not NOT_PROMPT_WORDS & set(words(column))


def _holds_varied_texts(profile: ColumnProfile, column: str) -> bool:
    """Return whether a column holds texts that are mostly different, and has no excluded name."""
    texts = [text for (text,) in profile.values(column)]
    wordy = sum(len(text.split()) > 1 or text.strip().isalpha() for text in texts)
    if not texts or wordy < NEARLY_ALL * len(texts) or len(set(texts)) <= len(texts) / 2:
        return False
    return not NOT_PROMPT_WORDS & set(words(column))


def single_reply(profile: ColumnProfile) -> str:
    """Return a sentence about a dataset with one reply per prompt, or "" for other datasets.

    People often mistake a dataset with single replies for a dataset with pairs.
    """

    def first(names: Iterable[str], *types: str) -> list[str]:
        columns = profile.columns_named(*names)
        return [name for name in columns if not types or profile.type_of(name) in types][:1]

    reply = first(("completion", "response", "output", "answer"), *USABLE)
    prompt = [column for column in profile.candidates("prompt") if column not in reply][:1]
    label = first(("label", "labels", "kto_tag"))
    if not (reply and prompt):
        reply, prompt = first(ALIASES["conversation"], "messages"), []
    if not reply:
        return ""
    names = join_names(*prompt, *reply, *label)
    if label:
        return f"{names} hold single replies with a label, as for KTO, and no pairs"
    what = "hold one reply per prompt" if prompt else "holds one conversation per row"
    return f"{names} {what}, as for supervised fine-tuning"
