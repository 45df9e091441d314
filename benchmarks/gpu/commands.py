"""Parts that run orpo-lite's commands in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import NOT_MEASURED, Figures
from benchmarks.gpu.scale import ROOT, Scale, python
from orpo_lite.runs.atomic import sha256

ADAPTER = "adapter/adapter_model.safetensors"
STAGE = re.compile(r"^(.*?) \.\.\.( [\d,]+ of [\d,]+)?$")
# Notes that every good training prints: on its device, its data and its plan.
EXPECTED = re.compile(
    "training on|detected explicit|no chat template|[0-9,]+ pairs to train on|memory: "
    "|memory settings: |the largest pass: |resuming after"
)


class UsedMemory(threading.Thread):
    """Measures the peak of used memory on the first GPU, which it reads from NVML every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before: int | None = None  # None without NVML
        self.most = 0
        self._ended = threading.Event()

    def __enter__(self) -> "UsedMemory":
        self.start()
        return self

    def run(self) -> None:
        """Read the used memory until the end."""
        import pynvml

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.before = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            while not self._ended.wait(0.02):
                self.most = max(self.most, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
        except pynvml.NVMLError:
            self.before = None

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(timeout=2)

    @property
    def added(self) -> int | str:
        """The peak in bytes, less the memory that was used at the start."""
        return NOT_MEASURED if self.before is None else max(0, self.most - self.before)


@dataclass
class Command:
    """A running command, and what it has printed."""

    process: subprocess.Popen[str]
    began: float
    lines: list[tuple[float, str]] = field(default_factory=list)
    """(seconds since the start, line)."""
    reader: threading.Thread | None = None

    @classmethod
    def start(cls, scale: Scale, *arguments: str, module: str = "orpo_lite") -> "Command":
        """Start the command, and a thread that reads what it prints."""
        process = subprocess.Popen(
            [*python(module, rehearse=scale.rehearse), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            cwd=ROOT,
            env=os.environ | {"COLUMNS": "1000", "NO_COLOR": "1"},
        )
        command = cls(process, time.monotonic())
        command.reader = threading.Thread(target=command._read, daemon=True)
        command.reader.start()
        return command

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.strip():
                self.lines.append((round(time.monotonic() - self.began, 2), line.rstrip()))
                print(line, end="", file=sys.stderr, flush=True)

    def wait(self) -> int:
        """Wait until it has ended and all lines are read; return its exit code."""
        code = self.process.wait()
        if self.reader:
            self.reader.join()
        return code

    @property
    def stages(self) -> dict[str, float]:
        """The stages that it printed, each with the seconds until the next line."""
        found: dict[str, float] = {}
        lines = [*self.lines]
        for (at, line), (after, _) in pairwise([*lines, *lines[-1:]]):
            if match := STAGE.match(line):
                found[match[1]] = round(found.get(match[1], 0) + after - at, 2)
        return found

    @property
    def notes(self) -> list[str]:
        """The unexpected lines between the line on its device and its first step.

        Stages and EXPECTED lines are left out; there should be no others.
        """
        said = [line for _, line in self.lines]
        starts = [place for place, line in enumerate(said) if line.startswith("training on ")]
        steps = [
            place
            for place, line in enumerate(said)
            if line.startswith(("step ", "held-out at step"))
        ]
        between = said[starts[0] if starts else 0 : steps[0] if steps else None]
        return [line for line in between if not STAGE.match(line) and not EXPECTED.match(line)]


def run(scale: Scale, figures: Figures, name: str, *arguments: str) -> int:
    """Run a command to its end; write its exit code, seconds, stages, memory and last lines."""
    known = 0
    with UsedMemory() as used:
        figures.note(f"{name}.command", " ".join(["orpo-lite", *arguments]))
        command = Command.start(scale, *arguments)
        while command.process.poll() is None:  # stages are written while it runs: it may be killed
            time.sleep(0.2)
            if len(command.stages) > known:
                known = len(figures.note(f"{name}.stages", command.stages))
        code = command.wait()
    figures.note(f"{name}.exit_code", code)
    figures.note(f"{name}.seconds", round(time.monotonic() - command.began, 2))
    figures.note(f"{name}.stages", command.stages)
    if arguments[0] == "train":
        figures.note(f"{name}.notes", command.notes)
    figures.note(f"{name}.bytes_used_by_nvml", used.added)
    figures.note(f"{name}.lines", command.lines[-40:])
    return code


def recipe(scale: Scale, base: str, out: Path, *more: str) -> list[str]:
    """Return the arguments of a training on random pairs of real lengths."""
    keys = {
        "model.model_name_or_path": scale.work / base,
        "data.dataset_name": scale.work / "pairs.jsonl",
        "data.chat_template": "none",
        "data.test_split_size": 16,
        "training.output_dir": out,
        "output.merge": "false",
        "output.samples": 1,
        "output.max_new_tokens": scale.of(32, 4),
        **({"data.max_length": 256, "training.global_batch_size": 8} if scale.rehearse else {}),
    }
    return [
        "train",
        "--recipe",
        "mistral-qlora",
        *(f"{key}={value}" for key, value in keys.items()),
        *more,
    ]


def rows(run_folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl."""
    file = run_folder / "metrics.jsonl"
    text = file.read_text("utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that are about a step, not an evaluation."""
    return [row for row in rows(run_folder) if "eval_loss" not in row]


# --- the parts


# Tags in pytest's XML -> states of a test.
STATES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def tests(scale: Scale, figures: Figures) -> None:
    """Run the tests that need a GPU, and write the result of each."""
    if find_spec("pytest") is None:
        figures.note("left_out", "pytest is not installed")
        return
    file = scale.work / "tests.xml"
    options = [
        "tests/test_gpu.py",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        f"--junitxml={file}",
    ]
    code = subprocess.run(
        [*python("pytest", rehearse=scale.rehearse), *options], cwd=ROOT, check=False
    ).returncode
    figures.note("exit_code", code)
    cases = [*xml.etree.ElementTree.parse(file).iter("testcase")]  # noqa: S314 - pytest's own
    found: dict[str, list[Any]] = {"passed": [], "failed": [], "skipped": []}
    for case in cases:
        name = f"{case.get('name')} ({float(case.get('time', 0)):.2f} s)"
        outcomes = [child for child in case if child.tag in STATES]
        state = STATES[outcomes[0].tag] if outcomes else "passed"
        message = outcomes[0].get("message", "")[:300] if outcomes else ""
        found[state].append(f"{name}: {message}" if message else name)
    for state, names in found.items():
        figures.note(state, len(names))
    figures.note("tests", found)


def train(scale: Scale, figures: Figures, budget: str) -> None:
    """Train six steps on the whole base; write seconds, notes, memory against the plan, samples."""
    out = scale.work / f"run-{budget}"
    more = [
        "training.max_steps=6",
        "training.eval_steps=3",
        "training.learning_rate=1e-3",
        *([f"memory.budget={budget}"] if budget != "auto" else []),
    ]
    code = run(scale, figures, "train", *recipe(scale, "mistral", out, *more))
    steps = steps_of(out)
    figures.note("steps", steps)
    figures.note("held_out", [row for row in rows(out) if "eval_loss" in row])
    plan_file = out / "plan.json"
    plan = json.loads(plan_file.read_text("utf-8")) if plan_file.is_file() else {}
    figures.note("plan", plan)
    figures.note("gib", memory(steps, plan))
    samples = out / "samples.jsonl"
    if samples.is_file():
        figures.note(
            "samples", [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
        )
    sys.exit(code)


def reserved_planned(plan: dict[str, Any]) -> int:
    """Return the bytes that the plan allows torch's allocator in a step.

    They are the tensors that are not paged, workspaces and fragmentation.
    """
    besides = sum(size for name, size in plan["allowances"].items() if name != "CUDA context")
    return int(plan["peak_bytes"] - plan["paged_bytes"] + besides)


def memory(steps: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """Return the GiB of tensors and of reserved memory, planned and measured, but not paged."""

    def largest(key: str) -> float | str:
        return max((row.get(key, 0.0) for row in steps), default=0.0) or NOT_MEASURED

    return {
        "tensors_planned": (plan.get("peak_bytes", 0) - plan.get("paged_bytes", 0)) / 2**30,
        "tensors_measured": largest("memory_gib"),
        "reserved_planned": reserved_planned(plan) / 2**30 if plan else NOT_MEASURED,
        "reserved_measured": largest("memory_reserved_gib"),
    }


def merge(scale: Scale, figures: Figures) -> None:
    """Merge the run of train_12gib, and compare the result with base and adapter."""
    out = scale.work / "run-12GiB"
    code = run(scale, figures, "merge", "merge", str(out), "--verify")
    written = sum(file.stat().st_size for file in (out / "merged").glob("*.safetensors"))
    figures.note("merged_gib", round(written / 2**30, 3))
    sys.exit(code)


def resume(scale: Scale, figures: Figures) -> None:
    """Compare the adapters' bits of two deterministic runs and one that is stopped and resumed.

    SIGTERM stops it. The runs go on at the same time, because none of them measures time.
    """
    count = scale.of(48, 10)
    keys = [
        f"training.max_steps={count}",
        "training.full_determinism=true",
        "memory.checkpoint_offload=true",
    ]
    keys += ["memory.budget=8GiB", "output.samples=0", "training.global_batch_size=8"]
    outs = {name: scale.work / f"run-{name}" for name in ("one", "other", "stopped")}
    commands = {
        name: Command.start(scale, *recipe(scale, "small", out, *keys))
        for name, out in outs.items()
    }
    stopped = commands["stopped"]
    while stopped.process.poll() is None and len(steps_of(outs["stopped"])) < count // 3:
        time.sleep(0.02)
    stopped.process.send_signal(signal.SIGTERM)
    code = figures.note("exit_code_after_sigterm", stopped.wait())
    figures.note("steps_before_sigterm", len(steps_of(outs["stopped"])))
    if code == 128 + signal.SIGTERM:
        run(scale, figures, "resumed", "train", "--resume", str(outs["stopped"]))
    codes = {name: commands[name].wait() for name in ("one", "other")}
    figures.note("exit_codes", codes)
    for name in ("one", "stopped"):
        figures.note(f"last_lines_{name}", commands[name].lines[-15:])
    hashes = {
        name: sha256(out / ADAPTER) for name, out in outs.items() if (out / ADAPTER).is_file()
    }
    figures.note("adapter_sha256", hashes)
    figures.note("two_runs_same_bits", "one" in hashes and hashes["one"] == hashes.get("other"))
    figures.note("resumed_same_bits", "one" in hashes and hashes["one"] == hashes.get("stopped"))
    losses = {name: [row["loss"] for row in steps_of(out)] for name, out in outs.items()}
    figures.note(
        "first_step_that_differs",
        {name: first_difference(losses["one"], losses[name]) for name in outs},
    )


def first_difference(one: list[float], other: list[float]) -> int | None:
    """Return the number of the first step whose losses differ; None if all are equal."""
    if one == other:
        return None
    for number, (loss, other_loss) in enumerate(zip(one, other, strict=False), 1):
        if loss != other_loss:
            return number
    return min(len(one), len(other))


def fp16(scale: Scale, figures: Figures) -> None:
    """Compare the losses of a training in float16, with a scaled loss, with those in bfloat16."""
    found: dict[str, list[float]] = {}
    for dtype in ("float16", "bfloat16"):
        out = scale.work / f"run-{dtype}"
        keys = [
            f"model.dtype={dtype}",
            "training.max_steps=6",
            "memory.budget=8GiB",
            "output.samples=0",
        ]
        run(scale, figures, dtype, *recipe(scale, "small", out, *keys))
        found[dtype] = [row["loss"] for row in steps_of(out)]
    figures.note("losses", found)
    pairs = [*zip(*found.values(), strict=False)]
    figures.note("largest_difference", max((abs(a - b) / abs(b) for a, b in pairs), default=None))
