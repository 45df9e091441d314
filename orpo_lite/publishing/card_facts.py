"""What a run folder says of a model, read once for its card; and the card's metadata."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from orpo_lite.data.sources.source import is_path
from orpo_lite.errors import CheckpointError, ModelError
from orpo_lite.publishing.licences import Terms, climbs, find_terms, is_hub_name
from orpo_lite.recipe.schema import KEYS, Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.changes import Change, read_changes, trained_recipe, values_at_start
from orpo_lite.runs.commands import Weights
from orpo_lite.runs.folder import FOLDERS, RESULT, find_merged
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import (
    FIGURE,
    ValueTypes,
    read_json,
    read_metrics,
    read_samples,
    refuse_lacking,
)

SOMEWHERE = "OWNER/NAME"  # stands for the repository until it is known

FIGURES: ValueTypes = {
    "chat_template": str,
    "rows_read": int,
    "train_pairs": int,
    "held_out_pairs": int,
    "dropped": dict,
    "cut": dict,
    "chosen_longer": FIGURE,
    "rejected_longer": FIGURE,
    "prompts": dict,
    "sha256": str,
}
VERDICT: ValueTypes = {
    "rows": list,
    "pairs": int,
    "held_out": bool,
    "passed": bool,
    **dict.fromkeys(("difference", "effect", "bound"), FIGURE),
}
OBJECTIVE: ValueTypes = {
    **dict.fromkeys(("title", "paper", "formula"), str),
    "settings": dict,
    "metrics": dict,
}
MEASURED: ValueTypes = {"model": str, **dict.fromkeys(("accuracy", "margin", "chosen"), FIGURE)}


@dataclass(frozen=True)
class Shown:
    """What a card is for."""

    repository: str = SOMEWHERE
    merged: Weights | None = None
    """The weights that the model was merged onto; None for an adapter."""
    licences: Mapping[str, Any] | None = None
    """In place of what the lock has."""
    samples: int = 0
    """So many prompts of the data are shown with their answers, in place of the neutral ones: somebody asked for it."""


@dataclass(frozen=True)
class Facts:
    """A run, read once."""

    recipe: Recipe
    lock: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    steps: int | None
    kept_step: int | None
    licence: Mapping[str, Any]
    data_licences: Mapping[str, Mapping[str, Any]]
    verified: Mapping[Weights, Mapping[str, Any]]
    """What `merge --verify` found, by the weights that were merged onto."""
    adapter: Mapping[str, Any]
    """Its configuration, peft's."""
    samples: Sequence[Mapping[str, str]]
    """Prompts and their answers."""
    objective: Mapping[str, Any]
    """What the loss is: see :meth:`orpo_lite.objectives.objective.Objective.to_json`."""
    shown: Shown
    start: Mapping[str, Any]
    """``section.key``, and ``versions.NAME`` of a package -> value of the first step."""
    changes: Sequence[Change]
    """What was changed while the training went on, and had an effect on the steps that were made."""

    @classmethod
    def read(cls, path: Path, shown: Shown) -> "Facts":
        recipe, lock = trained_recipe(path), read_lock(path)
        refuse_lacking(lock, {"orpo_lite": str, "versions": dict}, str(path / "lock.json"))
        licences = shown.licences if shown.licences is not None else lock.get("licences") or {}
        kinds = [shown.merged] if shown.merged else FOLDERS
        metrics = read_metrics(path)
        steps, kept_step = _steps(path, recipe, metrics)
        changes = read_changes(lock, str(path / "lock.json"))
        adapter = read_json(path / "adapter" / "adapter_config.json", {"r": int})
        start = dict(recipe.items()) | values_at_start(path, lock)
        start |= {f"versions.{name}": version for name, version in lock["versions"].items()}
        if recipe.model.adapter_name_or_path:  # whose shape a recipe cannot state in full
            shape = {key: adapter[key] for key in KEYS["lora"] if adapter.get(key) is not None}
            start |= {
                f"lora.{k}": sorted(v) if isinstance(v, list) else v for k, v in shape.items()
            }
        return cls(
            recipe,
            lock,
            _read_figures(path / "data.json"),
            metrics,
            steps,
            kept_step,
            licences.get("base", {}),
            licences.get("data", {}),
            {kind: found for kind in kinds if (found := _verified(path, kind))},
            adapter,
            read_samples(path),
            read_objective(recipe, lock),
            shown,
            start,
            [change for change in changes if steps is None or change.after_step < steps],
        )

    def over_time(self, key: str) -> str:
        """A value as text; where another one took its place, each of them with the step that it came after."""
        found = {0: self.start[key]}
        found.update(
            (change.after_step, change.after) for change in self.changes if change.key == key
        )
        texts = {
            step: value if key.startswith("versions.") else to_text(value)
            for step, value in found.items()
        }
        return ", then ".join(
            f"{text} after step {step:,}" if step else text for step, text in texts.items()
        )

    @property
    def terms(self) -> list[Terms]:
        return find_terms(self.licence)

    @property
    def is_hub_base(self) -> bool:
        return self.lock["base"]["revision"] is not None

    @property
    def base(self) -> str:
        """The base in a sentence."""
        if self.is_hub_base:
            name, revision = self.lock["base"]["name"], self.lock["base"]["revision"]
            return f"[{name}](https://huggingface.co/{name}) at revision `{revision}`"
        if self.recipe.model.model_name_or_path.startswith("builtin:"):
            return "the built-in toy model of orpo-lite"
        return "a model that its trainer had in a local folder"

    @property
    def base_name(self) -> str:
        """The base in a command."""
        return self.lock["base"]["name"] if self.is_hub_base else "BASE"

    @property
    def sets(self) -> list[str]:
        """The data sets of the hub."""
        return [name for name in self.recipe.data.names if is_hub_name(name)]

    @property
    def evaluations(self) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Held-out figures before the first step and of what was kept; None without."""
        rows = {row["step"]: row for row in self.metrics if row.get("eval_loss") is not None}
        return (rows[0], rows[self.kept_step]) if 0 in rows and self.kept_step in rows else None


def read_objective(recipe: Recipe, lock: Mapping[str, Any]) -> Mapping[str, Any]:
    """What lock.json says of the objective; a run of an older version did not note it."""
    if "objective" in lock:
        refuse_lacking(lock, {"objective": dict}, "lock.json")
        refuse_lacking(lock["objective"], OBJECTIVE, "lock.json, objective")
        return lock["objective"]  # type: ignore[no-any-return]
    from orpo_lite.objectives.objective import find_objective  # which loads torch

    return find_objective(recipe.loss).to_json()


def _read_figures(file: Path) -> Mapping[str, Any]:
    data = read_json(file, FIGURES)
    for reason, drop in data["dropped"].items():
        refuse_lacking(
            drop if isinstance(drop, dict) else {}, {"pairs": int}, f"{file}, dropped, {reason}"
        )
    refuse_lacking(data["cut"], {"responses_without_end": int}, f"{file}, cut")
    refuse_lacking(data["prompts"], {"shared": int}, f"{file}, prompts")
    return data


def _steps(
    path: Path, recipe: Recipe, metrics: Sequence[Mapping[str, Any]]
) -> tuple[int | None, int | None]:
    """How many were made, and that whose adapter was kept: as the run says, else as the training chooses it."""
    if (path / RESULT).is_file():
        result = read_json(path / RESULT, {"steps": int, "kept_step": int})
        return result["steps"], result["kept_step"]
    last = max((row["step"] for row in metrics), default=None)
    losses = {row["step"]: row["eval_loss"] for row in metrics if row.get("eval_loss") is not None}
    best = recipe.training.load_best_model_at_end and losses
    return last, min(losses, key=losses.__getitem__) if best else last


def _verified(path: Path, kind: Weights) -> Mapping[str, Any]:
    """{} where nothing is merged, or measured, or where it is of another adapter than the run has now."""
    file = path / FOLDERS[kind] / "verify.json"
    try:
        if not file.is_file() or not find_merged(path, kind):
            return {}
    except (CheckpointError, ModelError):
        return {}
    found = read_json(file, VERDICT)
    for row in found["rows"]:
        refuse_lacking(row if isinstance(row, dict) else {}, MEASURED, f"{file}, rows")
    return found


def make_metadata(facts: Facts) -> ModelCardData:
    shown = facts.shown
    tags = [
        facts.recipe.loss.type,
        "preference-tuning",
        "orpo-lite",
        *([] if shown.merged else ["lora"]),
    ]
    name = "" if shown.repository == SOMEWHERE else shown.repository.rpartition("/")[2]
    licence: dict[str, Any] = dict(licence_metadata(facts))
    data = ModelCardData(
        library_name="transformers" if shown.merged else "peft",
        pipeline_tag="text-generation",
        base_model=facts.lock["base"]["name"] if facts.is_hub_base else None,
        datasets=facts.sets or None,
        tags=tags,
        model_name=(name or f"tuned with {facts.objective['title']}")
        if _eval_results(facts)
        else None,
        eval_results=_eval_results(facts) or None,
        **licence,
    )
    if facts.is_hub_base:
        data["base_model_relation"] = "finetune" if shown.merged else "adapter"
    return data


def licence_metadata(facts: Facts) -> dict[str, Any]:
    """As the base's card has it; a link to a file beside that card is written out, and none that leads elsewhere."""
    found = dict(facts.licence)
    link = found.get("license_link", "")
    if climbs(link):
        del found["license_link"]
    elif link and "://" not in link:
        if facts.is_hub_base:
            name, revision = facts.lock["base"]["name"], facts.lock["base"]["revision"]
            found["license_link"] = (
                f"https://huggingface.co/{name}/blob/{revision}/{link.removeprefix('./')}"
            )
        else:
            found["license_link"] = os.path.basename(link)
    if "license_name" in found and "license" not in found:
        found["license"] = "other"
    return found


def _eval_results(facts: Facts) -> list[EvalResult]:
    """For the hub's own table, which knows results on a data set of the hub alone."""
    is_its_own = len(facts.sets) == len(facts.recipe.data.names) == 1
    if (
        facts.evaluations is None
        or not is_its_own
        or is_path(facts.recipe.data.dataset_test_split or "")
    ):
        return []
    _, after = facts.evaluations
    kinds = {
        "eval_rewards/accuracies": ("accuracy", "held-out reward accuracy"),
        "eval_loss": ("loss", "held-out loss"),
    }
    if (
        facts.shown.merged
    ):  # whose figures are its own: those of the training are of the base as it was loaded there
        found = facts.verified.get(facts.shown.merged, {})
        after = (
            {"eval_rewards/accuracies": found["rows"][-1]["accuracy"]}
            if found.get("held_out")
            else {}
        )
    return [
        EvalResult(
            task_type="text-generation",
            task_name="preference pairs",
            dataset_type=facts.sets[0],
            dataset_name=facts.sets[0],
            metric_type=kind,
            metric_name=name,
            metric_value=round(after[key], 4),
        )
        for key, (kind, name) in kinds.items()
        if after.get(key) is not None
    ]
