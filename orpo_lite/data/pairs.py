"""Sets to pairs: read row by row, filtered as in the paper. Needs no tokenizer.

Nothing is held in memory but what is asked for: a set may be larger than that. Every pair left out is counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice, pairwise
from typing import Any, NoReturn

from orpo_lite.data.formats.column_map import (
    DETECTION_ROWS,
    first_rows_with,
    present_columns,
    source_columns,
    missing_columns,
    apply_column_map,
)
from orpo_lite.data.formats.columns import ColumnProfile, column_map_setting
from orpo_lite.data.formats.detect import Detected, detect_format, is_known
from orpo_lite.data.formats.names import plain_name, join_names
from orpo_lite.data.formats.text import is_absent
from orpo_lite.data.formats.values import is_blank, value_type
from orpo_lite.data.pair import EMPTY_CHOSEN, EMPTY_REJECTED, Pair, Row, RowError
from orpo_lite.data.sources.source import Source, names_line
from orpo_lite.errors import SHOWN, DataError, Overrides, raise_all, reworded
from orpo_lite.recipe.schema import DataSection

# Reasons to leave a pair out, beside those of pair.py: the paper's, Appendix C.
EQUAL = "chosen and rejected are equal"
# And ours: such a prompt asks for nothing, or was put together wrongly.
EMPTY_PROMPT = "empty prompt"
BLANK = "blank row"
SAID_TWICE = "the same turn twice in a row"
FAULTY = "a fault in the row"

LATER = {
    "system",
    "history",
    "input",
}  # what may stand in some rows alone: the others read the same without it
PLACES = 3  # places kept of each reason to leave a pair out
MAY_BE_BAD = 3  # rows of a set that may hold a fault, whatever share of it they are


class Drops:
    """Pairs left out: how many for each reason, and where the first ones stand."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, reason: str, where: str) -> None:
        """Count a pair."""
        self.counts[reason] += 1
        if self.counts[reason] <= PLACES:
            self.places.setdefault(reason, []).append(where)

    def raise_nothing_left(self, name: str, hints: Mapping[str, str] | None = None) -> NoReturn:
        """Raise DataError with the table of reasons; ``hints`` has the fix for some of them."""
        table = "".join(
            f"\n  {count:>8}  {reason} (first {self.places[reason][0]})"
            for reason, count in self.counts.items()
        )
        most = self.counts.most_common(1)[0][0]
        raise DataError(
            where=name,
            found=f"every pair was left out:{table}",
            expected="pairs to train on",
            fix=(hints or {}).get(most, "mend the data, or its limits"),
        )


