"""Predict how pairs will go through a model: the route that ``model.probe`` will choose."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from orpo_lite.base.find import changes_frequencies
from orpo_lite.data.packing import make_batch
from orpo_lite.model.load import bare_pair_model, choose_dtype
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, PairModel, Route
from orpo_lite.ops.attention import NAME, UnsupportedError
from orpo_lite.ops.devices import META
from orpo_lite.planning.on_meta import (
    META_ATTENTION,
    Triples,
    blank_pairs,
    patched_for_meta,
    worst_case,
)
from orpo_lite.recipe.schema import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedRoute:
    """The predicted route of pairs. The routes: :data:`orpo_lite.model.pair_model.Route`."""

    route: Route
    attention: str | None
    """Name of the attention function that replaces the model's own; None if nothing replaces it."""
    uncounted: float
    """Share of the layers (0 to 1) in which ``LiveBytes`` does not count the FLOPs of attention."""
    reason: str = ""
    """Why the route of the recipe cannot be used; "" if it is used."""

    def apply(self, model: PairModel, kind: str) -> None:
        """Set this route in a model on the meta device. ``kind``: the device kind to plan for."""
        model.target_kind = kind
        if self.route != model.route:
            model.fall_back(self.route, self.reason)
        if self.attention:
            model.own_attention = model.config._attn_implementation = self.attention


def find_route(recipe: Recipe, config: Any, triples: Triples, kind: str) -> PlannedRoute:
    """Return the route that the probe before the training is expected to choose.

    The route is shared or packed, as the recipe says, if the model can use it. Otherwise the route
    is rows: each sequence goes through the model alone. The route is rows in these cases:

    - A layer does not call this package's attention function. Examples: ALiBi, linear attention.
    - The attention function refuses an argument of the model. Examples: a mask, attention sinks.
    - The model's code cannot run on packed rows.
    - The model's rotary embedding changes with the length.

    If ``memory.packing`` is false, the training does not use the route.

    The model is on the meta device, where tensors have no values. So only the probe can detect that
    a route gives wrong values.

    Raises:
        One of MODEL_CODE_ERRORS: the model cannot be built on meta.
    """
    preferred: Route = "shared" if recipe.memory.prompt_sharing else "packed"
    longest = int(triples[:, 1:].max())
    reason = "the model's rotary embedding changes with the length"
    if recipe.memory.packing and not changes_frequencies(config.get_text_config(), longest):
        found = _try_route(PlannedRoute(preferred, None, 1.0), NAME, recipe, config, kind)
        if found == 1:
            return PlannedRoute(preferred, None, 1.0)
        reason = found if isinstance(found, str) else "some layers have their own attention"
    alone: Route = "rows" if recipe.memory.packing else preferred
    planned = PlannedRoute(alone, META_ATTENTION, 1.0)
    uncounted = _try_route(planned, META_ATTENTION, recipe, config, kind)
    if isinstance(uncounted, str):
        return PlannedRoute(alone, None, 0.0, reason)
    return PlannedRoute(alone, META_ATTENTION, uncounted, reason)


@torch.no_grad()
def _try_route(
    planned: PlannedRoute, name: str, recipe: Recipe, config: Any, kind: str
) -> float | str:
    """Run a pair on a route. Return the share of layers that call the attention function ``name``.

    If the model cannot run on this route, return the reason.
    """
    dtype = choose_dtype(recipe.model.dtype, kind)
    model = bare_pair_model(recipe, _one_layer_of_each_type(config), dtype, META)
    if planned.attention and model.own_attention == "eager":
        return "the model's own attention keeps all scores"
    planned.apply(model, kind)
    batch = make_batch(blank_pairs(worst_case(8, 1)), model.batching(recipe, pad_id=0)).to(META)
    passes = 2 if recipe.memory.packing and planned.route == "rows" else 1
    try:
        with patched_for_meta(), _record_calls(name) as calls:
            model(batch)
    except MODEL_CODE_ERRORS as error:
        logger.info("pairs cannot take the route %s", planned, exc_info=error)
        if isinstance(error, UnsupportedError):
            return str(error)
        return "the model's code does not take packed rows"
    return len(calls) / (passes * int(model.config.get_text_config().num_hidden_layers))


@contextmanager
def _record_calls(name: str) -> Iterator[list[None]]:
    """Yield a list that gets an entry for each call of transformers' attention ``name``."""
    calls: list[None] = []
    function = AttentionInterface()[name]

    def recording(*args: Any, **options: Any) -> Any:
        calls.append(None)
        return function(*args, **options)

    AttentionInterface.register(name, recording)
    try:
        yield calls
    finally:
        AttentionInterface.register(name, function)


def _one_layer_of_each_type(config: Any) -> Any:
    """Return a configuration with its first layers: at least 2, and enough to include each type."""
    types = getattr(config.get_text_config(), "layer_types", None) or []
    return with_layers(config, max([2, *(1 + types.index(layer_type) for layer_type in types)]))


def with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a configuration, with ``layers`` layers.

    Lists with one entry per layer are cut, or are repeated from their start: [a, b] -> [a, b, a].
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key, value in vars(text).items():
        is_per_layer = isinstance(value, list) and len(value) == text.num_hidden_layers
        if is_per_layer:
            setattr(text, key, [value[i % len(value)] for i in range(layers)])
    text.num_hidden_layers = layers
    return config
