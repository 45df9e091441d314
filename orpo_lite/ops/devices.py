"""Devices: which kind, host memory and meta, and the one way between them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

META = torch.device("meta")


def device_kind(device: torch.device) -> str:
    """cpu; ampere for that generation of NVIDIA's cards and later ones; cuda for those before."""
    if device.type != "cuda":
        return "cpu"
    return "ampere" if torch.cuda.get_device_capability(device) >= (8, 0) else "cuda"


# What the driver and NVIDIA's libraries say where memory runs out outside of torch's allocator. The type is that of
# their other errors.
OUT_OF_MEMORY = (
    "cuda error: out of memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error).lower() for sign in OUT_OF_MEMORY
    )


def is_device_error(error: BaseException) -> bool:
    """Return whether an error is the device's, and no fault of the code that was running."""
    said = ("cuda error", "cublas_status", "cudnn_status")
    return isinstance(error, torch.AcceleratorError) or any(
        sign in str(error).lower() for sign in said
    )


HOST = torch.device("cpu")

_host_storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
_making_host_memory = False


def transfer(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; every transfer between a step's device and the host goes through here.

    From a GPU to the host it lands in pinned memory, and both ways are asynchronous: whoever reads the result on
    another stream waits for the stream that this ran on. On the meta device nothing is copied; what would be in host
    memory is a meta tensor that :func:`is_on_host` knows.
    """
    if tensor.is_meta:
        to_host = device == HOST
        if to_host == is_on_host(tensor):
            return tensor
        with _host_memory(to_host):
            moved = torch.empty_like(tensor)
        if to_host:
            mark_as_host(moved.untyped_storage())
        return moved.copy_(tensor)
    if device == tensor.device:
        return tensor
    if device == HOST:
        host = torch.empty_like(tensor, device=HOST, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=True)


def host_memory(size: int, device: torch.device) -> Tensor:
    """Return ``size`` bytes of host memory for copies from and to ``device``: pinned, or the stand-in on meta."""
    if device.type == "meta":
        with _host_memory(True):
            memory_B = torch.empty(size, dtype=torch.uint8, device=device)
        mark_as_host(memory_B.untyped_storage())
        return memory_B
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def is_on_host(tensor: Tensor) -> bool:
    """Whether a meta tensor stands for host memory; any other tensor knows its device."""
    return tensor.untyped_storage() in _host_storages if tensor.is_meta else tensor.device == HOST


def mark_as_host(storage: torch.UntypedStorage) -> None:
    """Let a meta storage stand for host memory."""
    _host_storages.add(storage)


def making_host_memory() -> bool:
    """Whether what is allocated now, on meta, stands for host memory: for whoever counts bytes."""
    return _making_host_memory


@contextmanager
def _host_memory(active: bool) -> Iterator[None]:
    global _making_host_memory
    before, _making_host_memory = _making_host_memory, active or _making_host_memory
    try:
        yield
    finally:
        _making_host_memory = before
