"""Rows of local files, of a folder or of a pattern."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orpo_lite.data.sources.files import SPREADSHEETS, column_names, file_fingerprint, read_file
from orpo_lite.data.sources.lines import KINDS, File, Place, kind_of
from orpo_lite.data.sources.source import (
    AUTO,
    SPLIT_WORDS,
    Source,
    choose_split,
    listed,
    names_line,
    readable,
    said_split,
    split_of,
    stem,
)
from orpo_lite.errors import DataError

SAVED = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk leaves in a folder
NOT_DATA = (*SAVED, "dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class LocalSource(Source):
    files: tuple[File, ...]

    def rows(self, faults: list[DataError]) -> Iterator[Place]:
        with readable(self.name):
            for file in self.files:
                yield from read_file(file, faults)

    def labelled(self, labels: Mapping[str, str]) -> Source:
        return replace(self, files=tuple(replace(file, label=labels[str(file.path)]) for file in self.files))

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


def find_files(name: str, split: str) -> LocalSource:
    path = Path(os.path.expanduser(name))
    with readable(name):
        if path.is_file():
            if not kind_of(path.name):
                raise _unknown_kind(path)
            paths, said = [path], ""
        elif path.is_dir():
            paths, said = _of_split(path, _data_files(path), split)
        elif glob.has_magic(name):
            matched = _matched(path)
            paths, said = _of_split(path, matched, split) if split not in (AUTO, "train") else (matched, "")
        else:
            raise _missing(path, near_names(path))
    labels = unique_labels(paths)
    count = f"{len(paths)} files: {listed(labels)}" if len(paths) > 1 else ""
    found = tuple(File(path, label) for path, label in zip(paths, labels, strict=True))
    return LocalSource(name, "; ".join(filter(None, (said, count, _said_columns(found)))), found)


def _said_columns(found: Sequence[File]) -> str:
    """What to say of tables that differ in their columns: a source is read in one format, that of its first rows."""
    if len(found) == 1:
        return ""
    columns = [(file, names) for file in found if (names := column_names(file))]
    other = next((file for file, names in columns if names != columns[0][1]), None)
    if other is None:
        return ""
    first = columns[0][0]
    more = ",..." if len(found) > 2 else ""
    return (
        f"the columns of {first.label} and {other.label} differ; "
        f"{names_line([str(first.path), str(other.path)], more)} reads each file in its own format"
    )


def unique_labels(paths: Sequence[Path]) -> list[str]:
    """The names from the folder that all have in common, so that two train.jsonl are told apart."""
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def _is_data(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name in NOT_DATA
    return bool(kind_of(path.name)) and not hidden and path.is_file()


def _data_files(folder: Path) -> list[Path]:
    """The files of rows in a folder and in its data/, where sets from the hub have them."""
    found = sorted(path for parent in (folder, folder / "data") for path in parent.glob("*") if _is_data(path))
    if found:
        _refuse_copies(folder, found)
        return found
    if any((folder / name).exists() for name in SAVED):
        fix = f'datasets.load_from_disk({str(folder)!r}), then .to_parquet("train.parquet") of each split'
        raise DataError(
            where=str(folder),
            found="a folder of save_to_disk",
            expected="files as Dataset.to_parquet writes them",
            fix=fix,
        )
    below = sorted({path.parent.name for path in folder.glob("*/*") if _is_data(path)})
    likely = choose_split(below) or next((name for name in below if "train" in name.lower()), *below[:1] or [""])
    fix = names_line([str(folder / likely)]) if below else "check data.dataset_name"
    raise DataError(
        where=str(folder), found="no data files in the folder", expected=f"files of {', '.join(KINDS)}", fix=fix
    )


def _refuse_copies(folder: Path, paths: Sequence[Path]) -> None:
    """One name in two kinds is most likely one set of rows, converted."""
    stems: dict[Path, Path] = {}
    for path in paths:
        other = stems.setdefault(path.parent / stem(path.name), path)
        if other != path:
            raise DataError(
                where=str(folder),
                found=f"{other.name} and {path.name}: one name in two kinds of files, as if one was made of the other",
                expected="each row once",
                fix=f"{names_line([str(path)])} or {names_line([str(other)])}, or another name for one of them",
            )


def _matched(pattern: Path) -> list[Path]:
    found = sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if _is_data(path))
    if not found:
        raise DataError(
            where=str(pattern),
            found="no data file matches",
            expected=f"files of {', '.join(KINDS)}",
            fix='check the pattern, and put "..." around it',
        )
    return found


def _of_split(where: Path, paths: list[Path], split: str) -> tuple[list[Path], str]:
    """The files of a split, and what was chosen. Files without any split names are one training set."""
    splits = list(dict.fromkeys(split_of(path) for path in paths))
    named = [name for name in splits if SPLIT_WORDS & set(re.split(r"[-_.]", name.lower()))]
    if not named and split in (AUTO, "train"):
        return paths, ""
    chosen = choose_split(named) if split == AUTO else split
    if chosen not in splits:
        wanted, example = ("train", "train") if split == AUTO else (repr(split), split)
        raise DataError(
            where=str(where),
            found=f"no file of split {wanted}; files: {listed([path.name for path in paths])}",
            expected=f"{example}.jsonl or the like",
            fix=f"data.dataset_train_split=SPLIT, data.dataset_test_split=SPLIT; splits: {listed(splits)}",
        )
    left = [path.name for path in paths if split_of(path) not in named]
    said = [said_split(chosen, named), f"not read: {listed(left)}" if left else ""] if split == AUTO else []
    return [path for path in paths if split_of(path) == chosen], "; ".join(filter(None, said))


def _unknown_kind(path: Path) -> DataError:
    if path.suffix.lower() in SPREADSHEETS:
        return DataError(
            where=str(path),
            found="a spreadsheet",
            expected=f"one of {', '.join(KINDS)}",
            fix="save it as csv, in UTF-8",
        )
    fix = 'Dataset.from_file(OLD).to_parquet("train.parquet")' if path.suffix == ".arrow" else "convert or rename it"
    if path.suffix.lower() in (".ndjson", ".jl", ".jsonlines"):
        fix = f"rename it to {path.stem}.jsonl"
    return DataError(
        where=str(path),
        found="an unknown kind of file",
        expected=f"one of {', '.join(KINDS)}, or .gz of a text",
        fix=fix,
    )


def refuse_mistyped(name: str) -> None:
    """Raise for a name that, by what stands here, is meant for a file here, and not for a set of the hub."""
    path = Path(name)
    if "/" not in name:
        if near := [other for other in near_names(path) if stem(other).lower() == name.lower()]:
            raise _missing(path, near)
    elif name.count("/") > 1 or name.endswith("/"):
        raise _missing(path, near_names(path))
    elif os.path.isdir(path.parent):
        expected = f"a file or folder, for there is a folder {path.parent} here; else a set of the hub"
        raise _missing(path, near_names(path), expected)


def _missing(path: Path, near: Sequence[str], expected: str = "a file or folder") -> DataError:
    found = "no such file" if path.parent.is_dir() else f"no such file, and {path.parent} is not a folder"
    return DataError(where=str(path), found=found, expected=expected, fix=did_you_mean(near) or "check the path")


def did_you_mean(near: Sequence[str]) -> str:
    return f"did you mean {' or '.join(near)}?" if near else ""


def near_names(path: Path) -> list[str]:
    """What stands where the path points to and is called much like it, with or without a suffix."""
    try:
        beside = sorted(child.name for child in path.parent.iterdir())
    except (OSError, ValueError):  # no folder, or no name that could be one
        return []
    called = {part.lower() for name in beside for part in (name, stem(name))}
    close = difflib.get_close_matches(path.name.lower(), called, n=3, cutoff=0.5)
    names = [name for part in close for name in beside if part in (name.lower(), stem(name).lower())]
    return list(dict.fromkeys(names))[:3]
