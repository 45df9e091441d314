"""Create and lock the run folder, write its log, and find its adapter, merged model and base."""

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

from orpo_lite.base.adapter import INITIAL, REFERENCE, REWARD, find_adapter, named_adapters
from orpo_lite.base.download import ADAPTER, ADAPTER_WEIGHTS
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
    """Lock the run folder, so that no other process uses it while the context is open.

    Yield a list of warnings for the user. A warning is in the list if the file system has no locks.
    Another warning is in the list if the file system cannot flush a folder to the disk.

    Raises:
        CheckpointError: another process uses the folder, or it is not writable.
    """
    notes = []
    try:
        stream = (path / ".lock").open("w")
        if not sync(path):
            notes.append(
                f"{path}: the file system cannot flush a folder to the disk; "
                "after a power failure the newest checkpoint may be missing"
            )
    except OSError as error:
        raise CheckpointError(
            where=f"run {path}",
            found=f"cannot be written to ({error.strerror})",
            expected="a writable folder",
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                where=f"run {path}",
                found="is in use by another process",
                expected="one process per run",
                fix="wait until that process ends, or stop it",
            ) from None
        except OSError as error:  # NFS without its lock service, Lustre without -o flock
            notes.append(
                f"{path}: the file system has no locks ({error.strerror}); "
                "do not use this run in another process at the same time"
            )
        yield notes


