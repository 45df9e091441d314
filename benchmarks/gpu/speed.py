"""Compare pairs per second with TRL's on the same pairs; also tokens per second and MFU."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import lengths, ours
from benchmarks.gpu.figures import NOT_MEASURED, Figures
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.steps import CUDA, drawn_model, free, gib
from benchmarks.ours import BATCH, SETS
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.load import bare_base
from orpo_lite.model.optimizer import make_optimizer
from orpo_lite.ops.devices import is_out_of_memory
from orpo_lite.planning.gpus import local_gpu

TIMED = 4
Train = Callable[[list[TokenizedPair]], object]


def pairs_per_second(scale: Scale, figures: Figures, shape: str) -> None:
    """Time orpo-lite and TRL.

    orpo-lite is timed with all layers checkpointed, as TRL is, and with the plan for the whole GPU.
    TRL is timed with several batch sizes.
    """
    config = scale.config(shape)
    batches = {}
    for name, file in SETS.items():
        batches[name] = lengths.near_mean(scale.lengths(file), BATCH, 1 + scale.of(TIMED, 1))
    plans = scale.work / "plans.json"
    planned = json.loads(plans.read_text("utf-8"))[-1]["levers"] if plans.is_file() else {}
    best: dict[str, float] = {}
    for label, memory_settings in (("ours", {}), ("ours_planned", planned)):
        if label == "ours_planned" and not memory_settings:
            continue
        figures.note(f"{label}.levers", memory_settings)
        train = figures.attempt(f"{label}.built", _ours, config, memory_settings)
        if train is None:
            continue
        for name, triples in batches.items():
            found = figures.attempt(f"{label}.{name}", timed, train, triples, config)
            best[name] = max(best.get(name, 0.0), found["pairs_per_second"] if found else 0.0)
        del train
        free()
    make = figures.attempt("trl.built", _theirs, config, scale.work / f"trl-{shape}")
    if make is None:
        return
    for size in scale.of((BATCH, BATCH // 2, BATCH // 4), (BATCH,)):
        for name, triples in batches.items():
            found = figures.attempt(
                f"trl.{name}_batch_{size}", timed, partial(make, size=size), triples, config
            )
            if found and best.get(name):
                ratio = best[name] / found["pairs_per_second"]
                figures.note(f"ratio.{name}_batch_{size}", round(ratio, 3))
            free()


def timed(train: Train, batches: list[lengths.Triples], config: Any) -> dict[str, Any]:
    """Time steps on all batches but the first one, which warms up."""
    seconds = 0.0
    torch.cuda.reset_peak_memory_stats()
    try:
        for number, triples in enumerate(batches):
            pairs = lengths.random_pairs(triples, config.vocab_size, seed=number)
            torch.cuda.synchronize()
            began = time.perf_counter()
            train(pairs)
            torch.cuda.synchronize()
            if number > 0:
                seconds += time.perf_counter() - began
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": str(error)[:200], "pairs_per_second": 0.0}
    count, tokens = (len(batches) - 1) * BATCH, sum(map(lengths.packed, batches[1:]))
    own = local_gpu(0)
    flops = model_flops(config, batches[1:])
    return {
        "pairs_per_second": round(count / seconds, 3),
        "tokens_per_second": round(sum(int(b[:, 1:].sum()) for b in batches[1:]) / seconds, 1),
        "different_tokens_per_second": round(tokens / seconds, 1),
        "mfu": float(f"{flops / seconds / own.gpu.flops:.4g}") if own else NOT_MEASURED,
        "peak_gib": gib(torch.cuda.max_memory_allocated()),
    }


def model_flops(config: Any, batches: list[lengths.Triples]) -> float:
    """Return the FLOPs that any step needs on these pairs.

    They are 4 per parameter and token: each different token goes forward and backward once, without
    gradients of the weights. Adapter, attention, padding and recomputation are not counted.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = (
        2
        * config.hidden_size
        * head_dim
        * (config.num_attention_heads + config.num_key_value_heads)
    )
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    parameters = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    return 4.0 * parameters * sum(map(lengths.packed, batches))


def _ours(config: Any, memory_settings: dict[str, Any]) -> Train:
    """Return a function that takes one optimizer step of orpo-lite."""
    settings = ours.recipe(**memory_settings)
    model = drawn_model(settings, config)
    optimizer = make_optimizer(settings, [parameter for _, parameter in model.trained()])
    return lambda pairs: ours.our_step(model, optimizer, pairs, settings)


def _theirs(config: Any, folder: Path) -> Callable[..., None]:
    """Return a function that takes one optimizer step of TRL, in micro-batches of ``size``."""
    from benchmarks import peers, step

    model = bare_base(ours.recipe(), config, torch.bfloat16, CUDA)
    free()
    model.is_loaded_in_4bit = True  # from_pretrained sets it, and TRL reads it
    trainer = peers.make_trainer(model, step.tokenizer(), step.LORA, str(folder))

    def train(pairs: list[TokenizedPair], size: int) -> None:
        for start in range(0, len(pairs), size):
            peers.backward(trainer, pairs[start : start + size], share=size / len(pairs))
        peers.update(trainer)

    return train
