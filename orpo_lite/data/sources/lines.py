"""Open local data files: find the suffix and the compression, and read the lines."""

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

PlacedRow = tuple[str, Mapping[str, Any]]
"""The place of a row ("pairs.jsonl:12", "table.parquet[11]", "train[11]"), and the row."""

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SUFFIX_LIST = f"{', '.join(SUFFIXES)}, or a text file compressed as .gz, .bz2, .xz or .zst"
OTHER_SUFFIXES = {
    ".ndjson": ".jsonl",
    ".jl": ".jsonl",
    ".jsonlines": ".jsonl",
    ".txt": ".jsonl",
    ".feather": ".arrow",
}
_SUFFIX_PATTERN = re.compile(
    r"(\.(?:jsonl|json|csv|tsv|ndjson|jl|jsonlines|txt))(?:\.(?:gz|bz2|xz|zst))?$"
    r"|(\.(?:parquet|arrow|feather))$",
    re.I,
)

MAX_ROW_BYTES = 16 << 20  # a longer line is a binary or a file without line ends, not a pair
MAX_COLUMN_NAME = 100  # characters; a longer one is a text
BLOCK = 1 << 20


def _open_zstd(path: Path) -> IO[bytes]:
    from pyarrow import input_stream  # type: ignore[import-untyped] # it comes with datasets

    return io.BufferedReader(input_stream(path, compression="zstd"))


# Recognized by the first bytes: a browser may have decompressed a file without renaming it.
COMPRESSIONS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "gzip": (b"\x1f\x8b", gzip.open),
    "bzip2": (b"BZh", bz2.open),
    "xz": (b"\xfd7zXZ\0", lzma.open),
    "zstd": (b"(\xb5/\xfd", _open_zstd),
}


@dataclass(frozen=True)
class File:
    """A local data file. ``label`` begins the place of each row: pairs.csv -> pairs.csv:3."""

    path: Path
    label: str

    @property
    def suffix(self) -> str:
        """The suffix in SUFFIXES that decides how the file is read."""
        return data_suffix(self.path.name)

    @property
    def start(self) -> bytes:
        """The first bytes on disk, before decompression."""
        with self.path.open("rb") as raw:
            return raw.read(8)

    @property
    def compression(self) -> str:
        """The compression of the file: gzip, bzip2, xz or zstd; "" if there is none."""
        start = self.start
        for program, (mark, _) in COMPRESSIONS.items():
            if start.startswith(mark):
                return program
        return ""

    def open(self) -> IO[bytes]:
        """Open the file for reading, decompressed."""
        program = self.compression
        return COMPRESSIONS[program][1](self.path) if program else self.path.open("rb")


def data_suffix(name: str) -> str:
    """Return the suffix in SUFFIXES that decides how a file is read: x.ndjson.gz -> .jsonl.

    Return "" if the name does not end like a data file: x.pdf -> "".
    """
    found = _SUFFIX_PATTERN.search(name)
    suffix = (found[1] or found[2]).lower() if found else ""
    return OTHER_SUFFIXES.get(suffix, suffix)


def stem(name: str) -> str:
    """Return a name without the suffixes of file type and compression: pairs.csv.gz -> pairs."""
    return _SUFFIX_PATTERN.sub("", name)


def conversion_command(file: File, program: str, suffix: str) -> Command:
    """Return a fix: a shell command that converts a file and writes the result to a new file.

    Args:
        file: the file to convert. A compressed file is unpacked first.
        program: the shell command that converts the text, such as ``jq -c .``.
        suffix: the suffix of the new file, such as ``.lines.jsonl``.
    """
    old = shlex.quote(str(file.path))
    new = shlex.quote(str(file.path.with_name(stem(file.path.name) + suffix)))
    unpack = file.compression
    line = f"{unpack} -dc {old} | {program} > {new}" if unpack else f"{program} {old} > {new}"
    return Command(line, f", then data.dataset_name={new}")


def lines(file: File, faults: list[DataError]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) for each line. The line is bytes and includes its line end.

    A line over MAX_ROW_BYTES is not yielded. An error for this line is added to ``faults``.
    """
    with file.open() as stream:
        for number in count(1):
            line = stream.readline(MAX_ROW_BYTES + 1)
            where = f"{file.label}:{number}"
            if number == 1:
                _refuse_mac_line_ends(line, file, where)
            if len(line) > MAX_ROW_BYTES:
                fault = RowError(
                    where=where,
                    found=f"a line of more than {MAX_ROW_BYTES >> 20} MiB",
                    expected="one row per line, and only text",
                    fix="shorten or remove the row",
                )
                faults.append(fault)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(BLOCK)
            elif line:
                # Some editors write a byte order mark at the start of a file.
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line:
                return


def _refuse_mac_line_ends(line: bytes, file: File, where: str) -> None:
    r"""Raise DataError for lines that end with \r, as old spreadsheets for the Mac write them."""
    if b"\r" in line.rstrip() and not line.endswith(b"\n"):
        raise DataError(
            where=where,
            found=r"lines that end with \r only",
            expected=r"lines that end with \n",
            fix=conversion_command(file, r"perl -pe 's/\r/\n/g'", f".lines{file.suffix}"),
        )
