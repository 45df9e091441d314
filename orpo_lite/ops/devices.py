"""Classify devices, and move tensors between a device and host memory.

On the meta device, these moves are simulated.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

META = torch.device("meta")


def device_kind(device: torch.device) -> str:
    """Return "cpu", "ampere" (NVIDIA's Ampere GPUs and later ones) or "cuda" (earlier GPUs)."""
    if device.type != "cuda":
        return "cpu"
    return "ampere" if torch.cuda.get_device_capability(device) >= (8, 0) else "cuda"


# Messages of the driver and of NVIDIA's libraries if an allocation outside of torch's allocator
# fails. Their errors all have the same type, so only the message shows the cause.
OUT_OF_MEMORY = (
    "cuda error: out of memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that the device is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error).lower() for sign in OUT_OF_MEMORY
    )


def is_device_error(error: BaseException) -> bool:
    """Return whether an error comes from the GPU, its driver or its libraries."""
    signs = ("cuda error", "cublas_status", "cudnn_status")
    return isinstance(error, torch.AcceleratorError) or any(
        sign in str(error).lower() for sign in signs
    )


def is_lost(error: BaseException) -> bool:
    """Return whether an error was raised because another process of the training ended."""
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


HOST = torch.device("cpu")

_host_storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
_making_host_memory = False


def transfer(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on ``device``. The copy is asynchronous.

    A copy from a GPU to the CPU is in pinned memory. Code on another CUDA stream must wait for the
    stream on which the copy was started.

    The result for a meta tensor is a meta tensor. If ``device`` is the CPU, the result represents
    host memory: :func:`is_on_host` returns True for it.
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
    """Allocate ``size`` bytes of pinned host memory for copies to and from ``device``.

    If ``device`` is meta, return a meta tensor that represents host memory.
    """
    if device.type == "meta":
        with _host_memory(True):
            memory_B = torch.empty(size, dtype=torch.uint8, device=device)
        mark_as_host(memory_B.untyped_storage())
        return memory_B
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def is_on_host(tensor: Tensor) -> bool:
    """Return True for a tensor in host memory or a meta tensor that represents host memory."""
    return tensor.untyped_storage() in _host_storages if tensor.is_meta else tensor.device == HOST


def mark_as_host(storage: torch.UntypedStorage) -> None:
    """Record that a meta storage represents host memory."""
    _host_storages.add(storage)


def making_host_memory() -> bool:
    """Return True during the allocation of a meta tensor that represents host memory.

    The code that counts the bytes of meta tensors calls this.
    """
    return _making_host_memory


@contextmanager
def _host_memory(active: bool) -> Iterator[None]:
    global _making_host_memory
    before, _making_host_memory = _making_host_memory, active or _making_host_memory
    try:
        yield
    finally:
        _making_host_memory = before


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in recipes and lock.json: ``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
