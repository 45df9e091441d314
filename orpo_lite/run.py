"""The run folder: the contract between the verbs. Everything written here is complete or absent.

``recipe.yaml`` resolved recipe · ``lock.json`` what was resolved: revisions, versions, hashes, seed · ``data.json`` the
pairs in figures · ``metrics.jsonl`` a line a step · ``samples.jsonl`` answers before and after · ``checkpoints/`` ·
``adapter/`` the result, with tokenizer, template and generation config · ``result.json`` which step it is of ·
``README.md`` the model card · ``merged/`` and ``merged-dequantized/`` whole models · ``export/`` ·
``train.log`` library noise.
"""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError

from orpo_lite.base import Base, fetch_weights, find_base, weight_files
from orpo_lite.errors import FULL, CheckpointError, Command, FitError, ModelError, RecipeError
from orpo_lite.recipe import Recipe, load_recipe

Result = TypeVar("Result")
Weights = Literal["original", "dequantized"]
"""What an adapter is merged into. original: the base's own weights, in 16 bit. dequantized: what 4 bit made of them, in
16 bit again, which is what the adapter was trained on."""
Kinds = Mapping[str, type | UnionType]
"""Keys that must be there, and of what kind their values are; one of None may lack."""
FIGURE = int | float
FOLDERS: dict[Weights, str] = {"original": "merged", "dequantized": "merged-dequantized"}
RESULT = "result.json"
SAMPLES = "samples.jsonl"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Update:
    """One thing that happened; the command line draws it."""

    kind: Literal["stage", "note", "step", "eval"]
    text: str = ""
    step: int = 0
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


def drain(updates: Generator[Update, None, Result], show: Callable[[Update], object]) -> Result:
    """Run a verb to its end, showing each update; returns its result."""
    while True:
        try:
            show(next(updates))
        except StopIteration as end:
            result: Result = end.value
            return result


def staged(text: str, progress: Generator[tuple[int, int], None, Result]) -> Generator[Update, None, Result]:
    """Turn a generator of (done, total) into one of updates of a stage; returns what it returns."""
    while True:
        try:
            done, total = next(progress)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield Update("stage", text, done, total)


def refuse_existing(recipe: Recipe) -> None:
    """Raise :class:`CheckpointError` when the run folder is taken, with the command that goes on; or not writable."""
    path = Path(recipe.training.output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        is_run = (path / "recipe.yaml").is_file()
        found = "holds a run already" if is_run else "exists and is not empty"
        resume = Command(f"orpo-lite train --resume {quoted(path)}", ", or training.output_dir=OTHER")
        fix = resume if is_run else "training.output_dir=OTHER"
        raise CheckpointError(where=f"training.output_dir: {path}", found=found, expected="a new folder", fix=fix)
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


def create(recipe: Recipe, lock: Mapping[str, Any], data: Mapping[str, Any]) -> Path:
    """Make the run folder with its recipe, lock and data figures; returns its path."""
    refuse_existing(recipe)
    path = Path(recipe.training.output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "data.json", to_json(data))
        write_text(path / "lock.json", to_json(lock))
        write_text(path / "recipe.yaml", recipe.to_yaml())  # last: its presence says that a run has begun
    except OSError as error:
        raise CheckpointError(
            where=f"training.output_dir: {path}", found=f"cannot be written ({error.strerror})"
        ) from error
    return path


def read_recipe(path: Path) -> Recipe:
    """The recipe of an existing run. Raises :class:`CheckpointError`."""
    if not (path / "recipe.yaml").is_file():
        is_inside = (path.parent / "recipe.yaml").is_file()
        fix = str(path.parent) if is_inside else "the folder that training.output_dir named"
        raise CheckpointError(
            where=f"run {path}", found="has no recipe.yaml", expected="a folder that `orpo-lite train` made", fix=fix
        )
    return load_recipe(str((path / "recipe.yaml").resolve()))


def read_lock(path: Path) -> dict[str, Any]:
    """The lock.json of an existing run. Raises :class:`CheckpointError`."""
    read_recipe(path)
    file = path / "lock.json"
    lock = read_json(file)
    needed = {"base": ("name", "revision", "path", "fingerprint"), "data": ("name", "sha256")}
    needed["chat_template"] = needed["data"]
    if any(not isinstance(lock.get(part), dict) or not {*keys} <= lock[part].keys() for part, keys in needed.items()):
        raise CheckpointError(
            where=str(file), found="lacks base, data or chat_template", expected="the file that the training wrote"
        )
    licences = lock.get("licences") or {"base": {}, "data": {}}
    refuse_lacking({"licences": licences}, {"licences": dict}, str(file))
    refuse_lacking(licences, {"base": dict, "data": dict}, f"{file}, licences")
    refuse_lacking(licences["data"], dict.fromkeys(licences["data"], dict), f"{file}, licences.data")
    for said in (licences["base"], *licences["data"].values()):
        refuse_lacking(said, dict.fromkeys(said, str | list), f"{file}, licences")
    return lock


def find_result(path: Path) -> Path:
    """The adapter of a training that has ended. Raises :class:`CheckpointError`."""
    lock, recipe = read_lock(path), adapter_shape(read_recipe(path))
    adapter = path / "adapter"
    resume = Command(f"orpo-lite train --resume {quoted(path)}")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            where=f"run {path}", found="has no adapter/", expected="a training that has ended", fix=resume
        )
    refuse_other_shape(path, lock, recipe)
    try:
        config = read_json(adapter / "adapter_config.json")
    except CheckpointError as error:
        error.fix = resume
        raise
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):  # with another scale it would be another adapter
        if (config.get(key) or False) != recipe[key]:
            found, expected = f"{key} is {config.get(key)!r}", f"{recipe[key]!r}, as in recipe.yaml"
            fix = resume if "lora" in lock else "put back the one that was changed"
            raise CheckpointError(where=str(adapter / "adapter_config.json"), found=found, expected=expected, fix=fix)
    return adapter


