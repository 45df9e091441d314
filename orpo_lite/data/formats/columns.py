"""The first rows of a set, column by column: what kind of value each holds, and which column holds what we call prompt.

A column's kind is what most of its rows hold, the empty ones aside. A column is taken under another name only when it
is the one candidate, or all candidates agree in every row; else the error has the data.column_map lines to choose from.
"""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from orpo_lite.data.formats.names import (
    ALIASES,
    KNOWN,
    NOT_A_REPLY,
    POLAR,
    SIDES,
    is_answer,
    is_reply,
    plain_name,
    shown,
    side_of,
    words,
)
from orpo_lite.data.formats.text import fault, says_nothing, seen
from orpo_lite.data.formats.values import (
    LISTS,
    PLAIN_LISTS,
    STRUCTURED,
    TEXTS,
    USABLE,
    Kind,
    alone,
    are_texts,
    end_marker,
    ends_with,
    is_blank,
    is_conversation,
    is_opened,
    is_single_reply,
    is_templated,
    kind_of,
    unpacked,
    usual_kind,
    waits_for_reply,
)
from orpo_lite.data.pair import Row
from orpo_lite.errors import DataError, Overrides, one_of, reworded

SOME = 0.1  # of the rows: too many to be chance
MANY = 0.9  # of the rows: a habit of the whole set
PAIRS = "write each pair as prompt, chosen and rejected"

FITTING: dict[str, tuple[Kind, ...]] = {
    "prompt": TEXTS,
    "system": (*TEXTS, "null"),
    "conversation": ("messages",),
    "history": ("messages", "null"),  # null: the first rows may be those without earlier turns
    "input": (*TEXTS, "messages", "null"),  # OpenAI's holds messages
    "completions": ("completions", *LISTS),
    "scores": ("numbers", "numbers as texts"),
    "ranks": ("numbers", "numbers as texts"),
}
ABOUT = ("context", "input")
EITHER = (("prompt", "conversation"), ("scores", "ranks"), ("better", "preference_strength"))  # the one or the other
FEW = 10  # rows: fewer say nothing of what a column repeats
# Who reads such lists: under another name a table's cell that looks like one is a text.
READ_BY: dict[Kind, tuple[str, ...]] = {
    "numbers": (*ALIASES["scores"], *ALIASES["ranks"]),
    "something else": ("history", *ALIASES["system"], *ALIASES["conversation"]),
}


