"""How pairs go through a model that is only planned: what ``proof.prove`` will choose once it is loaded."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, masking_utils

from orpo_lite.base import positions_switch
from orpo_lite.data.packing import make_batch
from orpo_lite.model import ITS_FAULTS, META, SCORELESS, PairModel, Way, bare_pair_model, choose_dtype
from orpo_lite.planner.lengths import Triples, blank_pairs, worst_case
from orpo_lite.recipe import Recipe
from orpo_lite.step import attention
from orpo_lite.step.attention import UnsupportedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Passing:
    """How pairs go through a planned model."""

    way: Way
    attention: str | None
    """The model's attention where it is not its own: transformers' name for it."""
    unseen: float
    """Share of the layers whose attention shows no FLOPs to a counter of operators."""
    reason: str = ""
    """Why it is not the way that was asked for."""

    def apply(self, model: PairModel, kind: str) -> None:
        """Let a model on meta take this way, as on such a device."""
        model.planned = kind
        if self.way != model.way:
            model.take(self.way, self.reason)
        if self.attention:
            model.own_attention = model.config._attn_implementation = self.attention


def find_passing(recipe: Recipe, config: Any, triples: Triples, kind: str) -> Passing:
    """The fastest way by which every layer's attention goes through ours; else each sequence by itself.

    Each layer that attends must call the function that transformers looks up: ALiBi, linear attention and the like do
    not, sinks and masks are refused by it. What only numbers would show, the proof finds.

    Raises:
        One of ITS_FAULTS: the model does not run on meta at all.
    """
    asked: Way = "shared" if recipe.memory.prompt_sharing else "packed"
    reason = "its rotary embedding changes with the length"
    if recipe.memory.packing and not positions_switch(config.get_text_config(), int(triples[:, 1:].max())):
        found = _tried(Passing(asked, None, 1.0), attention.NAME, recipe, config, kind)
        if found == 1:
            return Passing(asked, None, 1.0)
        reason = found if isinstance(found, str) else "some of its layers have an attention of their own"
    alone: Way = "rows" if recipe.memory.packing else asked
    unseen = _tried(Passing(alone, SCORELESS, 1.0), SCORELESS, recipe, config, kind)
    if isinstance(unseen, str):
        return Passing(alone, None, 0.0, reason)
    return Passing(alone, SCORELESS, unseen, reason)


@torch.no_grad()
def _tried(passing: Passing, name: str, recipe: Recipe, config: Any, kind: str) -> float | str:
    """The share of layers that attend by the function ``name`` when a pair passes so; why, where the model cannot."""
    model = bare_pair_model(recipe, _one_of_each(config), choose_dtype(recipe.model.dtype, kind), META)
    if passing.attention and model.own_attention == "eager":
        return "its scores are held"
    passing.apply(model, kind)
    batch = make_batch(blank_pairs(worst_case(8, 1)), model.batching(recipe, pad_id=0)).to(META)
    passes = 2 if recipe.memory.packing and passing.way == "rows" else 1
    try:
        with without_values(), _counted(name) as calls:
            model(batch)
    except ITS_FAULTS as error:
        logger.info("pairs cannot pass as %s", passing, exc_info=error)
        return str(error) if isinstance(error, UnsupportedError) else "its code does not take packed rows"
    return len(calls) / (passes * int(model.config.get_text_config().num_hidden_layers))


@contextmanager
def _counted(name: str) -> Iterator[list[None]]:
    """One entry for each call of an attention function that transformers knows, while this lasts."""
    calls: list[None] = []
    function = AttentionInterface()[name]

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(None)
        return function(*args, **options)

    AttentionInterface.register(name, counting)
    try:
        yield calls
    finally:
        AttentionInterface.register(name, function)


@contextmanager
def without_values() -> Iterator[None]:
    """Let two things pass on meta that are of no account there: the first fails, the second asks for values.

    Autocast, which peft's adapters of experts turn off; and transformers' search for sequences packed into a row, where
    each row is one sequence.
    """
    plain: Any = torch.autocast
    search = masking_utils.find_packed_sequence_indices

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return plain("cpu" if device_type == "meta" else device_type, *args, **options)

    torch.autocast = autocast  # type: ignore[misc,assignment]
    masking_utils.find_packed_sequence_indices = lambda _positions: None
    try:
        yield
    finally:
        torch.autocast = plain  # type: ignore[misc]
        masking_utils.find_packed_sequence_indices = search


def _one_of_each(config: Any) -> Any:
    """The configuration with so few layers that each kind of them is there."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return with_layers(config, max([2, *(1 + kinds.index(kind) for kind in kinds)]))


def with_layers(config: Any, layers: int) -> Any:
    """The configuration with so many layers: the first ones, or all of them and then from the first on again."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # what each layer is
            setattr(text, key, [value[i % len(value)] for i in range(layers)])
    text.num_hidden_layers = layers
    return config
