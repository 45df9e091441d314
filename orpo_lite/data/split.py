"""Which sets are trained on and which are held out, found but not read; and the split by prompt where none is named."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from orpo_lite.data.formats.column_map import check_column_map
from orpo_lite.data.pair import Pair
from orpo_lite.data.sources.find import find_source, refuse_twice
from orpo_lite.data.sources.source import (
    TEST_SPLIT,
    TRAIN_SPLIT,
    Source,
    is_local,
    is_path,
    names_line,
)
from orpo_lite.errors import DataError, OrpoLiteError, Overrides
from orpo_lite.recipe.schema import DataSection

Held = TypeVar("Held")  # whatever is split by prompt


def training_sources(data: DataSection) -> list[Source]:
    """The sets to train on, found but not read. Raises DataError and HubError."""
    check_column_map(data.columns)
    split = data.dataset_train_split
    if split not in ("auto", "train") and all(
        Path(name).expanduser().is_file() for name in data.names
    ):
        raise DataError(
            where="data.dataset_train_split",
            found=repr(split),
            expected="auto: files of their own have no splits",
            fix=Overrides(
                {"data.dataset_train_split": "auto"},
                ", or name the file of that split in data.dataset_name",
            ),
        )
    sources = [_find(data, "data.dataset_name", name, split, TRAIN_SPLIT) for name in data.names]
    refuse_twice(sources, held_out_sources(data) if all(map(is_local, data.names)) else ())
    return sources


def _find(data: DataSection, key: str, name: str, split: str, split_key: str) -> Source:
    """Find the set that ``key`` names. A fix that names another in its place is made one of the whole setting."""
    try:
        return find_source(name, split, data.dataset_config, split_key)
    except OrpoLiteError as error:
        other = (
            error.fix.values.get("data.dataset_name") if isinstance(error.fix, Overrides) else None
        )
        if other and key != "data.dataset_name":
            error.fix = Overrides({key: other})
        elif other and len(data.names) > 1:
            error.fix = names_line([other if old == name else old for old in data.names])
        raise


def held_out_sources(data: DataSection) -> list[Source]:
    """The held-out set of data.dataset_test_split: a file or folder of its own, else that split of the training sets.

    [] without one; ``hold_out`` then splits what is left of the training side. Raises DataError and HubError.
    """
    test = data.dataset_test_split
    if test is None:
        return []
    # A bare word is a split, even when a folder of that name stands near by.
    if is_path(test) or ("/" in test and Path(test).is_dir()):
        with suppress(DataError):  # files that carry no names of splits are all held out
            return [find_source(test, "test", None)]
        return [_find(data, TEST_SPLIT, test, "auto", TEST_SPLIT)]
    if alone := next((name for name in data.names if Path(name).expanduser().is_file()), None):
        folders = [
            find_source(name, test, None, TEST_SPLIT)
            for name in data.names
            if Path(name).expanduser().is_dir()
        ]
        files = [file for source in folders for file in source.paths()]
        own = files[0] if len(files) == 1 else None
        raise DataError(
            where="data.dataset_test_split",
            found=repr(test),
            expected=f"a file of its own ({alone} has no splits), or null to hold out data.test_split_size",
            fix=Overrides(
                {"data.dataset_test_split": own},
                text=shlex.quote(f"data.dataset_test_split={own or 'null'}"),
            ),
        )
    return [find_source(name, test, data.dataset_config, TEST_SPLIT) for name in data.names]


def prompt_key(pair: Pair) -> bytes:
    """What makes two prompts the same: a hash (16 bytes) of roles and words, whatever their case and spacing."""
    turns = (
        f"{turn['role']}: {' '.join(turn['content'].split()).casefold()}" for turn in pair.messages
    )
    return hashlib.blake2b("\n".join(turns).encode(), digest_size=16).digest()


def hold_out(
    pairs: Sequence[Held], prompts: Sequence[bytes], size: float, seed: int
) -> tuple[list[Held], list[Held]]:
    """Split by prompt: a share of the prompts (size < 1), or whole prompts until there are ``size`` pairs.

    Args:
        pairs: those that are left when all filters have been passed, so that no filter can empty a side.
        prompts: what makes two prompts the same, one for each pair (:func:`prompt_key`).

    A prompt's rank is a hash of seed and prompt, so the order of the rows does not matter.
    """
    if size == 0:
        return list(pairs), []
    counts = Counter(prompts)
    ranked = sorted(counts, key=lambda key: hashlib.sha256(b"%d\n" % seed + key).digest())
    if size < 1:
        held = set(ranked[: max(1, round(size * len(ranked)))])
    else:
        before = accumulate(
            (counts[key] for key in ranked), initial=0
        )  # pairs held before each prompt
        held = {key for key, pairs_held in zip(ranked, before, strict=False) if pairs_held < size}
    if len(held) == len(ranked):
        raise DataError(
            where="data.test_split_size",
            found=f"{size:g} of {len(pairs)} pairs with {len(ranked)} different prompts leaves none to train on",
            expected="less than all prompts",
            fix=Overrides({"data.test_split_size": 0}, ", or more pairs"),
        )
    train: list[Held] = []
    test: list[Held] = []
    for pair, prompt in zip(pairs, prompts, strict=True):
        (test if prompt in held else train).append(pair)
    return train, test