@dataclass
class ColumnProfile:
    """The first rows, the kind of each column, and the columns taken so far: canonical name -> column."""

    rows: Sequence[Row]
    mapped: Mapping[str, str]  # data.column_map, whose names the rows have by now: nothing else is a candidate
    plain: bool  # data.chat_template is none
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)  # data.column_map's, by which other sets are read
    taken: dict[str, str] = field(default_factory=dict)
    texts: Collection[str] = ()  # canonical columns that hold texts, though they may look like JSON of messages
    verdict: Callable[[Any], str | None] | None = None  # what a judged set's better column says: a, b or tie

    def __post_init__(self) -> None:
        self.raw = self.rows
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self.alone: set[str] = set()  # columns of lists that hold one text each
        self.kinds = {column: self._usual_kind(column) for column in self.columns}
        self.rows = [self._normal(row) for row in self.rows]
        self.sides: dict[str, str] = {}
        self.sides = self._find_sides()

    def _usual_kind(self, column: str) -> Kind:
        values = [row[column] for row in self.raw if column in row]
        kind = usual_kind(values, column)
        name, read_by = plain_name(column), READ_BY.get(kind)
        some = kind in (*LISTS, "text") and name not in ALIASES["completions"] and any(map(alone, values))
        if some and all(is_blank(v) or alone(v) or (isinstance(v, str) and kind_of(v) == "text") for v in values):
            self.alone.add(column)
            return "text"
        return "text" if read_by and name not in read_by and are_texts(values) else kind

    def _find_sides(self) -> dict[str, str]:
        """chosen and rejected under names that say so: "winner", "good_answer". Both, or neither.

        Not beside numbered answers, of which a column may say which is the better one.
        """
        found = {side: own[0] for side in SIDES if (own := self.named(side))}
        if len(found) == len(SIDES) or any(is_answer(column) for column in self.columns):
            return found if len(found) == len(SIDES) else {}
        for side in SIDES:
            named = [column for column in self.columns if column not in self.mapped and side_of(column) == side]
            named = [column for column in named if self.kinds[column] in USABLE and self._is_reply(column)]
            found = {side: named[0]} | found if len(named) == 1 else found
        if found.keys() == {"rejected"} and is_reply(found["rejected"]):
            # ms-swift: messages end with the better reply, rejected_response is the worse one.
            chats = [name for name in self.named(*ALIASES["conversation"]) if self.kinds[name] == "messages"]
            answered = [name for name in chats if self.share(lambda turns: not waits_for_reply(turns), name) > 0.5]
            found |= {"chosen": answered[0]} if len(answered) == 1 else {}
        return found if len(found) == len(SIDES) else {}

    def _is_reply(self, column: str) -> bool:
        """It is called so, or only better or worse, and no other column could be the reply that this one rates."""
        if is_reply(column):
            return not self.holds_labels(column)
        asks = [*self.named(*ALIASES["prompt"], *ALIASES["conversation"])]
        others = [name for name in self.columns if name not in asks and side_of(name) is None]
        others = [name for name in others if name not in self.mapped.values()]
        others = [name for name in others if plain_name(name) not in ALIASES["system"]]
        rivals = [name for name in others if self.kinds[name] in TEXTS and not NOT_A_REPLY & {*words(name)}]
        rivals = [name for name in rivals if not self.holds_labels(name)][0 if asks else 1 :]  # one may be the prompt
        bare = set(words(column)) <= (POLAR["chosen"] | POLAR["rejected"]) - {"positive", "negative"}
        return bare and not rivals and not self.holds_labels(column)

    def holds_labels(self, column: str) -> bool:
        """Single words that name other columns, or the same few again and again: a verdict or a topic, no reply."""
        texts = [text.strip().lower() for (text,) in self.values(column)] if self.kind(column) in TEXTS else []
        names = {plain_name(other) for other in self.columns} | {"model_a", "model_b", "tie"}
        single = bool(texts) and all(len(text.split()) == 1 for text in texts)
        return single and (set(texts) <= names or (len(texts) >= FEW and len(set(texts)) <= len(texts) / 2))

    def named(self, *names: str) -> list[str]:
        """The columns of these names, however their words are put together, and whatever the spaces around them."""
        found = [column for name in names for column in self.columns if plain_name(column) == name]
        return found or [self.sides[name] for name in names if name in self.sides]

    def column(self, name: str) -> str:
        return name if name in self.kinds else next(iter(self.named(name)), name)

    def kind(self, name: str) -> Kind:
        return self.kinds.get(self.column(name), "missing")

    def values(self, *names: str) -> list[tuple[Any, ...]]:
        """What these columns hold, in the rows in which none is empty and each holds its column's kind."""
        columns = [self.column(name) for name in names]
        rows = [tuple(row.get(column) for column in columns) for row in self.rows]
        kinds = [self.kind(column) for column in columns]
        return [row for row in rows if all(map(self._fits, row, kinds))]

    def _normal(self, row: Row) -> Row:
        """The row with lists where a column's texts are lists as JSON, and texts where its lists hold one each."""
        out = dict(row)
        for column, value in row.items():
            if column in self.alone:
                out[column] = alone(value) or value
            elif isinstance(value, str) and self.kinds.get(column) not in TEXTS:
                if is_blank(value):
                    out[column] = None
                elif self.kinds.get(column) in (*STRUCTURED, *PLAIN_LISTS):
                    out[column] = unpacked(value, column)
        return out

    @staticmethod
    def _fits(value: Any, kind: Kind) -> bool:
        if kind in TEXTS:
            return isinstance(value, str) and bool(value.strip())
        return "null" != kind_of(value) in (LISTS if kind in LISTS else (kind,))

    def share(self, test: Callable[..., bool], *columns: str) -> float:
        """Of the rows in which the columns hold something, the share that passes."""
        values = self.values(*columns)
        return sum(bool(test(*row)) for row in values) / len(values) if values else 0.0

    def find(self, canonical: str) -> str | None:
        """The column that holds it, if any; refused when several could and differ."""
        if canonical not in self.taken and (candidates := self.candidates(canonical)):
            rivals = [column for column in candidates[1:] if self._differ(candidates[0], column)]
            if rivals:
                self._refuse_rivals(canonical, [candidates[0], *rivals])
            self.taken[canonical] = candidates[0]
        return self.taken.get(canonical)

    def take(self, columns: Mapping[str, str]) -> None:
        """Take columns for ours, as far as the rows have them, and data.column_map has none."""
        found = {ours: self.column(name) for ours, name in columns.items() if self.kind(name) != "missing"}
        self.taken |= {ours: column for ours, column in found.items() if ours not in self.mapped}

    def candidates(self, canonical: str) -> list[str]:
        if canonical in self.mapped or (canonical == "prompt" and self.kind("prompt") == "messages"):
            return [self.column(canonical)] if self.kind(canonical) != "missing" else []
        named = self.named(*ALIASES.get(canonical, (canonical,)))
        said = {*self.mapped, *self.mapped.values()}  # what these are has been said
        named = [column for column in named if column not in said]
        named = [column for column in named if self.kinds[column] in FITTING.get(canonical, self.kinds.values())]
        named.sort(key=lambda column: self.kinds[column] == "null")  # a blank one is no rival of one that speaks
        if canonical == "prompt" and self.is_alpaca():
            return [column for column in named if plain_name(column) != "input"]
        if canonical == "conversation":
            # One that already holds the reply, as in UltraFeedback binarized, only where nothing else asks.
            waiting = [column for column in named if self.share(waits_for_reply, column) > 0.5]
            answered = [column for column in named if not waiting and self.share(ends_with, column, *SIDES) > 0.5]
            return answered if answered and not self.candidates("prompt") else waiting
        return named

    def is_alpaca(self) -> bool:
        """Beside an instruction, input is what the instruction is about, and often blank; history is earlier turns."""
        about = self.kind("input") in (*TEXTS, "null") or self.kind("history") == "messages"
        return self.kind("instruction") != "missing" and about

    def agree(self, one: str, other: str) -> bool:
        return self.column(other) == one or (self.kind(other) != "missing" and not self._differ(one, other))

    def _differ(self, one: str, other: str) -> bool:
        """In some row; spaces around a text make no difference."""
        return any(a != b and str(a).strip() != str(b).strip() for a, b in self.values(one, other))

    def templated(self) -> list[str]:
        """The canonical columns in which a chat template was applied already, in too many rows to be chance."""
        read = {name: column for name, column in self.taken.items() if name != "better"}
        return [name for name, column in read.items() if self.share(is_templated, column) >= SOME]

    def _refuse_rivals(self, canonical: str, columns: Sequence[str]) -> NoReturn:
        templated = [column for column in columns if self.share(is_templated, column) >= SOME]
        if canonical == "prompt" and templated and not self.plain:
            replies = [side for side in ("chosen", "rejected") if self.share(is_templated, side) >= SOME]
            raw = [column for column in columns if column not in templated]
            if not replies and all(plain_name(column) == "history" for column in templated):
                found = f"{shown(*templated)} holds earlier turns as a text, and that is not read"
                raise DataError(
                    where="data.column_map",
                    found=found,
                    expected="messages, or pairs [user, assistant]",
                    fix=reworded(line := self.lines("prompt", raw), f"write it so, or {line} to leave it out"),
                )
            refuse_templated(self, [*templated, *replies], () if replies else raw)
        found = f"{shown(*columns)} could each be the {canonical}, and they differ"
        lines = [self.line(**{canonical: column}) for column in columns]
        if canonical == "prompt":  # what the question is about may stand beside it
            about = [column for column in columns if plain_name(column) in ABOUT]
            lines += [self.line(prompt=one, input=other) for other in about for one in columns if one not in about]
        raise DataError(where="data.column_map", found=found, expected=f"one {canonical}", fix=one_of(lines))

    def line(self, **columns: str) -> Overrides:
        """The line of data.column_map that says this, and what was mapped already as far as it still holds."""
        theirs = {ours: self.mapped.get(column, column) for ours, column in columns.items()}
        instead = {*theirs, *(other for pair in EITHER for one, other in (pair, pair[::-1]) if one in theirs)}
        kept = {ours: name for ours, name in self.mapped.items() if ours not in instead and name not in theirs.values()}
        lists = {ours: [*self.others.get(ours, ()), name] for ours, name in (kept | theirs).items()}
        return map_line({**self.others, **lists})

    def lines(self, canonical: str, columns: Iterable[str]) -> str:
        return one_of(self.line(**{canonical: column}) for column in columns)

    # --- the rows as their reader wants them

    def replies_are_json(self) -> bool:
        """chosen and rejected are JSON of messages in texts, beside a prompt that is a text."""
        texts = all(isinstance(row.get(self.column(side)), str) for row in self.raw for side in SIDES)
        return texts and "messages" in map(self.kind, SIDES) and self.kind("prompt") in TEXTS

    def renamed(self, row: Row, where: str) -> Row:
        """Canonical names, lists where JSON stands for them, and no other candidate than those that were taken."""
        row = {**self._normal(row), **{side: row[side] for side in self.texts if side in row}}
        left_out = {"system", "input", "conversation", "history", "scores", "ranks", *self.taken, *self.taken.values()}
        out = {key: value for key, value in row.items() if key not in left_out}
        out |= {canonical: row[column] for canonical, column in self.taken.items() if column in row}
        for key in [key for key in out if key in KNOWN and key not in self.texts]:
            self._check(out[key], self.taken.get(key, key), where, is_reply=key in SIDES)
        if self.verdict and says_nothing(str(out.get("better"))):
            out["better"] = None
        elif self.verdict and not is_blank(out.get("better")):
            verdict = self.verdict(out["better"])
            if verdict is None:
                raise _verdict_fault(out, where, shown(self.taken["better"]))
            out["better"] = verdict
        return out

    def in_its_words(self, where: str) -> str:
        """Return the place of a fault with the set's own name of the column."""
        place, mark, field = where.partition(", field ")
        name = re.match(r"\w*", field)[0]  # type: ignore[index]
        column = self.taken.get(name, name)
        return f"{place}{mark}{shown(self.mapped.get(column, column))}{field.removeprefix(name)}"

    def _check(self, value: Any, column: str, where: str, *, is_reply: bool) -> None:
        """Raise RowError for a value of another kind than its column's, which its reader would misread."""
        kind, name = self.kind(column), shown(column)
        if isinstance(value, str):
            if is_reply and kind == "messages" and value.lstrip()[:1] not in ("[", "{"):
                return  # a reply as a text among replies as messages
            if kind in (*STRUCTURED, *PLAIN_LISTS):
                raise fault(where, name, "a text", f"{kind}, as in most rows")
            if kind in TEXTS and is_conversation(value):
                raise fault(where, name, "messages as JSON", "a text, as in most rows")
        elif column in self.alone and isinstance(value, list) and value:
            raise fault(where, name, "a list", "a list of one text, as in most rows")
        elif is_reply and kind in TEXTS and value is not None and not is_single_reply(value):
            raise fault(where, name, seen({name: value}, name), "text")


