"""The result of a check, and the function that runs a check with a time limit."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from orpo_lite.errors import OrpoLiteError, first_line

State = Literal["ok", "warning", "fault"]

OTHER_PATH = "set the path in the recipe, such as training.output_dir, to a place that exists"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    state: State
    found: str
    fix: str = ""
    """What the user should do; "" if nothing."""
    private: tuple[str, ...] = ()
    """Texts in ``found`` and ``fix`` that a bug report must not show."""


Checks = Iterable[Check]


def run_check(name: str, check: Callable[[], Checks], limit: float) -> list[Check]:
    """Run a check and return its results.

    If the check raises an exception or takes more than ``limit`` seconds, the last result is a
    fault.
    """
    found: list[Check] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.extend(check())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return [*found, Check(name, "fault", f"no answer within {limit:.0f} s")]
    for error in errors:
        if isinstance(error, OrpoLiteError):
            found.append(Check(name, "fault", f"{error.where}: {error.found}", error.fix))
        elif isinstance(error, OSError) and error.filename:
            found.append(Check(name, "fault", f"{error.filename}: {error.strerror}", OTHER_PATH))
        else:
            text = f"the check failed: {type(error).__name__}: {first_line(error)[:300]}"
            found.append(Check(name, "fault", text))
    return found
