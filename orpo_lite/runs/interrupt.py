"""Handle SIGINT, SIGTERM and SIGHUP, so that the current step is finished and saved first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_lite.errors import OrpoLiteError
from orpo_lite.runs.commands import resume_command


class Interrupted(OrpoLiteError):  # noqa: N818 - not a fault
    """A signal arrived; the current step was finished and saved."""

    def __init__(self, number: int, path: Path) -> None:
        found = f"stopped by {signal.Signals(number).name} and saved"
        super().__init__(found=found, fix=resume_command(path))
        self.exit_code = 128 + number


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Yield the list of signals received, so that the current step can finish first.

    SIGINT, SIGTERM and SIGHUP are collected; a second SIGINT raises KeyboardInterrupt. SIGHUP is
    not collected if it is ignored already: nohup does that to keep a training when its terminal is
    closed.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
