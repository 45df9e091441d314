"""One optimizer step."""

import math
import resource
import sys
import time
from collections.abc import Sequence

import torch

from orpo_lite.data.pair import TokenizedPair
from orpo_lite.training.gradient import accumulate
from orpo_lite.training.session import Session
from orpo_lite.training.state import TrainState


def take_step(session: Session, batch: Sequence[TokenizedPair], state: TrainState) -> tuple[dict[str, float], bool]:
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
        session.trained, session.optimizer, session.scaler, named["loss"], session.recipe.training.max_grad_norm
    )
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)
    state.take_step(tokens, finite=finite)
    figures = {
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "num_tokens": state.num_tokens,
        "tokens_per_second": tokens / (time.monotonic() - began),
        "memory_gib": memory_gib(session.processes.device),
        "epoch": state.step / session.per_epoch,
    }
    return named | figures, finite


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


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
