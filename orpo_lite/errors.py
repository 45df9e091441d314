"""Errors that a person can fix. Each names the place, what was found, what was expected and a fix.

Any other exception is a bug in orpo-lite. The command line shows its traceback and asks for a
report.
"""

import copyreg
import errno
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

SHOWN = 20  # faults printed in one message; the total is always given
# errno of an OSError: the disk is full, or a quota or a file size limit is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# errno of fsync on file systems that do not support it (FUSE, SMB).
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
# Access tokens of the hub, also those of a browser login and of trusted publishers. A message never
# shows one, whatever text it quotes.
TOKEN = re.compile(r"hf_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[A-Za-z0-9._-]{16,})")


class Command(str):
    """A fix that is a shell command, in ``line``."""

    __slots__ = ("line",)
    line: str

    def __new__(cls, line: str, advice: str = "", *, text: str = "") -> Self:
        """Create a fix that is printed as the line followed by ``advice``, or as ``text``."""
        fix = super().__new__(cls, text or line + advice)
        fix.line = line
        return fix

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        return (self.line,), {"text": str(self)}


class Overrides(str):
    """A fix that sets recipe keys: a text for people, ``values`` for programs."""

    __slots__ = ("values",)
    values: Mapping[str, Any]
    """``section.key`` -> value."""

    def __new__(cls, values: Mapping[str, Any], advice: str = "", *, text: str = "") -> Self:
        """Create a fix that is printed as ``key=value`` words and ``advice``, or as ``text``."""
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
    """Return ``text`` with the data of ``fix``. A string method would return a plain string."""
    if isinstance(fix, Overrides):
        return Overrides(fix.values, text=text)
    return Command(fix.line, text=text) if isinstance(fix, Command) else text


def one_of(fixes: Iterable[str]) -> str:
    """Return alternative fixes as one: all texts, and the data of the first :class:`Overrides`."""
    options = [*fixes]
    first = next((fix for fix in options if isinstance(fix, Overrides)), "")
    return reworded(first, " or ".join(options))


class OrpoLiteError(Exception):
    """An error that a person can fix.

    It is printed without a traceback, and the process ends with ``exit_code``.

    Args:
        where: the file and line, or the recipe key, with the fault.
        found: what was found there.
        expected: what was expected instead, or "".
        fix: how to fix it: :class:`Overrides` or a :class:`Command` if possible, else a text or "".
    """

    exit_code = 2

    def __init__(self, *, where: str = "", found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected = (
            TOKEN.sub("hf_***", text) for text in (where, found, expected)
        )
        # sub() returns a plain string, without the data of a fix.
        self.fix = TOKEN.sub("hf_***", fix) if TOKEN.search(fix) else fix
        super().__init__(self.where, self.found, self.expected, self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle all attributes; constructors take keywords, which differ by subclass."""
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
    """A run folder or checkpoint that is missing, changed, in use or from another run."""

    exit_code = 5


class FitError(OrpoLiteError):
    """This machine has too little disk, host or GPU memory, or lacks 4-bit support or a package.

    ``orpo-lite doctor`` ends with its exit code if it finds a fault.
    """

    exit_code = 6


class DivergedError(OrpoLiteError):
    """The loss or the gradients stopped being finite."""

    exit_code = 7


class HubError(OrpoLiteError):
    """The hub refused a request, is unreachable, or does not have the repository or file."""

    exit_code = 8


def _is_same_fix(one: str, other: str) -> bool:
    """Return whether two fixes hold the same data; False for plain texts."""
    if isinstance(one, Overrides) and isinstance(other, Overrides):
        return one.values == other.values
    return isinstance(one, Command) and isinstance(other, Command) and one.line == other.line


def raise_all(faults: Sequence[OrpoLiteError]) -> None:
    """Raise all faults as one error of the first one's class; do nothing if there are none.

    The error shows the first twenty faults and their total. A fix that all of them share becomes
    the error's own fix.
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
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
