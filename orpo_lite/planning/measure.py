"""Run the real training step on the meta device, without weights. Measure its memory and work."""

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
from orpo_lite.model.memory import NO_MEMORY_SETTINGS, with_memory_settings
from orpo_lite.model.optimizer import state_bytes
from orpo_lite.model.pair_model import PairModel
from orpo_lite.objectives.objective import find_objective
from orpo_lite.ops.devices import META, is_on_host
from orpo_lite.ops.segments import clear_row_caches
from orpo_lite.planning.gathers import counting_gathers, divided_bytes, largest_layer
from orpo_lite.planning.meter import LiveBytes, allocated_bytes
from orpo_lite.planning.on_meta import (
    Triples,
    blank_pairs,
    held_tensors,
    patched_for_meta,
    trained_parameters,
)
from orpo_lite.planning.route import PlannedRoute, find_route
from orpo_lite.recipe.schema import Recipe


@dataclass(frozen=True)
class StepMemory:
    """The memory and the work of one forward and backward pass, measured on the meta device."""

    held: Mapping[str, int]
    """Bytes that stay on the device through all steps, by part."""
    peak: int
    """The largest number of bytes that the pass uses at one time, in addition to ``held``."""
    parts: Mapping[str, int]
    """The bytes of ``peak`` by the phase that allocated them."""
    host: int
    """The largest number of bytes in host memory at one time."""
    work: Counter[tuple[int, int]]
    """(FLOPs, bytes moved) -> number of such operators. One extra entry has attention's FLOPs."""
    sent: int
    """Bytes that were copied to host memory. They are copied back later."""
    paged: int
    """Bytes of the optimizer's states that the driver may move to host memory."""
    tokens: int
    pairs: int
    weights: int
    """Number of parameters of the base."""
    loading: int
    """Bytes on the device while the base is loaded."""
    notes: tuple[str, ...]
    """Notes for the user about a step of this model, one line each."""

    @property
    def total(self) -> int:
        """Bytes on the device at the peak of a step."""
        return sum(self.held.values()) + self.peak


