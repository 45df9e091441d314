"""Read a run's recipe.yaml and lock.json, make lock.json, and compare inputs with lock.json."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orpo_lite import __version__
from orpo_lite.base.find import is_wrapper
from orpo_lite.errors import CheckpointError
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.commands import new_run_command
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.records import check_values, read_json

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe.yaml of a run, which a person may have edited, and apply overrides.

    Raises:
        CheckpointError: the folder is not a run.
        RecipeError: a value is invalid.
    """
    _refuse_no_run(path)
    return load_recipe(str((path / "recipe.yaml").resolve()), overrides)


def _refuse_no_run(path: Path) -> None:
    if not (path / "recipe.yaml").is_file():
        is_inside = (path.parent / "recipe.yaml").is_file()
        raise CheckpointError(
            where=f"run {path}",
            found="has no recipe.yaml" if path.exists() else "no such folder",
            expected="a folder that `orpo-lite train` created",
            fix=str(path.parent) if is_inside else "use the folder in training.output_dir",
        )


def read_lock(path: Path) -> dict[str, Any]:
    """Return the content of lock.json of a run.

    Raises:
        CheckpointError: the folder is not a run, or the file is missing or damaged.
    """
    _refuse_no_run(path)
    file = path / "lock.json"
    lock = read_json(file)
    needed = {
        "base": {"name", "revision", "path", "fingerprint"},
        "data": {"name", "sha256"},
        "chat_template": {"name", "sha256"},
    }
    for part, keys in needed.items():
        if isinstance(lock.get(part), dict) and keys <= lock[part].keys():
            continue
        raise CheckpointError(
            where=str(file),
            found=f"the entry {part} is missing or incomplete",
            expected="the file as the training wrote it",
        )
    licences = lock.get("licences") or {"base": {}, "data": {}}
    check_values({"licences": licences}, {"licences": dict}, str(file))
    check_values(licences, {"base": dict, "data": dict}, f"{file}, licences")
    check_values(licences["data"], dict.fromkeys(licences["data"], dict), f"{file}, licences.data")
    for licence in (licences["base"], *licences["data"].values()):
        check_values(licence, dict.fromkeys(licence, str | list), f"{file}, licences")
    return lock


def with_pinned_base(recipe: Recipe, lock: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the base's revision set to the commit in lock.json.

    The reason is that a branch may have a newer commit now than at the start of the run.
    """
    revision = lock["base"]["revision"]
    return recipe.override({"model.model_revision": revision}) if revision is not None else recipe


def make_lock(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """Return the content of lock.json: package versions, and hashes of base, data and template.

    The versions and hashes identify everything that is needed to repeat the run or to merge the
    adapter of the run.
    """
    return {
        "orpo_lite": __version__,
        "versions": {name: version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "base": {
            "name": inputs.base.name,
            "revision": inputs.base.revision,
            "path": str(inputs.base.path),
            "fingerprint": inputs.base.fingerprint,
            "wrapper": is_wrapper(inputs.base.config),
        },
        "data": {"name": ", ".join(recipe.data.names), "sha256": inputs.figures["sha256"]},
        "tokens": {
            "name": "as tokens",
            "sha256": _sha256(f"{inputs.train.sha256} {inputs.test.sha256}"),
        },
        "chat_template": {
            "name": recipe.data.chat_template,
            "sha256": _sha256(str(inputs.tokenizer.chat_template)),
        },
        "end_token_id": inputs.end_id,
        "seed": recipe.training.seed,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_lock(path: Path, lock: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` if base, template, data or tokens differ from the run's start.

    ``lock`` is the result of :func:`make_lock` for the current inputs. The tokens can differ even
    if the base, template and data are the same. Examples: a library has a new version, or the
    template writes the current date.
    """
    before = read_lock(path)
    pairs = {"base": "fingerprint", "chat_template": "sha256", "data": "sha256", "tokens": "sha256"}
    # Runs of older versions did not record tokens.
    pairs = {what: key for what, key in pairs.items() if what in before}
    differing = [
        "tokens" if what == "tokens" else f"{what} {lock[what]['name']}"
        for what, key in pairs.items()
        if before[what][key] != lock[what][key]
    ]
    if differing:
        raise CheckpointError(
            where=f"run {path}",
            found=f"changed since the run began: {', '.join(differing)}",
            expected="the same base, chat template, data and tokens",
            fix=new_run_command(path, {}),
        )


def refuse_other_pairs(path: Path, inputs: Inputs, fix: str) -> None:
    """Raise :class:`CheckpointError` if the data changed since the training.

    The choice of the held-out pairs depends on all pairs. So if the data changed, the held-out
    pairs could contain pairs that the model was trained on.
    """
    known = read_lock(path)["data"]
    if known["sha256"] and known["sha256"] != inputs.figures["sha256"]:
        raise CheckpointError(
            where=f"run {path}",
            found=f"changed since the run began: data {known['name']}",
            expected="the same pairs as in the training",
            fix=fix,
        )
