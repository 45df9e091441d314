"""Check trainings of several processes against those of one, with gloo on a CPU.

    python -m benchmarks.processes --json FILE            2 and 4 processes, 20 kills
    python -m benchmarks.processes --quick --json FILE    2 processes, 2 kills

Nothing of this measures speed: the processes share the cores of one machine.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import lengths
from benchmarks.ours import SETS
from benchmarks.processes.gradients import gradient_figures
from benchmarks.processes.trainings import kill_figures, resume_figures, write_inputs
from benchmarks.step import about

Figures = dict[str, float | bool]
WORLDS, PAIRS = (2, 8, 64), (16, 8, 4)
# Key -> what is right; the goals of the idle tokens are for 16 pairs a process.
GOALS = {
    "ddp_gradient_error": "<= 1e-6",
    "fsdp2_gradient_error": "<= 1e-5",
    "float64_gradient_error": "<= 1e-12",
    "fsdp2_equals_ddp": "true",
    "fsdp2_packed_bytes_share": "<= 1/2 of the base and a row of each matrix",
    "fsdp2_packed_bytes_share_4": "<= 1/4 of the base and a row of each matrix",
    "plan_peak_error": "<= 0.02",
    "plan_peak_error_4": "<= 0.02",
    "idle_tokens_share_2": "<= 0.01",
    "idle_tokens_share_8": "<= 0.01",
    "idle_tokens_share_64": "<= 0.01",
    "resume_other_world_loss_error": "<= 1e-6",
    "resume_other_world_error": "<= 1e-4",
    "kills_ok": "= kills_total",
    "kill_seconds": "<= 30",
}


def idle_figures() -> Iterator[Figures]:
    """Yield the share of tokens for which a process waits, in the mean over steps.

    It is the worse of the shipped lengths.
    """
    sets = [lengths.shipped(name) for name in SETS.values()]
    for world, count in itertools.product(WORLDS, PAIRS):
        worst = max(lengths.idle_share(triples, count, world) for triples in sets)
        suffix = "" if count == PAIRS[0] else f"_{count}_pairs"
        yield {f"idle_tokens_share_{world}{suffix}": round(worst, 5)}


def measure(folder: Path, *, quick: bool, seed: int) -> Iterator[Figures]:
    """Yield the figures, as they are found."""
    worlds = (2,) if quick else (2, 4)
    yield from idle_figures()
    write_inputs(folder)
    yield gradient_figures(folder, worlds)
    yield from resume_figures(folder, worlds[-1])
    yield from kill_figures(folder, kills=2 if quick else 20, seed=seed)


def main() -> None:
    """Run the checks, print their figures and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 processes and 2 kills")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    began, result = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        for figures in measure(Path(name), quick=options.quick, seed=options.seed):
            result |= figures
            for key, value in figures.items():
                goal = f"   (goal {GOALS[key]})" if key in GOALS else ""
                print(f"{key}: {value}{goal}", flush=True)
    result |= {"seconds": round(time.monotonic() - began)} | about()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
