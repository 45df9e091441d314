"""On a GPU: 7B shapes with random NF4 weights. Measured peaks beside counted ones, pairs a second beside TRL's.

    python -m benchmarks.gpu --json FILE

TRL runs at each of its batches 8, 4, 2 and 1 that fits, and the fastest counts; ours with a whole step of 8 pairs
packed to a budget of 4,096 tokens. The check of the peak uses bitsandbytes' un-paged AdamW8bit: paged state is not in
what torch counts.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import LlamaConfig

from benchmarks import lengths, peers, step
from orpo_lite.model.load import bare_base, bare_pair_model
from orpo_lite.ops.devices import device_kind
from orpo_lite.planning.gpus import GPUS, local_gpu
from orpo_lite.planning.on_meta import worst_case
from orpo_lite.planning.search import Planner

BATCHES = 6


def run(device: torch.device, shapes: dict[str, tuple[str, Any]], tokens: int, say: Callable[[str], None]) -> Any:
    """All figures for each shape."""
    result: dict[str, Any] = {}
    for key, (name, config) in shapes.items():
        for label, levers in (("", step.ALL_LEVERS), ("_default_levers", {})):
            counted = step.peak_of_7b(config, levers, tokens)
            measured, _ = measured_step(config, levers, tokens, device)
            result[f"{key}{label}"] = {"counted": round(counted, 3), "measured": round(measured, 3)}
            say(f"{name}{label}: counted {counted:.2f} GiB, measured {measured:.2f} GiB")
        result[f"{key}_planned"] = planned(config, tokens, device, say)
        for name_of_set, file in step.SETS.items():
            for grouped in (False, True):
                batches = lengths.near_mean(lengths.shipped(file), step.BATCH, BATCHES, grouped=grouped)
                found = pairs_per_second(config, batches, device)
                label = f"{name_of_set}_grouped" if grouped else name_of_set
                result[f"{key}_{label}"] = found
                say(f"{name}, {label}: {found}")
    return result


def planned(config: Any, tokens: int, device: torch.device, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Plans for three budgets, from the least on: predicted peak beside the measured one, and the share of peak FLOPs.

    A budget that was called sufficient and runs out of memory ends the benchmark: the allocator is held to it.
    """
    settings = step.recipe().override({"data.max_length": tokens, "training.optim": "paged_adamw_8bit"})
    kind = device_kind(device)
    own = local_gpu(device.index or 0) if device.type == "cuda" else None
    gpu = own.gpu if own else GPUS[-1]
    planner = Planner(settings, config, worst_case(tokens, 2), kind)
    rows = []
    for spare in (0.1, 3, 8):
        budget = planner.least(gpu) + int(spare * 2**30)
        plan = planner.plan(budget, gpu)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / gpu.memory), device)
        levers = dict(plan.levers)
        measured, seconds = measured_step(config, levers, tokens, device)
        flops = plan.flops_per_pair / seconds
        rows.append(
            {
                "budget": round(budget / 2**30, 3), "predicted": round(plan.peak / 2**30, 3),
                "measured": round(measured, 3), "seconds_predicted": plan.seconds_per_pair,
                "seconds": round(seconds, 4), "mfu": round(flops / gpu.flops, 4), "levers": levers,
            }
        )  # fmt: skip
        say(f"  {rows[-1]}")
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return rows


def measured_step(config: Any, levers: dict[str, Any], tokens: int, device: torch.device) -> tuple[float, float]:
    """Of the second of two steps: GiB that torch's allocator held at most, optimizer and all, and seconds a pair."""
    settings = step.recipe(**levers)
    model = bare_pair_model(settings, config, torch.bfloat16, device)
    optimizer = bnb.optim.AdamW8bit([parameter for _, parameter in model.trained()], lr=1e-5)
    pairs = lengths.random_pairs([(0, tokens, tokens)] * 2, config.vocab_size)  # in one pass, or one after the other
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _wait(device)
        began = time.perf_counter()
        step.our_step(model, optimizer, pairs, settings)
        _wait(device)
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    del model, optimizer
    _free(device)
    return peak / 2**30, seconds / len(pairs)


def pairs_per_second(config: Any, batches: Any, device: torch.device) -> dict[str, Any]:
    """Both on the same pairs, one after the other with the card to itself; the first batch warms up."""
    found: dict[str, Any] = {"ours": timed(ours, batches, config, device)}
    by_batch: dict[int, float] = {}
    for size in (8, 4, 2, 1):
        with suppress(torch.OutOfMemoryError):
            by_batch[size] = timed(partial(theirs, size=size), batches, config, device)
        _free(device)  # here, when an error and its frames are gone
    if by_batch:
        found["trl_batch"], found["trl"] = max(by_batch.items(), key=lambda item: item[1])
        found["ratio"] = round(found["ours"] / found["trl"], 3)
    return found | {"trl_by_batch": by_batch}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(make: Callable[..., Callable[[Any], Any]], batches: Any, config: Any, device: torch.device) -> float:
    """Pairs a second over all batches but the first, of what ``make`` makes; nothing of it is left."""
    train, seconds = make(config, device), 0.0
    for number, triples in enumerate(batches):
        pairs = lengths.random_pairs(triples, config.vocab_size, seed=number)
        _wait(device)
        began = time.perf_counter()
        train(pairs)
        _wait(device)
        seconds += (time.perf_counter() - began) * (number > 0)
    del train
    _free(device)
    return round((len(batches) - 1) * step.BATCH / seconds, 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(config: Any, device: torch.device) -> Callable[[Any], Any]:
    """A function that takes one optimizer step on a batch."""
    settings = step.recipe()
    model = bare_pair_model(settings, config, torch.bfloat16, device)
    optimizer = bnb.optim.AdamW8bit([parameter for _, parameter in model.trained()], lr=1e-5)
    return lambda pairs: step.our_step(model, optimizer, pairs, settings)


def theirs(config: Any, device: torch.device, size: int) -> Callable[[Any], Any]:
    """The same of TRL, the batch in parts of ``size``."""
    model = bare_base(step.recipe(), config, torch.bfloat16, device)
    model.is_loaded_in_4bit = True  # what from_pretrained notes, and TRL asks for
    folder = tempfile.mkdtemp()
    changes = {"optim": "adamw_8bit", "per_device_train_batch_size": size}
    trainer = peers.make_trainer(model, step.tokenizer(), step.LORA, folder, **changes)

    def train(pairs: Any) -> None:
        for start in range(0, len(pairs), size):
            peers.backward(trainer, pairs[start : start + size], share=size / len(pairs))
        peers.update(trainer)

    return train


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="a small shape on the CPU, to see that all of it runs")
    options = parser.parse_args()
    if options.rehearse:
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        result = run(torch.device("cpu"), {"rehearsal": ("small", config)}, 64, print)
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; --rehearse runs a small shape on the CPU")
    else:
        result = run(torch.device("cuda", 0), step.SHAPES, 2_048, print) | {
            "card": torch.cuda.get_device_name(0),
        }
    if options.json:
        options.json.write_text(json.dumps(result | step.about(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
