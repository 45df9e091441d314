"""Read a local file row by row. Each row has a place: "pairs.jsonl:12" or "table.parquet[11]".

Files of all types except .json are streamed.
"""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from orpo_lite.data.sources.arrow_rows import arrow_rows, arrow_table
from orpo_lite.data.sources.csv_rows import csv_rows
from orpo_lite.data.sources.encoding import refuse_lookalikes
from orpo_lite.data.sources.json_rows import is_lines, json_rows
from orpo_lite.data.sources.lines import BLOCK, File, PlacedRow
from orpo_lite.errors import DataError

SPREADSHEETS = (".xlsx", ".xls", ".ods")
# The errors that a truncated or altered compressed file raises.
BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError)


def read_file(file: File, faults: list[DataError]) -> Iterator[PlacedRow]:
    """Yield (place, row) for each row of a file. Example of a place: pairs.csv:3.

    If a row cannot be read, its error is added to ``faults``. If the file's content cannot be read,
    DataError is raised at once. An OSError of the disk is raised unchanged.
    """
    try:
        refuse_lookalikes(file)
        yield from _reader(file)(file, faults)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno:  # an error of the disk, not of the content
            raise
        raise DataError(
            where=file.label,
            found=f"broken {file.compression} data, or the end of the file is missing",
            expected="a complete file",
            fix="copy or download the file again",
        ) from None


def file_fingerprint(file: File) -> tuple[str, int]:
    """Return the sha256 of a file's bytes, and its approximate number of rows (0: unknown)."""
    digest, line_ends, last = hashlib.sha256(), 0, b""
    with file.path.open("rb") as raw:
        for block in iter(partial(raw.read, BLOCK), b""):
            digest.update(block)
            line_ends += block.count(b"\n")
            last = block[-1:]
    has_open_line = last not in (b"", b"\n")
    return digest.hexdigest(), _estimate_rows(file, line_ends + has_open_line)


def column_names(file: File) -> frozenset[str]:
    """Return the columns of a table (csv, tsv, Parquet or Arrow), from its first row.

    The result is empty for a JSON file, and for a table that has no rows or cannot be read.
    """
    if _reader(file) is json_rows:
        return frozenset()
    with suppress(DataError, *BROKEN):  # reported when the rows are read
        for _, row in read_file(file, []):
            return frozenset(row)
    return frozenset()


def _estimate_rows(file: File, lines: int) -> int:
    if _reader(file) is arrow_rows:
        with arrow_table(file) as (_, _, count):
            return count
    if file.compression or (_reader(file) is json_rows and not is_lines(file)):
        return 0
    return max(lines - 1, 0) if _reader(file) is csv_rows else lines  # without the header


Reader = Callable[[File, list[DataError]], Iterator[PlacedRow]]
READERS: dict[str, Reader] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": arrow_rows,
    ".arrow": arrow_rows,
}


def _reader(file: File) -> Reader:
    """Return the reader of a file. Parquet and Arrow files are recognized under any name."""
    return arrow_rows if file.start.startswith((b"PAR1", b"ARROW1")) else READERS[file.suffix]
