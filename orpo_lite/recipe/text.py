"""Convert a size such as "24GiB" to bytes and back. Write a recipe's value as one line of YAML."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

MAX_DEPTH = 32
"""Largest number of nested levels in a YAML file. It is limited because PyYAML is recursive."""
OPENING_TOKENS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
CLOSING_TOKENS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)

GIB = 2**30
UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def read_bytes(text: str) -> int:
    """Return the number of bytes in a size such as "24GiB" or "23.5 GiB".

    The unit is a key of :data:`UNITS`, in upper or lower case. Raises ValueError for other texts.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise ValueError("auto, or a size such as 24GiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def gib(size: int) -> str:
    """Return a size in bytes as text: "1.50 GiB", or "12.0 MiB" if it is below 64 MiB."""
    return f"{size / GIB:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.1f} MiB"


class _OneLine(yaml.SafeDumper):
    """A YAML dumper that writes a text with line breaks as one quoted line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    has_line_breaks = text.splitlines() not in ([], [text])
    style = '"' if has_line_breaks else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _represent_text)


def to_text(value: Any) -> str:
    """Return a value of a recipe as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, allow_unicode=True, width=float("inf")
    )
    # strip() without an argument would also remove a no-break space of the value.
    return text.removesuffix("...\n").strip("\n")


@dataclass(frozen=True)
class Written:
    """A value as it is written in a recipe file or on the command line, and its place.

    The value is a text, None, or a list or mapping of these. Numbers are texts too, until the
    schema converts them. The values in data.chat_template_kwargs may also have other JSON types.
    """

    value: Any
    where: str
    """The place: "NAME.yaml:LINE" or "command line"."""
