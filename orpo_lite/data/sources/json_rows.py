"""Rows of JSON: an object a line, or one array of objects, with the place of each fault."""

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
    Place,
    converted,
    lines,
    stem,
)
from orpo_lite.errors import DataError, reworded

MAX_JSON_BYTES = 1 << 30  # one array is held in memory as a whole


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        key = f"the key {twice!r}" if len(twice) <= MAX_COLUMN_NAME else "a key"
        raise ValueError(f"{key} appears twice in one object")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=NotJson)


def json_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Yield an object a line; or those of one array, of an object that holds one, or of columns."""
    first, value, more = _first_line(file)
    if (
        first
        and first[:1] not in b"[{"
        and file.path.name[len(stem(file.path.name)) :].lower().startswith(".txt")
    ):
        line = converted(file, "cat", ".csv")
        found, fix = (
            "a text that is not JSON",
            reworded(line, f"give it the suffix of its kind, such as: {line}"),
        )
        raise DataError(
            where=file.label, found=found, expected="one JSON object a line in a .txt", fix=fix
        )
    if more and isinstance(value, list):
        raise _array_a_line(len(value), file)
    if not is_lines(file):
        try:
            whole = DECODER.decode(_whole_text(file))
        except (ValueError, RecursionError) as error:
            in_first_line = isinstance(error, json.JSONDecodeError) and error.lineno == 1
            if first.startswith(b"[") or not in_first_line:
                raise _json_fault(error, file.label, file) from None
        else:
            yield from _objects(
                _unwrapped(_rows_within(whole, file), file, faults), "an array of objects", faults
            )
            return
    yield from _objects(_line_values(file, faults), "one JSON object a line", faults)


def _first_line(file: File) -> tuple[bytes, Any, bool]:
    """Return the first line that is not blank, what it holds or None, and whether another one follows."""
    with file.open() as stream:
        raw = iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b"")
        first = next(
            filter(None, (line.removeprefix(codecs.BOM_UTF8).strip() for line in raw)), b""
        )
        more = any(line.strip() for line in iter(lambda: stream.readline(BLOCK), b""))
    try:
        return first, json.loads(first), more
    except (ValueError, RecursionError):
        return first, None, more


def is_lines(file: File) -> bool:
    """Return whether the file is read line by line: .jsonl always, .json with an object on its first line and more."""
    first, value, more = _first_line(file)
    if file.kind == ".jsonl":
        return not first.startswith(b"[")
    return not first or (more and isinstance(value, dict))


def _line_values(file: File, faults: list[DataError]) -> Iterator[tuple[str, Any]]:
    for number, line in lines(file, faults):
        where = f"{file.label}:{number}"
        text = decode(line.rstrip(), file, where).removeprefix(
            "\ufeff"
        )  # files with a mark may have been joined
        if not text.strip():
            continue
        try:
            yield where, DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            faults.append(_json_fault(error, where, file))


def _unwrapped(
    items: Iterable[Any], file: File, faults: list[DataError]
) -> Iterator[tuple[str, Any]]:
    """Yield the items of an array, without what the hub's viewer wraps each of them in."""
    for i, item in enumerate(items):
        where, row = f"{file.label}[{i}]", item
        if isinstance(item, dict) and {"row_idx", "row", "truncated_cells"} <= item.keys():
            row = item["row"]
            if item["truncated_cells"]:
                found, fix = (
                    "cells that the viewer of the hub cut short",
                    "name the set itself in data.dataset_name",
                )
                faults.append(RowError(where=where, found=found, expected="whole cells", fix=fix))
                continue
        yield where, row


def _objects(
    values: Iterable[tuple[str, Any]], expected: str, faults: list[DataError]
) -> Iterator[Place]:
    for where, value in values:
        if isinstance(value, dict):
            yield where, value
        else:
            fix = "correct or remove the row"
            faults.append(
                DataError(where=where, found="not a JSON object", expected=expected, fix=fix)
            )


