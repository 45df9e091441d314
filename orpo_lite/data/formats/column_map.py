"""Apply data.column_map to rows: rename their columns to standard names.

Standard names are the names in ``COLUMNS``, such as prompt and chosen. Several datasets or files
may have different names for the same standard column.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn

from orpo_lite.data.formats.messages import normalize
from orpo_lite.data.formats.names import REPLIES, join_names
from orpo_lite.data.pair import COLUMNS, Row
from orpo_lite.data.sources.source import Source
from orpo_lite.errors import DataError, Overrides, reworded
from orpo_lite.recipe.schema import DataSection

DETECTION_ROWS = 100  # rows that the detection of the format examines


def apply_column_map(row: Row, column_map: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the row with standard names, and with all messages in the form {role, content}.

    ``column_map``: standard name -> possible columns. The first one that the row has is used.
    """
    out = {key: value for key, value in row.items() if key not in column_map}
    for ours, names in column_map.items():
        column = _first_present(names, row)
        if column is not None:
            out[ours] = row[column]
    return {key: normalize(value, key) for key, value in _lift_pair(out).items()}


def _lift_pair(row: Row) -> Row:
    """Return the row with the fields of a nested pair added: {"data": {"chosen": ...}}."""
    if row.keys() & {*REPLIES}:
        return row
    inner = [
        value for value in row.values() if isinstance(value, Mapping) and value.keys() >= {*REPLIES}
    ]
    return {**row, **inner[0]} if len(inner) == 1 else row


def _first_present(names: Sequence[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def source_columns(
    column_map: Mapping[str, Sequence[str]], rows: Sequence[Row]
) -> dict[str, list[str]]:
    """Return the columns that ``column_map`` selects in ``rows``: standard name -> columns.

    A standard name has several columns if the files of a folder use different names for it.
    """
    found: dict[str, list[str]] = {}
    for ours, names in column_map.items():
        firsts = dict.fromkeys(_first_present(names, row) for row in rows)
        found[ours] = [name for name in firsts if name is not None]
    return found


def present_columns(data: DataSection, rows: Sequence[Row]) -> dict[str, str]:
    """Return the columns of data.column_map that the rows have: {standard name: column}.

    If an entry names several columns, the first one that the rows have is returned. If the rows
    have none of them, the entry is left out. Example: the entry is prompt: [question, query], and
    the rows have only the column query -> {"prompt": "query"}.
    """
    columns = {key for row in rows for key in row}
    firsts = {ours: _first_present(names, columns) for ours, names in data.columns.items()}
    return {ours: first for ours, first in firsts.items() if first is not None}


def missing_columns(data: DataSection, rows: Sequence[Row]) -> set[str]:
    """Return the columns of data.column_map that are missing in these rows.

    An entry may name several columns: prompt: [question, query]. If the rows have none of these
    columns, both are returned. If the rows have one of these columns, neither is returned.
    """
    found = present_columns(data, rows)
    return {name for ours, names in data.columns.items() if ours not in found for name in names}


def first_rows_with(source: Source, missing: set[str], max_samples: int | None) -> list[Row]:
    """Return rows: for each column in ``missing``, the first row that has this column.

    If a row is the first one for several columns, the row is returned once. Only the first
    ``max_samples`` rows are searched (None: all rows).
    """
    columns = source.columns() if missing else None
    if columns is not None:
        missing = missing & columns  # do not search a whole table for a column that it lacks
    if not missing:
        return []
    found: list[Row] = []
    for _, row in islice(source.rows([]), max_samples):
        if missing & row.keys():
            found.append(row)
            missing = missing - row.keys()
            if not missing:
                break
    return found


def refuse_unknown_columns(data: DataSection, sources: Sequence[Source]) -> None:
    """Raise DataError if data.column_map names columns that are in none of these datasets.

    ``sources``: the training and the held-out datasets.
    """
    unknown = {name for names in data.columns.values() for name in names}
    found: dict[str, None] = {}
    for source in sources:
        if unknown:
            columns: Iterable[str] | None = source.columns()
            if columns is None:
                first_rows = islice(source.rows([]), DETECTION_ROWS)
                columns = [key for _, row in first_rows for key in row]
            found |= dict.fromkeys(columns)
            unknown -= found.keys()
    for source in sources if found else ():
        unknown -= {
            key for row in first_rows_with(source, unknown, data.max_samples) for key in row
        }
    if unknown:
        near = {name: difflib.get_close_matches(name, tuple(found), n=1) for name in unknown}
        corrected = {
            ours: [match for name in names for match in near.get(name, [name])]
            for ours, names in data.columns.items()
        }
        _refuse_names(unknown, tuple(found), corrected)


def check_column_map(column_map: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError for a key of data.column_map that is not a standard name."""
    unknown = [name for name in column_map if name not in COLUMNS]
    if not unknown:
        return
    if all(len(columns) == 1 and columns[0] in COLUMNS for columns in column_map.values()):
        swapped = {columns[0]: [theirs] for theirs, columns in column_map.items()}
        setting = column_map_setting(swapped)
        is_not = "is not a standard name" if len(unknown) == 1 else "are not standard names"
        raise DataError(
            where="data.column_map",
            found=f"{join_names(*unknown)} {is_not}",
            expected="first a standard name, then the dataset's column: chosen=good",
            fix=reworded(setting, f"swap the two names: {setting}"),
        )
    near = {name: difflib.get_close_matches(name, COLUMNS, n=1) for name in unknown}
    corrected = {
        ours: columns for key, columns in column_map.items() for ours in near.get(key, [key])
    }
    _refuse_names(unknown, COLUMNS, corrected)


def _refuse_names(
    names: Collection[str], options: Sequence[str], corrected: Mapping[str, Sequence[str]]
) -> NoReturn:
    """Raise DataError for names that do not exist.

    ``corrected``: data.column_map with each of the names replaced by the most similar existing
    name. Names without a similar one are left out.
    """
    setting = column_map_setting(corrected)
    has_entries = bool(setting.values["data.column_map"])
    raise DataError(
        where="data.column_map",
        found=f"unknown names: {', '.join(map(repr, sorted(names)))}",
        expected=f"some of these names: {', '.join(options)}",
        fix=reworded(setting, f"did you mean {setting}?")
        if has_entries
        else Overrides({"data.column_map": {}}),
    )


def column_map_setting(columns: Mapping[str, Sequence[str]]) -> Overrides:
    """Return a data.column_map setting for ``columns``, quoted for a shell.

    The value has the short form chosen=good,rejected=bad. If a column's name does not fit in this
    form, for example because it contains a comma, the value is a YAML mapping.

    ``columns``: standard name -> the column, or the columns of several datasets.
    """
    named = {ours: names for ours, names in columns.items() if names}
    entries = [(ours, column) for ours, names in named.items() for column in names]
    if all(_fits_short_form(column) for _, column in entries):
        value = ",".join(f"{ours}={column}" for ours, column in entries)
    else:
        items = []
        for ours, names in named.items():
            quoted = ", ".join(map(_quote_yaml, names))
            items.append(f'"{ours}": [{quoted}]' if len(names) > 1 else f'"{ours}": {quoted}')
        value = "{" + ", ".join(items) + "}"
    data = {ours: names[0] if len(names) == 1 else [*names] for ours, names in named.items()}
    return Overrides({"data.column_map": data}, text=shlex.quote(f"data.column_map={value}"))


def _fits_short_form(column: str) -> bool:
    return column.isprintable() and column == column.strip() and not set(column) & set(",=")


def _quote_yaml(text: str) -> str:
    """Quote a text with YAML's double quotes, which have an escape for every character."""
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(escaped)}"'
