"""Rows of local files, of a folder or of a pattern."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orpo_lite.data.sources.files import SPREADSHEETS, column_names, file_fingerprint, read_file
from orpo_lite.data.sources.lines import LISTED, File, Place, kind_of, stem
from orpo_lite.data.sources.source import (
    AUTO,
    Source,
    choose_split,
    is_held_out,
    joined,
    listed,
    names_line,
    names_split,
    readable,
    said_split,
    split_fix,
    split_of,
)
from orpo_lite.errors import DataError, one_of

NOT_DATA = ("dataset_dict.json", "state.json", "dataset_info.json", "dataset_infos.json")
DEPTH = 4  # folders below a folder in which files are looked for


@dataclass(frozen=True)
class LocalSource(Source):
    files: tuple[File, ...]

    def rows(self, faults: list[DataError]) -> Iterator[Place]:
        with readable(self.name):
            for file in self.files:
                yield from read_file(file, faults)

    def labelled(self, labels: Mapping[str, str]) -> Source:
        return replace(
            self, files=tuple(replace(file, label=labels[str(file.path)]) for file in self.files)
        )

    def fingerprint(self) -> tuple[str, int]:
        digest, counts = hashlib.sha256(), []
        with readable(self.name):
            for file in self.files:
                content, count = file_fingerprint(file)
                digest.update(f"{file.label}\n{content}\n".encode())
                counts.append(count)
        return digest.hexdigest(), sum(counts) if all(counts) else 0

    def paths(self) -> list[str]:
        return [str(file.path) for file in self.files]

    def parts(self) -> Sequence[Source]:
        return [replace(self, files=(file,)) for file in self.files] if len(self.files) > 1 else ()

    def columns(self) -> frozenset[str] | None:
        with readable(self.name):
            headers = [column_names(file) for file in self.files]
        return frozenset[str]().union(*headers) if all(headers) else None


def find_files(name: str, split: str, key: str) -> LocalSource:
    path = Path(os.path.expanduser(name))
    with readable(name):
        if path.is_file():
            if not kind_of(path.name):
                raise _unknown_kind(path)
            paths, said = [path], ""
        elif path.is_dir():
            below, not_read = _data_files(path)
            paths, said = _of_split(path, below, split, key)
            said = joined(said, not_read)
        elif glob.has_magic(name):
            matched = _matched(path)
            base = Path(os.path.commonpath([file.parent for file in matched]))
            paths, said = (
                _of_split(base, matched, split, key)
                if split not in (AUTO, "train")
                else (matched, "")
            )
        else:
            raise _missing(path, near_names(path))
    labels = unique_labels(paths)
    count = f"{len(paths)} files: {listed(labels)}" if len(paths) > 1 else ""
    found = tuple(File(path, label) for path, label in zip(paths, labels, strict=True))
    return LocalSource(in_unicode(name), joined(said, count), found)


def unique_labels(paths: Sequence[Path]) -> list[str]:
    """The names from the folder that all have in common, so that two train.jsonl are told apart."""
    common = os.path.commonpath([path.parent for path in paths])
    return [in_unicode(path.relative_to(common).as_posix()) for path in paths]


def in_unicode(name: str) -> str:
    """Return the name of a file as text, where its bytes are of another encoding than the system's."""
    return os.fsencode(name).decode(errors="replace")


