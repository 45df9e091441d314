"""Read licences from the cards of base and datasets. Apply the licences' rules for publishing.

A licence is never guessed. If the base's card names no licence, the new model card names none.
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
from orpo_lite.recipe.text import CLOSING_TOKENS, MAX_DEPTH, OPENING_TOKENS

KEYS = ("license", "license_name", "license_link")
LICENSE_FILES = [
    f"{name}{end}"
    for name in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    for end in ("", ".txt", ".md")
]
MAX_BYTES = 1 << 20  # largest card or licence text
MAX_NAME = 96  # characters of owner/name of a repository
# Matches licences that forbid commercial use, as words joined by hyphens. Source of the names: the
# licences of large models, and https://huggingface.co/docs/hub/repositories-licenses
NON_COMMERCIAL = re.compile(
    r"\b(nc|non-?commercial|non-production|not-for-commercial|no-commercial-use|research-(use-)?only|only-for-research"
    r"|research-use|(h|intel|qwen|qianwen|mistral-ai)-research|academic-only|personal-use-only"
    r"|apple-amlr|deepfloyd-if-license|mnpl|mrl)\b"
)
BEGINS = (
    r"(?:^|[\s,;/+&(]|meta[-_ ]|google[-_ ])"  # my-llama3 does not match: its licence is not known
)
LLAMA = re.compile(
    BEGINS + r"llama(?:[-_ ]*(?:community|licen[cs]e|agreement|version))*[-_ ]*v?([234])"
    r"(?:([-_.]?)(\d{1,2})(?![a-z\d]))?(?!\d)"
)
GEMMA = re.compile(BEGINS + r"gemma(?![a-z])")
# Matches a card. Its groups are the metadata and the body.
CARD = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", re.DOTALL)
# A text that occurs in each agreement that requires a copy of itself, and in no other licence.
AGREEMENT = "community license"
COPY = "provide a copy of this Agreement"


@dataclass(frozen=True)
class Terms:
    """The requirements of a community licence for a published derivative.

    The texts are quoted from the licence.
    """

    title: str
    notice: str
    """The text that the file NOTICE must contain."""
    built_with: str = ""
    """The text that the card must display, or "" if none is required."""
    prefix: str = ""
    """The text with which the derivative's name must begin, or "" if none is required."""
    copy: bool = True
    """True if a copy of the agreement must be included."""


def _llama(version: str) -> Terms:
    title = f"Llama {version} Community License"
    notice = (
        f"Llama {version} is licensed under the {title}, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
    return Terms(title, notice, "Built with Llama", "Llama")


# Source: section 1.b of each agreement, in the repository of the weights.
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
        "Gemma is provided under and subject to the Gemma Terms of Use "
        "found at ai.google.dev/gemma/terms",
        copy=False,  # Gemma's repositories have no text of the terms; the notice links it
    ),
}


def licence_names(licence: Mapping[str, Any]) -> list[str]:
    """Return all licence names in the entries ``license`` and ``license_name`` of a card."""
    found = licence.get("license", [])
    texts = [*(found if isinstance(found, list) else [found]), licence.get("license_name", "")]
    return [str(text) for text in texts if text]


def licence_text(licence: Mapping[str, Any]) -> str:
    """Return a card's licence names as one text: "mit, gemma", or "" if the card has none."""
    names = licence_names(licence)
    return ", ".join([name for name in names if name.lower() != "other"] or names)


def find_terms(licence: Mapping[str, Any]) -> list[Terms]:
    """Return the terms of each Llama or Gemma licence of the base. Other licences are ignored.

    ``licence`` holds the licence entries of the base's card.
    """
    found: list[Terms] = []
    for text in map(str.lower, licence_names(licence)):
        found += [_llama_terms(*match.groups()) for match in LLAMA.finditer(text)]
        if GEMMA.search(text):
            found.append(TERMS["gemma"])
    return list(dict.fromkeys(found))


def _llama_terms(major: str, dot: str, minor: str | None) -> Terms:
    """Return the terms of a Llama version: ("3", ".", "1") -> the terms of Llama 3.1."""
    exact = f"llama{major}" if not minor or int(minor) == 0 else f"llama{major}.{minor}"
    if exact in TERMS:
        return TERMS[exact]
    # An unknown version such as llama3.10 is not Llama 3. In llama-3-8, 8 is the size in billions.
    return _llama(f"{major}.{minor}") if dot == "." and major != "2" else TERMS[f"llama{major}"]


