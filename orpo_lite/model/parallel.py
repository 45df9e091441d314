"""The processes of a training, by way of accelerate, which no other module knows."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather, parse_flag_from_env, reduce
from torch import Tensor

from orpo_lite.errors import Command, RecipeError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
LAUNCH = (
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # what a launch sets, all of them
DEVICE = "ACCELERATE_TORCH_DEVICE"  # accelerate takes it as it is
SHARDED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


class Processes:
    """This process among those of a launch; a single one without a launch.

    Raises:
        RecipeError: accelerate is configured for something other than plain data parallel, or the environment holds
            a part of a launch.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        _check_environment()
        # No Accelerator: dtypes are ours, and another one in this process may have others, or DeepSpeed.
        self._state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.device: torch.device = self._state.device
        if (
            self.device.type == "cuda" and self.device.index is None
        ):  # of a single process: the current one
            self.device = torch.device("cuda", torch.cuda.current_device())
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise RecipeError(
                where="environment",
                found=f"{DEVICE}={self.device}, and torch finds {torch.cuda.device_count()} CUDA devices",
                expected="a device that is here",
                fix=Command(f"unset {DEVICE}"),
            )
        if self._state.distributed_type not in SUPPORTED:
            raise RecipeError(
                where="accelerate's configuration",
                found=f"distributed by {self._state.distributed_type.value}",
                expected="one process, or plain data parallel",
                fix=Command("accelerate config"),
            )
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.is_main: bool = self._state.is_main_process

    def wait(self) -> None:
        """Return when every process is here."""
        self._state.wait_for_everyone()

    def on_main(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function`` in the main process only; the others go on meanwhile."""
        if self.is_main:
            function(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's ``loss`` to the parameters."""
        loss.backward()  # type: ignore[no-untyped-call]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the processes' tensors, in each of them."""
        total: Tensor = reduce(values, reduction="sum")
        return total

    def smallest(self, number: int) -> int:
        """Return the smallest of the processes' numbers, in each of them."""
        return int(gather(torch.tensor([number], device=self.device)).min())

    def any(self, flag: bool) -> bool:
        """Return whether one of the processes says so, in each of them."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Let each gradient be the sum over all processes: an adapter's is small, and one message carries it."""
        if self.count == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total: Any = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for parameter, part in zip(
            parameters, total.split([grad.numel() for grad in grads]), strict=True
        ):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def _check_environment() -> None:
    """Raise :class:`RecipeError` for a part of a launch, of which each process would take itself for the only one."""
    found = {name: os.environ[name] for name in LAUNCH if name in os.environ}
    numbers = {
        name: int(found[name]) for name in LAUNCH[:3] if found.get(name, "").lstrip("-").isdigit()
    }
    is_launch = numbers.get("LOCAL_RANK", -1) >= 0  # accelerate's own sign of one
    lacking = [name for name in LAUNCH if name not in found]
    is_one_of_many = numbers.get("RANK", 0) > 0 or numbers.get("WORLD_SIZE", 1) > 1
    words = [name for name in LAUNCH[:3] if name in found and name not in numbers]
    if words or (is_launch and lacking) or (not is_launch and is_one_of_many):
        lacking = lacking or ["LOCAL_RANK"]
        raise RecipeError(
            where="environment",
            found=", ".join(f"{name}={value}" for name, value in found.items())
            + (
                f" without {', '.join(lacking)}"
                if not words
                else f", where {words[0]} is no number"
            ),
            expected="all that a launch sets, or nothing of it",
            fix=Command(
                f"unset {' '.join(found)}", "; or start by `accelerate launch -m orpo_lite`"
            ),
        )
    if is_launch and (asked := [name for name in SHARDED if parse_flag_from_env(name)]):
        raise RecipeError(
            where="environment",
            found=f"{asked[0]}={os.environ[asked[0]]}",
            expected="one process, or plain data parallel",
            fix=Command(
                f"unset {' '.join(asked)}",
                ", where `accelerate config` did not set it; else choose neither",
            ),
        )
