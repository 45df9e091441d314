"""How long 60,000 pairs of UltraFeedback's length take to a `orpo-lite data` screen, and in how much memory.

    python -m benchmarks.data ../shared/data/alpaca-prefs/train.jsonl ../shared/models/stories260k --json FILE

The pairs are made from real ones (UltraFeedback binarized's columns): repeated, their sentences and rows shuffled, so
that no two texts are equal. Two cold processes run the command; the second one finds the tokens in the cache.
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
    """Write ``count`` rows like those of ``source``, each with its sentences in another order."""
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    rng = random.Random(seed)
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            prompt = f"{_shuffled(row['prompt'], rng)} ({number})"
            turns = {"prompt": prompt, "prompt_id": str(number)}
            for side in ("chosen", "rejected"):
                reply = _shuffled(row[side][-1]["content"], rng)
                turns[side] = [
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
    """Seconds and the largest sum of resident memory of a command and its children, and what it printed."""
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.DEVNULL
        )
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(
                    peak,
                    sum(
                        member.memory_info().rss
                        for member in (tree, *tree.children(recursive=True))
                    ),
                )
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
    """Its name where the system tells it, else its kind."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, help="a jsonl of UltraFeedback binarized's columns")
    parser.add_argument("tokenizer", type=Path, help="a model folder")
    parser.add_argument("--count", type=int, default=PAIRS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs, recipe = Path(folder, "pairs.jsonl"), Path(folder, "recipe.yaml")
        make_pairs(options.pairs, pairs, options.count)
        recipe.write_text(
            f"model:\n  model_name_or_path: {options.tokenizer.resolve()}\ndata:\n  dataset_name: {pairs}\n"
        )
        command = [sys.executable, "-m", "orpo_lite", "data", "--recipe", str(recipe), "--json"]
        environment = os.environ | {"ORPO_LITE_CACHE": str(Path(folder, "cache"))}
        first, second = measure(command, environment), measure(command, environment)
        size = pairs.stat().st_size
    if first["figures"] != second["figures"]:
        raise SystemExit("the second start has other figures than the first")
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
