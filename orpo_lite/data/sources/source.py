"""Where rows come from: what every source can do, and how splits are chosen."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orpo_lite.data.sources.files import SPREADSHEETS
from orpo_lite.data.sources.lines import Place, kind_of, stem
from orpo_lite.errors import DataError, Overrides

AUTO = "auto"
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


def names_line(names: Sequence[str]) -> Overrides:
    """The setting that names these files one by one, as it can be pasted into a shell."""
    value = ",".join(names)
    if any(set(name) & set(",[]'\"") for name in names):
        value = json.dumps(list(names), ensure_ascii=False)
    data = names[0] if len(names) == 1 else [*names]
    return Overrides({"data.dataset_name": data}, text=shlex.quote(f"data.dataset_name={value}"))


def is_local(name: str) -> bool:
    return is_path(name) or os.path.exists(name)


def is_path(name: str) -> bool:
    """Whether the name is one of files by its looks alone; a hub name has no suffix and no wildcard."""
    looks = kind_of(name) or name.lower().endswith(SPREADSHEETS) or name.startswith((".", "/", "~"))
    return bool(looks) or glob.has_magic(name)


SHARD = re.compile(r"(-\d+-of-\d+(-[0-9a-f]+)?|[-_.]part[-_.]?\d+|[-_.]\d+)$", re.IGNORECASE)
TRAIN = {"train", "training"}
HELD_OUT = {
    "test",
    "testing",
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "evaluation",
    "heldout",
    "holdout",
}


def split_of(path: Path) -> str:
    """The stem less the number of a shard: train of train-00000-of-00002.parquet, train_sft of train_sft.jsonl."""
    return SHARD.sub("", stem(path.name))


def choose_split(names: Sequence[str]) -> str | None:
    """The preference split, else train, else the only one; None when there are several others."""
    likely = [
        "train_prefs",
        *(name for name in names if re.search("train.*pref", name.lower())),
        "train",
        "training",
    ]
    return next((name for name in likely if name in names), names[0] if len(names) == 1 else None)


def split_words(split: str) -> set[str]:
    """Return the words of a split's name: train and prefs of train_prefs."""
    return set(re.split(r"[-_.]", split.lower().replace("held_out", "heldout")))


def is_held_out(split: str) -> bool:
    """Whether a word of the split's name says that it is not to be trained on."""
    return not HELD_OUT.isdisjoint(split_words(split))


def names_split(name: str) -> bool:
    """Whether a word of a name says for what the rows are."""
    return is_held_out(name) or not TRAIN.isdisjoint(split_words(name))


def said_split(split: str, names: Sequence[str]) -> str:
    """What to say of a chosen split: which, unless it is plainly train, and what the set has to hold out."""
    rest = split_words(split) - TRAIN
    held_out = next(
        (name for name in names if is_held_out(name) and split_words(name) - HELD_OUT == rest), ""
    )
    hint = (
        f"data.dataset_test_split={held_out} would use its own held-out pairs" if held_out else ""
    )
    return joined("" if split == "train" else f"split {split} (of {listed(names)})", hint)


def joined(*sentences: str) -> str:
    """Join what there is to say; "" is nothing."""
    return "; ".join(filter(None, sentences))


TRAIN_SPLIT, TEST_SPLIT = (
    "data.dataset_train_split",
    "data.dataset_test_split",
)  # the settings that name a split


def split_fix(key: str, names: Sequence[str]) -> str:
    """Return the setting with a split that there is."""
    held_out = [*filter(is_held_out, names)]
    others = [name for name in names if name not in held_out]
    likely = (
        [*held_out, *others]
        if key == TEST_SPLIT
        else [choose_split(names) or "", *others, *held_out]
    )
    return next((Overrides({key: name}) for name in likely if name), "check data.dataset_name")


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


@contextmanager
def readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            where=name,
            found=str(error),
            expected="a file that can be read",
            fix="check its owner and permissions",
        ) from None
