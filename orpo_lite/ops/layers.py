"""Reduce the memory that decoder layers keep for the backward pass.

A checkpointed layer keeps only its input and runs again in the backward pass. The input is kept on
the device or in host memory. A tiled MLP runs on a part of its tokens at a time. The input
embedding can be in host memory. Loss and gradient do not change, because the second run of a layer
computes the same numbers as the first run.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from orpo_lite.ops.devices import HOST, host_memory, transfer
from orpo_lite.ops.segments import Layout, current_layout

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Attribute names of the MLP in transformers' decoder layers."""

UseLayout = Callable[[Layout | None], AbstractContextManager[None]]


def checkpoint_layers(
    layers: Sequence[Any], use_layout: UseLayout, *, offload: bool, has_dropout: bool
) -> None:
    """Make transformers' decoder layers keep only their input and run again in the backward pass.

    Args:
        layers: decoder layers of type ``GradientCheckpointingLayer``.
        use_layout: ``with use_layout(layout)`` sets a layout. A layer's second run is inside such a
            block, because it may be on another thread, where no layout is set.
        offload: if True, the layers' inputs are kept in host memory.
        has_dropout: whether the layers have dropout. If so, the second run uses the random state
            of the first run.
    """
    store = HostStore(len(layers)) if offload else None

    def run(layer: Any, function: Callable[..., Any], *args: Any) -> Any:
        layout = current_layout()

        def run_again(*args: Any) -> Any:
            with use_layout(layout), _evaluation_mode(layer):
                return function(*args)

        saving: AbstractContextManager[Any] = store.saving() if store else nullcontext()
        with saving:
            return checkpoint(run_again, *args, use_reentrant=False, preserve_rng_state=has_dropout)

    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(run, layer)


@contextmanager
def _evaluation_mode(layer: nn.Module) -> Iterator[None]:
    """Put the layer into evaluation mode inside the ``with`` block.

    The layer is in training mode because transformers checkpoints only layers in this mode.
    """
    was_training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = was_training


class HostStore:
    """Keeps tensors that autograd saves for the backward pass in host memory.

    On a GPU, copies and computation run at the same time.

    Forward pass: the copy of a tensor to the host starts when the tensor is saved. The tensor stays
    on the device until two more tensors have been saved. Then the computation on the device waits
    for the end of the copy. After that, other tensors may use the tensor's device memory.

    torch's ``record_stream`` is not used. The host runs ahead of the device, so with
    ``record_stream`` the allocator would reuse the memory of several tensors too late.

    Backward pass: while a layer runs, the tensor for the next layer is copied to the device. So the
    tensors of two layers are on the device. The memory of both tensors is allocated on the stream
    of the computation.

    Activation offloading in torch and in TRL works in the same way.
    """

    def __init__(self, count: int = 1) -> None:
        """Create an empty store. A forward pass is expected to save ``count`` tensors."""
        self._count = count
        self._pool = HostPool()
        self._copies = _Copies()
        self._leaving: deque[weakref.ref[_Stored]] = deque()

    def saving(self) -> AbstractContextManager[Any]:
        """Return a context manager. In its block, autograd saves float tensors in host memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.device == HOST or not tensor.is_floating_point():
            return tensor
        previous = self._leaving[-1] if self._leaving else None
        place = self._pool.place_for(tensor, self._count - self._pool.used)
        stored = _Stored(tensor.detach(), place, self._copies, previous)
        self._leaving.append(weakref.ref(stored))
        if len(self._leaving) > LEAVING:
            oldest = self._leaving.popleft()()
            if oldest:
                oldest.leave_device()
        return stored

    def _unpack(self, stored: Any) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        tensor: Tensor = stored.fetch()
        stored.leave_device()  # the caller holds the tensor now
        previous = stored.previous() if stored.previous else None
        if previous:
            previous.fetch()
        return tensor


LEAVING = 2
"""Number of tensors that may be on the device while they are copied to the host.

So a copy may take as long as the computation of two layers.
"""


class _Copies:
    """Runs copies on a separate stream. On meta there is no stream, and no code has to wait."""

    _stream: torch.cuda.Stream | None = None

    def start(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Start a copy that runs after all work queued so far. Return an event at its end."""
        if to.is_meta:
            to.copy_(source)
            return None
        device = to.device if to.is_cuda else source.device
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
            return event

    @staticmethod
    def wait(event: torch.cuda.Event | None, device: torch.device) -> None:
        """Make the device's later work wait for a copy. The host does not wait."""
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)


