"""Plan the memory settings of a training for the GPU that runs the training."""

from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

from orpo_lite.data.prepare import step_lengths
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS
from orpo_lite.model.parallel import Processes
from orpo_lite.ops.devices import device_kind
from orpo_lite.planning.fit import fit, no_plan
from orpo_lite.planning.gpus import local_gpu, memory_budget
from orpo_lite.planning.share import possible_shares
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import gib
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update

PLAN = "plan.json"


def choose_memory(
    recipe: Recipe, inputs: Inputs, path: Path, processes: Processes, changed: Collection[str] = ()
) -> Generator[Update, None, tuple[Recipe, dict[str, Any]]]:
    """Yield updates; finally return (recipe with planned settings, new content of plan.json).

    The content is {} if no new plan is made:

    - There is neither a GPU nor a ``memory.budget`` -> the recipe is returned unchanged.
    - The model cannot be measured -> the recipe is returned unchanged.
    - The run has a plan that still fits, and no key of the section ``memory`` has changed -> the
      settings of this plan are used. Other settings would change the last bits of the results.
      A base that is shared by a number of processes that does not divide the processes of this
      training needs a new plan.

    If ``memory.shard`` is auto and the base does not fit whole, processes of one machine share it.

    Args:
        recipe: the recipe of the run.
        inputs: the base and the tokenized pairs.
        path: the run folder. If the run is resumed, it may contain plan.json.
        processes: the processes of the run. All of them use the same plan.
        changed: the recipe keys whose values differ from the values in the run's newest step.

    Raises:
        FitError: the training does not fit the budget with any memory settings.
    """
    device, wanted = processes.device, recipe.memory.budget_bytes
    local = local_gpu(device.index or 0) if device.type == "cuda" else None
    budget = memory_budget(wanted, local)
    if budget is None:
        return recipe, {}
    budget = processes.smallest(budget)  # one plan for all processes
    if local and wanted and wanted > local.free:
        yield Update(
            "note",
            f"memory.budget={recipe.memory.budget}, but only {gib(local.free)} of the GPU are free",
        )
    gpu = local.gpu if local else None
    before = read_json(path / PLAN) if (path / PLAN).is_file() else {}
    is_changed = any(key.startswith("memory.") for key in changed)
    still_fits = bool(before) and before["needed_bytes"] <= budget
    if before and recipe.memory.shard == "auto":
        still_fits = still_fits and processes.count % before["levers"].get("shard", 1) == 0
    if still_fits and not is_changed:
        return recipe.with_memory(before["levers"]), {}
    if before:
        why = "has other memory settings than the recipe" if still_fits else "exceeds the budget"
        yield Update(
            "note",
            f"the earlier plan of this run {why}. A new plan is made, and results may differ in "
            "the last bits",
        )
    yield Update("stage", "planning the memory of a step")
    lengths = step_lengths(recipe, inputs.train)
    settings: dict[str, Any] = {}
    content: dict[str, Any] = {}
    if processes.is_main:  # different GPUs could give different plans
        shares = possible_shares(recipe, processes.count)
        try:
            found = fit(
                recipe, inputs.base.config, lengths, device_kind(device), budget, gpu, shares
            )
        except MODEL_CODE_ERRORS as error:
            reason = no_plan(inputs.base.name, error).found
            yield Update("note", f"{reason}, so the recipe's memory settings are used unchanged")
        else:
            settings, content = dict(found.settings), found.to_json()
            for sentence in found.sentences(local.others if local else 0):
                yield Update("note", sentence)
    return recipe.with_memory(processes.from_main(settings)), content
