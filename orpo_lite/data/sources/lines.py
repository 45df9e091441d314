"""A local file of rows: its kind, its bytes, its lines."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

from orpo_lite.data.pair import RowError
from orpo_lite.errors import Command, DataError

Place = tuple[str, Mapping[str, Any]]
"""Where a row is ("pairs.jsonl:12", "table.parquet[11]", "train[11]"), and the row."""

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
LISTED = f"{', '.join(KINDS)}, or a text in .gz, .bz2, .xz or .zst"
OTHER_NAMES = {
    ".ndjson": ".jsonl",
    ".jl": ".jsonl",
    ".jsonlines": ".jsonl",
    ".txt": ".jsonl",
    ".feather": ".arrow",
}
SUFFIX = re.compile(
    r"(\.(?:jsonl|json|csv|tsv|ndjson|jl|jsonlines|txt))(?:\.(?:gz|bz2|xz|zst))?$|(\.(?:parquet|arrow|feather))$",
    re.I,
)

MAX_ROW_BYTES = 16 << 20  # a longer line is a binary or a file without line ends, not a pair
MAX_COLUMN_NAME = 100  # characters; a longer one is a text
BLOCK = 1 << 20


def _open_zstd(path: Path) -> IO[bytes]:
    from pyarrow import input_stream  # type: ignore[import-untyped] # it comes with datasets

    return io.BufferedReader(input_stream(path, compression="zstd"))


# By their first bytes: a browser may have unpacked a file and left its name.
COMPRESSIONS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "gzip": (b"\x1f\x8b", gzip.open),
    "bzip2": (b"BZh", bz2.open),
    "xz": (b"\xfd7zXZ\0", lzma.open),
    "zstd": (b"(\xb5/\xfd", _open_zstd),
}


@dataclass(frozen=True)
class File:
    """A local file of rows, and what the places call it."""

    path: Path
    label: str

    @property
    def kind(self) -> str:
        return kind_of(self.path.name)

    @property
    def start(self) -> bytes:
        """The first bytes as they are on disk."""
        with self.path.open("rb") as raw:
            return raw.read(8)

    @property
    def compression(self) -> str:
        """The program that compressed the file, or ""."""
        start = self.start
        return next(
            (program for program, (mark, _) in COMPRESSIONS.items() if start.startswith(mark)), ""
        )

    def open(self) -> IO[bytes]:
        """Open the file for reading, decompressed."""
        program = self.compression
        return COMPRESSIONS[program][1](self.path) if program else self.path.open("rb")


def kind_of(name: str) -> str:
    """Return the one of KINDS that a file of this name is read as; "" for another name."""
    found = SUFFIX.search(name)
    kind = (found[1] or found[2]).lower() if found else ""
    return OTHER_NAMES.get(kind, kind)


def stem(name: str) -> str:
    """Return the name without the suffix of its kind and of its compression."""
    return SUFFIX.sub("", name)


def converted(file: File, program: str, suffix: str) -> Command:
    """Return the fix that writes what a program makes of a file to a new file."""
    old, new = (
        shlex.quote(str(file.path)),
        shlex.quote(str(file.path.with_name(stem(file.path.name) + suffix))),
    )
    unpack = file.compression
    line = f"{unpack} -dc {old} | {program} > {new}" if unpack else f"{program} {old} > {new}"
    return Command(line, f", then data.dataset_name={new}")


def lines(file: File, faults: list[DataError]) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines with their ends. A line over MAX_ROW_BYTES goes to ``faults``."""
    with file.open() as stream:
        for number in count(1):
            line = stream.readline(MAX_ROW_BYTES + 1)
            where = f"{file.label}:{number}"
            if (
                number == 1 and b"\r" in line.rstrip() and not line.endswith(b"\n")
            ):  # as old spreadsheets for the Mac
                fix = converted(file, r"perl -pe 's/\r/\n/g'", f".lines{file.kind}")
                raise DataError(
                    where=where,
                    found=r"line ends of \r alone",
                    expected=r"lines that end with \n",
                    fix=fix,
                )
            if len(line) > MAX_ROW_BYTES:
                found, expected = (
                    f"a line of over {MAX_ROW_BYTES >> 20} MiB",
                    "one row a line, and text only",
                )
                faults.append(
                    RowError(
                        where=where, found=found, expected=expected, fix="shorten or remove the row"
                    )
                )
                while line and not line.endswith(b"\n"):
                    line = stream.readline(BLOCK)
            elif line:
                # Some editors write a mark at the start of a file.
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line:
                return
