"""The source that a name stands for: a file, a folder, a pattern or a set of the hub."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from orpo_lite.data.sources.hub import HubSource, load_set
from orpo_lite.data.sources.local import LocalSource, find_files, refuse_mistyped, unique_labels
from orpo_lite.data.sources.source import (
    TEST_SPLIT,
    TRAIN_SPLIT,
    Source,
    is_local,
    listed,
    names_line,
)
from orpo_lite.errors import DataError, Overrides


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
        str(file.path): file.label
        for source in sources
        if isinstance(source, LocalSource)
        for file in source.files
    }
    splits = {
        source.whole_name: source.label for source in sources if isinstance(source, HubSource)
    }
    if len(set(paths.values())) < len(paths):
        paths = dict(
            zip(paths, unique_labels([Path(os.path.abspath(path)) for path in paths]), strict=True)
        )
    if len(set(splits.values())) < len(splits):
        splits = {name: name for name in splits}
    return [source.labelled({**paths, **splits}) for source in sources]


def refuse_twice(sources: Sequence[Source], held_out: Sequence[Source] = ()) -> None:
    """Raise DataError for a file, or a split of a set, of which all rows would be read twice, or held out as well."""
    held = {os.path.realpath(file): file for source in held_out for file in source.paths()}
    once: dict[str, str] = {}
    twice: dict[str, str] = {}
    for source in sources:
        names = {os.path.realpath(name): name for name in source.paths() or [source.name]}
        twice |= {path: name for path, name in names.items() if path in once or path in held}
        once |= {path: name for path, name in names.items() if path not in twice}
    if not twice:
        return
    fix: str = names_line([*once.values()]) if once else "name other files in one of the two"
    if (
        isinstance(fix, Overrides) and len(held) == 1
    ):  # files of their own have no splits by which to name it
        values = {**fix.values, TEST_SPLIT: next(iter(held.values()))}
        fix = Overrides(values, text=f"{fix} {shlex.quote(f'{TEST_SPLIT}={values[TEST_SPLIT]}')}")
    found = f"{listed([*twice.values()])}: {'twice' if held.keys().isdisjoint(twice) else 'held out as well'}"
    raise DataError(where="data.dataset_name", found=found, expected="each row once", fix=fix)
