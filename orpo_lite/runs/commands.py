"""Command lines that messages show, ready to be pasted."""

import os
import shlex
from pathlib import Path
from typing import Literal

from orpo_lite.errors import Command

Weights = Literal["original", "dequantized"]
"""What an adapter is merged into. original: the base's own weights, in 16 bit. dequantized: what 4 bit made of them, in
16 bit again, which is what the adapter was trained on."""


def merge_command(path: Path, weights: Weights = "original") -> Command:
    """The line that merges, to be pasted."""
    return Command(f"orpo-lite merge {quoted(path)}" + f" --base {weights}" * (weights != "original"))


def quoted(path: Path) -> str:
    """A path in a line to be pasted: never taken for an option, and what a screen would change is written as bytes."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    kept = (c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in text)
    return f"$'{''.join(kept)}'"
