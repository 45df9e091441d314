"""The benchmark for a GPU: its parts end one by one, and all of it runs on the simulated device."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from benchmarks.gpu import __main__ as main
from benchmarks.gpu.__main__ import IN_BACKGROUND, PARTS, Part, Parts, find_obstacle
from benchmarks.gpu.figures import Report

PARTS_OF_A_TEST = """
import os, signal, subprocess, sys, time

def well(scale, figures, word):
    figures.note("group.word", word)

def crash(scale, figures):
    figures.note("known", 1)
    os.kill(os.getpid(), signal.SIGSEGV)

def fail(scale, figures):
    figures.attempt("tried", lambda: 1 / 0)
    figures.note("after", 2)
    raise ValueError("the part's own fault")

def hang(scale, figures):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    figures.note("child", child.pid)
    time.sleep(60)
"""


def test_no_part_stops_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts_of_a_test.py").write_text(PARTS_OF_A_TEST, encoding="utf-8")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    file = tmp_path / "figures.json"
    report = Report(file, rehearse=False, minutes=1)
    parts = Parts(report, tmp_path, rehearse=False, end=time.monotonic() + 60)
    function = "parts_of_a_test."
    parts.start(Part("beside", f"{function}well", 30, arguments=("beside",)))
    parts.run(
        [
            Part("waits", f"{function}well", 30, needs=("beside",), arguments=("then",)),
            Part("crashes", f"{function}crash", 30),
            Part("fails", f"{function}fail", 30),
            Part("hangs", f"{function}hang", 2.5),
            Part("lacks", f"{function}well", 30, needs=("crashes",), arguments=("never",)),
            Part("last", f"{function}well", 30, arguments=("last",)),
        ]
    )
    found = json.loads(file.read_text("utf-8"))["parts"]
    assert {name: part["state"] for name, part in found.items()} == {
        "beside": "done",
        "waits": "done",
        "crashes": "ended by SIGSEGV",
        "fails": "ended with exit code 1",
        "hangs": "out of time",
        "lacks": "not begun: it needs crashes",
        "last": "done",
    }
    assert found["waits"]["figures"] == {"group": {"word": "then"}}
    assert found["crashes"]["figures"] == {"known": 1}
    assert found["fails"]["figures"] == {
        "tried": {"error": "ZeroDivisionError: division by zero"},
        "after": 2,
    }
    assert "the part's own fault" in found["fails"]["log"]
    assert found["hangs"]["seconds"] < 10
    assert is_over(found["hangs"]["figures"]["child"])


def is_over(process: int) -> bool:
    """Whether a process has ended, perhaps unnoticed by its parent."""
    status = Path(f"/proc/{process}/stat")
    return not status.is_file() or status.read_text("utf-8").rpartition(")")[2].split()[0] == "Z"


def test_the_parts_end_with_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts_of_a_test.py").write_text(PARTS_OF_A_TEST, encoding="utf-8")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setattr(main, "LEAST", 0.0)
    report = Report(None, rehearse=False, minutes=1)
    parts = Parts(report, tmp_path, rehearse=False, end=time.monotonic() + 1.5)
    parts.run([Part("hangs", "parts_of_a_test.hang", 30), Part("last", "parts_of_a_test.well", 30)])
    assert report.state("hangs") == "out of time"
    assert report.state("last") == "not begun: the time is over"


FIGURES: dict[str, set[str]] = {
    "card": {"versions", "torch_sees", "said", "attention", "nf4", "paged_step", "bf16_tflops"},
    "tests": {"exit_code", "passed", "failed", "skipped", "tests"},
    "gradients": {"plain", "offload", "tiles", "embedding", "head_chunk", "no_checkpoints", "all"},
    "train_12gib": {"train", "steps", "plan", "samples", "gib"},
    "train_auto": {"train", "steps", "plan", "samples", "gib"},
    "merge": {"merge", "merged_gib"},
    "plan_kept": {"budget_1", "budget_2", "budget_3"},
    "resume": {"two_runs_same_bits", "resumed_same_bits", "first_step_that_differs"},
    "fp16": {"losses", "largest_difference"},
    "out_of_memory": {"retried", "losses", "losses_differ_by"},
    **{
        part.name: {"ours", "ours_planned", "trl", "ratio"}
        for part in PARTS
        if part.name.startswith("speed")
    },
    **{part.name: set() for part in IN_BACKGROUND},
}


@pytest.mark.parametrize("only", ["card", ""])
@pytest.mark.long
def test_it_runs_on_the_simulated_device(only: str, tmp_path: Path) -> None:
    if said := find_obstacle(rehearse=True):
        pytest.skip(said)
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--json", str(file)]
    subprocess.run(
        [*command, *(["--only", only] if only else [])],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    parts = json.loads(file.read_text("utf-8"))["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(
        only.split() or FIGURES, "done"
    )
    for name, part in parts.items():
        assert part["figures"].keys() >= FIGURES[name], name
        part["figures"].pop("nvml_sees", None)  # there is no driver
        assert '"error":' not in json.dumps(part["figures"]), name
    if not only:
        check_figures({name: part["figures"] for name, part in parts.items()})


def check_figures(found: dict[str, Any]) -> None:
    """What is equal on a GPU too."""
    assert found["tests"]["failed"] == 0
    assert found["tests"]["passed"] > 10
    for name, figures in found["gradients"].items():
        if isinstance(figures, dict):
            assert figures["deterministic"]["same_bits"], name
            assert figures["repeated"]["gradient_from_plain"] < 0.05, name
    for name in ("train_12gib", "train_auto"):
        assert found[name]["train"]["notes"] == []
    assert found["resume"]["two_runs_same_bits"]
    assert found["resume"]["resumed_same_bits"]
    assert found["out_of_memory"]["retried"][0].startswith("out of memory at step")
