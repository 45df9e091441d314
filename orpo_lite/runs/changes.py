"""Read and record how the recipe of a run was changed by `train --resume`.

lock.json holds the values at the start of the run and each later change. recipe.yaml holds the
current values. recipe.yaml alone is not enough, because a person may have edited it.
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

# Keys that may change at any step. A step depends only on the recipe and on the number of the step.
# So it has the same settings as in a run that began with the new value.
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
    + [f"memory.{key}" for key in KEYS["memory"]]  # they change memory use, never the results
    + [f"output.{key}" for key in KEYS["output"]]  # used after the last step
)
# Keys whose files and folders may have moved. The fingerprint and hashes in lock.json show whether
# the content is still the same.
MOVABLE = frozenset(
    (
        "model.model_name_or_path",
        "data.dataset_name",
        "data.dataset_test_split",
        "data.chat_template",
    )
)
PATHS = MOVABLE | {
    "model.adapter_name_or_path",
    "loss.reference_adapter_name_or_path",
    "loss.reward_adapter_name_or_path",
}


@dataclass(frozen=True)
class Change:
    """A value of a run that changed when the run was resumed."""

    key: str
    """``section.key`` of the recipe, ``versions.NAME`` of a package, or ``dtype``."""
    before: Any
    after: Any
    after_step: int
    """Number of steps before the change. The next step is the first step with the new value."""

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
    """Return ``section.key`` -> value at the start of a run.

    The values are in lock.json. A key that is newer than the run has its default value.
    In old runs, lock.json has only the section lora or no values at all. The missing values are
    then read from recipe.yaml.

    ``path``: the run folder. ``lock``: the content of its lock.json.
    """
    if "recipe" in lock:
        check_values(lock, {"recipe": dict}, str(path / "lock.json"))
        return {**_DEFAULTS, **lock["recipe"]}
    return dict(read_recipe(path).items()) | {
        f"lora.{key}": value for key, value in lock.get("lora", {}).items()
    }


def values_in_force(path: Path, lock: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``section.key`` -> value after all changes of a run: the value in the newest step."""
    changes = read_changes(lock, str(path / "lock.json"))
    return values_at_start(path, lock) | {
        change.key: change.after for change in changes if is_recipe_key(change.key)
    }


def is_recipe_key(key: str) -> bool:
    """Return True for a recipe key (``lora.r``), False for ``versions.torch`` or ``dtype``."""
    return key.partition(".")[0] in KEYS


def trained_recipe(path: Path) -> Recipe:
    """Return the recipe that a run was trained with, for commands that use the trained adapter.

    recipe.yaml may have been edited after the training. If the base, the data or the template was
    moved, the result has the new path. Other edits, such as a new learning rate, are ignored here.

    Raises:
        CheckpointError: the folder is not a run, or recipe.yaml has a new value for a key that must
            not change.
    """
    recipe = with_absolute_paths(read_recipe(path))
    in_force = values_in_force(path, read_lock(path))
    changed = _find_differing(path, recipe, in_force)
    moved = {key: value for key, value in changed.items() if key in MOVABLE}
    return recipe.override({**_known_keys(in_force), **moved, OUTPUT_DIR: str(path)})