class _Stored:
    """A tensor in host memory. During a copy to or from the device it is on the device too."""

    __slots__ = (
        "__weakref__",
        "_copies",
        "_device",
        "_event",
        "_host",
        "_place",
        "_tensor",
        "previous",
    )

    def __init__(
        self, tensor: Tensor, place: _Place, copies: _Copies, previous: weakref.ref[_Stored] | None
    ) -> None:
        self.previous = previous
        """The tensor that was stored before this one. The backward pass needs it next."""
        self._place, self._copies, self._device = place, copies, tensor.device
        self._host = place.view(tensor)
        self._tensor: Tensor | None = tensor
        self._event: torch.cuda.Event | None = None  # for __del__, if starting the copy fails
        self._event = copies.start(self._host, tensor)

    def fetch(self) -> Tensor:
        """Return the tensor on the device. If it is only on the host, start a copy."""
        if self._tensor is None:
            # Allocate before the copy, so that the memory belongs to the current stream.
            self._tensor = torch.empty_like(self._host, device=self._device)
            self._event = self._copies.start(self._tensor, self._host)
        return self._tensor

    def leave_device(self) -> None:
        """Release the device memory. Work that reuses the memory runs after the copy."""
        self._copies.wait(self._event, self._device)
        self._tensor = self._event = None

    def __del__(self) -> None:
        self.leave_device()  # after an abandoned pass a copy may still be running
        self._place.give_back()


class HostPool:
    """Allocates pinned host memory for many tensors.

    torch rounds each request for pinned memory up to a power of two (``CachingHostAllocator.h``).
    Therefore one request, called a slab, holds many tensors.
    """

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []

    @property
    def used(self) -> int:
        """Number of tensors that are in the pool now."""
        return sum(slab.count for slab in self._slabs)

    def place_for(self, tensor: Tensor, expected: int) -> _Place:
        """Return a place for a tensor. If no slab has enough free bytes, allocate a new slab.

        ``expected``: the number of tensors of this size that still need a place, with ``tensor``.

        The size of a slab is a power of two. A new slab is not larger than all expected tensors
        together, so that little is unused: 3 tensors of 1 MiB -> a slab of 2 MiB. Exception: a
        slab must be large enough for ``tensor``: 1 tensor of 3 MiB -> a slab of 4 MiB.
        """
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        fitting = [slab for slab in self._slabs if slab.free_bytes >= size]
        if fitting:
            return fitting[0].take(size)
        slab_size = 1 << (max(expected, 1) * size).bit_length() - 1
        if slab_size < size:
            slab_size = 1 << (size - 1).bit_length()
        slab = _Slab(host_memory(slab_size, tensor.device))
        self._slabs.append(slab)
        return slab.take(size)


ALIGNMENT = 512  # bytes, as in torch's allocator on the device


class _Slab:
    """A block of host memory for several tensors. It is reused when all of them are released."""

    def __init__(self, memory_B: Tensor) -> None:
        self.memory_B, self.filled, self.count = memory_B, 0, 0

    @property
    def free_bytes(self) -> int:
        return len(self.memory_B) - self.filled

    def take(self, size: int) -> _Place:
        place = _Place(self, self.filled)
        self.filled += size
        self.count += 1
        return place

    def give_back(self) -> None:
        self.count -= 1
        if not self.count:
            self.filled = 0


class _Place(NamedTuple):
    """A tensor's place in a slab.

    After ``give_back`` another tensor may use the place at once, because all copies run on one
    stream.
    """

    slab: _Slab
    start: int

    def view(self, tensor: Tensor) -> Tensor:
        """Return the place as a tensor of the shape and dtype of ``tensor``."""
        memory_B = self.slab.memory_B[self.start : self.start + tensor.nbytes]
        return memory_B.view(tensor.dtype).view(tensor.shape)

    def give_back(self) -> None:
        self.slab.give_back()


def tile_mlps(layers: Sequence[nn.Module], tokens: int, *, has_dropout: bool) -> int:
    """Make each layer's MLP process its tokens in tiles. Return the number of MLPs changed.

    A tile has ``tokens`` tokens. The backward pass computes each tile again. The MLP's last matrix
    product is also computed again, although its result is not needed. Tiling costs about 9% more
    FLOPs.
    """
    found = 0
    for layer in layers:
        children = (getattr(layer, name, None) for name in MLP_NAMES)
        mlp = next((child for child in children if isinstance(child, nn.Module)), None)
        if mlp is not None and _takes_tokens(mlp):
            mlp.forward = _tiled(mlp, mlp.forward, tokens, has_dropout)
            found += 1
    return found


def untile_mlps(layers: Sequence[nn.Module]) -> None:
    """Undo :func:`tile_mlps`."""
    for layer in layers:
        for module in layer.children():
            if hasattr(vars(module).get("forward"), "tokens"):
                del module.forward


