"""Read the facts for a model card from a run folder, and make the metadata of the card."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from orpo_lite.data.sources.source import is_path
from orpo_lite.errors import CheckpointError, ModelError
from orpo_lite.publishing.licences import Terms, find_terms, is_hub_name, leads_out
from orpo_lite.recipe.schema import KEYS, Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.changes import Change, read_changes, trained_recipe, values_at_start
from orpo_lite.runs.commands import Weights
from orpo_lite.runs.folder import FOLDERS, find_merged
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import (
    FIGURE,
    RESULT,
    Sample,
    ValueTypes,
    check_values,
    read_json,
    read_metrics,
    read_samples,
)

PLACEHOLDER = "OWNER/NAME"  # placeholder until the repository is known

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
class CardOptions:
    """The options of a model card: the repository, the pushed weights, licences and samples."""

    repository: str = PLACEHOLDER
    merged: Weights | None = None
    """The weights that the adapter was merged into. None: the card is for the adapter."""
    licences: Mapping[str, Any] | None = None
    """The licences of base and data. None: use the licences in lock.json."""
    samples: int = 0
    """Number of held-out prompts that the card shows with answers. 0: it shows neutral prompts."""


@dataclass(frozen=True)
class Facts:
    """The facts about a run that its model card shows."""

    recipe: Recipe
    lock: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    steps: int | None
    kept_step: int | None
    licence: Mapping[str, Any]
    data_licences: Mapping[str, Mapping[str, Any]]
    verified: Mapping[Weights, Mapping[str, Any]]
    """The weights that the adapter was merged into -> the results of `merge --verify`."""
    adapter: Mapping[str, Any]
    """The peft configuration of the adapter."""
    samples: Sequence[Sample]
    """The sample prompts of the run, with their answers."""
    can_pad: bool
    """True if the tokenizer of the adapter has a pad token, so that texts can be one batch."""
    objective: Mapping[str, Any]
    """The loss, as :meth:`orpo_lite.objectives.objective.Objective.to_json` describes it."""
    options: CardOptions
    start: Mapping[str, Any]
    """``section.key`` or ``versions.PACKAGE`` -> its value at the first step."""
    changes: Sequence[Change]
    """The changes of values during the training. Each change affected at least one step."""

    @classmethod
    def read(cls, path: Path, options: CardOptions) -> "Facts":
        """Read the facts from a run folder. Raise CheckpointError if a file is damaged."""
        recipe, lock = trained_recipe(path), read_lock(path)
        check_values(lock, {"orpo_lite": str, "versions": dict}, str(path / "lock.json"))
        licences = options.licences if options.licences is not None else lock.get("licences") or {}
        merges = [options.merged] if options.merged else FOLDERS
        metrics = read_metrics(path)
        steps, kept_step = _steps(path, recipe, metrics)
        changes = read_changes(lock, str(path / "lock.json"))
        adapter = read_json(path / "adapter" / "adapter_config.json", {"r": int})
        start = dict(recipe.items()) | values_at_start(path, lock)
        start |= {f"versions.{name}": version for name, version in lock["versions"].items()}
        if recipe.model.adapter_name_or_path:  # a recipe cannot hold its complete shape
            for key in KEYS["lora"]:
                value = adapter.get(key)
                if value is not None:
                    start[f"lora.{key}"] = sorted(value) if isinstance(value, list) else value
        verified = {merge: found for merge in merges if (found := _read_verification(path, merge))}
        return cls(
            recipe,
            lock,
            _read_figures(path / "data.json"),
            metrics,
            steps,
            kept_step,
            licences.get("base", {}),
            licences.get("data", {}),
            verified,
            adapter,
            read_samples(path),
            _has_pad_token(path / "adapter" / "tokenizer_config.json"),
            read_objective(recipe, lock),
            options,
            start,
            [change for change in changes if steps is None or change.after_step < steps],
        )

    def over_time(self, key: str) -> str:
        """Return the values of a key during the training: "1e-4, then 5e-5 after step 100"."""
        values = {0: self.start[key]}
        for change in self.changes:
            if change.key == key:
                values[change.after_step] = change.after
        texts = []
        for step, value in values.items():
            text = value if key.startswith("versions.") else to_text(value)
            texts.append(f"{text} after step {step:,}" if step else text)
        return ", then ".join(texts)

    @property
    def is_reward_model(self) -> bool:
        """Return True if the run trained a reward model, which writes no text."""
        return self.recipe.loss.trains_reward_model

    @property
    def terms(self) -> list[Terms]:
        """Return what the base's licences require of a published derivative."""
        return find_terms(self.licence)

    @property
    def is_hub_base(self) -> bool:
        """Return True if the base is a repository on the hub."""
        return self.lock["base"]["revision"] is not None

    @property
    def base(self) -> str:
        """Return a description of the base, for a sentence in the card."""
        if self.is_hub_base:
            name, revision = self.lock["base"]["name"], self.lock["base"]["revision"]
            return f"[{name}](https://huggingface.co/{name}) at revision `{revision}`"
        if self.recipe.model.model_name_or_path.startswith("builtin:"):
            return "orpo-lite's built-in toy model"
        return "a model from a local folder of its trainer"

    @property
    def base_name(self) -> str:
        """Return the base's name for a command in the card.

        If the base is not on the hub, return "BASE".
        """
        return self.lock["base"]["name"] if self.is_hub_base else "BASE"

    @property
    def datasets(self) -> list[str]:
        """Return the names of the run's datasets that are on the hub."""
        return [name for name in self.recipe.data.names if is_hub_name(name)]

    @property
    def evaluations(self) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Return (before, after): the held-out metrics at step 0 and at the kept step.

        Return None if one of the two evaluations is missing.
        """
        rows = {row["step"]: row for row in self.metrics if row.get("eval_loss") is not None}
        if 0 not in rows or self.kept_step not in rows:
            return None
        return rows[0], rows[self.kept_step]


def read_objective(recipe: Recipe, lock: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the loss's description from lock.json.

    Older versions did not write this description. For runs of older versions, the description is
    made from the recipe.
    """
    if "objective" in lock:
        check_values(lock, {"objective": dict}, "lock.json")
        check_values(lock["objective"], OBJECTIVE, "lock.json, objective")
        return lock["objective"]  # type: ignore[no-any-return]
    from orpo_lite.objectives.objective import find_objective  # imports torch

    return find_objective(recipe.loss).to_json()


