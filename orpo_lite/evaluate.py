"""The loss and the reward accuracy on held-out pairs, through the same forward pass that trains."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from orpo_lite.data.packing import make_batch, micro_batches
from orpo_lite.data.tokens import TokenizedPair
from orpo_lite.model import PairModel, divisors_of, loss_of
from orpo_lite.recipe import Recipe
from orpo_lite.step.losses import PARTS, named_parts


def evaluate(
    model: PairModel, pairs: Sequence[TokenizedPair], recipe: Recipe, *, pad_id: int, accelerator: Accelerator
) -> Generator[tuple[int, int], None, dict[str, float]]:
    """Metrics on ``pairs`` under TRL's names with the prefix ``eval_``; {} for no pairs. Yields (batch, batches).

    The NLL is divided by the tokens of all pairs, so the figure does not depend on the micro-batch. Nothing of the
    training that follows changes by a bit: no dropout, no generator is touched, the 4-bit weights stay as they are.
    """
    if not pairs:
        return {}
    divisors = divisors_of(pairs, recipe)
    total = torch.zeros(len(PARTS), dtype=torch.float64, device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    batching = model.batching(recipe, pad_id)
    share = micro_batches(pairs, batching, rank=rank, world=world)
    for number, chunk in enumerate(share):
        yield number, len(share)  # outside: whoever draws the progress is not put into no_grad and eval mode
        batch = make_batch([pairs[index] for index in chunk], batching)
        with model.evaluating():
            logps = model(batch.to(accelerator.device))
            total += loss_of(logps, divisors, recipe)[1]
    summed: Any = accelerator.reduce(total, reduction="sum")
    return {f"eval_{name}": value for name, value in named_parts(summed.tolist(), beta=recipe.loss.beta).items()}
