"""The first rows of a set, column by column: what kind of value each holds, and which column holds what we call prompt.

A column's kind is what most of its rows hold, the empty ones aside. A column is taken under another name only when it
is the one candidate, or all candidates agree in every row; else the error has the data.column_map lines to choose from.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from orpo_lite.data.readers import ANSWER_KEYS, COLUMNS, NotJson, Row, fault, is_dialogue, numeric, seen
from orpo_lite.errors import DataError

SOME = 0.1  # of the rows: too many to be chance

# --- the kind of a value

Kind = Literal[
    "missing", "null", "text", "dialogue", "Python text of a list", "message", "messages", "turns", "completions",
    "texts", "numbers as texts", "pairs of texts", "numbers", "number", "true or false", "request", "something else",
]  # fmt: skip
TEXTS: tuple[Kind, ...] = ("text", "dialogue")
LISTS: tuple[Kind, ...] = ("texts", "numbers as texts")  # of texts; answers may be numbers, and scores texts
CHAT: tuple[Kind, ...] = ("messages", "turns")  # lists that hold a conversation
USABLE: tuple[Kind, ...] = (*TEXTS, "message", "messages")  # as chosen or rejected
STRUCTURED: tuple[Kind, ...] = ("message", *CHAT, "completions", "request")  # a csv holds these as JSON

_LISTS = re.compile(
    r"\s*\[?\s*\{\s*['\"](role|content|from|value|input|messages|model|rank|" + "|".join(ANSWER_KEYS) + r")['\"]\s*:"
)


def kind_of(value: Any) -> Kind:
    match unpacked(value):
        case None | []:
            return "null"
        case str(text) if not text.strip():
            return "null"  # all that a csv can write for it
        case str(text):
            return "Python text of a list" if _is_python(text) else "dialogue" if is_dialogue(text) else "text"
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case Mapping() as item:
            return "message" if is_message(item) else "request" if item.get("messages") else "something else"
        case list(items) if all(isinstance(item, Mapping) for item in items):
            return _kind_of_list(items)
        case list(items) if all(isinstance(item, str) for item in items):
            return "numbers as texts" if all(map(numeric, items)) else "texts"
        case list(items) if all(
            isinstance(item, list) and [type(text) for text in item] == [str, str] for item in items
        ):
            return "pairs of texts"
        case list(items) if all(item is None or type(item) in (int, float, NotJson) for item in items):
            return "numbers"
        case _:
            return "something else"


def is_blank(value: Any) -> bool:
    """It holds nothing: kind_of says null."""
    return not value.strip() if isinstance(value, str) else value is None or value == []


def _kind_of_list(items: Sequence[Mapping[str, Any]]) -> Kind:
    if all(is_message(item) for item in items):
        return "messages"
    if all(item.get("input") is not None and "output" in item for item in items):
        return "turns"
    return "completions" if all(any(key in item for key in ANSWER_KEYS) for item in items) else "something else"


def is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and (item.get("role") is not None or item.get("from") is not None)


def unpacked(value: Any) -> Any:
    """A text that holds JSON of messages or answers, as csv has to, as the list that it is; any other value as is."""
    held = _parsed(value)
    return value if held is None or kind_of(held) not in STRUCTURED else held


def _is_python(text: str) -> bool:
    return bool(_LISTS.match(text)) and "'" in text and _parsed(text) is None


def _parsed(value: Any) -> Any:
    if not isinstance(value, str) or not _LISTS.match(value):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


# --- what a value says


def contents(value: Any) -> list[str]:
    """The texts in a value: its own, or those of its messages or answers."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in contents(item)]
    if isinstance(value, Mapping):
        keys = dict.fromkeys(("content", "value", "messages", "input", *ANSWER_KEYS))
        return [text for key in keys for text in contents(value.get(key))]
    return []


def asks(side: Any) -> bool:
    """It holds a user's turn: a whole conversation, not only the reply."""
    turns = side if isinstance(side, list) else [side]
    return any(is_message(turn) and (turn.get("role") or turn.get("from")) in ("user", "human") for turn in turns)


def is_sharegpt(side: Any) -> bool:
    turns = side if isinstance(side, list) else [side]
    return any(is_message(turn) and turn.get("role") is None for turn in turns)


def ends_with(turns: Any, *replies: Any) -> bool:
    """A conversation whose last text is one of these replies."""
    return contents(turns)[-1:] in [contents(reply)[-1:] for reply in replies]


def waits_for_reply(turns: Sequence[Mapping[str, Any]]) -> bool:
    return asks(turns[-1]) if is_message(turns[-1]) else not turns[-1].get("output")


