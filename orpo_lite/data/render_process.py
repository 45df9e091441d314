"""Render chat templates in a separate process with limits. A template is untrusted code."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from orpo_lite.data.chat_template import (
    MEMORY,
    SECONDS,
    BeyondLimitsError,
    PairTexts,
    Rendered,
    Template,
    pair_texts,
    render,
    too_long,
)
from orpo_lite.data.pair import Pair
from orpo_lite.errors import DataError, ModelError, OrpoLiteError

# The process is killed after this many seconds without an answer, because a single long operation
# cannot be interrupted.
STUCK = 120.0

Limit = Callable[[], AbstractContextManager[None]]
ERRORS: dict[str, Callable[..., OrpoLiteError]] = {
    error.__name__: error for error in (DataError, ModelError, BeyondLimitsError)
}


class Renderer(AbstractContextManager["Renderer"]):
    """Render batches of pairs. Call ``send`` with a batch, and later ``receive`` for its texts.

    Use it as a context manager.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self.sent: Sequence[Pair] = ()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing: there is no process to end."""

    def send(self, pairs: Sequence[Pair]) -> None:
        """Send a batch. Before this call, the texts of the previous batch must be received."""
        self.sent = pairs

    def receive(self) -> list[Rendered]:
        """Return one result for each pair of the sent batch. Raises BeyondLimitsError."""
        return _raise_limit_error(_render_pairs(self.sent, self.template))


class LimitedRenderer(Renderer):
    """Render in a separate process, so that a template cannot block this process or fill memory."""

    def __init__(self, template: Template) -> None:
        super().__init__(template)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        # -P: Python imports nothing from the current folder. PYTHONPATH: it finds this package.
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(  # noqa: S603 - this module
            [sys.executable, "-P", "-m", __name__],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._write(asdict(template))

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def send(self, pairs: Sequence[Pair]) -> None:
        super().send(pairs)
        self._write(
            [
                [pair.messages, pair.chosen, pair.rejected, pair.where, pair.prompt_text]
                for pair in pairs
            ]
        )

    def receive(self) -> list[Rendered]:
        stream = cast(IO[bytes], self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            is_late = not selector.select(STUCK)
        if is_late:
            self._process.kill()
        line = stream.readline()
        if not line.endswith(b"\n"):
            raise self._died(is_late=is_late)
        return _raise_limit_error([_unpack(item) for item in json.loads(line)])

    def _write(self, value: Any) -> None:
        stream = cast(IO[bytes], self._process.stdin)
        try:
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self, *, is_late: bool = False) -> Exception:
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        if code >= 0:  # it was not killed, so this is a bug
            return RuntimeError(
                f"the process that renders chat templates ended with {code}: {last}"
            )
        first = self.sent[0].where if self.sent else "data"
        places = f"one of the {len(self.sent)} pairs from {first}" if len(self.sent) > 1 else first
        if is_late:
            return BeyondLimitsError(
                places, f"the chat template did not end within {STUCK:.0f} seconds"
            )
        return BeyondLimitsError(
            places,
            f"the process that renders the chat template was killed (signal {-code}), perhaps "
            "because it used too much memory",
        )


def _raise_limit_error(results: list[Rendered]) -> list[Rendered]:
    if results and isinstance(results[-1], BeyondLimitsError):
        raise results[-1]
    return results


def _render_pairs(
    pairs: Iterable[Pair], template: Template, limited: Limit = nullcontext
) -> list[Rendered]:
    """Return the texts of each pair. After a BeyondLimitsError, no more pairs are rendered."""
    results: list[Rendered] = []
    for pair in pairs:
        try:
            with limited():
                results.append(pair_texts(pair, template))
        except BeyondLimitsError as fault:
            return [*results, fault]
        except TimeoutError:  # raised between two of the pair's texts
            return [*results, too_long(pair.where)]
        except (DataError, ModelError) as fault:
            results.append(fault)
    return results


def _pack(item: Rendered) -> list[Any]:
    if isinstance(item, BeyondLimitsError):
        return [type(item).__name__, item.where, item.found]
    if isinstance(item, OrpoLiteError):
        return [type(item).__name__, item.where, item.found, item.expected, item.fix]
    return [item] if isinstance(item, str) else list(item)


def _unpack(parts: list[Any]) -> Rendered:
    match parts:
        case [reason]:
            return str(reason)
        case [prompt, chosen, rejected, end, list(remarks)]:
            return PairTexts(prompt, chosen, rejected, end, tuple(remarks))
        case [name, *fields]:
            return ERRORS[name](
                **dict(zip(("where", "found", "expected", "fix"), fields, strict=False))
            )
    raise ValueError(f"{len(parts)} parts")


def _serve() -> None:
    """Run the separate process: read a template, then read batches of pairs and write their texts.

    The template, each batch and each answer are one line of JSON.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    values: Mapping[str, Any] = json.loads(sys.stdin.buffer.readline() or b"{}")
    template = Template(**values)
    # This imports the libraries before the limits are set.
    render(({"role": "user", "content": ""},), Template("", {}, [], [], ""), "")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _out_of_time)
    for line in sys.stdin.buffer:
        sent = (Pair(tuple(turns), *texts) for turns, *texts in json.loads(line))
        results = [_pack(item) for item in _render_pairs(sent, template, _alarm)]
        answers.write(json.dumps(results).encode() + b"\n")
        answers.flush()


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise TimeoutError if the ``with`` block uses more than SECONDS of processor time."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _out_of_time(_number: int, _frame: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    _serve()
