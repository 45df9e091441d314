"""Read and record changes of a run's recipe: the values at its start, and each later change.

lock.json holds both. recipe.yaml holds the current values, but a person may have edited it, so the
values in force are never read from recipe.yaml alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orpo_lite.data.sources.source import is_path
from orpo_lite.errors import CheckpointError, Command, raise_all
from orpo_lite.recipe.schema import KEYS, SECTIONS, Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.commands import new_run_command, quoted, resume_command
from orpo_lite.runs.inputs import with_absolute_paths
from orpo_lite.runs.lock import read_lock, read_recipe
from orpo_lite.runs.records import check_values

OUTPUT_DIR = "training.output_dir"

# A step depends on the recipe and on its number, not on hidden state. So each of these keys can
# change at any step: it then acts as if the run had begun with the new value.
CHANGEABLE = frozenset(
    ["model.device"]
    + [
        f"training.{key}" for key in ("learning_rate", "lr_scheduler_type", "warmup_steps")
    ]  # learning rate
    + [
        f"training.{key}" for key in ("num_train_epochs", "max_steps", "early_stopping_patience")
    ]  # length of the training
    + [f"training.{key}" for key in ("eval_steps", "load_best_model_at_end", "full_determinism")]
    + ["training.report_to"]
    + [f"memory.{key}" for key in KEYS["memory"]]  # memory use, never results
    + [f"output.{key}" for key in KEYS["output"]]  # after the last step
)
# Files and folders may have moved. The fingerprint and hashes in lock.json show whether they are
# the same.
MOVABLE = frozenset(
    (
        "model.model_name_or_path",
        "data.dataset_name",
        "data.dataset_test_split",
        "data.chat_template",
    )
)
PATHS = MOVABLE | {"model.adapter_name_or_path"}


@dataclass(frozen=True)
class Change:
    """A value that was replaced when the run was resumed."""

    key: str
    """``section.key``, or ``versions.NAME`` of a package."""
    before: Any
    after: Any
    after_step: int
    """Number of steps finished by then. The next step is the first with the new value."""

    def __str__(self) -> str:
        return f"{self.key}: {to_text(self.before)} -> {to_text(self.after)}"


def read_changes(lock: Mapping[str, Any], where: str) -> list[Change]:
    """Return the changes recorded in lock.json, oldest first.

    Raises:
        CheckpointError: a record is damaged.
    """
    check_values({"changes": lock.get("changes", [])}, {"changes": list}, where)
    changes = []
    for row in lock.get("changes", []):
        check_values(
            row if isinstance(row, dict) else {},
            {"key": str, "after_step": int},
            f"{where}, changes",
        )
        changes.append(Change(row["key"], row.get("before"), row.get("after"), row["after_step"]))
    return changes


_DEFAULTS: dict[str, Any] = {
    f"{name}.{key}": field.default
    for name, section in SECTIONS.items()
    for key, field in section.model_fields.items()
    if not field.is_required()
}


def values_at_start(path: Path, lock: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``section.key`` -> value at the start of the run. Keys of later versions have
    defaults.

    Runs of older versions recorded at most the adapter's shape; the rest is read from recipe.yaml.
    """
    if "recipe" in lock:
        check_values(lock, {"recipe": dict}, str(path / "lock.json"))
        return {**_DEFAULTS, **lock["recipe"]}
    return dict(read_recipe(path).items()) | {
        f"lora.{key}": value for key, value in lock.get("lora", {}).items()
    }


