"""Find values of a recipe that contradict each other, although each value alone is valid."""

from collections.abc import Iterator, Mapping
from typing import Any

from orpo_lite.errors import Overrides, RecipeError
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import to_text


def contradictions(recipe: Recipe) -> Iterator[RecipeError]:
    """Yield an error for each pair of keys whose values contradict each other.

    Also yield an error if data.test_split_size is above 1 and not a whole number.
    """
    data, training, memory = recipe.data, recipe.training, recipe.memory
    if data.prompt_limit >= data.max_length:
        yield _contradiction(
            recipe,
            "data.max_prompt_length",
            "data.max_length",
            "max_prompt_length below max_length, because max_length counts the response too",
            {"data.max_prompt_length": "auto"},
        )
    has_held_out = data.dataset_test_split or data.test_split_size > 0
    if training.early_stopping_patience and not has_held_out:
        yield _contradiction(
            recipe,
            "training.early_stopping_patience",
            "data.test_split_size",
            "held-out pairs, because their loss decides when the training stops",
            {"data.test_split_size": 0.02},
        )
    if data.test_split_size >= 1 and data.test_split_size != int(data.test_split_size):
        yield RecipeError(
            where=recipe.sources["data.test_split_size"],
            found=f"data.test_split_size: {data.test_split_size}",
            expected="a share below 1, or a whole number of pairs",
        )
    yield from _settings_of_losses(recipe)
    if not memory.packing:
        yield from _settings_of_packing(recipe)
    if memory.checkpoint_offload is True and memory.activation_checkpointing in ("none", 0):
        yield _contradiction(
            recipe,
            "memory.checkpoint_offload",
            "memory.activation_checkpointing",
            "a checkpointed layer, because only inputs of checkpointed layers are offloaded",
            {"memory.activation_checkpointing": "all"},
        )
    if recipe.output.push_to_hub and recipe.output.hub_model_id is None:
        yield _contradiction(
            recipe,
            "output.push_to_hub",
            "output.hub_model_id",
            "the name of a repository to push to",
            "output.hub_model_id=NAME",
        )
    quantization = recipe.quantization
    if not quantization.load_in_4bit and quantization.bnb_4bit_compute_dtype != "auto":
        yield _contradiction(
            recipe,
            "quantization.load_in_4bit",
            "quantization.bnb_4bit_compute_dtype",
            "a 4-bit base, because only 4-bit weights have a compute dtype",
            "set model.dtype instead",
        )


LOSSES_WITH: dict[str, tuple[str, ...]] = {
    "dpo_loss_type": ("dpo",),
    "label_smoothing": ("dpo", "cpo", "simpo"),
    "rpo_alpha": ("dpo",),
    "reference_adapter_name_or_path": ("dpo", "ppo"),
    "cpo_alpha": ("cpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "ratio_of": ("probability_ratio",),
    "center_rewards_coefficient": ("reward",),
    **dict.fromkeys(
        (
            "reward_adapter_name_or_path",
            "response_length",
            "temperature",
            "num_ppo_epochs",
            "ppo_mini_batch_size",
            "kl_coef",
            "kl_target",
            "kl_horizon",
            "gamma",
            "lam",
            "cliprange",
            "cliprange_value",
            "vf_coef",
        ),
        ("ppo",),
    ),
}
"""Key of the section loss -> the values of ``loss.type`` that use it."""


LOSSES_WITHOUT: dict[str, tuple[str, ...]] = {
    "beta": ("sft", "reward", "ppo"),
    "completion_only_loss": ("ppo",),
    "nll_reduction": ("ppo",),
}
"""Key of the section loss that most losses use -> the values of ``loss.type`` that do not."""


def _settings_of_losses(recipe: Recipe) -> Iterator[RecipeError]:
    """Yield an error for each chosen setting of a loss that another loss does not use."""
    loss, data = recipe.loss, recipe.data
    for key, types in LOSSES_WITHOUT.items():
        default = type(loss).model_fields[key].default
        # Many recipes set beta, and loss.type=sft trains with them too. A run folder then keeps it.
        is_meant = key != "beta" or recipe.sources["loss.beta"] == "command line"
        if is_meant and getattr(loss, key) != default and loss.type in types:
            yield _contradiction(
                recipe,
                f"loss.{key}",
                "loss.type",
                f"no {key}, because it has no effect on {loss.type}",
                {f"loss.{key}": default},
            )
    for key, types in LOSSES_WITH.items():
        is_chosen = getattr(loss, key) != type(loss).model_fields[key].default
        if is_chosen and loss.type not in types:
            yield _contradiction(
                recipe,
                f"loss.{key}",
                "loss.type",
                f"loss.type {' or '.join(types)}, because {key} has no effect on other losses",
                {"loss.type": types[0]},
            )
    if loss.type == "dpo" and loss.dpo_loss_type != "sigmoid" and loss.label_smoothing:
        yield _contradiction(
            recipe,
            "loss.label_smoothing",
            "loss.dpo_loss_type",
            "sigmoid, because label_smoothing has no effect on the other functions",
            {"loss.dpo_loss_type": "sigmoid"},
        )
    if loss.type == "ppo" and loss.reward_adapter_name_or_path is None:
        yield _contradiction(
            recipe,
            "loss.type",
            "loss.reward_adapter_name_or_path",
            "the adapter of a reward model, which a training with loss.type=reward makes",
            "loss.reward_adapter_name_or_path=RUN/adapter, where RUN is that run",
        )
    free = max(1, data.max_length - data.prompt_limit)
    if loss.type == "ppo" and data.prompt_limit + loss.response_length > data.max_length:
        yield _contradiction(
            recipe,
            "loss.response_length",
            "data.max_length",
            f"at most {free} tokens, which is max_length - max_prompt_length",
            {"loss.response_length": free},
        )
    if loss.type in ("dpo", "cpo", "simpo") and loss.beta == 0:
        yield _contradiction(
            recipe,
            "loss.beta",
            "loss.type",
            "a beta above 0, because with 0 the loss compares nothing",
            {"loss.beta": 0.1},
        )


def _settings_of_packing(recipe: Recipe) -> Iterator[RecipeError]:
    """Yield an error for each chosen setting that has no effect because packing is off."""
    memory = recipe.memory
    is_chosen = {
        # The recipe in a run folder holds every key, so only an override shows a choice.
        "prompt_sharing": memory.prompt_sharing
        and recipe.sources["memory.prompt_sharing"] == "command line",
        "micro_batch_tokens": memory.micro_batch_tokens != "auto",
        "head_chunk": memory.head_chunk not in ("auto", "none"),
    }
    for key in is_chosen:
        if is_chosen[key]:
            yield _contradiction(
                recipe,
                f"memory.{key}",
                "memory.packing",
                f"packed rows, because {key} has no effect on padded rows",
                {"memory.packing": True},
            )


def _contradiction(
    recipe: Recipe, one: str, other: str, expected: str, fix: Mapping[str, Any] | str
) -> RecipeError:
    """Return the error for two keys. Its place is where the first key is set, else the second."""
    values = dict(recipe.items())
    places = [recipe.sources[key] for key in (one, other) if recipe.sources[key] != "default"]
    return RecipeError(
        where=places[0] if places else "recipe",
        found=f"{one} is {to_text(values[one])}, but {other} is {to_text(values[other])}",
        expected=expected,
        fix=fix if isinstance(fix, str) else Overrides(fix),
    )