def _rows_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of rows among the paths, in order. A .txt next to other kinds is taken for a note."""
    found = sorted(
        path
        for path in paths
        if kind_of(path.name) and path.name not in NOT_DATA and path.is_file()
    )
    shown = [
        path for path in found if not path.name.startswith(".") and not path.match("cache-*.arrow")
    ]
    return [path for path in shown if path.suffix.lower() != ".txt"] or shown


def _data_files(folder: Path) -> tuple[list[Path], str]:
    """Return the files of rows in a folder and in its data/, where sets from the hub have them; else those below.

    The second is what to say of folders with rows that are not read.
    """
    below = _files_below(folder)
    found = [path for path in below if path.parent in (folder, folder / "data")] or below
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        found = _saved_files(folder)
    if not found:
        expected, fix = f"files of {LISTED}", "check data.dataset_name"
        raise DataError(
            where=str(folder), found="no data files in the folder", expected=expected, fix=fix
        )
    _refuse_copies(folder, found)
    others = {
        path.relative_to(folder).parts[0] for path in {*below} - {*found} if path.parent != folder
    }
    left = sorted(others - {"data"})
    return (
        found,
        f"not read: the {'folder' if len(left) == 1 else 'folders'} {listed(left)}" if left else "",
    )


def _files_below(folder: Path) -> list[Path]:
    below = (path for depth in range(1, DEPTH + 1) for path in folder.glob("/".join("*" * depth)))
    return _rows_files(
        path
        for path in below
        if not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )


def _saved_files(folder: Path) -> list[Path]:
    """Return the files that save_to_disk wrote, in the order of the rows: of a Dataset, or of a DatasetDict's splits.

    Other tables there, which Dataset.map may have left, are not among them.
    """
    import datasets  # a second to import, and other files do not need it

    try:
        loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # datasets raises whatever it stumbles on
        found, expected = (
            f"missing or broken: {error}".splitlines()[0],
            "a whole folder of save_to_disk",
        )
        raise DataError(
            where=str(folder), found=found, expected=expected, fix="copy the folder again"
        ) from None
    tables = loaded.values() if isinstance(loaded, dict) else [loaded]
    names = [file["filename"] for table in tables for file in table.cache_files]
    return [folder / os.path.relpath(name, folder) for name in names]


def _refuse_copies(folder: Path, paths: Sequence[Path]) -> None:
    """One name in two kinds is most likely one set of rows, converted."""
    stems: dict[Path, Path] = {}
    for path in paths:
        other = stems.setdefault(path.parent / stem(path.name), path)
        if other != path:
            found = f"{other.name} and {path.name}: one name in two kinds of files, as if one was made of the other"
            fix = one_of(
                [names_line([str(path)]), names_line([str(other)]), "another name for one of them"]
            )
            raise DataError(where=str(folder), found=found, expected="each row once", fix=fix)


def _matched(pattern: Path) -> list[Path]:
    found = _rows_files(map(Path, glob.glob(str(pattern), recursive=True)))
    if not found:
        expected, fix = f"files of {LISTED}", 'check the pattern, and put "..." around it'
        raise DataError(
            where=str(pattern), found="no data file matches", expected=expected, fix=fix
        )
    return found


def _of_split(folder: Path, paths: list[Path], split: str, key: str) -> tuple[list[Path], str]:
    """Return the files of a split, and what was chosen.

    Files without a split in their names are one training set, unless others are named for training.
    """
    split_by_path = {path: _split_below(folder, path) for path in paths}
    named = {*filter(names_split, split_by_path.values())}
    may_be_train = split == AUTO or (split == "train" and not named)
    if (
        may_be_train
        and all(map(is_held_out, named))
        and not (folder / "dataset_dict.json").is_file()
    ):
        split_by_path = {
            path: name if name in named else "train" for path, name in split_by_path.items()
        }
    splits = list(dict.fromkeys(split_by_path.values()))
    chosen = choose_split([*filter(names_split, splits)] or splits) if split == AUTO else split
    if chosen not in splits:
        wanted, example = ("train", "train") if split == AUTO else (repr(split), split)
        found, expected = (
            f"no file of split {wanted}; splits: {listed(splits)}",
            f"{example}.jsonl or the like",
        )
        raise DataError(
            where=str(folder), found=found, expected=expected, fix=split_fix(key, splits)
        )
    others = (path for path in paths if split_by_path[path] != chosen)
    left = [
        path.relative_to(folder).as_posix()
        for path in others
        if not is_held_out(split_by_path[path])
    ]
    said = (
        joined(said_split(chosen, splits), f"not read: {listed(left)}" if left else "")
        if split == AUTO
        else ""
    )
    return [path for path in paths if split_by_path[path] == chosen], said


def _split_below(folder: Path, path: Path) -> str:
    """Return the split that the name of a file or of a folder above it says; else the nearest name."""
    folders = [
        part.rpartition("=")[2] for part in path.relative_to(folder).parts[:-1] if part != "data"
    ]
    names = [split_of(path), *reversed(folders)]
    return next(filter(names_split, names), names[:2][-1])


def _unknown_kind(path: Path) -> DataError:
    found, fix = "an unknown kind of file", "save it as .jsonl, one JSON object a row"
    if path.suffix.lower() in SPREADSHEETS:
        found, fix = "a spreadsheet", "save it as csv, in UTF-8"
    return DataError(where=str(path), found=found, expected=f"one of {LISTED}", fix=fix)


def refuse_mistyped(name: str) -> None:
    """Raise for a name that, by what stands here, is meant for a file here, and not for a set of the hub."""
    path = Path(name)
    if "/" not in name:
        if near := [other for other in near_names(path) if stem(other).lower() == name.lower()]:
            raise _missing(path, near)
    elif name.count("/") > 1 or name.endswith("/"):
        raise _missing(path, near_names(path))
    elif path.parent.is_dir():
        expected = (
            f"a file or folder, for there is a folder {path.parent} here; else a set of the hub"
        )
        raise _missing(path, near_names(path), expected)


def _missing(path: Path, near: Sequence[str], expected: str = "a file or folder") -> DataError:
    found = (
        "no such file"
        if path.parent.is_dir()
        else f"no such file, and {path.parent} is not a folder"
    )
    return DataError(
        where=str(path), found=found, expected=expected, fix=named(path, near) or "check the path"
    )


def named(path: Path, near: Sequence[str]) -> str:
    """Return the settings that name one of these in place of the path."""
    return one_of(names_line([str(path.with_name(name))]) for name in near)


def near_names(path: Path) -> list[str]:
    """What stands where the path points to and is called much like it, with or without a suffix."""
    try:
        beside = sorted(child.name for child in path.parent.iterdir())
    except (OSError, ValueError):  # no folder, or no name that could be one
        return []
    close = difflib.get_close_matches(
        stem(path.name).lower(), {stem(name).lower() for name in beside}, cutoff=0.5
    )
    return [name for part in close for name in beside if stem(name).lower() == part][:3]
