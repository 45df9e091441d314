"""Rows of .jsonl and .json files, with the place of each fault."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from orpo_lite.data.pair import COLUMNS, NotJson
from orpo_lite.data.sources.lines import BLOCK, MAX_COLUMN_NAME, MAX_ROW_BYTES, File, Place, decode, lines, position
from orpo_lite.errors import DataError

MAX_JSON_BYTES = 1 << 30  # a .json is held in memory as a whole


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        key = f"the key {twice!r}" if len(twice) <= MAX_COLUMN_NAME else "a key"
        raise ValueError(f"{key} stands twice in one object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=NotJson)


def _json_fault(error: ValueError | RecursionError, where: str) -> DataError:
    """What the decoder raised, as a fault."""
    if isinstance(error, json.JSONDecodeError):
        rest = error.doc[error.pos :].strip() if error.msg == "Extra data" else ""
        said = "a comma behind the object" if rest == "," else error.msg
        return DataError(
            where=where,
            found=f"broken JSON at {position(error.lineno, error.colno)}: {said}",
            expected="one whole JSON object",
            fix="mend or remove the row; no line breaks inside it",
        )
    return DataError(
        where=where, found=str(error), expected="plain JSON with each key once", fix="mend or remove the row"
    )


def jsonl_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    first = True
    held = ""  # the line before, when its object does not end there
    for number, line in lines(file, quoted=False):
        if not line.strip():
            continue
        where, before, held = f"{file.label}:{number}", held, ""
        if first and line.lstrip().startswith(b"["):
            renamed = re.sub(r"(?i)\.jsonl", ".json", file.path.name)
            raise DataError(
                where=where,
                found="a JSON array",
                expected="one JSON object a line",
                fix=f"rename the file to {renamed}",
            )
        first = False
        try:
            text = decode(line.rstrip(), where).removeprefix("\ufeff")  # files with a mark may have been joined
        except DataError as fault:
            faults.append(fault)
            continue
        if before and not text.startswith("{") and _goes_on(f"{before}\n{text}"):
            start = faults.pop().where  # one fault for all the lines of all the objects
            raise DataError(
                where=start,
                found="a JSON object over several lines",
                expected="one JSON object a line",
                fix="jq -c . OLD > NEW",
            )
        try:
            row = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            faults.append(_json_fault(error, where))
            held = text if _breaks_off(error, text) else ""
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                faults.append(_not_an_object(where, "one JSON object a line"))


def _breaks_off(error: Exception, text: str) -> bool:
    """Whether an object is right as far as it goes, and only lacks its end."""
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(text) and text.startswith("{")


def _goes_on(text: str) -> bool:
    """Whether two lines are one object, or the start of one: a row cut short before other text is neither."""
    try:
        _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return _breaks_off(error, text)
    except (ValueError, RecursionError):
        return True  # a number or a key that we refuse, in an object all the same
    return True


def _not_an_object(where: str, expected: str) -> DataError:
    return DataError(where=where, found="not a JSON object", expected=expected, fix="mend or remove the row")


def json_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """One array of objects, an object that holds one, or else the same as .jsonl."""
    if is_lines(file):
        yield from jsonl_rows(file, faults)
        return
    text = _whole_text(file)
    start = _skip_space(text, 0)
    items = _array_items(text, start + 1, file) if text[start : start + 1] == "[" else _held_list(text, file)
    if items is None:
        yield from jsonl_rows(file, faults)
        return
    for i, row in enumerate(items):
        if isinstance(row, dict):
            yield f"{file.label}[{i}]", row
        else:
            faults.append(_not_an_object(f"{file.label}[{i}]", "an array of objects"))


def is_lines(file: File) -> bool:
    """Whether a .json holds an object on its first line and something after it."""
    with file.open() as stream:
        contents = (line for line in iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b"") if line.strip())
        first, second = next(contents, b""), next(contents, b"")
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):  # json's own and what is not UTF-8 are among these
        return False


def _whole_text(file: File) -> str:
    parts, size = [], 0
    with file.open() as stream:
        for part in iter(lambda: stream.read(BLOCK), b""):
            parts.append(part)
            size += len(part)
            if size > MAX_JSON_BYTES:
                raise DataError(
                    where=file.label,
                    found=f"over {MAX_JSON_BYTES / 2**30:g} GiB",
                    expected="a .json that fits in memory",
                    fix="use .jsonl: jq -c '.[]' OLD > NEW.jsonl",
                )
    return decode(b"".join(parts).removeprefix(codecs.BOM_UTF8), file.label)


def _array_items(text: str, at: int, file: File) -> Iterator[Any]:
    """The items one by one, so that a fault is placed at its own; ``at`` is behind the bracket that opens."""
    count, at = 0, _skip_space(text, at)
    try:
        while count or text[at : at + 1] != "]":  # an array that ends where an item should stand is a fault
            item, at = _DECODER.raw_decode(text, at)
            yield item
            count, at = count + 1, _skip_space(text, at)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip_space(text, at + 1)
        if (rest := _skip_space(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, f"{file.label}[{count}]") from None


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, at: int) -> int:
    return cast(re.Match[str], _SPACE.match(text, at)).end()


def _held_list(text: str, file: File) -> list[Any] | None:
    """The list of {"data": [...]}; None when the text is something else."""
    try:
        whole = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.lineno > 1 and error.msg != "Extra data":
            raise _json_fault(error, file.label) from None
        return None  # several objects: the lines will be judged one by one
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, file.label) from None
    values = list(whole.values()) if isinstance(whole, dict) else []
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    a_row = isinstance(whole, dict) and not whole.keys().isdisjoint(COLUMNS)  # by itself, with messages in it
    if len(lists) == 1 and not a_row:
        return lists[0]
    messages = any(not rows[0].keys().isdisjoint(("role", "from")) for rows in lists)
    if len(lists) == len(values) > 1 and not (a_row or messages):
        names = ", ".join(repr(name) for name in list(whole)[:5])
        fix = f"jq -c '.[\"{next(iter(whole))}\"][]' OLD > NEW.jsonl, and a file for each of the others"
        raise DataError(
            where=file.label, found=f"lists of rows under several names: {names}", expected="one list of rows", fix=fix
        )
    if _are_columns(values):
        fix = 'pandas.read_json(OLD, dtype=False).to_json("NEW.jsonl", orient="records", lines=True)'
        raise DataError(
            where=file.label,
            found="columns, each with the cells of all rows",
            expected="one JSON object a row",
            fix=fix,
        )
    return None


def _are_columns(values: list[Any]) -> bool:
    """Of {"prompt": ["a", ...], ...}, or {"prompt": {"0": "a", ...}, ...} as pandas writes a table by default.

    A row of its own may hold lists too: of messages, which are objects.
    """
    if not values or not values[0]:
        return False
    if all(isinstance(value, dict) for value in values):
        return all(value.keys() == values[0].keys() for value in values) and all(map(str.isdigit, values[0]))
    even = all(isinstance(value, list) and len(value) == len(values[0]) for value in values)
    return even and any(not isinstance(cell, dict) for value in values for cell in value)