class PairReader:
    """The pairs of one side, training or held out, as an iterator; what was found on the way stands in the attributes.

    Iterating raises DataError at the start for an unknown format, and at the end for faults of a file (all of them at
    once), for more faulty rows in a set than data.max_bad_rows, and for a set of which nothing is left; HubError when
    the hub does not deliver. ``data.max_samples`` takes the first rows of each set, before anything is left out.
    """

    def __init__(self, data: DataSection, sources: Sequence[Source]) -> None:
        self.data, self.sources = data, sources
        self._map = data.columns
        self.detected: list[str] = []
        """For each set, the sentence that says which format was read, and why."""
        self.columns: list[dict[str, Any]] = []
        """For each set, its format, the columns that were ``read``, our name to theirs, and the others."""
        self.remarks = Counter[str]()
        """How many of the pairs hold what a person should look at, by the names of the figures."""
        self.rows: list[int] = []
        """For each set, the rows read."""
        self.drops = Drops()
        self.bad_rows: list[RowError] = []
        """The faults of the rows that are left out."""
        self._digest = hashlib.sha256()

    @property
    def read(self) -> int:
        """Rows read."""
        return sum(self.rows)

    @property
    def sha256(self) -> str:
        """Of what the pairs so far say, in order; where they were read from does not count."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Pair]:
        faults: list[DataError] = []
        kept = 0
        for source in self.sources:
            for pair in self._pairs(source, faults):
                if reason := pair.drop or _drop_reason(pair):
                    self.drops.add(reason, pair.where)
                else:
                    kept += 1
                    self.remarks.update(_remarks(pair))
                    self._digest.update(_content(pair))
                    yield pair
        raise_all(faults)
        if not kept:
            self.drops.raise_nothing_left(", ".join(source.name for source in self.sources))

    def find(self, place: str) -> tuple[Pair, str | None]:
        """The pair at a place, and why it would be left out, if it would. Raises DataError."""
        faults: list[DataError] = []
        near: list[Pair] = []
        alike: list[Pair] = []
        first = ""
        for source in self.sources:
            for pair in self._pairs(source, faults):
                first = first or pair.where
                if pair.where == place:
                    return pair, pair.drop or _drop_reason(pair)
                if place.endswith(f"/{pair.where}"):
                    near.append(pair)
                if pair.where.endswith(f"/{place}"):
                    alike.append(pair)
        if len(alike) > 1:
            raise DataError(
                where=place,
                found=f"no such row, but {len(alike)} that end so",
                expected="the whole place",
                fix=" or ".join(pair.where for pair in alike[:PLACES]),
            )
        if near := near or alike:
            pair = max(
                near, key=lambda pair: len(pair.where)
            )  # sub/p.jsonl:3 rather than p.jsonl:3
            return pair, pair.drop or _drop_reason(pair)
        raise_all(
            [
                fault
                for fault in [*self.bad_rows, *faults]
                if fault.where.partition(", field ")[0] == place
            ]
        )
        names = ", ".join(source.name for source in self.sources)
        limit = self.data.max_samples
        found = f"no such row in {names}" + (
            f", of which data.max_samples reads the first {limit:,}" if limit else ""
        )
        raise DataError(
            where=place,
            found=found,
            expected="a place as messages name it",
            fix=f"--row {first}, which is the first",
        )

    def _pairs(self, source: Source, faults: list[DataError]) -> Iterator[Pair]:
        """The pairs of one set, before any is left out; the faults of its rows in their order."""
        broken: list[
            DataError
        ] = []  # rows that cannot be read: those of the first rows are read before their turn
        rows = (
            (len(broken), place) for place in islice(source.rows(broken), self.data.max_samples)
        )
        looked_at = list(islice(rows, DETECTION_ROWS))
        first = [place for _, place in looked_at]
        if all(is_blank(value) for _, row in first for value in row.values()):
            raise_all([*faults, *broken])
            raise DataError(
                where=source.name,
                found="no rows" if not first else "no rows that hold anything",
                expected="at least one preference pair",
                fix="check data.dataset_name",
            )
        try:
            looked = [row for _, row in first]
            looked += first_rows_with(
                source, missing_columns(self.data, looked), self.data.max_samples
            )
            columns = present_columns(self.data, looked)
            listed = {ours: self._map[ours] for ours in columns}
            profile = [apply_column_map(row, listed) for row in looked]
            detected = self._detect(profile, columns)
            self._refuse_anothers(source, looked, columns, detected)
        except DataError as fault:
            raise_all([*faults, self._of_set(fault, source), *broken])
            raise
        named = f", in {source.name}" if len(self.sources) > 1 else ""
        self.detected.append("")
        self.columns.append({})
        self.rows.append(0)
        names = {key: None for row in looked for key in row}
        held = source_columns(listed, looked)
        self._say(f"{detected.sentence}{named}", detected, held, names)
        seen = {key for row in profile for key, value in row.items() if not is_blank(value)}
        moved, read = 0, 0
        bad: list[RowError] = []
        for before, (where, row) in chain(looked_at, rows):
            _sort(broken[moved:before], bad, faults)
            moved = before
            self.rows[-1] += 1
            mapped = apply_column_map(row, listed)
            if late := [
                key for key, value in mapped.items() if key not in seen and not is_blank(value)
            ]:
                seen.update(late)
                names.update(dict.fromkeys(row))
                try:
                    detected = self._detect_again(detected, profile, mapped, columns, late, where)
                except DataError as fault:
                    raise_all([*faults, self._of_set(fault, source)])
                    raise
                self._say(f"{detected.sentence}{named}", detected, held, names)
            try:
                blank = all(map(is_blank, mapped.values()))
                read += not blank
                yield Pair((), "", "", where, drop=BLANK) if blank else detected.read(mapped, where)
            except RowError as fault:
                bad.append(fault)
        _sort(broken[moved:], bad, faults)
        lost = sum(isinstance(fault, RowError) for fault in broken)
        self.rows[-1] += lost
        read += lost
        self._judge(bad, read, source, detected, faults)

    def _say(
        self,
        sentence: str,
        detected: Detected,
        held: Mapping[str, Collection[str]],
        names: Collection[str],
    ) -> None:
        """Note what is known by now of the set that is being read."""
        theirs = {ours: held.get(column, [column]) for ours, column in detected.columns.items()}
        others = [name for name in names if name not in chain.from_iterable(theirs.values())]
        read = {ours: " or ".join(columns) for ours, columns in theirs.items()}
        self.detected[-1] = sentence
        self.columns[-1] = {"format": sentence, "read": read, "not_read": others}

    def _detect_again(
        self,
        before: Detected,
        profile: Sequence[Row],
        row: Row,
        mapped: Mapping[str, str],
        late: Sequence[str],
        where: str,
    ) -> Detected:
        """What the set is, now that columns have turned up that the first rows did not have or left blank.

        Raises DataError where the rows before would have been read otherwise.
        """
        if not any(is_known(column) or value_type(row[column]) == "messages" for column in late):
            return before
        turned_up = f"{join_names(*late)} first {'holds' if len(late) == 1 else 'hold'} something at {where}"
        try:
            now = self._detect([*profile, row], mapped)
        except DataError as fault:
            raise DataError(
                where=fault.where,
                found=f"{fault.found}; {turned_up}",
                expected=fault.expected,
                fix=fault.fix,
            ) from None
        changed = {ours for ours, _ in before.columns.items() ^ now.columns.items()}
        if changed - LATER or before.columns.items() - now.columns.items():
            raise DataError(
                where="data.format",
                found=f"{turned_up}, and with that it is: {now.sentence}",
                expected=before.sentence,
                fix=Overrides(
                    {"data.format": before.name},
                    ", or leave the column out, or write it in every row",
                ),
            )
        return now

    def _detect(self, rows: Sequence[Row], mapped: Mapping[str, str]) -> Detected:
        plain = self.data.chat_template == "none"
        others = {
            ours: [name for name in names if name != mapped.get(ours)]
            for ours, names in self._map.items()
        }
        return detect_format(rows, name=self.data.format, mapped=mapped, plain=plain, others=others)

    def _of_set(self, fault: DataError, source: Source) -> DataError:
        """The same; of a fault of all rows, with the set's name: there may be others that are read well.

        Where a set's files are of different kinds, what would make one format of all of them would spoil some.
        """
        if not fault.where.startswith("data."):
            return fault
        fix = self._line_by_file(source)
        return DataError(
            where=f"{fault.where} of {source.name}",
            found=f"{fault.found}; its files hold rows of different kinds" if fix else fault.found,
            expected=fault.expected,
            fix=fix or fault.fix,
        )

    def _line_by_file(self, source: Source) -> str:
        """What names the files of a set one by one, each of its own format; "" where their first rows are alike."""
        parts = (
            source.parts() if source.name in self.data.names else ()
        )  # held-out pairs are one set
        kinds = []
        for part in parts:
            rows: list[Row] = []
            with suppress(DataError):
                rows = [
                    apply_column_map(row, self._map)
                    for _, row in islice(part.rows([]), DETECTION_ROWS)
                ]
            profile = ColumnProfile(rows, {}, plain=False)
            kinds.append({column: kind for column, kind in profile.types.items() if kind != "null"})
        if all(held == kinds[0] for held in kinds):
            return ""
        files = {source.name: source.paths()}
        line = names_line([file for name in self.data.names for file in files.get(name, [name])])
        return reworded(line, f"{line} reads each file in its own format")

    def _judge(
        self,
        bad: Sequence[RowError],
        read: int,
        source: Source,
        detected: Detected,
        faults: list[DataError],
    ) -> None:
        """Count the faulty rows of a set as left out; more than may be, or all of it, are a fault of the set."""
        for fault in bad:
            self.drops.add(FAULTY, f"{fault.where}: {fault.found}")
        self.bad_rows += bad
        if not bad or (
            len(bad) < read and len(bad) <= max(MAY_BE_BAD, self.data.max_bad_rows * read)
        ):
            return
        kinds: dict[tuple[str, str], list[RowError]] = {}
        for fault in bad:
            field = re.sub(r"\[\d+\]", "[]", fault.where.partition(", field ")[2])
            kinds.setdefault((field, fault.found), []).append(fault)
        most = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
        table = ""
        for (field, found), these in most[:SHOWN]:
            place = these[0].where.partition(", field ")[0]
            table += (
                f"\n  {len(these):>8,}  {f'field {field}: ' if field else ''}{found}, first {place}"
            )
        first = most[0][1][0]
        fix, line = first.fix, self._line_by_file(source)
        if line:
            fix = line
        elif len(bad) < read:
            share = math.ceil(1000 * len(bad) / read) / 1000
            fix = (
                Overrides({"data.max_bad_rows": share}, f" to leave them out; else {fix}")
                if share < 1
                else fix
            )
        elif detected.is_json:
            fix = Overrides(
                {"data.format": "explicit"}, f" to read the replies as texts; else {fix}"
            )
        elif self.data.format != "auto":
            fix = Overrides({"data.format": "auto"}, f", to find out which format fits; else {fix}")
        found = f"{len(bad):,} of {read:,} rows cannot be read:{table}"
        faults.append(DataError(where=source.name, found=found, expected=first.expected, fix=fix))

    def _refuse_anothers(
        self, source: Source, rows: Sequence[Row], mapped: Mapping[str, str], detected: Detected
    ) -> None:
        """Raise DataError for a set that is a pair by itself, of other columns than data.column_map names.

        The map was made for another set where this one has only a part of it, or alone has columns of our names: what
        it names would take the place of half of a pair, or of the whole.
        """
        lacking = self._map.keys() - mapped.keys()
        if not mapped or not (lacking or len(self.sources) > 1):
            return
        try:
            own = self._detect(rows, {})
        except DataError:
            return
        taken = {ours: mapped.get(column, column) for ours, column in detected.columns.items()}
        changed = {
            ours: column
            for ours, column in own.columns.items()
            if taken.get(ours, column) != column
        }
        if changed and (lacking or self._alone_has(source, changed)):
            took = join_names(*(taken[ours] for ours in changed))
            line = column_map_setting(
                {
                    ours: [*filter(None, [changed.get(ours)]), *names]
                    for ours, names in self._map.items()
                }
            )
            why, own_columns = "which this set alone has", join_names(*changed.values())
            fix = reworded(
                line, f"{line}; or, where {took} are the pair, leave {own_columns} out of this set"
            )
            if lacking:
                why = f"and no column here for {join_names(*sorted(lacking))}"
                fix = reworded(
                    line,
                    f"leave {took} out of this set; or, where no other has {own_columns}: {line}",
                )
            raise DataError(
                where="data.column_map",
                found=f"it takes {took} for {join_names(*changed)}, {why}",
                expected=f"all of the map, or nothing of it: {own.sentence}",
                fix=fix,
            )

    def _alone_has(self, source: Source, columns: Mapping[str, str]) -> bool:
        """The set has the columns under our own names, and no other set has any of these."""
        others = [
            row.keys()
            for other in self.sources
            if other is not source
            for _, row in islice(other.rows([]), 1)
        ]
        own = all(plain_name(column) == ours for ours, column in columns.items())
        return own and not any(keys & {*columns.values()} for keys in others)


def _sort(found: Sequence[DataError], bad: list[RowError], faults: list[DataError]) -> None:
    """Faults of rows to ``bad``, those of files to ``faults``."""
    for fault in found:
        (bad if isinstance(fault, RowError) else faults).append(fault)  # type: ignore[arg-type]


def _drop_reason(pair: Pair) -> str | None:
    if not pair.chosen.strip():
        return EMPTY_CHOSEN
    if not pair.rejected.strip():
        return EMPTY_REJECTED
    if pair.chosen == pair.rejected:
        return EQUAL
    asked = [turn["content"] for turn in pair.messages if turn["role"] != "system"]
    if not asked or not asked[-1].strip():
        return EMPTY_PROMPT
    return SAID_TWICE if any(one == other for one, other in pairwise(pair.messages)) else None


def _remarks(pair: Pair) -> list[str]:
    """The figures of ``statistics.COUNTED`` that a pair counts for, as it was read."""
    turns, replies = [turn["content"] for turn in pair.messages], (pair.chosen, pair.rejected)
    is_system = [turn["role"] == "system" for turn in pair.messages]
    held = {
        "repeated_prompts": any(
            _begins(reply, text) for text in {turns[-1], " ".join(turns)} for reply in replies
        ),
        "absent_texts": any(map(is_absent, (*replies, *(turns[:1] if is_system[0] else ())))),
        "empty_turns": any(
            not text.strip() for text, system in zip(turns, is_system, strict=True) if not system
        ),
        "beside_pairs": pair.has_unread,
    }
    return [name for name, holds in held.items() if holds]


def _begins(reply: str, text: str) -> bool:
    words = text.split()
    enough = 2 * (len(text) + 16)  # characters that hold as many words
    return bool(words) and reply[:enough].split()[: len(words)] == words


def _content(pair: Pair) -> bytes:
    content = [pair.messages, pair.prompt_text, pair.chosen, pair.rejected]
    return json.dumps(content, sort_keys=True).encode() + b"\n"
