"""A model card that a person has changed: found, and made fit for a repository."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orpo_lite.errors import CheckpointError
from orpo_lite.publishing.card_facts import SOMEWHERE, Facts, Shown, licence_metadata, make_metadata
from orpo_lite.publishing.licences import CARD, KEYS, Terms, is_plain, licence_of

SEAL = re.compile(r"\r?\n<!-- orpo-lite card [0-9a-f]{16} -->\r?\n")

# Of a text in Markdown: comments, what stands in a tag, where a link leads.
UNSEEN = re.compile(
    r"<!--.*?(?:-->|\Z)|</?[A-Za-z][^>]*>|^ {0,3}\[[^\]]*\]:.*?$", re.DOTALL | re.MULTILINE
)


def seal(text: str) -> str:
    """The text with a mark by which a later change of it is seen."""
    return f"{text}\n<!-- orpo-lite card {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_own(card: str) -> bool:
    """Whether a card is as it was made; one that a person has changed is pushed as that person left it."""
    found = SEAL.search(card)
    return found is not None and seal(card[: found.start()]) == card


def changed_card(path: Path) -> str:
    """README.md of a run, byte for byte, where a person has changed it; "" where it is ours or not there.

    Raises:
        CheckpointError: it cannot be read, or is a link.
    """
    file, fix = path / "README.md", "or remove it, and the card is made afresh"
    if file.is_symlink():
        raise CheckpointError(
            where=str(file),
            found="is a link",
            expected="a file; links are not followed",
            fix=f"a copy in its place, {fix}",
        )
    try:
        card = file.read_bytes().decode("utf-8-sig") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file),
            found=f"cannot be read ({error})",
            expected="UTF-8",
            fix=f"save it as such, {fix}",
        ) from error
    return "" if is_own(card.replace("\r\n", "\n")) else card


def loads_adapter(card: str) -> bool:
    """Whether a card changed by hand says how to load an adapter, which is wrong of a merged model."""
    return not is_own(card) and re.search(r"PeftModel|--enable-lora", card) is not None


def adopt_card(path: Path, own: str, shown: Shown) -> str:
    """A card changed by hand, for a repository: its words, and what must be true of the metadata.

    Raises:
        CheckpointError: its metadata are no YAML, or it does not say what the base's licence asks for.
    """
    facts, where = Facts.read(path, shown), str(path / "README.md")
    own = SEAL.sub("", own)
    found = CARD.match(own)
    if found is None:
        raise CheckpointError(
            where=where,
            found="begins with no metadata",
            expected="metadata in YAML between lines of ---",
            fix="mend it, or remove the file",
        )
    made: dict[str, Any] = make_metadata(facts).to_dict()  # type: ignore[no-untyped-call]
    ours: dict[str, str] = {
        key: made[key] for key in ("library_name", "base_model_relation") if key in made
    }
    data, text = _put(found[1], ours, where, without_lora=shown.merged is not None)
    for terms in facts.terms:
        _refuse_untrue(facts, terms, data, UNSEEN.sub("", found[2]), where)
    body = found[2].replace(SOMEWHERE, shown.repository)
    return f"{own[: found.start(1)]}{text}{own[found.end(1) : found.start(2)]}{body}"


def _put(
    text: str, ours: Mapping[str, str], where: str, *, without_lora: bool
) -> tuple[dict[str, Any], str]:
    """A person's metadata, read as texts, and their YAML with lines of ours in it; all others stay as they stand.

    The tag `lora` goes too, if asked, where it has a line of its own.
    """
    data, node = _read_metadata(text, where)
    edits: list[tuple[int, int, str]] = []
    lacking = dict(ours)
    for key, value in node.value:
        start, end = key.start_mark.index, _end_of(value)
        if (name := key.value) in lacking:
            tail = text[start:end][len(text[start:end].rstrip()) :]
            edits.append((start, end, f"{name}: {lacking.pop(name)}{tail}"))
        elif (
            name == "tags" and without_lora and isinstance(data[name], list) and len(data[name]) > 1
        ):
            alone = re.search(r"\r?\n *- lora *(?=\r?\n|\Z)", text[start:end])
            edits += [(start + alone.start(), start + alone.end(), "")] if alone else []
    new = text
    for start, end, line in reversed(edits):
        new = new[:start] + line + new[end:]
    feed = "\r\n" if "\r\n" in text else "\n"
    new += "".join(f"{feed}{key}: {value}" for key, value in lacking.items())
    after, _ = _read_metadata(new, where)
    if {**after, "tags": None} != {**data, **ours, "tags": None}:
        lines = ", ".join(f"{key}: {value}" for key, value in ours.items())
        raise CheckpointError(
            where=where,
            found="its metadata cannot be completed",
            expected="YAML with a key a line",
            fix=f"write {lines}",
        )
    return after, new


def _read_metadata(text: str, where: str) -> tuple[dict[str, Any], yaml.MappingNode]:
    expected, fix = (
        "metadata that are a mapping in YAML: a key a line, none twice, no anchors",
        "mend it, or remove the file",
    )
    try:
        node = yaml.compose(f"{text}\n", Loader=yaml.SafeLoader) if is_plain(text) else None
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
        where=where, found="its metadata are something else", expected=expected, fix=fix
    )


def _end_of(node: Any) -> int:
    """Where a value ends; PyYAML counts the comments behind a list."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return int(node.end_mark.index)


def _texts(node: Any) -> Any:
    """What a text in YAML holds, its words as they stand: 1.10 and no are neither a number nor false."""
    if isinstance(node, yaml.MappingNode):
        return {str(_texts(key)): _texts(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_texts(value) for value in node.value]
    return "" if node.tag.endswith(":null") else node.value


def _refuse_untrue(
    facts: Facts, terms: Terms, data: Mapping[str, Any], body: str, where: str
) -> None:
    """Raise CheckpointError for a card that does not say what the terms of its base ask for."""
    said, written, base = licence_of(data), licence_metadata(facts), facts.lock["base"]["name"]
    for key in KEYS:
        known = facts.licence.get(key), written.get(key)
        if said.get(key) not in known:
            expected = f"{key}: {known[1]}" if known[1] else f"no {key}"
            raise CheckpointError(
                where=where,
                found=f"{key}: {said[key]}" if key in said else f"has no {key}",
                expected=f"{expected}, as the base's card has it: “{terms.notice}”",
            )
    names = data.get("base_model", [])
    if facts.is_hub_base and base not in (names if isinstance(names, list) else [names]):
        rule = f"base_model: {base}, which is under the {terms.title}"
        raise CheckpointError(
            where=where,
            found="does not name its base",
            expected=rule,
            fix="add the line to the metadata",
        )
    if terms.built_with not in body:
        rule = f"“prominently display “{terms.built_with}”” ({terms.title}, 1.b.i)"
        raise CheckpointError(
            where=where,
            found=f"does not say “{terms.built_with}”",
            expected=rule,
            fix="add the line",
        )