def heaviest_pairs(
    recipe: Recipe, triples: Triples, batching: Batching, *, in_one_row: bool
) -> list[TokenizedPair]:
    """Return artificial pairs that need at least as much memory as any micro-batch of the recipe.

    One row per micro-batch: memory grows with the numbers of tokens, segments and prefix tokens.
    (FlashAttention needs space for 128 additional tokens per segment. Attention repeats the keys
    and values of prefix tokens.) The artificial pairs have the maximum of all three numbers.

    Several rows per micro-batch: the longest pairs are divided into micro-batches. The artificial
    pairs are as long as the pairs of the largest one. If there is room, a further pair fills it.

    Args:
        recipe: the recipe of the run.
        triples: the token counts of the run's pairs.
        batching: the limits of a micro-batch.
        in_one_row: whether the model takes all pairs of a micro-batch in one row.
    """
    most = recipe.training.global_batch_size
    if not (batching.packed and in_one_row):
        return _longest_pairs(triples, most, batching)
    most = min(most, batching.pairs or most)
    prefixes = triples[:, 0] if batching.share else np.zeros_like(triples[:, 0])
    tokens = triples[:, 1] + triples[:, 2] - prefixes
    ordered = np.sort(tokens)
    total = max(int(ordered[-1]), min(batching.tokens, int(ordered[-most:].sum())))
    # The largest number of pairs: as many of the shortest pairs as fit.
    pairs = max(1, min(most, int((ordered.cumsum() <= total).sum())))
    # The most prefix tokens: pairs with the largest share of them, the last one cut to fit.
    shares = prefixes / tokens
    by_share = np.argsort(-shares, kind="stable")
    filled = np.minimum(tokens[by_share].cumsum(), total)
    prefix = int((np.diff(filled, prepend=0) * shares[by_share]).sum())
    prefix = min(prefix, int(np.sort(prefixes)[-most:].sum()), total - 2 * pairs)
    # Prefix tokens and other tokens are divided evenly among the pairs.
    bounds = np.arange(pairs + 1)
    each_prefix, each_rest = (np.diff(size * bounds // pairs) for size in (prefix, total - prefix))
    chosen, rejected = each_prefix + (each_rest + 1) // 2, each_prefix + each_rest // 2
    if not triples[:, 2].any():  # the objective needs no rejected sequences
        chosen, rejected = each_rest, np.zeros_like(each_rest)
    return blank_pairs(np.stack([each_prefix, chosen, rejected], 1))


def _longest_pairs(triples: Triples, most: int, batching: Batching) -> list[TokenizedPair]:
    """Return the largest micro-batch of the longest pairs. One more pair fills its free space."""
    lengths = triples[:, 1] + triples[:, 2]
    if batching.share:
        lengths = lengths - triples[:, 0]
    pairs = blank_pairs(triples[np.argsort(-lengths, kind="stable")[:most]])
    chunks = [[pairs[index] for index in chunk] for chunk in micro_batches(pairs, batching)]
    largest = max(chunks, key=lambda chunk: _tokens(chunk, batching))
    free_tokens = min(batching.tokens, _tokens(pairs, batching)) - _tokens(largest, batching)
    has_free_pair = len(largest) < (batching.pairs or len(pairs))
    if batching.packed and free_tokens > 3 and has_free_pair:
        half = free_tokens // 2
        largest = [*largest, *blank_pairs(np.array([[0, half, free_tokens - half]]))]
    return largest


def _tokens(pairs: Sequence[TokenizedPair], batching: Batching) -> int:
    """Return the number of tokens of a forward pass, including padding."""
    if batching.packed:
        return sum(packed_tokens(pair, share=batching.share) for pair in pairs)
    return 2 * len(pairs) * max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)


class MetaModels:
    """A cache of models on meta for one recipe and base, one model for each number of layers."""

    def __init__(self) -> None:
        self._models: dict[int, PairModel] = {}

    def get(self, recipe: Recipe, config: Any, dtype: torch.dtype) -> PairModel:
        """Return a model of this configuration with the recipe's memory settings.

        Models with the same number of layers share their modules. Each call changes the modules.
        So after a second call with the same number of layers, do not use the first call's model.
        """
        layers = int(config.get_text_config().num_hidden_layers)
        if layers not in self._models:
            plain = recipe.with_memory(NO_MEMORY_SETTINGS)
            self._models[layers] = bare_pair_model(plain, config, dtype)
        return with_memory_settings(self._models[layers], recipe)


def measure(
    recipe: Recipe,
    config: Any,
    triples: Triples,
    kind: str,
    planned: PlannedRoute | None = None,
    models: MetaModels | None = None,
) -> StepMemory:
    """Return the memory and the operators of a forward and backward pass on the meta device.

    The pass has the pairs of the recipe's heaviest micro-batch: see :func:`heaviest_pairs`.

    Args:
        recipe: the recipe with the memory settings to measure.
        config: transformers' configuration of the base.
        triples: the token counts of the pairs: see :data:`orpo_lite.planning.on_meta.Triples`.
        kind: the kind of device to plan for: see :func:`orpo_lite.ops.devices.device_kind`.
        planned: the route of pairs through the model; if None, :func:`find_route` finds it.
        models: the cache of models from earlier measurements of the recipe; None for a new one.
    """
    planned = planned or find_route(recipe, config, triples, kind)
    if kind == "cpu":  # all its memory is host memory, so these settings move nothing
        recipe = recipe.with_memory({"checkpoint_offload": False, "embedding_on_cpu": False})
    model = (models or MetaModels()).get(recipe, config, choose_dtype(recipe.model.dtype, kind))
    planned.apply(model, kind)
    trained = [parameter for _, parameter in model.trained()]
    gradients = [parameter.new_empty(parameter.shape) for parameter in trained]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    resident, paged = resident_bytes(model, recipe)
    batching, objective = model.batching(recipe, pad_id=0), find_objective(recipe.loss)
    is_one_row = model.route in ("shared", "packed")
    pairs = heaviest_pairs(recipe, triples, batching, in_one_row=is_one_row)
    known = [tensor for tensors in held_tensors(model).values() for tensor in tensors] + gradients
    clear_row_caches()
    with (
        patched_for_meta(),
        _deterministic_kernels(recipe.training.full_determinism),
        LiveBytes(known) as meter,
        track_phases(model.backbone, meter),
        counting_gathers(model, recipe.memory.shards, meter),
    ):
        batch = make_batch(pairs, batching).to(META)
        logps = model(batch)
        loss, _ = objective.loss(logps, batch.facts, objective.divisors(pairs))
        meter.phase = "backward pass"
        loss.backward()  # type: ignore[no-untyped-call]
    uncounted = int(_attention_flops(model, recipe, batch) * planned.uncounted)
    work = meter.work + Counter({(uncounted, 0): 1})
    return StepMemory(
        held=resident,
        peak=meter.peak,
        parts={name: size for name, size in meter.peak_by_phase.items() if size},
        host=meter.host_peak + offloaded_embedding_bytes(model),
        work=work,
        sent=meter.sent,
        paged=paged,
        tokens=_tokens(pairs, batching),
        pairs=len(pairs),
        loading=loading_bytes(model, resident, recipe.memory.shards),
        weights=sum(
            _elements(parameter) for parameter in model.parameters() if not parameter.requires_grad
        ),
        notes=tuple(model.notes),
    )


@contextmanager
def _deterministic_kernels(active: bool) -> Iterator[None]:
    """Use deterministic kernels if ``active``. For attention, they need more memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(active)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


LOADERS = 4
"""Threads of transformers.core_model_loading. Each may hold one 16-bit tensor before quantising."""


def resident_bytes(model: Any, recipe: Recipe) -> tuple[dict[str, int], int]:
    """Return (bytes of each part, paged bytes).

    The bytes of each part are a dict: part, such as "adapter" -> bytes that stay on the device
    through all steps. Paged bytes are optimizer states that the driver may move to host memory. The
    part "optimizer" includes the paged bytes.
    """
    tensors_by_part = held_tensors(model)
    sizes = {name: sum(map(storage_bytes, tensors)) for name, tensors in tensors_by_part.items()}
    trained = [parameter for _, parameter in trained_parameters(model)]
    states, paged = state_bytes(recipe, trained)
    gradients = sum(map(storage_bytes, trained))
    if (shards := recipe.memory.shards) > 1:
        layers = [divided_bytes(layer, 1) for layer in model.layers]
        parts = [divided_bytes(layer, shards) for layer in model.layers]
        sizes["base"] -= sum(layers) - sum(parts)
    return sizes | {"gradients": gradients, "optimizer": states + paged}, paged


def offloaded_embedding_bytes(model: PairModel) -> int:
    """Return the bytes of the input embedding if it is in host memory; otherwise return 0."""
    embedding = model.causal.get_input_embeddings().weight
    return storage_bytes(embedding) if is_on_host(embedding) else 0


def loading_bytes(model: PairModel, resident: Mapping[str, int], shards: int) -> int:
    """Return the bytes on the device while the base is loaded.

    The whole base is counted, also an embedding that is moved to host memory after loading. If
    layers are quantised, one 16-bit tensor per loading thread of transformers is added, because
    each thread may hold one tensor that is not quantised yet.

    ``shards``: the number of processes that share the base. If there are several, the base is read
    layer by layer in one thread, and each layer is whole until it is divided.
    """
    quantised = [
        _elements(parameter)
        for parameter in model.parameters()
        if hasattr(parameter, "quant_state")
    ]
    unquantised_bytes = (LOADERS if shards == 1 else 1) * 2 * max(quantised, default=0)
    layer = largest_layer(model) if shards > 1 else 0
    base = resident["base"] + resident["embeddings, head, norms"]
    return base + layer + offloaded_embedding_bytes(model) + unquantised_bytes


@contextmanager
def track_phases(backbone: Any, meter: LiveBytes) -> Iterator[None]:
    """Set ``meter.phase`` to the part of a forward pass that runs.

    "batch": before ``backbone``. "kept by the layers": in ``backbone``. "head": after ``backbone``.
    """

    def set_phase(name: str) -> Any:
        def hook(*_: Any) -> None:
            meter.phase = name

        return hook

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
    """Return the FLOPs of attention in all layers.

    A cell is a query token with one key token that it may see. The forward pass needs 4 FLOPs per
    cell and head dimension, and the backward pass 2.5 times as many. A checkpointed layer runs its
    forward pass twice. Cells that a sliding window hides are counted too.
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


def storage_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor's storage, rounded up as torch's CUDA allocator does."""
    return allocated_bytes(tensor.untyped_storage())


def _elements(parameter: Any) -> int:
    """Return the number of weights in a parameter. A 4-bit parameter packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else int(parameter.numel())
