"""Updates: what a verb says while it runs, and how to run one to its end."""

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
    """One thing that happened; the command line draws it."""

    kind: Literal["stage", "note", "step", "eval"]
    text: str = ""
    """What is being done, what the person should know, or the metrics of a step or an evaluation as a line."""
    step: int = 0
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


def run_to_end(
    updates: Generator[Update, None, Result], show: Callable[[Update], object]
) -> Result:
    """Run a verb to its end, showing each update; returns its result."""
    while True:
        try:
            show(next(updates))
        except StopIteration as end:
            result: Result = end.value
            return result


def staged(
    text: str, progress: Generator[tuple[int, int], None, Result]
) -> Generator[Update, None, Result]:
    """Turn a generator of (done, total) into one of updates of a stage; returns what it returns."""
    while True:
        try:
            done, total = next(progress)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield Update("stage", text, done, total)


def attempt(failed: str, function: Callable[..., Any], *args: Any) -> Iterator[Update]:
    """Call ``function``, which nothing else depends on: what it raises becomes a note, and its traceback is logged."""
    try:
        function(*args)
    except Exception as error:
        yield failure(failed, error)


def failure(failed: str, error: Exception) -> Update:
    """The note of an error that costs nothing but ``failed``, whose traceback is logged."""
    logging.getLogger(__name__).warning(failed, exc_info=error)
    said = " ".join(str(error).split())[:300]
    if isinstance(error, OrpoLiteError):
        said = f"{error.where}: {error.found}" if error.where else error.found
    said = said or type(error).__name__
    return Update("note", f"{failed}: {said}")


def with_torch_defaults(
    verb: Callable[Arguments, Generator[Update, None, Result]],
) -> Callable[Arguments, Generator[Update, None, Result]]:
    """Run a verb with torch's global settings as they are at its import; between updates the caller's are back.

    A notebook may have switched gradients off, autocast on, or set another default dtype or device.
    """

    @wraps(verb)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Generator[Update, None, Result]:
        updates = verb(*args, **kwargs)
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
    moved = (
        device.type != "cpu"
    )  # whoever sets a device, even the usual one, slows every call of torch down
    torch.set_default_dtype(torch.float32)
    if moved:
        torch.set_default_device(None)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # Autocast keeps the weights that it has cast: an adapter would never seem to change.
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
        if moved:
            torch.set_default_device(device)
