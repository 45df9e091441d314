"""Check versions, kernels, the real commands, plans and speed on a GPU.

    python -m benchmarks.gpu --minutes 8 --json FILE
    python -m benchmarks.gpu --rehearse --json FILE     the same, small shapes on a simulated device

Each figure is written as soon as it is known. The most important parts run first, each in a process
of its own with a time limit, so an error, an illegal memory access or a hang ends only one part.
What several parts need is made while the first of them run.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType

from benchmarks.gpu.figures import Figures, Report
from benchmarks.gpu.scale import ROOT, Scale, python

LEAST = 8.0  # seconds; a part that has fewer left is not begun
ROOM = 40e9  # bytes of two 16-bit 7B models and some runs
REHEARSAL_MINUTES, REHEARSAL_FACTOR = 40.0, 8.0  # a simulated device computes on one core


@dataclass(frozen=True)
class Part:
    """A part of the benchmark: a function of a module of this package."""

    name: str
    function: str
    """MODULE.FUNCTION; it takes a :class:`Scale`, a :class:`Figures` and the arguments."""
    limit: float
    """Time limit on a GPU, in seconds."""
    needs: tuple[str, ...] = ()
    """Parts whose files it needs."""
    after: tuple[str, ...] = ()
    """Parts that must end first, because it measures time or uses files that they may write."""
    arguments: tuple[str, ...] = ()


IN_BACKGROUND = (  # started at once, next to the others; they do not measure time
    Part("plans", "benchmarks.gpu.steps.make_plans", 170),
    Part("base", "benchmarks.gpu.base.make_bases", 120),
)
PARTS = (
    Part("card", "benchmarks.gpu.steps.card", 45),
    Part("tests", "benchmarks.gpu.commands.tests", 75),
    Part("gradients", "benchmarks.gpu.steps.gradients", 75),
    Part("train_12gib", "benchmarks.gpu.commands.train", 120, ("base",), ("plans",), ("12GiB",)),
    Part("train_auto", "benchmarks.gpu.commands.train", 100, ("base",), ("plans",), ("auto",)),
    Part("merge", "benchmarks.gpu.commands.merge", 100, ("base", "train_12gib")),
    Part("plan_kept", "benchmarks.gpu.steps.plan_kept", 75, ("plans",)),
    Part("resume", "benchmarks.gpu.commands.resume", 90, ("base",)),
    Part("fp16", "benchmarks.gpu.commands.fp16", 60, ("base",)),
    Part("out_of_memory", "benchmarks.gpu.steps.out_of_memory", 60, ("base",)),
    Part(
        "speed_mistral_7b",
        "benchmarks.gpu.speed.pairs_per_second",
        120,
        (),
        ("plans", "base"),
        ("mistral_7b",),
    ),
    Part(
        "speed_llama3_8b",
        "benchmarks.gpu.speed.pairs_per_second",
        120,
        (),
        ("plans", "base"),
        ("llama3_8b",),
    ),
    Part(
        "speed_qwen25_7b",
        "benchmarks.gpu.speed.pairs_per_second",
        120,
        (),
        ("plans", "base"),
        ("qwen25_7b",),
    ),
)


@dataclass
class Running:
    """A part that was started."""

    part: Part
    process: subprocess.Popen[bytes]
    figures: Path
    log: Path
    until: float
    """The end of its time."""
    began: float = field(default_factory=time.monotonic)
    read: int = 0
    """Bytes of ``figures`` that were copied to the report."""


class Parts:
    """Starts the parts, collects their figures and ends them in time."""

    def __init__(self, report: Report, work: Path, *, rehearse: bool, end: float) -> None:
        self.report, self.work, self.rehearse, self.end = report, work, rehearse, end
        self.running: list[Running] = []

    def start(self, part: Part) -> Running:
        """Start a part; its time limit begins now."""
        figures, log = self.work / f"{part.name}.jsonl", self.work / f"{part.name}.log"
        figures.touch()
        command = python("benchmarks.gpu", rehearse=self.rehearse)
        command += ["--work", str(self.work), *(["--rehearse"] if self.rehearse else [])]
        command += ["--part", part.name, part.function, *part.arguments]
        limit = part.limit * (REHEARSAL_FACTOR if self.rehearse else 1)
        until = min(time.monotonic() + limit, self.end)
        environment = os.environ | {
            "ORPO_LITE_CACHE": str(self.work / "cache"),
            "PYTHONUNBUFFERED": "1",
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.report.begin(part.name)
        self.running.append(Running(part, process, figures, log, until))
        return self.running[-1]

    def update(self) -> None:
        """Collect new figures of all running parts; end those whose time is over."""
        for running in [*self.running]:
            ended = running.process.poll() is not None
            is_over = ended or time.monotonic() > running.until
            if is_over:
                self.stop(running)
            self.collect(running)
            if is_over:
                self.running.remove(running)
                state = describe_exit(running.process.returncode) if ended else "out of time"
                log = ""
                if state != "done":
                    log = running.log.read_text("utf-8", errors="replace")[-3000:]
                self.report.end(running.part.name, state, time.monotonic() - running.began, log)

    def collect(self, running: Running) -> None:
        """Copy the figures that a part has written since the last call to the report."""
        with running.figures.open("rb") as stream:
            stream.seek(running.read)
            whole, _, _ = stream.read().rpartition(b"\n")
        running.read += len(whole) + 1 if whole else 0
        self.report.add(running.part.name, whole.decode())

    @staticmethod
    def stop(running: Running) -> None:
        """End the processes of a part that still run."""
        try:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait(timeout=5)
        except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            return  # it has ended; or the driver blocks it, and no part waits for it

    def wait(self, running: Running) -> None:
        """Wait until a part has ended in any way."""
        while running in self.running:
            self.update()
            time.sleep(0.1)

    def run(self, parts: list[Part]) -> None:
        """Run all parts in order, but a part that must wait for another one later."""
        left = list(parts)
        while left:
            self.update()
            states = {name: self.report.state(name) for part in left for name in part.needs}
            busy = {running.part.name for running in self.running}
            ready = [part for part in left if not busy & {*part.needs, *part.after}]
            if not ready:
                time.sleep(0.1)
                continue
            left.remove(ready[0])
            lacking = [name for name in ready[0].needs if states[name] != "done"]
            if self.end - time.monotonic() < LEAST:
                self.report.end(ready[0].name, "not begun: the time is over", 0, "")
            elif lacking:
                self.report.end(ready[0].name, f"not begun: it needs {', '.join(lacking)}", 0, "")
            else:
                self.wait(self.start(ready[0]))


def describe_exit(code: int) -> str:
    """Return how a process ended, by its exit code."""
    if code == 0:
        return "done"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main() -> None:
    """Run all parts, or one of them in this process."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=float, help="for all parts together; 8, and 40 for a rehearsal"
    )
    parser.add_argument(
        "--json", type=Path, help="where to write the figures, each as soon as it is known"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="small shapes on the simulated device"
    )
    parser.add_argument(
        "--only", help="only these parts, separated by commas, and the parts that they need"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for bases and runs, up to 35 GB; default: a temporary one"
    )
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, function, *arguments = options.part
        run_part(Scale(rehearse=options.rehearse, work=options.work), name, function, arguments)
        return
    if reason := find_obstacle(rehearse=options.rehearse):
        parser.error(reason)
    known = {part.name: part for part in (*IN_BACKGROUND, *PARTS)}
    names = options.only.split(",") if options.only else [part.name for part in PARTS]
    if unknown := {*names} - {*known}:
        parser.error(
            f"--only: no part is named {', '.join(sorted(unknown))}; "
            f"the parts are {', '.join(known)}"
        )
    needed = {name for part in names for name in with_needs(known, part)}
    minutes = options.minutes or (REHEARSAL_MINUTES if options.rehearse else 8.0)
    work = options.work or choose_folder()
    work.mkdir(parents=True, exist_ok=True)
    report = Report(options.json, rehearse=options.rehearse, minutes=minutes)
    parts = Parts(
        report, work.resolve(), rehearse=options.rehearse, end=time.monotonic() + 60 * minutes
    )

    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def leave(number: int, _: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not stop the clean-up
        sys.exit(128 + number)

    for number in signals:
        signal.signal(number, leave)
    try:
        for part in IN_BACKGROUND:
            if part.name in needed:
                parts.start(part)
        parts.run([part for part in PARTS if part.name in needed])
        while parts.running:  # parts in the background that no other part waited for
            parts.update()
            time.sleep(0.1)
    finally:
        for running in parts.running:
            parts.stop(running)
            report.end(running.part.name, "stopped", time.monotonic() - running.began, "")
        report.finish()
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


def run_part(scale: Scale, name: str, function: str, arguments: list[str]) -> None:
    """Run one part in this process."""
    module, _, attribute = function.rpartition(".")
    with Figures(scale.work / f"{name}.jsonl") as figures:
        getattr(import_module(module), attribute)(scale, figures, *arguments)


def find_obstacle(*, rehearse: bool) -> str:
    """Return why nothing can run on this machine, or ""."""
    if rehearse:
        sys.path.append(str(ROOT / "tests" / "simulated_cuda"))
        from simulated_cuda import missing

        return str(missing())
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA GPU is found ({error}); --rehearse runs small shapes on a simulated one"
    return ""


def choose_folder() -> Path:
    """Make a folder where there is space: among the temporary files, or in memory."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder is removed at the end
    room = shutil.disk_usage(tempfile.gettempdir()).free
    is_larger = memory.is_dir() and shutil.disk_usage(memory).free > room
    parent = memory if room < ROOM and is_larger else None
    return Path(tempfile.mkdtemp(prefix="orpo-lite-gpu-", dir=parent))


def with_needs(known: dict[str, Part], name: str) -> set[str]:
    """Return a part's name and the names of all parts that it needs."""
    return {name}.union(*(with_needs(known, needed) for needed in known[name].needs))


if __name__ == "__main__":
    main()
