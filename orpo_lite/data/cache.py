"""Keep tokenized splits on disk, so that a dataset is tokenized once.

A run reads only the pairs it needs.

A cache entry holds one split. It is a folder with these files:

- ``ids.bin``: the tokens of all pairs, one pair after the other (int32)
- ``pairs.bin``: one PAIR record per pair, with its lengths and the hash of its prompt
- ``places.txt``: one line per pair, with the place of its row, such as pairs.csv:3
- ``entry.json``: facts found during tokenization, the sha256 of these facts, and the sha256 of each
  of the three files above. ``entry.json`` is written last.

The key of an entry is a hash of everything that changes the tokens, including this package's code.
If there are more than MAX_ENTRIES entries, the least recently used ones are removed.
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

VARIABLE = "ORPO_LITE_CACHE"  # the environment variable with the folder
MAX_ENTRIES = 16
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
"""The record of a pair: NUMBERS, the length of the common prefix, and the prompt's hash (16 bytes).

The common prefix is the tokens that both sequences share at their start.
"""
# Patterns of folder names: a finished and an unfinished entry. Only these folders and their lock
# files are ever removed.
ENTRY = re.compile(r"[0-9a-f]{32}")
UNFINISHED = re.compile(r"\.[0-9a-f]{32}-.+")
FILES = ("ids.bin", "pairs.bin", "places.txt")


class TokenizedPairs(Sequence[TokenizedPair]):
    """A sequence of P tokenized pairs on disk.

    The tokens of a pair are read from disk when the pair is accessed. All other data of the pairs
    is in memory.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], sha256: str) -> None:
        self.facts = facts
        """The facts found during tokenization, such as the format and the pairs left out."""
        self.sha256 = sha256
        """The sha256 of the file with the tokens."""
        self.folder = folder
        """The folder of the cache entry."""
        self._ids = np.memmap(folder / "ids.bin", "<i4", "r")
        self._pairs_P = np.fromfile(folder / "pairs.bin", PAIR)
        self._places = (folder / "places.txt").read_bytes().decode().split("\n")
        lengths_P = self._pairs_P["chosen_tokens"] + self._pairs_P["rejected_tokens"]
        self._begins_P = np.cumsum(lengths_P, dtype=np.int64) - lengths_P
        self.rows: NDArray[np.int64] = np.arange(len(lengths_P))
        self._reference_P2: NDArray[np.float64] | None = None
        self._has_rejected = True

    def select(self, rows: Sequence[int]) -> TokenizedPairs:
        """Return the pairs with the indices ``rows``. Their tokens are not copied."""
        view = copy(self)
        view.rows = self.rows[np.asarray(rows, dtype=np.int64)]
        return view

    def without_rejected(self) -> TokenizedPairs:
        """Return the same pairs with empty rejected sequences, and so without common prefixes."""
        view = copy(self)
        view._has_rejected = False
        return view

    def with_reference(self, logps_P2: NDArray[np.float64]) -> TokenizedPairs:
        """Return the same P pairs with log-probabilities under the reference model, shape (P, 2).

        The columns are ``ref_chosen`` and ``ref_rejected`` of :class:`TokenizedPair`.
        """
        view = copy(self)
        view._reference_P2 = np.full((len(self._pairs_P), 2), np.nan)
        view._reference_P2[self.rows] = logps_P2
        return view

    def column(self, name: str) -> NDArray[Any]:
        """Return the field ``name`` of each pair's PAIR record, as an array of length P."""
        values: NDArray[Any] = self._pairs_P[name][self.rows]
        is_absent = name == "prefix" or name.startswith("rejected")
        return np.zeros_like(values) if is_absent and not self._has_rejected else values

    def prompts(self) -> list[bytes]:
        """Return the hash of each pair's prompt, see :func:`orpo_lite.data.split.prompt_key`."""
        return [row.tobytes() for row in self.column("prompt")]

    def places(self) -> list[str]:
        """Return the place of each pair's row: a file and a line, such as pairs.csv:3."""
        return [self._places[row] for row in self.rows]

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
        if not self._has_rejected:
            rejected = rejected[:0]
            numbers |= {"rejected_start": 0, "rejected_cut": 0}
        if self._reference_P2 is not None:
            ref_chosen, ref_rejected = self._reference_P2[row].tolist()
            numbers |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
        return TokenizedPair(
            chosen, rejected, where=self._places[row], prompt=pair["prompt"].tobytes(), **numbers
        )


