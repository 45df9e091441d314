"""Make a recipe's optimizer and learning-rate schedule, and compute the optimizer's memory."""

import math
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import get_scheduler

from orpo_lite.recipe.schema import Recipe

PAGED_FROM = 100_000
"""bitsandbytes keeps a state in paged memory if it has at least this number of elements
(optimizer.py, get_state_buffer)."""


def whole_steps(value: float, steps: int) -> int:
    """Convert a setting to a number of steps. A ``value`` below 1 is a share of ``steps``.

    A share is rounded up, as in TrainingArguments: 0.1 of 25 steps -> 3.
    """
    return math.ceil(value * steps - 1e-9) if value < 1 else int(value)


def lr_factor(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Return the learning-rate schedule of transformers as a function: step -> factor."""
    settings = recipe.training
    warmup = whole_steps(settings.warmup_steps, steps)
    name: str = settings.lr_scheduler_type
    if name == "constant":
        name = "constant_with_warmup"
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    return schedule.lr_lambdas[0]


def make_optimizer(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the AdamW that ``training.optim`` names.

    On a CPU, the paged optimizers of bitsandbytes use ordinary memory.
    """
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
    """Return the bytes of the optimizer's states: (in ordinary memory, in paged memory).

    ``parameters`` must be on the meta device. For an optimizer of bitsandbytes, bitsandbytes
    allocates the states on meta, and their bytes are counted. For torch's AdamW, 12 bytes per
    parameter are counted: two float32 moments, and a third float32 tensor that exists only during
    a step (torch.optim.adamw, foreach).
    """
    name = recipe.training.optim
    if name == "adamw_torch":
        return 12 * sum(parameter.numel() for parameter in parameters), 0
    kind = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW32bit
    optimizer = kind(parameters)
    ordinary = paged = 0
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        can_be_paged = name.startswith("paged") and parameter.numel() >= PAGED_FROM
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, torch.Tensor) or "map" in key:
                continue
            if can_be_paged and key.startswith("state"):
                paged += value.nbytes
            else:
                ordinary += value.nbytes
    return ordinary, paged
