"""Measure the time and memory of `orpo-lite data` on 60,000 pairs of UltraFeedback's length.

    python -m benchmarks.data PAIRS.jsonl MODEL_FOLDER --json FILE

The pairs are made from real ones with the columns of UltraFeedback binarized. They are repeated,
with their sentences shuffled, so that no two texts are equal. Two new processes run the command;
the second one finds the tokens in the cache.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PAIRS = 60_000


def make_pairs(source: Path, target: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` rows made from those of ``source``, with their sentences shuffled."""
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    rng = random.Random(seed)
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            prompt = f"{_shuffled(row['prompt'], rng)} ({number})"
            turns = {"prompt": prompt, "prompt_id": str(number)}
            for column in ("chosen", "rejected"):
                reply = _shuffled(row[column][-1]["content"], rng)
                turns[column] = [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": reply},
                ]
            turns |= {"messages": turns["chosen"], "score_chosen": 8.0, "score_rejected": 4.0}
            file.write(json.dumps(turns, ensure_ascii=False) + "\n")


def _shuffled(text: str, rng: random.Random) -> str:
    sentences = text.split(". ")
    rng.shuffle(sentences)
    return ". ".join(sentences)


def measure(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; return its seconds, its memory and the JSON that it printed.

    The memory is the largest sum of the resident memory of the command and its child processes.
    """
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.DEVNULL
        )
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                members = (tree, *tree.children(recursive=True))
                peak = max(peak, sum(member.memory_info().rss for member in members))
            except psutil.Error:  # one of them has just ended
                continue
            time.sleep(0.02)
        seconds = time.monotonic() - began
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "seconds": round(seconds, 2),
        "peak_rss_gib": round(peak / 2**30, 3),
        "figures": json.loads(text),
    }


def processor() -> str:
    """Return the name of the processor, or its architecture if the system does not give a name."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else []:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def main() -> None:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pairs", type=Path, help="a jsonl file with the columns of UltraFeedback binarized"
    )
    parser.add_argument("tokenizer", type=Path, help="a model folder")
    parser.add_argument("--count", type=int, default=PAIRS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs, recipe = Path(folder, "pairs.jsonl"), Path(folder, "recipe.yaml")
        make_pairs(options.pairs, pairs, options.count)
        recipe.write_text(
            f"model:\n  model_name_or_path: {options.tokenizer.resolve()}\n"
            f"data:\n  dataset_name: {pairs}\n"
        )
        command = [sys.executable, "-m", "orpo_lite", "data", "--recipe", str(recipe), "--json"]
        environment = os.environ | {"ORPO_LITE_CACHE": str(Path(folder, "cache"))}
        first, second = measure(command, environment), measure(command, environment)
        size = pairs.stat().st_size
    if first["figures"] != second["figures"]:
        raise SystemExit("the second run has other figures than the first")
    tokens = (
        first["figures"]["step"]["tokens_per_pair_without_padding"]
        * first["figures"]["train_pairs"]
    )
    result = {
        "pairs": options.count,
        "file_mib": round(size / 2**20),
        "tokens": round(tokens),
        "seconds_first_start": first["seconds"],
        "seconds_second_start": second["seconds"],
        "peak_rss_gib": max(first["peak_rss_gib"], second["peak_rss_gib"]),
        "dropped": {reason: drop["pairs"] for reason, drop in first["figures"]["dropped"].items()},
        "machine": f"{os.cpu_count()} cores, {processor()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("orpo-lite", "tokenizers", "transformers")},
    }
    text = json.dumps(result, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
