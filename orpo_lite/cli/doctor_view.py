"""Print the results of ``orpo-lite doctor``."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orpo_lite.cli.console import out

if TYPE_CHECKING:
    from orpo_lite.doctor.check import Check

SIGNS = {"ok": "✓", "warning": "!", "fault": "✗"}
PLAIN = {"ok": "ok", "warning": "warning", "fault": "FAULT"}


def print_checks(checks: "Sequence[Check]") -> None:
    """Print a line for each check, with its fix below, and then a summary.

    If the encoding of the output lacks signs such as ✓, words are printed instead.
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
    """Return a line that counts faults and warnings, such as ``1 fault (disk), no warnings``."""
    parts = []
    for state in ("fault", "warning"):
        names = [check.name for check in checks if check.state == state]
        plural = "" if len(names) == 1 else "s"
        where = f" ({', '.join(dict.fromkeys(names))})" if names else ""
        parts.append(f"{len(names) or 'no'} {state}{plural}{where}")
    return ", ".join(parts)
