"""The peak of a process that shares the base: planned, and as its storages live."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_lite.data.packing import make_batch
from orpo_lite.model.memory import with_memory_settings
from orpo_lite.model.pair_model import PairModel
from orpo_lite.objectives.objective import find_objective
from orpo_lite.planning.measure import heaviest_pairs, measure
from orpo_lite.planning.meter import allocated_bytes
from orpo_lite.recipe.schema import Recipe

# (common prefix, chosen, rejected) of each pair of a step, in tokens
LENGTHS = np.array([[20, 50, 40], [8, 60, 15], [0, 30, 50], [30, 31, 60]])
MEMORY_SETTINGS: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": "all"},
    {"activation_checkpointing": 1, "head_chunk": 16},
    {"activation_checkpointing": "none", "mlp_tile": 64},
)


class Storages(TorchDispatchMode):
    """Follows all storages of a step, with their sizes of each moment.

    FSDP2 frees a layer by resizing its storages to 0, and keeps them.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        """The largest sum of bytes so far, with those of ``known``."""
        self._followed: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._follow(known)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._follow(_tensors((result, (kwargs or {}).get("out"))))
        self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        """Return the bytes of all storages now."""
        storages = (found() for found in self._followed.values())
        return sum(allocated_bytes(storage) for storage in storages if storage is not None)

    def _follow(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            self._followed[id(storage)] = weakref.ref(storage)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _held(model: PairModel) -> Iterator[Tensor]:
    """Yield the tensors that a process holds between two passes, without the optimizer's."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for module in model.modules():
        if state := getattr(module, "quant_state", None):
            yield from (state.absmax, state.code, state.offset)
            yield from (state.state2.absmax, state.state2.code)


def peaks(model: PairModel, recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Yield (planned bytes, live bytes) of a step's peak, without the optimizer's states.

    Args:
        model: a model on the CPU whose base is shared. All processes that share it must call this.
        recipe: its recipe. Each of MEMORY_SETTINGS replaces its settings of ``memory``.
    """
    recipe = recipe.override({"training.global_batch_size": len(LENGTHS)})
    for settings in MEMORY_SETTINGS:
        chosen = recipe.with_memory(settings)
        planned = measure(chosen, model.config, LENGTHS, "cpu")
        model = with_memory_settings(model, chosen)
        batching, objective = model.batching(chosen, pad_id=0), find_objective(chosen.loss)
        pairs = heaviest_pairs(chosen, LENGTHS, batching, in_one_row=True)
        for _ in range(2):  # after the first pass, gradients exist and FSDP2 is set up
            with Storages(_held(model)) as storages:
                batch = make_batch(pairs, batching)
                loss, _ = objective.loss(model(batch), batch.facts, objective.divisors(pairs))
                loss.backward()  # type: ignore[no-untyped-call]
        yield planned.total - planned.held["optimizer"], storages.peak