def recipe_to_resume(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a run from its recipe.yaml, and apply overrides.

    In the result, training.output_dir is ``path``, even if the run folder was moved.

    Args:
        path: the run folder.
        overrides: texts "section.key=value".

    Raises:
        CheckpointError: the folder is not a run, or training.output_dir was set to another folder.
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
    """Compare ``recipe`` with the values of a run's newest step. Call this before a resume.

    Returns:
        The recipe with which the run is resumed, and ``section.key`` -> new value for each changed
        key. If ``recipe`` does not set a key, the value of the run is kept.

    Raises:
        CheckpointError: a key that must not change has a new value, or a new num_train_epochs has
            no effect because max_steps is set.
    """
    recipe = with_absolute_paths(recipe)
    in_force = values_in_force(path, read_lock(path))
    changed = _find_differing(path, recipe, in_force)
    if recipe.training.max_steps > 0 and "training.num_train_epochs" in changed:
        raise CheckpointError(
            where=_place(path, recipe.sources["training.num_train_epochs"]),
            found=f"training.num_train_epochs: {recipe.training.num_train_epochs} has no effect, "
            f"because training.max_steps is {recipe.training.max_steps}",
            expected="only one of the two keys",
            fix=resume_command(path, {**_given_here(recipe, changed), "training.max_steps": -1}),
        )
    return recipe.override({**_known_keys(in_force), **changed, OUTPUT_DIR: str(path)}), changed


def _find_differing(path: Path, recipe: Recipe, in_force: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``recipe`` that differ from ``in_force``.

    Raises:
        CheckpointError: a key that must not change has a new value.
    """
    changed: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    sources = recipe.sources
    for key, value in recipe.items():
        if key == OUTPUT_DIR or key not in in_force:
            continue
        is_set = sources[key] != "default" or value != _DEFAULTS.get(key)
        if not is_set or _is_same(key, value, in_force[key]):
            continue
        is_moved = key in MOVABLE and _is_local(value) and _is_local(in_force[key])
        if key in CHANGEABLE or is_moved:
            changed[key] = value
        else:
            refused[key] = value
    back = {key: in_force[key] for key in refused if sources[key] != "command line"}
    new = {key: value for key, value in refused.items() if sources[key] == "command line"}
    resume = resume_command(path, {**_given_here(recipe, changed), **back})
    anew = new_run_command(path, new)
    text = (
        f"`{resume.line}` continues without the change; "
        f"`{anew.line}` trains a new run with the changed value"
    )
    fix = Command(resume.line, text=text)
    raise_all(
        [
            CheckpointError(
                where=_place(path, sources[key]),
                found=f"{key}: {to_text(value)}",
                expected=f"{to_text(in_force[key])}, as at the start of the run",
                fix=fix,
            )
            for key, value in refused.items()
        ]
    )
    return changed


def _given_here(recipe: Recipe, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changed values from the command line, which the command in a fix repeats."""
    return {key: value for key, value in changed.items() if recipe.sources[key] == "command line"}


def _is_same(key: str, one: Any, other: Any) -> bool:
    if key in PATHS and isinstance(one, str) and isinstance(other, str):
        return one == other or str(Path(one).expanduser().absolute()) == other
    return bool(json.loads(json.dumps(one)) == other)


def _is_local(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and is_path(name) and "{" not in name for name in names)


def _known_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without keys that this version of orpo-lite does not have."""
    known = {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
    return {key: value for key, value in values.items() if key in known}


def _place(path: Path, source: str) -> str:
    """Return the place of a value for messages: "recipe.yaml:3" -> "RUN/recipe.yaml:3"."""
    if source == "default":
        return "recipe"
    return str(path / source) if source.startswith("recipe.yaml:") else source


def record_changes(
    path: Path, recipe: Recipe, changed: Mapping[str, Any], lock: Mapping[str, Any], step: int
) -> None:
    """Record in recipe.yaml and lock.json that a run continues after ``step`` with new values.

    If the run continues from an older checkpoint, lock.json may hold changes after later steps. The
    run continues with the new values of these changes, so each of these changes moves to ``step``.
    Example with ``step`` 100: change after step 200 -> change after step 100.

    recipe.yaml is written first. If the process is killed before lock.json is written, the next
    resume finds the change in recipe.yaml.

    Args:
        path: the run folder.
        recipe: the recipe to continue with.
        changed: ``section.key`` -> new value of each changed key.
        lock: the result of ``make_lock`` for the current packages and inputs.
        step: the number of finished steps.
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
    # The hashes have shown that base, data and template are the same. Their paths may be new.
    moved = {
        part: lock[part]
        for part in ("base", "data", "chat_template")
        if old[part].get("revision") is None
    }
    # These two depend on the device, which may have changed.
    for part in ("dtype", "not_quantised"):
        if part in old:
            moved[part] = lock[part]
    updated = {**old, **moved, "recipe": began, "changes": [asdict(change) for change in changes]}
    if updated != old:
        write_text(path / "lock.json", to_json(updated))


def _merged(changes: Iterable[Change]) -> list[Change]:
    """Return one change for each key and step.

    Several changes of a key at the same step become one, with the first ``before`` and the last
    ``after``. If the two are equal, the change is left out.
    """
    found: dict[tuple[str, int], Change] = {}
    for change in changes:
        place = (change.key, change.after_step)
        found[place] = replace(found.get(place, change), after=change.after)
    return [change for change in found.values() if change.before != change.after]


def other_versions(
    path: Path, old: Mapping[str, Any], lock: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return the changed packages: ``versions.NAME`` -> (old version, new version).

    The newest step of the run used the old version. The new version is installed now.

    Args:
        path: the run folder.
        old: the content of the run's lock.json.
        lock: the result of ``make_lock`` for the current packages and inputs.
    """
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
