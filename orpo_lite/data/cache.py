"""Tokenised sides on disk: a set is tokenised once, and a run reads the pairs it needs, never all of them.

An entry is a folder: ``ids.safetensors`` with all tokens one after the other, ``pairs.safetensors`` with what is known
of each pair, and ``entry.json``, written last, with what was found on the way and the sha256 of all three. It is found
by a key over all that tokens depend on, this package's code among it. Entries not used lately make room for new ones.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save

from orpo_lite.data.pair import TokenizedPair, common_prefix

VARIABLE = "ORPO_LITE_CACHE"  # the environment may name the folder
KEPT = 16  # entries
DAY = 86_400.0  # seconds
LIBRARIES = ("tokenizers", "transformers", "jinja2")
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja")
NOT_TOKENIZER = ("generation_config.json", "model.safetensors.index.json", "trainer_state.json")
NUMBERS = ("chosen_tokens", "rejected_tokens", "chosen_start", "rejected_start", "chosen_cut", "rejected_cut")
ENTRY = re.compile(r"[0-9a-f]{32}")  # the name of an entry's folder; nothing else in the cache folder is ever removed
UNFINISHED = re.compile(r"\.[0-9a-f]{32}-.+")
FILES = ("ids.safetensors", "pairs.safetensors")
HEADER = 256  # bytes of the JSON before the tokens; the format lets it end in spaces


class TokenizedPairs(Sequence[TokenizedPair]):
    """P pairs on disk. Tokens are read when a pair is asked for; the rest stands in memory, an array of P a column."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], sha256: str) -> None:
        self.facts = facts
        """What was found while the pairs were made."""
        self.sha256 = sha256
        """Of the file that holds the tokens."""
        file: Any = safe_open(folder / "ids.safetensors", framework="np")
        self._ids = file.get_slice("ids")
        columns = load_file(folder / "pairs.safetensors")
        self.places: list[str] = columns.pop("where").tobytes().decode().split("\n")
        self.columns: dict[str, NDArray[Any]] = columns
        """NUMBERS, the prefix that both sequences share in tokens, and the prompt's hash of 16 bytes."""
        lengths_P2 = np.stack([columns["chosen_tokens"], columns["rejected_tokens"]], 1)
        ends = np.cumsum(lengths_P2, dtype=np.int64)
        self._begin_P2 = (ends - lengths_P2.reshape(-1)).reshape(-1, 2)
        self.rows: NDArray[np.int64] = np.arange(len(lengths_P2))

    def select(self, rows: Sequence[int]) -> TokenizedPairs:
        """The pairs at ``rows``, as a view."""
        view = object.__new__(TokenizedPairs)
        view.__dict__.update(self.__dict__, rows=self.rows[np.asarray(rows, dtype=np.int64)])
        return view

    def column(self, name: str) -> NDArray[Any]:
        """One column of these pairs."""
        values: NDArray[Any] = self.columns[name][self.rows]
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
        numbers: dict[str, Any] = {name: int(self.columns[name][row]) for name in NUMBERS}
        chosen, rejected = (
            self._ids[int(begin) : int(begin) + numbers.pop(f"{side}_tokens")]
            for side, begin in zip(("chosen", "rejected"), self._begin_P2[row], strict=True)
        )
        prompt = self.columns["prompt"][row].tobytes()
        return TokenizedPair(chosen, rejected, where=self.places[row], prompt=prompt, **numbers)


