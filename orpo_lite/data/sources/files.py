"""One local file to rows, each with its place: "pairs.jsonl:12", "table.parquet[11]". Everything streams but .json."""

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
from orpo_lite.data.sources.lines import BLOCK, File, Place
from orpo_lite.errors import DataError

SPREADSHEETS = (".xlsx", ".xls", ".ods")
BROKEN = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    OSError,
)  # what a compressed file raises that is cut or altered


def read_file(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Yield (place, row). A row that cannot be read goes to ``faults``; a file that cannot be is raised at once."""
    try:
        refuse_lookalikes(file)
        yield from _reader(file)(file, faults)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the content
            raise
        found = f"broken {file.compression}, or its end is missing"
        raise DataError(
            where=file.label, found=found, expected="a whole file", fix="copy or download it again"
        ) from None


def file_fingerprint(file: File) -> tuple[str, int]:
    """sha256 of the bytes as they are on disk, and about how many rows they are; 0: unknown."""
    digest, line_ends, last = hashlib.sha256(), 0, b""
    with file.path.open("rb") as raw:
        for block in iter(partial(raw.read, BLOCK), b""):
            digest.update(block)
            line_ends += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), _estimate(file, line_ends + (last not in (b"", b"\n")))


def column_names(file: File) -> frozenset[str]:
    """The columns of a table, by its first row; none for the other kinds, and none for a table that cannot be read."""
    if _reader(file) is json_rows:
        return frozenset()
    with suppress(DataError, *BROKEN):  # whoever reads it will say so
        for _, row in read_file(file, []):
            return frozenset(row)
    return frozenset()


def _estimate(file: File, lines: int) -> int:
    if _reader(file) is arrow_rows:
        with arrow_table(file) as (_, _, count):
            return count
    if file.compression or (_reader(file) is json_rows and not is_lines(file)):
        return 0
    return max(lines - 1, 0) if _reader(file) is csv_rows else lines  # less the header


Reader = Callable[[File, list[DataError]], Iterator[Place]]
READERS: dict[str, Reader] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": arrow_rows,
    ".arrow": arrow_rows,
}


def _reader(file: File) -> Reader:
    """Return the reader of a file: that of a table also where its name says otherwise."""
    return arrow_rows if file.start.startswith((b"PAR1", b"ARROW1")) else READERS[file.kind]
