"""Find and read a recipe, apply overrides, and report all errors at once."""

import codecs
import difflib
import json
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orpo_lite.errors import TOKEN, Command, Overrides, RecipeError, raise_all
from orpo_lite.recipe.checks import contradictions
from orpo_lite.recipe.foreign import answer_unknown
from orpo_lite.recipe.schema import KEYS, SECTIONS, Recipe
from orpo_lite.recipe.text import CLOSING_TOKENS, MAX_DEPTH, OPENING_TOKENS, Written

MAX_BYTES = 1 << 20  # a recipe is a page of text; a larger file is not a recipe
# The folder of the recipes in a wheel, and in a checkout or an editable install.
SHIPPED = Path(__file__).parents[1] / "recipes"
CHECKOUT = Path(__file__).parents[2] / "recipes"
GPU_SIZES = Path(__file__).with_name("gpu_sizes.json")  # written by: python -m benchmarks.recipes


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply the overrides.

    Args:
        name: the name of a shipped recipe, such as ``"mistral-qlora"``, or a path, such as
            ``"./mine.yaml"``. A name with a / or the suffix .yaml is a path.
        overrides: texts ``"section.key=value"``. The value gets the key's type in the schema.

    Raises:
        RecipeError: the recipe or an override is wrong. The error lists all faults.
    """
    path = find_recipe(name)
    written: dict[str, Written] = {}
    faults: list[RecipeError] = list(_read_file(path, written))
    faults += _read_overrides(overrides, written)
    faults += _refuse_secrets(written)
    faults += answer_unknown(written)
    recipe = _validate(written, path.name, faults)
    raise_all(faults)
    assert recipe is not None  # noqa: S101 - _validate adds a fault if it returns None
    raise_all(list(contradictions(recipe)))
    return recipe


def find_recipe(name: str) -> Path:
    """Return the path of a recipe's file. ``name`` is the name of a shipped recipe, or a path.

    If no such recipe exists, raise a :class:`RecipeError` that suggests similar names.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if path.is_dir():
            raise RecipeError(
                where=name,
                found="is a folder",
                expected="a YAML file",
                fix="name a file in the folder, or copy a shipped recipe to it: "
                f"orpo-lite recipes cp NAME {name.rstrip('/')}/recipe.yaml",
            )
        if not path.is_file():
            near = difflib.get_close_matches(
                path.name, [p.name for p in path.parent.glob("*.y*ml")], n=3
            )
            raise RecipeError(
                where=name,
                found="no such file",
                expected="a recipe file",
                fix=f"did you mean {', '.join(near)}?" if near else LIST,
            )
        return path
    known = shipped_recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise RecipeError(
            where=f"--recipe {name}",
            found="no shipped recipe has this name",
            expected="the name of a shipped recipe, or a path",
            fix=f"did you mean {', '.join(near)}? {LIST}; a path must contain / or end in .yaml"
            if near
            else LIST,
        )
    return known[name]


