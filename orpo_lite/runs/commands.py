"""Build the commands that messages show, quoted for the shell."""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

from orpo_lite.errors import Command
from orpo_lite.recipe.text import to_text

Weights = Literal["original", "dequantized"]
"""What an adapter is merged into. original: the base's own 16-bit weights. dequantized: the 4-bit
weights that the adapter was trained on, converted back to 16 bit."""


def merge_command(path: Path, weights: Weights = "original") -> Command:
    """Return the command that merges a run."""
    option = "" if weights == "original" else f" --base {weights}"
    return Command(f"orpo-lite merge {quoted(path)}{option}")


def resume_command(path: Path, values: Mapping[str, Any] | None = None) -> Command:
    """Return the command that resumes a run with some values changed."""
    return Command(" ".join([f"orpo-lite train --resume {quoted(path)}", *_words(values or {})]))


def new_run_command(path: Path, values: Mapping[str, Any]) -> Command:
    """Return the command that trains a new run from recipe.yaml, with some values changed."""
    has_name = path.name not in ("", "..")
    folder = path if has_name else path.resolve()
    names = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    new_folder = next(name for name in names if not name.exists())
    words = _words({**values, "training.output_dir": str(new_folder)})
    return Command(" ".join([f"orpo-lite train --recipe {quoted(path / 'recipe.yaml')}", *words]))


def _words(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield ``key=value`` words for the shell, which the recipe reader parses back."""
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, dict):
            text = to_text(value)
        elif isinstance(value, list) and not any("," in name for name in value):
            text = ",".join(value)
        yield shlex.quote(f"{key}={text}")


def quoted(path: Path) -> str:
    """Return a path quoted for the shell.

    It is never read as an option. Characters that a terminal does not print are written as bytes.
    """
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    """Return a character for a ``$'...'`` string of the shell, as its bytes if it needs that."""
    if character.isprintable() and character not in "\\'":
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
