"""What a decoder layer keeps for the backward pass: everything, its input, its input in host memory, an MLP in tiles.

All of it leaves loss and gradient as they are; a layer's second run is the same run.
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

from orpo_lite.ops.attention import Layout, current_layout
from orpo_lite.ops.devices import HOST, host_memory, transfer

MLP_NAMES = (
    "mlp",
    "feed_forward",
    "ffn",
    "block_sparse_moe",
)  # what transformers' decoder layers call theirs

Attending = Callable[[Layout | None], AbstractContextManager[None]]


def checkpoint_layers(
    layers: Sequence[Any], attending: Attending, *, offload: bool, has_dropout: bool
) -> None:
    """Let transformers' decoder layers keep only their input and run again in the backward pass.

    Args:
        layers: of type ``GradientCheckpointingLayer``.
        attending: gives a layout back for the second run, which happens later and maybe on another thread.
        offload: their inputs wait in host memory.
        has_dropout: rewind the random state for the second run.
    """
    store = HostStore(len(layers)) if offload else None

    def run(layer: Any, function: Callable[..., Any], *args: Any) -> Any:
        layout = current_layout()

        def again(*args: Any) -> Any:
            with attending(layout), _in_evaluation(layer):
                return function(*args)

        saving: AbstractContextManager[Any] = store.saving() if store else nullcontext()
        with saving:
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=has_dropout)

    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(run, layer)


@contextmanager
def _in_evaluation(layer: nn.Module) -> Iterator[None]:
    """Compute as in evaluation: a layer is in training mode only for transformers to let it run again."""
    was_training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = was_training


class HostStore:
    """Tensors saved for the backward pass, in host memory; on a GPU the copies run next to the computation.

    Device memory is given back without ``record_stream``, which leaves the time of it to the allocator: the host runs
    ahead of the device, and several states would wait to be reclaimed. A tensor on its way to the host is held until
    two more have followed; then the computation waits for its copy, and what comes next may have its memory. On the
    way back a tensor is copied into memory of the computation's own stream. (torch's and TRL's activation offloading
    do the same.) Backward, the tensor of the layer before is fetched while a layer runs: two are on the device.
    """

    def __init__(self, count: int = 1) -> None:
        """``count``: how many tensors a forward pass is expected to save; more are taken too."""
        self._count = count
        self._pool = HostPool()
        self._copies = _Copies()
        self._leaving: deque[weakref.ref[_Stored]] = deque()

    def saving(self) -> AbstractContextManager[Any]:
        """Send saved tensors to the host while this lasts."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.device == HOST or not tensor.is_floating_point():
            return tensor
        before = self._leaving[-1] if self._leaving else None
        place = self._pool.place_for(tensor, self._count - self._pool.used)
        stored = _Stored(tensor.detach(), place, self._copies, before)
        self._leaving.append(weakref.ref(stored))
        if len(self._leaving) > LEAVING and (oldest := self._leaving.popleft()()):
            oldest.leave_device()
        return stored

    def _unpack(self, stored: Any) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        tensor: Tensor = stored.fetch()
        stored.leave_device()  # whoever asked has it now
        if before := stored.before and stored.before():
            before.fetch()
        return tensor


LEAVING = 2
"""Tensors that are on their way to the host at a time: a copy has as long as two layers take."""


