"""The memory and speed of well-known GPUs, what a program needs beyond its tensors, and the free
memory of this machine's GPU.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from orpo_lite.recipe.text import GIB


@dataclass(frozen=True)
class Gpu:
    """The memory of a GPU, and its two speeds: of computing and of memory."""

    name: str
    memory: int
    """Bytes that a program finds: torch's total capacity, a little less than on the box."""
    flops: float
    """Operations per second of dense matrix products in bfloat16 that sum in float32."""
    bandwidth: float
    """Bytes per second to and from its memory."""
    capability: tuple[int, int] = (8, 0)
    """NVIDIA's compute capability."""


# (flops, bandwidth) by a part of the driver's name of the GPU; from NVIDIA's data sheets and its
# papers on Ampere (GA102) and Ada.
SPEEDS = {
    "RTX 5090": (210e12, 1792e9), "RTX 4090": (165e12, 1008e9), "RTX 4080": (97e12, 717e9),
    "RTX 4070": (58e12, 504e9), "RTX 4060": (30e12, 272e9), "RTX 3090": (71e12, 936e9),
    "RTX 3080": (60e12, 760e9), "RTX 3060": (26e12, 360e9), "RTX 6000 Ada": (364e12, 960e9),
    "RTX A6000": (155e12, 768e9), "H200": (989e12, 4800e9), "H100": (989e12, 3350e9),
    "A100": (312e12, 2039e9), "L40S": (362e12, 864e9), "L4": (121e12, 300e9),
    "A10G": (70e12, 600e9), "A10": (125e12, 600e9), "T4": (65e12, 320e9),
}  # fmt: skip
GPUS = (  # rows of the plan's table; memory as torch reports it
    Gpu("RTX 4060, 8 GB", int(7.63 * GIB), *SPEEDS["RTX 4060"], (8, 9)),
    Gpu("RTX 3060, 12 GB", int(11.75 * GIB), *SPEEDS["RTX 3060"], (8, 6)),
    Gpu("RTX 4080, 16 GB", int(15.7 * GIB), *SPEEDS["RTX 4080"], (8, 9)),
    Gpu("RTX 4090, 24 GB", int(23.6 * GIB), *SPEEDS["RTX 4090"], (8, 9)),
    Gpu("RTX A6000, 48 GB", int(47.5 * GIB), *SPEEDS["RTX A6000"], (8, 6)),
    Gpu("A100, 80 GB", int(79.1 * GIB), *SPEEDS["A100"], (8, 0)),
)


MIB = 2**20
# Allowances for what the measured step cannot show. None of them was fitted to a model.
# The CUDA context with the kernels of torch, cuBLAS and bitsandbytes: 300 to 550 MiB on today's
# GPUs.
CONTEXT = 512 * MIB
# A share of the step's own bytes, and its minimum.
FRAGMENTATION, LEAST_FRAGMENTATION = 0.05, 256 * MIB
# What torch's aten/src/ATen/cuda/CublasHandlePool.cpp allocates for each of two handles, the main
# thread's and autograd's. For cuBLAS it is 8.125 MiB; 32 MiB on compute capability 9.0 (Hopper) and
# with CUBLAS_WORKSPACE_CONFIG=:4096:8 (deterministic). For cuBLASLt it is 1 MiB. They count in
# torch.cuda.max_memory_allocated.
HANDLES, CUBLAS, CUBLAS_HOPPER, CUBLAS_LT = 2, 8 * MIB + MIB // 8, 32 * MIB, MIB
HOPPER = (9, 0)


def allowances(step: int, gpu: Gpu | None, *, deterministic: bool = False) -> dict[str, int]:
    """Return the bytes that are needed in addition to tensors, for a step that holds ``step``."""
    if not gpu:
        return {"fragmentation": int(FRAGMENTATION * step)}
    cublas = CUBLAS_HOPPER if deterministic or gpu.capability == HOPPER else CUBLAS
    return {
        "CUDA context": CONTEXT,
        "kernels' workspaces": HANDLES * (cublas + CUBLAS_LT),
        "fragmentation": max(int(FRAGMENTATION * step), LEAST_FRAGMENTATION),
    }


@dataclass(frozen=True)
class Holder:
    """Another process that holds memory of a GPU."""

    pid: int
    program: str
    """Name of its program without the folder; "" if the driver does not tell."""
    memory: int
    """Bytes; 0 if the driver does not tell."""


@dataclass(frozen=True)
class LocalGpu:
    """The GPU of this machine, with its free memory at this moment."""

    gpu: Gpu
    free: int
    """Bytes that this process may use: what the driver has left, and what it has given to it."""
    holders: tuple[Holder, ...] = ()
    driver: str = ""
    """The driver's version; "" if it does not answer."""

    @property
    def others(self) -> int:
        """Bytes that other processes hold."""
        return sum(holder.memory for holder in self.holders)


def local_gpu(index: int = 0) -> LocalGpu | None:
    """Return this machine's GPU with its free memory; None without one. Nothing is changed."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    # A laptop's GPU is slower than the desktop GPU of the same name.
    known = [
        speeds
        for part, speeds in SPEEDS.items()
        if re.search(rf"\b{part}\b(?! Laptop)", properties.name)
    ]
    if known:
        flops, bandwidth = known[0]
    else:
        similar = min(GPUS, key=lambda gpu: abs(gpu.memory - properties.total_memory))
        flops, bandwidth = similar.flops, similar.bandwidth
    capability = torch.cuda.get_device_capability(index)
    gpu = Gpu(properties.name, properties.total_memory, flops, bandwidth, capability)
    from_driver = _ask_driver(str(properties.uuid))
    free, holders, driver = from_driver or (torch.cuda.mem_get_info(index)[0], (), "")
    return LocalGpu(gpu, free, holders, driver)


def memory_budget(wanted: int | None, local: LocalGpu | None) -> int | None:
    """Return the bytes that a run may use: ``wanted``, but not more than is free.

    None if neither is known.
    """
    sizes = []
    if wanted is not None:
        sizes.append(wanted)
    if local:
        sizes.append(local.free)
    return min(sizes, default=None)


def _ask_driver(uuid: str) -> tuple[int, tuple[Holder, ...], str] | None:
    """Return (free bytes, other processes, the driver's version) by NVML; None without an answer.

    NVML needs no CUDA context.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            full_uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(full_uuid)
            free = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
            own, holders = 0, []
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                used = int(process.usedGpuMemory or 0)
                if process.pid == os.getpid():
                    own += used
                else:
                    program = _ask(pynvml.nvmlSystemGetProcessName, process.pid)
                    holders.append(Holder(process.pid, program.rpartition("/")[2], used))
            # The CUDA context of this process exists already. A plan counts it as needed memory.
            return free + own, tuple(holders), _ask(pynvml.nvmlSystemGetDriverVersion)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _ask(function: Callable[..., object], *args: object) -> str:
    """Return a text that the driver may refuse to tell; "" then."""
    import pynvml

    try:
        return str(function(*args))
    except pynvml.NVMLError:
        return ""
