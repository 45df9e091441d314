"""What a run goes on with: the values it began with, and what has been changed since, each with its step.

lock.json holds both, and recipe.yaml the outcome. What is in force is never read from recipe.yaml alone.
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
from orpo_lite.runs.records import refuse_lacking

OUTPUT_DIR = "training.output_dir"

# A step depends on the recipe and on its number, on no hidden state. So each of these has one meaning at any step:
# what it would have there, had the run begun with it.
CHANGEABLE = frozenset(
    ["model.device"]
    + [
        f"training.{key}" for key in ("learning_rate", "lr_scheduler_type", "warmup_steps")
    ]  # how fast
    + [
        f"training.{key}" for key in ("num_train_epochs", "max_steps", "early_stopping_patience")
    ]  # how long
    + [f"training.{key}" for key in ("eval_steps", "load_best_model_at_end", "full_determinism")]
    + [f"memory.{key}" for key in KEYS["memory"]]  # how the step fits, never what it computes
    + [f"output.{key}" for key in KEYS["output"]]  # what follows the last step
)
# Files and folders may lie elsewhere now: fingerprint and hashes in lock.json tell whether they are the same.
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
    """A value that another one took the place of while the run went on."""

    key: str
    """``section.key``, or ``versions.NAME`` of a package."""
    before: Any
    after: Any
    after_step: int
    """Steps that were finished by then: the next one is the first with the new value."""

    def __str__(self) -> str:
        return f"{self.key}: {to_text(self.before)} -> {to_text(self.after)}"


def read_changes(lock: Mapping[str, Any], where: str) -> list[Change]:
    """What lock.json says was changed, in the order of time. Raises :class:`CheckpointError`."""
    refuse_lacking({"changes": lock.get("changes", [])}, {"changes": list}, where)
    changes = []
    for row in lock.get("changes", []):
        refuse_lacking(
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
    """``section.key`` -> value of the recipe that the run began with; keys that came later have their default.

    A run of an older version noted the adapter's shape at most: the rest is what recipe.yaml holds.
    """
    if "recipe" in lock:
        refuse_lacking(lock, {"recipe": dict}, str(path / "lock.json"))
        return {**_DEFAULTS, **lock["recipe"]}
    return dict(read_recipe(path).items()) | {
        f"lora.{key}": value for key, value in lock.get("lora", {}).items()
    }


def values_in_force(path: Path, lock: Mapping[str, Any]) -> dict[str, Any]:
    """``section.key`` -> value that the newest steps of a run were made with."""
    changes = read_changes(lock, str(path / "lock.json"))
    return values_at_start(path, lock) | {
        change.key: change.after for change in changes if is_recipe_key(change.key)
    }


def is_recipe_key(key: str) -> bool:
    """Whether a change is one of the recipe, not of a package's version."""
    return key.partition(".")[0] in KEYS


def trained_recipe(path: Path) -> Recipe:
    """The recipe that a run was trained with, for the verbs that take up its result.

    What ``train --resume`` would take from an edited recipe.yaml has had no effect yet, and is not in it; but for where
    files lie now.

    Raises:
        CheckpointError: recipe.yaml was edited where no run may change; or it is no run.
    """
    recipe = with_absolute_paths(read_recipe(path))
    in_force = values_in_force(path, read_lock(path))
    changed = _find_differing(path, recipe, in_force)
    moved = {key: value for key, value in changed.items() if key in MOVABLE}
    return recipe.override({**_of_schema(in_force), **moved, OUTPUT_DIR: str(path)})


