"""Take an optimizer step: accumulate the gradient, clip it, update the adapter.

The gradient does not depend on how the pairs are divided into micro-batches and processes.
"""

import gc
import hashlib
import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import cast

import torch

from orpo_lite.data.packing import Batching, make_batch, micro_batches, shortest
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.model.sharding import is_sharded
from orpo_lite.objectives.objective import Objective
from orpo_lite.ops.devices import is_out_of_memory
from orpo_lite.recipe.text import GIB
from orpo_lite.training.session import Session
from orpo_lite.training.state import TrainState


class OutOfMemory(Exception):  # noqa: N818 - torch has an OutOfMemoryError
    """A process ran out of memory during a step.

    All processes have deleted the step's gradients. So the step can be repeated with smaller
    micro-batches.
    """


def take_step(
    session: Session, batch: Sequence[TokenizedPair], state: TrainState
) -> tuple[dict[str, float], bool]:
    """Take one optimizer step on the pairs of ``batch``.

    Returns:
        The step's metrics, and whether loss and gradients were finite (see :func:`update`).

    Raises:
        OutOfMemory: a process ran out of memory. The step can be repeated with smaller
            micro-batches.
    """
    began = time.monotonic()
    set_learning_rate(session, state.step)
    sums = accumulate(
        session.pair_model,
        session.objective,
        batch,
        session.pair_model.batching(session.recipe, session.inputs.pad_id),
        step=state.step,
        seed=session.recipe.training.seed,
        processes=session.processes,
        scaler=session.scaler,
    )
    metrics = session.objective.metrics(sums)
    norm, finite = update(
        session.trained,
        session.optimizer,
        session.scaler,
        metrics["loss"],
        session.recipe.training.max_grad_norm,
    )
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)
    progress = end_step(session, state, tokens, began, finite=finite)
    return metrics | {"grad_norm": norm} | progress, finite


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
    """Add the gradients of all micro-batches of an optimizer step to the parameters' ``grad``.

    ``batch`` holds the pairs of the whole step. Each process computes a share of these pairs. The
    loss of a micro-batch is divided by the numbers of pairs and tokens of the whole step. So the
    gradients of the micro-batches add up to the step's gradient.

    Returns:
        The objective's ``parts`` of the step, summed over micro-batches and processes.

    Raises:
        OutOfMemory: this process or another one ran out of memory.
    """
    divisors, rank = objective.divisors(batch), processes.rank

    def run_passes() -> torch.Tensor:
        """Run this process's micro-batches. Return the sums of the objective's ``parts`` over them.

        If a step has few pairs, a process may have no micro-batch. Then the sums are 0.
        ``run_passes`` is a separate function, so that no local variable keeps a tensor in memory
        after an out-of-memory error.
        """
        parts = torch.zeros(len(objective.parts), dtype=torch.float64, device=processes.device)
        # The scaler creates its state at its first call. A process without pairs would make none.
        scaler.scale(torch.zeros((), device=processes.device))
        chunks = micro_batches(batch, batching, rank=rank, world=processes.count)
        for number, chunk in enumerate(chunks):
            pairs = [batch[index] for index in chunk]
            if is_idle := not chunk:
                if not is_sharded(model):
                    continue
                # The other processes need this one to gather the weights of each layer.
                pairs = [shortest(batch)]
            rows = make_batch(pairs, batching).to(processes.device)
            seed_dropout(seed, step, number, rank)
            logps = model(rows)
            loss, share = objective.loss(logps, rows.facts, divisors)
            processes.backward(scaler.scale(0 * loss if is_idle else loss))
            if not is_idle:
                # Add on the device: reading the value would make the host wait.
                parts.add_(share)
        return parts

    parts = None
    try:
        parts = run_passes()
    except RuntimeError as error:
        # Processes that share the base wait for this one inside a pass, so none can be repeated.
        if not is_out_of_memory(error) or is_sharded(model):
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
    """Seed torch's random generators from (seed, step, micro-batch, process).

    Because of this, checkpoints need no generator state.
    """
    digest = hashlib.blake2b(":".join(map(str, place)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def update(
    trained: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss: float,
    max_grad_norm: float,
) -> tuple[float, bool]:
    """Clip the gradients. If loss and gradients are finite, take the optimizer's step.

    Returns:
        (norm, finite). ``norm``: the norm of the gradients before clipping. ``finite``: False if
        the loss or the gradients were not finite. Exception: with float16, the scaled loss can
        overflow. The scaler then skips the step and lowers its scale, and ``finite`` is True.
    """
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf))
    # If the scaled float16 loss overflows, only the gradients are not finite. The scaler then skips
    # the step and lowers its scale.
    overflow = scaler.is_enabled() and scaler.get_scale() > 1
    finite = math.isfinite(loss) and (math.isfinite(norm) or overflow)
    if finite:
        scaler.step(optimizer)
    scaler.update()  # also after a skipped step: unscale_ must not run twice before it
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def set_learning_rate(session: Session, step: int) -> None:
    """Set the optimizer's learning rate to that of a step."""
    for group in session.optimizer.param_groups:
        group["lr"] = session.learning_rate(step)


def end_step(
    session: Session, state: TrainState, tokens: int, began: float, *, finite: bool
) -> dict[str, float]:
    """Count a step in the state. Return its metrics that do not depend on the objective.

    Args:
        session: the session.
        state: the state; changed in place.
        tokens: number of tokens of the step, with those of the prompts.
        began: the time at which the step began, of ``time.monotonic``.
        finite: whether loss and gradient of the step were finite.
    """
    state.count_step(tokens, finite=finite)
    progress = {
        "learning_rate": session.learning_rate(state.step - 1),
        "num_tokens": state.num_tokens,
        "tokens_per_second": tokens / (time.monotonic() - began),
        "epoch": state.step / session.per_epoch,
    }
    return progress | memory_metrics(session.processes.device)


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return the memory metrics of a device, by name. Sizes are in GiB.

    On a CPU there is only ``memory_gib``, the peak memory of the process so far. On a GPU there are
    four metrics. A plan predicts only the first:

    - ``memory_gib``: peak memory of tensors so far;
    - ``memory_reserved_gib``: peak memory that torch's allocator reserved so far;
    - ``memory_retries``: how often the allocator had to free cached memory and try again;
    - ``memory_free_gib``: memory that is free on the GPU now, for any program.
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
