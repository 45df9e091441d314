"""The errors people cause: each names the place, what was found, what was expected and the remedy.

An error of ours is any other exception; the command line shows its traceback and asks for a report.
"""

import errno
import re
from collections.abc import Sequence

SHOWN = 20  # faults printed in one message; the total is always given
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what an OSError of a full disk, or quota, or size limit says
# Tokens of the hub, those of a login in the browser and of trusted publishers among them; never shown, wherever a
# message quotes one from.
TOKEN = re.compile(r"hf_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[A-Za-z0-9._-]{16,})")


class OrpoLiteError(Exception):
    """Something the person can mend. Printed without a traceback; the process ends with ``exit_code``.

    Args:
        where: the file and line, or the recipe key, that holds the fault.
        found: what stands there.
        expected: what was expected instead, or "".
        remedy: what to do about it, best as a line that can be pasted; or "".
    """

    exit_code = 2

    def __init__(self, where: str, found: str, expected: str = "", remedy: str = "") -> None:
        where, found, expected, remedy = (TOKEN.sub("hf_***", text) for text in (where, found, expected, remedy))
        super().__init__(where, found, expected, remedy)
        self.where, self.found, self.expected, self.remedy = where, found, expected, remedy

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


class RecipeError(OrpoLiteError):
    """A wrong recipe or command line."""

    exit_code = 2


class DataError(OrpoLiteError):
    """Preference data that cannot be read or used."""

    exit_code = 3


class ModelError(OrpoLiteError):
    """A base model, tokenizer, chat template or adapter that cannot be used."""

    exit_code = 4


class CheckpointError(OrpoLiteError):
    """A run folder or checkpoint that is missing, altered, in use or of another run."""

    exit_code = 5


class FitError(OrpoLiteError):
    """Not enough disk, host or GPU memory, or no 4-bit support, on this machine."""

    exit_code = 6


class DivergedError(OrpoLiteError):
    """The loss or the gradients stopped being finite."""

    exit_code = 7


class HubError(OrpoLiteError):
    """The hub refused, is unreachable, or lacks what was asked for."""

    exit_code = 8


def raise_all(faults: Sequence[OrpoLiteError]) -> None:
    """Raise every fault as one error of the first one's class: the first twenty and the total. No-op when empty."""
    if not faults:
        return
    if len(faults) == 1:
        raise faults[0]
    shown = "\n".join(str(fault) for fault in faults[:SHOWN])
    rest = len(faults) - SHOWN
    more = f"\n... and {rest} more" if rest > 0 else ""
    raise type(faults[0])("", f"{len(faults)} faults:\n{shown}{more}")
