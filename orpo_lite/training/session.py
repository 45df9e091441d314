"""A training in memory: loaded, restored, saved; its batches and its learning rate."""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orpo_lite.base.download import check_disk
from orpo_lite.data.packing import epoch_order, steps_per_epoch
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.data.prepare import pair_lengths
from orpo_lite.errors import CheckpointError, Command, FitError, first_line
from orpo_lite.model.load import choose_dtype, load_pair_model
from orpo_lite.model.memory import checkpoint_first_layers
from orpo_lite.model.optimizer import lr_factor, make_optimizer, whole_steps
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.model.probe import probe, probe_operations
from orpo_lite.objectives.objective import Objective, find_objective
from orpo_lite.ops.devices import device_kind, is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.commands import resume_command
from orpo_lite.runs.folder import KEPT_CHECKPOINTS
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.records import cut_metrics
from orpo_lite.training import checkpoint
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update


@dataclass
class Session:
    """A training in memory: everything that its steps share and do not change, but for ``recipe``."""

    recipe: Recipe
    """Its ``memory`` changes when a step runs out of memory."""
    inputs: Inputs
    path: Path
    """The run folder."""
    processes: Processes
    signals: list[int]
    """Signals received."""
    objective: Objective
    pair_model: PairModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss when activations are float16; else does nothing."""
    trained: list[torch.nn.Parameter] = field(init=False)
    """The parameters of the adapter."""
    per_epoch: int = field(init=False)
    """Steps of one pass over the pairs."""
    steps: int = field(init=False)
    """Steps of the whole training."""
    eval_every: int = field(init=False)

    def __post_init__(self) -> None:
        settings = self.recipe.training
        self.trained = [parameter for _, parameter in self.pair_model.trained()]
        self.per_epoch = steps_per_epoch(len(self.inputs.train), settings.global_batch_size)
        self.steps = count_steps(self.recipe, self.inputs)
        self.eval_every = whole_steps(settings.eval_steps, self.steps)
        self._factor = lr_factor(self.recipe, self.optimizer, self.steps)

    def batch(self, step: int) -> list[TokenizedPair]:
        """Return the pairs of a step: a function of the seed and the step's number alone."""
        settings, pairs = self.recipe.training, self.inputs.train
        epoch, place = divmod(step, self.per_epoch)
        order = epoch_order(len(pairs), seed=settings.seed, epoch=epoch)
        return [
            pairs[i]
            for i in order[
                place * settings.global_batch_size : (place + 1) * settings.global_batch_size
            ]
        ]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return float(self.recipe.training.learning_rate * self._factor(step))

    def warmup_note(self) -> str:
        """Return what to say of a warm-up that leaves no step at the learning rate that was asked for; or ""."""
        settings = self.recipe.training
        warmup = whole_steps(settings.warmup_steps, self.steps)
        highest = max(self.learning_rate(step) for step in range(self.steps))
        if highest == 0:
            said = f"the learning rate is 0 at all {self.steps} steps, which are warm-up: nothing is learnt"
        elif warmup > self.steps:
            said = (
                f"the warm-up takes {warmup} steps and the training has {self.steps}: "
                f"the learning rate reaches {highest:.2g} of {settings.learning_rate:.2g}"
            )
        else:
            return ""
        return f"{said}; training.warmup_steps=0 trains without one"

    def set_memory(self, settings: dict[str, Any]) -> None:
        """Change keys of ``memory``, and the model as they say; loss and gradient stay as they are."""
        if settings:
            self.recipe = self.recipe.with_memory(settings)
            checkpoint_first_layers(self.pair_model, self.recipe)


