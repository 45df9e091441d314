"""The source that a name stands for: a file, a folder, a pattern or a set of the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from orpo_lite.data.sources.hub import HubSource, load_set
from orpo_lite.data.sources.local import LocalSource, find_files, refuse_mistyped, unique_labels
from orpo_lite.data.sources.source import TRAIN_SPLIT, Source, is_local, listed, names_line
from orpo_lite.errors import DataError


def find_source(name: str, split: str, config: str | None, key: str = TRAIN_SPLIT) -> Source:
    """The rows of one split, which the setting ``key`` names.

    ``split``: "auto" takes the preference split of a set, else train, else the only one.

    Raises DataError for a file or folder that is not there or holds no such split, HubError for a hub set.
    """
    if is_local(name):
        return find_files(name, split, key)
    refuse_mistyped(name)
    return load_set(name, split, config, key)


def with_unique_labels(sources: Sequence[Source]) -> list[Source]:
    """The same sources, of which no two have places alike: where names repeat, each has its folder or its set in it."""
    paths = {
        str(file.path): file.label for source in sources if isinstance(source, LocalSource) for file in source.files
    }
    splits = {source.whole_name: source.label for source in sources if isinstance(source, HubSource)}
    if len(set(paths.values())) < len(paths):
        paths = dict(zip(paths, unique_labels([Path(os.path.abspath(path)) for path in paths]), strict=True))
    if len(set(splits.values())) < len(splits):
        splits = {name: name for name in splits}
    return [source.labelled({**paths, **splits}) for source in sources]


def refuse_twice(sources: Sequence[Source]) -> None:
    """Raise DataError for a file, or a split of a set, of which all rows would be read twice."""
    once: dict[str, str] = {}
    twice = []
    for source in sources:
        names = {os.path.realpath(name): name for name in source.paths() or [source.name]}
        twice += [name for path, name in names.items() if path in once]
        once = {**once, **names, **once}
    if twice:
        fix = names_line([*once.values()])
        raise DataError(where="data.dataset_name", found=f"{listed(twice)}: twice", expected="each row once", fix=fix)