def refuse_name(repository: str, licence: Mapping[str, Any], where: str) -> None:
    """Raise :class:`RecipeError` if the base's licence does not allow the repository's name.

    Args:
        repository: owner/name.
        licence: the licence entries of the base's card.
        where: the place where a person wrote the name, for the error message.
    """
    name = repository.rpartition("/")[2]
    flat = re.sub(r"[-_ .]", "", name)
    prefixes = {terms: terms.prefix.replace(" ", "") for terms in find_terms(licence)}
    violated = [terms for terms, prefix in prefixes.items() if not flat.startswith(prefix)]
    if not violated:
        return
    terms = max(violated, key=lambda terms: len(terms.prefix))
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
        found=f"the name is {repository}, and the base is under the {terms.title}",
        expected=f"“{rule}” (section 1.b.i of the licence)",
        fix=f"use a name such as {longest.rstrip('-_.').removesuffix('.git')}",
    )


def find_license_files(
    licence: Mapping[str, Any],
    base: str,
    revision: str | None,
    folder: Path,
    own_folders: Sequence[Path] = (),
) -> dict[str, bytes | Path]:
    """Return the licence and notice files that must be published with a derivative.

    Args:
        licence: the licence entries of the base's card.
        base: the hub name of the base, or its folder.
        revision: the commit of the base on the hub, or None for a local folder.
        folder: the folder of the base.
        own_folders: folders where a person may have put licence files. These files take precedence
            over the files of the base.

    Returns:
        File name -> path or content.

    Raises:
        ModelError: the licence requires a copy of its text, and the text was not found.
    """
    own = fetch_license_files(base, revision, None if revision else folder)
    folders = [*own_folders, *([own] if own else [])]
    files = _license_files(folders)
    if revision and not _agreements(files):  # another program may have cached only the card
        found = fetch_license_files(base, revision, None, cached=False)
        if found:
            own, folders = found, [*own_folders, found]
            files = _license_files(folders)
    for terms in find_terms(licence):
        if terms.copy and not any(AGREEMENT in _flat(read_text(f)) for f in _agreements(files)):
            agreement = _agreement_in_card(read_card(own))
            if not agreement:
                raise ModelError(
                    where=f"model {base}",
                    found="has no file LICENSE that contains the text of the licence",
                    expected=f"a copy of the licence: “{COPY}” ({terms.title}, section 1.b.i)",
                    fix=f"put the file LICENSE into {[*folders, folder][0]}",
                )
            name = next(name for name in LICENSE_FILES if name not in files)
            files[name] = agreement.encode()
        _add_notice(files, terms)
    return files


def _add_notice(files: dict[str, bytes | Path], terms: Terms) -> None:
    """Add the notice of a licence to the file NOTICE, if no notice file contains it yet."""
    names = [name for name in files if name.upper().startswith("NOTICE")]
    if any(_flat(terms.notice) in _flat(read_text(files[name])) for name in names):
        return
    old = read_text(files["NOTICE"]) if "NOTICE" in files else ""
    files["NOTICE"] = f"{old.rstrip()}\n\n{terms.notice}\n".lstrip().encode()


def _license_files(folders: Sequence[Path]) -> dict[str, bytes | Path]:
    """Return name -> path of the licence and notice files in some folders.

    If several folders have a file of the same name, the file in the first of them is used.
    """
    files: dict[str, bytes | Path] = {}
    for file in (folder / name for folder in folders for name in LICENSE_FILES):
        if file.is_file() and file.stat().st_size <= MAX_BYTES and _is_inside(file):
            files.setdefault(file.name, file)
    return files


def _agreements(files: Mapping[str, bytes | Path]) -> list[bytes | Path]:
    """Return only the licence files, without the notice files."""
    return [file for name, file in files.items() if name.startswith(("LICENSE", "LICENCE"))]


def _is_inside(file: Path) -> bool:
    """Return False if a file is a link to a place outside its folder.

    Such a link could publish any file. In the hub's cache, all files are links to the folder blobs,
    two levels up. These links are allowed.
    """
    target, home = file.resolve(), file.parent.resolve()
    return target.parent in (home, home.parent.parent / "blobs")


def read_text(file: bytes | Path) -> str:
    """Return the text of a file. ``file`` is the path, or the content as bytes."""
    content = file if isinstance(file, bytes) else file.read_bytes()
    return content.decode("utf-8", "replace")


def _flat(text: str) -> str:
    """Return a text in lower case and with single spaces, so that texts can be compared."""
    return " ".join(text.replace("©", "(c)").split()).lower()


