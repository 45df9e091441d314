"""Steps that fail: out of memory, not finite, without a deterministic kernel."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import enable_full_determinism

from orpo_lite.data.packing import micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import Command, DivergedError, FitError, Overrides, RecipeError, first_line
from orpo_lite.ops.devices import is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.commands import resume_command
from orpo_lite.training.session import Session
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update

BAD_STEPS = 3  # non-finite steps in a row that end a run


def shrink_memory(session: Session, batch: Sequence[TokenizedPair]) -> dict[str, Any]:
    """Return settings of ``memory`` by which the step takes less: smaller micro-batches, then all layers checkpointed.

    Raises:
        FitError: each micro-batch is one pair, and all layers are checkpointed.
    """
    recipe, model = session.recipe, session.pair_model
    memory = recipe.memory
    pairs = max(map(len, micro_batches(batch, model.batching(recipe, session.inputs.pad_id))))
    settings: dict[str, Any] = {"activation_checkpointing": memory.activation_checkpointing}
    if pairs > 1:
        return settings | {
            "micro_batch_tokens": max(1, recipe.micro_batch_tokens // 2),
            "micro_batch_size": pairs // 2,
        }
    if model.checkpointed < len(model.layers):
        sizes = {"micro_batch_tokens": memory.micro_batch_tokens, "micro_batch_size": 1}
        return sizes | {"activation_checkpointing": "all"}
    raise _lack_of_memory(
        recipe,
        session.inputs.base.config,
        session.path,
        "one pair at a time is out of memory, with all layers checkpointed",
    )


def _lack_of_memory(
    recipe: Recipe,
    config: Any,
    path: Path,
    found: str,
    smaller: Mapping[str, Any] = MappingProxyType({}),
) -> FitError:
    """Return the error of a run whose memory runs out; its fix is what ``memory`` does not do yet, and ``smaller``."""
    plain = {"checkpoint_offload": True, "mlp_tile": 512, "embedding_on_cpu": True}
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        del plain["embedding_on_cpu"]  # which is refused where it is the output head too
    unused = {
        f"memory.{key}": plain[key]
        for key in plain
        if getattr(recipe.memory, key) in (None, False, "auto")
    }
    settings = {**unused, **smaller}
    begun = any((path / "checkpoints").glob("step-*"))
    going_on = "go on from the last checkpoint" if begun else "begin again"
    return FitError(
        where=f"run {path}",
        found=found,
        fix=Command(
            resume_command(path, settings).line, f", to {going_on}; none of them changes the result"
        )
        if settings
        else "a shorter data.max_length in a new run; checkpoints are kept",
    )


def report_not_finite(
    session: Session, batch: Sequence[TokenizedPair], state: TrainState
) -> Update:
    """Return what to say of a step that was skipped. Raises :class:`DivergedError` at the third in a row."""
    found = f"loss or gradient not finite at step {state.step}"
    if state.bad_in_a_row == BAD_STEPS:
        lower = {"training.learning_rate": session.recipe.training.learning_rate / 2}
        raise DivergedError(
            where=f"run {session.path}",
            found=f"{found}, the {BAD_STEPS}rd in a row",
            fix=Command(
                resume_command(session.path, lower).line,
                ", to go on from the last checkpoint at half the rate",
            ),
        )
    rows = ", ".join(pair.where for pair in batch[:8])
    return Update("note", f"{found}; no update (pairs {rows}{' ...' if len(batch) > 8 else ''})")


@contextmanager
def explain_faults(recipe: Recipe, config: Any, path: Path) -> Iterator[None]:
    """Deterministic kernels where the recipe asks for them; what torch raises in a step, as an error with its fix.

    Only warned of an operation that is not deterministic, FlashAttention's backward pass would stay as it is (torch,
    Context.h).
    """
    deterministic = recipe.training.full_determinism
    if deterministic:
        _make_deterministic(recipe.training.seed)
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            found = f"the GPU is out of memory ({first_line(error)})"
            fewer = {"memory.micro_batch_tokens": max(1, recipe.micro_batch_tokens // 2)}
            if not recipe.memory.packing:
                fewer = {
                    "memory.micro_batch_size": max(1, (recipe.memory.micro_batch_size or 2) // 2)
                }
            raise _lack_of_memory(recipe, config, path, found, fewer) from error
        if not deterministic or "deterministic" not in str(error):
            raise
        found = (
            f"an operation of this model has no deterministic kernel ({str(error).split('.')[0]})"
        )
        raise RecipeError(
            where=f"training.full_determinism ({recipe.sources['training.full_determinism']})",
            found=found,
            fix=Overrides({"training.full_determinism": False}),
        ) from error
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(False)


WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_LAUNCH_BLOCKING": "0"}
"""cuBLAS repeats its sums with 8 workspaces of 4 MiB each as with transformers' 8 of 16 KiB, which leave it slow
kernels only; and it does so without waiting for each kernel (cuBLAS, "Results Reproducibility")."""


def _make_deterministic(seed: int) -> None:
    """Let torch take deterministic kernels only."""
    given = {name: os.environ[name] for name in WORKSPACES if name in os.environ}
    enable_full_determinism(seed)
    os.environ.update(WORKSPACES | given)
