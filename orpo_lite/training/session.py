"""Define a session: the objects of a training in memory. Load, restore and save a session."""

import hashlib
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orpo_lite.base.adapter import REWARD, find_adapter, note_on_base, reference_folder
from orpo_lite.base.download import check_disk
from orpo_lite.data.packing import epoch_order, steps_per_epoch
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.data.prepare import step_lengths
from orpo_lite.errors import (
    CheckpointError,
    Command,
    DataError,
    FitError,
    LostProcessError,
    ModelError,
    Overrides,
    RecipeError,
    first_line,
)
from orpo_lite.model.load import choose_dtype, load_pair_model
from orpo_lite.model.memory import checkpoint_first_layers
from orpo_lite.model.optimizer import lr_factor, make_optimizer, whole_steps
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes, describe_processes
from orpo_lite.model.ppo_adapters import add_ppo_adapters
from orpo_lite.model.probe import probe, probe_operations
from orpo_lite.model.sharding import is_sharded
from orpo_lite.objectives.objective import Objective, find_objective
from orpo_lite.ops.devices import device_kind, is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.commands import resume_command
from orpo_lite.runs.folder import KEPT_CHECKPOINTS
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.records import cut_records, read_json
from orpo_lite.training import checkpoint
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update

SMALLER = "smaller_memory.json"
"""File of a run folder: the settings of ``memory`` for a resumed run, after a shortage of memory in
a process that shares the base with others."""