def _takes_tokens(mlp: nn.Module) -> bool:
    """Return whether an MLP takes one tensor and can be run on a part of its tokens.

    Two MLPs that cannot: a mixture of experts, which also returns its router's logits, and Bloom's
    MLP, which also takes the residual.
    """
    parameters = signature(mlp.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(required) == 1 and not any("expert" in name for name, _ in mlp.named_modules())


def _tiled(
    mlp: nn.Module, plain: Callable[..., Tensor], tokens: int, has_dropout: bool
) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # rare: RWKV passes a state
            return plain(x, *args, **kwargs)
        rows, tokens = x.shape[:-1].numel(), forward.tokens  # type: ignore[attr-defined]
        if rows <= tokens:
            return plain(x)
        if not torch.is_grad_enabled():
            return _fill(torch.empty_like(x), x, plain, tokens)
        trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        anchor = _Anchor(plain, tokens)
        y: Tensor = _Tiles.apply(anchor, x, *trained)
        # Fill y after autograd has recorded the operation, as in lora.py. The second run of a
        # checkpointed layer stops at the last saved tensor. This is x unless a norm follows, so the
        # second run computes no tile, and the backward pass computes each tile once.
        anchor.random_state = _random_state(x.device) if has_dropout else None
        with torch.no_grad():
            return _fill(y, x, plain, tokens)

    # Deleting the MLP's attribute ``forward`` restores the forward pass of its class.
    forward.equals_plain = True  # type: ignore[attr-defined]
    forward.tokens = tokens  # type: ignore[attr-defined]  # the probe lowers it for short pairs
    return forward


class _Anchor:
    """The objects that the backward pass of the tiles needs in addition to saved tensors."""

    def __init__(self, plain: Callable[[Tensor], Tensor], tokens: int) -> None:
        self.plain, self.tokens = plain, tokens
        self.random_state: tuple[Tensor, Tensor | None] | None = None


class _Tiles(torch.autograd.Function):
    """Runs an MLP that keeps only its input. The backward pass runs it again, tile by tile."""

    @staticmethod
    def forward(ctx: Any, anchor: _Anchor, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.anchor, ctx.trained = anchor, trained
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        x_TD, grad_TD = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x_TD = torch.empty_like(x_TD)
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        with _random_state_set(ctx.anchor.random_state, x.device):
            for start in range(0, len(x_TD), ctx.anchor.tokens):
                part = slice(start, start + ctx.anchor.tokens)
                with torch.enable_grad():
                    tile = x_TD[part].detach().unsqueeze(0).requires_grad_()
                    y = ctx.anchor.plain(tile)
                found = torch.autograd.grad(
                    y, [tile, *ctx.trained], grad_TD[part].unsqueeze(0), allow_unused=True
                )
                del y
                grad_x_TD[part] = found[0][0]
                for i, grad_i in enumerate(found[1:]):
                    if grad_i is None:
                        continue
                    total = sums[i]
                    sums[i] = grad_i if total is None else total.add_(grad_i)
        return None, grad_x_TD.view(x.shape), *sums


def _fill(y: Tensor, x: Tensor, plain: Callable[[Tensor], Tensor], tokens: int) -> Tensor:
    y_TD, x_TD = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    for start in range(0, len(x_TD), tokens):
        y_TD[start : start + tokens] = plain(x_TD[start : start + tokens].unsqueeze(0))[0]
    return y


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


@contextmanager
def _random_state_set(
    state: tuple[Tensor, Tensor | None] | None, device: torch.device
) -> Iterator[None]:
    """Set the random state inside the ``with`` block. None leaves it unchanged."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=state is not None):
        if state is not None:
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], device)
        yield


def embed_on_host(embedding: nn.Embedding) -> None:
    """Move the input embedding to host memory.

    The host looks up the embeddings of a batch's tokens and sends them to the device.
    """
    device, plain = embedding.weight.device, embedding.forward
    if device.type == "meta":
        embedding.weight.data = transfer(embedding.weight.data, HOST)
    else:
        # Move buffers too: Gemma multiplies the rows by one. The memory is not pinned, because only
        # the CPU reads it.
        embedding.to(HOST)

    def forward(ids: Tensor) -> Tensor:
        ids = transfer(ids, HOST)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the copy of the ids is asynchronous
        return transfer(plain(ids), device)

    embedding.forward = forward  # type: ignore[method-assign,assignment]


def embed_on_device(embedding: nn.Module, device: torch.device) -> None:
    """Undo :func:`embed_on_host`: move the embedding to ``device`` and restore its forward pass."""
    vars(embedding).pop("forward", None)
    embedding.to(device)
