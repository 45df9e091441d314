"""The one way between device and host memory, and a mode that follows every storage a step makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

HOST = torch.device("cpu")
ROUNDING = 512  # bytes: torch's CUDA allocator hands out no less

_host_storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; every transfer between a step's device and the host goes through here.

    From a GPU to the host it lands in pinned memory, and both ways are asynchronous: whoever reads the result on
    another stream waits for the stream that this ran on. On the meta device nothing is copied; what would be in host
    memory is a meta tensor that :class:`LiveBytes` counts apart.
    """
    if tensor.is_meta:
        storage_on_host = device == HOST
        if storage_on_host == is_on_host(tensor):
            return tensor
        with _AsHost(storage_on_host):
            return torch.empty_like(tensor)
    if device == tensor.device:
        return tensor
    if device == HOST:
        host = torch.empty_like(tensor, device=HOST, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=True)


def is_on_host(tensor: Tensor) -> bool:
    """Whether a meta tensor stands for host memory; any other tensor knows its device."""
    return tensor.untyped_storage() in _host_storages if tensor.is_meta else tensor.device == HOST


class _AsHost:
    """While it lasts, new meta storages stand for host memory, if ``active``."""

    depth = 0

    def __init__(self, active: bool) -> None:
        self.active = active

    def __enter__(self) -> None:
        _AsHost.depth += self.active

    def __exit__(self, *_: object) -> None:
        _AsHost.depth -= self.active


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
        self.host = 0
        """Bytes in host memory now, of a step on the meta device; on a GPU everything on the CPU."""
        self.host_peak = 0
        self.on_new_peak: Callable[[], None] | None = None
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in known:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._note(item.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        if _AsHost.depth:
            _host_storages.add(storage)
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            weakref.finalize(storage, self._free_host, size)
            return
        self.live += size
        weakref.finalize(storage, self._free, size)
        if self.live > self.peak:
            self.peak = self.live
            if self.on_new_peak:
                self.on_new_peak()

    def _free(self, size: int) -> None:
        self.live -= size

    def _free_host(self, size: int) -> None:
        self.host -= size