LIST = "`orpo-lite recipes ls` lists the shipped recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of each shipped recipe, sorted by name.

    In a git checkout, the files are in the folder recipes. Otherwise they are in the installed
    package.
    """
    checkout = CHECKOUT.is_dir() and (CHECKOUT.parent / "pyproject.toml").is_file()
    return {path.stem: path for path in sorted((CHECKOUT if checkout else SHIPPED).glob("*.yaml"))}


def gpu_sizes() -> dict[str, str]:
    """Return recipe name -> GPU memory that the recipe needs: "8 GB" or "8 GB or a CPU"."""
    sizes: dict[str, str] = json.loads(GPU_SIZES.read_text(encoding="utf-8"))
    return sizes


def _read_file(path: Path, written: dict[str, Written]) -> Iterator[RecipeError]:
    """Add the keys and values of a recipe file to ``written``, and yield the file's errors.

    Numbers stay texts here. The schema converts them later.
    """
    root = _compose(path)
    yield from _duplicates(root, path)
    for section, node, line in _entries(root):
        if section in KEYS and isinstance(node, yaml.MappingNode):
            for field, child, child_line in _entries(node):
                key = f"{section}.{field}"
                written[key] = Written(
                    _plain(child, typed=key in TYPED), f"{path.name}:{child_line}"
                )
        elif section in KEYS and _plain(node) is not None:
            yield RecipeError(
                where=f"{path}:{line}",
                found=f"section {section} holds {_shown(_plain(node))}",
                expected="indented lines `key: value` below the section's name",
            )
        elif section not in KEYS:
            written[section] = Written(_plain(node), f"{path.name}:{line}")


def _compose(path: Path) -> yaml.MappingNode:
    """Return the root YAML node of a recipe file. Raise :class:`RecipeError` for a wrong file."""
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(
            where=str(path),
            found=f"has {path.stat().st_size:,} bytes",
            expected=f"a recipe of at most {MAX_BYTES:,} bytes",
        )
    try:
        root = _nodes(_decode(path.read_bytes(), path), str(path))
    except OSError as error:
        raise RecipeError(
            where=str(path),
            found=f"cannot be read ({error.strerror})",
            expected="a readable file",
        ) from None
    if not isinstance(root, yaml.MappingNode):
        found = "is empty" if root is None else "is not a mapping"
        raise RecipeError(
            where=str(path),
            found=found,
            expected=f"a mapping with the sections {', '.join(KEYS)}",
            fix="copy a shipped recipe: orpo-lite recipes cp NAME PATH",
        )
    return root


def _decode(content: bytes, path: Path) -> str:
    """Return the text of a recipe file.

    Raise :class:`RecipeError` if it is not UTF-8, or if a line is indented by other characters
    than spaces and tabs.
    """
    if encoding := _wide_encoding(content):
        raise RecipeError(
            where=f"{path}:1",
            found=f"is {encoding} text",
            expected="UTF-8 text",
            fix=_fix_encoding(path, encoding),
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} is not UTF-8"
        encoding = next((name for name in ("CP1252", "GB18030") if _is_valid(content, name)), "")
        fix = (
            _fix_encoding(path, encoding)
            if encoding
            else "correct this line in an editor that saves UTF-8"
        )
        raise RecipeError(
            where=f"{path}:{line}", found=found, expected="UTF-8 text", fix=fix
        ) from None
    # YAML takes a no-break space and similar characters as a part of the key.
    if other := re.search(r"^[ \t]*([^\S \t\r\n])\s*\w+:", text, re.MULTILINE):
        name = unicodedata.name(other[1], "another space").lower()
        raise RecipeError(
            where=f"{path}:{text.count(chr(10), 0, other.start(1)) + 1}",
            found=f"is indented by the character U+{ord(other[1]):04X} ({name})",
            expected="indentation by plain spaces",
            fix=_fix_with(path, r"perl -CSD -pe 's/[^\S\n]/ /g'"),
        )
    return text


def _wide_encoding(content: bytes) -> str:
    """Return the name of a UTF-16 or UTF-32 encoding, or "" if the bytes are in neither.

    The encoding is detected by the byte order mark, or by a zero byte among the first two bytes.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if b"\0" in content[:2]:
        return "UTF-16BE" if content.startswith(b"\0") else "UTF-16LE"
    return ""


def _is_valid(content: bytes, encoding: str) -> bool:
    """Return True if the bytes are valid text in an encoding."""
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _fix_encoding(path: Path, encoding: str) -> Command:
    """Return the command that converts a recipe file to UTF-8."""
    return _fix_with(path, f"iconv -f {encoding} -t UTF-8")


def _fix_with(path: Path, program: str) -> Command:
    """Return the command that runs a program on a recipe file and writes a new file."""
    new = shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
    return Command(f"{program} {shlex.quote(str(path))} > {new}", f", then --recipe {new}")


@lru_cache(maxsize=8)  # a command reads the recipe of a run several times
def _nodes(text: str, where: str) -> Any:
    """Return the root node of a YAML text, or None if the text is empty.

    Raise :class:`RecipeError` for invalid YAML, anchors, aliases and deep nesting.
    """
    try:
        # Aliases can expand to gigabytes. For deeply nested brackets, PyYAML takes minutes.
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            place = f"{where}:{token.start_mark.line + 1}"
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
                raise RecipeError(
                    where=place,
                    found=f"YAML anchor or alias {token.value!r}",
                    expected="values without anchors and aliases",
                    fix="write the value itself on this line",
                )
            depth += isinstance(token, OPENING_TOKENS) - isinstance(token, CLOSING_TOKENS)
            if depth > MAX_DEPTH:
                raise RecipeError(
                    where=place,
                    found="the YAML is nested too deeply",
                    expected=f"at most {MAX_DEPTH} levels of brackets or indentation",
                    fix="close open brackets, or use less indentation",
                )
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise RecipeError(
            where=place,
            found=str(getattr(error, "problem", error)),
            expected="YAML: lines `key: value`, indented by spaces",
            fix="correct the line; put quotes around a text that contains : # { [ or %",
        ) from None


def _entries(node: yaml.MappingNode) -> Iterator[tuple[str, Any, int]]:
    """Yield (key, value node, line) for each key of a mapping. Skip repetitions of a key."""
    seen = set()
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key not in seen:
            yield key, value_node, key_node.start_mark.line + 1
        seen.add(key)


