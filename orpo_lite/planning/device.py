"""The device that a training runs on: named, and refused where a GPU is here that torch cannot use."""

import os
from dataclasses import dataclass
from typing import Any

import pynvml
import torch
from transformers import AutoModelForCausalLM

from orpo_lite.errors import FitError, Overrides
from orpo_lite.ops.devices import META
from orpo_lite.recipe.text import GIB

CPU_LIMIT = 10**9
"""Parameters of a base up to which a training on the CPU is nothing to stop somebody for."""
# NVIDIA, "CUDA Compatibility": the drivers that run any minor version of a major one.
MIN_DRIVER = {"12": "525", "13": "580"}


@dataclass(frozen=True)
class UnusableGpu:
    """A GPU that the driver has and torch does not."""

    name: str
    driver: str
    """Its version."""

    def __str__(self) -> str:
        cuda = torch.version.cuda
        if cuda is None:
            why = "this torch is built for CPUs alone"
        else:
            needed = MIN_DRIVER.get(cuda.split(".")[0])
            why = f"this torch is built for CUDA {cuda}" + f", from driver {needed} on" * bool(
                needed
            )
        return f"{self.name} is here with driver {self.driver}, and cannot be used: {why}"

    @property
    def remedy(self) -> str:
        """What to install."""
        if torch.version.cuda is None:
            return "install torch with CUDA (https://pytorch.org/get-started/locally)"
        return "update the driver"


def describe_device(device: torch.device) -> str:
    """Return the sentence that says what a training runs on, and why not on a GPU that the driver has."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory, version = properties.total_memory / GIB, f"{properties.major}.{properties.minor}"
        return f"training on {properties.name} ({device}, {memory:.1f} GiB, compute capability {version})"
    said = f"training on the CPU ({torch.get_num_threads()} threads)"
    gpu = find_unusable_gpu()
    return f"{said}: {gpu}; {gpu.remedy}" if gpu else said


def refuse_slow_device(device: torch.device, wanted: str, name: str, config: Any) -> None:
    """Refuse to train a large base on a CPU next to a GPU that torch cannot use. Raises :class:`FitError`.

    Args:
        device: that the training would run on.
        wanted: ``model.device``; with cpu nothing is refused.
        name: of the base.
        config: of the base, transformers'.
    """
    if device.type != "cpu" or wanted == "cpu" or not (gpu := find_unusable_gpu()):
        return
    with META:
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count <= CPU_LIMIT:
        return
    text = f"{gpu.remedy}; or model.device=cpu, which takes hours a step"
    raise FitError(
        where=f"model {name}",
        found=f"its {count / 1e9:.1f} billion parameters would be trained on the CPU. {gpu}",
        expected="a GPU that torch can use",
        fix=Overrides({"model.device": "cpu"}, text=text),
    )


def find_unusable_gpu() -> UnusableGpu | None:
    """The first GPU that NVML finds where torch finds none, though none is hidden from it."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    try:
        pynvml.nvmlInit()
        try:
            name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
            return UnusableGpu(str(name), str(pynvml.nvmlSystemGetDriverVersion()))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
