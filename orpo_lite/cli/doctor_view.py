"""What `orpo-lite doctor` prints of its checks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orpo_lite.cli.console import out

if TYPE_CHECKING:
    from orpo_lite.doctor import Check

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
            lines = check.fix.splitlines()
            out.print("\n".join(f"{' ' * (column + 3 + width)}to do: {lines[0]}".splitlines()))
            for line in lines[1:]:
                out.print(f"{' ' * (column + 3 + width)}{line}")
    out.print(f"\n{summary(checks)}")


def summary(checks: "Sequence[Check]") -> str:
    """Return one line: how many faults and warnings there are, and where."""
    parts = []
    for state, noun in (("fault", "fault"), ("warning", "warning")):
        names = [*dict.fromkeys(check.name for check in checks if check.state == state)]
        count = sum(check.state == state for check in checks)
        plural = "" if count == 1 else "s"
        parts.append(
            f"{count or 'no'} {noun}{plural}" + (f" ({', '.join(names)})" if names else "")
        )
    return ", ".join(parts)
