"""The gradient of one optimizer step: the same however its pairs are cut up, over micro-batches and processes."""

import gc
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from orpo_lite.data.packing import Batching, make_batch, micro_batches
from orpo_lite.data.tokens import TokenizedPair
from orpo_lite.model import PairModel, divisors_of, loss_of
from orpo_lite.recipe import Recipe
from orpo_lite.step.losses import PARTS


class ShortageError(Exception):
    """A process ran out of memory; no gradient of the step is left in any, so all may do it again in smaller pieces."""


def accumulate(
    model: PairModel,
    batch: Sequence[TokenizedPair],
    recipe: Recipe,
    step: int,
    batching: Batching,
    accelerator: Accelerator,
    scaler: torch.amp.GradScaler,
) -> list[float]:
    """Add the gradient of one optimizer step to the parameters, micro-batch by micro-batch.

    ``batch`` holds the pairs of the whole step, of all processes; each takes its share. What the sums are divided by
    is known before the first forward pass, so shares of loss and gradient add up to those of the step.

    Returns:
        The step's :data:`PARTS`, summed over micro-batches and processes.

    Raises:
        ShortageError: out of memory, here or in another process.
    """
    divisors, rank = divisors_of(batch, recipe), accelerator.process_index
    parts = torch.zeros(len(PARTS), dtype=torch.float64, device=accelerator.device)

    def passes() -> None:
        """This process's; of a small step it may have none. A function, so that a shortage leaves no tensor behind."""
        for number, chunk in enumerate(micro_batches(batch, batching, rank=rank, world=accelerator.num_processes)):
            rows = make_batch([batch[index] for index in chunk], batching)
            seed_dropout(recipe.training.seed, step, number, rank)
            logps = model(rows.to(accelerator.device))
            loss, share = loss_of(logps, divisors, recipe)
            accelerator.backward(scaler.scale(loss))
            parts.add_(share)  # there: to read it would wait for the device before the next batch is made

    scaler.scale(torch.zeros((), device=accelerator.device))  # makes its state, also where there is no pair to scale
    short = False
    try:
        passes()
    except torch.OutOfMemoryError:
        short = True
    trained = [parameter for _, parameter in model.trained()]
    if any_process(accelerator, short):
        for parameter in trained:
            parameter.grad = None
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        raise ShortageError
    if accelerator.num_processes > 1:
        _add_up(trained, accelerator)
    total: Any = accelerator.reduce(parts, reduction="sum")
    values: list[float] = total.tolist()
    return values


def _add_up(trained: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Each gradient becomes the sum over all processes: an adapter's is small, and one message carries it."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total: Any = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="sum")
    for parameter, part in zip(trained, total.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process raised its flag: all must then do the same."""
    if accelerator.num_processes == 1:
        return flag
    total: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(total.item() > 0)


def seed_dropout(*place: int) -> None:
    """Seed torch by (seed, step, micro-batch, process), so that dropout needs no saved state to be repeated."""
    digest = hashlib.blake2b(":".join(map(str, place)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
