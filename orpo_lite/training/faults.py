"""Handle a step that runs out of memory, has a non-finite loss, or lacks a deterministic kernel."""

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
from orpo_lite.errors import (
    Command,
    DivergedError,
    FitError,
    LostProcessError,
    Overrides,
    RecipeError,
    first_line,
)
from orpo_lite.ops.devices import is_lost, is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.commands import resume_command
from orpo_lite.training.session import SMALLER, Session
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update

BAD_STEPS = 3  # a run ends after so many steps in a row with a non-finite loss or gradient
MAX_ROWS = 8  # maximum number of pairs that a note names


def shrink_memory(session: Session, batch: Sequence[TokenizedPair]) -> dict[str, Any]:
    """Return new ``memory`` settings for a step that ran out of memory.

    The micro-batches become smaller. If each micro-batch has only one pair already, all layers are
    checkpointed instead.

    Raises:
        FitError: each micro-batch has only one pair, and all layers are checkpointed already.
    """
    recipe, model = session.recipe, session.pair_model
    memory = recipe.memory
    batching = model.batching(recipe, session.inputs.pad_id)
    pairs = max(len(chunk) for chunk in micro_batches(batch, batching))
    settings: dict[str, Any] = {"activation_checkpointing": memory.activation_checkpointing}
    if pairs > 1:
        return settings | {
            "micro_batch_tokens": max(1, recipe.micro_batch_tokens // 2),
            "micro_batch_size": pairs // 2,
        }
    if model.checkpointed < len(model.layers):
        sizes = {"micro_batch_tokens": memory.micro_batch_tokens, "micro_batch_size": 1}
        return sizes | {"activation_checkpointing": "all"}
    raise _out_of_memory(
        recipe,
        session.inputs.base.config,
        session.path,
        "out of memory with one pair at a time and all layers checkpointed",
    )


def keep_smaller_settings(
    session: Session, batch: Sequence[TokenizedPair], state: TrainState
) -> FitError:
    """Return the error of a step that ran out of memory in a process that shares the base.

    The other processes wait for this one inside a pass, so the step cannot be repeated, and the
    launcher ends them. The smaller settings are written to the run folder, and a resumed run reads
    them.
    """
    settings = shrink_memory(session, batch)
    write_text(session.path / SMALLER, to_json(settings))
    return FitError(
        where=f"run {session.path}, step {state.step + 1}, process {session.processes.rank}",
        found="out of memory; processes that share the base cannot repeat a step",
        expected="smaller micro-batches, which a resumed run uses",
        fix=Command(resume_command(session.path).line, ", to resume from the last checkpoint"),
    )


def _out_of_memory(
    recipe: Recipe,
    config: Any,
    path: Path,
    found: str,
    smaller: Mapping[str, Any] = MappingProxyType({}),
) -> FitError:
    """Return the error of a run that is out of memory.

    The error's fix is to resume with more memory-saving settings. These are the settings that the
    run does not use yet, and the settings in ``smaller``.
    """
    saving = {"checkpoint_offload": True, "mlp_tile": 512, "embedding_on_cpu": True}
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        del saving["embedding_on_cpu"]  # refused for an embedding that is also the output head
    unused = {
        f"memory.{key}": value
        for key, value in saving.items()
        if getattr(recipe.memory, key) in (None, False, "auto")
    }
    settings = {**unused, **smaller}
    fix = "start a new run with a smaller data.max_length; this run's checkpoints are kept"
    if settings:
        has_checkpoint = any((path / "checkpoints").glob("step-*"))
        start = "to resume from the last checkpoint" if has_checkpoint else "to start again"
        fix = Command(
            resume_command(path, settings).line,
            f", {start}; these settings do not change the result",
        )
    return FitError(where=f"run {path}", found=found, fix=fix)


def report_not_finite(
    session: Session, batch: Sequence[TokenizedPair], state: TrainState
) -> Update:
    """Return a note on a step that was skipped because its loss or gradient was not finite.

    Raises:
        DivergedError: this is the third such step in a row.
    """
    found = f"loss or gradient is not finite at step {state.step}"
    if state.bad_in_a_row == BAD_STEPS:
        lower = {"training.learning_rate": session.recipe.training.learning_rate / 2}
        raise DivergedError(
            where=f"run {session.path}",
            found=f"{found}, the {BAD_STEPS}rd such step in a row",
            fix=Command(
                resume_command(session.path, lower).line,
                ", to resume from the last checkpoint with half the learning rate",
            ),
        )
    rows = ", ".join(pair.where for pair in batch[:MAX_ROWS])
    more = " ..." if len(batch) > MAX_ROWS else ""
    return Update("note", f"{found}: the step is skipped (pairs {rows}{more})")


@contextmanager
def explain_faults(recipe: Recipe, config: Any, path: Path, device: torch.device) -> Iterator[None]:
    """Turn errors that torch raises inside the ``with`` block into errors with a fix.

    If ``training.full_determinism`` is set, only deterministic kernels run inside the block. An
    operation without a deterministic kernel raises an error. torch's option ``warn_only`` is not
    used: it would make FlashAttention's backward pass non-deterministic (torch, Context.h).
    """
    deterministic = recipe.training.full_determinism
    if deterministic:
        _make_deterministic(recipe.training.seed)
    try:
        yield
    except RuntimeError as error:
        if is_lost(error):
            raise LostProcessError(
                where=f"run {path}",
                found="another process of the training ended",
                fix=Command(resume_command(path).line, ", with the same launcher"),
            ) from error
        if is_out_of_memory(error):
            found = f"out of memory on {device.type} ({first_line(error)})"
            smaller = {"memory.micro_batch_tokens": max(1, recipe.micro_batch_tokens // 2)}
            if not recipe.memory.packing:
                pairs = recipe.memory.micro_batch_size or 2
                smaller = {"memory.micro_batch_size": max(1, pairs // 2)}
            raise _out_of_memory(recipe, config, path, found, smaller) from error
        if not deterministic or "deterministic" not in str(error):
            raise
        reason = str(error).split(".")[0]
        raise RecipeError(
            where=f"training.full_determinism ({recipe.sources['training.full_determinism']})",
            found=f"an operation of this model has no deterministic kernel ({reason})",
            fix=Overrides({"training.full_determinism": False}),
        ) from error
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(False)


WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_LAUNCH_BLOCKING": "0"}
"""Environment variables with which cuBLAS is deterministic (cuBLAS, "Results Reproducibility").

transformers sets other values. With them, cuBLAS has 8 workspaces of 16 KiB and can use only slow
kernels, and the host waits for each kernel. With the values here, cuBLAS has 8 workspaces of 4 MiB
and the host does not wait. The results are deterministic too.
"""


def _make_deterministic(seed: int) -> None:
    """Make torch use only deterministic kernels. Environment variables already set are kept."""
    given = {name: os.environ[name] for name in WORKSPACES if name in os.environ}
    enable_full_determinism(seed)
    os.environ.update(WORKSPACES | given)
