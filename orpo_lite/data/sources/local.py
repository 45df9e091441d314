"""Find and read local files: one file, a folder or a pattern."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orpo_lite.data.sources.files import SPREADSHEETS, column_names, file_fingerprint, read_file
from orpo_lite.data.sources.lines import SUFFIX_LIST, File, PlacedRow, data_suffix, stem
from orpo_lite.data.sources.source import (
    AUTO,
    Source,
    choose_split,
    dataset_name_setting,
    is_held_out,
    join_sentences,
    list_names,
    names_split,
    report_unreadable,
    split_fix,
    split_note,
    split_of,
)
from orpo_lite.errors import DataError, one_of

NOT_DATA = ("dataset_dict.json", "state.json", "dataset_info.json", "dataset_infos.json")
DEPTH = 4  # levels of folders in which files are searched


@dataclass(frozen=True)
class LocalSource(Source):
    """A dataset in one or more local files."""

    files: tuple[File, ...]

    def rows(self, faults: list[DataError]) -> Iterator[PlacedRow]:
        with report_unreadable(self.name):
            for file in self.files:
                yield from read_file(file, faults)

    def with_labels(self, labels: Mapping[str, str]) -> Source:
        files = (replace(file, label=labels[str(file.path)]) for file in self.files)
        return replace(self, files=tuple(files))

    def fingerprint(self) -> tuple[str, int]:
        digest, counts = hashlib.sha256(), []
        with report_unreadable(self.name):
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
        with report_unreadable(self.name):
            headers = [column_names(file) for file in self.files]
        return frozenset[str]().union(*headers) if all(headers) else None


def find_files(name: str, split: str, key: str) -> LocalSource:
    """Return a source that reads the local files of a split.

    Args:
        name: a file, a folder or a pattern such as ``data/*.jsonl``.
        split: the name of a split. "auto": the training split. If ``name`` is a file, the split has
            no effect. If ``name`` is a pattern, "auto" and "train" select all matching files.
        key: the recipe key of ``split``. Errors name this key in their fix.

    Raises DataError.
    """
    path, note = Path(os.path.expanduser(name)), ""
    with report_unreadable(name):
        if path.is_file():
            if not data_suffix(path.name):
                raise _unknown_suffix(path)
            paths = [path]
        elif path.is_dir():
            found, unread_note = _find_data_files(path)
            paths, note = _select_split(path, found, split, key)
            note = join_sentences(note, unread_note)
        elif glob.has_magic(name):
            paths = _match_pattern(path)
            if split not in (AUTO, "train"):
                base = Path(os.path.commonpath([file.parent for file in paths]))
                paths, note = _select_split(base, paths, split, key)
        else:
            raise _missing(path, similar_names(path))
    labels = unique_labels(paths)
    count = f"{len(paths)} files: {list_names(labels)}" if len(paths) > 1 else ""
    files = tuple(File(path, label) for path, label in zip(paths, labels, strict=True))
    return LocalSource(in_unicode(name), join_sentences(note, count), files)


def unique_labels(paths: Sequence[Path]) -> list[str]:
    """Return paths relative to their common folder: x/a/1.csv, x/b/1.csv -> a/1.csv, b/1.csv."""
    common = os.path.commonpath([path.parent for path in paths])
    return [in_unicode(path.relative_to(common).as_posix()) for path in paths]


def in_unicode(name: str) -> str:
    """Return a file's name as text. Bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")


def _select_data_files(paths: Iterable[Path]) -> list[Path]:
    """Return the data files among the paths, sorted.

    A .txt file counts as data only if there are no other data files. Else it is probably a README.
    """
    found = [
        path
        for path in sorted(paths)
        if data_suffix(path.name)
        and path.name not in NOT_DATA
        and path.is_file()
        and not path.name.startswith(".")
        and not path.match("cache-*.arrow")
    ]
    return [path for path in found if path.suffix.lower() != ".txt"] or found


def _find_data_files(folder: Path) -> tuple[list[Path], str]:
    """Return the data files of a folder, and a note on subfolders with data that are not read.

    Files are taken from the folder and from its subfolder data/, as in hub datasets. If these have
    none, files are taken from all subfolders.
    """
    below = _files_below(folder)
    found = [path for path in below if path.parent in (folder, folder / "data")] or below
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        found = _saved_files(folder)
    if not found:
        raise DataError(
            where=str(folder),
            found="no data files in the folder",
            expected=f"files of these types: {SUFFIX_LIST}",
            fix="check data.dataset_name",
        )
    _refuse_copies(folder, found)
    unread = {*below} - {*found}
    folders = {path.relative_to(folder).parts[0] for path in unread if path.parent != folder}
    names = sorted(folders - {"data"})
    if not names:
        return found, ""
    return found, f"not read: the {'folder' if len(names) == 1 else 'folders'} {list_names(names)}"


def _files_below(folder: Path) -> list[Path]:
    patterns = ("/".join("*" * depth) for depth in range(1, DEPTH + 1))
    below = (path for pattern in patterns for path in folder.glob(pattern))
    return _select_data_files(
        path
        for path in below
        if not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )


def _saved_files(folder: Path) -> list[Path]:
    """Return the files that save_to_disk wrote for a Dataset or the splits of a DatasetDict.

    The files are in the order of the rows. Other tables in the folder, which Dataset.map may have
    left there, are not included.
    """
    import datasets  # takes a second to import, and other files do not need it

    try:
        loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # datasets raises many types of errors
        raise DataError(
            where=str(folder),
            found=f"missing or broken: {error}".splitlines()[0],
            expected="a complete folder that save_to_disk wrote",
            fix="copy the folder again",
        ) from None
    tables = loaded.values() if isinstance(loaded, dict) else [loaded]
    names = [file["filename"] for table in tables for file in table.cache_files]
    return [folder / os.path.relpath(name, folder) for name in names]


def _refuse_copies(folder: Path, paths: Sequence[Path]) -> None:
    """Raise DataError for two files whose names differ only in the suffix.

    Most likely, one file was converted to the other, and they have the same rows.
    """
    stems: dict[Path, Path] = {}
    for path in paths:
        other = stems.setdefault(path.parent / stem(path.name), path)
        if other != path:
            settings = [dataset_name_setting([str(file)]) for file in (path, other)]
            raise DataError(
                where=str(folder),
                found=f"{other.name} and {path.name} probably hold the same rows",
                expected="each row in only one file",
                fix=one_of([*settings, "rename one of the files"]),
            )


def _match_pattern(pattern: Path) -> list[Path]:
    found = _select_data_files(map(Path, glob.glob(str(pattern), recursive=True)))
    if not found:
        raise DataError(
            where=str(pattern),
            found="no data file matches the pattern",
            expected=f"files of these types: {SUFFIX_LIST}",
            fix='check the pattern, and put quotes around it: "..."',
        )
    return found


def _select_split(folder: Path, paths: list[Path], split: str, key: str) -> tuple[list[Path], str]:
    """Return the files of a split, and a note on what was chosen.

    If no file has a training split in its name, files without any split in their names are used.
    """
    split_by_path = {path: _split_below(folder, path) for path in paths}
    named = {*filter(names_split, split_by_path.values())}
    may_be_train = split == AUTO or (split == "train" and not named)
    is_dataset_dict = (folder / "dataset_dict.json").is_file()
    if may_be_train and all(map(is_held_out, named)) and not is_dataset_dict:
        for path, name in split_by_path.items():
            if name not in named:
                split_by_path[path] = "train"
    splits = list(dict.fromkeys(split_by_path.values()))
    chosen: str | None = split
    if split == AUTO:
        chosen = choose_split([*filter(names_split, splits)] or splits)
    if chosen not in splits:
        wanted = "train" if split == AUTO else repr(split)
        raise DataError(
            where=str(folder),
            found=f"no file of split {wanted}; splits: {list_names(splits)}",
            expected=f"a file such as {'train' if split == AUTO else split}.jsonl",
            fix=split_fix(key, splits),
        )
    files = [path for path in paths if split_by_path[path] == chosen]
    if split != AUTO:
        return files, ""
    unread = [
        path.relative_to(folder).as_posix()
        for path in paths
        if split_by_path[path] != chosen and not is_held_out(split_by_path[path])
    ]
    unread_note = f"not read: {list_names(unread)}" if unread else ""
    return files, join_sentences(split_note(chosen, splits), unread_note)


def _split_below(folder: Path, path: Path) -> str:
    """Return the split of a file: its own name or a folder's name, if that name contains a split.

    If no name contains a split, return the name of the folder that the file is in. If the file is
    directly in ``folder``, return the name of the file without suffixes.
    """
    folders = [
        part.rpartition("=")[2] for part in path.relative_to(folder).parts[:-1] if part != "data"
    ]
    names = [split_of(path), *reversed(folders)]
    for name in names:
        if names_split(name):
            return name
    return names[1] if folders else names[0]


def _unknown_suffix(path: Path) -> DataError:
    found, fix = "an unknown type of file", "save it as .jsonl, with one JSON object per line"
    if path.suffix.lower() in SPREADSHEETS:
        found, fix = "a spreadsheet", "save it as csv, in UTF-8"
    return DataError(where=str(path), found=found, expected=f"one of {SUFFIX_LIST}", fix=fix)


def refuse_mistyped(name: str) -> None:
    """Raise DataError for a name that is probably a misspelled local file, not a hub dataset."""
    path = Path(name)
    if "/" not in name:
        similar = [other for other in similar_names(path) if stem(other).lower() == name.lower()]
        if similar:
            raise _missing(path, similar)
    elif name.count("/") > 1 or name.endswith("/"):
        raise _missing(path, similar_names(path))
    elif path.parent.is_dir():
        expected = f"a file or folder in the local folder {path.parent}, or a dataset of the hub"
        raise _missing(path, similar_names(path), expected)


def _missing(path: Path, similar: Sequence[str], expected: str = "a file or folder") -> DataError:
    found = "no such file"
    if not path.parent.is_dir():
        found += f", and {path.parent} is not a folder"
    fix = path_settings(path, similar) or "check the path"
    return DataError(where=str(path), found=found, expected=expected, fix=fix)


def path_settings(path: Path, names: Sequence[str]) -> str:
    """Return a fix that suggests the files ``names`` in the folder of ``path``.

    x/old.csv, ["a.csv", "b.csv"] -> data.dataset_name=x/a.csv or data.dataset_name=x/b.csv.
    """
    return one_of(dataset_name_setting([str(path.with_name(name))]) for name in names)


def similar_names(path: Path) -> list[str]:
    """Return up to three names in the folder of ``path`` that are similar to the name of ``path``.

    The names are compared without suffixes.
    """
    try:
        siblings = sorted(child.name for child in path.parent.iterdir())
    except (OSError, ValueError):  # there is no such folder, or its name is impossible
        return []
    stems = {stem(name).lower() for name in siblings}
    close = difflib.get_close_matches(stem(path.name).lower(), stems, cutoff=0.5)
    return [name for part in close for name in siblings if stem(name).lower() == part][:3]
