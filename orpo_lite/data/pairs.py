"""Read datasets row by row, and convert the rows to pairs of texts. No tokenizer is needed.

Pairs are filtered as in the ORPO paper, and pairs that are left out are counted. Rows are streamed.
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
    apply_column_map,
    column_map_setting,
    first_rows_with,
    missing_columns,
    present_columns,
    source_columns,
)
from orpo_lite.data.formats.columns import ColumnProfile
from orpo_lite.data.formats.detect import Detected, detect_format, is_known
from orpo_lite.data.formats.names import join_names, plain_name
from orpo_lite.data.formats.text import is_absent
from orpo_lite.data.formats.values import is_blank, value_type
from orpo_lite.data.pair import EMPTY_CHOSEN, EMPTY_REJECTED, Pair, Row, RowError
from orpo_lite.data.sources.source import Source, dataset_name_setting
from orpo_lite.errors import SHOWN, DataError, Overrides, raise_all, reworded
from orpo_lite.recipe.schema import DataSection

# Reasons to leave a pair out, in addition to the reasons in pair.py. From the paper, Appendix C:
EQUAL = "chosen and rejected are equal"
# Not from the paper: such a prompt asks for nothing, or was put together incorrectly.
EMPTY_PROMPT = "empty prompt"
BLANK = "blank row"
REPEATED_TURN = "the same turn twice in a row"
FAULTY = "a fault in the row"

# Columns that may be empty in some rows. Such rows are read in the same way as the others.
OPTIONAL_COLUMNS = {"system", "history", "input"}
MAX_PLACES = 3  # places that are kept for each reason to leave a pair out
ALLOWED_BAD_ROWS = 3  # rows with errors that are always allowed, whatever data.max_bad_rows is


class Drops:
    """Count the pairs left out for each reason, and keep the places of the first of these pairs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, reason: str, where: str) -> None:
        """Count one pair that is left out for ``reason``. ``where``: the place of its row."""
        self.counts[reason] += 1
        if self.counts[reason] <= MAX_PLACES:
            self.places.setdefault(reason, []).append(where)

    def raise_nothing_left(self, name: str, hints: Mapping[str, str] | None = None) -> NoReturn:
        """Raise DataError because all pairs were left out. ``hints``: reason -> fix."""
        table = "".join(
            f"\n  {count:>8}  {reason} (first {self.places[reason][0]})"
            for reason, count in self.counts.items()
        )
        most_frequent = self.counts.most_common(1)[0][0]
        raise DataError(
            where=name,
            found=f"every pair was left out:{table}",
            expected="pairs to train on",
            fix=(hints or {}).get(most_frequent, "correct the rows that the table lists"),
        )


