"""Read the rows of a hub dataset."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orpo_lite.data.sources.lines import PlacedRow
from orpo_lite.data.sources.local import path_settings, similar_names
from orpo_lite.data.sources.source import (
    AUTO,
    TRAIN_SPLIT,
    Source,
    choose_split,
    join_sentences,
    list_names,
    split_fix,
    split_note,
)
from orpo_lite.errors import Command, DataError, HubError, Overrides, reworded


@dataclass(frozen=True)
class HubSource(Source):
    """One split of a hub dataset."""

    label: str
    """The name of the split in the places of rows, such as train[11]."""
    table: Any = field(repr=False)
    """The rows on disk, as a datasets.Dataset."""

    # datasets has already read the rows, so there are no faults.
    def rows(self, faults: list[DataError]) -> Iterator[PlacedRow]:  # noqa: ARG002
        yield from ((f"{self.label}[{i}]", row) for i, row in enumerate(self.table))

    def with_labels(self, labels: Mapping[str, str]) -> Source:
        return replace(self, label=labels[self.whole_name])

    @property
    def whole_name(self) -> str:
        return f"{self.name}/{self.label}"

    def fingerprint(self) -> tuple[str, int]:
        # The fingerprint of datasets covers the revision, the configuration and the split.
        content = f"{self.whole_name}\n{self.table._fingerprint}"
        return hashlib.sha256(content.encode()).hexdigest(), len(self.table)

    def columns(self) -> frozenset[str] | None:
        return frozenset(self.table.column_names)


def load_hub_dataset(
    name: str, split: str, config: str | None, key: str = TRAIN_SPLIT
) -> HubSource:
    """Return a split as a source. The split is downloaded from the hub or read from the cache.

    ``key``: the recipe key of the split, such as data.dataset_test_split. The fix of an error
    shows this key. Raises HubError.
    """
    import datasets  # takes a second to import, and local files do not need it

    datasets.disable_progress_bars()
    unreachable, where = _unreachable(name), f"data.dataset_name {name}"
    try:
        with _offline() if unreachable else nullcontext():
            names = [split] if split != AUTO else _split_names(name, config)
            chosen = choose_split(names)
            table = None
            if chosen is not None:
                table = datasets.load_dataset(name, config, split=chosen)
    except Exception as error:  # a download can raise any error of the hub or the network
        found, fix = _error_message(error), _download_fix(name, error, key)
        expected = f"split {split!r}" if split != AUTO else "a dataset with pairs"
        if unreachable and isinstance(error, ConnectionError):  # it was not allowed to connect
            found = f"{unreachable}, and the dataset is not in the cache"
            expected = "a connection, or a copy in the cache"
            if "Timeout" in unreachable:
                fix = reworded(fix, f"{fix}; if it is slow, HF_HUB_ETAG_TIMEOUT=60 waits longer")
        raise HubError(where=where, found=found, expected=expected, fix=fix) from error
    if chosen is None:
        raise HubError(
            where=where,
            found=f"several splits: {list_names(names)}",
            expected="a split named train or train_prefs",
            fix=split_fix(key, names),
        )
    cache_note = f"{unreachable}; read from the cache" if unreachable else ""
    note = join_sentences(cache_note, split_note(chosen, names) if split == AUTO else "")
    return HubSource(name, note, chosen, table)


def _split_names(name: str, config: str | None) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name, config))
    except Exception:  # the dataset may still be in the cache; if not, this raises the reason
        return list(datasets.load_dataset(name, config))


def _unreachable(name: str) -> str:
    """Return why the hub cannot be reached; "" if it answers or HF_HUB_OFFLINE is set.

    Without a connection, the datasets library waits half a minute or more at each request before it
    uses its cache. So this function first sends one such request, with the same client and proxies.
    """
    from datasets import config
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        if not config.HF_HUB_OFFLINE:
            url = hf_hub_url(
                name, config.REPOCARD_FILENAME, repo_type="dataset", endpoint=config.HF_ENDPOINT
            )
            get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OSError, ValueError):  # an error answer, another site's page, or an impossible name
        return ""
    except HTTPError as error:
        return f"{urlsplit(url).netloc} cannot be reached ({type(error).__name__})"
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    """Make the datasets library read only its cache, inside the ``with`` block.

    The library reads its environment variable only on import, so its configuration is changed.
    """
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _error_message(error: Exception) -> str:
    """Return the first line of an error message, and the second if it lists configurations."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(lines[:2]) if len(lines) > 1 and CONFIGS.search(lines[1]) else lines[0]


# The texts in which the datasets library lists existing configurations and splits.
CONFIGS = re.compile(
    r"(?:available configs|available configs in the cache|available|in the cache): \[?(.+?)\]?$",
    re.I | re.M,
)
SPLITS = re.compile(r"should be one of \[(.+?)\]", re.I)
ACCESS_ERRORS = ("gated", "401", "403", "private", "authenticat", "doesn't exist")


def _download_fix(name: str, error: Exception, key: str) -> str:
    """Return the fix for an error of the datasets library. ``key``: the setting of the split."""
    message = str(error).replace(name, "").lower()
    folder = shlex.quote(name.rpartition("/")[2])
    download = f"hf download --repo-type dataset {shlex.quote(name)} --local-dir {folder}"
    then = f", then data.dataset_name={folder}"
    if "scripts are no longer supported" in message:
        return Command(f"{download} --revision refs/convert/parquet", then)
    if "split" in message:
        options = SPLITS.search(str(error))
        if options is None:
            return f"name a split of the dataset in {key}"
        return split_fix(key, _split_list(options[1]))
    if "config" in message:
        options = CONFIGS.search(str(error))
        if options is None:
            return "name a configuration of the dataset in data.dataset_config"
        config = _split_list(options[1])[0]
        other = ", or another configuration of the dataset"
        return Overrides({"data.dataset_config": config}, other)
    similar = no_file = ""
    if "/" not in name:
        similar = path_settings(Path(name), similar_names(Path(name)))
        found = f" (similar: {similar})" if similar else ""
        no_file = f"there is no local file or folder {name}{found}; for a dataset of the hub, "
    if any(word in message for word in ACCESS_ERRORS):
        page = f"open https://huggingface.co/datasets/{name}, ask for access if it is gated"
        advice = f"{no_file}{page}, then `hf auth login`"
        return reworded(similar or Command("hf auth login"), advice)
    # Without a network, datasets does not find what `hf download` alone puts into the cache.
    advice = f"{no_file}check the network, or on a connected machine: {download}{then}"
    return reworded(similar or Command(download), advice)


def _split_list(text: str) -> list[str]:
    return [name.strip("'\"") for name in text.split(", ")]