def is_in_use(path: Path) -> bool:
    """Return whether a process uses a run folder; True too if the file system has no locks."""
    try:
        with (path / ".lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


KEPT_CHECKPOINTS = 2  # number of newest checkpoints; the best one is kept too
FOLDERS: dict[Weights, str] = {"original": "merged", "dequantized": "merged-dequantized"}
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def refuse_existing(recipe: Recipe) -> None:
    """Raise :class:`CheckpointError` if training.output_dir is not empty or cannot be created."""
    path = Path(recipe.training.output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        is_run = (path / "recipe.yaml").is_file()
        found = "already holds a run" if is_run else "exists and is not empty"
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
        raise CheckpointError(
            where=f"training.output_dir: {path}",
            found=f"{parent} is not a writable folder",
            expected="a writable folder",
            fix="training.output_dir=OTHER",
        )


COPIES = {
    "initial_adapter": INITIAL,
    "reference_adapter": REFERENCE,
    "reward_adapter": REWARD,
}
"""Folder of a run with a copy of an adapter that the training reads -> the setting that names it.

A resumed run reads the copies, because the originals may have changed."""


def create(
    recipe: Recipe, lock: Mapping[str, Any], data: Mapping[str, Any], adapters: Mapping[str, Path]
) -> Path:
    """Create the run folder with recipe.yaml, lock.json and data.json, and copy adapters into it.

    Args:
        recipe: the content of recipe.yaml.
        lock: the content of lock.json.
        data: the content of data.json.
        adapters: the result of :func:`find_read_adapters`.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written.
    """
    refuse_existing(recipe)
    path = Path(recipe.training.output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for copy, original in adapters.items():
            with new_folder(path / copy) as folder:
                for name in ADAPTER:
                    shutil.copyfile(original / name, folder / name)
        write_text(path / "data.json", to_json(data))
        write_text(path / "lock.json", to_json(lock))
        # recipe.yaml is written last: it marks the folder as a run.
        write_text(path / "recipe.yaml", recipe.to_yaml())
    except OSError as error:
        raise CheckpointError(
            where=f"training.output_dir: {path}", found=f"cannot be written ({error.strerror})"
        ) from error
    return path


def find_read_adapters(recipe: Recipe, path: Path) -> dict[str, Path]:
    """Return a key of :data:`COPIES` -> the folder of each adapter that the training reads.

    If the run folder ``path`` has a copy of an adapter, the copy's folder is returned.
    """
    names = named_adapters(recipe)
    return {
        copy: path / copy if (path / copy).is_dir() else find_adapter(names[key], key)
        for copy, key in COPIES.items()
        if key in names
    }


def find_finished_adapter(path: Path) -> Path:
    """Return the folder of the trained adapter in a run.

    Raises:
        CheckpointError: there is no trained adapter, or its settings differ from recipe.yaml.
    """
    lora, lock = trained_recipe(path).lora, read_lock(path)
    adapter, resume = path / "adapter", resume_command(path)
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            where=f"run {path}",
            found="has no trained adapter",
            expected="a finished training",
            fix=resume,
        )
    try:
        config = read_json(adapter / "adapter_config.json")
    except CheckpointError as error:
        error.fix = resume
        raise
    fix = resume if {"recipe", "lora"} & lock.keys() else "restore the original file"
    for key in (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
    ):  # these define the scale of the update
        if (config.get(key) or False) != getattr(lora, key):
            raise CheckpointError(
                where=str(adapter / "adapter_config.json"),
                found=f"{key} is {config.get(key)!r}",
                expected=f"{getattr(lora, key)!r}, as in recipe.yaml",
                fix=fix,
            )
    return adapter


def merged_folder(weights: Weights) -> str:
    """Return the folder name of a merged model: "dequantized" -> "merged-dequantized".

    Raise :class:`RecipeError` if ``weights`` is neither "original" nor "dequantized".
    """
    if weights not in FOLDERS:
        raise RecipeError(
            where="--base",
            found=f"{weights!r} is not a choice",
            expected=f"one of {', '.join(FOLDERS)}",
            fix="--base original",
        )
    return FOLDERS[weights]


def find_merged(path: Path, weights: Weights = "original") -> Path:
    """Return the folder of a run's merged model.

    Args:
        path: the run folder.
        weights: the base weights into which the adapter was merged.

    Raises:
        CheckpointError: the merged model is missing or incomplete, or was made from another
            adapter.
    """
    folder = path / merged_folder(weights)
    needed = [folder / "config.json", *weight_files(folder)]
    command = merge_command(path, weights)
    missing = [file.name for file in needed if not file.is_file()]
    if missing:
        found = f"{folder.name}/ has no {missing[0]}"
        raise CheckpointError(
            where=f"run {path}",
            found=found if folder.is_dir() else f"has no {folder.name}/",
            expected="a merged model",
            fix=command,
        )
    record = folder / "merge.json"
    sha = adapter_sha256(path / "adapter") if record.is_file() else None
    if record.is_file() and read_json(record).get("adapter_sha256") != sha:
        raise CheckpointError(
            where=f"run {path}",
            found=f"{folder.name}/ was made from another adapter",
            expected="a merged model of the run's current adapter",
            fix=command,
        )
    return folder


def adapter_sha256(adapter: Path) -> str:
    """Return a hash of an adapter's weights and settings.

    The name and the revision of the adapter's base are ignored.
    """
    config = read_json(adapter / "adapter_config.json")
    used = {
        key: value
        for key, value in config.items()
        if key not in ("base_model_name_or_path", "revision")
    }
    text = json.dumps(used, sort_keys=True) + sha256(adapter / ADAPTER_WEIGHTS)
    return hashlib.sha256(text.encode()).hexdigest()


def find_trained_base(
    path: Path, folder: str | Path | None = None, *, command: str = "merge"
) -> Base:
    """Find the base that a run was trained on, and download its weights if they are not on disk.

    Args:
        path: the run folder.
        folder: the folder that the base was moved to; None if the base was not moved.
        command: the orpo-lite command that the fix of an error suggests, such as "merge".

    Raises:
        ModelError: the base's folder does not exist or holds another base.
        HubError: the weights cannot be downloaded.
    """
    lock, fix = read_lock(path)["base"], f"orpo-lite {command} {quoted(path)} --base-path FOLDER"
    name = lock["name"] if folder is None else str(folder)
    if (folder is not None or lock["revision"] is None) and not Path(name).expanduser().is_dir():
        raise ModelError(
            where="--base-path" if folder is not None else f"the base of run {path}",
            found=f"{name} is not a folder",
            expected="the base that the run was trained on",
            fix=fix,
        )
    base = fetch_weights(find_base(name, "main" if folder else lock["revision"] or "main"))
    if base.fingerprint != lock["fingerprint"]:
        raise ModelError(
            where=f"model {base.name}",
            found=f"is not the base of this run (its fingerprint is {base.fingerprint[:12]}, "
            f"not {lock['fingerprint'][:12]})",
            expected="the weights that the adapter was trained on",
            fix=fix,
        )
    return base


class _Log(logging.FileHandler):
    """A handler for a log file that ignores write errors. If the disk is full, lines are lost."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name in logging
        """Drop the line. logging would print a traceback for each lost line."""

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # the last lines cannot be written
            self.stream = None


@contextmanager
def logged(path: Path) -> Iterator[list[str]]:
    """Write log messages to train.log in the run folder while the context is open.

    Yield a list of warnings for the user. It is empty, unless train.log cannot be written.
    """
    try:
        handler = _Log(path / "train.log", encoding="utf-8")
    except OSError as error:
        file = path / "train.log"
        yield [f"{file} cannot be written ({error.strerror}): the training continues without a log"]
        return
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield []
    finally:
        root.removeHandler(handler)
        handler.close()
