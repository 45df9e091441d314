"""Tokenised sides on disk: a set is tokenised once, and a run reads the pairs it needs, never all of them.

An entry is a folder: ``ids.bin`` with all tokens one after the other (int32), ``pairs.bin`` with a PAIR record for each
pair, ``places.txt`` with a line for each, and ``entry.json``, written last, with what was found on the way and the
sha256 of all four. It is found by a key over all that tokens depend on, this package's code among it. Entries not used
lately make room for new ones.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from orpo_lite.data.pair import TokenizedPair, common_prefix

VARIABLE = "ORPO_LITE_CACHE"  # the environment may name the folder
KEPT = 16  # entries
DAY = 86_400.0  # seconds
LIBRARIES = ("tokenizers", "transformers", "jinja2")
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja")
NOT_TOKENIZER = ("generation_config.json", "model.safetensors.index.json", "trainer_state.json")
NUMBERS = (
    "chosen_tokens",
    "rejected_tokens",
    "chosen_start",
    "rejected_start",
    "chosen_cut",
    "rejected_cut",
)
PAIR = np.dtype([*((name, "<i4") for name in (*NUMBERS, "prefix")), ("prompt", "V16")])
"""NUMBERS, the prefix that both sequences share in tokens, and the prompt's hash of 16 bytes."""
ENTRY = re.compile(
    r"[0-9a-f]{32}"
)  # the name of an entry's folder; nothing else in the cache folder is ever removed
UNFINISHED = re.compile(r"\.[0-9a-f]{32}-.+")
FILES = ("ids.bin", "pairs.bin", "places.txt")


class TokenizedPairs(Sequence[TokenizedPair]):
    """P pairs on disk. Tokens are read when a pair is asked for; the rest stands in memory, an array of P a column."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], sha256: str) -> None:
        self.facts = facts
        """What was found while the pairs were made."""
        self.sha256 = sha256
        """Of the file that holds the tokens."""
        self._ids = np.memmap(folder / "ids.bin", "<i4", "r")
        self._pairs_P = np.fromfile(folder / "pairs.bin", PAIR)
        self._places = (folder / "places.txt").read_bytes().decode().split("\n")
        lengths_P = self._pairs_P["chosen_tokens"] + self._pairs_P["rejected_tokens"]
        self._begins_P = np.cumsum(lengths_P, dtype=np.int64) - lengths_P
        self.rows: NDArray[np.int64] = np.arange(len(lengths_P))

    def select(self, rows: Sequence[int]) -> TokenizedPairs:
        """The pairs at ``rows``, as a view."""
        view = copy(self)
        view.rows = self.rows[np.asarray(rows, dtype=np.int64)]
        return view

    def column(self, name: str) -> NDArray[Any]:
        """One field of these pairs' PAIR records."""
        values: NDArray[Any] = self._pairs_P[name][self.rows]
        return values

    def prompts(self) -> list[bytes]:
        """``split.prompt_key`` of each pair."""
        return [row.tobytes() for row in self.column("prompt")]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> TokenizedPairs: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | TokenizedPairs:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = int(self.rows[index])
        pair = self._pairs_P[row]
        begin = self._begins_P[row]
        middle = begin + pair["chosen_tokens"]
        end = middle + pair["rejected_tokens"]
        chosen, rejected = np.array(self._ids[begin:middle]), np.array(self._ids[middle:end])
        numbers: dict[str, Any] = {name: int(pair[name]) for name in NUMBERS[2:]}
        return TokenizedPair(
            chosen, rejected, where=self._places[row], prompt=pair["prompt"].tobytes(), **numbers
        )


