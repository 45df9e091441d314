"""Checkpoints: what a run needs to go on with the very same bits. safetensors and JSON, under a sha256 manifest.

No generator state and no data position are kept: the data order is a function of (seed, epoch), and dropout is seeded
by (seed, step, micro-batch), so the number of finished steps says it all.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orpo_lite.errors import CheckpointError
from orpo_lite.model.adapter import adapter_tensors, set_adapter
from orpo_lite.model.pair_model import PairModel
from orpo_lite.runs.atomic import new_folder, sha256, to_json
from orpo_lite.runs.folder import KEPT_CHECKPOINTS
from orpo_lite.runs.records import read_json
from orpo_lite.training.state import TrainState

ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"


def save(run: Path, model: PairModel, optimizer: torch.optim.Optimizer, state: TrainState) -> Path:
    """Write ``checkpoints/step-N``, complete or not at all, then remove those no longer needed."""
    final = run / "checkpoints" / f"step-{state.step:07d}"
    tensors, scalars = _optimizer_state(optimizer)
    with new_folder(final) as folder:
        save_file(adapter_tensors(model), folder / ADAPTER)
        save_file(tensors, folder / OPTIMIZER)
        (folder / STATE).write_text(
            to_json(replace(state, optimizer=scalars).to_json()), encoding="utf-8"
        )
        (folder / MANIFEST).write_text(to_json(_hashes(folder)), encoding="utf-8")
    _rotate(run, state.best_step)
    return final


def newest(run: Path) -> tuple[Path, list[str]]:
    """The newest valid checkpoint, and what was wrong with those that are newer.

    Raises:
        CheckpointError: there is none; never a silent restart.
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
        expected="a checkpoint to go on from",
        fix="start again under another training.output_dir",
    )


def at_step(run: Path, step: int) -> Path:
    """The checkpoint of one step. Raises :class:`CheckpointError` when it is missing or altered."""
    folder = run / "checkpoints" / f"step-{step:07d}"
    fault = find_fault(folder)
    if fault is not None:
        raise CheckpointError(
            where=str(folder), found=fault, expected="a complete, unaltered checkpoint"
        )
    return folder


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None when all is well."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = _hashes(folder)
    except (OSError, ValueError) as error:
        return f"unreadable ({type(error).__name__})"
    if not isinstance(expected, dict) or set(expected) != {ADAPTER, OPTIMIZER, STATE}:
        return f"{MANIFEST} does not list its files"
    return next(
        (f"{name} is missing or altered" for name in expected if found.get(name) != expected[name]),
        None,
    )


def restore(folder: Path, model: PairModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load a checkpoint that :func:`newest` gave; returns its state. Raises :class:`CheckpointError`."""
    state = read_state(folder)
    load_adapter(folder, model)
    _restore_optimizer(optimizer, load_file(folder / OPTIMIZER), state.optimizer)
    return replace(state, optimizer={})


def read_state(folder: Path) -> TrainState:
    """The state in a checkpoint that :func:`newest` gave. Raises :class:`CheckpointError`."""
    return TrainState.from_json(read_json(folder / STATE), str(folder / STATE))


def load_adapter(folder: Path, model: PairModel) -> None:
    """Load only the adapter of a checkpoint."""
    set_adapter(model, load_file(folder / ADAPTER))


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[int, int, Tensor]]:
    groups = enumerate(optimizer.param_groups)
    return [(g, i, parameter) for g, group in groups for i, parameter in enumerate(group["params"])]


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors for safetensors and scalars for JSON, under "parameter.name"."""
    tensors, scalars = {}, {}
    for index, (_, _, parameter) in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if name.startswith("qmap"):  # bitsandbytes' constant code book
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
        prefix = f"{index}."
        own = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        if not own:
            continue
        if hasattr(
            optimizer, "init_state"
        ):  # bitsandbytes allocates, perhaps in paged memory; fill what it made
            optimizer.init_state(optimizer.param_groups[group], parameter, group, position)
            for name, value in own.items():
                optimizer.state[parameter][name].copy_(value)
        else:  # torch keeps `step` on the CPU
            devices = {"step": torch.device("cpu")}
            optimizer.state[parameter] = {
                n: v.to(devices.get(n, parameter.device)) for n, v in own.items()
            }
        kept = {
            name.removeprefix(prefix): value
            for name, value in scalars.items()
            if name.startswith(prefix)
        }
        optimizer.state[parameter].update(kept)


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _rotate(run: Path, best_step: int | None) -> None:
    """Remove what is older than the newest valid ones, which are in place; the best stays."""
    valid = 0
    for folder in reversed(_folders(run)):
        if (
            valid == KEPT_CHECKPOINTS
            and folder.name != f"step-{-1 if best_step is None else best_step:07d}"
        ):
            shutil.rmtree(folder)
        elif valid < KEPT_CHECKPOINTS and find_fault(folder) is None:
            valid += 1
