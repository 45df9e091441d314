"""One local file to rows, each with its place: "pairs.jsonl:12", "table.parquet[11]". Everything streams but .json."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from orpo_lite.errors import DataError

Place = tuple[str, Mapping[str, Any]]  # where a row stands, and the row

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
MAX_ROW_BYTES = 16 << 20  # a longer line is a binary or a file without line ends, not a pair
MAX_JSON_BYTES = 1 << 30  # a .json is held in memory as a whole
PANDAS_INDEX = "Unnamed: 0"  # what pandas calls it when it reads the file again
MAX_COLUMN_NAME = 100  # characters; a longer one is a text
BLOCK = 1 << 20

# What a file may hold whatever its name says: its first bytes, what that is, and what to do.
LOOKALIKES = (
    (codecs.BOM_UTF16_LE, "UTF-16 text", "iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (b"\x1f\x8b", "a gzip file", "add .gz to its name"),
    (b"PK\x03\x04", "a zip file or a spreadsheet", "unpack it, or save it as csv"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "git lfs pull"),
)


@dataclass(frozen=True)
class File:
    """A local file of rows, and what the places call it."""

    path: Path
    label: str

    @property
    def kind(self) -> str:
        return kind_of(self.path.name)

    @property
    def zipped(self) -> bool:
        return self.path.suffix.lower() == ".gz"

    def open(self) -> IO[bytes]:
        return cast(IO[bytes], gzip.open(self.path) if self.zipped else self.path.open("rb"))


def kind_of(name: str) -> str:
    """The suffix in KINDS that a file name ends with, with or without .gz behind it; else ""."""
    bare = name.lower().removesuffix(".gz")
    kind = next((kind for kind in KINDS if bare.endswith(kind)), "")
    return "" if kind == ".parquet" and bare != name.lower() else kind  # parquet is compressed inside


def read_file(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Yield (place, row). A row that cannot be read goes to ``faults``; a file that cannot be is raised at once."""
    try:
        _refuse_lookalikes(file)
        yield from READERS[file.kind](file, faults)
    except BROKEN_GZIP:
        raise _broken_gzip(file.label) from None


def file_fingerprint(file: File) -> tuple[str, int]:
    """sha256 of the bytes as they are on disk, and about how many rows they are; 0: unknown."""
    _refuse_lookalikes(file)
    ends, last = Counter[bytes](), b""
    digest = hashlib.sha256()
    for block in blocks(file.path):
        digest.update(block)
        ends.update({end: block.count(end) for end in (b"\n", b"\r")})
        last = block[-1:]
    return digest.hexdigest(), _estimate(file, (ends[b"\n"] or ends[b"\r"]) + (last not in b"\r\n"))


def blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        yield from iter(lambda: raw.read(BLOCK), b"")


def _estimate(file: File, lines: int) -> int:
    if file.kind == ".parquet":
        with _parquet(file) as table:
            return int(table.metadata.num_rows)
    if file.zipped or (file.kind == ".json" and not _is_lines(file)):
        return 0
    return max(lines - 1, 0) if file.kind in (".csv", ".tsv") else lines  # less the header


# --- bytes to lines to text


def _refuse_lookalikes(file: File) -> None:
    with file.path.open("rb") as raw:
        start = raw.read(32)
    if file.zipped and start.startswith(b"\x1f\x8b"):
        try:
            with file.open() as stream:
                start = stream.read(32)
        except BROKEN_GZIP:
            raise _broken_gzip(file.label) from None
    for mark, found, remedy in LOOKALIKES:
        if start.startswith(mark):
            kind = f"{file.kind[1:]} in UTF-8" if file.kind != ".parquet" else "a parquet file"
            raise DataError(f"{file.label}:1", found, kind, remedy)


