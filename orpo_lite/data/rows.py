"""Rows out of local files and hub sets, each with its place: "pairs.jsonl:12", "table.parquet[11]", "train[11]"."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from orpo_lite.data.formats import Row
from orpo_lite.errors import DataError, HubError

Place = tuple[str, Row]  # a row and where it stands

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MAX_ROW_BYTES = 16 << 20  # a longer line is a binary or a file without line ends, not a pair


def open_rows(name: str, split: str, config: str | None, faults: list[DataError]) -> Iterator[Place]:
    """Yield (place, row). A row that cannot be read goes to ``faults``; a file that cannot be is raised at once."""
    if not is_local(name):
        yield from _hub_rows(name, split, config)
        return
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        for path in _local_files(Path(name).expanduser(), split):
            yield from readers[path.suffix](path, faults)
    except OSError as error:
        raise DataError(name, str(error), "a file that can be read", "check its owner and permissions") from None


def is_local(name: str) -> bool:
    return is_path(name) or Path(name).exists()


def is_path(name: str) -> bool:
    return name.endswith(SUFFIXES) or name.startswith((".", "/", "~"))


def _local_files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                str(path), "an unknown kind of file", f"one of {', '.join(SUFFIXES)}", "convert or rename it"
            )
        return [path]
    if not path.is_dir():
        beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
        found = "no such file" if beside else f"no such file, and {path.parent} is not a folder"
        raise DataError(
            str(path), found, "a file or folder", f"did you mean {' or '.join(near)}?" if near else "check the path"
        )
    files = sorted(file for folder in (path, path / "data") for file in folder.glob("*") if file.suffix in SUFFIXES)
    chosen = [file for file in files if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.stem)]
    if not chosen and len(files) == 1 and split == "train":
        return files
    if not chosen:
        names = ", ".join(file.name for file in files) or "none"
        remedy = "data.dataset_train_split=SPLIT, data.dataset_test_split=SPLIT"
        raise DataError(str(path), f"no file of split {split!r}; files: {names}", f"{split}.jsonl or the like", remedy)
    return chosen


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), start=1):
            if len(line) > MAX_ROW_BYTES:
                found, expected = "a line without end", f"at most {MAX_ROW_BYTES >> 20} MiB a row"
                raise DataError(f"{path.name}:{number}", found, expected, "one row a line, and text only")
            yield number, line


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode().removeprefix("\ufeff")  # some editors write a mark at the start of the file
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        found = f"byte 0x{line[error.start]:02x} at column {column} is not UTF-8"
        raise DataError(where, found, "UTF-8 text", "iconv -f CP1252 -t UTF-8 OLD > NEW") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        remedy = "mend or remove the row; no line breaks inside it"
        raise DataError(where, f"broken JSON at {place}: {error.msg}", "one whole JSON object", remedy) from None
    except (ValueError, RecursionError) as error:
        raise DataError(where, str(error), "plain JSON with each key once", "mend or remove the row") from None


def _jsonl_rows(path: Path, faults: list[DataError]) -> Iterator[Place]:
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    for i, (number, line) in enumerate(lines):
        where = f"{path.name}:{number}"
        if i == 0 and line.lstrip().startswith(b"["):
            raise DataError(where, "a JSON array", "one JSON object a line", f"rename the file to {path.stem}.json")
        try:
            row = _parse_json(_decode(line.rstrip(), where), where)
            if not isinstance(row, dict):
                raise DataError(where, "not a JSON object", "one JSON object a line", "mend or remove the row")
        except DataError as fault:
            faults.append(fault)
        else:
            yield where, row


def _json_rows(path: Path, faults: list[DataError]) -> Iterator[Place]:
    """One array of objects, or else the same as .jsonl."""
    text = path.read_bytes()
    if text.lstrip()[:1] != b"[":
        yield from _jsonl_rows(path, faults)
        return
    for i, row in enumerate(_parse_json(_decode(text, path.name), path.name)):
        if not isinstance(row, dict):
            raise DataError(f"{path.name}[{i}]", "not a JSON object", "an array of objects", "mend or remove the row")
        yield f"{path.name}[{i}]", row


def _csv_rows(path: Path, faults: list[DataError]) -> Iterator[Place]:
    """Every cell is text: a reader that guesses types would make a number of the reply "42"."""
    csv.field_size_limit(MAX_ROW_BYTES)
    cells = csv.reader((_decode(line, f"{path.name}:{number}") for number, line in _lines(path)), strict=True)
    try:
        header = next(cells, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path.name}:1", "two columns of one name", "a name for each column", "rename one")
        if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
            found = f"one column, {header[0]!r}: separated by {mark!r}"
            raise DataError(f"{path.name}:1", found, "cells separated by commas", "save it again with commas")
        start = cells.line_num + 1
        for row in cells:
            where, start = f"{path.name}:{start}", cells.line_num + 1
            if len(row) == len(header):
                yield where, dict(zip(header, row, strict=True))
            elif row:
                expected = f"{len(header)} cells, as in the header"
                faults.append(DataError(where, f"{len(row)} cells", expected, 'put "..." around commas and line ends'))
    except csv.Error as error:
        remedy = 'put "..." around a cell with commas, quotes or line ends, and double the quotes inside'
        raise DataError(
            f"{path.name}:{cells.line_num}", f"broken csv: {error}", "plain or quoted cells", remedy
        ) from None


def _parquet_rows(path: Path, _faults: list[DataError]) -> Iterator[Place]:
    import pyarrow.parquet  # type: ignore[import-untyped] # it comes with datasets

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            yield from ((f"{path.name}[{i}]", row) for i, row in enumerate(rows))
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise DataError(str(path), f"broken parquet: {error}", "a whole parquet file", "copy it again") from None


def _hub_rows(name: str, split: str, config: str | None) -> Iterator[Place]:
    import datasets  # a second to import, and local files do not need it

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever a download can raise is the hub's or the network's
        lines = str(error).splitlines() or [type(error).__name__]
        raise HubError(f"data.dataset_name {name}", lines[0], f"split {split!r}", _hub_remedy(name, error)) from error
    yield from ((f"{split}[{i}]", row) for i, row in enumerate(rows))


def _hub_remedy(name: str, error: Exception) -> str:
    said = str(error).replace(name, "").lower()
    if "split" in said:
        return "data.dataset_train_split=SPLIT (or data.dataset_test_split) with a split of the set"
    if "config" in said:
        return "data.dataset_config=CONFIG with a configuration of the set"
    if any(word in said for word in ("gated", "401", "403", "private", "authenticat", "doesn't exist")):
        return f"open https://huggingface.co/datasets/{name}, ask for access if it is gated, then `hf auth login`"
    return f"check the network, or on a connected machine: hf download --repo-type dataset {name}"
