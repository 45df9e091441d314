"""Describe the device of a training, and refuse the CPU if torch cannot use the machine's GPU."""

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
"""If torch cannot use the machine's GPU, a base with more parameters is not trained on the CPU."""
# Major version of CUDA -> the oldest driver that runs all its minor versions. Source: NVIDIA, "CUDA
# Compatibility".
MIN_DRIVER = {"12": "525", "13": "580"}


@dataclass(frozen=True)
class UnusableGpu:
    """A GPU that the driver finds but torch cannot use."""

    name: str
    driver: str
    """The driver's version."""

    def __str__(self) -> str:
        cuda = torch.version.cuda
        if cuda is None:
            why = "this torch is built for CPUs only"
        else:
            why = f"this torch is built for CUDA {cuda}"
            min_driver = MIN_DRIVER.get(cuda.split(".")[0])
            if min_driver:
                why += f", which needs driver {min_driver} or newer"
        return f"{self.name} has driver {self.driver} and cannot be used: {why}"

    @property
    def remedy(self) -> str:
        """Advice for the user: what to install so that torch can use the GPU."""
        if torch.version.cuda is None:
            return "install torch with CUDA (https://pytorch.org/get-started/locally)"
        return "update the driver"


def describe_device(device: torch.device, doing: str = "training") -> str:
    """Return a text for the user: the task ``doing`` and the device.

    Example: "training on the CPU (8 threads)".

    If the device is the CPU and torch cannot use the machine's GPU, the text also gives the reason
    and what to install.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory, version = properties.total_memory / GIB, f"{properties.major}.{properties.minor}"
        details = f"{device}, {memory:.1f} GiB, compute capability {version}"
        return f"{doing} on {properties.name} ({details})"
    sentence = f"{doing} on the CPU ({torch.get_num_threads()} threads)"
    gpu = find_unusable_gpu()
    return f"{sentence}: {gpu}; {gpu.remedy}" if gpu else sentence


def refuse_slow_device(device: torch.device, wanted: str, name: str, config: Any) -> None:
    """Refuse to train a large base on the CPU if the machine has a GPU that torch cannot use.

    A base is large if it has more than ``CPU_LIMIT`` parameters.

    Args:
        device: the device that the training would use.
        wanted: the value of ``model.device``. With the value cpu, no base is refused.
        name: name of the base.
        config: transformers' configuration of the base.

    Raises:
        FitError: the base is large, and torch cannot use the machine's GPU.
    """
    if device.type != "cpu" or wanted == "cpu":
        return
    gpu = find_unusable_gpu()
    if not gpu:
        return
    with META:
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count <= CPU_LIMIT:
        return
    text = f"{gpu.remedy}; or set model.device=cpu to train on the CPU (a step takes hours)"
    raise FitError(
        where=f"model {name}",
        found=f"a base of {count / 1e9:.1f} billion parameters would be trained on the CPU. {gpu}",
        expected="a GPU that torch can use",
        fix=Overrides({"model.device": "cpu"}, text=text),
    )


def find_unusable_gpu() -> UnusableGpu | None:
    """Return the first GPU that the driver finds, if torch finds no GPU.

    The driver is asked with NVML. Return None if torch finds a GPU, if the driver finds no GPU, or
    if CUDA_VISIBLE_DEVICES hides all GPUs from torch.
    """
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
