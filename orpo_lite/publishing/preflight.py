"""Before a training: whether its result may be pushed, and what the licences say."""

from collections.abc import Generator
from typing import Any

from orpo_lite.errors import HubError
from orpo_lite.progress import Update
from orpo_lite.publishing.account import check_target
from orpo_lite.publishing.licences import find_license_files, read_licences, refuse_name
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.inputs import Inputs


def check_push(recipe: Recipe, *, resume: bool) -> Generator[Update, None, None]:
    """Refuse to begin what could not be pushed in the end; a run that goes on is not held up for that."""
    if not recipe.output.push_to_hub:
        return
    yield Update("stage", f"asking the hub whether {recipe.output.hub_model_id} may be written to")
    try:
        yield from check_target(str(recipe.output.hub_model_id), is_private=recipe.output.hub_private_repo)
    except HubError as error:
        if not resume:
            error.fix += "; or output.push_to_hub=false, and `orpo-lite push` later"
            raise
        yield Update("note", f"the push at the end may fail: {error.where} {error.found}")


def find_licences(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """What lock.json says of licences; where the recipe asks for a push, the base's must allow it."""
    base = inputs.base
    licences = read_licences(base.name, base.revision, base.path, recipe.data.names)
    if recipe.output.push_to_hub:
        refuse_name(str(recipe.output.hub_model_id), licences["base"], recipe.sources["output.hub_model_id"])
        find_license_files(licences["base"], base.name, base.revision, base.path)
    return licences
