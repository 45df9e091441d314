"""The real step on the meta device, without weights, counted: what it holds, by part, and what it computes."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orpo_lite.data.packing import (
    Batch,
    Batching,
    PackedPairs,
    make_batch,
    micro_batches,
    packed_tokens,
)
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.load import bare_pair_model, choose_dtype
from orpo_lite.model.memory import NO_LEVERS, with_levers
from orpo_lite.model.optimizer import state_bytes
from orpo_lite.model.pair_model import PairModel
from orpo_lite.objectives.objective import find_objective
from orpo_lite.ops.attention import forget_rows
from orpo_lite.ops.devices import META, is_on_host
from orpo_lite.planning.meter import LiveBytes, allocated
from orpo_lite.planning.on_meta import Triples, blank_pairs, held_tensors, without_values
from orpo_lite.planning.route import PlannedRoute, find_route
from orpo_lite.recipe.schema import Recipe


@dataclass(frozen=True)
class StepMemory:
    """One forward and backward pass on the meta device."""

    held: Mapping[str, int]
    """Bytes that stay on the device through all steps, by part."""
    peak: int
    """Bytes that the pass holds besides, at its peak."""
    parts: Mapping[str, int]
    """Those by the phase that made them."""
    host: int
    """Bytes in host memory at their peak."""
    work: Counter[tuple[int, int]]
    """(FLOPs, bytes moved) of each operator, and how often it ran; attention's own FLOPs as one entry."""
    sent: int
    """Bytes that went to host memory, to come back."""
    paged: int
    """Of the optimizer's states, those that the driver may move to host memory."""
    tokens: int
    pairs: int
    weights: int
    """Parameters of the base."""
    loading: int
    """Bytes on the device while the base is loaded."""
    notes: tuple[str, ...]
    """What the person should know of this model's step, a line each."""

    @property
    def total(self) -> int:
        """Bytes on the device at the peak of a step."""
        return sum(self.held.values()) + self.peak


