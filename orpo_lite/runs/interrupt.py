"""Collect SIGINT, SIGTERM and SIGHUP, so that a training saves its current step before it stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_lite.errors import OrpoLiteError
from orpo_lite.runs.commands import resume_command


class Interrupted(OrpoLiteError):  # noqa: N818 - not a fault
    """A signal stopped the training. The current work was finished and saved.

    Args:
        number: the number of the signal.
        path: the run folder.
        saved: what was saved.
    """

    def __init__(self, number: int, path: Path, saved: str = "the last step is saved") -> None:
        name = signal.Signals(number).name
        found = f"{name} stopped the training; {saved}"
        super().__init__(found=found, fix=resume_command(path))
        self.exit_code = 128 + number


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Yield a list. The number of each received SIGINT, SIGTERM or SIGHUP is added to the list.

    The caller must read the list, and stop after a signal. A second SIGINT raises
    KeyboardInterrupt. If the process ignores SIGHUP, as under nohup, SIGHUP stays ignored: the
    training continues after the terminal is closed. Outside the main thread, no signals are
    collected.
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
