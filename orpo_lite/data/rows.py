"""Where rows come from: a file, a folder, a pattern or a hub set; each is a ``Source`` that ``find_source`` finds."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orpo_lite.data import files
from orpo_lite.data.files import KINDS, SPREADSHEETS, File, blocks, column_names, file_fingerprint, kind_of, read_file
from orpo_lite.errors import DataError, HubError

Place = files.Place  # where + row: "pairs.jsonl:12", "table.parquet[11]", "train[11]"

AUTO = "auto"
SAVED = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk leaves in a folder
NOT_DATA = (*SAVED, "dataset_info.json", "dataset_infos.json")
NAMES_SHOWN = 10  # file names in one sentence


@dataclass(frozen=True)
class Source(ABC):
    """Rows that have been found, and not read yet."""

    name: str  # as the recipe names it
    said: str  # a choice that was made for the person, or ""

    @abstractmethod
    def rows(self, faults: list[DataError]) -> Iterator[Place]:
        """Yield (place, row). A row that cannot be read goes to ``faults``; a file that cannot be is raised at once."""

    @abstractmethod
    def labelled(self, labels: Mapping[str, str]) -> Source:
        """The same with other names in its places."""

    @abstractmethod
    def fingerprint(self) -> tuple[str, int]:
        """sha256 of the content, the order and the labels; and about how many rows there are, 0: unknown."""

    @abstractmethod
    def columns(self) -> frozenset[str] | None:
        """The columns of all rows, where they are known without reading the rows, as of a table; else None."""

    def paths(self) -> list[str]:
        """The files, by the names to call them by; none of a source that is no files."""
        return []

    def parts(self) -> Sequence[Source]:
        """Each of several files by itself."""
        return ()


def find_source(name: str, split: str, config: str | None) -> Source:
    """The rows of one split. ``split``: "auto" takes the preference split of a set, else train, else the only one.

    Raises DataError for a file or folder that is not there or holds no such split, HubError for a hub set.
    """
    if is_local(name):
        return _find_files(name, split)
    _refuse_mistyped(name)
    return _load_set(name, split, config)


def told_apart(sources: Sequence[Source]) -> list[Source]:
    """The same sources, of which no two have places alike: where names repeat, each has its folder or its set in it."""
    paths = {
        str(file.path): file.label for source in sources if isinstance(source, LocalSource) for file in source.files
    }
    splits = {source.whole_name: source.label for source in sources if isinstance(source, HubSource)}
    if len(set(paths.values())) < len(paths):
        paths = dict(zip(paths, _labels([Path(os.path.abspath(path)) for path in paths]), strict=True))
    if len(set(splits.values())) < len(splits):
        splits = {name: name for name in splits}
    return [source.labelled({**paths, **splits}) for source in sources]


def refuse_twice(sources: Sequence[Source]) -> None:
    """Raise DataError for a file, or a split of a set, of which all rows would be read twice."""
    read: set[str] = set()
    for source in sources:
        files = source.files if isinstance(source, LocalSource) else ()
        names = {os.path.realpath(file.path): file.label for file in files}
        names |= {source.whole_name: source.whole_name} if isinstance(source, HubSource) else {}
        if twice := [label for name, label in names.items() if name in read]:
            raise DataError(
                where="data.dataset_name",
                found=f"{_listed(twice)}: twice",
                expected="each row once",
                fix="name it once",
            )
        read |= names.keys()


def names_line(names: Sequence[str], more: str = "") -> str:
    """The setting that names these files one by one, as it can be pasted into a shell."""
    value = ",".join(names) + more
    if any(set(name) & set(",[]'\"") for name in names):
        value = json.dumps(list(names), ensure_ascii=False)
    return shlex.quote(f"data.dataset_name={value}")


def is_local(name: str) -> bool:
    return is_path(name) or os.path.exists(name)


def is_path(name: str) -> bool:
    """Whether the name is one of files by its looks alone; a hub name has no suffix and no wildcard."""
    looks = kind_of(name) or name.lower().endswith(SPREADSHEETS) or name.startswith((".", "/", "~"))
    return bool(looks) or glob.has_magic(name)


# --- splits

SHARD = re.compile(r"(-\d+-of-\d+(-[0-9a-f]+)?|[-_.]part[-_.]?\d+|[-_.]\d+)$", re.IGNORECASE)
SPLIT_WORDS = {"train", "test", "validation", "valid", "val", "dev", "eval", "heldout", "holdout"}


def split_of(path: Path) -> str:
    """The stem less the number of a shard: train of train-00000-of-00002.parquet, train_sft of train_sft.jsonl."""
    return SHARD.sub("", _stem(path.name))


def _stem(name: str) -> str:
    """The name less the suffix of its kind, where it has one."""
    return name[: name.lower().rindex(kind_of(name))]


def choose_split(names: Sequence[str]) -> str | None:
    """The preference split, else train, else the only one; None when there are several others."""
    likely = ["train_prefs", *(name for name in names if re.search("train.*pref", name.lower())), "train"]
    return next((name for name in likely if name in names), names[0] if len(names) == 1 else None)


HELD_OUT = re.compile("test|val|valid|validation|dev|eval|held_?out")
HELD_OUT_PREFS = re.compile(".*(test|val|eval).*pref.*")


def _said_split(split: str, names: Sequence[str]) -> str:
    """What to say of a chosen split: which, unless it is plainly train, and what the set has to hold out."""
    pattern = HELD_OUT if split == "train" else HELD_OUT_PREFS
    held_out = next((name for name in names if pattern.fullmatch(name.lower())), "")
    hint = f"data.dataset_test_split={held_out} would use its own held-out pairs" if held_out else ""
    return "; ".join(filter(None, ("" if split == "train" else f"split {split} (of {_listed(names)})", hint)))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


# --- local files


@dataclass(frozen=True)
class LocalSource(Source):
    files: tuple[File, ...]

    def rows(self, faults: list[DataError]) -> Iterator[Place]:
        with _readable(self.name):
            for file in self.files:
                yield from read_file(file, faults)

    def labelled(self, labels: Mapping[str, str]) -> Source:
        return replace(self, files=tuple(replace(file, label=labels[str(file.path)]) for file in self.files))

    def fingerprint(self) -> tuple[str, int]:
        digest, counts = hashlib.sha256(), []
        with _readable(self.name):
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
        with _readable(self.name):
            headers = [column_names(file) for file in self.files]
        return frozenset[str]().union(*headers) if all(headers) else None


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            where=name, found=str(error), expected="a file that can be read", fix="check its owner and permissions"
        ) from None


def _find_files(name: str, split: str) -> LocalSource:
    path = Path(os.path.expanduser(name))
    with _readable(name):
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
            raise _missing(path, _near(path))
    labels = _labels(paths)
    count = f"{len(paths)} files: {_listed(labels)}" if len(paths) > 1 else ""
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


def _labels(paths: Sequence[Path]) -> list[str]:
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
        other = stems.setdefault(path.parent / _stem(path.name), path)
        if other != path:
            found = f"{other.name} and {path.name}: one name in two kinds of files, as if one was made of the other"
            fix = f"{names_line([str(path)])} or {names_line([str(other)])}, or another name for one of them"
            raise DataError(where=str(folder), found=found, expected="each row once", fix=fix)


def _matched(pattern: Path) -> list[Path]:
    found = sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if _is_data(path))
    if not found:
        expected = f"files of {', '.join(KINDS)}"
        raise DataError(
            where=str(pattern),
            found="no data file matches",
            expected=expected,
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
        found = f"no file of split {wanted}; files: {_listed([path.name for path in paths])}"
        fix = f"data.dataset_train_split=SPLIT, data.dataset_test_split=SPLIT; splits: {_listed(splits)}"
        raise DataError(where=str(where), found=found, expected=f"{example}.jsonl or the like", fix=fix)
    left = [path.name for path in paths if split_of(path) not in named]
    said = [_said_split(chosen, named), f"not read: {_listed(left)}" if left else ""] if split == AUTO else []
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


def _refuse_mistyped(name: str) -> None:
    """Raise for a name that, by what stands here, is meant for a file here, and not for a set of the hub."""
    path = Path(name)
    if "/" not in name:
        if near := [other for other in _near(path) if _stem(other).lower() == name.lower()]:
            raise _missing(path, near)
    elif name.count("/") > 1 or name.endswith("/"):
        raise _missing(path, _near(path))
    elif os.path.isdir(path.parent):
        expected = f"a file or folder, for there is a folder {path.parent} here; else a set of the hub"
        raise _missing(path, _near(path), expected)


def _missing(path: Path, near: Sequence[str], expected: str = "a file or folder") -> DataError:
    found = "no such file" if path.parent.is_dir() else f"no such file, and {path.parent} is not a folder"
    return DataError(where=str(path), found=found, expected=expected, fix=_did_you_mean(near) or "check the path")


def _did_you_mean(near: Sequence[str]) -> str:
    return f"did you mean {' or '.join(near)}?" if near else ""


def _near(path: Path) -> list[str]:
    """What stands where the path points to and is called much like it, with or without a suffix."""
    try:
        beside = sorted(child.name for child in path.parent.iterdir())
    except (OSError, ValueError):  # no folder, or no name that could be one
        return []
    called = {part.lower() for name in beside for part in (name, _stem(name))}
    close = difflib.get_close_matches(path.name.lower(), called, n=3, cutoff=0.5)
    names = [name for part in close for name in beside if part in (name.lower(), _stem(name).lower())]
    return list(dict.fromkeys(names))[:3]


# --- the hub


@dataclass(frozen=True)
class HubSource(Source):
    label: str  # its split, for the places
    table: Any = field(repr=False)  # a datasets.Dataset, on disk

    def rows(self, faults: list[DataError]) -> Iterator[Place]:  # noqa: ARG002 - the hub's own reader has read them
        yield from ((f"{self.label}[{i}]", row) for i, row in enumerate(self.table))

    def labelled(self, labels: Mapping[str, str]) -> Source:
        return replace(self, label=labels[self.whole_name])

    @property
    def whole_name(self) -> str:
        return f"{self.name}/{self.label}"

    def fingerprint(self) -> tuple[str, int]:
        digest = hashlib.sha256(f"{self.label}\n".encode())
        paths = [Path(file["filename"]) for file in self.table.cache_files]
        with _readable(self.name):
            for path in paths:
                for block in blocks(path):
                    digest.update(block)
        if not paths:  # a set in memory
            digest.update(f"{self.name}\n{self.table._fingerprint}".encode())
        return digest.hexdigest(), len(self.table)

    def columns(self) -> frozenset[str] | None:
        return frozenset(self.table.column_names)


def _load_set(name: str, split: str, config: str | None) -> HubSource:
    import datasets  # a second to import, and local files do not need it

    datasets.disable_progress_bars()
    unreachable = _unreachable(name)
    try:
        with _offline() if unreachable else nullcontext():
            if split == AUTO:
                found = _load_auto(name, config)
            else:
                found = HubSource(name, "", split, datasets.load_dataset(name, config, split=split))
    except HubError:
        raise
    except Exception as error:  # whatever a download can raise is the hub's or the network's
        expected, said = f"split {split!r}" if split != AUTO else "a data set with pairs", _found(error)
        fix = _hub_fix(name, error)
        if unreachable and isinstance(error, ConnectionError):  # all that datasets knows is that it was not to ask
            expected, said = "a connection, or a copy in the cache", f"{unreachable} and it is not in the cache"
            fix += "; HF_HUB_ETAG_TIMEOUT=60 waits longer for a slow one" if "Timeout" in unreachable else ""
        raise HubError(where=f"data.dataset_name {name}", found=said, expected=expected, fix=fix) from error
    if unreachable:
        found = replace(found, said="; ".join(filter(None, (f"{unreachable}; read from the cache", found.said))))
    return found


PAUSE = 1.0  # seconds; one connection may fail by chance


def _unreachable(name: str) -> str:
    """That the hub cannot be reached, as a sentence; "" when it answers, whatever it says, and when it is not asked.

    datasets would try each of its own requests for half a minute or more, and make several, before it looks into its
    cache. This is the first of them, through the same client and so the same proxies, made twice at the most.
    """
    from datasets import config
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        url = hf_hub_url(name, config.REPOCARD_FILENAME, repo_type="dataset", endpoint=config.HF_ENDPOINT)
    except HFValidationError:
        return ""
    if config.HF_HUB_OFFLINE or not _no_answer(url):
        return ""
    time.sleep(PAUSE)
    why = _no_answer(url)
    return why and f"{urlsplit(url).netloc} cannot be reached ({why})"


def _no_answer(url: str) -> str:
    """The kind of fault that kept a request from being answered at all, or ""."""
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:  # an answer
        return ""
    except HTTPError as error:
        return type(error).__name__
    except (OSError, ValueError):  # a page that is not the hub's, or the hub's own switch for offline
        return ""
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    """datasets reads its cache at once; it has no other switch once it is imported."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _load_auto(name: str, config: str | None) -> HubSource:
    import datasets

    loaded = None
    try:
        names = list(datasets.get_dataset_split_names(name, config))
    except Exception:  # offline the set may still be in the cache; if not, this says why
        loaded = datasets.load_dataset(name, config)
        names = list(loaded)
    split = choose_split(names)
    if split is None:
        found, fix = f"several splits: {_listed(names)}", f"data.dataset_train_split={names[0]}" if names else ""
        raise HubError(
            where=f"data.dataset_name {name}", found=found, expected="a split train, or one with preferences", fix=fix
        )
    table = loaded[split] if loaded is not None else datasets.load_dataset(name, config, split=split)
    return HubSource(name, _said_split(split, names), split, table)


