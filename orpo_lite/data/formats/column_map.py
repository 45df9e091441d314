"""data.column_map on rows: which columns hold ours, in sets and files that name them differently."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NoReturn

from orpo_lite.data.formats.columns import map_line
from orpo_lite.data.formats.messages import normal
from orpo_lite.data.formats.names import SIDES, shown
from orpo_lite.data.pair import COLUMNS, Row
from orpo_lite.data.sources.source import Source
from orpo_lite.errors import DataError, Overrides, reworded
from orpo_lite.recipe.schema import DataSection

LOOK = 100  # rows that detection looks at


def mapped_row(row: Row, column_map: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row under our names, texts and messages in one form.

    Of several columns that may hold one of ours, it has the first that it has at all.
    """
    taken = {ours: row[column] for ours, names in column_map.items() if (column := _first(names, row)) is not None}
    mapped = {key: value for key, value in row.items() if key not in column_map} | taken
    return {key: normal(value, key) for key, value in _lifted(mapped).items()}


def _lifted(row: Row) -> Row:
    """The row with what stands in an object, where the pair is within one: {"data": {"prompt": ..., ...}}."""
    inside = [value for value in row.values() if isinstance(value, Mapping) and value.keys() >= {*SIDES}]
    return {**row, **inside[0]} if len(inside) == 1 and not row.keys() & {*SIDES} else row


def _first(names: Sequence[str], row: Row) -> str | None:
    return next((name for name in names if name in row), None)


def held_columns(column_map: Mapping[str, Sequence[str]], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The columns from which these rows have ours: more than one where a folder has files of different names."""
    firsts = {ours: dict.fromkeys(_first(names, row) for row in rows) for ours, names in column_map.items()}
    return {ours: [name for name in names if name is not None] for ours, names in firsts.items()}


def found_columns(data: DataSection, rows: Sequence[Row]) -> dict[str, str]:
    """What data.column_map says of the set of these rows: our name to the column, where it has one."""
    found = {key for row in rows for key in row}
    firsts = ((ours, next((name for name in names if name in found), None)) for ours, names in data.columns.items())
    return {ours: first for ours, first in firsts if first is not None}


def lacking_columns(data: DataSection, rows: Sequence[Row]) -> set[str]:
    """The columns that data.column_map names, for those of our names of which these rows have none."""
    found = found_columns(data, rows)
    return {name for ours, names in data.columns.items() if ours not in found for name in names}


def first_with(source: Source, lacking: set[str], max_samples: int | None) -> list[Row]:
    """The first rows that have these columns, as far as the set has them at all."""
    if lacking and (columns := source.columns()) is not None:
        lacking = lacking & columns  # else a table would be read whole for what its head says it does not have
    found: list[Row] = []
    for _, row in islice(source.rows([]), max_samples if lacking else 0):
        if lacking & row.keys():
            found.append(row)
            lacking = lacking - row.keys()
            if not lacking:
                break
    return found


def refuse_unknown_columns(data: DataSection, sources: Sequence[Source]) -> None:
    """Raise DataError for a column that data.column_map names and that none of the sets has, held-out ones included."""
    unknown = {name for names in data.columns.values() for name in names}
    found: dict[str, None] = {}
    for source in sources:
        if unknown:
            columns = source.columns()
            rows = [] if columns is not None else [row for _, row in islice(source.rows([]), LOOK)]
            found |= dict.fromkeys([*(columns or ()), *(key for row in rows for key in row)])
            unknown -= found.keys()
    for source in sources if found else ():  # sets without rows have a message of their own
        unknown -= {key for row in first_with(source, unknown, data.max_samples) for key in row}
    if unknown:
        near = {name: difflib.get_close_matches(name, tuple(found), n=1) for name in unknown}
        _raise_unknown(
            unknown, tuple(found), {k: [*chain(*(near.get(v, [v]) for v in vs))] for k, vs in data.columns.items()}
        )


def check_mapped(column_map: Mapping[str, Sequence[str]]) -> None:
    if unknown := [name for name in column_map if name not in COLUMNS]:
        if all(len(columns) == 1 and columns[0] in COLUMNS for columns in column_map.values()):
            line = map_line({columns[0]: [theirs] for theirs, columns in column_map.items()})
            raise DataError(
                where="data.column_map",
                found=f"{shown(*unknown)} {'is' if len(unknown) == 1 else 'are'} not among our names",
                expected="OURS=THEIRS",
                fix=reworded(line, f"turn it round: {line}"),
            )
        near = {name: difflib.get_close_matches(name, COLUMNS, n=1) for name in unknown}
        _raise_unknown(unknown, COLUMNS, {ours: vs for k, vs in column_map.items() for ours in near.get(k, [k])})


def _raise_unknown(names: Collection[str], options: Sequence[str], near: Mapping[str, Sequence[str]]) -> NoReturn:
    """Refuse names, with the map of those that are there and most like them; ``near`` lacks what is like none."""
    line = map_line(near)
    raise DataError(
        where="data.column_map",
        found=f"no {' and no '.join(map(repr, sorted(names)))}",
        expected=f"names among {', '.join(options)}",
        fix=reworded(line, f"did you mean {line}?")
        if line.values["data.column_map"]
        else Overrides({"data.column_map": {}}),
    )
