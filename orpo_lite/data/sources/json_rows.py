"""Read rows from JSON files: one object per line, or all rows in one JSON value."""

from __future__ import annotations

import codecs
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from orpo_lite.data.pair import COLUMNS, NotJson, RowError
from orpo_lite.data.sources.encoding import decode, position
from orpo_lite.data.sources.lines import (
    BLOCK,
    MAX_COLUMN_NAME,
    MAX_ROW_BYTES,
    File,
    PlacedRow,
    conversion_command,
    lines,
    stem,
)
from orpo_lite.errors import DataError, reworded

MAX_JSON_BYTES = 1 << 30  # a whole array is held in memory


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        key = f"the key {twice!r}" if len(twice) <= MAX_COLUMN_NAME else "a key"
        raise ValueError(f"{key} appears twice in one object")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_refuse_repeated_keys, parse_constant=NotJson)


def json_rows(file: File, faults: list[DataError]) -> Iterator[PlacedRow]:
    """Yield (place, row) for each row of a JSON file.

    A file may hold one object per line, an array of objects, an object that contains such an array,
    or an object of columns: {"prompt": [...], "chosen": [...]}. Errors of rows are added to
    ``faults``. Raises DataError for a file that cannot be read at all.
    """
    first, value, has_more = _first_line(file)
    _refuse_other_text(first, file)
    if has_more and isinstance(value, list):
        raise _array_a_line(len(value), file)
    if not is_lines(file):
        try:
            whole = DECODER.decode(_whole_text(file))
        except (ValueError, RecursionError) as error:
            is_in_first_line = isinstance(error, json.JSONDecodeError) and error.lineno == 1
            if first.startswith(b"[") or not is_in_first_line:
                raise _json_error(error, file.label, file) from None
            # The file may have one object per line.
        else:
            items = _without_viewer_wrapper(_rows_within(whole, file), file, faults)
            yield from _objects(items, "an array of objects", faults)
            return
    yield from _objects(_line_values(file, faults), "one JSON object per line", faults)


def _refuse_other_text(first: bytes, file: File) -> None:
    """Raise DataError for a .txt file that is not JSON."""
    suffix = file.path.name[len(stem(file.path.name)) :].lower()
    if suffix.startswith(".txt") and first and first[:1] not in b"[{":
        command = conversion_command(file, "cat", ".csv")
        raise DataError(
            where=file.label,
            found="a text that is not JSON",
            expected="one JSON object per line in a .txt file",
            fix=reworded(command, f"use the suffix of the real type, for example: {command}"),
        )


def _first_line(file: File) -> tuple[bytes, Any, bool]:
    """Return the first nonblank line, its JSON value or None, and whether other lines follow."""
    first, has_more = b"", False
    with file.open() as stream:
        for line in iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b""):
            first = line.removeprefix(codecs.BOM_UTF8).strip()
            if first:
                break
        has_more = any(line.strip() for line in iter(lambda: stream.readline(BLOCK), b""))
    try:
        return first, json.loads(first), has_more
    except (ValueError, RecursionError):
        return first, None, has_more


def is_lines(file: File) -> bool:
    """Return whether the file is read line by line.

    A .jsonl file is read line by line unless it begins with an array. A .json file is read line by
    line if its first line is an object and more lines follow.
    """
    first, value, has_more = _first_line(file)
    if file.suffix == ".jsonl":
        return not first.startswith(b"[")
    return not first or (has_more and isinstance(value, dict))


def _line_values(file: File, faults: list[DataError]) -> Iterator[tuple[str, Any]]:
    for number, line in lines(file, faults):
        where = f"{file.label}:{number}"
        # Files with a byte order mark may have been concatenated.
        text = decode(line.rstrip(), file, where).removeprefix("\ufeff")
        if not text.strip():
            continue
        try:
            yield where, DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            faults.append(_json_error(error, where, file))


def _without_viewer_wrapper(
    items: Iterable[Any], file: File, faults: list[DataError]
) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) for an array. If the hub's viewer wrapped the items, unwrap them."""
    for i, item in enumerate(items):
        where, row = f"{file.label}[{i}]", item
        if isinstance(item, dict) and {"row_idx", "row", "truncated_cells"} <= item.keys():
            row = item["row"]
            if item["truncated_cells"]:
                fault = RowError(
                    where=where,
                    found="cells that the viewer of the hub truncated",
                    expected="complete cells",
                    fix="set data.dataset_name to the name of the dataset on the hub",
                )
                faults.append(fault)
                continue
        yield where, row