def _lines(file: File, *, quoted: bool) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends. ``quoted``: a quoted cell may hold line ends, as a JSON string may not."""
    number = 0
    with file.open() as stream:
        try:
            for line in _split(stream, quoted):
                number += 1
                if len(line) > MAX_ROW_BYTES:
                    found, expected = "a line without end", f"at most {MAX_ROW_BYTES >> 20} MiB a row"
                    raise DataError(f"{file.label}:{number}", found, expected, "one row a line, and text only")
                # Some editors write a mark at the start of the file.
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        except BROKEN_GZIP:
            raise _broken_gzip(f"{file.label}:{number + 1}") from None


def _split(stream: IO[bytes], quoted: bool) -> Iterator[bytes]:
    first = stream.readline(MAX_ROW_BYTES + 1)
    stream.seek(0)
    # Old spreadsheets for the Mac end lines with \r alone.
    if b"\r" in first.rstrip(b"\r\n") and (quoted or not first.endswith(b"\n")):
        with io.TextIOWrapper(stream, "latin-1", newline="\r") as text:  # a character a byte
            yield from (line.encode("latin-1") for line in iter(lambda: text.readline(MAX_ROW_BYTES + 1), ""))
    else:
        yield from iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b"")


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        before, number = line[: error.start].decode().rpartition("\n"), line[: error.start].count(b"\n") + 1
        found = f"byte 0x{line[error.start]:02x} at {_position(number, len(before[-1]) + 1)} is not UTF-8"
        raise DataError(where, found, "UTF-8 text", "iconv -f CP1252 -t UTF-8 OLD > NEW") from None


def _position(line: int, column: int) -> str:
    return f"column {column}" if line == 1 else f"line {line}, column {column}"


BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


def _broken_gzip(where: str) -> DataError:
    return DataError(where, "broken gzip, or its end is missing", "a whole gzip file", "copy or download it again")


# --- JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        key = f"the key {twice!r}" if len(twice) <= MAX_COLUMN_NAME else "a key"
        raise ValueError(f"{key} stands twice in one object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _json_fault(error: ValueError | RecursionError, where: str) -> DataError:
    """What the decoder raised, as a fault."""
    if isinstance(error, json.JSONDecodeError):
        found = f"broken JSON at {_position(error.lineno, error.colno)}: {error.msg}"
        return DataError(where, found, "one whole JSON object", "mend or remove the row; no line breaks inside it")
    return DataError(where, str(error), "plain JSON with each key once", "mend or remove the row")


def _jsonl_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    open_line = 0  # the line before, when its object does not end there
    first = True
    for number, line in _lines(file, quoted=False):
        if not line.strip():
            continue
        where = f"{file.label}:{number}"
        if first and line.lstrip().startswith(b"["):
            renamed = re.sub(r"(?i)\.jsonl", ".json", file.path.name)
            raise DataError(where, "a JSON array", "one JSON object a line", f"rename the file to {renamed}")
        if open_line and not line.startswith(b"{"):
            del faults[-1]  # one fault for all the lines of all the objects
            found = "a JSON object over several lines"
            raise DataError(f"{file.label}:{open_line}", found, "one JSON object a line", "jq -c . OLD > NEW")
        first, open_line = False, 0
        try:
            text = _decode(line.rstrip(), where).removeprefix("\ufeff")  # files with a mark may have been joined
            row = _DECODER.decode(text)
        except DataError as fault:
            faults.append(fault)
        except (ValueError, RecursionError) as error:
            faults.append(_json_fault(error, where))
            if isinstance(error, json.JSONDecodeError) and error.pos >= len(text) and text.startswith("{"):
                open_line = number
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                faults.append(_not_an_object(where, "one JSON object a line"))


def _not_an_object(where: str, expected: str) -> DataError:
    return DataError(where, "not a JSON object", expected, "mend or remove the row")


def _json_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """One array of objects, an object that holds one, or else the same as .jsonl."""
    if _is_lines(file):
        yield from _jsonl_rows(file, faults)
        return
    text = _whole_text(file)
    start = _skip_space(text, 0)
    items = _array_items(text, start + 1, file) if text[start : start + 1] == "[" else _held_list(text, file)
    if items is None:
        yield from _jsonl_rows(file, faults)
        return
    for i, row in enumerate(items):
        if isinstance(row, dict):
            yield f"{file.label}[{i}]", row
        else:
            faults.append(_not_an_object(f"{file.label}[{i}]", "an array of objects"))


def _is_lines(file: File) -> bool:
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
                found, expected = f"over {MAX_JSON_BYTES / 2**30:g} GiB", "a .json that fits in memory"
                raise DataError(file.label, found, expected, "use .jsonl: jq -c '.[]' OLD > NEW.jsonl")
    return _decode(b"".join(parts).removeprefix(codecs.BOM_UTF8), file.label)


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
    values = whole.values() if isinstance(whole, dict) else ()
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 else None


# --- tables


def _csv_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Every cell is text: a reader that guesses types would make a number of the reply "42"."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _lines(file, quoted=True)
    texts = dropwhile(lambda place: not place[1].strip(), ((n, _decode(ln, f"{file.label}:{n}")) for n, ln in lines))
    start, first = next(texts, (1, ""))
    above = start - 1  # blank lines before the header
    delimiter = "\t" if file.kind == ".tsv" else _delimiter(first)
    cells = csv.reader(chain([first], (text for _, text in texts)), delimiter=delimiter, strict=True)
    try:
        header = _header(next(cells, []), f"{file.label}:{start}")
        start = above + cells.line_num + 1
        for row in cells:
            where, start = f"{file.label}:{start}", above + cells.line_num + 1
            if len(row) == len(header):
                yield where, dict(zip(header, row, strict=True))
            elif row:
                expected, remedy = f"{len(header)} cells, as in the header", 'put "..." around {} and line ends'
                named = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}[delimiter]
                faults.append(DataError(where, f"{len(row)} cells", expected, remedy.format(named)))
    except csv.Error as error:
        remedy = 'put "..." around a cell with commas, quotes or line ends, and double the quotes inside'
        raise DataError(f"{file.label}:{start}", f"broken csv: {error}", "plain or quoted cells", remedy) from None


def _delimiter(header: str) -> str:
    """The comma, unless the header has none and something else: a spreadsheet in much of Europe writes semicolons."""
    others = [mark for mark in ";\t|" if mark in header]
    return "," if "," in header or not others else max(others, key=header.count)


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if names[:1] == [""] and len(names) > 1:  # an index that pandas wrote beside the columns
        names[0] = PANDAS_INDEX
    if any(not name or len(name) > MAX_COLUMN_NAME for name in names):
        found = "a first line with an empty cell or a long text"
        remedy = "write the names above the rows"
        raise DataError(where, found, "the first line should name the columns", remedy)
    _refuse_same_names(names, where)
    return names


def _refuse_same_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(where, "two columns of one name", "a name for each column", "rename one")


def _parquet_rows(file: File, _faults: list[DataError]) -> Iterator[Place]:
    from pyarrow import ArrowException  # type: ignore[import-untyped] # it comes with datasets

    with _parquet(file) as table:
        _refuse_same_names(table.schema_arrow.names, file.label)
        try:
            rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
            yield from ((f"{file.label}[{i}]", row) for i, row in enumerate(rows))
        except (OSError, ValueError, ArrowException) as error:
            raise _broken_parquet(file, error) from None


def _parquet(file: File) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        return ParquetFile(file.path)
    except (OSError, ValueError, ArrowException) as error:
        raise _broken_parquet(file, error) from None


def _broken_parquet(file: File, error: Exception) -> DataError:
    return DataError(file.label, f"broken parquet: {error}", "a whole parquet file", "copy it again")


READERS: dict[str, Callable[[File, list[DataError]], Iterator[Place]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