class Writer:
    """A new entry: the pairs come one by one, and their tokens go straight to the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stream = (folder / "ids.safetensors").open("wb")
        self._stream.write(bytes(8 + HEADER))  # its place; what it says is known at the end
        self._columns = {name: array("i") for name in (*NUMBERS, "prefix")}
        self._prompts = bytearray()
        self._places: list[str] = []
        self.largest = (-1, "")
        """The largest token id and the pair that holds it."""
        self.unknown_id: int | None = None
        """The token that stands for what a tokenizer does not know, and how often it was written."""
        self.unknown = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, pair: TokenizedPair) -> None:
        """Append a pair."""
        chosen, rejected = (np.asarray(ids, dtype="<i4") for ids in (pair.chosen_ids, pair.rejected_ids))
        starts, cuts = (pair.chosen_start, pair.rejected_start), (pair.chosen_cut, pair.rejected_cut)
        numbers = (len(chosen), len(rejected), *starts, *cuts, common_prefix(chosen, rejected))
        for column, number in zip(self._columns.values(), numbers, strict=True):
            column.append(number)
        for ids in (chosen, rejected):
            self._stream.write(ids.tobytes())
            self.unknown += int((ids == self.unknown_id).sum()) if self.unknown_id is not None else 0
            if ids.max() > self.largest[0]:
                self.largest = (int(ids.max()), pair.where)
        self._prompts += pair.prompt
        self._places.append(pair.where.replace("\n", " "))

    def close(self, facts: Mapping[str, Any]) -> None:
        """Write the rest, entry.json last."""
        count = sum(self._columns["chosen_tokens"]) + sum(self._columns["rejected_tokens"])
        header = {"ids": {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]}}
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", HEADER) + json.dumps(header).ljust(HEADER).encode())
        self._stream.close()
        columns: dict[str, NDArray[Any]]
        columns = {name: np.asarray(column, dtype=np.int32) for name, column in self._columns.items()}
        columns["prompt"] = np.frombuffer(bytes(self._prompts), dtype=np.uint8).reshape(len(self), -1)
        columns["where"] = np.frombuffer("\n".join(self._places).encode(), dtype=np.uint8)
        (self.folder / "pairs.safetensors").write_bytes(save(columns))  # save_file says a full disk in its own way
        sums = {name: file_sha256(self.folder / name) for name in FILES} | {"facts": _facts_sha256(facts)}
        entry = {"facts": facts, "sha256": sums}
        (self.folder / "entry.json").write_text(json.dumps(entry, ensure_ascii=False), encoding="utf-8")

    def abandon(self) -> None:
        """Close the file of an entry that will not be."""
        with suppress(OSError):  # a full disk has no room for what is still to be written
            self._stream.close()


def make_key(**parts: Any) -> str:
    """A key that changes with any of the parts, with this package's code, and with the libraries that make tokens."""
    parts |= {"code": _code(), "versions": {name: version(name) for name in LIBRARIES}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in (*sorted(package.rglob("*.py")), package.parent / "base" / "find.py"):  # which loads the tokenizer
        digest.update(file.read_bytes())
    return digest.hexdigest()


def tokenizer_sha256(folder: Path) -> str:
    """Of the files that a tokenizer is made of."""
    digest = hashlib.sha256()
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files, key=lambda file: file.relative_to(folder).as_posix()):
        if file.name not in NOT_TOKENIZER:
            digest.update(f"{file.relative_to(folder)} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _facts_sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wanted_folder() -> Path:
    """Where entries should live: $ORPO_LITE_CACHE, else the user's cache folder."""
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "orpo-lite" / "tokens"
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
        if sums["facts"] != _facts_sha256(facts) or any(sums[name] != file_sha256(folder / name) for name in FILES):
            return None
        with suppress(OSError):
            os.utime(folder)  # used now
        return TokenizedPairs(folder, facts, sums["ids.safetensors"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the key: of several processes that want an entry, one makes it and the others wait for it."""
    with (cache_folder() / f"{key}.lock").open("w") as stream:
        with suppress(OSError):  # some network file systems cannot; then each makes its own, and the last one stays
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
            used[child] = time.time() + DAY if child == newest else child.stat().st_mtime  # clocks go back at times
    entries = sorted((child for child in used if ENTRY.fullmatch(child.name)), key=used.__getitem__)
    unfinished = [child for child in used if UNFINISHED.fullmatch(child.name)]
    abandoned = [child for child in unfinished if used[child] < time.time() - DAY]  # by a process that was killed
    for entry in (*entries[:-KEPT], *abandoned):
        shutil.rmtree(entry, ignore_errors=True)
        entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
