"""Command lines that messages show, ready to be pasted."""

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
"""What an adapter is merged into. original: the base's own weights, in 16 bit. dequantized: what 4 bit made of them, in
16 bit again, which is what the adapter was trained on."""


def merge_command(path: Path, weights: Weights = "original") -> Command:
    """The line that merges, to be pasted."""
    return Command(
        f"orpo-lite merge {quoted(path)}" + f" --base {weights}" * (weights != "original")
    )


def resume_command(path: Path, values: Mapping[str, Any] | None = None) -> Command:
    """The line that goes on with a run, with some values changed."""
    return Command(" ".join([f"orpo-lite train --resume {quoted(path)}", *_words(values or {})]))


def new_run_command(path: Path, values: Mapping[str, Any]) -> Command:
    """The line that trains a new run by recipe.yaml as it is now, with some values changed."""
    folder = path if path.name not in ("", "..") else path.resolve()  # whose name can be added to
    free = next(
        name for n in count(2) if not (name := folder.with_name(f"{folder.name}-{n}")).exists()
    )
    words = _words({**values, "training.output_dir": str(free)})
    return Command(" ".join([f"orpo-lite train --recipe {quoted(path / 'recipe.yaml')}", *words]))


def _words(values: Mapping[str, Any]) -> Iterable[str]:
    """Values as words for the shell, which the recipe's reader reads back."""
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, dict):
            text = to_text(value)
        elif isinstance(value, list) and not any("," in name for name in value):
            text = ",".join(value)
        yield shlex.quote(f"{key}={text}")


def quoted(path: Path) -> str:
    """A path in a line to be pasted: never taken for an option, and what a screen would change is written as bytes."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    kept = (
        c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in os.fsencode(c))
        for c in text
    )
    return f"$'{''.join(kept)}'"
