"""The errors people cause: each names the place, what was found, what was expected and how to fix it.

An error of ours is any other exception; the command line shows its traceback and asks for a report.
"""

import copyreg
import errno
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

SHOWN = 20  # faults printed in one message; the total is always given
FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # what an OSError of a full disk, or quota, or size limit says
NO_SYNC = (
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
)  # what fsync raises on file systems without it (FUSE, SMB)
# Tokens of the hub, those of a login in the browser and of trusted publishers among them; never shown, wherever a
# message quotes one from.
TOKEN = re.compile(r"hf_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[A-Za-z0-9._-]{16,})")


class Command(str):
    """A fix that is a line for the shell."""

    __slots__ = ("line",)
    line: str

    def __new__(cls, line: str, advice: str = "", *, text: str = "") -> Self:
        """Printed as the line and ``advice`` behind it; or as ``text``."""
        fix = super().__new__(cls, text or line + advice)
        fix.line = line
        return fix

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        return (self.line,), {"text": str(self)}


class Overrides(str):
    """A fix that is recipe keys and their new values: words for people, ``values`` for programs."""

    __slots__ = ("values",)
    values: Mapping[str, Any]
    """``section.key`` -> value."""

    def __new__(cls, values: Mapping[str, Any], advice: str = "", *, text: str = "") -> Self:
        """Printed as ``key=value`` words and ``advice`` behind them; or as ``text``."""
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
    """Return ``text`` with the data of ``fix``: a string method would return words alone."""
    if isinstance(fix, Overrides):
        return Overrides(fix.values, text=text)
    return Command(fix.line, text=text) if isinstance(fix, Command) else text


def one_of(fixes: Iterable[str]) -> str:
    """Join fixes of which any will do: all of them in words, the first one as data."""
    options = [*fixes]
    first = next((fix for fix in options if isinstance(fix, Overrides)), "")
    return reworded(first, " or ".join(options))


class OrpoLiteError(Exception):
    """An error that the person can fix. Printed without a traceback; the process ends with ``exit_code``.

    Args:
        where: the file and line, or the recipe key, that holds the fault.
        found: what it holds.
        expected: what was expected instead, or "".
        fix: what to do about it: :class:`Overrides` or a :class:`Command` where one exists, else words; or "".
    """

    exit_code = 2

    def __init__(self, *, where: str = "", found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected = (
            TOKEN.sub("hf_***", text) for text in (where, found, expected)
        )
        self.fix = (
            TOKEN.sub("hf_***", fix) if TOKEN.search(fix) else fix
        )  # which keeps the data of a fix
        super().__init__(self.where, self.found, self.expected, self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it as it is: a constructor takes keywords, and a subclass its own."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
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


def _is_same_fix(one: str, other: str) -> bool:
    """Whether both are the same data; words alone stay with their fault."""
    if isinstance(one, Overrides) and isinstance(other, Overrides):
        return one.values == other.values
    return isinstance(one, Command) and isinstance(other, Command) and one.line == other.line


def raise_all(faults: Sequence[OrpoLiteError]) -> None:
    """Raise every fault as one error of the first one's class: the first twenty and the total. No-op when empty.

    A fix that all of them have in common is the error's own.
    """
    if not faults:
        return
    if len(faults) == 1:
        raise faults[0]
    common = faults[0].fix
    is_common = all(_is_same_fix(common, fault.fix) for fault in faults)
    once = f"\n  fix: {common}" if is_common else ""  # said behind all of them
    shown = "\n".join(str(fault).removesuffix(once) for fault in faults[:SHOWN])
    rest = len(faults) - SHOWN
    more = f"\n... and {rest} more" if rest > 0 else ""
    error = type(faults[0])(found=f"{len(faults)} faults:\n{shown}{more}")
    error.fix = common if is_common else ""
    raise error


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; the name of its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
