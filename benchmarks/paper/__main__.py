"""Try the claims of the ORPO paper on small models and real pairs.

    python -m benchmarks.paper --json FILE --write docs/paper.md     all experiments
    python -m benchmarks.paper E1 E2 --json FILE                     some; FILE keeps the others

The trainings are run folders in --folder, which the experiments share. A finished training is not
repeated, and a stopped one is continued. Several are made at the same time, each on one core.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import processor
from benchmarks.paper.claims import EXPERIMENTS
from benchmarks.paper.page import verdict_text, write_page
from benchmarks.paper.study import DATA, MAIN, MODELS, Study
from benchmarks.paper.trainings import jobs_of, train_all
from orpo_lite.errors import OrpoLiteError
from orpo_lite.runs.atomic import to_json, write_text


def measure(names: Sequence[str], study: Study, before: dict[str, Any]) -> dict[str, Any]:
    """Return the result of the named experiments, with the other experiments of ``before``.

    The results of ``before`` are dropped if they are from other settings.
    """
    made = study.recipe(MAIN, "orpo-1", study.seeds[0])
    settings = {
        "epochs": study.epochs,
        "seeds": [*study.seeds],
        "rows": study.rows,
        "judge": study.judge.name if study.judge else MAIN.name,
        "batch": made.training.global_batch_size,
        "learning_rate": made.training.learning_rate,
        "rank": made.lora.r,
    }
    found = before.get("experiments", {}) if before.get("settings") == settings else {}
    for name in names:
        began = time.monotonic()
        outcome = EXPERIMENTS[name].measure(study).to_json()
        found[name] = outcome | {"seconds": round(time.monotonic() - began, 1)}
        print(f"{name} {EXPERIMENTS[name].title}: {verdict_text(found[name])}", flush=True)
        for check in found[name]["checks"]:
            claimed = check["verdict"] if check["is_claim"] else "reported"
            print(f"   {claimed:14} {check['value']:+.4f} {check['pairs']}: {check['statement']}")
    return {
        "experiments": {name: found[name] for name in EXPERIMENTS if name in found},
        "trainings": study.trainings(),
        "settings": settings,
        "machine": f"{os.cpu_count()} cores ({processor()}), Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("orpo-lite", "torch", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="E", help=f"experiments: {' '.join(EXPERIMENTS)}; default: all"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="where to write the page")
    parser.add_argument("--folder", type=Path, default=Study.folder, help="the folder of the runs")
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder of the models")
    parser.add_argument("--judge", type=Path, help="the base of E5's judge, a larger model")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="trainings at the same time"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of pairs and prompts")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in EXPERIMENTS]:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(1)
    before = {}
    if options.json and options.json.is_file():
        before = json.loads(options.json.read_text("utf-8"))
    names = options.names or [*EXPERIMENTS]
    began, is_new = time.monotonic(), not options.folder.exists()
    try:
        study = Study(options.models, options.data, options.judge, options.folder)
        code, message = train_all(jobs_of(names, study), study, options.processes)
        if code:
            print(message, "The same command continues.", sep="\n", file=sys.stderr)
            return code
        result = measure(names, study, before)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except OrpoLiteError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    seconds = round(time.monotonic() - began)
    print(f"{', '.join(names)}: {seconds / 60:.0f} minutes, {options.processes} processes")
    if is_new and names == [*EXPERIMENTS]:
        result["whole"] = {"seconds": seconds, "processes": options.processes}
    elif "whole" in before:
        result["whole"] = before["whole"]
    if options.json:
        write_text(options.json, to_json(result))
    if options.write:
        write_page(result, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
