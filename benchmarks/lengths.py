"""Lengths of real pairs in tokens: (common prefix, chosen, rejected), with prompt and end token.

``lengths/*.json`` are part of the project and hold no text. They are made by

    python -m benchmarks.lengths DATA[,DATA] TOKENIZER_FOLDER --name NAME --source TEXT --json FILE
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from orpo_lite.data.packing import deal
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.data.prepare import find_sources, pair_lengths, tokenized_splits
from orpo_lite.planning.on_meta import Triples
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.updates import run_to_end

FOLDER = Path(__file__).parent / "lengths"
SHUFFLES = 20


def shipped(name: str) -> Triples:
    """Return the lengths in ``lengths/NAME.json`` (hh-rlhf or alpaca-prefs), shape (pairs, 3)."""
    return np.array(json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["triples"])


def of_texts(data: str, tokenizer: Path, *, max_length: int = 2048) -> Triples:
    """Return the lengths of any dataset with the default recipe's limits and chat template."""
    keys = [f"data.dataset_name={data}", "data.test_split_size=0", f"data.max_length={max_length}"]
    recipe = load_recipe("mistral-qlora", keys)
    pairs, _, _ = run_to_end(
        tokenized_splits(recipe, tokenizer, *find_sources(recipe.data)), lambda _: None
    )
    return pair_lengths(pairs)


def packed(triples: Triples) -> int:
    """Return the tokens that orpo-lite's step computes: no padding, each common prefix once."""
    return int((triples[:, 1] + triples[:, 2] - triples[:, 0]).sum())


def batches(triples: Triples, size: int, seed: int, *, grouped: bool = False) -> list[Triples]:
    """Return a shuffled epoch in batches, as a DataLoader makes it.

    ``grouped``: pairs of similar length share a batch, by transformers' own length sampler.
    """
    generator = torch.Generator().manual_seed(seed)
    if grouped:
        order = get_length_grouped_indices(
            triples[:, 1:].max(1).tolist(), size, generator=generator
        )
    else:
        order = torch.randperm(len(triples), generator=generator).tolist()
    return [triples[order[start : start + size]] for start in range(0, len(order), size)]


def padded(batch: Triples) -> int:
    """Return the tokens of a padded batch, whose rows are all as long as the longest one."""
    return int(2 * len(batch) * batch[:, 1:].max())


def tokens_ratio(triples: Triples, size: int, *, grouped: bool = False) -> float:
    """Return the padded over the packed tokens of all pairs, as the mean of 20 shuffles."""
    epochs = [batches(triples, size, seed, grouped=grouped) for seed in range(SHUFFLES)]
    return float(np.mean([sum(map(padded, epoch)) for epoch in epochs]) / packed(triples))


def near_mean(triples: Triples, size: int, count: int, *, grouped: bool = False) -> list[Triples]:
    """Return the ``count`` batches of a shuffled epoch that are most like the mean batch.

    Compared are the ratio of padded to packed tokens, and the number of padded tokens.
    """
    epoch = [batch for batch in batches(triples, size, 0, grouped=grouped) if len(batch) == size]
    mean = sum(map(padded, epoch)) / sum(map(packed, epoch))
    tokens = float(np.mean([padded(batch) for batch in epoch]))

    def distance(batch: Triples) -> float:
        ratio = padded(batch) / packed(batch)
        return abs(ratio / mean - 1) + abs(padded(batch) / tokens - 1)

    return sorted(epoch, key=distance)[:count]


def idle_share(triples: Triples, pairs: int, processes: int, steps: int = 10) -> float:
    """Return the share of tokens for which a process waits for the slowest one, a mean over steps.

    ``pairs``: the pairs of a step for each process. They are drawn from ``triples``.
    """
    sizes = [chosen + rejected - prefix for prefix, chosen, rejected in triples]
    rng, idle = random.Random(0), []
    for _ in range(steps):
        step = rng.choices(sizes, k=pairs * processes)
        sums = [sum(step[i] for i in share) for share in deal(step, range(len(step)), processes)]
        idle.append(1 - sum(step) / processes / max(sums))
    return float(sum(idle) / steps)


def random_pairs(
    triples: Triples | Sequence[Sequence[int]], vocab_size: int, seed: int = 0
) -> list[TokenizedPair]:
    """Return pairs of random tokens with these lengths; the reply begins after the prefix."""
    rng = np.random.default_rng(seed)
    pairs = []
    for prefix, chosen, rejected in triples:
        shared = rng.integers(3, vocab_size, prefix)
        one = rng.integers(3, vocab_size, chosen - prefix)
        other = rng.integers(3, vocab_size, rejected - prefix)
        if len(one) and len(other) and one[0] == other[0]:
            other[0] = one[0] - 1 if one[0] > 3 else one[0] + 1
        start = int(max(1, min(prefix, chosen - 1, rejected - 1)))
        ids = (np.r_[shared, one].astype(np.int32), np.r_[shared, other].astype(np.int32))
        pairs.append(TokenizedPair(*ids, start, start, "benchmark"))  # type: ignore[arg-type]
    return pairs


def main() -> None:
    """Write the lengths of a dataset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--name", required=True, help="name of the tokenizer")
    parser.add_argument("--source", required=True, help="source of the data")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    triples = of_texts(options.data, options.tokenizer)
    about: dict[str, Any] = {
        "source": options.source,
        "tokenizer": options.name,
        "template": "the recipe's default: the paper's chat template",
        "columns": [
            "tokens that both sequences begin with",
            "tokens of the chosen one",
            "of the rejected one",
        ],
    }
    rows = ",\n".join(json.dumps(row) for row in triples.tolist())
    options.json.write_text(
        json.dumps(about, indent=1)[:-2] + f',\n "triples": [\n{rows}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