def values_in_force(path: Path, lock: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``section.key`` -> value used for the newest steps of a run."""
    changes = read_changes(lock, str(path / "lock.json"))
    return values_at_start(path, lock) | {
        change.key: change.after for change in changes if is_recipe_key(change.key)
    }


def is_recipe_key(key: str) -> bool:
    """Return whether a change's key is a recipe key, not a package version."""
    return key.partition(".")[0] in KEYS


def trained_recipe(path: Path) -> Recipe:
    """Return the recipe that a run was trained with, for commands that use its result.

    Edits of recipe.yaml that only ``train --resume`` would apply are left out, except new locations
    of files.

    Raises:
        CheckpointError: a key that may not change was edited in recipe.yaml, or the folder is not a
            run.
    """
    recipe = with_absolute_paths(read_recipe(path))
    in_force = values_in_force(path, read_lock(path))
    changed = _find_differing(path, recipe, in_force)
    moved = {key: value for key, value in changed.items() if key in MOVABLE}
    return recipe.override({**_known_keys(in_force), **moved, OUTPUT_DIR: str(path)})


def recipe_to_resume(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe from recipe.yaml and ``overrides``, with ``path`` as its output folder.

    Raises:
        CheckpointError: the folder is not a run, or an edited training.output_dir names another
            folder.
        RecipeError: a value is invalid.
    """
    recipe = read_recipe(path, overrides)
    output_dir, source = recipe.training.output_dir, recipe.sources[OUTPUT_DIR]
    began = values_at_start(path, read_lock(path)) if (path / "lock.json").is_file() else {}
    is_edited = source == "command line" or output_dir != began.get(OUTPUT_DIR, output_dir)
    if is_edited and Path(output_dir).expanduser().resolve() != path.resolve():
        other = quoted(Path(output_dir))
        raise CheckpointError(
            where=_place(path, source),
            found=f"{OUTPUT_DIR}: {output_dir}",
            expected=f"{path}, the folder of the run",
            fix=Command(
                f"cp -r {quoted(path)} {other} && "
                f"orpo-lite train --resume {other} {OUTPUT_DIR}={other}",
                ", to continue in a copy",
            ),
        )
    return recipe.override({OUTPUT_DIR: str(path)})


def find_changes(path: Path, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """Compare the recipe that a run is resumed with and the values in force.

    Returns:
        The complete recipe to resume with, and ``section.key`` -> new value of each change. Keys
        that ``recipe`` does not set keep the values of the run.

    Raises:
        CheckpointError: a key differs that may not change.
    """
    recipe = with_absolute_paths(recipe)
    in_force = values_in_force(path, read_lock(path))
    changed = _find_differing(path, recipe, in_force)
    if recipe.training.max_steps > 0 and "training.num_train_epochs" in changed:
        raise CheckpointError(
            where=_place(path, recipe.sources["training.num_train_epochs"]),
            found=f"training.num_train_epochs: {recipe.training.num_train_epochs} has no effect, "
            f"because training.max_steps is {recipe.training.max_steps}",
            expected="only one of the two",
            fix=resume_command(path, {**_given_here(recipe, changed), "training.max_steps": -1}),
        )
    return recipe.override({**_known_keys(in_force), **changed, OUTPUT_DIR: str(path)}), changed


def _find_differing(path: Path, recipe: Recipe, in_force: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``recipe`` that differ from those in force and may change.

    Raises:
        CheckpointError: a value differs that may not change.
    """
    changed: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    for key, value in recipe.items():
        if key == OUTPUT_DIR or key not in in_force:
            continue
        is_set = recipe.sources[key] != "default" or value != _DEFAULTS.get(key)
        if not is_set or _is_same(key, value, in_force[key]):
            continue
        is_moved = key in MOVABLE and _is_local(value) and _is_local(in_force[key])
        if key in CHANGEABLE or is_moved:
            changed[key] = value
        else:
            refused[key] = value
    back = {key: in_force[key] for key in refused if recipe.sources[key] != "command line"}
    new = {key: value for key, value in refused.items() if recipe.sources[key] == "command line"}
    resume = resume_command(path, {**_given_here(recipe, changed), **back})
    anew = new_run_command(path, new)
    text = f"`{resume.line}` continues as before; `{anew.line}` trains a new run with this value"
    fix = Command(resume.line, text=text)
    raise_all(
        [
            CheckpointError(
                where=_place(path, recipe.sources[key]),
                found=f"{key}: {to_text(value)}",
                expected=f"{to_text(in_force[key])}, as at the start of the run",
                fix=fix,
            )
            for key, value in refused.items()
        ]
    )
    return changed


def _given_here(recipe: Recipe, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that were given on the command line, for the command to repeat."""
    return {key: value for key, value in changed.items() if recipe.sources[key] == "command line"}


def _is_same(key: str, one: Any, other: Any) -> bool:
    if key in PATHS and isinstance(one, str) and isinstance(other, str):
        return one == other or str(Path(one).expanduser().absolute()) == other
    return bool(json.loads(json.dumps(one)) == other)


def _is_local(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and is_path(name) and "{" not in name for name in names)


def _known_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values whose keys this version has."""
    known = {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
    return {key: value for key, value in values.items() if key in known}


def _place(path: Path, source: str) -> str:
    """Return where a value is set, for messages; the recipe of the run is given by its path."""
    if source == "default":
        return "recipe"
    return str(path / source) if source.startswith("recipe.yaml:") else source


def record_changes(
    path: Path, recipe: Recipe, changed: Mapping[str, Any], lock: Mapping[str, Any], step: int
) -> None:
    """Record that a run continues after ``step`` with changed values and the packages of ``lock``.

    If a change was recorded at a later step, the steps between are run again, so it now applies
    from ``step`` on.

    recipe.yaml is written first. If the process is killed before lock.json is written, the next
    process finds the change in recipe.yaml again.
    """
    old = read_lock(path)
    began, known = values_at_start(path, old), read_changes(old, str(path / "lock.json"))
    in_force = values_in_force(path, old)
    new = [Change(key, in_force[key], value, step) for key, value in changed.items()]
    new += [
        Change(key, before, after, step)
        for key, (before, after) in other_versions(path, old, lock).items()
    ]
    if old.get("dtype") not in (None, lock["dtype"]):
        new.append(Change("dtype", old["dtype"], lock["dtype"], step))
    earlier = [replace(change, after_step=min(change.after_step, step)) for change in known]
    changes = _merged([*earlier, *new])
    written = recipe.override({OUTPUT_DIR: in_force[OUTPUT_DIR]})
    if read_recipe(path).model_dump() != written.model_dump():
        write_text(path / "recipe.yaml", written.to_yaml())
    # The hashes show that base, data and template are the same, but they may have moved.
    moved = {
        part: lock[part]
        for part in ("base", "data", "chat_template")
        if old[part].get("revision") is None
    }
    # Both depend on the device, which may be another one now.
    for part in ("dtype", "not_quantised"):
        if part in old:
            moved[part] = lock[part]
    updated = {**old, **moved, "recipe": began, "changes": [asdict(change) for change in changes]}
    if updated != old:
        write_text(path / "lock.json", to_json(updated))


def _merged(changes: Iterable[Change]) -> list[Change]:
    """Return one change for each key and step, from the first value before to the last one after.

    Changes without effect are left out.
    """
    found: dict[tuple[str, int], Change] = {}
    for change in changes:
        place = (change.key, change.after_step)
        found[place] = replace(found.get(place, change), after=change.after)
    return [change for change in found.values() if change.before != change.after]


def other_versions(
    path: Path, old: Mapping[str, Any], lock: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return ``versions.NAME`` -> (version in force, current version) of packages that differ."""
    in_force, now = _versions(old), _versions(lock)
    in_force |= {
        c.key: c.after for c in read_changes(old, str(path / "lock.json")) if c.key in in_force
    }
    return {
        key: (in_force[key], now[key])
        for key in in_force
        if key in now and in_force[key] != now[key]
    }


def _versions(lock: Mapping[str, Any]) -> dict[str, str]:
    known = {f"versions.{name}": version for name, version in lock.get("versions", {}).items()}
    return known | ({"versions.orpo-lite": lock["orpo_lite"]} if "orpo_lite" in lock else {})