_START = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>|<\|im_start\|>|\[INST\]|<<SYS>>"
    r"|\[SYSTEM_PROMPT\]|<\|start_header_id\|>|<start_of_turn>|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|(?:user|system|assistant)\|>|<｜(?:User|Assistant)｜>|#{2,3} ?(?:Instruction|Human|User|System|Input)s?:"
    r"|Below is an instruction that describes|(?:USER|User|Human|ASSISTANT|Assistant|GPT4 Correct User): "
    r"|<(?:human|bot)>:|A chat between a curious (?:user|human) and an artificial intelligence)"
)
# Its turns within one text, behind a system text or not: what has to be in the text at all, and how it stands there.
_TURNS = {
    "<extra_id_": re.compile(r"(?:\A|\n)<extra_id_[01]>(?:System|User|Assistant)\n"),  # HelpSteer2
    "ASSISTANT:": re.compile(r"(?:\A|\s)USER: .*\sASSISTANT:", re.DOTALL),  # Vicuna
    "Instruct": re.compile(r"\A\s*Instruct(?:ion)?:.*\n\s*(?:Output|Response):", re.DOTALL),  # Phi
}
_WAITING = re.compile(  # for the reply, at the end
    r"(?:\s(?:ASSISTANT|<bot>|#{2,3} ?(?:Response|Assistant)):|\n\s*Assistant:|\[/INST\]|<\|assistant\|>"
    r"|<\|im_start\|>assistant|<start_of_turn>model)\Z"
)
_LONGEST = 40  # characters of a marker at the end, and more
_END = re.compile(
    r"(?:<extra_id_1>|</s>|<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|<\|endoftext\|>|<end_of_turn>|<eos>|<\|end\|>"
    r"|<\|END_OF_TURN_TOKEN\|>|<\|end_of_turn\|>|<｜end▁of▁sentence｜>)\Z"
)


def is_templated(value: Any) -> bool:
    """Anchored at the text's start and end, or markers in their order, so that a question about templates is none."""
    return is_opened(value) or end_marker(value) is not None


def is_opened(value: Any) -> bool:
    """It begins with a template's marker, holds its turns, or waits behind the marker of a reply."""
    return any(_is_opened(text) and not is_dialogue(text) for text in contents(value))


def _is_opened(text: str) -> bool:
    turns = any(marker in text and pattern.search(text) for marker, pattern in _TURNS.items())
    return turns or bool(_START.match(text) or _WAITING.search(_end(text)))


def _end(text: str) -> str:
    return text.rstrip()[-_LONGEST:]


def end_marker(value: Any) -> str | None:
    """A template's marker at the end of the last text that has one there."""
    ends = (_END.search(_end(text)) for text in reversed(contents(value)) if not is_dialogue(text))
    return next((match[0].strip() for match in ends if match), None)


# --- the columns

# What other sets call a column of ours. None for chosen and rejected: their names alone say which reply is the better.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "problem", "user_prompt", "user_input", "history",
               "context"),
    "system": ("system", "system_prompt", "system_message"),
    "conversation": ("conversation", "conversations", "messages", "context"),
    "history": ("history",),
    "input": ("input",),
    "completions": ("completions", "answers", "responses", "generations", "candidates"),
    "scores": ("scores", "score", "ratings", "rating", "rewards", "reward"),
    "ranks": ("ranks", "rank", "rankings", "ranking"),
}  # fmt: skip
FITTING: dict[str, tuple[Kind, ...]] = {
    "prompt": TEXTS,
    "system": ("text", "null"),
    "conversation": CHAT,
    "history": (*CHAT, "pairs of texts", "null"),  # null: the first rows may be those without earlier turns
    "input": (*TEXTS, "request", "null"),
    "completions": ("completions", *LISTS),
    "scores": ("numbers", "numbers as texts"),
    "ranks": ("numbers", "numbers as texts"),
}
ABOUT = ("context", "input")
SIDES = ("chosen", "rejected")
OPENAI = ("input", "preferred_output", "non_preferred_output")  # the columns of OpenAI's own format
KNOWN = {*COLUMNS, *OPENAI, *(alias for aliases in ALIASES.values() for alias in aliases)}


