"""Measure answers in batches against one prompt at a time, with the same greedy answers.

    python -m benchmarks.generate MODEL_FOLDER PROMPTS.jsonl --json FILE

The prompts are texts under ``prompt``, cut to a quarter of the model's positions. Both ways run in
float32 on the CPU, in turns. One prompt at a time is ``generate`` of transformers. Two answers may
differ first only where the two highest logits are closer than NEAR.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lite.base.generation import read_generation_config
from orpo_lite.model.generate import Answerer, Decoding
from orpo_lite.model.pair_model import PairModel

PROMPTS, TOKENS, TURNS = 64, 64, 3
NEAR = 1e-4


def alone(causal: Any, prompt: list[int], ends: list[int]) -> list[int]:
    """Return the greedy answer of transformers, without its end."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": ends}
    found = causal.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer[: next((at for at, token in enumerate(answer) if token in ends), len(answer))]


@torch.no_grad()
def gap(causal: Any, prompt: list[int], one: list[int], other: list[int]) -> float:
    """Return the difference of the two highest logits where two answers differ first."""
    pairs = enumerate(zip(one, other, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    first, second = causal(torch.tensor([prompt + one[:at]])).logits[0, -1].topk(2).values
    return float(first - second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    causal = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    answerer = Answerer(PairModel(causal), read_generation_config(arguments.model)[0])
    texts = [json.loads(line)["prompt"] for line in arguments.prompts.read_text().splitlines()]
    prompts = [tokenizer(text).input_ids[: answerer.positions // 4] for text in texts[:PROMPTS]]
    assert answerer.note == "", answerer.note
    seconds, tokens = {"batched": 0.0, "single": 0.0}, {"batched": 0, "single": 0}
    together: dict[int, list[int]] = {}
    singly: list[list[int]] = []
    for _ in range(TURNS):
        began = time.perf_counter()
        for batch in answerer.answer(prompts, Decoding(TOKENS)):
            together |= batch
        seconds["batched"] += time.perf_counter() - began
        tokens["batched"] += sum(map(len, together.values()))
        began = time.perf_counter()
        singly = [alone(causal, prompt, sorted(answerer.ends)) for prompt in prompts]
        seconds["single"] += time.perf_counter() - began
        tokens["single"] += sum(map(len, singly))
    differing = [index for index, answer in enumerate(singly) if answer != together[index]]
    gaps = [gap(causal, prompts[i], singly[i], together[i]) for i in differing]
    speed = {name: tokens[name] / seconds[name] for name in seconds}
    result = {
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(speed["batched"] / speed["single"], 2),
        "goal": ">= 5",
        "prompts": len(prompts),
        "differing": len(differing),
        "largest_gap_where_they_differ": max(gaps, default=0.0),
        "goal_of_the_gap": f"< {NEAR}",
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
