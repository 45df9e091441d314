"""What the cards of a base and of data sets say of their licences, and what the licences ask of those who publish.

A licence is read, never assumed: where a card names none, none is named.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import HfApi, snapshot_download

from orpo_lite.base.download import HUB_TIMEOUT, UNREACHABLE
from orpo_lite.data.sources.source import is_path
from orpo_lite.errors import TOKEN, ModelError, RecipeError
from orpo_lite.recipe.text import BACK, DEEPER, MAX_DEPTH

KEYS = ("license", "license_name", "license_link")
LICENSE_FILES = [
    f"{name}{end}"
    for name in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    for end in ("", ".txt", ".md")
]
MAX_BYTES = 1 << 20  # of a card or a licence's text
MAX_NAME = 96  # characters of a repository's name, its owner's among them
# In words joined by hyphens. Beside what says so itself, names of the hub's list and of large models that do not:
# https://huggingface.co/docs/hub/repositories-licenses
NON_COMMERCIAL = re.compile(
    r"\b(nc|non-?commercial|non-production|not-for-commercial|no-commercial-use|research-(use-)?only|only-for-research"
    r"|research-use|(h|intel|qwen|qianwen|mistral-ai)-research|academic-only|personal-use-only"
    r"|apple-amlr|deepfloyd-if-license|mnpl|mrl)\b"
)
BEGINS = r"(?:^|[\s,;/+&(]|meta[-_ ]|google[-_ ])"  # not my-llama3, which may be anything
LLAMA = re.compile(
    BEGINS + r"llama(?:[-_ ]*(?:community|licen[cs]e|agreement|version))*[-_ ]*v?([234])"
    r"(?:([-_.]?)(\d{1,2})(?![a-z\d]))?(?!\d)"
)
GEMMA = re.compile(BEGINS + r"gemma(?![a-z])")
CARD = re.compile(
    r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", re.DOTALL
)  # metadata, body
AGREEMENT = (
    "community license"  # in the text of each of them that asks for a copy, and in no other licence
)
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


def named(licence: Mapping[str, Any]) -> list[str]:
    """Every licence that a card names: one or several in ``license``, and ``license_name``."""
    found = licence.get("license", [])
    texts = [*(found if isinstance(found, list) else [found]), licence.get("license_name", "")]
    return [str(text) for text in texts if text]


def in_words(licence: Mapping[str, Any]) -> str:
    """The licences of a card for people; "" where it names none."""
    names = named(licence)
    return ", ".join([name for name in names if name.lower() != "other"] or names)


def find_terms(licence: Mapping[str, Any]) -> list[Terms]:
    """What the licences of a base ask, those of them that ask more than to be named."""
    found: list[Terms] = []
    for text in map(str.lower, named(licence)):
        found += [_llama_terms(*match.groups()) for match in LLAMA.finditer(text)]
        found += [TERMS["gemma"]] * bool(GEMMA.search(text))
    return list(dict.fromkeys(found))


def _llama_terms(major: str, dot: str, minor: str | None) -> Terms:
    exact = f"llama{major}" if not minor or int(minor) == 0 else f"llama{major}.{minor}"
    if exact in TERMS:
        return TERMS[exact]
    # llama3.10 is none that is known here, and no Llama 3 for that; llama-3-8 is one of 8 billion.
    return _llama(f"{major}.{minor}") if dot == "." and major != "2" else TERMS[f"llama{major}"]


def refuse_name(repository: str, licence: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for a name that the base's licence does not allow, with the rule."""
    name = repository.rpartition("/")[2]
    flat = re.sub(r"[-_ .]", "", name)
    broken = [
        terms for terms in find_terms(licence) if not flat.startswith(terms.prefix.replace(" ", ""))
    ]
    if not broken:
        return
    terms = max(broken, key=lambda terms: len(terms.prefix))
    rule = f"you shall also include “{terms.prefix}” at the beginning of any such AI model name"
    first, *others = terms.prefix.split()
    prefix = rf"^(?:meta[-_.]*)?{first}[-_.]*" + "".join(
        rf"(?:{word}(?!\.?\d)[-_.]*)?" for word in others
    )
    renamed = re.sub(prefix, "", name, flags=re.IGNORECASE).strip("-_.") or "tuned"
    longest = f"{repository.removesuffix(name)}{terms.prefix.replace(' ', '-')}-{renamed}"[
        :MAX_NAME
    ]
    raise RecipeError(
        where=where,
        found=f"{repository}, of a base under the {terms.title}",
        expected=f"“{rule}” (1.b.i)",
        fix=f"a name such as {longest.rstrip('-_.').removesuffix('.git')}",
    )


