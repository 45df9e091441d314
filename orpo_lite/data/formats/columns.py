"""Find the value type of each column, and the columns that hold the prompt, the replies and so on.

Only the first rows of a dataset are examined. A column's type is the most frequent type of its
values; empty values do not count. The prompt may be in a column of another name, such as question.
If several columns fit and their values differ, an error lists data.column_map settings.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from orpo_lite.data.formats.column_map import column_map_setting
from orpo_lite.data.formats.names import (
    ALIASES,
    KNOWN,
    NOT_REPLY_WORDS,
    REPLIES,
    SIDE_WORDS,
    is_answer,
    is_reply,
    join_names,
    plain_name,
    reply_named_by,
    words,
)
from orpo_lite.data.formats.text import describe, is_absent, row_error
from orpo_lite.data.formats.values import (
    LISTS,
    PLAIN_LISTS,
    STRUCTURED,
    TEXTS,
    USABLE,
    ValueType,
    are_texts,
    begins_templated,
    end_marker,
    ends_with,
    is_blank,
    is_conversation,
    is_single_reply,
    is_templated,
    single_text,
    unpack_json,
    usual_type,
    value_type,
    waits_for_reply,
)
from orpo_lite.data.pair import Row
from orpo_lite.errors import DataError, Overrides, one_of, reworded

NOTABLE_SHARE = 0.1  # of the rows: too many to be chance
NEARLY_ALL = 0.9  # of the rows: a property of the whole dataset
WRITE_PAIRS = "write each pair as prompt, chosen and rejected"

# Standard name of a column -> the value types that the column may have.
ALLOWED_TYPES: dict[str, tuple[ValueType, ...]] = {
    "prompt": TEXTS,
    "system": (*TEXTS, "null"),
    "conversation": ("messages",),
    "history": ("messages", "null"),  # null: the first rows may be those without earlier turns
    "input": (*TEXTS, "messages", "null"),  # messages: in OpenAI's format
    "completions": ("completions", *LISTS),
    "scores": ("numbers", "numbers as texts"),
    "ranks": ("numbers", "numbers as texts"),
}
SUBJECT_COLUMNS = ("context", "input")  # columns with a text that a question refers to
# Pairs of standard names. A dataset uses only one name of each pair.
ALTERNATIVES = (
    ("prompt", "conversation"),
    ("scores", "ranks"),
    ("better", "preference_strength"),
)
MIN_ROWS = 10  # with fewer rows, repeated values in a column prove nothing
# A cell of a table that looks like such a list is read as a list only in these columns.
LIST_NAMES: dict[ValueType, tuple[str, ...]] = {
    "numbers": (*ALIASES["scores"], *ALIASES["ranks"]),
    "something else": ("history", *ALIASES["system"], *ALIASES["conversation"]),
}


@dataclass
class ColumnProfile:
    """The first rows of a dataset, each column's value type, and the columns assigned so far."""

    rows: Sequence[Row]
    mapped: Mapping[str, str]
    """data.column_map, already applied to the rows. A name in it has no other candidates."""
    plain: bool
    """True if data.chat_template is none."""
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The part of data.column_map that other datasets use."""
    assigned: dict[str, str] = field(default_factory=dict)
    """Standard name -> the column that is read for it."""
    texts: Collection[str] = ()
    """Standard names of columns that are read as texts, even if they look like JSON messages."""
    verdict: Callable[[Any], str | None] | None = None
    """Converts a value of the verdict column to a, b or tie. Only for the format judged."""

    def __post_init__(self) -> None:
        self.raw = self.rows
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self.single_text_columns: set[str] = set()  # columns of lists with one text each
        self.types = {column: self._usual_type(column) for column in self.columns}
        self.rows = [self._normalized(row) for row in self.rows]
        self.reply_columns: dict[str, str] = {}
        self.reply_columns = self._find_replies()

    def _usual_type(self, column: str) -> ValueType:
        values = [row[column] for row in self.raw if column in row]
        found = usual_type(values, column)
        name = plain_name(column)
        may_be_single = found in (*LISTS, "text") and name not in ALIASES["completions"]
        if may_be_single and _are_single_texts(values):
            self.single_text_columns.add(column)
            return "text"
        is_stray_list = found in LIST_NAMES and name not in LIST_NAMES[found]
        return "text" if is_stray_list and are_texts(values) else found

    def _find_replies(self) -> dict[str, str]:
        """Return the columns of chosen and rejected by their names, such as "good_answer".

        Returns {} unless both are found. If there are numbered answers (response_a, response_b),
        only the standard names count, because a column "better_answer" may then be the verdict.
        """
        found = {}
        for reply in REPLIES:
            if own := self.columns_named(reply):
                found[reply] = own[0]
        if len(found) == len(REPLIES):
            return found
        if any(is_answer(column) for column in self.columns):
            return {}
        for reply in REPLIES:
            named = [
                column
                for column in self.columns
                if column not in self.mapped
                and reply_named_by(column) == reply
                and self.types[column] in USABLE
                and self._is_reply(column)
            ]
            if len(named) == 1:
                found.setdefault(reply, named[0])
        if found.keys() == {"rejected"} and is_reply(found["rejected"]):
            # ms-swift: messages end with the better reply; rejected_response is the worse one.
            answered = [
                name
                for name in self.columns_named(*ALIASES["conversation"])
                if self.types[name] == "messages" and self.share(_has_answer, name) > 0.5
            ]
            if len(answered) == 1:
                found["chosen"] = answered[0]
        return found if len(found) == len(REPLIES) else {}

    def _is_reply(self, column: str) -> bool:
        """Return whether the column holds replies.

        Its name must have a word for a reply. A name with only a word such as "better" or "worse"
        is enough if no other column could be a reply. Otherwise it may be a rating of that reply.
        """
        if self.holds_labels(column):
            return False
        if is_reply(column):
            return True
        prompts = self.columns_named(*ALIASES["prompt"], *ALIASES["conversation"])
        known = {*prompts, *self.mapped.values()}
        rivals = [
            name
            for name in self.columns
            if name not in known
            and reply_named_by(name) is None
            and plain_name(name) not in ALIASES["system"]
            and self.types[name] in TEXTS
            and not NOT_REPLY_WORDS & {*words(name)}
            and not self.holds_labels(name)
        ]
        if not prompts:
            rivals = rivals[1:]  # the first one may be the prompt
        rating_words = SIDE_WORDS["chosen"] | SIDE_WORDS["rejected"]
        return not rivals and set(words(column)) <= rating_words - {"positive", "negative"}

    def holds_labels(self, column: str) -> bool:
        """Return whether the column holds labels, such as verdicts or topics, and no replies.

        Each label is one word. Either each label is model_a, model_b, tie or a column's name. Or
        the column has at least MIN_ROWS labels, and each occurs at least twice on average.
        """
        if self.type_of(column) not in TEXTS:
            return False
        texts = [text.strip().lower() for (text,) in self.values(column)]
        if not texts or any(len(text.split()) != 1 for text in texts):
            return False
        names = {plain_name(other) for other in self.columns} | {"model_a", "model_b", "tie"}
        if set(texts) <= names:
            return True
        return len(texts) >= MIN_ROWS and len(set(texts)) <= len(texts) / 2

    def columns_named(self, *names: str) -> list[str]:
        """Return columns with :func:`plain_name` in ``names``, else from :attr:`reply_columns`."""
        found = [column for name in names for column in self.columns if plain_name(column) == name]
        return found or [self.reply_columns[name] for name in names if name in self.reply_columns]

    def column_named(self, name: str) -> str:
        """Return ``name`` if it is a column, else the first of ``columns_named``, else ``name``."""
        if name in self.types:
            return name
        found = self.columns_named(name)
        return found[0] if found else name

    def type_of(self, name: str) -> ValueType:
        return self.types.get(self.column_named(name), "missing")

    def values(self, *names: str) -> list[tuple[Any, ...]]:
        """Return the values of the columns ``names``, one tuple for each row.

        A row is left out if one of its values is empty or does not have the type of its column.
        """
        columns = [self.column_named(name) for name in names]
        rows = [tuple(row.get(column) for column in columns) for row in self.rows]
        types = [self.type_of(column) for column in columns]
        return [row for row in rows if all(map(self._has_type, row, types))]

    def _normalized(self, row: Row) -> Row:
        """Return the row with its values in their columns' types: JSON -> list, ["a"] -> "a"."""
        out = dict(row)
        for column, value in row.items():
            column_type = self.types.get(column)
            if column in self.single_text_columns:
                out[column] = single_text(value) or value
            elif isinstance(value, str) and column_type not in TEXTS:
                if is_blank(value):
                    out[column] = None
                elif column_type in (*STRUCTURED, *PLAIN_LISTS):
                    out[column] = unpack_json(value, column)
        return out

    @staticmethod
    def _has_type(value: Any, expected: ValueType) -> bool:
        """Return whether a value is not empty and has this type. LISTS count as one type."""
        if expected in TEXTS:
            return isinstance(value, str) and bool(value.strip())
        found = value_type(value)
        if found == "null":
            return False
        return found in (LISTS if expected in LISTS else (expected,))

    def share(self, test: Callable[..., bool], *columns: str) -> float:
        """Return the share of rows of :meth:`values` that pass ``test``; 0 if there are none."""
        values = self.values(*columns)
        return sum(bool(test(*row)) for row in values) / len(values) if values else 0.0

    def find(self, canonical: str) -> str | None:
        """Return the column for a standard name, and store it in ``assigned``; None if none fits.

        Raises DataError if several columns are candidates and their values differ.
        """
        if canonical not in self.assigned and (candidates := self.candidates(canonical)):
            rivals = [column for column in candidates[1:] if self._differ(candidates[0], column)]
            if rivals:
                self._refuse_rivals(canonical, [candidates[0], *rivals])
            self.assigned[canonical] = candidates[0]
        return self.assigned.get(canonical)

    def assign(self, columns: Mapping[str, str]) -> None:
        """Assign columns to standard names. Skip columns that are missing.

        ``columns``: standard name -> column. Skip a standard name that data.column_map sets.
        """
        for ours, name in columns.items():
            if ours not in self.mapped and self.type_of(name) != "missing":
                self.assigned[ours] = self.column_named(name)

    def candidates(self, canonical: str) -> list[str]:
        """Return the columns that could be read as the standard column ``canonical``."""
        is_decided = canonical in self.mapped
        if is_decided or (canonical == "prompt" and self.type_of("prompt") == "messages"):
            found = self.type_of(canonical) != "missing"
            return [self.column_named(canonical)] if found else []
        taken = {*self.mapped, *self.mapped.values()}
        allowed = ALLOWED_TYPES.get(canonical, self.types.values())
        named = [
            column
            for column in self.columns_named(*ALIASES.get(canonical, (canonical,)))
            if column not in taken and self.types[column] in allowed
        ]
        named.sort(key=lambda column: self.types[column] == "null")  # empty columns come last
        if canonical == "prompt" and self.is_alpaca():
            return [column for column in named if plain_name(column) != "input"]
        if canonical == "conversation":
            # A conversation that already contains the reply, as in UltraFeedback binarized, is used
            # only if no other column contains the question.
            waiting = [column for column in named if self.share(waits_for_reply, column) > 0.5]
            if waiting:
                return waiting
            answered = [column for column in named if self.share(ends_with, column, *REPLIES) > 0.5]
            return [] if self.candidates("prompt") else answered
        return named

    def is_alpaca(self) -> bool:
        """Return whether the columns are Alpaca's: ``instruction``, and ``input`` or ``history``.

        ``input``: a text that the instruction refers to, often empty. ``history``: earlier turns.
        """
        if self.type_of("instruction") == "missing":
            return False
        return self.type_of("input") in (*TEXTS, "null") or self.type_of("history") == "messages"

    def agree(self, one: str, other: str) -> bool:
        """Return whether ``one`` and ``other`` are the same column or hold the same values."""
        if self.column_named(other) == one:
            return True
        return self.type_of(other) != "missing" and not self._differ(one, other)

    def _differ(self, one: str, other: str) -> bool:
        """Return whether two columns differ in any row. Spaces around a text are ignored."""
        return any(a != b and str(a).strip() != str(b).strip() for a, b in self.values(one, other))

    def templated(self) -> list[str]:
        """Return the standard names of columns with template markers in at least 10% of rows."""
        return [
            name
            for name, column in self.assigned.items()
            if name != "better" and self.share(is_templated, column) >= NOTABLE_SHARE
        ]

    def _refuse_rivals(self, canonical: str, columns: Sequence[str]) -> NoReturn:
        if canonical == "prompt" and not self.plain:
            self._refuse_templated_rivals(columns)
        settings: list[str] = [self.setting(**{canonical: column}) for column in columns]
        if canonical == "prompt":  # a column may hold what the question is about
            subjects = [column for column in columns if plain_name(column) in SUBJECT_COLUMNS]
            prompts = [column for column in columns if column not in subjects]
            settings += [self.setting(prompt=p, input=s) for s in subjects for p in prompts]
        raise DataError(
            where="data.column_map",
            found=f"{join_names(*columns)} could each be the {canonical}, but they differ",
            expected=f"one column for the {canonical}",
            fix=one_of(settings),
        )

    def _refuse_templated_rivals(self, columns: Sequence[str]) -> None:
        """Raise DataError if candidates for the prompt contain markers of a chat template."""
        templated = [c for c in columns if self.share(is_templated, c) >= NOTABLE_SHARE]
        if not templated:
            return
        replies = [r for r in REPLIES if self.share(is_templated, r) >= NOTABLE_SHARE]
        raw = [column for column in columns if column not in templated]
        if not replies and all(plain_name(column) == "history" for column in templated):
            setting = self.settings("prompt", raw)
            raise DataError(
                where="data.column_map",
                found=f"{columns_hold(*templated)} earlier turns as text: this form is not read",
                expected="messages, or pairs [user, assistant]",
                fix=reworded(setting, f"write turns as messages, or {setting} to leave them out"),
            )
        refuse_templated(self, [*templated, *replies], () if replies else raw)

    def setting(self, **columns: str) -> Overrides:
        """Return a data.column_map setting: ``setting(prompt="question")`` -> prompt=question.

        ``columns``: the new entries. An old entry is kept unless a new entry conflicts with it.
        """
        theirs = {ours: self.mapped.get(column, column) for ours, column in columns.items()}
        replaced = set(theirs)
        for one, other in ALTERNATIVES:
            if one in theirs:
                replaced.add(other)
            if other in theirs:
                replaced.add(one)
        kept = {
            ours: name
            for ours, name in self.mapped.items()
            if ours not in replaced and name not in theirs.values()
        }
        lists = {ours: [*self.others.get(ours, ()), name] for ours, name in (kept | theirs).items()}
        return column_map_setting({**self.others, **lists})

    def settings(self, canonical: str, columns: Iterable[str]) -> str:
        """Return one setting for each column: "prompt", ["a", "b"] -> prompt=a or prompt=b."""
        return one_of(self.setting(**{canonical: column}) for column in columns)

    # --- convert rows for their reader

    def replies_are_json(self) -> bool:
        """Return whether the prompt is a text, but the replies are JSON texts with messages."""
        columns = [self.column_named(reply) for reply in REPLIES]
        if not all(isinstance(row.get(column), str) for row in self.raw for column in columns):
            return False
        return "messages" in map(self.type_of, REPLIES) and self.type_of("prompt") in TEXTS

    def renamed(self, row: Row, where: str) -> Row:
        """Return a copy of the row with the standard names as keys. JSON texts become lists.

        An optional name, such as system, is left out if no column was assigned to this name. Raises
        RowError if a value cannot be read as its column's type, or a verdict has no known meaning.
        """
        row = {
            **self._normalized(row),
            **{reply: row[reply] for reply in self.texts if reply in row},
        }
        optional = {"system", "input", "conversation", "history", "scores", "ranks"}
        left_out = optional | {*self.assigned, *self.assigned.values()}
        out = {key: value for key, value in row.items() if key not in left_out}
        out |= {ours: row[column] for ours, column in self.assigned.items() if column in row}
        for key in [key for key in out if key in KNOWN and key not in self.texts]:
            self._check(out[key], self.assigned.get(key, key), where, is_reply=key in REPLIES)
        if self.verdict and is_absent(str(out.get("better"))):
            out["better"] = None
        elif self.verdict and not is_blank(out.get("better")):
            verdict = self.verdict(out["better"])
            if verdict is None:
                raise _verdict_error(out, where, join_names(self.assigned["better"]))
            out["better"] = verdict
        return out

    def with_source_column(self, where: str) -> str:
        """Replace a standard name in ``where`` by the source column: field chosen -> field good."""
        place, mark, rest = where.partition(", field ")
        name = re.match(r"\w*", rest)[0]  # type: ignore[index]
        column = self.assigned.get(name, name)
        theirs = join_names(self.mapped.get(column, column))
        return f"{place}{mark}{theirs}{rest.removeprefix(name)}"

    def _check(self, value: Any, column: str, where: str, *, is_reply: bool) -> None:
        """Raise RowError if a value has another type than its column, and would be misread."""
        expected, name = self.type_of(column), join_names(column)
        if isinstance(value, str):
            if is_reply and expected == "messages" and value.lstrip()[:1] not in ("[", "{"):
                return  # a reply as a text among replies as messages
            if expected in (*STRUCTURED, *PLAIN_LISTS):
                raise row_error(where, name, "a text", f"{expected}, as in most rows")
            if expected in TEXTS and is_conversation(value):
                raise row_error(where, name, "messages as JSON", "a text, as in most rows")
        elif column in self.single_text_columns and isinstance(value, list) and value:
            raise row_error(where, name, "a list", "a list of one text, as in most rows")
        elif is_reply and expected in TEXTS and value is not None and not is_single_reply(value):
            raise row_error(where, name, describe({name: value}, name), "text")


