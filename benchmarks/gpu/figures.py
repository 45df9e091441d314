"""The figures of a part, line by line, and the report of all parts."""

import json
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from orpo_lite.errors import OrpoLiteError
from orpo_lite.runs.atomic import to_json, write_text

NOT_MEASURED = "not measured"
Result = TypeVar("Result")


class Figures(AbstractContextManager["Figures"]):
    """The figures of one part. Each is a line of a file, written as soon as it is known."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("a", encoding="utf-8")

    def note(self, name: str, value: Any) -> Any:
        """Write a figure and return it. Dots in a name make nested objects in the report."""
        self._stream.write(json.dumps([name, value], default=str) + "\n")
        self._stream.flush()
        return value

    def attempt(self, name: str, function: Callable[..., Result], *args: Any) -> Result | None:
        """Write the result of ``function`` and return it; write its exception and return None."""
        try:
            result = function(*args)
        except Exception as error:
            traceback.print_exc()
            self.note(f"{name}.error", f"{type(error).__name__}: {str(error)[:600]}")
            return None
        if isinstance(result, dict | list | str | int | float):
            self.note(name, result)
        return result

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._stream.close()


class Report:
    """The states and figures of all parts, on the screen and in an always valid JSON file."""

    def __init__(self, file: Path | None, *, rehearse: bool, minutes: float) -> None:
        self.file, self.began = file, time.monotonic()
        device = "see the part `card`"
        if rehearse:
            device = "simulated: times are a CPU's, memory is that of small shapes"
        self.tree: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "minutes": minutes,
            "device": device,
            "parts": {},
        }

    def state(self, part: str) -> str:
        """Return the state of a part: not begun, running, done, or how else it ended."""
        return str(self.tree["parts"].get(part, {}).get("state", "not begun"))

    def begin(self, part: str) -> None:
        """Record that a part has started."""
        self.tree["parts"][part] = {"state": "running", "figures": {}}
        self._write(f"--- {part}")

    def add(self, part: str, lines: str) -> None:
        """Add the figures in complete lines that :class:`Figures` wrote."""
        for line in lines.splitlines():
            name, value = json.loads(line)
            place = self.tree["parts"][part]["figures"]
            *groups, last = name.split(".")
            for group in groups:
                if not isinstance(place.get(group, {}), dict):
                    place[group] = {"value": place[group]}
                place = place.setdefault(group, {})
            place[last] = value
            self._write(f"{part}: {name} = {_short(value)}")

    def end(self, part: str, state: str, seconds: float, log: str) -> None:
        """Record how a part has ended."""
        entry = self.tree["parts"].setdefault(part, {"figures": {}})
        entry |= {"state": state, "seconds": round(seconds, 1), **({"log": log} if log else {})}
        self._write(f"--- {part}: {state}, {seconds:.1f} s")

    def finish(self) -> None:
        """Record that all parts have ended."""
        states = {name: entry["state"] for name, entry in self.tree["parts"].items()}
        self.tree["seconds"] = round(time.monotonic() - self.began, 1)
        self._write(
            f"{sum(state == 'done' for state in states.values())} of {len(states)} parts done"
        )

    def _write(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", flush=True)
        if self.file:
            try:
                write_text(self.file, to_json(self.tree))
            except OrpoLiteError as error:  # such as a full disk; the next figure tries again
                print(error, flush=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]} ..."
