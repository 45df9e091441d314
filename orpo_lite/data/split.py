"""Find the training and held-out datasets, or hold out some prompts of the training pairs."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from orpo_lite.data.formats.column_map import check_column_map
from orpo_lite.data.pair import Pair
from orpo_lite.data.sources.find import find_source, refuse_duplicates
from orpo_lite.data.sources.source import (
    TEST_SPLIT,
    TRAIN_SPLIT,
    Source,
    dataset_name_setting,
    is_local,
    is_path,
)
from orpo_lite.errors import DataError, OrpoLiteError, Overrides
from orpo_lite.recipe.schema import DataSection

Item = TypeVar("Item")


def training_sources(data: DataSection) -> list[Source]:
    """Return the datasets to train on. Their rows are not read. Raises DataError and HubError."""
    check_column_map(data.columns)
    split = data.dataset_train_split
    if split not in ("auto", "train") and all(map(_is_file, data.names)):
        raise DataError(
            where="data.dataset_train_split",
            found=repr(split),
            expected="auto, because single files have no splits",
            fix=Overrides(
                {"data.dataset_train_split": "auto"},
                ", or name the file of that split in data.dataset_name",
            ),
        )
    sources = [_find(data, "data.dataset_name", name, split, TRAIN_SPLIT) for name in data.names]
    refuse_duplicates(sources, held_out_sources(data) if all(map(is_local, data.names)) else ())
    return sources


def _is_file(name: str) -> bool:
    return Path(name).expanduser().is_file()


def _find(data: DataSection, key: str, name: str, split: str, split_key: str) -> Source:
    """Return the dataset that the setting ``key`` names.

    If an error suggests another name for this dataset, its fix is changed to the whole setting:
    ``key``, or data.dataset_name with the other datasets.
    """
    try:
        return find_source(name, split, data.dataset_config, split_key)
    except OrpoLiteError as error:
        other = None
        if isinstance(error.fix, Overrides):
            other = error.fix.values.get("data.dataset_name")
        if other and key != "data.dataset_name":
            error.fix = Overrides({key: other})
        elif other and len(data.names) > 1:
            names = [other if old == name else old for old in data.names]
            error.fix = dataset_name_setting(names)
        raise


def held_out_sources(data: DataSection) -> list[Source]:
    """Return the held-out datasets that data.dataset_test_split names.

    The setting is a file, a folder, or a split of the training datasets. If it is null, the result
    is []. Then held-out pairs are taken from the training pairs by :func:`hold_out`. Raises
    DataError and HubError.
    """
    test = data.dataset_test_split
    if test is None:
        return []
    # A single word is a split, even if there is a folder with that name.
    if is_path(test) or ("/" in test and Path(test).is_dir()):
        with suppress(DataError):  # files without a split in their names are all held out
            return [find_source(test, "test", None)]
        return [_find(data, TEST_SPLIT, test, "auto", TEST_SPLIT)]
    file = next(filter(_is_file, data.names), None)
    if file is not None:
        raise _no_splits(data, test, file)
    return [find_source(name, test, data.dataset_config, TEST_SPLIT) for name in data.names]


def _no_splits(data: DataSection, test: str, file: str) -> DataError:
    """Return the error for data.dataset_test_split=test if a training dataset is a single file.

    A single file has no splits. If the training datasets that are folders have exactly one file of
    the split, the fix names that file.
    """
    folders = [
        find_source(name, test, None, TEST_SPLIT)
        for name in data.names
        if Path(name).expanduser().is_dir()
    ]
    files = [path for source in folders for path in source.paths()]
    own = files[0] if len(files) == 1 else None
    text = shlex.quote(f"data.dataset_test_split={own or 'null'}")
    return DataError(
        where="data.dataset_test_split",
        found=repr(test),
        expected=f"a file, because {file} has no splits; or null to use data.test_split_size",
        fix=Overrides({"data.dataset_test_split": own}, text=text),
    )


def prompt_key(pair: Pair) -> bytes:
    """Return a hash (16 bytes) of the prompt's roles and words. Case and spacing are ignored."""
    turns = (
        f"{turn['role']}: {' '.join(turn['content'].split()).casefold()}" for turn in pair.messages
    )
    return hashlib.blake2b("\n".join(turns).encode(), digest_size=16).digest()


def hold_out(
    pairs: Sequence[Item], prompts: Sequence[bytes], size: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Split pairs by prompt, and return the training pairs and the held-out pairs.

    Prompts are sorted by a hash of the seed and the prompt, and the first prompts are held out. So
    the result does not depend on the order of the rows.

    Args:
        pairs: the pairs that are left after all filters, or their indices.
        prompts: for each pair, the key of its prompt (:func:`prompt_key`).
        size: below 1, the share of prompts to hold out: 0.1 -> 10% of the prompts. From 1 on, the
            number of pairs to hold out: 100 -> 100 pairs, or a few more, because all pairs of a
            prompt stay together.
        seed: the seed of the hash.

    Raises DataError if no training pairs are left.
    """
    if size == 0:
        return list(pairs), []
    counts = Counter(prompts)
    ranked = sorted(counts, key=lambda key: hashlib.sha256(b"%d\n" % seed + key).digest())
    held: set[bytes] = set()
    if size < 1:
        held.update(ranked[: max(1, round(size * len(ranked)))])
    else:
        held_pairs = 0
        for key in ranked:
            if held_pairs >= size:
                break
            held.add(key)
            held_pairs += counts[key]
    if len(held) == len(ranked):
        raise DataError(
            where="data.test_split_size",
            found=f"a size of {size:g} holds out every pair (pairs: {len(pairs)}, different "
            f"prompts: {len(ranked)}) and leaves none to train on",
            expected="a size that leaves some prompts to train on",
            fix=Overrides({"data.test_split_size": 0}, ", or use more pairs"),
        )
    train: list[Item] = []
    test: list[Item] = []
    for pair, prompt in zip(pairs, prompts, strict=True):
        (test if prompt in held else train).append(pair)
    return train, test
