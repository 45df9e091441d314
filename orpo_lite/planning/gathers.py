"""Allocate on the meta device what FSDP2 allocates when it gathers the layers of a shared base.

FSDP2 itself refuses meta tensors. The order of its allocations is that of torch 2.13.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.sharding import divisible
from orpo_lite.ops.devices import META
from orpo_lite.planning.meter import LiveBytes, rounded

PHASE = "gathered layers"
LAYER_COPIES = 3
"""Copies of a gathered layer that a process holds at once, at most."""


def part_sizes(layer: Any, shards: int) -> list[int]:
    """Return the bytes of each frozen matrix of a layer in one of the processes that share it.

    FSDP2 divides the rows of each matrix, and pads them to a multiple of ``shards``.
    """
    return [
        -(-len(p) // shards) * (p.untyped_storage().nbytes() // len(p)) for p in divisible(layer)
    ]


def divided_bytes(layer: Any, shards: int) -> int:
    """Return the sum of :func:`part_sizes`, each rounded up as torch's CUDA allocator does."""
    return sum(map(rounded, part_sizes(layer, shards)))


def largest_layer(model: PairModel) -> int:
    """Return the bytes of the matrices that processes divide, of the largest layer."""
    return max((divided_bytes(layer, 1) for layer in model.layers), default=0)


class _Gathers:
    """The gathered layers at each moment of a pass.

    A layer is gathered into a flat buffer, and its matrices are copied out of it. In the forward
    pass, the buffer of the layer before is freed after that. In the backward pass, the layer that
    comes next is gathered into its buffer while a layer runs.
    """

    def __init__(self, layers: list[Any], shards: int, meter: LiveBytes) -> None:
        self._meter = meter
        self._sizes = [[shards * size for size in part_sizes(layer, shards)] for layer in layers]
        self._is_backward = False
        self._buffer: list[Tensor] = []
        self._in_buffer = -1  # the layer whose weights the buffer has
        self._matrices: list[Tensor] = []

    def _allocate(self, *sizes: int) -> list[Tensor]:
        """Return tensors of these bytes, which the meter counts."""
        phase, self._meter.phase = self._meter.phase, PHASE
        tensors = [torch.empty(size, dtype=torch.uint8, device=META) for size in sizes]
        self._meter.phase = phase
        return tensors

    def _fill_buffer(self, layer: int) -> None:
        self._buffer, self._in_buffer = self._allocate(sum(self._sizes[layer])), layer

    def before_forward(self, layer: int) -> None:
        """Gather a layer, unless it runs again in the backward pass."""
        if not self._is_backward:
            before = self._buffer  # of the layer before; it lives until this layer is copied out
            self._fill_buffer(layer)
            self._matrices = self._allocate(*self._sizes[layer])
            del before

    def after_forward(self, layer: int, output: Any) -> None:
        """Free the matrices of a layer until the gradient of its output is known."""
        if self._is_backward:
            return
        self._matrices = []
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda _: self._before_backward(layer))

    def free_buffer(self) -> None:
        """Free the buffer."""
        self._buffer, self._in_buffer = [], -1

    def _before_backward(self, layer: int) -> None:
        self._is_backward = True
        self._matrices = []
        if self._in_buffer != layer:
            self._fill_buffer(layer)
        self._matrices = self._allocate(*self._sizes[layer])
        self.free_buffer()
        if layer:
            self._fill_buffer(layer - 1)


@contextmanager
def counting_gathers(model: PairModel, shards: int, meter: LiveBytes) -> Iterator[None]:
    """Count gathered layers in a pass through a model on meta, if processes share its base.

    Args:
        model: a model whose layers are whole.
        shards: the number of processes that share the base.
        meter: counts the bytes, in the phase PHASE.
    """
    if shards == 1:
        yield
        return
    gathers = _Gathers(model.layers, shards, meter)
    hooks = [model.backbone.register_forward_hook(lambda *_: gathers.free_buffer())]
    for number, layer in enumerate(model.layers):
        hooks += [
            layer.register_forward_pre_hook(lambda *_, n=number: gathers.before_forward(n)),
            layer.register_forward_hook(lambda *_, n=number: gathers.after_forward(n, _[-1])),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
