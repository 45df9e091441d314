"""What the cards of a base and of data sets say of their licences, and what the licences ask of those who publish.

A licence is read, never assumed: where a card names none, none is named.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, snapshot_download

from orpo_lite.base import HUB_TIMEOUT, UNREACHABLE
from orpo_lite.data.rows import is_path
from orpo_lite.errors import TOKEN, ModelError, RecipeError
from orpo_lite.recipe import BACK, DEEPER, MAX_DEPTH

KEYS = ("license", "license_name", "license_link")
PAPERS = [f"{name}{end}" for name in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY") for end in ("", ".txt", ".md")]
MAX_BYTES = 1 << 20  # of a card or a licence's text
NON_COMMERCIAL = re.compile(r"(^|[-_ ])(nc|non-?commercial|research-only)([-_ ]|$)", re.IGNORECASE)
COPY = "provide a copy of this Agreement"


@dataclass(frozen=True)
class Terms:
    """What a community licence asks of a derivative that is published; the words are its own."""

    title: str
    notice: str
    """The text of the file NOTICE."""
    built_with: str = ""
    """To be displayed; "" where nothing is."""
    prefix: str = ""
    """What the derivative's name begins with."""
    copy: bool = True
    """A copy of the agreement comes with it."""


def _llama(version: str) -> Terms:
    title = f"Llama {version} Community License"
    notice = f"Llama {version} is licensed under the {title}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return Terms(title, notice, "Built with Llama", "Llama")


# Sources: section 1.b of each agreement, as it lies beside the weights.
TERMS: dict[str, Terms] = {
    "llama2": Terms(
        "LLAMA 2 Community License",
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3": Terms(
        "Meta Llama 3 Community License",
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        "Built with Meta Llama 3",
        "Llama 3",
    ),
    **{f"llama{version}": _llama(version) for version in ("3.1", "3.2", "3.3", "4")},
    "gemma": Terms(
        "Gemma Terms of Use",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        copy=False,  # the hub's own copies of Gemma carry no text of the terms; the notice says where it is
    ),
}


def find_terms(licence: Mapping[str, str]) -> Terms | None:
    """What the licence of a base asks, if it is one that asks more than to be named."""
    for key in ("license", "license_name"):
        text = licence.get(key, "").lower()
        if found := re.match(r"(?:meta[-_ ])?llama[-_ ]?([234])(?:[-_.]([123])(?!\d))?", text):
            version = ".".join(part for part in found.groups() if part)
            return TERMS.get(f"llama{version}", _llama(version))
        if text.startswith("gemma"):
            return TERMS["gemma"]
    return None


def refuse_name(repository: str, licence: Mapping[str, str], where: str) -> None:
    """Raise RecipeError for a name that the base's licence does not allow, with the rule."""
    terms = find_terms(licence)
    name = repository.rpartition("/")[2]
    if terms is None or re.sub(r"[-_ .]", "", name).startswith(terms.prefix.replace(" ", "")):
        return
    rule = f"you shall also include “{terms.prefix}” at the beginning of any such AI model name"
    owner = repository.removesuffix(name)
    renamed = re.sub("^llama[-_.]*", "", name, flags=re.IGNORECASE)
    remedy = f"a name such as {owner}{terms.prefix.replace(' ', '-')}-{renamed}"
    raise RecipeError(where, f"{repository}, of a base under the {terms.title}", f"“{rule}” (1.b.i)", remedy)


def find_papers(
    licence: Mapping[str, str], base: str, revision: str | None, folder: Path, beside: Sequence[Path] = ()
) -> dict[str, bytes | Path]:
    """The files that go with a derivative: the base's licence and notices, and what its terms ask for.

    Args:
        licence: as the base's card has it.
        base: its hub name, or a folder.
        revision: its hub commit; None for a folder.
        folder: where it lies.
        beside: where a person may have laid such files; these come first.

    Raises:
        ModelError: terms that ask for a copy of the agreement, and there is none.
    """
    own = fetch_papers(base, revision, None if revision else folder)
    folders = [*beside, *([own] if own else [])]
    agreement = _agreement(read_card(own))
    papers: dict[str, bytes | Path] = {}
    for folder in folders:
        for file in (folder / name for name in PAPERS):
            if file.is_file() and file.stat().st_size <= MAX_BYTES and _stays(file):
                papers.setdefault(file.name, file)
    terms = find_terms(licence)
    if terms is None:
        return papers
    if agreement and not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in papers):
        papers["LICENSE"] = agreement.encode()
    if terms.copy and not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in papers):
        rule = f"“{COPY}” ({terms.title}, 1.b.i)"
        raise ModelError(
            f"model {base}", "no file LICENSE beside its weights", rule, f"put it into {[*folders, folder][0]}"
        )
    written = [name for name in papers if name.upper().startswith("NOTICE")]
    texts = {name: read_text(papers[name]) for name in written}
    if not any(_flat(terms.notice) in _flat(text) for text in texts.values()):
        kept = texts.get("NOTICE", "")
        papers["NOTICE"] = f"{kept.rstrip()}\n\n{terms.notice}\n".lstrip().encode()
    return papers