def _objects(
    values: Iterable[tuple[str, Any]], expected: str, faults: list[DataError]
) -> Iterator[PlacedRow]:
    for where, value in values:
        if isinstance(value, dict):
            yield where, value
        else:
            found, fix = "not a JSON object", "correct or remove the row"
            faults.append(DataError(where=where, found=found, expected=expected, fix=fix))


def _json_error(error: ValueError | RecursionError, where: str, file: File) -> DataError:
    """Return the DataError for an error of the decoder."""
    fix = "correct or remove the row"
    if not isinstance(error, json.JSONDecodeError):
        expected = "JSON with each key only once in an object"
        return DataError(where=where, found=str(error), expected=expected, fix=fix)
    rest = error.doc[error.pos :].strip() if error.msg == "Extra data" else ""
    # An incomplete object in line 1 probably continues in line 2. Later lines may be truncated.
    continues = error.pos >= len(error.doc) and where == f"{file.label}:1"
    if error.doc.startswith("{") and (continues or rest.startswith("{")):
        command = conversion_command(file, "jq -c .", ".lines.jsonl")
        fix = reworded(command, f"{fix}; if an object spans several lines: {command}")
    message = "a comma after the object" if rest == "," else error.msg
    return DataError(
        where=where,
        found=f"broken JSON at {position(error.lineno, error.colno)}: {message}",
        expected="complete objects, one per line in a .jsonl file",
        fix=fix,
    )


def _array_a_line(width: int, file: File) -> DataError:
    names = [f"column_{i}" for i in range(width)]
    if width == 3:
        names = ["prompt", "chosen", "rejected"]
    keys = ", ".join(f"{name}: .[{i}]" for i, name in enumerate(names))
    return DataError(
        where=f"{file.label}:1",
        found=f"one JSON array per line, with {width} items",
        expected="one JSON object per line",
        fix=conversion_command(file, f"jq -c '{{{keys}}}'", ".objects.jsonl"),
    )


def _whole_text(file: File) -> str:
    with file.open() as stream:
        parts = [*islice(iter(partial(stream.read, BLOCK), b""), MAX_JSON_BYTES // BLOCK + 1)]
    if sum(map(len, parts)) > MAX_JSON_BYTES:
        raise DataError(
            where=file.label,
            found=f"one JSON value of more than {MAX_JSON_BYTES / 2**30:g} GiB",
            expected="one JSON object per line",
            fix=conversion_command(file, "jq -c '.[]'", ".lines.jsonl"),
        )
    return decode(b"".join(parts).removeprefix(codecs.BOM_UTF8), file, file.label)


def _rows_within(whole: Any, file: File) -> list[Any]:
    """Return the rows in a JSON value: an array, {"data": [rows]}, a table as columns, or a row."""
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    if {"features", "rows"} <= whole.keys() and isinstance(whole["rows"], list):
        return whole["rows"]  # from the hub's viewer
    lists = [
        value
        for value in whole.values()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    is_row = not whole.keys().isdisjoint(COLUMNS)
    if len(lists) == 1 and not is_row:
        return lists[0]
    if whole and _are_columns([*whole.values()]):
        return _rows_of_columns(whole)
    has_messages = any(not items[0].keys().isdisjoint(("role", "from")) for items in lists)
    are_all_lists = len(lists) == len(whole) > 1
    if is_row or has_messages or not are_all_lists:
        return [whole]
    first = next(iter(whole))
    query = shlex.quote(f".[{json.dumps(first)}][]")
    raise DataError(
        where=file.label,
        found=f"several lists of rows, under the keys {', '.join(map(repr, list(whole)[:5]))}",
        expected="one list of rows",
        fix=conversion_command(file, f"jq -c {query}", ".first.jsonl"),
    )


def _are_columns(values: list[Any]) -> bool:
    """Return whether these values of an object are the columns of a table.

    The object is {"prompt": ["a", ...], ...}, or {"prompt": {"0": "a", ...}, ...} as pandas writes
    it. If the object is a single row, its lists hold messages, which are objects.
    """
    first = values[0]
    if all(isinstance(value, dict) and value for value in values):
        have_same_keys = all(value.keys() == first.keys() for value in values)
        return have_same_keys and all(map(str.isdigit, first))
    if not all(isinstance(value, list) and len(value) == len(first) > 0 for value in values):
        return False
    return any(not isinstance(cell, dict) for value in values for cell in value)


def _rows_of_columns(columns: dict[str, Any]) -> list[dict[str, Any]]:
    first = next(iter(columns.values()))
    # The keys of a column may be in any order.
    places = first if isinstance(first, dict) else range(len(first))
    return [{name: column[place] for name, column in columns.items()} for place in places]