def adapter_shape(recipe: Recipe) -> dict[str, Any]:
    """What makes other tensors, or another sum of the same ones, of an adapter."""
    return recipe.lora.model_dump(include={"r", "lora_alpha", "use_rslora", "use_dora", "target_modules"})


def refuse_other_shape(path: Path, lock: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` for a recipe that was changed: what is trained is not of that shape."""
    for key, value in lock.get("lora", {}).items():  # which runs of an older version did not note
        if shape[key] != value:
            where, found = f"{path / 'recipe.yaml'}, lora.{key}", f"{shape[key]!r}"
            raise CheckpointError(
                where=where, found=found, expected=f"{value!r}, as the run began", fix="put it back, or train a new run"
            )


def merged_folder(weights: Weights) -> str:
    """Its name in the run. Raises :class:`RecipeError` for other weights than there are."""
    if weights not in FOLDERS:
        raise RecipeError(
            where="--base", found=f"{weights!r}", expected=f"one of {', '.join(FOLDERS)}", fix="--base original"
        )
    return FOLDERS[weights]


def find_merged(path: Path, weights: Weights = "original") -> Path:
    """The merged model of a run, all its files there. Raises :class:`CheckpointError` with the command for it."""
    folder = path / merged_folder(weights)
    needed = [folder / "config.json", *weight_files(folder)]
    command = merge_command(path, weights)
    if lacking := next((file for file in needed if not file.is_file()), None):
        found = f"{folder.name}/ has no {lacking.name}" if folder.is_dir() else f"has no {folder.name}/"
        raise CheckpointError(where=f"run {path}", found=found, expected="a merged model", fix=command)
    record = folder / "merge.json"
    if record.is_file() and read_json(record).get("adapter_sha256") != adapter_sha256(path / "adapter"):
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
    used = {key: value for key, value in config.items() if key not in ("base_model_name_or_path", "revision")}
    text = json.dumps(used, sort_keys=True) + sha256(adapter / "adapter_model.safetensors")
    return hashlib.sha256(text.encode()).hexdigest()


def merge_command(path: Path, weights: Weights = "original") -> Command:
    """The line that merges, to be pasted."""
    return Command(f"orpo-lite merge {quoted(path)}" + f" --base {weights}" * (weights != "original"))


def quoted(path: Path) -> str:
    """A path in a line to be pasted: never taken for an option, and what a screen would change is written as bytes."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    kept = (c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in text)
    return f"$'{''.join(kept)}'"


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_trained_base(path: Path, folder: str | Path | None = None) -> Base:
    """The base that the run was trained on; in ``folder`` where it has been moved since.

    Raises :class:`ModelError` for any other, and as fetch_weights.
    """
    lock, fix = read_lock(path)["base"], f"orpo-lite merge {quoted(path)} --base-path FOLDER"
    name = lock["name"] if folder is None else str(folder)
    if (folder is not None or lock["revision"] is None) and not Path(name).expanduser().is_dir():
        where = "--base-path" if folder is not None else f"the base of run {path}"
        raise ModelError(
            where=where, found=f"{name}: no such folder", expected="the base that it was trained on", fix=fix
        )
    base = fetch_weights(find_base(name, "main" if folder else lock["revision"] or "main"))
    if base.fingerprint != lock["fingerprint"]:
        found = f"is not the base of this run (fingerprint {base.fingerprint[:12]}, was {lock['fingerprint'][:12]})"
        raise ModelError(
            where=f"model {base.name}", found=found, expected="the weights that the adapter was trained on", fix=fix
        )
    return base


def read_json(file: Path, needed: Kinds | None = None) -> dict[str, Any]:
    """A JSON object of the run. Raises :class:`CheckpointError` when it is missing, broken or lacks what is needed."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file), found=f"cannot be read ({error})", expected="a file of a finished save"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(where=str(file), found="is not a JSON object", expected="a file of a finished save")
    refuse_lacking(value, needed or {}, str(file))
    return value


def refuse_lacking(value: Mapping[str, Any], needed: Kinds, where: str) -> None:
    """Raise :class:`CheckpointError` unless each key that is needed holds a value of its kind."""
    for key, kind in needed.items():
        if not isinstance(value.get(key), kind):
            found = f"{key} is {json.dumps(value[key])[:40]}" if key in value else f"lacks {key}"
            raise CheckpointError(
                where=where, found=found, expected="what the training wrote", fix="put it back as it was"
            )


def to_json(value: Mapping[str, Any]) -> str:
    """JSON for people and programs: indented, in the given order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_folder(file.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary sibling to write into; on success it is flushed and takes the place of ``final``, else removed."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        found = "is a link: what it points to would stay, and the link go" if final.is_symlink() else "is a file"
        fix = "move it away; a run whose whole folder is a link may lie on any disk"
        raise CheckpointError(where=str(final), found=found, expected="a folder, or nothing", fix=fix)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (final.with_name(f".{final.name}.{end}") for end in ("tmp", "old"))
    if old.exists() and not final.exists():  # killed between the two renames below
        old.rename(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        sync_folder(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) == errno.EFBIG or "File too large" in str(error):
            fix = "`ulimit -f unlimited`, another disk, or a smaller --max-shard-size"
            raise FitError(where=str(final), found="a file may not grow so large here", fix=fix) from error
        if getattr(error, "errno", 0) in FULL or "No space left" in str(error):
            free = f"{shutil.disk_usage(final.parent).free / 2**20:,.0f} MiB free"
            raise FitError(
                where=str(final), found=f"the disk is full ({free})", fix="free some space; nothing older is lost"
            ) from error
        if isinstance(error, OSError) and error.filename and not str(error.filename).startswith(str(temporary)):
            found = f"cannot be read ({error.strerror})"
            raise CheckpointError(where=str(error.filename), found=found, expected="a file of the run") from error
        raise CheckpointError(
            where=str(final), found=f"cannot be written ({error})", expected="a folder that can be written to"
        ) from error
    finally:
        if old.exists() and not final.exists():
            old.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the folder's names durable, not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run folder for this process. Raises :class:`CheckpointError` when another one has it."""
    try:
        stream = (path / ".lock").open("w")
    except OSError as error:
        raise CheckpointError(
            where=f"run {path}", found=f"cannot be written to ({error.strerror})", expected="a folder of yours"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                where=f"run {path}",
                found="is in use by another process",
                expected="one process a run",
                fix="let it end, or stop it",
            ) from None
        yield


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What libraries log and warn goes to the run's train.log while this lasts."""
    handler = logging.FileHandler(path / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl; a figure that is not finite becomes null, for JSON has no word for it."""
    known = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(known) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, figures or null; [] before the first. Raises :class:`CheckpointError`."""
    return _read_rows(path / "metrics.jsonl", {"step": int}, FIGURE | None)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """All lines of samples.jsonl, which may not be there. Raises :class:`CheckpointError`."""
    return _read_rows(
        path / SAMPLES, {"prompt": str, "before": str, "after": str, "temperature": FIGURE | None}, object
    )


def _read_rows(file: Path, needed: Kinds, others: type | UnionType) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                where=f"{file}:{number}", found=f"cannot be read ({error})", expected="a line as it was written"
            ) from error
        if not isinstance(row, dict):
            raise CheckpointError(
                where=f"{file}:{number}", found="is not a JSON object", expected="a line as it was written"
            )
        refuse_lacking(row, {**dict.fromkeys(row, others), **needed}, f"{file}:{number}")
        rows.append(row)
    return rows


def _lines(file: Path) -> list[str]:
    """Those that end with a line feed: a text in JSON may well hold what else Python takes for the end of a line."""
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file), found=f"cannot be read ({error})", expected="a file of the run"
        ) from error
    return [line for line in text.split("\n") if line.strip()]


def cut_metrics(path: Path, step: int, evaluated: int | None) -> None:
    """Forget what a resumed run will write again: steps after ``step``, evaluations after ``evaluated``."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return
    kept = []
    for line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError:  # cut short by the kill
            break
        last = (-1 if evaluated is None else evaluated) if "eval_loss" in row else step
        if row["step"] <= last:
            kept.append(line)
    write_text(file, "".join(f"{line}\n" for line in kept))