def _duplicates(node: Any, path: Path) -> Iterator[RecipeError]:
    """Yield an error for each duplicate key. PyYAML would use the last one without a warning."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _duplicates(child, path)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in first:
            yield RecipeError(
                where=f"{path}:{line}",
                found=f"the key {key!r} is also on line {first[key]}",
                expected="each key once",
                fix="keep one of the two lines",
            )
        first.setdefault(key, line)
        yield from _duplicates(value_node, path)


def _plain(node: Any, *, typed: bool = False) -> Any:
    """Return the value of a YAML node: a dict, a list, a text or None.

    Numbers, true and false stay texts, because YAML would guess their types. If ``typed`` is true,
    they are read as in JSON. Keys whose values have no type in the schema need this.
    """
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value, typed=typed) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, typed=typed) for child in node.value]
    if node.style is None and node.value in ("", "~", "null", "Null", "NULL"):
        return None
    if typed and node.tag != "tag:yaml.org,2002:str":  # a quoted value has this tag
        try:
            return json.loads(node.value)
        except ValueError:
            pass
    return str(node.value)


def _shown(value: Any) -> str:
    """Return a value as text for an error message: one line of at most 80 characters."""
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _read_overrides(overrides: Sequence[str], written: dict[str, Written]) -> Iterator[RecipeError]:
    """Add the overrides to ``written``. Yield an error for each override that cannot be read."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            near = "--recipe" if text in shipped_recipes() or text.endswith(".yaml") else ""
            fix = (
                f"orpo-lite train {near} {text}"
                if near
                else "orpo-lite train --recipe NAME section.key=value"
            )
            yield RecipeError(
                where=f"argument {text!r}",
                found="is not an override of a recipe key",
                expected="section.key=value",
                fix=fix,
            )
            continue
        try:
            written[key.strip()] = Written(_override_value(key.strip(), value), "command line")
        except RecipeError as fault:
            yield fault


# Keys whose values have no type in the schema. The chat template gets the values unchanged, so true
# must be a bool, not a text.
TYPED = ("data.chat_template_kwargs",)
MAPPINGS = ("data.column_map", *TYPED)  # keys whose value is a mapping


def _override_value(key: str, text: str) -> Any:
    """Return the value of an override.

    "null" -> None. For the keys in MAPPINGS: "{a: b}" and "a=b" -> ``{"a": "b"}``, and "a=b,a=c" ->
    ``{"a": ["b", "c"]}``. All other values stay texts.
    """
    if text in ("null", "~"):
        return None
    parts = [part.partition("=") for part in text.split(",")]
    if key in MAPPINGS and text.lstrip().startswith("{"):
        return _plain(_nodes(text, "command line"), typed=key in TYPED)
    if key in MAPPINGS and all(name.strip() and value.strip() for name, _, value in parts):
        values: dict[str, list[Any]] = {}
        for name, _, value in parts:
            typed = (
                _plain(_nodes(value, "command line"), typed=True) if key in TYPED else value.strip()
            )
            values.setdefault(name.strip(), []).append(typed)
        return {name: several if several[1:] else several[0] for name, several in values.items()}
    return text


def _refuse_secrets(written: dict[str, Written]) -> Iterator[RecipeError]:
    """Remove keys with access tokens from ``written``, and yield an error for each key."""
    for key, entry in list(written.items()):
        is_token_key = key.split(".")[-1] in ("token", "hub_token", "hf_token")
        if is_token_key or TOKEN.search(f"{key} {entry.value}"):
            del written[key]
            yield RecipeError(
                where=entry.where,
                found=f"{key} holds an access token (not shown)",
                expected="no access token in a recipe",
                fix="remove the key, and run `hf auth login` or set HF_TOKEN",
            )


def _validate(
    written: Mapping[str, Written], file: str, faults: list[RecipeError]
) -> Recipe | None:
    """Return the recipe. If a value is invalid, add an error to ``faults`` and return None."""
    tree: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
    for key, entry in written.items():
        section, _, field = key.partition(".")
        tree.setdefault(section, {})[field] = entry.value
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += _explain(error, written, file)
        return None
    recipe._sources.update({key: entry.where for key, entry in written.items()})
    return recipe


def _explain(
    error: ValidationError, written: Mapping[str, Written], file: str
) -> list[RecipeError]:
    """Return one error for each invalid key.

    If a key may have several types, pydantic reports an error for each type.
    """
    messages: dict[str, list[str]] = {}
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"][:2])
        message = re.sub(r"^(Input should be|Value error,|Assertion failed,) ?", "", item["msg"])
        message = (
            "a value, because the key has no default"
            if item["type"] == "missing"
            else re.sub(r", unable to.*", "", message)
        )
        messages.setdefault(key, []).append(message)
    faults = []
    for key, texts in messages.items():
        entry = written.get(key, Written(None, file))
        faults.append(
            RecipeError(
                where=entry.where,
                found=f"{key}: {_shown(entry.value)}" if key in written else f"{key} is not set",
                expected=" or ".join(dict.fromkeys(texts)),
                fix=_advice(key),
            )
        )
    return faults


def _advice(key: str) -> str:
    """Return the fix for an invalid value: the key's default, if any, and its documentation."""
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields[name]
    if field.is_required():
        return str(field.description)
    default = Overrides({key: field.default})
    return Overrides({key: field.default}, text=f"{default} (the default). {field.description}")
