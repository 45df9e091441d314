"""Values that are each valid and cannot stand together."""

from collections.abc import Iterator, Mapping
from typing import Any

from orpo_lite.errors import Overrides, RecipeError
from orpo_lite.recipe.schema import Recipe


def contradictions(recipe: Recipe) -> Iterator[RecipeError]:
    """Values that are each valid and cannot stand together; both keys are named."""
    data, training, memory = recipe.data, recipe.training, recipe.memory

    def fault(one: str, other: str, why: str, fix: Mapping[str, Any] | str) -> RecipeError:
        values = dict(recipe.items())
        return RecipeError(
            where=next(
                (recipe.sources[k] for k in (one, other) if recipe.sources[k] != "default"),
                "recipe",
            ),
            found=f"{one}: {values[one]} with {other}: {values[other]}",
            expected=why,
            fix=fix if isinstance(fix, str) else Overrides(fix),
        )

    if data.prompt_limit >= data.max_length:
        yield fault(
            "data.max_prompt_length", "data.max_length", "a prompt limit below the length limit, or no reply is left",
            {"data.max_prompt_length": "auto"},
        )  # fmt: skip
    if (
        training.early_stopping_patience
        and not data.dataset_test_split
        and data.test_split_size == 0
    ):
        yield fault(
            "training.early_stopping_patience", "data.test_split_size", "held-out pairs to stop on",
            {"data.test_split_size": 0.02},
        )  # fmt: skip
    if data.test_split_size >= 1 and data.test_split_size != int(data.test_split_size):
        yield RecipeError(
            where=recipe.sources["data.test_split_size"], found=f"data.test_split_size: {data.test_split_size}",
            expected="a share below 1, or a whole number of pairs",
        )  # fmt: skip
    # A run's own recipe holds every key: that one stands there says nothing, that it differs from its default does.
    asked = {
        "prompt_sharing": recipe.sources["memory.prompt_sharing"] == "command line"
        and memory.prompt_sharing
    }
    asked |= {"micro_batch_tokens": memory.micro_batch_tokens != "auto"}
    asked |= {"head_chunk": memory.head_chunk not in ("auto", "none")}
    for key in [key for key, is_asked in asked.items() if is_asked and not memory.packing]:
        yield fault(
            f"memory.{key}",
            "memory.packing",
            "packed rows, not padded ones",
            {"memory.packing": True},
        )
    if memory.checkpoint_offload is True and memory.activation_checkpointing in ("none", 0):
        yield fault(
            "memory.checkpoint_offload", "memory.activation_checkpointing", "checkpoints that could be moved",
            {"memory.activation_checkpointing": "all"},
        )  # fmt: skip
    if recipe.output.push_to_hub and recipe.output.hub_model_id is None:
        yield fault(
            "output.push_to_hub",
            "output.hub_model_id",
            "a repository to push to",
            "output.hub_model_id=NAME",
        )
    if (
        not recipe.quantization.load_in_4bit
        and recipe.quantization.bnb_4bit_compute_dtype != "auto"
    ):
        yield fault(
            "quantization.load_in_4bit", "quantization.bnb_4bit_compute_dtype", "a 4-bit base to compute with",
            "set model.dtype instead",
        )  # fmt: skip