def _found(error: Exception) -> str:
    """The first line of the message, and the second when it lists the configurations."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(lines[:2]) if len(lines) > 1 and CONFIGS.search(lines[1]) else lines[0]


CONFIGS = re.compile(r"(?:available configs|available configs in the cache|available|in the cache): \[?(.+?)\]?$", re.I)


def _hub_fix(name: str, error: Exception) -> str:
    said = str(error).replace(name, "").lower()
    if "scripts are no longer supported" in said:
        parquet = f"hf download --repo-type dataset --revision refs/convert/parquet --local-dir DIR {name}"
        return f"{parquet}, then data.dataset_name='DIR/CONFIG/train/*.parquet'"
    if "split" in said:
        return "data.dataset_train_split=SPLIT (or data.dataset_test_split) with a split of the set"
    if "config" in said:
        listed = next(filter(None, map(CONFIGS.search, str(error).splitlines())), None)
        first = listed[1].split(", ")[0].strip("'\"") if listed else "CONFIG"
        return f"data.dataset_config={first}, or another configuration of the set"
    near = _did_you_mean(_near(Path(name))) or "check the path"
    here = "" if "/" in name else f"there is no file or folder {name} here either ({near}); for a set of the hub, "
    if any(word in said for word in ("gated", "401", "403", "private", "authenticat", "doesn't exist")):
        return f"{here}open https://huggingface.co/datasets/{name}, ask for access if it is gated, then `hf auth login`"
    # Without a network datasets does not look for a set where `hf download` alone would put it.
    copy = f"hf download --repo-type dataset {name} --local-dir DIR, then data.dataset_name=DIR"
    return f"{here}check the network, or on a connected machine: {copy}"