class PairReader:
    """Iterate over the pairs of one split. The attributes hold counts and facts about the pairs.

    An unknown format raises DataError before the dataset's first pair. Errors in files, too many
    bad rows (``data.max_bad_rows``), or no pair left raise DataError after the last pair.
    At most ``data.max_samples`` rows of each dataset are read. A row that cannot be parsed does not
    count towards this limit. A row whose pair is left out counts.
    """

    def __init__(self, data: DataSection, sources: Sequence[Source]) -> None:
        self.data, self.sources = data, sources
        self._column_map = data.columns
        self.detected: list[str] = []
        """For each dataset, a sentence with the detected format and the reason."""
        self.columns: list[dict[str, Any]] = []
        """For each dataset: format, columns read (standard name -> column), columns not read."""
        self.remarks = Counter[str]()
        """Key of ``statistics.WARNINGS`` -> the number of pairs with this property."""
        self.rows: list[int] = []
        """For each dataset, the number of rows read."""
        self.drops = Drops()
        self.bad_rows: list[RowError] = []
        """The errors of the rows that are left out."""
        self._digest = hashlib.sha256()

    @property
    def read(self) -> int:
        """The number of rows read."""
        return sum(self.rows)

    @property
    def sha256(self) -> str:
        """One sha256 of the texts of all pairs yielded so far, in their order."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Pair]:
        faults: list[DataError] = []
        kept = 0
        for source in self.sources:
            for pair in self._pairs(source, faults):
                if reason := _reason_to_drop(pair):
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
        """Return the pair at ``place``, and the reason to leave out this pair (None: no reason).

        ``place`` may have fewer folders (p.csv:3 -> x/p.csv:3) or more (x/p.csv:3 -> p.csv:3).
        Raises DataError if no pair matches, or if ``place`` has too few folders to choose one.
        """
        faults: list[DataError] = []
        ends_of_place: list[Pair] = []
        ending_with_place: list[Pair] = []
        first = ""
        for source in self.sources:
            for pair in self._pairs(source, faults):
                first = first or pair.where
                if pair.where == place:
                    return pair, _reason_to_drop(pair)
                if place.endswith(f"/{pair.where}"):
                    ends_of_place.append(pair)
                if pair.where.endswith(f"/{place}"):
                    ending_with_place.append(pair)
        if len(ending_with_place) > 1:
            raise DataError(
                where=place,
                found=f"{len(ending_with_place)} rows in different folders match",
                expected="a place that matches only one row: add folders in front, as in x/p.csv:3",
                fix=" or ".join(pair.where for pair in ending_with_place[:MAX_PLACES]),
            )
        if similar := ends_of_place or ending_with_place:
            pair = max(similar, key=lambda pair: len(pair.where))  # prefers x/p.csv:3 to p.csv:3
            return pair, _reason_to_drop(pair)
        errors = [*self.bad_rows, *faults]
        raise_all([error for error in errors if error.where.partition(", field ")[0] == place])
        raise self._no_row(place, first)

    def _no_row(self, place: str, first: str) -> DataError:
        names = ", ".join(source.name for source in self.sources)
        limit = self.data.max_samples
        only = f" (data.max_samples reads only the first {limit:,} rows)" if limit else ""
        return DataError(
            where=place,
            found=f"no such row in {names}{only}",
            expected="a file and a line, such as pairs.csv:3",
            fix=f"--row {first} shows the first row",
        )

    def _pairs(self, source: Source, faults: list[DataError]) -> Iterator[Pair]:
        """Yield all pairs of one dataset, also those that will be left out.

        Errors of its files are added to ``faults``, in the order of the rows.
        """
        # Errors found while reading. The first rows are read in advance to detect the format, so
        # each row is stored with the number of errors found before it.
        broken: list[DataError] = []
        rows = ((len(broken), row) for row in islice(source.rows(broken), self.data.max_samples))
        first_rows = list(islice(rows, DETECTION_ROWS))
        examined = [row for _, (_, row) in first_rows]
        if all(is_blank(value) for row in examined for value in row.values()):
            raise_all([*faults, *broken])
            raise DataError(
                where=source.name,
                found="no rows" if not examined else "no rows with content",
                expected="at least one preference pair",
                fix="check data.dataset_name",
            )
        try:
            missing = missing_columns(self.data, examined)
            examined += first_rows_with(source, missing, self.data.max_samples)
            columns = present_columns(self.data, examined)
            column_map = {ours: self._column_map[ours] for ours in columns}
            mapped_rows = [apply_column_map(row, column_map) for row in examined]
            detected = self._detect(mapped_rows, columns)
            self._refuse_wrong_map(source, examined, columns, detected)
        except DataError as fault:
            raise_all([*faults, self._name_dataset(fault, source), *broken])
            raise
        suffix = f", in {source.name}" if len(self.sources) > 1 else ""
        self.detected.append("")
        self.columns.append({})
        self.rows.append(0)
        names = {key: None for row in examined for key in row}
        theirs = source_columns(column_map, examined)
        self._record(f"{detected.sentence}{suffix}", detected, theirs, names)
        filled = {key for row in mapped_rows for key, value in row.items() if not is_blank(value)}
        sorted_errors, read = 0, 0
        bad: list[RowError] = []
        for errors_before, (where, row) in chain(first_rows, rows):
            _sort(broken[sorted_errors:errors_before], bad, faults)
            sorted_errors = errors_before
            self.rows[-1] += 1
            mapped = apply_column_map(row, column_map)
            new = [
                key for key, value in mapped.items() if key not in filled and not is_blank(value)
            ]
            if new:
                filled.update(new)
                names.update(dict.fromkeys(row))
                try:
                    detected = self._detect_again(
                        detected, mapped_rows, mapped, columns, new, where
                    )
                except DataError as fault:
                    raise_all([*faults, self._name_dataset(fault, source)])
                    raise
                self._record(f"{detected.sentence}{suffix}", detected, theirs, names)
            if all(map(is_blank, mapped.values())):
                yield Pair((), "", "", where, drop=BLANK)
                continue
            read += 1
            try:
                yield detected.read(mapped, where)
            except RowError as fault:
                bad.append(fault)
        _sort(broken[sorted_errors:], bad, faults)
        unreadable = sum(isinstance(fault, RowError) for fault in broken)
        self.rows[-1] += unreadable
        self._check_bad_rows(bad, read + unreadable, source, detected, faults)

    def _record(
        self,
        sentence: str,
        detected: Detected,
        source_names: Mapping[str, Collection[str]],
        names: Collection[str],
    ) -> None:
        """Record the format and the columns of the dataset that is being read.

        ``source_names``: standard name -> columns of the dataset. ``names``: all its columns.
        """
        theirs = {
            ours: source_names.get(column, [column]) for ours, column in detected.columns.items()
        }
        others = [name for name in names if name not in chain.from_iterable(theirs.values())]
        read = {ours: " or ".join(columns) for ours, columns in theirs.items()}
        self.detected[-1] = sentence
        self.columns[-1] = {"format": sentence, "read": read, "not_read": others}

    def _detect_again(
        self,
        before: Detected,
        mapped_rows: Sequence[Row],
        row: Row,
        mapped: Mapping[str, str],
        new: Sequence[str],
        where: str,
    ) -> Detected:
        """Return the format after a row with the first values in some columns.

        Raises DataError if these columns change how the earlier rows would have been read.
        """
        if not any(is_known(column) or value_type(row[column]) == "messages" for column in new):
            return before
        change = f"the first row with a value in {join_names(*new)} is {where}"
        try:
            now = self._detect([*mapped_rows, row], mapped)
        except DataError as fault:
            raise DataError(
                where=fault.where,
                found=f"{fault.found}; {change}",
                expected=fault.expected,
                fix=fault.fix,
            ) from None
        changed = {ours for ours, _ in before.columns.items() ^ now.columns.items()}
        lost = before.columns.items() - now.columns.items()
        if changed - OPTIONAL_COLUMNS or lost:
            advice = ", or remove the column, or fill it in every row"
            raise DataError(
                where="data.format",
                found=f"{change}; with this column, the format would be: {now.sentence}",
                expected=before.sentence,
                fix=Overrides({"data.format": before.name}, advice),
            )
        return now

    def _detect(self, rows: Sequence[Row], mapped: Mapping[str, str]) -> Detected:
        is_plain = self.data.chat_template == "none"
        others = {
            ours: [name for name in names if name != mapped.get(ours)]
            for ours, names in self._column_map.items()
        }
        return detect_format(
            rows, name=self.data.format, mapped=mapped, plain=is_plain, others=others
        )

    def _name_dataset(self, fault: DataError, source: Source) -> DataError:
        """Return the error with the dataset's name added, if the error is about a setting.

        If the files of the dataset have different formats, the fix is to name each file as a
        dataset of its own, because a setting that fits one file would not fit the others.
        """
        if not fault.where.startswith("data."):
            return fault
        fix = self._setting_per_file(source)
        return DataError(
            where=f"{fault.where} of {source.name}",
            found=f"{fault.found}; the dataset's files differ in format" if fix else fault.found,
            expected=fault.expected,
            fix=fix or fault.fix,
        )

    def _setting_per_file(self, source: Source) -> str:
        """Return the data.dataset_name setting that makes each file of a dataset its own dataset.

        Returns "" if the first rows of all files have columns of the same types.
        """
        if source.name not in self.data.names:
            return ""  # held-out pairs are one dataset
        types = []
        for part in source.parts():
            rows: list[Row] = []
            with suppress(DataError):
                first_rows = islice(part.rows([]), DETECTION_ROWS)
                rows = [apply_column_map(row, self._column_map) for _, row in first_rows]
            profile = ColumnProfile(rows, {}, plain=False)
            types.append({name: held for name, held in profile.types.items() if held != "null"})
        if all(held == types[0] for held in types):
            return ""
        files: list[str] = []
        for name in self.data.names:
            files += source.paths() if name == source.name else [name]
        setting = dataset_name_setting(files)
        return reworded(setting, f"{setting} reads each file in its own format")

    def _check_bad_rows(
        self,
        bad: Sequence[RowError],
        read: int,
        source: Source,
        detected: Detected,
        faults: list[DataError],
    ) -> None:
        """Count rows with errors as left out. If there are too many, add an error to ``faults``."""
        for fault in bad:
            self.drops.add(FAULTY, f"{fault.where}: {fault.found}")
        self.bad_rows += bad
        allowed = max(ALLOWED_BAD_ROWS, self.data.max_bad_rows * read)
        if not bad or (len(bad) < read and len(bad) <= allowed):
            return
        by_error: dict[tuple[str, str], list[RowError]] = {}
        for fault in bad:
            field = re.sub(r"\[\d+\]", "[]", fault.where.partition(", field ")[2])
            by_error.setdefault((field, fault.found), []).append(fault)
        most_frequent = sorted(by_error.items(), key=lambda item: -len(item[1]))
        table = ""
        for (field, found), errors in most_frequent[:SHOWN]:
            place = errors[0].where.partition(", field ")[0]
            label = f"field {field}: " if field else ""
            table += f"\n  {len(errors):>8,}  {label}{found}, first {place}"
        first = most_frequent[0][1][0]
        fix = self._fix_bad_rows(first.fix, len(bad), read, source, detected)
        found = f"{len(bad):,} of {read:,} rows cannot be read:{table}"
        faults.append(DataError(where=source.name, found=found, expected=first.expected, fix=fix))

    def _fix_bad_rows(
        self, fix: str, bad: int, read: int, source: Source, detected: Detected
    ) -> str:
        """Return the fix for a dataset in which too many rows (``bad`` of ``read``) have errors.

        ``fix``: the fix for a row with the most frequent error.
        """
        if setting := self._setting_per_file(source):
            return setting
        if bad < read:
            share = math.ceil(1000 * bad / read) / 1000
            if share == 1:
                return fix
            return Overrides({"data.max_bad_rows": share}, f" to leave them out; else {fix}")
        if detected.is_json:
            advice = f" to read the replies as texts; else {fix}"
            return Overrides({"data.format": "explicit"}, advice)
        if self.data.format != "auto":
            return Overrides({"data.format": "auto"}, f", to detect the format; else {fix}")
        return fix

    def _refuse_wrong_map(
        self, source: Source, rows: Sequence[Row], mapped: Mapping[str, str], detected: Detected
    ) -> None:
        """Raise DataError if data.column_map is probably meant for another dataset than this one.

        Such a map would give wrong pairs. This is assumed if other columns hold pairs too, and if
        the dataset lacks some columns of the map or is the only one with columns that have standard
        names.
        """
        missing = self._column_map.keys() - mapped.keys()
        if not mapped or not (missing or len(self.sources) > 1):
            return
        try:
            own = self._detect(rows, {})
        except DataError:
            return
        used = {ours: mapped.get(column, column) for ours, column in detected.columns.items()}
        changed = {
            ours: column for ours, column in own.columns.items() if used.get(ours, column) != column
        }
        if not changed or not (missing or self._is_only_here(source, changed)):
            return
        wrong = join_names(*(used[ours] for ours in changed))
        own_columns = join_names(*changed.values())
        both = {
            ours: [changed[ours], *names] if ours in changed else [*names]
            for ours, names in self._column_map.items()
        }
        setting = column_map_setting(both)
        if missing:
            why = f"this dataset has no column for {join_names(*sorted(missing))}"
            fix = f"remove {wrong} from this dataset; or, if no other has {own_columns}: {setting}"
        else:
            why = f"only this dataset has {own_columns}"
            fix = f"{setting}; or, if {wrong} hold the pair, remove {own_columns} from this dataset"
        raise DataError(
            where="data.column_map",
            found=f"the map reads {join_names(*changed)} from {wrong}, but {why}",
            expected=f"all columns of the map, or none. Without the map: {own.sentence}",
            fix=reworded(setting, fix),
        )

    def _is_only_here(self, source: Source, columns: Mapping[str, str]) -> bool:
        """Return whether these columns have standard names that no other dataset has."""
        if not all(plain_name(column) == ours for ours, column in columns.items()):
            return False
        others = (other for other in self.sources if other is not source)
        first_rows = (row for other in others for _, row in islice(other.rows([]), 1))
        return not any(row.keys() & {*columns.values()} for row in first_rows)


def _sort(found: Sequence[DataError], bad: list[RowError], faults: list[DataError]) -> None:
    """Add errors of rows to ``bad`` and errors of files to ``faults``."""
    for fault in found:
        if isinstance(fault, RowError):
            bad.append(fault)
        else:
            faults.append(fault)


def _reason_to_drop(pair: Pair) -> str | None:
    if pair.drop:
        return pair.drop
    if not pair.chosen.strip():
        return EMPTY_CHOSEN
    if not pair.rejected.strip():
        return EMPTY_REJECTED
    if pair.chosen == pair.rejected:
        return EQUAL
    turns = [turn["content"] for turn in pair.messages if turn["role"] != "system"]
    if not turns or not turns[-1].strip():
        return EMPTY_PROMPT
    return REPEATED_TURN if any(one == other for one, other in pairwise(pair.messages)) else None


def _remarks(pair: Pair) -> list[str]:
    """Return the keys of ``statistics.WARNINGS`` that apply to a pair."""
    turns, replies = [turn["content"] for turn in pair.messages], (pair.chosen, pair.rejected)
    systems = [pair.messages[0]["content"]] if pair.messages[0]["role"] == "system" else []
    others = [turn["content"] for turn in pair.messages if turn["role"] != "system"]
    prompts = {turns[-1], " ".join(turns)}
    counts = {
        "repeated_prompts": any(_begins(reply, text) for text in prompts for reply in replies),
        "absent_texts": any(map(is_absent, (*replies, *systems))),
        "empty_turns": any(not text.strip() for text in others),
        "beside_pairs": pair.has_unread,
    }
    return [name for name, is_counted in counts.items() if is_counted]


def _begins(reply: str, text: str) -> bool:
    words = text.split()
    enough = 2 * (len(text) + 16)  # characters of the reply, enough for these words
    return bool(words) and reply[:enough].split()[: len(words)] == words


def _content(pair: Pair) -> bytes:
    content = [pair.messages, pair.prompt_text, pair.chosen, pair.rejected]
    return json.dumps(content, sort_keys=True).encode() + b"\n"