def heaviest(
    recipe: Recipe, triples: Triples, batching: Batching, *, in_one_row: bool
) -> list[TokenizedPair]:
    """Pairs that need no less memory than any micro-batch of a training on pairs of these lengths.

    In one row memory grows with the tokens, with the segments (FlashAttention adds 128 rows for each) and with the
    tokens of the prefixes (keys and values are repeated behind them): each of the three is the most that a micro-batch
    can have. Where each sequence goes by itself, the longest pairs count, and others that may fit beside them.
    """
    most = recipe.training.global_batch_size
    if not (batching.packed and in_one_row):
        return _longest_pairs(triples, most, batching)
    most = min(most, batching.pairs or most)
    prefixes = triples[:, 0] * batching.share
    tokens = triples[:, 1] + triples[:, 2] - prefixes
    ordered = np.sort(tokens)
    total = max(int(ordered[-1]), min(batching.tokens, int(ordered[-most:].sum())))
    pairs = max(1, min(most, int((ordered.cumsum() <= total).sum())))
    shared = np.argsort(
        -prefixes / tokens, kind="stable"
    )  # a knapsack that may hold a part of its last pair
    before = np.minimum(tokens[shared].cumsum(), total)
    prefix = int((np.diff(before, prepend=0) * (prefixes / tokens)[shared]).sum())
    prefix = min(prefix, int(np.sort(prefixes)[-most:].sum()), total - 2 * pairs)
    places = np.arange(pairs + 1)
    each_prefix, each_rest = (np.diff(size * places // pairs) for size in (prefix, total - prefix))
    chosen, rejected = each_prefix + (each_rest + 1) // 2, each_prefix + each_rest // 2
    return blank_pairs(np.stack([each_prefix, chosen, rejected], 1))


def _longest_pairs(triples: Triples, most: int, batching: Batching) -> list[TokenizedPair]:
    lengths = triples[:, 1] + triples[:, 2] - triples[:, 0] * batching.share
    pairs = blank_pairs(triples[np.argsort(-lengths, kind="stable")[:most]])
    chunks = [[pairs[index] for index in chunk] for chunk in micro_batches(pairs, batching)]
    largest = max(chunks, key=lambda chunk: _tokens(chunk, batching))
    room = min(batching.tokens, _tokens(pairs, batching)) - _tokens(largest, batching)
    if batching.packed and room > 3 and len(largest) < (batching.pairs or len(pairs)):
        largest = [*largest, *blank_pairs(np.array([[0, room // 2, room - room // 2]]))]
    return largest


def _tokens(pairs: Sequence[TokenizedPair], batching: Batching) -> int:
    """Tokens of a forward pass, padding among them."""
    if batching.packed:
        return sum(packed_tokens(pair, share=batching.share) for pair in pairs)
    return 2 * len(pairs) * max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)


class MetaModels:
    """The models on meta of one recipe and configuration: one for each number of layers, with the latest levers."""

    def __init__(self) -> None:
        self._made: dict[int, PairModel] = {}

    def get(self, recipe: Recipe, config: Any, dtype: torch.dtype) -> PairModel:
        """Return the model with the recipe's levers. One that was given out before is not to be used any more."""
        layers = int(config.get_text_config().num_hidden_layers)
        if layers not in self._made:
            self._made[layers] = bare_pair_model(recipe.with_memory(NO_LEVERS), config, dtype)
        return with_levers(self._made[layers], recipe)


def measure(
    recipe: Recipe,
    config: Any,
    triples: Triples,
    kind: str,
    planned: PlannedRoute | None = None,
    models: MetaModels | None = None,
) -> StepMemory:
    """The heaviest micro-batch of a recipe through its model, on meta.

    Args:
        recipe: with the levers to measure.
        config: the base's, transformers'.
        triples: lengths of the pairs.
        kind: of the device that is meant: see :func:`orpo_lite.ops.attention.device_kind`.
        planned: how pairs go through the model; found out where it is not given.
        models: those of earlier steps of the recipe.
    """
    planned = planned or find_route(recipe, config, triples, kind)
    if kind == "cpu":  # its memory is the host's, and these move nothing
        recipe = recipe.with_memory({"checkpoint_offload": False, "embedding_on_cpu": False})
    model = (models or MetaModels()).get(recipe, config, choose_dtype(recipe.model.dtype, kind))
    planned.apply(model, kind)
    trained = [parameter for _, parameter in model.trained()]
    gradients = [parameter.new_empty(parameter.shape) for parameter in trained]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    standing, paged = standing_bytes(model, recipe)
    batching, objective = model.batching(recipe, pad_id=0), find_objective(recipe.loss)
    pairs = heaviest(recipe, triples, batching, in_one_row=model.route in ("shared", "packed"))
    known = [tensor for tensors in held_tensors(model).values() for tensor in tensors] + gradients
    forget_rows()
    with (
        without_values(),
        _kernels_of(recipe),
        LiveBytes(known) as meter,
        phases(model.backbone, meter),
    ):
        batch = make_batch(pairs, batching).to(META)
        logps = model(batch)
        loss, _ = objective.loss(logps, objective.divisors(pairs))
        meter.phase = "backward pass"
        loss.backward()  # type: ignore[no-untyped-call]
    unseen = int(_attention_flops(model, recipe, batch) * planned.unseen)
    work = meter.work + Counter({(unseen, 0): 1})
    return StepMemory(
        held=standing,
        peak=meter.peak,
        parts={name: size for name, size in meter.peak_by_phase.items() if size},
        host=meter.host_peak + moved_bytes(model),
        work=work,
        sent=meter.sent,
        paged=paged,
        tokens=_tokens(pairs, batching),
        pairs=len(pairs),
        loading=loading_bytes(model, standing),
        weights=sum(
            _elements(parameter) for parameter in model.parameters() if not parameter.requires_grad
        ),
        notes=tuple(model.notes),
    )


@contextmanager
def _kernels_of(recipe: Recipe) -> Iterator[None]:
    """Deterministic kernels where the recipe asks for them: attention's needs more memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(recipe.training.full_determinism)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


LOADERS = 4  # threads of transformers.core_model_loading, each with a 16-bit tensor on its way to be quantised


def standing_bytes(model: Any, recipe: Recipe) -> tuple[dict[str, int], int]:
    """What stays on the device through all steps, by part; and of the optimizer's states, those that are paged."""
    sizes = {name: sum(map(rounded, tensors)) for name, tensors in held_tensors(model).items()}
    states, paged = state_bytes(
        recipe, [parameter for parameter in model.parameters() if parameter.requires_grad]
    )
    return sizes | {"gradients": sizes["adapter"], "optimizer": states + paged}, paged


def moved_bytes(model: PairModel) -> int:
    """The input embedding where it is in host memory."""
    embedding = model.causal.get_input_embeddings().weight
    return rounded(embedding) if is_on_host(embedding) else 0


def loading_bytes(model: PairModel, standing: Mapping[str, int]) -> int:
    """While the base is loaded: all of it, an embedding that goes to the host later, and what is on its way."""
    quantised = [
        _elements(parameter)
        for parameter in model.parameters()
        if hasattr(parameter, "quant_state")
    ]
    on_its_way = LOADERS * 2 * max(quantised, default=0)
    return standing["base"] + standing["embeddings, head, norms"] + moved_bytes(model) + on_its_way


@contextmanager
def phases(backbone: Any, meter: LiveBytes) -> Iterator[None]:
    """Say to the meter what is being done: the batch, the layers of ``backbone``, then the head and the loss."""

    def set_phase(name: str) -> Any:
        return lambda *_: setattr(meter, "phase", name)

    meter.phase = "batch"
    hooks = [
        backbone.register_forward_pre_hook(set_phase("kept by the layers")),
        backbone.register_forward_hook(set_phase("head")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention_flops(model: PairModel, recipe: Recipe, batch: Batch) -> int:
    """Of all layers: 4 a causal cell and head dimension, 2.5 times that backward, once more where one is checkpointed.

    What a window hides is counted too.
    """
    if isinstance(batch, PackedPairs):
        cells = sum((b - a) * (b - a + 1) // 2 + (b - a) * (d - c) for a, b, c, d in batch.segments)
    else:
        rows, width = batch.input_ids_RT.shape
        cells = rows * width * (width + 1) // 2
    config = model.config.get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(4 * heads * size * cells * (3.5 * layers + recipe.memory.checkpointed(layers)))


def rounded(tensor: Any) -> int:
    """Bytes of a tensor's storage as the allocator hands them out."""
    return allocated(tensor.untyped_storage())


def _elements(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else int(parameter.numel())