def holds(*columns: str) -> str:
    return f"{shown(*columns)} {'holds' if len(columns) == 1 else 'hold'}"


def map_line(columns: Mapping[str, Sequence[str]]) -> Overrides:
    """The setting, as it can be pasted into a shell; as a mapping of YAML's where a name would break the short form.

    ``columns``: our name to a column, or to those of several sets.
    """
    each = [(ours, column) for ours, names in columns.items() for column in names]
    value = ",".join(f"{ours}={column}" for ours, column in each)
    if not all(column.isprintable() and column == column.strip() and not set(column) & set(",=") for _, column in each):
        lists = {ours: ", ".join(map(_quoted, names)) for ours, names in columns.items() if names}
        named = (
            f'"{ours}": [{names}]' if len(columns[ours]) > 1 else f'"{ours}": {names}' for ours, names in lists.items()
        )
        value = "{" + ", ".join(named) + "}"
    data = {ours: names[0] if len(names) == 1 else [*names] for ours, names in columns.items() if names}
    return Overrides({"data.column_map": data}, text=shlex.quote(f"data.column_map={value}"))


def _quoted(text: str) -> str:
    """In YAML's double quotes, which know an escape for every character."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def _verdict_fault(row: Row, where: str, column: str) -> DataError:
    """Of a value that is neither answer; where it is a number, the others may mean another answer than they seem to."""
    number = kind_of(row["better"]) == "number" or str(row["better"]).strip().isdigit()
    fix = f"write {column} as a or b in every row, by what its numbers mean" if number else "mend or remove the row"
    return fault(where, column, seen(row, "better"), "one of the two answers, or a tie", fix)


def refuse_templated(profile: ColumnProfile, names: Sequence[str], raw: Sequence[str] = ()) -> NoReturn:
    columns = [profile.column(profile.taken.get(name, name)) for name in names]
    values = [value for column in columns for (value,) in profile.values(column)]
    fix = profile.lines("prompt", raw) or Overrides({"data.chat_template": "none"})
    if any(profile.kind(column) not in TEXTS for column in columns):
        fix = "no setting helps: take the template's markers out of the messages; the model's own are put in"
    elif not raw and not any(is_opened(value) for value in values):
        markers = Counter(marker for value in values if (marker := end_marker(value)))
        fix = (
            f"take {' and '.join(markers)} off the ends of {shown(*columns)}, for the model's own is put there; "
            "or data.chat_template=none to train on the texts as they are"
        )
    raise DataError(
        where="data.chat_template",
        found=f"{holds(*columns)} text to which a chat template was applied already",
        expected="text without markers: the template would put them in again",
        fix=fix,
    )


def side_columns(profile: ColumnProfile) -> list[str]:
    return [profile.column(side) for side in ("chosen", "rejected")]
