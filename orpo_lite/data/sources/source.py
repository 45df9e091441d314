"""Define the interface of a source (a dataset that yields rows), and choose a dataset's split."""

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
from orpo_lite.data.sources.lines import PlacedRow, data_suffix, stem
from orpo_lite.errors import DataError, Overrides

AUTO = "auto"
MAX_NAMES = 10  # names in one sentence


@dataclass(frozen=True)
class Source(ABC):
    """A dataset, or a part of it, whose rows can be read."""

    name: str
    """The dataset's name in the recipe."""
    note: str
    """A sentence about automatic choices, such as the split; "" if there were none."""

    @abstractmethod
    def rows(self, faults: list[DataError]) -> Iterator[PlacedRow]:
        """Yield (place, row). A place is a text, such as a.csv:3.

        If a row cannot be read, its error is added to ``faults``. If a file cannot be read,
        DataError is raised at once.
        """

    @abstractmethod
    def with_labels(self, labels: Mapping[str, str]) -> Source:
        """Return the source with new labels.

        Messages name a row by a label and a number: a.csv:3 is a row of the file with the label
        a.csv.

        Args:
            labels: path of a file, or ``dataset/split`` for a hub dataset -> its new label.
        """

    @abstractmethod
    def fingerprint(self) -> tuple[str, int]:
        """Return (sha256 of the data and the labels, approximate number of rows).

        The number of rows is 0 if it is unknown.
        """

    @abstractmethod
    def columns(self) -> frozenset[str] | None:
        """Return the names of all columns; None if they are unknown before all rows are read."""

    def paths(self) -> list[str]:
        """Return the paths of the local files; [] for a hub dataset."""
        return []

    def parts(self) -> Sequence[Source]:
        """Return one source for each file if the dataset has several files; else ()."""
        return ()


def dataset_name_setting(names: Sequence[str]) -> Overrides:
    """Return a fix that sets data.dataset_name to ``names``.

    The text of the fix is quoted for a shell. The names "a" and "b c" give the text
    ``'data.dataset_name=a,b c'``.
    """
    value = ",".join(names)
    if any(set(name) & set(",[]'\"") for name in names):
        value = json.dumps(list(names), ensure_ascii=False)
    data = names[0] if len(names) == 1 else [*names]
    return Overrides({"data.dataset_name": data}, text=shlex.quote(f"data.dataset_name={value}"))


def is_local(name: str) -> bool:
    return is_path(name) or os.path.exists(name)


def is_path(name: str) -> bool:
    """Return whether a dataset's name has the form of a local path, not the form of a hub name.

    A path has the suffix of a data file or spreadsheet, has a wildcard, or begins with ".", "/" or
    "~".
    """
    if data_suffix(name) or name.lower().endswith(SPREADSHEETS) or glob.has_magic(name):
        return True
    return name.startswith((".", "/", "~"))


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
    """Return the name of a file without suffixes and shard number.

    ``train-00000-of-00002.parquet`` -> ``train``, ``train_sft.jsonl`` -> ``train_sft``.
    """
    return SHARD.sub("", stem(path.name))


def choose_split(names: Sequence[str]) -> str | None:
    """Return the split to train on; None if the choice is not clear.

    The chosen split is train_prefs or a similar split, else train or training, else the only split.
    """
    preferences = [name for name in names if re.search("train.*pref", name.lower())]
    for likely in ("train_prefs", *preferences, "train", "training"):
        if likely in names:
            return likely
    return names[0] if len(names) == 1 else None


def split_words(split: str) -> set[str]:
    """Return the words of a split's name: ``train_prefs`` -> ``{"train", "prefs"}``."""
    return set(re.split(r"[-_.]", split.lower().replace("held_out", "heldout")))


def is_held_out(split: str) -> bool:
    """Return whether a split's name has a word for held-out data, such as test."""
    return not HELD_OUT.isdisjoint(split_words(split))


def names_split(name: str) -> bool:
    """Return whether a name has a word for training or held-out data, such as train or test."""
    return is_held_out(name) or not TRAIN.isdisjoint(split_words(name))


def split_note(split: str, names: Sequence[str]) -> str:
    """Return a note on the chosen split.

    If ``names`` has the held-out split that belongs to the chosen split (train_prefs ->
    test_prefs), the note also names the held-out split.
    """
    rest = split_words(split) - TRAIN
    chosen = "" if split == "train" else f"split {split} (of {list_names(names)})"
    for name in names:
        if is_held_out(name) and split_words(name) - HELD_OUT == rest:
            hint = f"data.dataset_test_split={name} would use the dataset's own held-out pairs"
            return join_sentences(chosen, hint)
    return chosen


def noted_split(note: str) -> str | None:
    """Return the held-out split that a source's note names; None if the note names none.

    :func:`split_note` writes the name: "data.dataset_test_split=test would use" -> ``test``.
    """
    found = re.search(rf"{TEST_SPLIT}=(\S+) would use", note)
    return found[1] if found else None


def join_sentences(*sentences: str) -> str:
    """Return the sentences that are not empty, joined by "; "."""
    return "; ".join(filter(None, sentences))


TRAIN_SPLIT, TEST_SPLIT = "data.dataset_train_split", "data.dataset_test_split"
"""The settings that name a split."""


def split_fix(key: str, names: Sequence[str]) -> str:
    """Return a fix that sets ``key`` to the most likely split in ``names``.

    ``key``: the recipe key of a split, TRAIN_SPLIT or TEST_SPLIT. ``names``: the existing splits.
    """
    held_out = [*filter(is_held_out, names)]
    others = [name for name in names if name not in held_out]
    if key == TEST_SPLIT:
        likely = [*held_out, *others]
    else:
        likely = [choose_split(names) or "", *others, *held_out]
    return next((Overrides({key: name}) for name in likely if name), "check data.dataset_name")


def list_names(names: Sequence[str]) -> str:
    """Join up to MAX_NAMES names for a sentence: "a, b and 3 more"."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


@contextmanager
def report_unreadable(name: str) -> Iterator[None]:
    """Turn an OSError in the ``with`` block into a DataError: a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise DataError(
            where=name,
            found=str(error),
            expected="a file that can be read",
            fix="check its owner and permissions",
        ) from None
