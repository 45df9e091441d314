"""A prepared set in figures: what a person should look at before training on it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_lite.data.cache import NUMBERS, TokenizedPairs

# Figures that should be 0, and what they count.
COUNTED = {
    "repeated_prompts": "pairs in which a reply begins with the prompt again",
    "absent_texts": "pairs in which a reply or the system text is NULL, None, NaN or N/A, as if it was missing",
    "empty_turns": "pairs with an empty turn before the last",
    "beside_pairs": "pairs of which reasoning, tools, images or the like stand beside the texts, and are not read",
    "templated_pairs": "pairs that hold markers of a chat template, as if one was applied already",
    "moved_systems": "pairs of which the system text stands in front of the first user text, as it must in use: the "
    "chat template takes no system turn",
    "empty_thoughts": "pairs to whose replies the chat template adds an empty <think> block, which is trained on",
    "missing_thoughts": "pairs without the <think> block that the chat template opens in use",
    "unknown_tokens": "tokens that stand for what the tokenizer does not know, and which is lost",
}
OF_PAIRS = (
    "moved_systems",
    "empty_thoughts",
    "missing_thoughts",
)  # counted among the pairs that are kept
QUANTILES = (5, 25, 50, 75, 95, 99)
PADDED_BATCH = 8  # pairs; what peers' trainers put in a batch unless told otherwise
SHUFFLES = 20


def figures(train: TokenizedPairs, test: TokenizedPairs) -> dict[str, Any]:
    """Return what data.json holds. Shares are of 1; lengths are tokens.

    format, columns: of each set, how it is read, and which columns are and are not · rows_of_sets: rows read of each
    set that is trained on · hints: what to do about figures of COUNTED and reasons of dropped · dropped: for each
    reason the number of pairs and the first places · tokens: quantiles; those of responses before the cut and with
    their end · cut: what data.max_length does · chosen_longer, rejected_longer: the length bias · prompts: different
    ones, and those on both sides · step: tokens that go through a model · sha256: of the pairs' content and order.
    """
    sides = _sides(train, test)
    both = {
        name: np.concatenate([train.column(name), test.column(name)])
        for name in (*NUMBERS, "prefix")
    }
    prompts = [set(side.prompts()) for side in (train, test)]
    cut = np.stack([both["chosen_cut"], both["rejected_cut"]])
    chosen, rejected = (_response(both, side) for side in ("chosen", "rejected"))
    return {
        "format": _unique_values(sentence for side in sides for sentence in side["format"]),
        "columns": _unique_values(columns for side in sides for columns in side["columns"]),
        "chat_template": train.facts["chat_template"],
        "tokenizer": train.facts["tokenizer"],
        "hints": {name: hint for side in sides for name, hint in side["hints"].items()},
        "rows_read": sum(side["rows_read"] for side in sides),
        "rows_of_sets": train.facts.get(
            "rows_of_sets", []
        ),  # which a cache of before does not know
        "train_pairs": len(train),
        "held_out_pairs": len(test),
        "dropped": _dropped(sides),
        "tokens": {
            "prompt": _quantiles(both["chosen_start"]),
            "chosen": _quantiles(chosen),
            "rejected": _quantiles(rejected),
        },
        "cut": {
            "pairs": int((cut > 0).any(0).sum()),
            "pairs_share": float((cut > 0).any(0).mean()),
            "responses_without_end": int((cut > 0).sum()),
            "responses_without_end_share": float((cut > 0).mean()),
        },
        **{name: sum(side["counted"].get(name, 0) for side in sides) for name in COUNTED},
        "chosen_longer": float((chosen > rejected).mean()),
        "rejected_longer": float((chosen < rejected).mean()),
        "prompts": {
            "train": len(prompts[0]),
            "held_out": len(prompts[1]),
            "shared": len(prompts[0] & prompts[1]),
        },
        "step": _step(both),
        "sha256": hashlib.sha256("".join(side["sha256"] for side in sides).encode()).hexdigest(),
    }


def counted(found: Mapping[str, Any]) -> list[str]:
    """A line for each figure of COUNTED that is not 0: what it counts, how many, and what to do."""
    lines = []
    for name, said in COUNTED.items():
        if count := found[name]:
            share = (
                f" ({count / (found['train_pairs'] + found['held_out_pairs']):.0%})"
                if name in OF_PAIRS
                else ""
            )
            hint = f"; {found['hints'][name]}" if name in found["hints"] else ""
            lines.append(f"{said}: {count:,}{share}{hint}")
    return lines


def _sides(train: TokenizedPairs, test: TokenizedPairs) -> list[Mapping[str, Any]]:
    """What was found in each set of rows; one when the held-out pairs were taken from the training rows."""
    return [train.facts] if test.facts is train.facts else [train.facts, test.facts]


def _unique_values(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order: training and held-out sets mostly have one format."""
    return list({json.dumps(value): value for value in values}.values())


def _response(both: Mapping[str, NDArray[Any]], side: str) -> NDArray[Any]:
    length: NDArray[Any] = both[f"{side}_tokens"] + both[f"{side}_cut"] - both[f"{side}_start"]
    return length


def _dropped(sides: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    counts: Counter[str] = Counter()
    for side in sides:
        counts.update(side["dropped"])
    return {
        reason: {
            "pairs": count,
            "first": [place for side in sides for place in side["places"].get(reason, [])],
        }
        for reason, count in counts.most_common()
    }


def _quantiles(lengths: NDArray[Any]) -> dict[str, float]:
    values = np.percentile(lengths, QUANTILES, method="nearest")
    return {
        "mean": round(float(lengths.mean()), 1),
        "min": int(lengths.min()),
        **{f"p{share}": int(value) for share, value in zip(QUANTILES, values, strict=True)},
        "max": int(lengths.max()),
    }


def _step(both: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Tokens a pair: in rows padded to the longest of a batch, without padding, and with the common prefix once."""
    longest = np.maximum(both["chosen_tokens"], both["rejected_tokens"])
    padded = []
    for seed in range(SHUFFLES):
        shuffled = np.random.default_rng(seed).permutation(longest)
        starts = np.arange(0, len(longest), PADDED_BATCH)
        sizes = np.diff([*starts, len(longest)])
        padded.append(float((2 * np.maximum.reduceat(shuffled, starts) * sizes).sum()))
    whole = both["chosen_tokens"] + both["rejected_tokens"]
    tokens = {
        f"padded_in_batches_of_{PADDED_BATCH}": np.mean(padded) / len(whole),
        "without_padding": whole.mean(),
        "prompt_shared": (whole - both["prefix"]).mean(),
    }
    return {f"tokens_per_pair_{name}": round(float(value), 1) for name, value in tokens.items()}
