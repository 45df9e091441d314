"""The memory and speed of well-known GPUs, and the free memory of this machine's GPU.

``allowances`` estimates the memory that a program needs in addition to its tensors.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from orpo_lite.recipe.text import GIB


@dataclass(frozen=True)
class Gpu:
    """The memory, computing speed and memory bandwidth of a GPU."""

    name: str
    memory: int
    """Total bytes as torch reports them: a little less than the advertised size."""
    flops: float
    """FLOPs per second of dense bfloat16 matrix products that are summed in float32."""
    bandwidth: float
    """Bytes per second between the GPU and its memory."""
    capability: tuple[int, int] = (8, 0)
    """NVIDIA's compute capability."""


# A part of the GPU's name in the driver -> (flops, bandwidth). Sources: NVIDIA's data sheets, and
# NVIDIA's papers on Ampere (GA102) and Ada.
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

# A part of the GPU's name -> (link between two GPUs, its bytes per second in one direction).
# NVLink: half of the bandwidth of NVIDIA's data sheets, which count both directions. PCIe: the rate
# of the PCI-SIG times 16 or 8 lanes, with 128b/130b encoding.
LINKS = {
    "H200": ("NVLink 4", 450e9), "H100": ("NVLink 4", 450e9), "A100": ("NVLink 3", 300e9),
    "RTX 5090": ("PCIe 5.0 x16", 63e9), "RTX 4060": ("PCIe 4.0 x8", 15.75e9),
    "T4": ("PCIe 3.0 x16", 15.75e9),
}  # fmt: skip
COMMON_LINK = ("PCIe 4.0 x16", 31.5e9)


def find_link(gpu: Gpu) -> tuple[str, float]:
    """Return (name, bytes per second in one direction) of the link between two of these GPUs."""
    return next((link for part, link in LINKS.items() if part in gpu.name), COMMON_LINK)


MIB = 2**20
# Allowances for memory that the measured step does not show. None was fitted to a model.
# The CUDA context with the kernels of torch, cuBLAS and bitsandbytes: 300 to 550 MiB on today's
# GPUs.
CONTEXT = 512 * MIB
# The allowance for fragmentation: a share of the step's own bytes, and its minimum.
FRAGMENTATION, LEAST_FRAGMENTATION = 0.05, 256 * MIB
# Workspaces that torch (aten/src/ATen/cuda/CublasHandlePool.cpp) allocates for each of two handles,
# the main thread's and autograd's. A workspace of cuBLAS has 8.125 MiB, or 32 MiB on compute
# capability 9.0 (Hopper) and with CUBLAS_WORKSPACE_CONFIG=:4096:8 (deterministic). A workspace of
# cuBLASLt has 1 MiB. torch.cuda.max_memory_allocated includes these workspaces.
HANDLES, CUBLAS, CUBLAS_HOPPER, CUBLAS_LT = 2, 8 * MIB + MIB // 8, 32 * MIB, MIB
HOPPER = (9, 0)


def allowances(step: int, gpu: Gpu | None, *, deterministic: bool = False) -> dict[str, int]:
    """Return a dict: name of an allowance -> its bytes.

    An allowance is an estimate of memory that a run needs in addition to tensors, such as the CUDA
    context. ``step``: the peak bytes of a step, without the tensors that are always on the device.
    """
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
    """Another process on this machine that uses memory of a GPU."""

    pid: int
    program: str
    """The program's file name without its folder; "" if the driver does not report it."""
    memory: int
    """Bytes that the process uses; 0 if the driver does not report them."""


@dataclass(frozen=True)
class LocalGpu:
    """A GPU of this machine, with the memory that is free now."""

    gpu: Gpu
    free: int
    """Bytes that this process may use: the free bytes plus the bytes that it uses already."""
    holders: tuple[Holder, ...] = ()
    driver: str = ""
    """The driver's version; "" if the driver does not answer."""

    @property
    def others(self) -> int:
        """Bytes of this GPU that other processes use."""
        return sum(holder.memory for holder in self.holders)


def local_gpu(index: int = 0) -> LocalGpu | None:
    """Return GPU number ``index`` with its free memory; None if torch finds no GPU."""
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
    """Return the bytes that a run may use: the minimum of ``wanted`` and ``local.free``.

    If ``wanted`` is None, return ``local.free``. If ``local`` is None, return ``wanted``. If both
    are None, return None.
    """
    sizes = []
    if wanted is not None:
        sizes.append(wanted)
    if local:
        sizes.append(local.free)
    return min(sizes, default=None)


def _ask_driver(uuid: str) -> tuple[int, tuple[Holder, ...], str] | None:
    """Return (free bytes, other processes, driver version); None if the driver does not answer.

    The driver is asked with NVML, because NVML needs no CUDA context.
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
            # The bytes of this process count as free: a plan counts its CUDA context as needed.
            return free + own, tuple(holders), _ask(pynvml.nvmlSystemGetDriverVersion)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _ask(function: Callable[..., object], *args: object) -> str:
    """Return the result of an NVML function as text; "" if the driver refuses to answer."""
    import pynvml

    try:
        return str(function(*args))
    except pynvml.NVMLError:
        return ""