class _Copies:
    """Copies on a stream of their own. On meta nothing runs, and there is nothing to wait for."""

    _stream: torch.cuda.Stream | None = None

    def start(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy after what the device has been asked to do so far; returns the event of its end."""
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
        """Let what the device is asked from now on wait for a copy; the host does not."""
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)


class _Stored:
    """A tensor in host memory; on the device too while it is copied there or back."""

    __slots__ = (
        "__weakref__",
        "_copies",
        "_device",
        "_event",
        "_host",
        "_place",
        "_tensor",
        "before",
    )

    def __init__(
        self, tensor: Tensor, place: _Place, copies: _Copies, before: weakref.ref[_Stored] | None
    ) -> None:
        self.before = before
        """The tensor that was stored before this one; it is fetched next."""
        self._place, self._copies, self._device = place, copies, tensor.device
        self._host = place.view(tensor)
        self._tensor: Tensor | None = tensor
        self._event: torch.cuda.Event | None = None
        self._event = copies.start(self._host, tensor)  # which may find no memory

    def fetch(self) -> Tensor:
        """Return the tensor on the device: the one that is leaving, or a copy that is on its way."""
        if self._tensor is None:
            # Made here, so that its memory is the current stream's, which also gives it back.
            self._tensor = torch.empty_like(self._host, device=self._device)
            self._event = self._copies.start(self._tensor, self._host)
        return self._tensor

    def leave_device(self) -> None:
        """Give the device memory back; what uses it next runs after the copy."""
        self._copies.wait(self._event, self._device)
        self._tensor = self._event = None

    def __del__(self) -> None:
        self.leave_device()  # of a pass that was given up, a copy may still be going on
        self._place.give_back()


class HostPool:
    """Host memory for many tensors that wait there together, pinned where a GPU copies it.

    torch rounds each request for pinned memory up to a power of two (``CachingHostAllocator.h``). A slab is one, and
    tensors lie in it side by side.
    """

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []

    @property
    def used(self) -> int:
        """How many tensors are in it."""
        return sum(slab.count for slab in self._slabs)

    def place_for(self, tensor: Tensor, expected: int) -> _Place:
        """Return room for a tensor, in a new slab where none has any.

        A new slab is the largest power of two that ``expected`` tensors of this size fill, so that little is unused.
        """
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        slab = next((slab for slab in self._slabs if slab.room >= size), None)
        if slab is None:
            filled = 1 << (max(expected, 1) * size).bit_length() - 1
            whole = filled if filled >= size else 1 << (size - 1).bit_length()
            slab = _Slab(host_memory(whole, tensor.device))
            self._slabs.append(slab)
        return slab.take(size)


ALIGNMENT = 512  # bytes, as of torch's allocator on the device


class _Slab:
    """Host memory that is filled from its beginning, and empty again when its last tensor is gone."""

    def __init__(self, memory_B: Tensor) -> None:
        self.memory_B, self.filled, self.count = memory_B, 0, 0

    @property
    def room(self) -> int:
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
    """A tensor's place in a slab. It is used again after ``give_back``: copies to and from it have one stream."""

    slab: _Slab
    start: int

    def view(self, tensor: Tensor) -> Tensor:
        """Return the place as a tensor of the same shape and dtype."""
        memory_B = self.slab.memory_B[self.start : self.start + tensor.nbytes]
        return memory_B.view(tensor.dtype).view(tensor.shape)

    def give_back(self) -> None:
        self.slab.give_back()


def tile_mlps(layers: Sequence[nn.Module], tokens: int, *, has_dropout: bool) -> int:
    """Let the MLP of each layer run over ``tokens`` tokens at a time; returns how many layers have one.

    Each tile runs again in the backward pass, its last product too, which nobody reads: some 9% more FLOPs.
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
    """One tensor in; a mixture of experts also gives its router's logits back, and Bloom's takes the residual too."""
    parameters = signature(mlp.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(required) == 1 and not any("expert" in name for name, _ in mlp.named_modules())


def _tiled(
    mlp: nn.Module, plain: Callable[..., Tensor], tokens: int, has_dropout: bool
) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # of no account to most: RWKV hands on a state
            return plain(x, *args, **kwargs)
        rows, tokens = x.shape[:-1].numel(), forward.tokens  # type: ignore[attr-defined]
        if rows <= tokens or not torch.is_grad_enabled():
            return plain(x) if rows <= tokens else _fill(torch.empty_like(x), x, plain, tokens)
        trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        anchor = _Anchor(plain, tokens)
        y: Tensor = _Tiles.apply(anchor, x, *trained)
        # Filled after the operation is on record, as in lora.py: the second run of a checkpointed layer ends with the
        # last tensor that is saved, which is x unless a norm follows, and each tile is computed once in the backward.
        anchor.random_state = _random_state(x.device) if has_dropout else None
        with torch.no_grad():
            return _fill(y, x, plain, tokens)

    forward.equals_plain = True  # type: ignore[attr-defined]  # without it the class's own takes over
    forward.tokens = tokens  # type: ignore[attr-defined]  # fewer while it is probed on short pairs
    return forward


class _Anchor:
    """What the backward pass of the tiles needs besides saved tensors."""

    def __init__(self, plain: Callable[[Tensor], Tensor], tokens: int) -> None:
        self.plain, self.tokens = plain, tokens
        self.random_state: tuple[Tensor, Tensor | None] | None = None


class _Tiles(torch.autograd.Function):
    """An MLP that keeps its input only, and in the backward pass runs again tile by tile."""

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
        with _rewound(ctx.anchor.random_state, x.device):
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
                for i, more in enumerate(found[1:]):
                    if more is not None:
                        sums[i] = more if sums[i] is None else sums[i].add_(more)  # type: ignore[union-attr]
        return None, grad_x_TD.view(x.shape), *sums


def _fill(y: Tensor, x: Tensor, plain: Callable[[Tensor], Tensor], tokens: int) -> Tensor:
    y_TD, x_TD = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    for start in range(0, len(x_TD), tokens):
        y_TD[start : start + tokens] = plain(x_TD[start : start + tokens].unsqueeze(0))[0]
    return y


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


@contextmanager
def _rewound(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """The random state as it was, for a while; None leaves it alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=state is not None):
        if state is not None:
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], device)
        yield


def embed_on_host(embedding: nn.Embedding) -> None:
    """Keep the input embedding in host memory; the rows of a batch are looked up there and sent to the device."""
    device, plain = embedding.weight.device, embedding.forward
    if device.type == "meta":
        embedding.weight.data = transfer(embedding.weight.data, HOST)
    else:
        embedding.to(
            HOST
        )  # its buffers too: Gemma scales what it looks up; not pinned, for only the CPU reads it

    def forward(ids: Tensor) -> Tensor:
        ids = transfer(ids, HOST)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the copy of the ids is asynchronous
        return transfer(plain(ids), device)

    embedding.forward = forward  # type: ignore[method-assign,assignment]


def embed_on_device(embedding: nn.Module, device: torch.device) -> None:
    """Undo :func:`embed_on_host`: the input embedding is on ``device`` with its own forward pass."""
    vars(embedding).pop("forward", None)
    embedding.to(device)
