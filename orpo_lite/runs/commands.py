"""Build the shell commands that messages show. Paths and values are quoted for the shell."""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

from orpo_lite.errors import Command
from orpo_lite.recipe.text import to_text

LAUNCHER = "ORPO_LITE_LAUNCHER"
"""Environment variable of the processes of `orpo-lite launch`: the command that started them, up to
the word train. It reports how they end."""
Weights = Literal["original", "dequantized"]
"""The weights that an adapter is merged into. original: the base's own 16-bit weights.
dequantized: the 4-bit weights of the training, converted back to 16 bit."""


def merge_command(path: Path, weights: Weights = "original") -> Command:
    """Return the command that merges the adapter of a run into ``weights``."""
    option = "" if weights == "original" else f" --base {weights}"
    return Command(f"orpo-lite merge {quoted(path)}{option}")


def resume_command(path: Path, values: Mapping[str, Any] | None = None) -> Command:
    """Return the command that resumes a run. ``values`` are changes: ``section.key`` -> value.

    In a process of `orpo-lite launch`, the command launches as many processes again.
    """
    start = os.environ.get(LAUNCHER, "orpo-lite")
    return Command(" ".join([f"{start} train --resume {quoted(path)}", *_words(values or {})]))


def new_run_command(path: Path, values: Mapping[str, Any]) -> Command:
    """Return the command that trains a new run with the recipe of the run in ``path``.

    ``values`` are changes: ``section.key`` -> value. The new run gets a new folder:
    ``runs/orpo`` -> ``runs/orpo-2``.
    """
    has_name = path.name not in ("", "..")
    folder = path if has_name else path.resolve()
    names = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    new_folder = next(name for name in names if not name.exists())
    words = _words({**values, "training.output_dir": str(new_folder)})
    return Command(" ".join([f"orpo-lite train --recipe {quoted(path / 'recipe.yaml')}", *words]))


def _words(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield overrides as ``key=value`` arguments, quoted for the shell."""
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, dict):
            text = to_text(value)
        elif isinstance(value, list) and not any("," in name for name in value):
            text = ",".join(value)
        yield shlex.quote(f"{key}={text}")


def quoted(path: Path) -> str:
    """Return a path quoted for the shell.

    If a path begins with -, ./ is put in front, so that no program reads the path as an option.
    Characters that a terminal cannot print are written as bytes, such as ``\\x0a``.
    """
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    r"""Return a character for a shell string ``$'...'``: ``a`` -> ``a``, ``'`` -> ``\x27``."""
    if character.isprintable() and character not in "\\'":
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
