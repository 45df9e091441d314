"""Counts what a step holds and does: a mode that follows every storage, and what each operator reads and computes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from orpo_lite.ops.devices import is_on_host, making_host_memory, mark_as_host

ROUNDING = 512  # bytes: torch's CUDA allocator hands out no less
UNTOUCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # they make, and write nothing


def allocated(storage: torch.UntypedStorage) -> int:
    """Bytes that the allocator hands out for it."""
    return -(-storage.nbytes() // ROUNDING) * ROUNDING


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, while they live.

    Storages that are there before (weights) are to be named in ``known``, else they would count at their first use.
    What a kernel allocates for itself and gives back is invisible, as are views. Sizes are rounded up to 512 bytes.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now, besides the known ones."""
        self.peak = 0
        """The most that were alive at once."""
        self.phase = ""
        """What is being done: whoever runs the step says so."""
        self.by_phase: Counter[str] = Counter()
        """The bytes alive now by the phase that made them."""
        self.peak_by_phase: Counter[str] = Counter()
        """The same at the peak."""
        self.host = 0
        """Bytes in host memory now, of a step on the meta device; on a GPU everything on the CPU."""
        self.host_peak = 0
        self.sent = 0
        """Bytes that went to host memory in all; what waits there comes back."""
        self.work: Counter[tuple[int, int]] = Counter()
        """How many operators did so many FLOPs and moved so many bytes (attention's kernels do not show theirs)."""
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in known:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        made = list(_tensors((result,)))
        for tensor in made:
            self._note(tensor.untyped_storage())
        if function._overloadpacket is torch.ops.aten.copy_ and is_on_host(args[0]) != is_on_host(args[1]):
            self.sent += args[1].nbytes * is_on_host(args[0])
            return result
        self.work[_work(function, args, kwargs, made)] += 1
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = allocated(storage)
        if making_host_memory():
            mark_as_host(storage)
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            weakref.finalize(storage, self._free_host, size)
            return
        self.live += size
        self.by_phase[self.phase] += size
        weakref.finalize(storage, self._free, self.phase, size)
        if self.live > self.peak:
            self.peak = self.live
            self.peak_by_phase = self.by_phase.copy()

    def _free(self, phase: str, size: int) -> None:
        self.live -= size
        self.by_phase[phase] -= size

    def _free_host(self, size: int) -> None:
        self.host -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operator's arguments or results, which hold lists at most one deep."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _work(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> tuple[int, int]:
    """FLOPs of an operator, and the bytes of all tensors that it reads and writes; a view does neither."""
    packet = function._overloadpacket
    if packet.__name__ in UNTOUCHED:
        return 0, 0
    read = [*_tensors(args), *_tensors(kwargs.values())]
    sources = {tensor.untyped_storage() for tensor in read}
    if not function._schema.is_mutable and all(tensor.untyped_storage() in sources for tensor in made):
        return 0, 0
    flops = 0
    if packet.__name__ == "gemm_4bit":  # (x, packed weight, shape of the weight, ...)
        flops = 2 * args[0].numel() * args[2][0]
    elif packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=made[0] if made else None))
    return flops, sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in (*read, *made)}.values())
