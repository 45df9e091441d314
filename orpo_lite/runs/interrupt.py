"""Collect SIGINT, SIGTERM and SIGHUP, so that the training can first finish and save its step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_lite.errors import OrpoLiteError
from orpo_lite.runs.commands import resume_command


class Interrupted(OrpoLiteError):  # noqa: N818 - not a fault
    """A signal stopped the training. The current step was finished and saved.

    Args:
        number: the number of the signal.
        path: the run folder.
    """

    def __init__(self, number: int, path: Path) -> None:
        found = f"stopped by {signal.Signals(number).name} and saved"
        super().__init__(found=found, fix=resume_command(path))
        self.exit_code = 128 + number


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Yield a list to which the numbers of received signals are added. The caller stops itself.

    SIGINT, SIGTERM and SIGHUP are collected. A second SIGINT raises KeyboardInterrupt. SIGHUP is
    not collected if the process ignores it: nohup sets this, so that the training continues after
    the terminal is closed. Signals are collected only in the main thread.
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