@dataclass
class Session:
    """The objects that all steps of a training share. Only ``recipe`` may be replaced."""

    recipe: Recipe
    """Its section ``memory`` changes when a step runs out of memory."""
    inputs: Inputs
    path: Path
    """The run folder."""
    processes: Processes
    signals: list[int]
    """Numbers of the signals received, such as SIGTERM."""
    objective: Objective
    pair_model: PairModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss if activations are float16; else it does nothing."""
    trained: list[torch.nn.Parameter] = field(init=False)
    """The parameters of the adapter."""
    per_epoch: int = field(init=False)
    """Number of steps in one pass over the training pairs."""
    steps: int = field(init=False)
    """Number of steps in the whole training."""
    eval_every: int = field(init=False)
    """Number of steps from one evaluation to the next."""

    def __post_init__(self) -> None:
        settings = self.recipe.training
        self.trained = [parameter for _, parameter in self.pair_model.trained()]
        self.per_epoch = steps_per_epoch(len(self.inputs.train), settings.global_batch_size)
        self.steps = count_steps(self.recipe, self.inputs)
        self.eval_every = whole_steps(settings.eval_steps, self.steps)
        self._factor = lr_factor(self.recipe, self.optimizer, self.steps)

    def batch(self, step: int) -> list[TokenizedPair]:
        """Return the pairs of a step. The choice depends only on the seed and the step number."""
        settings, pairs = self.recipe.training, self.inputs.train
        epoch, place = divmod(step, self.per_epoch)
        order = epoch_order(len(pairs), seed=settings.seed, epoch=epoch)
        start = place * settings.global_batch_size
        return [pairs[index] for index in order[start : start + settings.global_batch_size]]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return float(self.recipe.training.learning_rate * self._factor(step))

    def warmup_note(self) -> str:
        """Return a note if the warm-up leaves no step at the full learning rate; else ""."""
        settings = self.recipe.training
        warmup = whole_steps(settings.warmup_steps, self.steps)
        highest = max(self.learning_rate(step) for step in range(self.steps))
        if highest == 0:
            fact = f"all {self.steps} steps have learning rate 0 (warm-up): nothing is learnt"
        elif warmup > self.steps:
            fact = (
                f"the warm-up has {warmup} steps, but the training only {self.steps}: the learning "
                f"rate reaches only {highest:.2g} instead of {settings.learning_rate:.2g}"
            )
        else:
            return ""
        return f"{fact}; training.warmup_steps=0 trains without a warm-up"

    def set_memory(self, settings: dict[str, Any]) -> None:
        """Change settings of ``memory`` in recipe and model. Loss and gradient do not change."""
        if settings:
            self.recipe = self.recipe.with_memory(settings)
            checkpoint_first_layers(self.pair_model, self.recipe)


def load_session(
    recipe: Recipe, inputs: Inputs, path: Path, processes: Processes, stop: list[int]
) -> Generator[Update, None, Session]:
    """Load the model, compare this package's step with the model's code, and make the optimizer.

    Yields updates and returns the session.

    Raises:
        FitError: there is not enough memory or disk space.
        ModelError: the model cannot be loaded, or the comparison shows that it cannot be trained.
    """
    if processes.count > 1:
        yield Update("note", describe_processes(processes.count, recipe.memory.shards))
    yield Update("stage", f"loading {inputs.base.name}")
    objective = find_objective(recipe.loss)
    try:
        pair_model = load_pair_model(recipe, inputs.base, processes.device, processes)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        line = resume_command(path).line
        raise FitError(
            where=f"model {inputs.base.name}",
            found=f"the GPU is out of memory while the weights are loaded ({first_line(error)})",
            fix=Command(
                line,
                text=f"end other programs that use the GPU (nvidia-smi lists them), then: {line}",
            ),
        ) from error
    yield Update("stage", "comparing orpo-lite's code with the model's own code")
    if not recipe.memory.packing:
        probe_operations(pair_model)
    else:
        longest = max(
            int(step_lengths(recipe, split)[:, 1:].max(initial=1))
            for split in (inputs.train, inputs.test)
        )
        tokens_of_step = 2 * longest * recipe.training.global_batch_size
        probe(pair_model, longest, min(recipe.micro_batch_tokens, tokens_of_step))
        if is_sharded(pair_model) and pair_model.route not in ("shared", "packed"):
            # The processes have different numbers of sequences, and would wait for each other.
            # Padded rows have no limit of tokens.
            raise ModelError(
                where=f"model {inputs.base.name}",
                found="each sequence goes through this model alone, so processes that share the "
                "base would not run the same number of passes",
                expected="the same number of passes in each process",
                fix=resume_command(
                    path, {"memory.packing": False, "memory.micro_batch_tokens": "auto"}
                ),
            )
        pair_model.drop_output_head()
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
            # The metrics of the steps must not report the probe's peak.
            torch.cuda.reset_peak_memory_stats(processes.device)
    for note in pair_model.notes:
        yield Update("note", note)
    if recipe.loss.type == "ppo":
        yield from _add_ppo(pair_model, recipe, inputs)
    trained = [parameter for _, parameter in pair_model.trained()]
    # A checkpoint holds the adapter and two optimizer states of the adapter's size. Space is needed
    # for the kept checkpoints, the best one, the one being written, and the final adapter.
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
    if note := session.warmup_note():
        yield Update("note", note)
    return session


def _add_ppo(model: PairModel, recipe: Recipe, inputs: Inputs) -> Iterator[Update]:
    """Add the adapters of PPO, and yield notes."""
    reference = reference_folder(recipe)
    reward = find_adapter(str(recipe.loss.reward_adapter_name_or_path))
    for note in note_on_base(reward, inputs.base.name, REWARD):
        yield Update("note", note)
    add_ppo_adapters(model, reward, reference, has_reference=reference is not None)


def count_steps(recipe: Recipe, inputs: Inputs) -> int:
    """Return the number of steps of the whole training."""
    settings = recipe.training
    epochs = settings.num_train_epochs * steps_per_epoch(
        len(inputs.train), settings.global_batch_size
    )
    return settings.max_steps if settings.max_steps > 0 else math.ceil(epochs)


def refuse_other_pairs(recipe: Recipe, inputs: Inputs, processes: Processes) -> None:
    """Raise DataError if the processes of a training have different tokens or held-out pairs.

    Each process reads the data itself, on its own machine. With different pairs, the processes
    would train on different steps without an error.
    """
    digest = hashlib.sha256()
    for pairs in (inputs.train, inputs.test):
        digest.update(pairs.sha256.encode() + pairs.rows.tobytes())
    if not processes.all_equal(int.from_bytes(digest.digest()[:7])):
        raise DataError(
            where=f"data {', '.join(recipe.data.names)}",
            found="the processes have different tokens",
            expected="the same data, tokenizer and chat template on each machine",
            fix="copy the data and the model from one machine to the others",
        )


SAME_EVERYWHERE = ("loss.", "lora.", "quantization.", "training.", "memory.", "output.")
"""Sections that all processes must have alike. Paths of models and data may differ by machine."""


def refuse_other_recipes(recipe: Recipe, processes: Processes) -> None:
    """Raise an error if a process of a training has another recipe than the first one.

    Each process reads the recipe itself, on its own machine. With another seed or learning rate,
    the processes would train on different steps without an error.
    """
    own = {key: value for key, value in recipe.items() if key.startswith(SAME_EVERYWHERE)}
    first = processes.from_main(own)
    others = [key for key in own if own[key] != first[key]]
    if not processes.any(bool(others)):
        return
    if not others:
        raise LostProcessError(
            where="this training",
            found="a process on another machine has another recipe",
            fix="see what was printed there",
        )
    key = others[0]
    raise RecipeError(
        where=recipe.sources[key],
        found=f"{key}={to_text(own[key])} in process {processes.rank}",
        expected=f"{to_text(first[key])}, as in process 0",
        fix=Overrides({key: first[key]}),
    )


def refuse_fewer_steps(recipe: Recipe, inputs: Inputs, path: Path) -> None:
    """Raise CheckpointError if a run has finished more steps than the recipe now asks for."""
    if not any((path / "checkpoints").glob("step-*")):
        return
    folder, _ = checkpoint.find_newest(path)
    done, steps = checkpoint.read_state(folder).step, count_steps(recipe, inputs)
    if done > steps:
        key = "training.max_steps" if recipe.training.max_steps > 0 else "training.num_train_epochs"
        raise CheckpointError(
            where=f"run {path}, {folder.name}",
            found=f"{done} steps are done, but {key} asks for a total of {steps}",
            expected=f"at least {done} steps",
            fix=resume_command(path, {"training.max_steps": done}),
        )


def restore_session(
    session: Session, changed: Mapping[str, Any]
) -> Generator[Update, None, TrainState]:
    """Load the newest valid checkpoint. Yield notes; return the state.

    If the run has no checkpoint, the state is new. If a step ran out of memory, the run reduced
    some ``memory`` settings. The checkpoint stores the reduced values. The reduced values are used
    again, except for the settings in ``changed``.

    ``changed``: ``section.key`` -> value of each setting that the person set when resuming.

    Raises:
        CheckpointError: the run has checkpoints, but none is valid.
    """
    state = TrainState()
    if any((session.path / "checkpoints").glob("step-*")):
        folder, faults = checkpoint.find_newest(session.path)
        for fault in faults:
            yield Update("note", f"checkpoint {fault}; an older checkpoint is used")
        state = checkpoint.restore(folder, session.pair_model, session.optimizer)
        if session.scaler.is_enabled():
            session.scaler.load_state_dict(state.scaler)
    smaller = session.path / SMALLER
    state.memory |= read_json(smaller) if smaller.is_file() else {}
    session.processes.on_main(cut_records, session.path, state.step, state.evaluated_step)
    yield Update("note", f"resuming after step {state.step} of {session.steps}")
    state.memory = {
        key: value for key, value in state.memory.items() if f"memory.{key}" not in changed
    }
    session.set_memory(state.memory)
    return state


def save_checkpoint(session: Session, state: TrainState) -> None:
    """Write a checkpoint of adapter, optimizer, loss scaler and ``state``."""
    scaled = replace(state, scaler=session.scaler.state_dict())
    checkpoint.save(session.path, session.pair_model, session.optimizer, scaled)
