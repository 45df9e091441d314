"""Values of a recipe as text: sizes, one-line YAML, values as they were written."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

MAX_DEPTH = 32
DEEPER = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken
)  # fmt: skip
BACK = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)

GIB = 2**30
UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def read_bytes(text: str) -> int:
    """A size such as 24GiB or 23.5 GiB in bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise ValueError("auto, or a size such as 24GiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def gib(size: int) -> str:
    """A size in bytes as people read it."""
    return f"{size / GIB:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.1f} MiB"


class _OneLine(yaml.SafeDumper):
    """Writes a text with line breaks in one quoted line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text.splitlines() not in ([], [text]) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _represent_text)


def to_text(value: Any) -> str:
    """A value as a recipe holds it, on one line."""
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("...\n").strip(
        "\n"
    )  # not a no-break space, which may be the text's own


@dataclass(frozen=True)
class Written:
    """One value as it was written: a string, None, a list or a mapping of these; and where."""

    value: Any
    where: str