@dataclass
class Look:
    """The first rows, the kind of each column, and the columns taken so far: canonical name -> column."""

    rows: Sequence[Row]
    mapped: frozenset[str]  # by data.column_map: nothing else is a candidate for these
    plain: bool  # data.chat_template is none
    taken: dict[str, str] = field(default_factory=dict)
    texts: Collection[str] = ()  # canonical columns that hold texts, though they may look like JSON of messages
    verdict: Callable[[Any], str | None] | None = None  # what a judged set's better column says: a, b or tie

    def __post_init__(self) -> None:
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self.kinds = {column: self._usual_kind(column) for column in self.columns}

    def _usual_kind(self, column: str) -> Kind:
        kinds = Counter(kind_of(row[column]) for row in self.rows if column in row)
        return next((kind for kind, _ in kinds.most_common() if kind != "null"), "null")

    def named(self, *names: str) -> list[str]:
        """The columns of these names, whatever their case and the spaces around them."""
        return [column for name in names for column in self.columns if plain_name(column) == name]

    def column(self, name: str) -> str:
        return name if name in self.kinds else next(iter(self.named(name)), name)

    def kind(self, name: str) -> Kind:
        return self.kinds.get(self.column(name), "missing")

    def values(self, *names: str) -> list[tuple[Any, ...]]:
        """What these columns hold, in the rows in which none is empty and each holds its column's kind."""
        columns = [self.column(name) for name in names]
        fits = [self._alike(self.kind(column)) for column in columns]
        rows = [tuple(unpacked(row.get(column)) for column in columns) for row in self.rows]
        return [
            row for row in rows if all("null" != kind_of(value) in fit for value, fit in zip(row, fits, strict=True))
        ]

    @staticmethod
    def _alike(kind: Kind) -> tuple[Kind, ...]:
        return next((kinds for kinds in (TEXTS, LISTS) if kind in kinds), (kind,))

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

    def candidates(self, canonical: str) -> list[str]:
        if canonical in self.mapped or (canonical == "prompt" and self.kind("prompt") in CHAT):
            return [self.column(canonical)] if self.kind(canonical) != "missing" else []
        named = self.named(*ALIASES.get(canonical, (canonical,)))
        named = [column for column in named if column not in self.mapped]  # it has been said what that is
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
        about = self.kind("input") in (*TEXTS, "null") or self.kind("history") == "pairs of texts"
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
            refuse_templated(self, [*templated, *replies], () if replies else raw)
        found = f"{shown(*columns)} could each be the {canonical}, and they differ"
        lines = [map_line(**{canonical: column}) for column in columns]
        if canonical == "prompt":  # what the question is about may stand beside it
            about = [column for column in columns if plain_name(column) in ABOUT]
            lines += [map_line(prompt=one, input=other) for other in about for one in columns if one not in about]
        raise DataError("data.column_map", found, f"one {canonical}", " or ".join(lines))

    # --- the rows as their reader wants them

    def renamed(self, row: Row, where: str) -> Row:
        """Canonical names, lists where JSON stands for them, and no other candidate than those that were taken."""
        left_out = {"system", "input", "conversation", "history", "scores", "ranks", *self.taken, *self.taken.values()}
        out = {key: value for key, value in row.items() if key not in left_out}
        out |= {canonical: row[column] for canonical, column in self.taken.items() if column in row}
        for key, value in out.items():
            kind = self.kind(self.taken.get(key, key))
            if kind in STRUCTURED and isinstance(value, str) and key in KNOWN and key not in self.texts:
                out[key] = unpacked(value) if value.strip() else None
                if isinstance(out[key], str):
                    raise fault(where, shown(self.taken.get(key, key)), "a text", f"{kind}, as in most rows")
        if self.verdict and not is_blank(out.get("better")):
            verdict = self.verdict(out["better"])
            if verdict is None:
                raise fault(where, shown(self.taken["better"]), seen(out, "better"), "one of the two answers, or a tie")
            out["better"] = verdict
        return out


# --- columns in messages


def plain_name(column: str) -> str:
    return column.strip().lower()


def words(column: str) -> list[str]:
    """The words of a column's name: good, answer of good_answer2 and of GoodAnswer."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", column)]


def shown(*columns: str) -> str:
    """Their names in a sentence, without what a terminal would act on."""
    *names, last = [column if column.isprintable() else repr(column) for column in columns] or [""]
    return f"{', '.join(names)} and {last}" if names else last


def map_line(**columns: str) -> str:
    """The setting, as it can be pasted into a shell; as a mapping of YAML's where a name would break the short form."""
    value = ",".join(f"{canonical}={column}" for canonical, column in columns.items())
    if not all(
        column.isprintable() and column == column.strip() and not set(column) & set(",=") for column in columns.values()
    ):
        value = "{" + ", ".join(f'"{canonical}": {_quoted(column)}' for canonical, column in columns.items()) + "}"
    return shlex.quote(f"data.column_map={value}")


def _quoted(text: str) -> str:
    """In YAML's double quotes, which know an escape for every character."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def map_lines(canonical: str, columns: Iterable[str]) -> str:
    return " or ".join(map_line(**{canonical: column}) for column in columns)


def refuse_templated(look: Look, names: Sequence[str], raw: Sequence[str] = ()) -> NoReturn:
    columns = [look.column(look.taken.get(name, name)) for name in names]
    values = [value for column in columns for (value,) in look.values(column)]
    remedy = map_lines("prompt", raw) or "data.chat_template=none"
    if any(look.kind(column) not in TEXTS for column in columns):
        remedy = "no setting helps: take the template's markers out of the messages; the model's own are put in"
    elif not raw and not any(is_opened(value) for value in values):
        markers = Counter(marker for value in values if (marker := end_marker(value)))
        remedy = (
            f"take {' and '.join(markers)} off the ends of {shown(*columns)}, for the model's own is put there; "
            "or data.chat_template=none to train on the texts as they are"
        )
    found = f"{shown(*columns)} hold text to which a chat template was applied already"
    raise DataError("data.chat_template", found, "text without markers: the template would put them in again", remedy)
