"""One optimizer step: the gradient, the same however its pairs are cut up, then clipping and the update."""

import gc
import hashlib
import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import cast

import torch

from orpo_lite.data.packing import Batching, make_batch, micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.objectives.objective import Objective
from orpo_lite.ops.devices import is_out_of_memory
from orpo_lite.recipe.text import GIB
from orpo_lite.training.session import Session
from orpo_lite.training.state import TrainState


class OutOfMemory(Exception):  # noqa: N818 - torch's own has the longer name
    """A process ran out of memory; no gradient of the step is left in any, so all may do it again in smaller pieces."""


def take_step(
    session: Session, batch: Sequence[TokenizedPair], state: TrainState
) -> tuple[dict[str, float], bool]:
    """Take one optimizer step on the pairs of ``batch``.

    Returns:
        Its metrics, and whether loss and gradients were finite.

    Raises:
        OutOfMemory: no gradient is left, so that the step can be done again in smaller pieces.
    """
    began = time.monotonic()
    learning_rate = session.learning_rate(state.step)
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate
    parts = accumulate(
        session.pair_model,
        session.objective,
        batch,
        session.pair_model.batching(session.recipe, session.inputs.pad_id),
        step=state.step,
        seed=session.recipe.training.seed,
        processes=session.processes,
        scaler=session.scaler,
    )
    named = session.objective.metrics(parts)
    norm, finite = update(
        session.trained,
        session.optimizer,
        session.scaler,
        named["loss"],
        session.recipe.training.max_grad_norm,
    )
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)
    state.count_step(tokens, finite=finite)
    figures = {
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "num_tokens": state.num_tokens,
        "tokens_per_second": tokens / (time.monotonic() - began),
        "epoch": state.step / session.per_epoch,
    }
    return named | figures | memory_figures(session.processes.device), finite


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

    def run_passes() -> torch.Tensor:
        """Run this process's micro-batches, and return the sum of their parts. There may be none in a small step.

        A function, so that running out of memory leaves no tensor behind.
        """
        parts = torch.zeros(len(objective.parts), dtype=torch.float64, device=processes.device)
        scaler.scale(
            torch.zeros((), device=processes.device)
        )  # makes its state, also where there is no pair to scale
        for number, chunk in enumerate(
            micro_batches(batch, batching, rank=rank, world=processes.count)
        ):
            rows = make_batch([batch[index] for index in chunk], batching)
            seed_dropout(seed, step, number, rank)
            logps = model(rows.to(processes.device))
            loss, share = objective.loss(logps, divisors)
            processes.backward(scaler.scale(loss))
            parts.add_(
                share
            )  # there: to read it would wait for the device before the next batch is made
        return parts

    parts = None
    try:
        parts = run_passes()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    trained = [parameter for _, parameter in model.trained()]
    if processes.any(parts is None):
        for parameter in trained:
            parameter.grad = None
        gc.collect()
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory
    processes.sum_gradients(trained)
    values: list[float] = processes.sum(cast(torch.Tensor, parts)).tolist()
    return values


def seed_dropout(*place: int) -> None:
    """Seed torch by (seed, step, micro-batch, process), so that dropout needs no saved state to be repeated."""
    digest = hashlib.blake2b(":".join(map(str, place)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def update(
    trained: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss: float,
    max_grad_norm: float,
) -> tuple[float, bool]:
    """Clip and take the optimizer's step, unless loss or gradients are not finite; the norm, and whether they were."""
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf))
    # An overflow of the scaled float16 loss shows in the gradients alone: the scaler skips the step, lowers its scale.
    overflow = scaler.is_enabled() and scaler.get_scale() > 1
    finite = math.isfinite(loss) and (math.isfinite(norm) or overflow)
    if finite:
        scaler.step(optimizer)
    scaler.update()  # also after a step that was not taken: unscale_ refuses to run twice
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def memory_figures(device: torch.device) -> dict[str, float]:
    """Return the memory that is taken, in GiB.

    On a CPU ``memory_gib``, the process's peak so far. On a GPU also what a plan does not see:

    - ``memory_gib``: the peak of tensors so far;
    - ``memory_reserved_gib``: the peak of what torch's allocator took from the driver for them;
    - ``memory_retries``: how often the allocator gave back what it kept because memory was short;
    - ``memory_free_gib``: what the driver would still give, now, to any program.
    """
    if device.type != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024
        return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    return {
        "memory_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "memory_retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
        "memory_free_gib": torch.cuda.mem_get_info(device)[0] / GIB,
    }
