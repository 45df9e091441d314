"""`orpo-lite launch`: what it refuses, how it says that processes failed, and runs whose processes are killed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer

from benchmarks.processes.trainings import kill_figures, launch, start, write_inputs

Call = Callable[..., Answer]


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        ("--processes 2", "there is no command", "orpo-lite launch --processes 2 -- train --recipe demo"),
        ("--processes 2 -- merge run", "the command is merge", "-- train --recipe demo"),
        ("--machines 2 -- train --recipe demo", "--machines 2 without --main-address", "--main-address HOST"),
        ("--machines 2 --machine-rank 2 --main-address a -- train", "--machine-rank 2", "--machine-rank 0"),
        ("--processes 2 -- train --recipe no-such", "no shipped recipe has this name", "recipes ls"),
        ("--processes 2 -- train --recipe demo lora.rr=3", "unknown key lora.rr", "lora.r"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_a_process_starts(
    words: str, found: str, fix: str, call: Call
) -> None:
    code, printed, complaint = call("launch", *words.split())
    assert (code, printed) == (2, "")
    assert found in complaint
    assert fix in complaint.splitlines()[-1]


@pytest.mark.long
def test_processes_that_all_fail_give_one_error_with_a_fix(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    assert launch(tmp_path, 2, *start(3)).wait() == 2
    said = (tmp_path / "output.txt").read_text("utf-8")
    assert said.count("fix: ") == said.count("expected: ") == 1
    assert "memory.shard=3 with 2 processes" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_killed_process_ends_all_and_the_printed_fix_continues(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    *_, found = kill_figures(tmp_path, kills=2, seed=0)
    assert found["kills_ok"] == found["kills_total"] == 2, found
    assert found["kill_seconds"] <= 30
