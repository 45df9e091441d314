"""The memory settings of a training, by a plan for the GPU that it runs on."""

from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

from orpo_lite.data.prepare import pair_lengths
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS
from orpo_lite.model.parallel import Processes
from orpo_lite.ops.devices import device_kind
from orpo_lite.planning.gpus import local_gpu, memory_budget
from orpo_lite.planning.search import fit, no_plan
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import gib
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update

PLAN = "plan.json"


def choose_memory(
    recipe: Recipe, inputs: Inputs, path: Path, processes: Processes, changed: Collection[str] = ()
) -> Generator[Update, None, tuple[Recipe, dict[str, Any]]]:
    """Return the recipe with the memory settings of a plan, and what plan.json is to hold.

    Without a GPU and a budget no plan is made: the recipe as it is, and {}.

    A run that goes on keeps the settings that it began with, if they still fit: its bits depend on them. It is planned
    anew where a key of ``memory`` is among those ``changed``.
    """
    device, wanted = processes.device, recipe.memory.budget_bytes
    own = local_gpu(device.index or 0) if device.type == "cuda" else None
    budget = memory_budget(wanted, own)
    if budget is None:
        return recipe, {}
    budget = processes.smallest(budget)  # one plan for all processes
    if own and wanted and wanted > own.free:
        yield Update(
            "note",
            f"memory.budget={recipe.memory.budget}, and {gib(own.free)} are free on the card",
        )
    gpu = own.gpu if own else None
    before = read_json(path / PLAN) if (path / PLAN).is_file() else {}
    is_asked = any(key.startswith("memory.") for key in changed)
    still_fits = bool(before) and before["needed_bytes"] <= budget
    if still_fits and not is_asked:
        return recipe.with_memory(before["levers"]), {}
    if before:
        why = "is not what is asked for now" if still_fits else "does not fit any more"
        yield Update(
            "note", f"the plan that the run began with {why}: bits may differ from here on"
        )
    yield Update("stage", "planning the memory of a step")
    lengths = pair_lengths(inputs.train)
    try:
        found = fit(recipe, inputs.base.config, lengths, device_kind(device), budget, gpu)
    except MODEL_CODE_ERRORS as error:
        yield Update(
            "note",
            f"{no_plan(inputs.base.name, error).found}: the levers of memory stay as they are",
        )
        return recipe, {}
    for sentence in found.sentences(own.others if own else 0):
        yield Update("note", sentence)
    return recipe.with_memory(found.levers), found.to_json()