def _json_fault(error: ValueError | RecursionError, where: str, file: File) -> DataError:
    """Return what the decoder raised, as a fault."""
    fix = "correct or remove the row"
    if not isinstance(error, json.JSONDecodeError):
        return DataError(
            where=where, found=str(error), expected="plain JSON with each key once", fix=fix
        )
    rest = error.doc[error.pos :].strip() if error.msg == "Extra data" else ""
    begins = (
        error.pos >= len(error.doc) and where == f"{file.label}:1"
    )  # a later row that breaks off may be cut short
    if error.doc.startswith("{") and (begins or rest.startswith("{")):
        line = converted(file, "jq -c .", ".lines.jsonl")
        fix = reworded(line, f"{fix}; objects over several lines: {line}")
    found = f"broken JSON at {position(error.lineno, error.colno)}: "
    found += "a comma behind the object" if rest == "," else error.msg
    return DataError(
        where=where, found=found, expected="whole objects, each in one line of a .jsonl", fix=fix
    )


def _array_a_line(width: int, file: File) -> DataError:
    names = (
        ("prompt", "chosen", "rejected") if width == 3 else [f"column_{i}" for i in range(width)]
    )
    keys = ", ".join(f"{name}: .[{i}]" for i, name in enumerate(names))
    found, fix = (
        f"a JSON array a line, of {width} items",
        converted(file, f"jq -c '{{{keys}}}'", ".objects.jsonl"),
    )
    return DataError(
        where=f"{file.label}:1", found=found, expected="one JSON object a line", fix=fix
    )


def _whole_text(file: File) -> str:
    with file.open() as stream:
        parts = [*islice(iter(partial(stream.read, BLOCK), b""), MAX_JSON_BYTES // BLOCK + 1)]
    if sum(map(len, parts)) > MAX_JSON_BYTES:
        found, fix = (
            f"over {MAX_JSON_BYTES / 2**30:g} GiB",
            converted(file, "jq -c '.[]'", ".lines.jsonl"),
        )
        raise DataError(where=file.label, found=found, expected="one JSON object a line", fix=fix)
    return decode(b"".join(parts).removeprefix(codecs.BOM_UTF8), file, file.label)


def _rows_within(whole: Any, file: File) -> list[Any]:
    """Return the rows of an array, of {"data": [rows]} or of columns; else what the file holds is the only row."""
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    if {"features", "rows"} <= whole.keys() and isinstance(
        whole["rows"], list
    ):  # from the hub's viewer
        return whole["rows"]
    lists = [
        value
        for value in whole.values()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    is_row = not whole.keys().isdisjoint(COLUMNS)
    if len(lists) == 1 and not is_row:
        return lists[0]
    if whole and _are_columns([*whole.values()]):
        first = next(iter(whole.values()))
        places = (
            first if isinstance(first, dict) else range(len(first))
        )  # the keys of a column may be in any order
        return [{name: column[place] for name, column in whole.items()} for place in places]
    has_messages = any(not items[0].keys().isdisjoint(("role", "from")) for items in lists)
    if is_row or has_messages or not len(lists) == len(whole) > 1:
        return [whole]
    first = next(iter(whole))
    found = f"lists of rows under several names: {', '.join(map(repr, list(whole)[:5]))}"
    fix = converted(file, f"jq -c {shlex.quote(f'.[{json.dumps(first)}][]')}", ".first.jsonl")
    raise DataError(where=file.label, found=found, expected="one list of rows", fix=fix)


def _are_columns(values: list[Any]) -> bool:
    """Return whether it is {"prompt": ["a", ...], ...}, or {"prompt": {"0": "a", ...}, ...} as pandas writes a table.

    A row of its own may hold lists too: of messages, which are objects.
    """
    if all(isinstance(value, dict) and value for value in values):
        return all(value.keys() == values[0].keys() for value in values) and all(
            map(str.isdigit, values[0])
        )
    even = all(isinstance(value, list) and len(value) == len(values[0]) > 0 for value in values)
    return even and any(not isinstance(cell, dict) for value in values for cell in value)
