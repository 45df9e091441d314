"""Find the source for a dataset's name: a file, a folder, a pattern or a dataset of the hub."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from orpo_lite.data.sources.hub import HubSource, load_hub_dataset
from orpo_lite.data.sources.local import LocalSource, find_files, refuse_mistyped, unique_labels
from orpo_lite.data.sources.source import (
    TEST_SPLIT,
    TRAIN_SPLIT,
    Source,
    dataset_name_setting,
    is_local,
    list_names,
)
from orpo_lite.errors import DataError, Overrides


def find_source(name: str, split: str, config: str | None, key: str = TRAIN_SPLIT) -> Source:
    """Return the source of one split of a dataset.

    Args:
        name: a file, a folder or a dataset on the hub.
        split: the name of the split. "auto" selects a preference split such as train_prefs, else
            train or training, else the only split.
        config: the configuration of a hub dataset, or None.
        key: the recipe key that a person must change for another split, such as
            data.dataset_test_split. Error messages show it.

    Raises:
        DataError: the file or folder is missing, or has no such split.
        HubError: the hub dataset cannot be loaded, or has no such split.
    """
    if is_local(name):
        return find_files(name, split, key)
    refuse_mistyped(name)
    return load_hub_dataset(name, split, config, key)


def with_unique_labels(sources: Sequence[Source]) -> list[Source]:
    """Return the sources with a unique label for each file and for each split of a hub dataset.

    Messages name a row by a label and a number, such as a.csv:3.

    If two files have the same label, all files get longer labels: a.csv -> train/a.csv. The new
    label is the path relative to the folder that contains all files.

    If two splits have the same label, all splits get longer labels: train -> org/data/train.
    """
    paths: dict[str, str] = {}
    splits: dict[str, str] = {}
    for source in sources:
        if isinstance(source, LocalSource):
            paths |= {str(file.path): file.label for file in source.files}
        elif isinstance(source, HubSource):
            splits[source.whole_name] = source.label
    if len(set(paths.values())) < len(paths):
        labels = unique_labels([Path(os.path.abspath(path)) for path in paths])
        paths = dict(zip(paths, labels, strict=True))
    if len(set(splits.values())) < len(splits):
        splits = {name: name for name in splits}
    return [source.with_labels({**paths, **splits}) for source in sources]


def refuse_duplicates(sources: Sequence[Source], held_out: Sequence[Source] = ()) -> None:
    """Raise DataError if a training file or split is named twice, or is also held out."""
    held = {os.path.realpath(file): file for source in held_out for file in source.paths()}
    once: dict[str, str] = {}
    twice: dict[str, str] = {}
    for source in sources:
        names = {os.path.realpath(name): name for name in source.paths() or [source.name]}
        twice |= {path: name for path, name in names.items() if path in once or path in held}
        once |= {path: name for path, name in names.items() if path not in twice}
    if not twice:
        return
    fix: str = f"name other files in data.dataset_name or {TEST_SPLIT}"
    if once:
        setting = dataset_name_setting([*once.values()])
        fix = setting
        if len(held) == 1:  # single files have no splits, so the held-out file is named as well
            [test] = held.values()
            values = {**setting.values, TEST_SPLIT: test}
            fix = Overrides(values, text=f"{setting} {shlex.quote(f'{TEST_SPLIT}={test}')}")
    how = "named twice" if held.keys().isdisjoint(twice) else "used for training, but also held out"
    raise DataError(
        where="data.dataset_name",
        found=f"{list_names([*twice.values()])}: {how}",
        expected="each file and each split only once",
        fix=fix,
    )
