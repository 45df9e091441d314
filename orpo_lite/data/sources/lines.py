"""A local file of rows: its kind, its bytes, its lines."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from orpo_lite.errors import DataError

Place = tuple[str, Mapping[str, Any]]
"""Where a row is ("pairs.jsonl:12", "table.parquet[11]", "train[11]"), and the row."""

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

MAX_ROW_BYTES = 16 << 20  # a longer line is a binary or a file without line ends, not a pair
MAX_COLUMN_NAME = 100  # characters; a longer one is a text
BLOCK = 1 << 20

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


def blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        yield from iter(lambda: raw.read(BLOCK), b"")


def refuse_lookalikes(file: File) -> None:
    with file.path.open("rb") as raw:
        start = raw.read(32)
    if file.zipped and start.startswith(b"\x1f\x8b"):
        try:
            with file.open() as stream:
                start = stream.read(32)
        except BROKEN_GZIP:
            raise broken_gzip(file.label) from None
    for mark, found, fix in LOOKALIKES:
        if start.startswith(mark) and not (mark == b"PAR1" and file.kind == ".parquet"):
            raise DataError(
                where=f"{file.label}:1",
                found=found,
                expected=f"{file.kind[1:]} in UTF-8" if file.kind != ".parquet" else "a parquet file",
                fix=fix,
            )
    if file.kind != ".parquet" and (order := _utf16_order(start)):
        fix = f"iconv -f UTF-16{order} -t UTF-8 OLD > NEW"
        raise DataError(where=f"{file.label}:1", found="UTF-16 text", expected=f"{file.kind[1:]} in UTF-8", fix=fix)


def _utf16_order(start: bytes) -> str:
    """LE or BE when every other byte of the start is NUL, as in UTF-16 without a mark; else ""."""
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if len(start) < 4 or max(even, odd) < len(start) // 4 or min(even, odd):
        return ""
    return "LE" if odd else "BE"


def lines(file: File, *, quoted: bool) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends. ``quoted``: a quoted cell may hold line ends, as a JSON string may not."""
    number = 0
    with file.open() as stream:
        try:
            for line in _split(stream, quoted):
                number += 1
                if len(line) > MAX_ROW_BYTES:
                    raise DataError(
                        where=f"{file.label}:{number}",
                        found="a line without end",
                        expected=f"at most {MAX_ROW_BYTES >> 20} MiB a row",
                        fix="one row a line, and text only",
                    )
                # Some editors write a mark at the start of the file.
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        except BROKEN_GZIP:
            raise broken_gzip(f"{file.label}:{number + 1}") from None


def _split(stream: IO[bytes], quoted: bool) -> Iterator[bytes]:
    first = stream.readline(MAX_ROW_BYTES + 1)
    stream.seek(0)
    # Old spreadsheets for the Mac end lines with \r alone.
    if b"\r" in first.rstrip(b"\r\n") and (quoted or not first.endswith(b"\n")):
        with io.TextIOWrapper(stream, "latin-1", newline="\r") as text:  # a character a byte
            yield from (line.encode("latin-1") for line in iter(lambda: text.readline(MAX_ROW_BYTES + 1), ""))
    else:
        yield from iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b"")


def decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        before, number = line[: error.start].decode().rpartition("\n"), line[: error.start].count(b"\n") + 1
        raise DataError(
            where=where,
            found=f"byte 0x{line[error.start]:02x} at {position(number, len(before[-1]) + 1)} is not UTF-8",
            expected="UTF-8 text",
            fix="iconv -f CP1252 -t UTF-8 OLD > NEW",
        ) from None


def position(line: int, column: int) -> str:
    return f"column {column}" if line == 1 else f"line {line}, column {column}"


BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


def broken_gzip(where: str) -> DataError:
    return DataError(
        where=where,
        found="broken gzip, or its end is missing",
        expected="a whole gzip file",
        fix="copy or download it again",
    )