def _stays(file: Path) -> bool:
    """Whether a file lies where it seems to: a link out of its folder would publish what somebody else chose.

    The hub's cache links a repository's files to its blobs, two folders up.
    """
    target, home = file.resolve(), file.parent.resolve()
    return target.parent in (home, home.parent.parent / "blobs")


def read_text(paper: bytes | Path) -> str:
    """The text of a file or of what is to be one."""
    return (paper if isinstance(paper, bytes) else paper.read_bytes()).decode("utf-8", "replace")


def _flat(text: str) -> str:
    return " ".join(text.replace("©", "(c)").split()).lower()


def is_non_commercial(licence: str) -> bool:
    """Whether a licence such as cc-by-nc-4.0 keeps commerce out."""
    return bool(NON_COMMERCIAL.search(licence))


# --- cards


def fetch_papers(name: str, revision: str | None, folder: Path | None, *, kind: str = "model") -> Path | None:
    """The folder with the card and the licence of a repository, from the cache where they are; None: they are not.

    Nothing depends on it but what a card says, so a hub that cannot be reached is no fault here.
    """
    if folder is not None:
        return folder
    for offline in (True, False):
        try:
            if not offline:  # asked once: the download of a file would ask for half a minute
                HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HUB_TIMEOUT)
            found = snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=["README.md", *PAPERS], local_files_only=offline
            )
        except UNREACHABLE:
            continue
        if (Path(found) / "README.md").is_file():
            return Path(found)
    return None


def read_card(folder: Path | None) -> dict[str, Any]:
    """The metadata of README.md; {} where there is none that can be read."""
    if folder is None or not (folder / "README.md").is_file():
        return {}
    return split_card((folder / "README.md").read_bytes()[:MAX_BYTES].decode("utf-8", "replace"))[0]


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card; {} for metadata that is no mapping in YAML."""
    found = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        data = yaml.safe_load(found[1]) if _is_plain(found[1]) else {}
    except (yaml.YAMLError, ValueError):
        return {}, found[2]
    return (data if isinstance(data, dict) else {}), found[2]


def _is_plain(text: str) -> bool:
    """Whether a YAML text has neither aliases, which can expand without end, nor brackets that PyYAML sinks in."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, DEEPER) - isinstance(token, BACK)
        if depth > MAX_DEPTH or isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            return False
    return True


def read_licences(base: str, revision: str | None, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What the cards of a base and of data sets say of their licences: lock.json's ``licences``.

    Args:
        base: its hub name, or a folder.
        revision: its hub commit; None for a folder.
        folder: where it lies.
        names: the data sets, as a recipe has them.
    """
    card = read_card(fetch_papers(base, revision, None if revision else folder))
    sets = {name: read_card(fetch_papers(name, None, None, kind="dataset")) for name in names if is_hub_name(name)}
    return {"base": licence_of(card), "data": {name: licence_of(card) for name, card in sets.items()}}


def is_hub_name(name: str) -> bool:
    """Whether data of this name are a set of the hub; a run's recipe has local ones by their whole path."""
    return not is_path(name) and not name.startswith("builtin:")


def licence_of(card: Mapping[str, Any]) -> dict[str, str]:
    """license, license_name and license_link as a card has them; several licences as one text."""
    found: dict[str, str] = {}
    for key in KEYS:
        value = card.get(key)
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        text = " ".join(str(value).split())[:300] if isinstance(value, str | int | float) else ""
        if text and not TOKEN.search(text) and not text.startswith((os.sep, "~", "file:")):
            found[key] = text
    return found


def _agreement(card: Mapping[str, Any]) -> str:
    """The licence's text that a gated base's card shows to those who ask for it; "" when it does not."""
    text = str(card.get("extra_gated_prompt") or "")
    return text if "AGREEMENT" in text.upper() and len(text) > 2000 else ""
