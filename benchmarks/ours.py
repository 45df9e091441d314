"""orpo-lite for the benchmarks: the default recipe, 7B shapes, an optimizer step on given pairs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from orpo_lite.data.packing import make_batch, micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import PairModel
from orpo_lite.objectives.objective import find_objective
from orpo_lite.recipe.schema import Recipe

SETS = {"hh": "hh-rlhf", "alpaca": "alpaca-prefs"}
BATCH = 8
SHAPES: dict[str, tuple[str, Any]] = {
    "peak_gib_mistral_7b": (
        "Mistral-7B",
        MistralConfig(
            num_key_value_heads=8, num_hidden_layers=32, vocab_size=32_000,
            intermediate_size=14_336,
        ),
    ),
    "peak_gib_llama3_8b": (
        "Llama-3-8B",
        LlamaConfig(
            num_key_value_heads=8, num_hidden_layers=32, vocab_size=128_256,
            intermediate_size=14_336,
        ),
    ),
    "peak_gib_qwen25_7b": (
        "Qwen2.5-7B",
        Qwen2Config(
            hidden_size=3_584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, vocab_size=152_064,
        ),
    ),
}  # fmt: skip
ALL_SETTINGS = {
    "mlp_tile": 512,
    "checkpoint_offload": True,
    "embedding_on_cpu": True,
    "head_chunk": 256,
}


def recipe(**memory: Any) -> Recipe:
    """Return the default recipe with these settings of ``memory``."""
    tree = {
        "model": {"model_name_or_path": "none"},
        "data": {"dataset_name": "none"},
        "memory": memory,
    }
    return Recipe.model_validate(tree)


def step_losses(
    model: PairModel, pairs: Sequence[TokenizedPair], settings: Recipe
) -> Iterator[torch.Tensor]:
    """Yield each micro-batch's share of the loss of one optimizer step."""
    batching, objective = model.batching(settings, pad_id=0), find_objective(settings.loss)
    divisors = objective.divisors(pairs)
    for chunk in micro_batches(pairs, batching):
        batch = make_batch([pairs[index] for index in chunk], batching).to(model.device)
        yield objective.loss(model(batch), batch.facts, divisors)[0]


def our_step(
    model: PairModel, optimizer: torch.optim.Optimizer, pairs: list[TokenizedPair], settings: Recipe
) -> float:
    """Take one optimizer step (forward, backward, clipping, update) and return its loss."""
    total = 0.0
    for loss in step_losses(model, pairs, settings):
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_([parameter for _, parameter in model.trained()], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total
