"""Save the adapter after a training, and define the result that a training returns."""

import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.errors import CheckpointError
from orpo_lite.model.adapter import adapter_tensors
from orpo_lite.model.pair_model import PairModel
from orpo_lite.runs.atomic import new_files, to_json, write_text
from orpo_lite.runs.records import RESULT, Sample
from orpo_lite.training import checkpoint
from orpo_lite.training.session import Session
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update, attempt


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished training."""

    run: Path
    """The run folder."""
    steps: int
    """Number of optimizer steps that were taken."""
    seconds: float
    """Time for loading, training and answering prompts."""
    before: Mapping[str, float]
    """Held-out metrics before the first step; {} without held-out pairs."""
    after: Mapping[str, float]
    """Held-out metrics of the adapter that was kept."""
    kept_step: int
    """The step whose adapter was kept."""
    samples: tuple[Sample, ...]
    """Prompts with the model's answers at each evaluation (``output.samples``)."""
    verdict: Mapping[str, Any] | None = None
    """The content of verdict.json: whether the model got better. None without held-out pairs."""


def keep_best(session: Session, state: TrainState) -> Generator[Update, None, int]:
    """Save the adapter of the best step or the last step. Yield notes; return the saved step.

    The best step is used if ``training.load_best_model_at_end`` is set and its checkpoint is valid.
    """
    kept, path = state.step, session.path
    if session.recipe.training.load_best_model_at_end and state.best_step is not None:
        try:
            checkpoint.load_adapter(checkpoint.find_step(path, state.best_step), session.pair_model)
            kept = state.best_step
        except CheckpointError as error:  # the last step is better than no adapter
            yield Update(
                "note",
                f"the best checkpoint cannot be used ({error.found}): the adapter of the last step "
                "is saved",
            )
    if kept != state.best_step:
        state.after = state.latest
    elif kept == 0:
        yield Update(
            "note",
            "no step was better than the start: "
            "train again with a lower training.learning_rate or with more steps",
        )
    session.processes.on_main(save_adapter, path / "adapter", session.pair_model)
    record = to_json({"steps": state.step, "kept_step": kept})
    if session.processes.is_main:
        yield from attempt(f"{path / RESULT} is not written", write_text, path / RESULT, record)
    session.processes.wait()
    return kept


def save_adapter(folder: Path, model: PairModel) -> None:
    """Write the adapter's weights. The adapter's other files are written before the training."""
    with new_files(folder) as temporary:
        save_file(adapter_tensors(model), temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def write_adapter_config(folder: Path, model: PairModel, base: str) -> None:
    """Write adapter_config.json, the adapter's configuration for peft, before the training."""
    wrapped: Any = model.model
    config = copy.copy(wrapped.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    with new_files(folder) as temporary:
        config.save_pretrained(temporary)
