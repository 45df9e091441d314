"""Graphics cards: what some well-known ones have, and what is free on the one that is here."""

import os
import re
from collections import Counter
from dataclasses import dataclass

import torch

from orpo_lite.recipe.text import GIB


@dataclass(frozen=True)
class Gpu:
    """A card's memory and its two speeds, which bound every operator."""

    name: str
    memory: int
    """Bytes that a program finds: what torch names as its total capacity, a little under the number on the box."""
    flops: float
    """Dense matrix products a second in bfloat16 that sum in float32."""
    bandwidth: float
    """Bytes a second to and from its memory."""
    capability: tuple[int, int] = (8, 0)
    """NVIDIA's compute capability."""


# (flops, bandwidth) by a part of the name that the driver gives; from NVIDIA's data sheets and its papers on Ampere
# (GA102) and Ada.
SPEEDS = {
    "RTX 5090": (210e12, 1792e9), "RTX 4090": (165e12, 1008e9), "RTX 4080": (97e12, 717e9), "RTX 4070": (58e12, 504e9),
    "RTX 4060": (30e12, 272e9), "RTX 3090": (71e12, 936e9), "RTX 3080": (60e12, 760e9), "RTX 3060": (26e12, 360e9),
    "RTX 6000 Ada": (364e12, 960e9), "RTX A6000": (155e12, 768e9), "H200": (989e12, 4800e9), "H100": (989e12, 3350e9),
    "A100": (312e12, 2039e9), "L40S": (362e12, 864e9), "L4": (121e12, 300e9), "A10G": (70e12, 600e9),
    "A10": (125e12, 600e9), "T4": (65e12, 320e9),
}  # fmt: skip
GPUS = (  # those of the table; memory as torch names it
    Gpu("RTX 4060, 8 GB", int(7.63 * GIB), *SPEEDS["RTX 4060"], (8, 9)),
    Gpu("RTX 3060, 12 GB", int(11.75 * GIB), *SPEEDS["RTX 3060"], (8, 6)),
    Gpu("RTX 4080, 16 GB", int(15.7 * GIB), *SPEEDS["RTX 4080"], (8, 9)),
    Gpu("RTX 4090, 24 GB", int(23.6 * GIB), *SPEEDS["RTX 4090"], (8, 9)),
    Gpu("RTX A6000, 48 GB", int(47.5 * GIB), *SPEEDS["RTX A6000"], (8, 6)),
    Gpu("A100, 80 GB", int(79.1 * GIB), *SPEEDS["A100"], (8, 0)),
)


@dataclass(frozen=True)
class LocalGpu:
    """The card that is here, now."""

    gpu: Gpu
    free: int
    """Bytes that this process may have: what the driver would still give, and what it has given."""
    others: int
    """Bytes that other processes hold."""


def local_gpu(index: int = 0) -> LocalGpu | None:
    """What is free on this machine's card; None without one. Only looked at: nothing is taken or set."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    # A laptop's card is slower than the one whose name it has.
    known = [
        speed
        for part, speed in SPEEDS.items()
        if re.search(rf"\b{part}\b(?! Laptop)", properties.name)
    ]
    flops, bandwidth = known[0] if known else (0.0, 0.0)
    if not flops:
        like = min(GPUS, key=lambda gpu: abs(gpu.memory - properties.total_memory))
        flops, bandwidth = like.flops, like.bandwidth
    capability = torch.cuda.get_device_capability(index)
    gpu = Gpu(properties.name, properties.total_memory, flops, bandwidth, capability)
    free, others = _asked_of_driver(str(properties.uuid)) or (torch.cuda.mem_get_info(index)[0], 0)
    return LocalGpu(gpu, free, others)


def memory_budget(wanted: int | None, own: LocalGpu | None) -> int | None:
    """Bytes that a run may take: what was asked for, and no more than is free; None where neither is known."""
    return min(
        (size for size in (wanted, own.free if own else None) if size is not None), default=None
    )


def _asked_of_driver(uuid: str) -> tuple[int, int] | None:
    """(free, held by others) by NVML, which needs no context of CUDA's; None where it cannot say."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(
                uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            )
            free = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
            held = Counter[bool]()
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                held[process.pid == os.getpid()] += int(process.usedGpuMemory or 0)
            # CUDA's context of this process is there already, and a plan counts it as one of its needs.
            return free + held[True], held[False]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
