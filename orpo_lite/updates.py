"""Define the progress updates of a command, and run commands.

A command is a generator: it yields updates, and finally returns its result.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

from orpo_lite.errors import OrpoLiteError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Update:
    """A progress update of a running command. The command line shows it."""

    kind: Literal["stage", "note", "step", "eval"]
    text: str = ""
    """The name of a stage, the text of a note, or the metrics of a step or evaluation."""
    step: int = 0
    """Number of steps, or parts of a stage, that are done."""
    steps: int = 0
    """Number of all steps, or of all parts of a stage. 0 if the number is not known."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name -> value, for a step or evaluation."""


def run_to_end(
    updates: Generator[Update, None, Result], show: Callable[[Update], object]
) -> Result:
    """Run a command to its end. Call ``show`` with each update, and return the command's result."""
    while True:
        try:
            show(next(updates))
        except StopIteration as end:
            result: Result = end.value
            return result


def staged(
    text: str, progress: Generator[tuple[int, int], None, Result]
) -> Generator[Update, None, Result]:
    """Yield each (done, total) of ``progress`` as an update of the stage ``text``.

    Finally return the result of ``progress``.
    """
    while True:
        try:
            done, total = next(progress)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield Update("stage", text, done, total)


def attempt(failed: str, function: Callable[..., Any], *args: Any) -> Iterator[Update]:
    """Call ``function(*args)``. If it fails, yield a note, and let the command go on.

    The traceback is logged. ``failed`` is the beginning of the note. For example, with
    ``failed="result.json is not written"`` the note is "result.json is not written: disk full".
    """
    try:
        function(*args)
    except Exception as error:
        yield failure(failed, error)


def failure(failed: str, error: Exception) -> Update:
    """Log the traceback of an error, and return a note: the text ``failed`` and the reason."""
    logging.getLogger(__name__).warning(failed, exc_info=error)
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, OrpoLiteError):
        reason = f"{error.where}: {error.found}" if error.where else error.found
    return Update("note", f"{failed}: {reason or type(error).__name__}")


def with_torch_defaults(
    command: Callable[Arguments, Generator[Update, None, Result]],
) -> Callable[Arguments, Generator[Update, None, Result]]:
    """Decorate a command so that it runs with the default global settings of torch.

    A notebook may have disabled gradients, enabled autocast, or set another default dtype or
    device. At each update and at the end, the settings of the notebook are restored.
    """

    @wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Generator[Update, None, Result]:
        updates = command(*args, **kwargs)
        try:
            while True:
                with _torch_defaults():
                    try:
                        update = next(updates)
                    except StopIteration as end:
                        result: Result = end.value
                        return result
                yield update
        finally:
            updates.close()

    return run


@contextmanager
def _torch_defaults() -> Iterator[None]:
    import torch

    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    # If a default device is set, even cpu, each call of torch is slower.
    is_moved = device.type != "cpu"
    torch.set_default_dtype(torch.float32)
    if is_moved:
        torch.set_default_device(None)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # Autocast caches converted weights. It would not see the updates of an adapter.
            for device_type in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
        if is_moved:
            torch.set_default_device(device)
