"""Save and load checkpoints. A resumed run gives the same bits as a run without interruption.

A checkpoint holds safetensors and JSON files, and a manifest with the sha256 of each file. It holds
no state of a random generator and no position in the data. Both follow from the number of finished
steps: the data order depends only on (seed, epoch), and dropout is seeded from (seed, step,
micro-batch, process).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.errors import CheckpointError
from orpo_lite.model.adapter import adapter_tensors, set_adapter
from orpo_lite.model.pair_model import VALUE, PairModel
from orpo_lite.runs.atomic import new_folder, sha256, to_json
from orpo_lite.runs.folder import KEPT_CHECKPOINTS
from orpo_lite.runs.records import read_json
from orpo_lite.training.state import TrainState

OPTIMIZER = "optimizer.safetensors"
VALUE_WEIGHTS = "value_model.safetensors"  # of PPO
STATE, MANIFEST = "state.json", "manifest.json"


def save(run: Path, model: PairModel, optimizer: torch.optim.Optimizer, state: TrainState) -> Path:
    """Write ``checkpoints/step-N`` completely or not at all, then remove outdated checkpoints."""
    final = run / "checkpoints" / _name(state.step)
    tensors, scalars = _optimizer_state(optimizer)
    with new_folder(final) as folder:
        save_file(adapter_tensors(model), folder / ADAPTER_WEIGHTS)
        save_file(tensors, folder / OPTIMIZER)
        if model.has_value_model:
            save_file(adapter_tensors(model, VALUE), folder / VALUE_WEIGHTS)
        (folder / STATE).write_text(
            to_json(replace(state, optimizer=scalars).to_json()), encoding="utf-8"
        )
        (folder / MANIFEST).write_text(to_json(_hashes(folder)), encoding="utf-8")
    _rotate(run, state.best_step)
    return final


def find_newest(run: Path) -> tuple[Path, list[str]]:
    """Return the newest valid checkpoint, and the faults of newer checkpoints.

    Raises:
        CheckpointError: there is no valid checkpoint. The run does not start again at step 0.
    """
    faults: list[str] = []
    for folder in reversed(_folders(run)):
        fault = find_fault(folder)
        if fault is None:
            return folder, faults
        faults.append(f"{folder.name}: {fault}")
    raise CheckpointError(
        where=f"run {run}",
        found="no valid checkpoint" + "".join(f"; {fault}" for fault in faults),
        expected="a valid checkpoint from which the run can resume",
        fix="train again with another training.output_dir",
    )


def find_step(run: Path, step: int) -> Path:
    """Return the checkpoint of a step. Raises CheckpointError if it is missing or altered."""
    folder = run / "checkpoints" / _name(step)
    fault = find_fault(folder)
    if fault is not None:
        raise CheckpointError(
            where=str(folder), found=fault, expected="a complete, unaltered checkpoint"
        )
    return folder


def find_fault(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest. Return what is wrong; None if nothing is wrong."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = _hashes(folder)
    except (OSError, ValueError) as error:
        return f"unreadable ({type(error).__name__})"
    files = {ADAPTER_WEIGHTS, OPTIMIZER, STATE}
    if not isinstance(expected, dict) or set(expected) - {VALUE_WEIGHTS} != files:
        return f"{MANIFEST} does not list the files of a checkpoint"
    for name in expected:
        if found.get(name) != expected[name]:
            return f"{name} is missing or altered"
    return None


def restore(folder: Path, model: PairModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load adapter and optimizer from a valid checkpoint, and return the training state.

    Raises:
        CheckpointError: state.json cannot be read.
    """
    state = read_state(folder)
    load_adapter(folder, model)
    if model.has_value_model:
        set_adapter(model, load_file(folder / VALUE_WEIGHTS), VALUE)
    _restore_optimizer(optimizer, load_file(folder / OPTIMIZER), state.optimizer)
    return replace(state, optimizer={})


def read_state(folder: Path) -> TrainState:
    """Return the training state in a checkpoint. Raises CheckpointError if it is unreadable."""
    return TrainState.from_json(read_json(folder / STATE), str(folder / STATE))


def load_adapter(folder: Path, model: PairModel) -> None:
    """Load the adapter of a valid checkpoint into the model, but nothing else."""
    set_adapter(model, load_file(folder / ADAPTER_WEIGHTS))


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[int, int, Tensor]]:
    """Return (number of its group, index in the group, parameter) of each parameter, in order."""
    return [
        (group, index, parameter)
        for group, settings in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(settings["params"])
    ]


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state as tensors (for safetensors) and scalars (for JSON).

    A key is the parameter's number and the entry's name: ``3.exp_avg``.
    """
    tensors, scalars = {}, {}
    for index, (_, _, parameter) in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if name.startswith("qmap"):  # bitsandbytes' code book, a constant
                continue
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, scalars


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    for index, (group, position, parameter) in enumerate(_parameters(optimizer)):
        own_tensors = _entries(tensors, index)
        if not own_tensors:
            continue
        if hasattr(optimizer, "init_state"):
            # bitsandbytes allocates its state itself, perhaps in paged memory.
            optimizer.init_state(optimizer.param_groups[group], parameter, group, position)
            for name, value in own_tensors.items():
                optimizer.state[parameter][name].copy_(value)
        else:
            devices = {"step": torch.device("cpu")}  # torch keeps this entry on the CPU
            optimizer.state[parameter] = {
                name: value.to(devices.get(name, parameter.device))
                for name, value in own_tensors.items()
            }
        optimizer.state[parameter].update(_entries(scalars, index))


def _entries(state: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the entries of parameter ``index`` by name, without the number."""
    prefix = f"{index}."
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _rotate(run: Path, best_step: int | None) -> None:
    """Remove old checkpoints. Keep the newest KEPT_CHECKPOINTS valid ones, and the best one.

    Invalid checkpoints are kept too if they are newer than the oldest of these valid ones.
    """
    best = None if best_step is None else _name(best_step)
    valid = 0
    for folder in reversed(_folders(run)):
        if valid < KEPT_CHECKPOINTS:
            valid += find_fault(folder) is None
        elif folder.name != best:
            shutil.rmtree(folder)
