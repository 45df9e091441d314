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
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import IO, Any, cast

from orpo_lite.data.readers import COLUMNS, NotJson
from orpo_lite.errors import DataError

Place = tuple[str, Mapping[str, Any]]  # where a row stands, and the row

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
MAX_ROW_BYTES = 16 << 20  # a longer line is a binary or a file without line ends, not a pair
MAX_JSON_BYTES = 1 << 30  # a .json is held in memory as a whole
PANDAS_INDEX = "Unnamed: 0"  # what pandas calls it when it reads the file again
MAX_COLUMN_NAME = 100  # characters; a longer one is a text
BLOCK = 1 << 20

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
EXCEL_SEP = re.compile(r"sep=([,;\t|])\s*$", re.IGNORECASE)  # the first line that Excel writes and reads
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # in the name of a column they would command the terminal
SPACED_QUOTE = re.compile(' +"')

# What a file may hold whatever its name says: its first bytes, what that is, and what to do.
LOOKALIKES = (
    (codecs.BOM_UTF32_LE, "UTF-32 text", "iconv -f UTF-32 -t UTF-8 OLD > NEW"),  # it begins as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "UTF-32 text", "iconv -f UTF-32 -t UTF-8 OLD > NEW"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (b"\x1f\x8b", "a gzip file", "add .gz to its name"),
    (b"PK\x03\x04", "a zip file or a spreadsheet", "unpack it, or save it as csv"),
    (b"PAR1", "a parquet file", "name it .parquet"),
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


def column_names(file: File) -> frozenset[str]:
    """The columns of a table; none for the other kinds, and none for a table that cannot be read."""
    try:
        _refuse_lookalikes(file)
        if file.kind == ".parquet":
            with _parquet(file) as table:
                return frozenset(table.schema_arrow.names)
        if file.kind in (".csv", ".tsv"):
            start, cells = next(_records(file, *_reading(file)), (1, []))
            return frozenset(_header(cells, f"{file.label}:{start}"))
    except (DataError, OSError, *BROKEN_GZIP):
        pass  # whoever reads it will say so
    return frozenset()


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
    for mark, found, fix in LOOKALIKES:
        if start.startswith(mark) and not (mark == b"PAR1" and file.kind == ".parquet"):
            kind = f"{file.kind[1:]} in UTF-8" if file.kind != ".parquet" else "a parquet file"
            raise DataError(where=f"{file.label}:1", found=found, expected=kind, fix=fix)
    if file.kind != ".parquet" and (order := _utf16_order(start)):
        fix = f"iconv -f UTF-16{order} -t UTF-8 OLD > NEW"
        raise DataError(where=f"{file.label}:1", found="UTF-16 text", expected=f"{file.kind[1:]} in UTF-8", fix=fix)


def _utf16_order(start: bytes) -> str:
    """LE or BE when every other byte of the start is NUL, as in UTF-16 without a mark; else ""."""
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if len(start) < 4 or max(even, odd) < len(start) // 4 or min(even, odd):
        return ""
    return "LE" if odd else "BE"


def _lines(file: File, *, quoted: bool) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends. ``quoted``: a quoted cell may hold line ends, as a JSON string may not."""
    number = 0
    with file.open() as stream:
        try:
            for line in _split(stream, quoted):
                number += 1
                if len(line) > MAX_ROW_BYTES:
                    found, expected = "a line without end", f"at most {MAX_ROW_BYTES >> 20} MiB a row"
                    raise DataError(
                        where=f"{file.label}:{number}",
                        found=found,
                        expected=expected,
                        fix="one row a line, and text only",
                    )
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
        raise DataError(
            where=where, found=found, expected="UTF-8 text", fix="iconv -f CP1252 -t UTF-8 OLD > NEW"
        ) from None


def _position(line: int, column: int) -> str:
    return f"column {column}" if line == 1 else f"line {line}, column {column}"


BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


def _broken_gzip(where: str) -> DataError:
    return DataError(
        where=where,
        found="broken gzip, or its end is missing",
        expected="a whole gzip file",
        fix="copy or download it again",
    )


# --- JSON


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
        found = f"broken JSON at {_position(error.lineno, error.colno)}: {said}"
        return DataError(
            where=where,
            found=found,
            expected="one whole JSON object",
            fix="mend or remove the row; no line breaks inside it",
        )
    return DataError(
        where=where, found=str(error), expected="plain JSON with each key once", fix="mend or remove the row"
    )


def _jsonl_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    first = True
    held = ""  # the line before, when its object does not end there
    for number, line in _lines(file, quoted=False):
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
            text = _decode(line.rstrip(), where).removeprefix("\ufeff")  # files with a mark may have been joined
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
                raise DataError(
                    where=file.label, found=found, expected=expected, fix="use .jsonl: jq -c '.[]' OLD > NEW.jsonl"
                )
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


# --- tables


def _csv_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Every cell is text: a reader that guesses types would make a number of the reply "42"."""
    delimiter, spaced = _reading(file)
    records = _records(file, delimiter, spaced)
    start, titles = next(records, (1, []))
    header = _header(titles, f"{file.label}:{start}")
    for number, cells in records:
        where, unnamed = f"{file.label}:{number}", cells[len(header) :]
        if not len(header) <= len(cells) <= len(titles):
            expected, fix = f"{len(titles)} cells, as in the header", 'put "..." around {} and line ends'
            faults.append(
                DataError(
                    where=where, found=f"{len(cells)} cells", expected=expected, fix=fix.format(DELIMITERS[delimiter])
                )
            )
        elif any(cell.strip() for cell in unnamed):
            found, fix = "a cell in a column without a name", f"name it in line {start}, or clear the cell"
            faults.append(
                DataError(where=where, found=found, expected="the first line should name the columns", fix=fix)
            )
        else:
            yield where, dict(zip(header, cells, strict=False))


def _records(file: File, delimiter: str, spaced: bool) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows, each with the line it starts at."""
    csv.field_size_limit(MAX_ROW_BYTES)
    texts = dropwhile(lambda place: not place[1].strip() or bool(EXCEL_SEP.match(place[1])), _texts(file))
    start, first = next(texts, (1, ""))
    above = start - 1
    lines = chain([first], (text for _, text in texts))
    records = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        for cells in records:
            if cells:
                yield start, cells
            start = above + records.line_num + 1
    except csv.Error as error:
        fix = 'put "..." around a cell with commas, quotes or line ends, and double the quotes inside'
        raise DataError(
            where=f"{file.label}:{start}", found=f"broken csv: {error}", expected="plain or quoted cells", fix=fix
        ) from None


def _texts(file: File) -> Iterator[tuple[int, str]]:
    yield from ((number, _decode(line, f"{file.label}:{number}")) for number, line in _lines(file, quoted=True))


def _reading(file: File) -> tuple[str, bool]:
    """The delimiter, and whether spaces may stand between it and a quote.

    Excel names the delimiter above the header. Else it is the one that cuts the header and the first row into as many
    cells, the comma before the others: a spreadsheet in much of Europe writes semicolons.
    """
    top = next((text for _, text in _texts(file) if text.strip()), "")
    if said := EXCEL_SEP.match(top):
        marks = [said[1]]
    else:
        marks = ["\t"] if file.kind == ".tsv" else [mark for mark in DELIMITERS if mark in top] or [","]
    starts = {mark: _first_two(file, mark, spaced=False) for mark in marks}
    fitting = [mark for mark, (header, row) in starts.items() if len(header) == len(row) > 1] or marks
    delimiter = "," if "," in fitting else max(fitting, key=top.count)
    # Quotes behind spaces are text to the plain reader. A quoted cell may start so too, and reads the same either way.
    plain, loose = (set(chain(*rows)) for rows in (starts[delimiter], _first_two(file, delimiter, spaced=True)))
    return delimiter, bool(loose) and any(SPACED_QUOTE.match(cell) for cell in plain - loose)


def _first_two(file: File, delimiter: str, *, spaced: bool) -> tuple[list[str], list[str]]:
    """The header and the first row, without cells where the file cannot be read so."""
    try:
        header, row = [*(cells for _, cells in islice(_records(file, delimiter, spaced), 2)), [], []][:2]
    except DataError:
        return [], []
    return header, row


def _header(cells: Sequence[str], where: str) -> list[str]:
    """The names; [] of an empty file. A delimiter may end each line, and then the last cells have no names."""
    names = [CONTROL.sub(" ", cell).strip() for cell in cells]
    while len(names) > 1 and not names[-1]:
        del names[-1]
    if names[:1] == [""] and len(names) > 1:  # an index that pandas wrote beside the columns
        names[0] = PANDAS_INDEX
    if any(not name or len(name) > MAX_COLUMN_NAME for name in names):
        found = "a first line with an empty cell or a long text"
        fix = "write the names above the rows"
        raise DataError(where=where, found=found, expected="the first line should name the columns", fix=fix)
    _refuse_same_names(names, where)
    return names


def _refuse_same_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(
            where=where, found="two columns of one name", expected="a name for each column", fix="rename one"
        )


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
    return DataError(
        where=file.label, found=f"broken parquet: {error}", expected="a whole parquet file", fix="copy it again"
    )


READERS: dict[str, Callable[[File, list[DataError]], Iterator[Place]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
