"""Files and folders that are written whole or not at all."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orpo_lite.base.adapter import find_adapter
from orpo_lite.base.download import ADAPTER
from orpo_lite.base.find import Base, fetch_weights, find_base, weight_files
from orpo_lite.errors import CheckpointError, Command, ModelError, RecipeError
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import new_folder, sha256, sync, to_json, write_text
from orpo_lite.runs.changes import trained_recipe
from orpo_lite.runs.commands import Weights, merge_command, quoted, resume_command
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import read_json


@contextmanager
def locked(path: Path) -> Iterator[list[str]]:
    """Hold the run folder for this process; gives notes on what its file system cannot do.

    Raises :class:`CheckpointError` when another process has it.
    """
    notes = []
    try:
        stream = (path / ".lock").open("w")
        if not sync(path):
            found = "its file system does not write names of files to the disk when asked"
            notes.append(
                f"{path}: {found}; after a power failure the newest checkpoint may be missing"
            )
    except OSError as error:
        raise CheckpointError(
            where=f"run {path}",
            found=f"cannot be written to ({error.strerror})",
            expected="a folder of yours",
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                where=f"run {path}",
                found="is in use by another process",
                expected="one process a run",
                fix="let it end, or stop it",
            ) from None
        except OSError as error:  # NFS without its lock service, Lustre without -o flock
            found = f"its file system has no locks ({error.strerror})"
            notes.append(f"{path}: {found}; let no other process use this run meanwhile")
        yield notes


KEPT_CHECKPOINTS = 2  # newest ones; the best one stays besides
FOLDERS: dict[Weights, str] = {"original": "merged", "dequantized": "merged-dequantized"}
RESULT = "result.json"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def refuse_existing(recipe: Recipe) -> None:
    """Raise :class:`CheckpointError` when the run folder is taken, with the command that goes on; or not writable."""
    path = Path(recipe.training.output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        is_run = (path / "recipe.yaml").is_file()
        found = "holds a run already" if is_run else "exists and is not empty"
        resume = Command(resume_command(path).line, ", or training.output_dir=OTHER")
        raise CheckpointError(
            where=f"training.output_dir: {path}",
            found=found,
            expected="a new folder",
            fix=resume if is_run else "training.output_dir=OTHER",
        )
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        found = f"{parent} cannot be written to"
        raise CheckpointError(
            where=f"training.output_dir: {path}",
            found=found,
            expected="a folder of yours",
            fix="training.output_dir=OTHER",
        )


INITIAL = "initial_adapter"


def create(
    recipe: Recipe, lock: Mapping[str, Any], data: Mapping[str, Any], initial: Path | None
) -> Path:
    """Make the run folder with its recipe, lock and data figures, and a copy of the adapter that it begins with.

    The copy is what the run goes on with: where the adapter came from may be gone, or hold another one.
    """
    refuse_existing(recipe)
    path = Path(recipe.training.output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if initial:
            with new_folder(path / INITIAL) as folder:
                for name in ADAPTER:
                    shutil.copyfile(initial / name, folder / name)
        write_text(path / "data.json", to_json(data))
        write_text(path / "lock.json", to_json(lock))
        write_text(
            path / "recipe.yaml", recipe.to_yaml()
        )  # last: its presence says that a run has begun
    except OSError as error:
        raise CheckpointError(
            where=f"training.output_dir: {path}", found=f"cannot be written ({error.strerror})"
        ) from error
    return path


def find_initial_adapter(recipe: Recipe, path: Path) -> Path | None:
    """The folder of the adapter that a run begins with, if it begins with one: its own copy, once there is one."""
    name = recipe.model.adapter_name_or_path
    if name is None:
        return None
    return path / INITIAL if (path / INITIAL).is_dir() else find_adapter(name)


def find_finished_adapter(path: Path) -> Path:
    """The adapter of a training that has ended. Raises :class:`CheckpointError`."""
    lora, lock, adapter, resume = (
        trained_recipe(path).lora,
        read_lock(path),
        path / "adapter",
        resume_command(path),
    )
    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            where=f"run {path}",
            found="has no trained adapter",
            expected="a training that has ended",
            fix=resume,
        )
    try:
        config = read_json(adapter / "adapter_config.json")
    except CheckpointError as error:
        error.fix = resume
        raise
    for key in (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
    ):  # with another scale it would be another adapter
        if (config.get(key) or False) != getattr(lora, key):
            raise CheckpointError(
                where=str(adapter / "adapter_config.json"),
                found=f"{key} is {config.get(key)!r}",
                expected=f"{getattr(lora, key)!r}, as in recipe.yaml",
                fix=resume
                if {"recipe", "lora"} & lock.keys()
                else "put back the one that was changed",
            )
    return adapter


def merged_folder(weights: Weights) -> str:
    """Its name in the run. Raises :class:`RecipeError` for other weights than there are."""
    if weights not in FOLDERS:
        raise RecipeError(
            where="--base",
            found=f"{weights!r}",
            expected=f"one of {', '.join(FOLDERS)}",
            fix="--base original",
        )
    return FOLDERS[weights]


def find_merged(path: Path, weights: Weights = "original") -> Path:
    """The merged model of a run, all its files there. Raises :class:`CheckpointError` with the command for it."""
    folder = path / merged_folder(weights)
    needed = [folder / "config.json", *weight_files(folder)]
    command = merge_command(path, weights)
    if lacking := next((file for file in needed if not file.is_file()), None):
        raise CheckpointError(
            where=f"run {path}",
            found=f"{folder.name}/ has no {lacking.name}"
            if folder.is_dir()
            else f"has no {folder.name}/",
            expected="a merged model",
            fix=command,
        )
    record = folder / "merge.json"
    if record.is_file() and read_json(record).get("adapter_sha256") != adapter_sha256(
        path / "adapter"
    ):
        raise CheckpointError(
            where=f"run {path}",
            found=f"{folder.name}/ is of another adapter",
            expected="a merge of adapter/",
            fix=command,
        )
    return folder


def adapter_sha256(adapter: Path) -> str:
    """Of an adapter's weights and of what says how they are used; not of where its base lies."""
    config = read_json(adapter / "adapter_config.json")
    used = {
        key: value
        for key, value in config.items()
        if key not in ("base_model_name_or_path", "revision")
    }
    text = json.dumps(used, sort_keys=True) + sha256(adapter / "adapter_model.safetensors")
    return hashlib.sha256(text.encode()).hexdigest()


