"""Compute the delta of a stored tensor: the numbers that an adapter adds to it.

The LoRA matrices A and B of a tensor are read when this tensor is merged. If transformers loads the
tensor without conversion, the delta is computed for one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from orpo_lite.base.blocks import Stored, read_tensor
from orpo_lite.errors import ModelError
from orpo_lite.merging.names import Origin

Layout = Literal["matrix", "embedding", "experts", "experts transposed"]
AddDelta = Callable[[Tensor, int], Tensor]
"""(rows of a tensor, index of the first row) -> the same rows plus the delta.

The result is float64 if the rows are float64, otherwise float32.
"""


class Delta(Protocol):
    """The numbers that an adapter adds to one stored tensor of the base."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters whose adapters change this stored tensor."""
        ...

    def load(self) -> AddDelta:
        """Read the adapter's tensors. Return a function that adds the delta to a block of rows.

        Raises:
            ModelError: the adapter has NaN or infinity.
        """
        ...


@dataclass(frozen=True)
class LoraDelta:
    """The LoRA delta of one parameter: ``scale * B @ A``.

    With DoRA, each row of ``W + scale * B @ A`` is rescaled. ``magnitude`` holds the new norms.
    """

    parameters: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]
    """The shape of the parameter. A matrix is (outputs, inputs), also for a Conv1D."""
    a: Stored
    b: Stored
    magnitude: Stored | None
    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return two tensors whose product is the delta before it is multiplied by ``scale``.

        For the weights of experts, axis 0 is the expert.
        """
        a, b = _read_finite(self.a), _read_finite(self.b)
        if self.layout == "matrix":
            return b, a
        if self.layout == "embedding":
            return a.t(), b.t()
        a_ERI = a.view(self.shape[0], -1, a.shape[-1])
        b_EOR = b.view(b.shape[0], -1, self.shape[0]).permute(2, 0, 1)
        if self.layout == "experts":
            return b_EOR, a_ERI
        return a_ERI.transpose(1, 2), b_EOR.transpose(1, 2)

    def load(self) -> AddDelta:
        """Read the adapter's tensors. Return a function that adds the delta as peft's merge does.

        LoRA: ``W + s B A`` (arXiv 2106.09685, Eq. 3). DoRA: ``m (W + s B A) / ||W + s B A||``, with
        the norm of each row (arXiv 2402.09353, Eq. 5).

        Raises:
            ModelError: the adapter has NaN or infinity.
        """
        left, right = self.factors()
        magnitude_O = _read_finite(self.magnitude).flatten() if self.magnitude else None

        def add(block: Tensor, start: int) -> Tensor:
            sums = _copy_for_sum(block)
            rows = slice(start, start + len(block))
            if sums.dim() == 3:
                sums.baddbmm_(
                    left[rows].to(sums.dtype), right[rows].to(sums.dtype), alpha=self.scale
                )
            else:
                sums.addmm_(left[rows].to(sums.dtype), right.to(sums.dtype), alpha=self.scale)
            if magnitude_O is not None:
                sums.mul_((magnitude_O[rows] / sums.norm(dim=1)).unsqueeze(1))
            return sums

        return add


@dataclass(frozen=True)
class ConvertedDelta:
    """The delta of a stored tensor that transformers splits, joins or transposes at loading.

    Example: the file stores one tensor per expert, and the model has one parameter for all experts.
    The adapter's deltas have the form of the model's parameters. They are converted back to the
    form of the stored tensor. The result is exact, because a conversion only moves numbers.
    """

    name: str
    """The name of the stored tensor."""
    group: ConvertedGroup

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters whose adapters change this stored tensor."""
        return tuple(self.group.deltas)

    def load(self) -> AddDelta:
        """Read the adapter's tensors. Return a function that adds the delta to a block of rows.

        Raises:
            ModelError: the adapter has NaN or infinity.
        """
        delta = _stored_deltas(self.group)[self.name]

        def add(block: Tensor, start: int) -> Tensor:
            return _copy_for_sum(block).add_(delta[start : start + len(block)])

        return add


@dataclass(frozen=True, eq=False)
class ConvertedGroup:
    """Parameters that are loaded from the same stored tensors, and the parameters' LoRA deltas.

    A parameter without an adapter has no delta.
    """

    origin: Origin
    deltas: Mapping[str, LoraDelta]
    """The deltas by the names of the parameters."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of all parameters of ``origin``."""
    model: Any
    """The model without weights."""


def clear_cache() -> None:
    """Free the cached deltas of converted tensors."""
    _stored_deltas.cache_clear()


# Two groups are kept. Files that store experts one by one alternate between two groups: one has two
# projections of the experts, the other has the third.
@lru_cache(2)
def _stored_deltas(group: ConvertedGroup) -> dict[str, Tensor]:
    """Return name of stored tensor -> delta, for all stored tensors of a group."""
    values = {name: torch.zeros(shape) for name, shape in group.shapes.items()}
    for name, delta in group.deltas.items():
        values[name] = delta.load()(values[name], 0)
    return group.origin.to_stored(values, group.model)


def _copy_for_sum(block: Tensor) -> Tensor:
    """Return a copy in the dtype of the sum: float64 for float64, otherwise float32."""
    dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
    return block.to(dtype, copy=True)


def _read_finite(stored: Stored) -> Tensor:
    """Return a stored tensor in float32. Raise ModelError if it has NaN or infinity."""
    tensor = read_tensor(stored).float()
    if not tensor.isfinite().all():
        raise ModelError(
            where=str(stored.file),
            found=f"{stored.name} holds NaN or infinity",
            expected="finite numbers",
        )
    return tensor