def _has_pad_token(file: Path) -> bool:
    return file.is_file() and read_json(file).get("pad_token") is not None


def _read_figures(file: Path) -> Mapping[str, Any]:
    """Return the content of data.json. Raise CheckpointError if a value is missing."""
    data = read_json(file, FIGURES)
    for reason, drop in data["dropped"].items():
        check_values(
            drop if isinstance(drop, dict) else {}, {"pairs": int}, f"{file}, dropped, {reason}"
        )
    check_values(data["cut"], {"responses_without_end": int}, f"{file}, cut")
    check_values(data["prompts"], {"shared": int}, f"{file}, prompts")
    return data


def _steps(
    path: Path, recipe: Recipe, metrics: Sequence[Mapping[str, Any]]
) -> tuple[int | None, int | None]:
    """Return (steps, kept_step): the number of steps, and the step of the kept adapter.

    If there is no result.json, both numbers are derived from the metrics.
    """
    if (path / RESULT).is_file():
        result = read_json(path / RESULT, {"steps": int, "kept_step": int})
        return result["steps"], result["kept_step"]
    last = max((row["step"] for row in metrics), default=None)
    losses = {row["step"]: row["eval_loss"] for row in metrics if row.get("eval_loss") is not None}
    if recipe.training.load_best_model_at_end and losses:
        return last, min(losses, key=losses.__getitem__)
    return last, last


def _read_verification(path: Path, weights: Weights) -> Mapping[str, Any]:
    """Return the result of `merge --verify`, or {} if there is none for the current adapter."""
    file = path / FOLDERS[weights] / "verify.json"
    try:
        if not file.is_file() or not find_merged(path, weights):
            return {}
    except (CheckpointError, ModelError):
        return {}
    found = read_json(file, VERDICT)
    for row in found["rows"]:
        check_values(row if isinstance(row, dict) else {}, MEASURED, f"{file}, rows")
    return found


def make_metadata(facts: Facts) -> ModelCardData:
    """Return the metadata of the model card for the facts of a run."""
    options, results = facts.options, _eval_results(facts)
    kind, name = "preference-tuning", f"tuned with {facts.objective['title']}"
    if facts.is_reward_model:
        kind, name = "reward-model", "reward model"
    tags = [facts.recipe.loss.type, kind, "orpo-lite"]
    if not options.merged:
        tags.append("lora")
    if options.repository != PLACEHOLDER:
        name = options.repository.rpartition("/")[2]
    licence: dict[str, Any] = dict(licence_metadata(facts))
    data = ModelCardData(
        library_name="transformers" if options.merged else "peft",
        pipeline_tag=_task(facts),
        base_model=facts.lock["base"]["name"] if facts.is_hub_base else None,
        datasets=facts.datasets or None,
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
        **licence,
    )
    if facts.is_hub_base:
        data["base_model_relation"] = "finetune" if options.merged else "adapter"
    return data


def _task(facts: Facts) -> str:
    """Return the hub's name of the model's task. Reward models of TRL have the same."""
    return "text-classification" if facts.is_reward_model else "text-generation"


def licence_metadata(facts: Facts) -> dict[str, Any]:
    """Return the licence entries of the base's card, changed for the metadata of the run's card.

    A relative ``license_link`` becomes a URL if the base is on the hub. Otherwise, only the file
    name in the link is kept. A link that leads out of the repository is removed. If the base's card
    has ``license_name`` but no ``license``, ``license`` becomes ``other``.
    """
    found = dict(facts.licence)
    link = found.get("license_link", "")
    if leads_out(link):
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
    """Return the held-out results for the metadata.

    The hub accepts results only for a dataset on the hub. So the result is [] if the run has
    several datasets, a local dataset or a local test file.
    """
    is_one_dataset = len(facts.datasets) == len(facts.recipe.data.names) == 1
    has_local_test = is_path(facts.recipe.data.dataset_test_split or "")
    if facts.evaluations is None or not is_one_dataset or has_local_test:
        return []
    _, after = facts.evaluations
    metrics = {
        "eval_rewards/accuracies": ("accuracy", "held-out reward accuracy"),
        "eval_loss": ("loss", "held-out loss"),
    }
    if facts.options.merged:  # the training did not measure the merged model
        found = facts.verified.get(facts.options.merged, {})
        after = {}
        if found.get("held_out"):
            after = {"eval_rewards/accuracies": found["rows"][-1]["accuracy"]}
    return [
        EvalResult(
            task_type=_task(facts),
            task_name="preference pairs",
            dataset_type=facts.datasets[0],
            dataset_name=facts.datasets[0],
            metric_type=metric_type,
            metric_name=name,
            metric_value=round(after[key], 4),
        )
        for key, (metric_type, name) in metrics.items()
        if after.get(key) is not None
    ]
