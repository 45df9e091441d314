"""Updates: what a verb says while it runs, and how to run one to its end."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from orpo_lite.errors import OrpoLiteError

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


def run_to_end(updates: Generator[Update, None, Result], show: Callable[[Update], object]) -> Result:
    """Run a verb to its end, showing each update; returns its result."""
    while True:
        try:
            show(next(updates))
        except StopIteration as end:
            result: Result = end.value
            return result


def staged(text: str, progress: Generator[tuple[int, int], None, Result]) -> Generator[Update, None, Result]:
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
    said = error.found if isinstance(error, OrpoLiteError) else " ".join(str(error).split())[:300]
    said = said or type(error).__name__
    return Update("note", f"{failed}: {said}")
