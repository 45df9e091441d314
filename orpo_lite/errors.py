"""Define errors that a person can fix.

An error names the place of the fault, what was found, what was expected, and a fix.

All other exceptions are bugs in orpo-lite. The command line prints their traceback and asks the
person to report the bug.
"""

import copyreg
import errno
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

SHOWN = 20  # largest number of faults in one message, which always gives their total number
# Values of errno: the disk is full, or a quota or file size limit is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Values of errno after fsync, if the file system does not support it (FUSE, SMB).
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
# Matches access tokens of the hub, also those of a browser login and of trusted publishers.
# Messages never show such a token.
TOKEN = re.compile(r"hf_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[A-Za-z0-9._-]{16,})")


class Command(str):
    """The text of a fix that is a shell command.

    The text is for people. It may contain advice too. ``line`` is only the command.
    """

    __slots__ = ("line",)
    line: str

    def __new__(cls, line: str, advice: str = "", *, text: str = "") -> Self:
        """Create a fix. Its text is ``line`` followed by ``advice``, or ``text`` if it is given."""
        fix = super().__new__(cls, text or line + advice)
        fix.line = line
        return fix

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        return (self.line,), {"text": str(self)}


class Overrides(str):
    """A fix that sets recipe keys. The fix is a text for people; ``values`` has the new values."""

    __slots__ = ("values",)
    values: Mapping[str, Any]
    """``section.key`` -> value."""

    def __new__(cls, values: Mapping[str, Any], advice: str = "", *, text: str = "") -> Self:
        """Create a fix. Its text is "key=value" words and ``advice``, or else ``text``."""
        words = (
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in values.items()
        )
        fix = super().__new__(cls, text or " ".join(words) + advice)
        fix.values = values
        return fix

    def __getnewargs_ex__(self) -> tuple[tuple[Mapping[str, Any]], dict[str, str]]:
        return (self.values,), {"text": str(self)}


def reworded(fix: str, text: str) -> str:
    """Return a copy of ``fix`` that shows ``text``.

    The copy of a :class:`Command` keeps ``line``. The copy of an :class:`Overrides` keeps
    ``values``. For a plain string, the result is ``text``.
    """
    if isinstance(fix, Overrides):
        return Overrides(fix.values, text=text)
    return Command(fix.line, text=text) if isinstance(fix, Command) else text


def one_of(fixes: Iterable[str]) -> str:
    """Return one fix that suggests all fixes: A, B -> "A or B".

    If some of the fixes are :class:`Overrides`, the result is an :class:`Overrides` too. Its values
    are those of the first :class:`Overrides` in ``fixes``.
    """
    options = [*fixes]
    first = next((fix for fix in options if isinstance(fix, Overrides)), "")
    return reworded(first, " or ".join(options))


class OrpoLiteError(Exception):
    """An error that a person can fix.

    The command line prints it without a traceback and ends with the exit code ``exit_code``.

    Args:
        where: the place of the fault: a file and line, or a recipe key. It may be "".
        found: what was found at this place.
        expected: what was expected instead. It may be "".
        fix: how to fix the fault: :class:`Overrides`, a :class:`Command` or a plain text. It may
            be "".
    """

    exit_code = 2

    def __init__(self, *, where: str = "", found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected = (
            TOKEN.sub("hf_***", text) for text in (where, found, expected)
        )
        # sub() returns a plain string, without the command or values of a fix.
        self.fix = TOKEN.sub("hf_***", fix) if TOKEN.search(fix) else fix
        super().__init__(self.where, self.found, self.expected, self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support copy and pickle. The default fails, because constructors take only keywords."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class RecipeError(OrpoLiteError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(OrpoLiteError):
    """The preference data cannot be read or used."""

    exit_code = 3


class ModelError(OrpoLiteError):
    """A base model, tokenizer, chat template or adapter cannot be used."""

    exit_code = 4


class CheckpointError(OrpoLiteError):
    """A run folder or checkpoint is missing, changed, in use or from another run."""

    exit_code = 5


class FitError(OrpoLiteError):
    """The machine has too little disk space or memory, or lacks a package or 4-bit support.

    The exit code is 6. ``orpo-lite doctor`` also ends with 6 if a check finds a fault.
    """

    exit_code = 6


class DivergedError(OrpoLiteError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 7


class LostProcessError(OrpoLiteError):
    """Another process of the training ended, so this one cannot go on."""

    exit_code = 9


class HubError(OrpoLiteError):
    """The hub cannot be reached, refuses a request, or lacks the repository or file."""

    exit_code = 8


def _is_same_fix(one: str, other: str) -> bool:
    """Return True if two fixes have the same command or values. For plain texts, return False."""
    if isinstance(one, Overrides) and isinstance(other, Overrides):
        return one.values == other.values
    return isinstance(one, Command) and isinstance(other, Command) and one.line == other.line


def raise_all(faults: Sequence[OrpoLiteError]) -> None:
    """Raise one error that shows all faults. Without faults, do nothing.

    The error has the class of the first fault. It shows the first twenty faults and the total
    number. If all faults have the same fix, this fix is shown once and is the fix of the error.
    """
    if not faults:
        return
    if len(faults) == 1:
        raise faults[0]
    common = faults[0].fix
    is_common = all(_is_same_fix(common, fault.fix) for fault in faults)
    once = f"\n  fix: {common}" if is_common else ""  # printed once, at the end
    shown = "\n".join(str(fault).removesuffix(once) for fault in faults[:SHOWN])
    rest = len(faults) - SHOWN
    more = f"\n... and {rest} more" if rest > 0 else ""
    error = type(faults[0])(found=f"{len(faults)} faults:\n{shown}{more}")
    error.fix = common if is_common else ""
    raise error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
