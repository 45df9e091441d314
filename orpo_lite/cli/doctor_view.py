"""What `orpo-lite doctor` prints of its checks."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orpo_lite.cli.console import out

if TYPE_CHECKING:
    from orpo_lite.doctor.check import Check

SIGNS = {"ok": "✓", "warning": "!", "fault": "✗"}
PLAIN = {"ok": "ok", "warning": "warning", "fault": "FAULT"}


def print_checks(checks: "Sequence[Check]") -> None:
    """Print a line for each check with what to do below it, then a summary with the faults first.

    Where the output has no such signs, words are in their place.
    """
    signs = SIGNS if out.encoding.startswith("utf") else PLAIN
    width = max(len(check.name) for check in checks)
    column = max(map(len, signs.values()))
    for check in checks:
        out.print(f"{signs[check.state].ljust(column)} {check.name.ljust(width)}  {check.found}")
        if check.fix:
            out.print(textwrap.indent(f"to do: {check.fix}", " " * (column + width + 3)))
    out.print(f"\n{summary(checks)}")


def summary(checks: "Sequence[Check]") -> str:
    """Return one line: how many faults and warnings there are, and where."""
    parts = []
    for state in ("fault", "warning"):
        names = [check.name for check in checks if check.state == state]
        plural = "" if len(names) == 1 else "s"
        where = f" ({', '.join(dict.fromkeys(names))})" if names else ""
        parts.append(f"{len(names) or 'no'} {state}{plural}{where}")
    return ", ".join(parts)
