"""The processes of a training, by way of accelerate, which no other module knows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from orpo_lite.errors import Command, RecipeError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class Processes:
    """This process among those of a launch; a single one without a launch.

    Raises:
        RecipeError: accelerate is configured for something other than plain data parallel.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        # Dtypes are ours; accelerate's autocast would copy outputs to float32.
        self._accelerator = Accelerator(mixed_precision="no", cpu=cpu)
        if self._accelerator.distributed_type not in SUPPORTED:
            raise RecipeError(
                where="accelerate's configuration",
                found=f"distributed by {self._accelerator.distributed_type.value}",
                expected="one process, or plain data parallel",
                fix=Command("accelerate config"),
            )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process

    def wait(self) -> None:
        """Return when every process is here."""
        self._accelerator.wait_for_everyone()

    def on_main(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function`` in the main process only; the others go on meanwhile."""
        if self.is_main:
            function(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's ``loss`` to the parameters."""
        self._accelerator.backward(loss)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the processes' tensors, in each of them."""
        total: Tensor = self._accelerator.reduce(values, reduction="sum")
        return total

    def smallest(self, number: int) -> int:
        """Return the smallest of the processes' numbers, in each of them."""
        return int(self._accelerator.gather(torch.tensor([number], device=self.device)).min())

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
        for parameter, part in zip(parameters, total.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