class Writer:
    """Write a new cache entry to disk, pair by pair."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._streams = [(folder / name).open("wb") for name in FILES]
        self._count = 0
        self.largest = (-1, "")
        """The largest token id, and the place of a pair that has it."""
        self.unknown_id: int | None = None
        """The id of the token for unknown text. None: such tokens are not counted."""
        self.unknown = 0
        """The number of unknown tokens written."""

    def __len__(self) -> int:
        return self._count

    def add(self, pair: TokenizedPair) -> None:
        """Append a pair to the entry."""
        chosen, rejected = (
            np.asarray(ids, dtype="<i4") for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        numbers = (
            len(chosen),
            len(rejected),
            pair.chosen_start,
            pair.rejected_start,
            pair.chosen_cut,
            pair.rejected_cut,
            common_prefix(chosen, rejected),
        )
        ids_file, pairs_file, places_file = self._streams
        ids_file.write(chosen.tobytes() + rejected.tobytes())
        pairs_file.write(np.array((*numbers, pair.prompt), dtype=PAIR).tobytes())
        places_file.write(pair.where.replace("\n", " ").encode() + b"\n")
        self._count += 1
        for ids in (chosen, rejected):
            if self.unknown_id is not None:
                self.unknown += int((ids == self.unknown_id).sum())
            if ids.max() > self.largest[0]:
                self.largest = (int(ids.max()), pair.where)

    def close(self, facts: Mapping[str, Any]) -> None:
        """Close the data files, and write entry.json.

        entry.json holds ``facts``, the hash of each data file, and the hash of ``facts``.
        """
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
        """Close the data files without writing entry.json. Errors of the disk are ignored."""
        for stream in self._streams:
            with suppress(OSError):  # a full disk has no space for buffered data
                stream.close()


def make_key(**parts: Any) -> str:
    """Return the key of a cache entry. The key is a hash.

    The key depends on ``parts``, on the code in ``data/`` and in ``base/find.py``, and on the
    versions of the packages in LIBRARIES.
    """
    parts |= {"code": _code(), "versions": {name: version(name) for name in LIBRARIES}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    package = Path(__file__).parents[1]
    loader = package / "base" / "find.py"  # it loads the tokenizer
    return _files_sha256(package, [*(package / "data").rglob("*.py"), loader])


def tokenizer_sha256(folder: Path) -> str:
    """Return one sha256 of the names and contents of all tokenizer files in a folder."""
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return _files_sha256(folder, [file for file in files if file.name not in NOT_TOKENIZER])


def _files_sha256(folder: Path, files: Iterable[Path]) -> str:
    """Return a sha256 of the files' names and contents. Their order does not matter."""
    named = sorted((file.relative_to(folder).as_posix(), file_sha256(file)) for file in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _facts_sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def configured_folder() -> Path:
    """Return the folder in $ORPO_LITE_CACHE, or orpo-lite/tokens in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (caches / "orpo-lite" / "tokens").expanduser()


@cache
def cache_folder() -> Path:
    """Return the cache folder that this process uses.

    Usually this is :func:`configured_folder`. If that folder is not writable, the result is a
    temporary folder. The temporary folder is deleted when the process ends.
    """
    folder = configured_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # tokens are as private as the text
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="orpo-lite-tokens-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def load(key: str) -> TokenizedPairs | None:
    """Return the entry with this key, or None if the entry is missing or damaged."""
    folder = cache_folder() / key
    try:
        entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        facts, sums = entry["facts"], entry["sha256"]
        if sums["facts"] != _facts_sha256(facts):
            return None
        if any(sums[name] != file_sha256(folder / name) for name in FILES):
            return None
        with suppress(OSError):
            os.utime(folder)  # marks it as recently used
        return TokenizedPairs(folder, facts, sums["ids.bin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def locked(key: str) -> Iterator[None]:
    """Lock a key during the ``with`` block, so that only one process writes the entry of the key.

    Other processes wait for the lock.
    """
    with (cache_folder() / f"{key}.lock").open("w") as stream:
        # Some network file systems cannot lock. Then each process writes its own entry, and the
        # last one remains.
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def new_entry(key: str) -> Iterator[Writer]:
    """Yield a Writer. Its entry is kept only if the ``with`` block ends without an error."""
    parent = cache_folder()
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=parent))
    writer = Writer(temporary)
    try:
        yield writer
        final = parent / key
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _remove_old_entries(parent, final)
    finally:
        writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_old_entries(parent: Path, newest: Path) -> None:
    """Remove the least recently used entries. A process that has opened one can still read it."""
    used: dict[Path, float] = {}
    for child in parent.iterdir():
        with suppress(OSError):  # another process may have removed it
            used[child] = child.stat().st_mtime
    used[newest] = time.time() + DAY  # keep it even if the clock was set back
    entries = sorted((child for child in used if ENTRY.fullmatch(child.name)), key=used.__getitem__)
    unfinished = [child for child in used if UNFINISHED.fullmatch(child.name)]
    # These were left by processes that were killed.
    abandoned = [child for child in unfinished if used[child] < time.time() - DAY]
    for entry in (*entries[:-MAX_ENTRIES], *abandoned):
        shutil.rmtree(entry, ignore_errors=True)
        entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