def load_session(
    recipe: Recipe, inputs: Inputs, path: Path, processes: Processes, stop: list[int]
) -> Generator[Update, None, Session]:
    """Load base and adapter, probe the step on them, make the optimizer. Raises FitError, ModelError."""
    yield Update("stage", f"loading {inputs.base.name}")
    objective = find_objective(recipe.loss)
    try:
        pair_model = load_pair_model(recipe, inputs.base, processes.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        line = resume_command(path).line
        raise FitError(
            where=f"model {inputs.base.name}",
            found=f"the GPU is out of memory before its weights are loaded ({first_line(error)})",
            fix=Command(
                line,
                text=f"end other programs that use the GPU (nvidia-smi lists them), then: {line}",
            ),
        ) from error
    yield Update("stage", "probing the step on this model")
    if not recipe.memory.packing:
        probe_operations(pair_model)
    else:
        longest = max(
            int(pair_lengths(side)[:, 1:].max(initial=1)) for side in (inputs.train, inputs.test)
        )
        probe(
            pair_model,
            longest,
            min(recipe.micro_batch_tokens, 2 * longest * recipe.training.global_batch_size),
        )
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(
                processes.device
            )  # what is reported is the steps' own
    for note in pair_model.notes:
        yield Update("note", note)
    trained = [parameter for _, parameter in pair_model.trained()]
    # A checkpoint holds the adapter and two states of its size; those kept, one being written, and the result.
    adapter_bytes = 4 * sum(parameter.numel() for parameter in trained)
    check_disk(
        path, 3 * adapter_bytes * (KEPT_CHECKPOINTS + 3), f"saving the checkpoints of {path}"
    )
    is_half = choose_dtype(recipe.model.dtype, device_kind(processes.device)) == torch.float16
    scaler = torch.amp.GradScaler(processes.device.type, enabled=is_half)
    optimizer = make_optimizer(recipe, trained)
    session = Session(
        recipe, inputs, path, processes, stop, objective, pair_model, optimizer, scaler
    )
    if said := session.warmup_note():
        yield Update("note", said)
    return session


def count_steps(recipe: Recipe, inputs: Inputs) -> int:
    """Steps of the whole training."""
    settings = recipe.training
    epochs = settings.num_train_epochs * steps_per_epoch(
        len(inputs.train), settings.global_batch_size
    )
    return settings.max_steps if settings.max_steps > 0 else math.ceil(epochs)


def refuse_fewer_steps(recipe: Recipe, inputs: Inputs, path: Path) -> None:
    """Raise :class:`CheckpointError` for a run that has done more steps than it is to have now."""
    if not any((path / "checkpoints").glob("step-*")):
        return
    folder, _ = checkpoint.newest(path)
    done, steps = checkpoint.read_state(folder).step, count_steps(recipe, inputs)
    if done > steps:
        key = "training.max_steps" if recipe.training.max_steps > 0 else "training.num_train_epochs"
        raise CheckpointError(
            where=f"run {path}, {folder.name}",
            found=f"{done} steps are done, and {key} makes it {steps}",
            expected="no fewer than are done",
            fix=resume_command(path, {"training.max_steps": done}),
        )


def restore_session(
    session: Session, changed: Mapping[str, Any]
) -> Generator[Update, None, TrainState]:
    """Go back to the newest valid checkpoint; to the start when the run was stopped before its first one.

    A setting of ``memory`` that a step ran out of memory with gives way to one that is ``changed`` now.
    """
    state = TrainState()
    if any((session.path / "checkpoints").glob("step-*")):
        folder, faults = checkpoint.newest(session.path)
        for fault in faults:
            yield Update("note", f"skipped {fault}")
        state = checkpoint.restore(folder, session.pair_model, session.optimizer)
        if session.scaler.is_enabled():
            session.scaler.load_state_dict(state.scaler)
    session.processes.on_main(cut_metrics, session.path, state.step, state.evaluated_step)
    yield Update("note", f"going on after step {state.step} of {session.steps}")
    state.memory = {
        key: value for key, value in state.memory.items() if f"memory.{key}" not in changed
    }
    session.set_memory(state.memory)
    return state


def save_checkpoint(session: Session, state: TrainState) -> None:
    """Write a checkpoint of what the next steps depend on."""
    scaled = replace(state, scaler=session.scaler.state_dict())
    checkpoint.save(session.path, session.pair_model, session.optimizer, scaled)
