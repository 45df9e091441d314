"""How pairs go through a model that is only planned: what ``model.probe`` will choose once it is loaded."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from orpo_lite.base.find import positions_switch
from orpo_lite.data.packing import make_batch
from orpo_lite.model.load import bare_pair_model, choose_dtype
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, PairModel, Route
from orpo_lite.ops.attention import NAME, UnsupportedError
from orpo_lite.ops.devices import META
from orpo_lite.planning.on_meta import (
    META_ATTENTION,
    Triples,
    blank_pairs,
    without_values,
    worst_case,
)
from orpo_lite.recipe.schema import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedRoute:
    """How pairs go through a planned model."""

    route: Route
    attention: str | None
    """The model's attention where it is not its own: transformers' name for it."""
    unseen: float
    """Share of the layers whose attention shows no FLOPs to a counter of operators."""
    reason: str = ""
    """Why it is not the route that was asked for."""

    def apply(self, model: PairModel, kind: str) -> None:
        """Let a model on meta take this route, as on such a device."""
        model.meant = kind
        if self.route != model.route:
            model.fall_back(self.route, self.reason)
        if self.attention:
            model.own_attention = model.config._attn_implementation = self.attention


def find_route(recipe: Recipe, config: Any, triples: Triples, kind: str) -> PlannedRoute:
    """The fastest route by which every layer's attention goes through ours; else each sequence by itself.

    Each layer that attends must call the function that transformers looks up: ALiBi, linear attention and the like do
    not, sinks and masks are refused by it. What only numbers would show, the probe finds.

    Raises:
        One of MODEL_CODE_ERRORS: the model does not run on meta at all.
    """
    asked: Route = "shared" if recipe.memory.prompt_sharing else "packed"
    reason = "its rotary embedding changes with the length"
    if recipe.memory.packing and not positions_switch(
        config.get_text_config(), int(triples[:, 1:].max())
    ):
        found = _tried(PlannedRoute(asked, None, 1.0), NAME, recipe, config, kind)
        if found == 1:
            return PlannedRoute(asked, None, 1.0)
        reason = (
            found if isinstance(found, str) else "some of its layers have an attention of their own"
        )
    alone: Route = "rows" if recipe.memory.packing else asked
    unseen = _tried(PlannedRoute(alone, META_ATTENTION, 1.0), META_ATTENTION, recipe, config, kind)
    if isinstance(unseen, str):
        return PlannedRoute(alone, None, 0.0, reason)
    return PlannedRoute(alone, META_ATTENTION, unseen, reason)


@torch.no_grad()
def _tried(planned: PlannedRoute, name: str, recipe: Recipe, config: Any, kind: str) -> float | str:
    """The share of layers that attend by the function ``name`` when a pair passes so; why, where the model cannot."""
    model = bare_pair_model(
        recipe, _one_of_each(config), choose_dtype(recipe.model.dtype, kind), META
    )
    if planned.attention and model.own_attention == "eager":
        return "its scores are held"
    planned.apply(model, kind)
    batch = make_batch(blank_pairs(worst_case(8, 1)), model.batching(recipe, pad_id=0)).to(META)
    passes = 2 if recipe.memory.packing and planned.route == "rows" else 1
    try:
        with without_values(), _counted(name) as calls:
            model(batch)
    except MODEL_CODE_ERRORS as error:
        logger.info("pairs cannot pass as %s", planned, exc_info=error)
        return (
            str(error)
            if isinstance(error, UnsupportedError)
            else "its code does not take packed rows"
        )
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
