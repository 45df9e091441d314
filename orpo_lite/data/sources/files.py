"""One local file to rows, each with its place: "pairs.jsonl:12", "table.parquet[11]". Everything streams but .json."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator

from orpo_lite.data.sources.json_rows import is_lines, json_rows, jsonl_rows
from orpo_lite.data.sources.lines import BROKEN_GZIP, File, Place, blocks, broken_gzip, refuse_lookalikes
from orpo_lite.data.sources.tables import csv_header, csv_records, csv_rows, parquet, parquet_rows, reading
from orpo_lite.errors import DataError

SPREADSHEETS = (".xlsx", ".xls", ".ods")


def read_file(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Yield (place, row). A row that cannot be read goes to ``faults``; a file that cannot be is raised at once."""
    try:
        refuse_lookalikes(file)
        yield from READERS[file.kind](file, faults)
    except BROKEN_GZIP:
        raise broken_gzip(file.label) from None


def file_fingerprint(file: File) -> tuple[str, int]:
    """sha256 of the bytes as they are on disk, and about how many rows they are; 0: unknown."""
    refuse_lookalikes(file)
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
        refuse_lookalikes(file)
        if file.kind == ".parquet":
            with parquet(file) as table:
                return frozenset(table.schema_arrow.names)
        if file.kind in (".csv", ".tsv"):
            start, cells = next(csv_records(file, *reading(file)), (1, []))
            return frozenset(csv_header(cells, f"{file.label}:{start}"))
    except (DataError, OSError, *BROKEN_GZIP):
        pass  # whoever reads it will say so
    return frozenset()


def _estimate(file: File, lines: int) -> int:
    if file.kind == ".parquet":
        with parquet(file) as table:
            return int(table.metadata.num_rows)
    if file.zipped or (file.kind == ".json" and not is_lines(file)):
        return 0
    return max(lines - 1, 0) if file.kind in (".csv", ".tsv") else lines  # less the header


READERS: dict[str, Callable[[File, list[DataError]], Iterator[Place]]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}