def find_license_files(
    licence: Mapping[str, Any],
    base: str,
    revision: str | None,
    folder: Path,
    beside: Sequence[Path] = (),
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
    own = fetch_license_files(base, revision, None if revision else folder)
    folders = [*beside, *([own] if own else [])]
    papers = _license_files(folders)
    if (
        revision
        and not _copies(papers)
        and (found := fetch_license_files(base, revision, None, cached=False))
    ):
        own, folders = found, [*beside, found]  # other programs leave the card alone in the cache
        papers = _license_files(folders)
    for terms in find_terms(licence):
        if terms.copy and not any(
            AGREEMENT in _flat(read_text(paper)) for paper in _copies(papers)
        ):
            agreement = _agreement(read_card(own))
            if not agreement:
                raise ModelError(
                    where=f"model {base}",
                    found="no file LICENSE with its text beside the weights",
                    expected=f"“{COPY}” ({terms.title}, 1.b.i)",
                    fix=f"put it into {[*folders, folder][0]}",
                )
            papers[next(name for name in LICENSE_FILES if name not in papers)] = agreement.encode()
        texts = {
            name: read_text(paper)
            for name, paper in papers.items()
            if name.upper().startswith("NOTICE")
        }
        if not any(_flat(terms.notice) in _flat(text) for text in texts.values()):
            kept = texts.get("NOTICE", "")
            papers["NOTICE"] = f"{kept.rstrip()}\n\n{terms.notice}\n".lstrip().encode()
    return papers


def _license_files(folders: Sequence[Path]) -> dict[str, bytes | Path]:
    """The licences and notices in some folders, of one name the first."""
    papers: dict[str, bytes | Path] = {}
    for file in (folder / name for folder in folders for name in LICENSE_FILES):
        if file.is_file() and file.stat().st_size <= MAX_BYTES and _stays(file):
            papers.setdefault(file.name, file)
    return papers


def _copies(papers: Mapping[str, bytes | Path]) -> list[bytes | Path]:
    return [paper for name, paper in papers.items() if name.startswith(("LICENSE", "LICENCE"))]


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
    return bool(NON_COMMERCIAL.search("-".join(re.findall("[a-z0-9]+", licence.lower()))))


def fetch_license_files(
    name: str,
    revision: str | None,
    folder: Path | None,
    *,
    kind: str = "model",
    cached: bool = True,
) -> Path | None:
    """The folder with the card and the licence of a repository; None: there is none.

    From the cache where the card is there; without ``cached`` the hub is asked whatever is there. Nothing depends on it
    but what a card says, so a hub that cannot be reached is no fault here.
    """
    if folder is not None:
        return folder
    for offline in (True, False) if cached else (False,):
        try:
            if not offline:  # asked once: the download of a file would ask for half a minute
                HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HUB_TIMEOUT)
            found = snapshot_download(
                name,
                repo_type=kind,
                revision=revision,
                allow_patterns=["README.md", *LICENSE_FILES],
                local_files_only=offline,
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
    found = CARD.match(text)
    if found is None:
        return {}, text
    try:
        data = yaml.safe_load(found[1]) if is_plain(found[1]) else {}
    except (yaml.YAMLError, ValueError):
        return {}, found[2]
    return (data if isinstance(data, dict) else {}), found[2]


def is_plain(text: str) -> bool:
    """Whether a YAML text has neither aliases, which can expand without end, nor brackets that PyYAML sinks in."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, DEEPER) - isinstance(token, BACK)
        if depth > MAX_DEPTH or isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            return False
    return True


def read_licences(
    base: str,
    revision: str | None,
    folder: Path,
    names: Sequence[str],
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the cards of a base and of data sets say of their licences: lock.json's ``licences``.

    Args:
        base: its hub name, or a folder.
        revision: its hub commit; None for a folder.
        folder: where it lies.
        names: the data sets, as a recipe has them.
        known: what was read before; only what it lacks is asked for.
    """
    known = known or {}
    data = known.get("data") or {}
    return {
        "base": known.get("base")
        or licence_of(read_card(fetch_license_files(base, revision, None if revision else folder))),
        "data": {
            name: data.get(name)
            or licence_of(read_card(fetch_license_files(name, None, None, kind="dataset")))
            for name in names
            if is_hub_name(name)
        },
    }


def is_hub_name(name: str) -> bool:
    """Whether data of this name are a set of the hub; a run's recipe has local ones by their whole path."""
    return not is_path(name) and not name.startswith("builtin:")


def licence_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """license, license_name and license_link as a card has them: texts, and a list of several licences."""
    found: dict[str, Any] = {}
    for key in KEYS:
        value = card.get(key)
        texts = [text for text in map(_word, value if isinstance(value, list) else [value]) if text]
        if texts:
            found[key] = texts if key == "license" and len(texts) > 1 else ", ".join(texts)
    return found


def _word(value: object) -> str:
    """A value of a card as one line; "" for what is none, or must not be passed on."""
    text = " ".join(str(value).split())[:300] if isinstance(value, str | int | float) else ""
    text = "".join(filter(str.isprintable, text))
    return "" if TOKEN.search(text) or text.startswith((os.sep, "~", "file:")) else text


def climbs(link: str) -> bool:
    """Whether a link leads out of the folder that it is relative to."""
    return ".." in re.split(r"[/\\]", unquote(link))


def _agreement(card: Mapping[str, Any]) -> str:
    """The licence's text that a gated base's card shows to those who ask for it; "" when it does not."""
    text = str(card.get("extra_gated_prompt") or "")
    return text if "AGREEMENT" in text.upper() and len(text) > 2000 else ""