def recipe_to_resume(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run as recipe.yaml and ``overrides`` say, with the folder where the run lies now.

    Raises:
        CheckpointError: no run, or its folder is another one than training.output_dir names.
        RecipeError: a faulty value.
    """
    recipe = read_recipe(path, overrides)
    said, source = recipe.training.output_dir, recipe.sources[OUTPUT_DIR]
    began = values_at_start(path, read_lock(path)) if (path / "lock.json").is_file() else {}
    is_edited = source == "command line" or said != began.get(OUTPUT_DIR, said)
    if is_edited and Path(said).expanduser().resolve() != path.resolve():
        other = quoted(Path(said))
        raise CheckpointError(
            where=_place(path, source),
            found=f"{OUTPUT_DIR}: {said}",
            expected=f"{path}, the folder of the run",
            fix=Command(
                f"cp -r {quoted(path)} {other} && orpo-lite train --resume {other} {OUTPUT_DIR}={other}",
                ", to go on in a copy",
            ),
        )
    return recipe.override({OUTPUT_DIR: str(path)})


def find_changes(path: Path, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """Compare what a run is to go on with and what is in force.

    Returns:
        The whole recipe to go on with, in which what ``recipe`` does not say is as before; and ``section.key`` -> new
        value of what changes.

    Raises:
        CheckpointError: a key differs that may not change, with its place.
    """
    recipe = with_absolute_paths(recipe)
    in_force = values_in_force(path, read_lock(path))
    changed = _find_differing(path, recipe, in_force)
    if recipe.training.max_steps > 0 and "training.num_train_epochs" in changed:
        raise CheckpointError(
            where=_place(path, recipe.sources["training.num_train_epochs"]),
            found=f"training.num_train_epochs: {recipe.training.num_train_epochs} has no effect beside "
            f"training.max_steps: {recipe.training.max_steps}",
            expected="one of them",
            fix=resume_command(path, {**_said_here(recipe, changed), "training.max_steps": -1}),
        )
    return recipe.override({**_of_schema(in_force), **changed, OUTPUT_DIR: str(path)}), changed


def _find_differing(path: Path, recipe: Recipe, in_force: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``recipe`` that are not in force and may change; the others raise :class:`CheckpointError`."""
    changed: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    for key, value in recipe.items():
        is_said = recipe.sources[key] != "default" or value != _DEFAULTS.get(key)
        if (
            key == OUTPUT_DIR
            or key not in in_force
            or not is_said
            or _is_same(key, value, in_force[key])
        ):
            continue
        is_moved = key in MOVABLE and _is_local(value) and _is_local(in_force[key])
        (changed if key in CHANGEABLE or is_moved else refused)[key] = value
    back = {key: in_force[key] for key in refused if recipe.sources[key] != "command line"}
    new = {key: value for key, value in refused.items() if recipe.sources[key] == "command line"}
    go_on, anew = (
        resume_command(path, {**_said_here(recipe, changed), **back}),
        new_run_command(path, new),
    )
    fix = Command(
        go_on.line, text=f"`{go_on.line}` goes on as before; `{anew.line}` trains a new run with it"
    )
    raise_all(
        [
            CheckpointError(
                where=_place(path, recipe.sources[key]),
                found=f"{key}: {to_text(value)}",
                expected=f"{to_text(in_force[key])}, as the run began",
                fix=fix,
            )
            for key, value in refused.items()
        ]
    )
    return changed


def _said_here(recipe: Recipe, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What of the changes stands on the command line, and must stand there again."""
    return {key: value for key, value in changed.items() if recipe.sources[key] == "command line"}


def _is_same(key: str, one: Any, other: Any) -> bool:
    if key in PATHS and isinstance(one, str) and isinstance(other, str):
        return one == other or str(Path(one).expanduser().absolute()) == other
    return bool(json.loads(json.dumps(one)) == other)


def _is_local(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and is_path(name) and "{" not in name for name in names)


def _of_schema(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose keys this version knows."""
    known = {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
    return {key: value for key, value in values.items() if key in known}


def _place(path: Path, source: str) -> str:
    """Where a value stands; the recipe of the run by its path."""
    return {"default": "recipe"}.get(
        source, str(path / source) if source.startswith("recipe.yaml:") else source
    )


def record_changes(
    path: Path, recipe: Recipe, changed: Mapping[str, Any], lock: Mapping[str, Any], step: int
) -> None:
    """Write down that a run goes on after ``step`` with changed values, and with the packages of ``lock``.

    Whatever was changed at a later step is in force from ``step`` on too: the steps between are made again.

    recipe.yaml is written first: a process that is killed between the two finds the change there again.
    """
    old = read_lock(path)
    began, known = values_at_start(path, old), read_changes(old, str(path / "lock.json"))
    in_force = values_in_force(path, old)
    new = [Change(key, in_force[key], value, step) for key, value in changed.items()]
    new += [
        Change(key, before, after, step)
        for key, (before, after) in other_versions(path, old, lock).items()
    ]
    changes = _merged(
        [*(replace(change, after_step=min(change.after_step, step)) for change in known), *new]
    )
    written = recipe.override({OUTPUT_DIR: in_force[OUTPUT_DIR]})
    if read_recipe(path).model_dump() != written.model_dump():
        write_text(path / "recipe.yaml", written.to_yaml())
    # Base, data and template are the same by their hashes, and may lie elsewhere now.
    moved = {
        part: lock[part]
        for part in ("base", "data", "chat_template")
        if old[part].get("revision") is None
    }
    updated = {**old, **moved, "recipe": began, "changes": [asdict(change) for change in changes]}
    if updated != old:
        write_text(path / "lock.json", to_json(updated))


def _merged(changes: Iterable[Change]) -> list[Change]:
    """One change of a key at a step: the first value before, the last one after; none where they are the same."""
    found: dict[tuple[str, int], Change] = {}
    for change in changes:
        place = (change.key, change.after_step)
        found[place] = replace(found.get(place, change), after=change.after)
    return [change for change in found.values() if change.before != change.after]


def other_versions(
    path: Path, old: Mapping[str, Any], lock: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """``versions.NAME`` -> the version in force and that of now, of each package that is another one."""
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
