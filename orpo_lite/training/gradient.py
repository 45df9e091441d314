"""The gradient of one optimizer step: the same however its pairs are cut up, over micro-batches and processes."""

import gc
import hashlib
from collections.abc import Sequence

import torch

from orpo_lite.data.packing import Batching, make_batch, micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.objectives.objective import Objective


class OutOfMemory(Exception):  # noqa: N818 - torch's own has the longer name
    """A process ran out of memory; no gradient of the step is left in any, so all may do it again in smaller pieces."""


def accumulate(
    model: PairModel,
    objective: Objective,
    batch: Sequence[TokenizedPair],
    batching: Batching,
    *,
    step: int,
    seed: int,
    processes: Processes,
    scaler: torch.amp.GradScaler,
) -> list[float]:
    """Add the gradient of one optimizer step to the parameters, micro-batch by micro-batch.

    ``batch`` holds the pairs of the whole step, of all processes; each takes its share. What the sums are divided by
    is known before the first forward pass, so shares of loss and gradient add up to those of the step.

    Returns:
        The objective's ``parts`` of the step, summed over micro-batches and processes.

    Raises:
        OutOfMemory: here or in another process.
    """
    divisors, rank = objective.divisors(batch), processes.rank
    parts = torch.zeros(len(objective.parts), dtype=torch.float64, device=processes.device)

    def run_passes() -> None:
        """Run this process's micro-batches. There may be none in a small step.

        A function, so that running out of memory leaves no tensor behind.
        """
        for number, chunk in enumerate(micro_batches(batch, batching, rank=rank, world=processes.count)):
            rows = make_batch([batch[index] for index in chunk], batching)
            seed_dropout(seed, step, number, rank)
            logps = model(rows.to(processes.device))
            loss, share = objective.loss(logps, divisors)
            processes.backward(scaler.scale(loss))
            parts.add_(share)  # there: to read it would wait for the device before the next batch is made

    scaler.scale(torch.zeros((), device=processes.device))  # makes its state, also where there is no pair to scale
    short = False
    try:
        run_passes()
    except torch.OutOfMemoryError:
        short = True
    trained = [parameter for _, parameter in model.trained()]
    if processes.any(short):
        for parameter in trained:
            parameter.grad = None
        gc.collect()
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory
    processes.sum_gradients(trained)
    values: list[float] = processes.sum(parts).tolist()
    return values


def seed_dropout(*place: int) -> None:
    """Seed torch by (seed, step, micro-batch, process), so that dropout needs no saved state to be repeated."""
    digest = hashlib.blake2b(":".join(map(str, place)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
