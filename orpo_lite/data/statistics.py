"""Compute the figures of the prepared data that a person should check before training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_lite.data.cache import NUMBERS, TokenizedPairs

# Counts that should be 0: key -> what is counted.
WARNINGS = {
    "repeated_prompts": "pairs in which a reply begins with the prompt again",
    "absent_texts": "pairs in which a reply or the system text is NULL, None, NaN or N/A, so it is "
    "probably missing",
    "empty_turns": "pairs with an empty turn before the last turn",
    "beside_pairs": "pairs with reasoning, tools, images or other content that is not read",
    "templated_pairs": "pairs with markers of a chat template, which was perhaps already applied",
    "moved_systems": "pairs whose system text is put in front of the first user text, because the "
    "chat template takes no system turn (do the same when you use the model)",
    "empty_thoughts": "pairs in which the chat template adds an empty <think> block to the "
    "replies, and the model is trained on it",
    "missing_thoughts": "pairs whose replies have no <think> block, although the chat template "
    "opens such a block when the model is used",
    "unknown_tokens": "tokens for text that the tokenizer does not know, so the text is lost",
}
# Counts of pairs that are not left out. Their share of all such pairs is shown too.
OF_KEPT_PAIRS = ("moved_systems", "empty_thoughts", "missing_thoughts")
QUANTILES = (5, 25, 50, 75, 95, 99)
PADDED_BATCH = 8  # pairs; the default batch of other trainers
SHUFFLES = 20


def figures(train: TokenizedPairs, test: TokenizedPairs) -> dict[str, Any]:
    """Return the content of data.json. Shares are from 0 to 1, and lengths are in tokens.

    These keys need an explanation:

    - format: for each dataset, a sentence with the format, and the reason for this format
    - columns: for each dataset, the same sentence, the columns that are read, and the columns that
      are not read
    - rows_of_sets: for each training dataset, the number of rows read
    - dropped: reason -> the number of pairs left out, and the places of the first of these pairs
    - hints: fixes for problems in the data. The keys are keys of WARNINGS and reasons in
      ``dropped``
    - tokens: quantiles of the lengths of prompts and responses. Responses are counted with their
      end token, and before data.max_length cuts them
    - cut: the number and the share of pairs, and of responses, that data.max_length cuts
    - chosen_longer: the share of pairs whose chosen response is longer than the rejected response
    - rejected_longer: the share of pairs whose rejected response is longer than the chosen response
    - prompts: the number of different prompts in the training split, in the held-out split, and
      in both splits (key ``shared``)
    - step: the mean number of tokens per pair that go through the model: with padding, without
      padding, and with a shared prompt
    - sha256: a hash of the content and the order of the pairs

    All keys of WARNINGS are in the result too, each with its count.
    """
    splits = _split_facts(train, test)
    both = {
        name: np.concatenate([train.column(name), test.column(name)])
        for name in (*NUMBERS, "prefix")
    }
    prompts = [set(pairs.prompts()) for pairs in (train, test)]
    cut = np.stack([both["chosen_cut"], both["rejected_cut"]])
    chosen, rejected = (response_lengths(both, reply) for reply in ("chosen", "rejected"))
    return {
        "format": _unique_values(sentence for facts in splits for sentence in facts["format"]),
        "columns": _unique_values(columns for facts in splits for columns in facts["columns"]),
        "chat_template": train.facts["chat_template"],
        "tokenizer": train.facts["tokenizer"],
        "hints": {name: hint for facts in splits for name, hint in facts["hints"].items()},
        "rows_read": sum(facts["rows_read"] for facts in splits),
        "rows_of_sets": train.facts["rows_of_sets"],
        "train_pairs": len(train),
        "held_out_pairs": len(test),
        "dropped": _dropped(splits),
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
        **{name: sum(facts["counted"].get(name, 0) for facts in splits) for name in WARNINGS},
        "chosen_longer": float((chosen > rejected).mean()),
        "rejected_longer": float((chosen < rejected).mean()),
        "prompts": {
            "train": len(prompts[0]),
            "held_out": len(prompts[1]),
            "shared": len(prompts[0] & prompts[1]),
        },
        "step": _step(both),
        "sha256": hashlib.sha256("".join(facts["sha256"] for facts in splits).encode()).hexdigest(),
    }


def warning_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each key of WARNINGS whose count in ``found`` is not 0.

    A line shows the text of WARNINGS for the key, and the count. If ``found`` has a fix for the
    key, the line shows the fix too.
    """
    pairs = found["train_pairs"] + found["held_out_pairs"]
    lines = []
    for name, counted in WARNINGS.items():
        count = found[name]
        if count:
            share = f" ({count / pairs:.0%})" if name in OF_KEPT_PAIRS else ""
            hint = f"; {found['hints'][name]}" if name in found["hints"] else ""
            lines.append(f"{counted}: {count:,}{share}{hint}")
    return lines


def _split_facts(train: TokenizedPairs, test: TokenizedPairs) -> list[Mapping[str, Any]]:
    """Return the facts of both splits. If both come from the same rows, return them only once."""
    return [train.facts] if test.facts is train.facts else [train.facts, test.facts]


def _unique_values(values: Iterable[Any]) -> list[Any]:
    """Return the values without duplicates, in their order. Values are compared as JSON."""
    return list({json.dumps(value): value for value in values}.values())


def response_lengths(columns: Mapping[str, NDArray[Any]], reply: str) -> NDArray[Any]:
    """Return the number of tokens of each pair's response, before data.max_length cuts tokens off.

    Args:
        columns: field of the PAIR record -> values of this field for all pairs.
        reply: ``chosen`` or ``rejected``.
    """
    tokens, cut, start = (columns[f"{reply}_{name}"] for name in ("tokens", "cut", "start"))
    lengths: NDArray[Any] = tokens + cut - start
    return lengths


def _dropped(splits: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    counts: Counter[str] = Counter()
    for facts in splits:
        counts.update(facts["dropped"])
    dropped = {}
    for reason, count in counts.most_common():
        first = [place for facts in splits for place in facts["places"].get(reason, [])]
        dropped[reason] = {"pairs": count, "first": first}
    return dropped


def _quantiles(lengths: NDArray[Any]) -> dict[str, float]:
    values = np.percentile(lengths, QUANTILES, method="nearest")
    return {
        "mean": round(float(lengths.mean()), 1),
        "min": int(lengths.min()),
        **{f"p{share}": int(value) for share, value in zip(QUANTILES, values, strict=True)},
        "max": int(lengths.max()),
    }


def _step(both: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return mean tokens per pair: in padded batches, without padding, and with a shared prefix."""
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
