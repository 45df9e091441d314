"""Find and synchronise the processes of a training, with accelerate.

The only other module that uses accelerate is ``training.trackers``.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from accelerate import PartialState, init_empty_weights
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    gather,
    parse_flag_from_env,
    reduce,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from orpo_lite.errors import Command, Overrides, RecipeError
from orpo_lite.recipe.schema import Recipe

T = TypeVar("T")
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
LAUNCH = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launch of several processes sets."""
DEVICE = "ACCELERATE_TORCH_DEVICE"  # accelerate uses its value without a check
SHARDED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


class Processes:
    """This process, and the other processes that `accelerate launch` started, if any.

    Raises:
        RecipeError: accelerate is configured for more than plain data parallelism, the environment
            variables in LAUNCH are incomplete or wrong, or the device does not exist.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        _check_environment()
        # An Accelerator is not used, because this package sets the dtypes itself. Other code in
        # this process may also have made one with other dtypes or DeepSpeed.
        self._state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.device: torch.device = self._state.device
        if self.device.type == "cuda" and self.device.index is None:
            # A single process uses the current device.
            self.device = torch.device("cuda", torch.cuda.current_device())
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise RecipeError(
                where="environment",
                found=f"{DEVICE}={self.device}, but the number of CUDA devices is {count}",
                expected="a CUDA device of this machine",
                fix=Command(f"unset {DEVICE}"),
            )
        if self._state.distributed_type not in SUPPORTED:
            raise RecipeError(
                where="accelerate's configuration",
                found=f"it uses {self._state.distributed_type.value}",
                expected="one process, or plain data parallelism",
                fix=Command("accelerate config"),
            )
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.is_main: bool = self._state.is_main_process

    def mesh(self, recipe: Recipe) -> DeviceMesh | None:
        """Return the processes that share a copy of the base with this one; None if none do.

        Raises RecipeError as :func:`check_processes` does.
        """
        shards = recipe.memory.shards
        if shards == 1:
            return None
        check_processes(recipe, self.count)
        # Each row of this grid holds one copy of the base.
        grid = init_device_mesh(
            self.device.type, (self.count // shards, shards), mesh_dim_names=("copies", "shard")
        )
        return grid["shard"]

    def wait(self) -> None:
        """Wait until every process has called this."""
        self._state.wait_for_everyone()

    def on_main(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function`` in the main process only. The other processes do not wait for it."""
        if self.is_main:
            function(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's ``loss`` to the parameters."""
        loss.backward()  # type: ignore[no-untyped-call]

    def sum(self, values: Tensor) -> Tensor:
        """Return, in every process, the sum of the ``values`` of all processes."""
        total: Tensor = reduce(values, reduction="sum")
        return total

    def smallest(self, number: int) -> int:
        """Return, in every process, the smallest value of ``number`` in all processes."""
        return int(gather(torch.tensor([number], device=self.device)).min())

    def all_equal(self, number: int) -> bool:
        """Return, in every process, whether ``number`` is the same in all processes."""
        if self.count == 1:
            return True
        found = gather(torch.tensor([number], device=self.device))
        return bool((found == number).all())

    def any(self, flag: bool) -> bool:
        """Return, in every process, whether ``flag`` is true in at least one process."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def from_main(self, value: T) -> T:
        """Return, in every process, the ``value`` of the main process. It is sent with pickle."""
        found = [value]
        broadcast_object_list(found)
        return found[0]

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Set each gradient to its sum over all processes.

        All gradients are sent as one tensor, because an adapter's gradients are small.
        """
        if self.count == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total: Any = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for parameter, part in zip(
            parameters, total.split([grad.numel() for grad in grads]), strict=True
        ):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def check_processes(recipe: Recipe, count: int) -> None:
    """Raise RecipeError if ``count`` processes cannot train a recipe.

    ``memory.shard`` must divide the number of processes, and PPO needs one process.
    """
    shards = recipe.memory.shards
    if recipe.loss.type == "ppo" and count > 1:
        raise RecipeError(
            where=recipe.sources["loss.type"],
            found=f"loss.type=ppo with {count} processes",
            expected="one process",
            fix="start `orpo-lite train` without `launch`",
        )
    if count % shards:
        raise RecipeError(
            where=recipe.sources["memory.shard"],
            found=f"memory.shard={shards} with {_count(count)}",
            expected="a number that divides the number of processes",
            fix=Overrides(
                {"memory.shard": "off"},
                text="memory.shard=off; or write "
                f"`orpo-lite launch --processes {shards} --` in place of `orpo-lite`",
            )
            if count == 1
            else Overrides({"memory.shard": "auto"}),
        )


def empty_weights() -> AbstractContextManager[None]:
    """Return a context in which a model is built with buffers, but without memory for weights."""
    context: AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return context


def describe_processes(count: int, shards: int) -> str:
    """Return a text for the user: the processes of a training, and who holds the base."""
    if shards == 1:
        return f"{count} processes, each with the whole base (memory.shard=off)"
    return f"{count} processes, of which {shards} share a base (memory.shard={shards})"


def _count(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"


def _check_environment() -> None:
    """Raise RecipeError if the environment variables of a launch are incomplete or wrong.

    With only some variables of LAUNCH, each process would run as if it were the only one.
    """
    found = {name: os.environ[name] for name in LAUNCH if name in os.environ}
    numbers = {
        name: int(found[name]) for name in LAUNCH[:3] if found.get(name, "").lstrip("-").isdigit()
    }
    is_launch = numbers.get("LOCAL_RANK", -1) >= 0  # as accelerate decides it
    missing = [name for name in LAUNCH if name not in found]
    is_one_of_many = numbers.get("RANK", 0) > 0 or numbers.get("WORLD_SIZE", 1) > 1
    not_numbers = [name for name in LAUNCH[:3] if name in found and name not in numbers]
    is_incomplete = (is_launch and bool(missing)) or (not is_launch and is_one_of_many)
    if not_numbers or is_incomplete:
        if not_numbers:
            problem = f", where {not_numbers[0]} is not a number"
        else:
            problem = f" without {', '.join(missing or ['LOCAL_RANK'])}"
        raise RecipeError(
            where="environment",
            found=", ".join(f"{name}={value}" for name, value in found.items()) + problem,
            expected="all environment variables that a launch sets, or none of them",
            fix=Command(
                f"unset {' '.join(found)}", "; or start with `accelerate launch -m orpo_lite`"
            ),
        )
    sharded = [name for name in SHARDED if parse_flag_from_env(name)]
    if is_launch and sharded:
        raise RecipeError(
            where="environment",
            found=f"{sharded[0]}={os.environ[sharded[0]]}",
            expected="one process, or plain data parallelism",
            fix=Command(
                f"unset {' '.join(sharded)}",
                "; if the configuration of accelerate turns this on, run `accelerate config` "
                "again without DeepSpeed, FSDP and Megatron-LM",
            ),
        )
