"""AdamW as the recipe names it, its learning rate, and what it holds."""

import math
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import get_scheduler

from orpo_lite.recipe.schema import Recipe

PAGED_FROM = 100_000  # elements; bitsandbytes keeps smaller states in ordinary memory (optimizer.py, get_state_buffer)


def whole_steps(value: float, steps: int) -> int:
    """A share of all steps (below 1), rounded up as TrainingArguments does, or a number of steps."""
    return math.ceil(value * steps - 1e-9) if value < 1 else int(value)


def lr_factor(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """transformers' schedule as a function of the step alone: step -> factor of the peak learning rate."""
    settings = recipe.training
    warmup = whole_steps(settings.warmup_steps, steps)
    name = (
        "constant_with_warmup"
        if settings.lr_scheduler_type == "constant"
        else settings.lr_scheduler_type
    )
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    ).lr_lambdas[0]


def make_optimizer(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as ``training.optim`` names it; on a CPU bitsandbytes' paged forms run un-paged."""
    settings = recipe.training
    options = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optim == "paged_adamw_8bit":
        return bnb.optim.PagedAdamW8bit(parameters, **options)  # type: ignore[no-any-return]
    if settings.optim == "paged_adamw_32bit":
        return bnb.optim.PagedAdamW32bit(parameters, **options)  # type: ignore[no-any-return]
    return torch.optim.AdamW(parameters, **options)  # type: ignore[arg-type]


def state_bytes(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> tuple[int, int]:
    """Bytes of the optimizer's states for parameters on the meta device: in ordinary memory, and paged.

    bitsandbytes makes its own states here, un-paged; torch's AdamW holds two float32 moments and, while it steps, a
    third tensor of that size (torch.optim.adamw, foreach).
    """
    name = recipe.training.optim
    if name == "adamw_torch":
        return 12 * sum(parameter.numel() for parameter in parameters), 0
    kind = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW32bit
    optimizer, sums = kind(parameters), [0, 0]
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        tensors = {
            n: t
            for n, t in optimizer.state[parameter].items()
            if isinstance(t, torch.Tensor) and "map" not in n
        }
        for key, tensor in tensors.items():
            paged = (
                name.startswith("paged")
                and key.startswith("state")
                and parameter.numel() >= PAGED_FROM
            )
            sums[paged] += tensor.nbytes
    return sums[0], sums[1]