def find_trained_base(path: Path, folder: str | Path | None = None) -> Base:
    """The base that the run was trained on; in ``folder`` where it has been moved since.

    Raises :class:`ModelError` for any other, and as fetch_weights.
    """
    lock, fix = read_lock(path)["base"], f"orpo-lite merge {quoted(path)} --base-path FOLDER"
    name = lock["name"] if folder is None else str(folder)
    if (folder is not None or lock["revision"] is None) and not Path(name).expanduser().is_dir():
        raise ModelError(
            where="--base-path" if folder is not None else f"the base of run {path}",
            found=f"{name}: no such folder",
            expected="the base that it was trained on",
            fix=fix,
        )
    base = fetch_weights(find_base(name, "main" if folder else lock["revision"] or "main"))
    if base.fingerprint != lock["fingerprint"]:
        raise ModelError(
            where=f"model {base.name}",
            found=f"is not the base of this run (fingerprint {base.fingerprint[:12]}, was {lock['fingerprint'][:12]})",
            expected="the weights that the adapter was trained on",
            fix=fix,
        )
    return base


class _Log(logging.FileHandler):
    """A log whose file may fail: a full disk costs lines of it, and no training."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name in logging
        """Drop the line; logging would print a traceback for each."""

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what is still buffered cannot be written
            self.stream = None


@contextmanager
def logged(path: Path) -> Iterator[list[str]]:
    """What libraries log and warn goes to the run's train.log while this lasts; gives a note where it cannot."""
    try:
        handler = _Log(path / "train.log", encoding="utf-8")
    except OSError as error:
        yield [
            f"{path / 'train.log'} cannot be written ({error.strerror}): the training goes on without a log"
        ]
        return
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield []
    finally:
        root.removeHandler(handler)
        handler.close()