class Writer:
    """A new entry: the pairs come one by one and go straight to the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._streams = [(folder / name).open("wb") for name in FILES]
        self._count = 0
        self.largest = (-1, "")
        """The largest token id and the pair that holds it."""
        self.unknown_id: int | None = None
        """The token that stands for what a tokenizer does not know, and how often it was written."""
        self.unknown = 0

    def __len__(self) -> int:
        return self._count

    def add(self, pair: TokenizedPair) -> None:
        """Append a pair."""
        chosen, rejected = (
            np.asarray(ids, dtype="<i4") for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        starts, cuts = (
            (pair.chosen_start, pair.rejected_start),
            (pair.chosen_cut, pair.rejected_cut),
        )
        numbers = (len(chosen), len(rejected), *starts, *cuts, common_prefix(chosen, rejected))
        ids_file, pairs_file, places_file = self._streams
        ids_file.write(chosen.tobytes() + rejected.tobytes())
        pairs_file.write(np.array((*numbers, pair.prompt), dtype=PAIR).tobytes())
        places_file.write(pair.where.replace("\n", " ").encode() + b"\n")
        self._count += 1
        for ids in (chosen, rejected):
            self.unknown += (
                int((ids == self.unknown_id).sum()) if self.unknown_id is not None else 0
            )
            if ids.max() > self.largest[0]:
                self.largest = (int(ids.max()), pair.where)

    def close(self, facts: Mapping[str, Any]) -> None:
        """Write the rest, entry.json last."""
        for stream in self._streams:
            stream.close()
        sums = {name: file_sha256(self.folder / name) for name in FILES} | {
            "facts": _facts_sha256(facts)
        }
        entry = {"facts": facts, "sha256": sums}
        (self.folder / "entry.json").write_text(
            json.dumps(entry, ensure_ascii=False), encoding="utf-8"
        )

    def abandon(self) -> None:
        """Close the files of an entry that will not be."""
        for stream in self._streams:
            with suppress(OSError):  # a full disk has no room for what is still to be written
                stream.close()


def make_key(**parts: Any) -> str:
    """A key that changes with any of the parts, with this package's code, and with the libraries that make tokens."""
    parts |= {"code": _code(), "versions": {name: version(name) for name in LIBRARIES}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    package = Path(__file__).parents[1]
    loader = package / "base" / "find.py"  # which loads the tokenizer
    return _files_sha256(package, [*(package / "data").rglob("*.py"), loader])


def tokenizer_sha256(folder: Path) -> str:
    """Of the files that a tokenizer is made of."""
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return _files_sha256(folder, [file for file in files if file.name not in NOT_TOKENIZER])


def _files_sha256(folder: Path, files: Iterable[Path]) -> str:
    """Of the files' names and contents, in whatever order."""
    named = sorted((file.relative_to(folder).as_posix(), file_sha256(file)) for file in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _facts_sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wanted_folder() -> Path:
    """Where entries should live: $ORPO_LITE_CACHE, else the user's cache folder."""
    named = os.environ.get(VARIABLE)
    folder = (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "orpo-lite" / "tokens"
    )
    return folder.expanduser()


@cache
def cache_folder() -> Path:
    """Where entries live: ``wanted_folder``, or where nothing can be written, a folder that ends with the process."""
    folder = wanted_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # tokens are as private as the text
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="orpo-lite-tokens-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def load(key: str) -> TokenizedPairs | None:
    """The entry of that key, or None when there is none that is whole."""
    folder = cache_folder() / key
    try:
        entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        facts, sums = entry["facts"], entry["sha256"]
        if sums["facts"] != _facts_sha256(facts) or any(
            sums[name] != file_sha256(folder / name) for name in FILES
        ):
            return None
        with suppress(OSError):
            os.utime(folder)  # used now
        return TokenizedPairs(folder, facts, sums["ids.bin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the key: of several processes that want an entry, one makes it and the others wait for it."""
    with (cache_folder() / f"{key}.lock").open("w") as stream:
        with suppress(
            OSError
        ):  # some network file systems cannot; then each makes its own, and the last one stays
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def new_entry(key: str) -> Iterator[Writer]:
    """A writer to a new entry, which is there when the block ends without an error, and not at all otherwise."""
    parent = cache_folder()
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=parent))
    writer = Writer(temporary)
    try:
        yield writer
        final = parent / key
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _make_room(parent, final)
    finally:
        writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)


def _make_room(parent: Path, newest: Path) -> None:
    """Remove the entries that were not used lately; who reads one keeps its files until it is done."""
    used: dict[Path, float] = {}
    for child in parent.iterdir():
        with suppress(OSError):  # another process may have removed it
            used[child] = (
                time.time() + DAY if child == newest else child.stat().st_mtime
            )  # clocks go back at times
    entries = sorted((child for child in used if ENTRY.fullmatch(child.name)), key=used.__getitem__)
    unfinished = [child for child in used if UNFINISHED.fullmatch(child.name)]
    abandoned = [
        child for child in unfinished if used[child] < time.time() - DAY
    ]  # by a process that was killed
    for entry in (*entries[:-KEPT], *abandoned):
        shutil.rmtree(entry, ignore_errors=True)
        entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
