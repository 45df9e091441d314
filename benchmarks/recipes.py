"""The GPU that each shipped recipe needs, by its plan, for `orpo-lite recipes ls`.

python -m benchmarks.recipes            writes orpo_lite/recipe/gpu_sizes.json
"""

import json

import torch
from transformers import AutoModelForCausalLM

from orpo_lite import demo
from orpo_lite.base.find import find_config
from orpo_lite.objectives.objective import find_objective
from orpo_lite.planning.device import CPU_LIMIT
from orpo_lite.planning.gpus import GPUS
from orpo_lite.planning.on_meta import worst_case
from orpo_lite.planning.search import Planner
from orpo_lite.recipe.reader import GPU_SIZES, load_recipe, shipped_recipes


def gpu_size(name: str) -> str:
    """Return the memory of the smallest known GPU that fits the recipe's longest pairs: "8 GB".

    A base that is small enough for a CPU is followed by "or a CPU".
    """
    recipe = load_recipe(name)
    if recipe.model.model_name_or_path.startswith("builtin:"):
        for _ in demo.make_builtin(recipe, weights=False):
            pass
        recipe = demo.resolve_builtin(recipe)
    config = find_config(recipe.model.model_name_or_path, "main")
    has_rejected = "rejected" in find_objective(recipe.loss).needs
    triples = worst_case(
        recipe.data.max_length, recipe.training.global_batch_size, has_rejected=has_rejected
    )
    planner = Planner(recipe, config, triples, "ampere")
    smallest = next(gpu for gpu in GPUS if planner.least_bytes(gpu) <= gpu.memory)
    size = smallest.name.rpartition(", ")[2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    is_small = sum(parameter.numel() for parameter in model.parameters()) <= CPU_LIMIT
    return f"{size} or a CPU" if is_small else size


def main() -> None:
    """Plan every shipped recipe and write the sizes."""
    sizes = {}
    for name in shipped_recipes():
        sizes[name] = gpu_size(name)
        print(f"{name}: {sizes[name]}", flush=True)
    GPU_SIZES.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
