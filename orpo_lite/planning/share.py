"""Which numbers of processes may share one copy of the base, for ``memory.shard=auto``."""

import os

from orpo_lite.model.load_sharded import converts_weights
from orpo_lite.planning.search import Planner
from orpo_lite.recipe.schema import Recipe


def possible_shares(recipe: Recipe, processes: int) -> list[int]:
    """Return the numbers of processes that may share the base: the smallest first.

    Only processes of one machine share it, because each layer is sent in each pass. There is none
    unless ``memory.shard`` is auto.
    """
    if recipe.memory.shard != "auto" or processes == 1:
        return []
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return [n for n in range(2, here + 1) if here % n == 0 and processes % n == 0]


def why_not_shared(planner: Planner) -> str:
    """Return why processes cannot share the base of a training; "" if they can.

    Such a training would be refused while the model is loaded.
    """
    recipe, name = planner.recipe, planner.config.model_type
    if converts_weights(planner.model.causal):
        return f"transformers converts the weights of {name} while it loads them"
    if recipe.memory.packing and planner.planned.route not in ("shared", "packed"):
        return f"each sequence goes through {name} alone, unless memory.packing=false is set"
    return ""