def _has_answer(turns: Sequence[Any]) -> bool:
    return not waits_for_reply(turns)


def _are_single_texts(values: Sequence[Any]) -> bool:
    """Return whether some values are lists of one text, and all others are texts or empty."""
    if not any(map(single_text, values)):
        return False
    for value in values:
        is_text = isinstance(value, str) and value_type(value) == "text"
        if not (is_blank(value) or single_text(value) or is_text):
            return False
    return True


def columns_hold(*columns: str) -> str:
    """Return the beginning of a sentence: "a holds", "a and b hold"."""
    return f"{join_names(*columns)} {'holds' if len(columns) == 1 else 'hold'}"


def _verdict_error(row: Row, where: str, column: str) -> DataError:
    """Return the error for a verdict that names neither answer.

    If the verdict is a number, the numbers in other rows may have been misunderstood too.
    """
    value = row["better"]
    fix = "correct or remove the row"
    if value_type(value) == "number" or str(value).strip().isdigit():
        fix = f"replace the numbers in {column} by a or b in every row, according to their meaning"
    expected = "one of the two answers, or a tie"
    return row_error(where, column, describe(row, "better"), expected, fix)


def refuse_templated(
    profile: ColumnProfile, names: Sequence[str], raw: Sequence[str] = ()
) -> NoReturn:
    """Raise DataError, because the columns ``names`` already have a chat template applied.

    ``raw``: columns without template markers. The fix may suggest them as the prompt.
    """
    columns = [profile.column_named(profile.assigned.get(name, name)) for name in names]
    values = [value for column in columns for (value,) in profile.values(column)]
    fix = profile.settings("prompt", raw) or Overrides({"data.chat_template": "none"})
    if any(profile.type_of(column) not in TEXTS for column in columns):
        fix = "no setting helps: remove the template's markers from the messages; "
        fix += "the model's own template adds its markers"
    elif not raw and not any(begins_templated(value) for value in values):
        markers = Counter(marker for value in values if (marker := end_marker(value)))
        fix = (
            f"remove {' and '.join(markers)} from the end of the texts in {join_names(*columns)}, "
            "because orpo-lite adds the model's own marker; or data.chat_template=none to train on "
            "the unchanged texts"
        )
    raise DataError(
        where="data.chat_template",
        found=f"{columns_hold(*columns)} text that already has a chat template applied",
        expected="texts without markers, because the chat template adds its own markers",
        fix=fix,
    )
