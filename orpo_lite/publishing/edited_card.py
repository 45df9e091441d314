"""Detect whether a person has edited the model card, and complete an edited card for a push."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orpo_lite.errors import CheckpointError
from orpo_lite.publishing.card_facts import (
    PLACEHOLDER,
    CardOptions,
    Facts,
    licence_metadata,
    make_metadata,
)
from orpo_lite.publishing.licences import CARD, KEYS, Terms, is_simple_yaml, licence_of

SEAL = re.compile(r"\r?\n<!-- orpo-lite card [0-9a-f]{16} -->\r?\n")

# Matches parts of Markdown that a reader does not see: comments, HTML tags and link targets.
INVISIBLE = re.compile(
    r"<!--.*?(?:-->|\Z)|</?[A-Za-z][^>]*>|^ {0,3}\[[^\]]*\]:.*?$", re.DOTALL | re.MULTILINE
)


def seal(text: str) -> str:
    """Return the text with a comment at the end. The comment holds the hash of the text.

    If a person edits the text later, the hash does not match any more.
    """
    return f"{text}\n<!-- orpo-lite card {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_unedited(card: str) -> bool:
    """Return True if nobody edited a card: the text matches the hash in the last comment."""
    found = SEAL.search(card)
    return found is not None and seal(card[: found.start()]) == card


def read_edited_card(path: Path) -> str:
    """Return the text of README.md in a run folder if a person has edited it, else "".

    Raises:
        CheckpointError: README.md cannot be read, or it is a symbolic link.
    """
    file, fix = path / "README.md", "or remove the file, so that a new card is written"
    if file.is_symlink():
        raise CheckpointError(
            where=str(file),
            found="is a symbolic link",
            expected="a regular file, because symbolic links are not followed",
            fix=f"replace the link by a copy of the file, {fix}",
        )
    try:
        card = file.read_bytes().decode("utf-8-sig") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file),
            found=f"cannot be read ({error})",
            expected="UTF-8",
            fix=f"save the file in UTF-8, {fix}",
        ) from error
    return "" if is_unedited(card.replace("\r\n", "\n")) else card


def loads_adapter(card: str) -> bool:
    """Return True if an edited card explains how to load an adapter.

    Such a card would be wrong for a merged model, which is loaded without an adapter.
    """
    return not is_unedited(card) and re.search(r"PeftModel|--enable-lora", card) is not None


def complete_card(path: Path, own: str, options: CardOptions) -> str:
    """Return the card to push: the card that a person has edited, with complete metadata.

    In the text, only the placeholder OWNER/NAME is replaced by the name of the repository.

    Args:
        path: the run folder.
        own: the content of the edited card.
        options: the options of the push.

    Raises:
        CheckpointError: the metadata are missing or cannot be completed, or the card lacks a text
            that the base's licence requires.
    """
    facts, where = Facts.read(path, options), str(path / "README.md")
    own = SEAL.sub("", own)
    found = CARD.match(own)
    if found is None:
        raise CheckpointError(
            where=where,
            found="does not begin with metadata",
            expected="metadata in YAML at the start of the file, between two lines ---",
            fix="add the metadata, or remove the file (then a new card is written)",
        )
    made: dict[str, Any] = make_metadata(facts).to_dict()  # type: ignore[no-untyped-call]
    keys = ("library_name", "base_model_relation")
    needed: dict[str, str] = {key: made[key] for key in keys if key in made}
    data, text = _with_entries(found[1], needed, where, without_lora=options.merged is not None)
    for terms in facts.terms:
        _check_terms(facts, terms, data, INVISIBLE.sub("", found[2]), where)
    body = found[2].replace(PLACEHOLDER, options.repository)
    return f"{own[: found.start(1)]}{text}{own[found.end(1) : found.start(2)]}{body}"


def _with_entries(
    text: str, needed: Mapping[str, str], where: str, *, without_lora: bool
) -> tuple[dict[str, Any], str]:
    """Set the needed entries in YAML metadata. Return (data, text): the values, and the new YAML.

    All other lines are kept. ``without_lora`` removes the tag `lora` if the tag has its own line.
    """
    data, node = _read_metadata(text, where)
    edits: list[tuple[int, int, str]] = []
    missing = dict(needed)
    for key, value in node.value:
        start, end = key.start_mark.index, _end_of(value)
        name, old = key.value, text[start:end]
        if name in missing:
            space = old[len(old.rstrip()) :]
            edits.append((start, end, f"{name}: {missing.pop(name)}{space}"))
        elif name == "tags" and without_lora and isinstance(data[name], list):
            tag = re.search(r"\r?\n *- lora *(?=\r?\n|\Z)", old)
            if tag and len(data[name]) > 1:
                edits.append((start + tag.start(), start + tag.end(), ""))
    new = text
    for start, end, line in reversed(edits):
        new = new[:start] + line + new[end:]
    feed = "\r\n" if "\r\n" in text else "\n"
    new += "".join(f"{feed}{key}: {value}" for key, value in missing.items())
    after, _ = _read_metadata(new, where)
    if {**after, "tags": None} != {**data, **needed, "tags": None}:
        lines = ", ".join(f"{key}: {value}" for key, value in needed.items())
        raise CheckpointError(
            where=where,
            found="its metadata cannot be completed",
            expected="YAML with one key per line",
            fix=f"add these entries to the metadata: {lines}",
        )
    return after, new


def _read_metadata(text: str, where: str) -> tuple[dict[str, Any], yaml.MappingNode]:
    """Return (data, node): the metadata with all scalars as texts, and their YAML node."""
    expected = "a YAML mapping with one key per line, without duplicate keys or anchors"
    fix = "correct the metadata, or remove the file, so that a new card is written"
    try:
        node = yaml.compose(f"{text}\n", Loader=yaml.SafeLoader) if is_simple_yaml(text) else None
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(
            where=where,
            found=f"its metadata cannot be read ({' '.join(str(error).split())})",
            expected=expected,
            fix=fix,
        ) from error
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = _texts(node)
        if len(data) == len(node.value):
            return data, node
    raise CheckpointError(
        where=where,
        found="its metadata do not have the expected form",
        expected=expected,
        fix=fix,
    )


def _end_of(node: Any) -> int:
    """Return the index in the YAML text at which a value ends.

    For a list or mapping, PyYAML would include the comments after the value.
    """
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return int(node.end_mark.index)


def _texts(node: Any) -> Any:
    """Return the value of a YAML node, with scalars as texts: `1.10` and `no` stay as they are."""
    if isinstance(node, yaml.MappingNode):
        return {str(_texts(key)): _texts(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_texts(value) for value in node.value]
    return "" if node.tag.endswith(":null") else node.value


def _check_terms(
    facts: Facts, terms: Terms, data: Mapping[str, Any], body: str, where: str
) -> None:
    """Raise :class:`CheckpointError` if a card lacks a text that the base's licence requires.

    Args:
        facts: the facts of the run.
        terms: the requirements of the licence.
        data: the metadata of the card.
        body: the visible text of the card.
        where: the place of the card, for messages.
    """
    given, written, base = licence_of(data), licence_metadata(facts), facts.lock["base"]["name"]
    for key in KEYS:
        known = facts.licence.get(key), written.get(key)
        if given.get(key) not in known:
            expected = f"{key}: {known[1]}" if known[1] else f"no {key}"
            actual = f"{key}: {given[key]}" if key in given else f"no {key}"
            raise CheckpointError(
                where=where,
                found=f"its metadata have {actual}",
                expected=f"{expected}, as in the base's card; the licence says: “{terms.notice}”",
            )
    names = data.get("base_model", [])
    if facts.is_hub_base and base not in (names if isinstance(names, list) else [names]):
        rule = f"base_model: {base}, because the base is under the {terms.title}"
        raise CheckpointError(
            where=where,
            found="its metadata do not name the base model",
            expected=rule,
            fix=f"add the line base_model: {base} to the metadata",
        )
    if terms.built_with not in body:
        rule = f"“prominently display “{terms.built_with}”” ({terms.title}, section 1.b.i)"
        raise CheckpointError(
            where=where,
            found=f"does not contain the visible text “{terms.built_with}”",
            expected=rule,
            fix="add this text to the card",
        )
