"""Rows of a set of the hub."""

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

from orpo_lite.data.sources.lines import Place
from orpo_lite.data.sources.local import named, near_names
from orpo_lite.data.sources.source import (
    AUTO,
    TRAIN_SPLIT,
    Source,
    choose_split,
    joined,
    listed,
    said_split,
    split_fix,
)
from orpo_lite.errors import Command, DataError, HubError, Overrides, reworded


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
        # datasets' own is of the revision, the configuration and the split.
        said = f"{self.whole_name}\n{self.table._fingerprint}"
        return hashlib.sha256(said.encode()).hexdigest(), len(self.table)

    def columns(self) -> frozenset[str] | None:
        return frozenset(self.table.column_names)


def load_set(name: str, split: str, config: str | None, key: str = TRAIN_SPLIT) -> HubSource:
    import datasets  # a second to import, and local files do not need it

    datasets.disable_progress_bars()
    unreachable, where = _unreachable(name), f"data.dataset_name {name}"
    try:
        with _offline() if unreachable else nullcontext():
            names = [split] if split != AUTO else _split_names(name, config)
            chosen = choose_split(names)
            table = (
                datasets.load_dataset(name, config, split=chosen) if chosen is not None else None
            )
    except Exception as error:  # whatever a download can raise is the hub's or the network's
        expected, said = (
            f"split {split!r}" if split != AUTO else "a data set with pairs",
            _found(error),
        )
        fix = _hub_fix(name, error, key)
        if unreachable and isinstance(
            error, ConnectionError
        ):  # all that datasets knows is that it was not to ask
            expected, said = (
                "a connection, or a copy in the cache",
                f"{unreachable} and it is not in the cache",
            )
            if "Timeout" in unreachable:
                fix = reworded(fix, f"{fix}; HF_HUB_ETAG_TIMEOUT=60 waits longer for a slow one")
        raise HubError(where=where, found=said, expected=expected, fix=fix) from error
    if chosen is None:
        found, expected = (
            f"several splits: {listed(names)}",
            "a split train, or one with preferences",
        )
        raise HubError(where=where, found=found, expected=expected, fix=split_fix(key, names))
    said = said_split(chosen, names) if split == AUTO else ""
    return HubSource(
        name,
        joined(f"{unreachable}; read from the cache" if unreachable else "", said),
        chosen,
        table,
    )


def _split_names(name: str, config: str | None) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name, config))
    except Exception:  # offline the set may still be in the cache; if not, this says why
        return list(datasets.load_dataset(name, config))


def _unreachable(name: str) -> str:
    """Return that the hub does not answer, as a sentence; "" when it does, and when it is not to be asked.

    datasets would try each of its own requests for half a minute or more before it looks into its cache. This is the
    first of them, through the same client and so the same proxies.
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
    except (
        OSError,
        ValueError,
    ):  # an answer, a page that is not the hub's, or a name that cannot be one
        return ""
    except HTTPError as error:
        return f"{urlsplit(url).netloc} cannot be reached ({type(error).__name__})"
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


def _found(error: Exception) -> str:
    """The first line of the message, and the second when it lists the configurations."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(lines[:2]) if len(lines) > 1 and CONFIGS.search(lines[1]) else lines[0]


# How datasets lists what there is, at the end of a line.
CONFIGS = re.compile(
    r"(?:available configs|available configs in the cache|available|in the cache): \[?(.+?)\]?$",
    re.I | re.M,
)
SPLITS = re.compile(r"should be one of \[(.+?)\]", re.I)


def _hub_fix(name: str, error: Exception, key: str) -> str:
    said = str(error).replace(name, "").lower()
    folder = shlex.quote(name.rpartition("/")[2])
    download = f"hf download --repo-type dataset {shlex.quote(name)} --local-dir {folder}"
    then = f", then data.dataset_name={folder}"
    if "scripts are no longer supported" in said:
        return Command(f"{download} --revision refs/convert/parquet", then)
    if "split" in said:
        options = SPLITS.search(str(error))
        return (
            split_fix(key, _names(options[1])) if options else f"name a split of the set in {key}"
        )
    if "config" in said:
        options = CONFIGS.search(str(error))
        if options is None:
            return "name a configuration of the set in data.dataset_config"
        return Overrides(
            {"data.dataset_config": _names(options[1])[0]}, ", or another configuration of the set"
        )
    near = here = ""
    if "/" not in name:
        near = named(Path(name), near_names(Path(name)))
        other = f" ({near} is)" if near else ""
        here = f"there is no file or folder {name} here either{other}; for a set of the hub, "
    if any(
        word in said for word in ("gated", "401", "403", "private", "authenticat", "doesn't exist")
    ):
        page = f"{here}open https://huggingface.co/datasets/{name}, ask for access if it is gated, then `hf auth login`"
        return reworded(near or Command("hf auth login"), page)
    # Without a network datasets does not look for a set where `hf download` alone would put it.
    page = f"{here}check the network, or on a connected machine: {download}{then}"
    return reworded(near or Command(download), page)


def _names(listed: str) -> list[str]:
    return [name.strip("'\"") for name in listed.split(", ")]