def is_non_commercial(licence: str) -> bool:
    """Return True if a licence, such as cc-by-nc-4.0, forbids commercial use."""
    return bool(NON_COMMERCIAL.search("-".join(re.findall("[a-z0-9]+", licence.lower()))))


def fetch_license_files(
    name: str,
    revision: str | None,
    folder: Path | None,
    *,
    repo_type: str = "model",
    cached: bool = True,
) -> Path | None:
    """Download the card and the licence files of a repository, and return their folder.

    Return None if no card is found, or if the hub is asked and cannot be reached.

    Args:
        name: the name of the repository.
        revision: the commit of the repository, or None for the newest commit.
        folder: the folder of a local base, or None. If a folder is given, this function only
            returns the folder.
        repo_type: "model" or "dataset".
        cached: True: ask the hub only if the card is not in the cache. False: always ask the hub.
    """
    if folder is not None:
        return folder
    for offline in (True, False) if cached else (False,):
        try:
            if not offline:  # without this request, a download would retry for half a minute
                HfApi().repo_info(name, repo_type=repo_type, revision=revision, timeout=HUB_TIMEOUT)
            found = snapshot_download(
                name,
                repo_type=repo_type,
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
    """Return the metadata in a folder's README.md, or {} if they are missing or unreadable."""
    if folder is None or not (folder / "README.md").is_file():
        return {}
    return split_card((folder / "README.md").read_bytes()[:MAX_BYTES].decode("utf-8", "replace"))[0]


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Return (metadata, body) of a card. The metadata are {} if they are not a YAML mapping."""
    found = CARD.match(text)
    if found is None:
        return {}, text
    try:
        data = yaml.safe_load(found[1]) if is_simple_yaml(found[1]) else {}
    except (yaml.YAMLError, ValueError):
        return {}, found[2]
    return (data if isinstance(data, dict) else {}), found[2]


def is_simple_yaml(text: str) -> bool:
    """Return True if a YAML text has no aliases and no deep nesting.

    Aliases can expand to a huge size. Deep nesting exceeds Python's recursion limit in PyYAML.
    """
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, OPENING_TOKENS) - isinstance(token, CLOSING_TOKENS)
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
    """Return the licences in the cards of base and datasets, as lock.json stores them.

    Args:
        base: the hub name of the base, or its folder.
        revision: the commit of the base on the hub, or None for a local folder.
        folder: the folder of the base.
        names: the names of the datasets in the recipe.
        known: licences that were read earlier. These licences are not read again.
    """
    known = known or {}
    of_base = known.get("base")
    if not of_base:
        card = read_card(fetch_license_files(base, revision, None if revision else folder))
        of_base = licence_of(card)
    of_data = {}
    for name in filter(is_hub_name, names):
        of_data[name] = (known.get("data") or {}).get(name)
        if not of_data[name]:
            card = read_card(fetch_license_files(name, None, None, repo_type="dataset"))
            of_data[name] = licence_of(card)
    return {"base": of_base, "data": of_data}


def is_hub_name(name: str) -> bool:
    """Return True if a dataset's name is a hub name, and not a path or a "builtin:" name."""
    return not is_path(name) and not name.startswith("builtin:")


def licence_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries license, license_name and license_link of a card.

    Each value is a text. Exception: if there are several licences, ``license`` is a list of texts.
    """
    found: dict[str, Any] = {}
    for key in KEYS:
        value = card.get(key)
        values = value if isinstance(value, list) else [value]
        texts = [text for text in map(_to_line, values) if text]
        if texts:
            found[key] = texts if key == "license" and len(texts) > 1 else ", ".join(texts)
    return found


def _to_line(value: object) -> str:
    """Return a value of a card as one line of text.

    Return "" if the value contains an access token, is a local path, or is neither text nor number.
    """
    if not isinstance(value, str | int | float):
        return ""
    text = "".join(filter(str.isprintable, " ".join(str(value).split())[:300]))
    is_private = TOKEN.search(text) or text.startswith((os.sep, "~", "file:"))
    return "" if is_private else text


def leads_out(link: str) -> bool:
    """Return True if a relative link, such as ``../LICENSE``, leads out of its folder."""
    return ".." in re.split(r"[/\\]", unquote(link))


def _agreement_in_card(card: Mapping[str, Any]) -> str:
    """Return the licence text in the card of a gated base, or "" if there is none.

    The hub shows this text to a person who asks for access (``extra_gated_prompt``).
    """
    text = str(card.get("extra_gated_prompt") or "")
    is_agreement = "AGREEMENT" in text.upper() and len(text) > 2000
    return text if is_agreement else ""
