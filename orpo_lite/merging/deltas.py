"""What an adapter adds to a stored tensor: read when it is needed, computed a block of rows at a time."""

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

Kind = Literal["matrix", "embedding", "experts", "experts transposed"]
Added = Callable[[Tensor, int], Tensor]
"""Rows of a tensor, and the number of the first one, to the same rows with the adapter: float32, float64 as it is."""


class Delta(Protocol):
    """What an adapter adds to one stored tensor."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The adapted parameters that it comes from."""
        ...

    def load(self) -> Added:
        """Read it. Raises :class:`ModelError` for an adapter with NaN or infinity."""
        ...


@dataclass(frozen=True)
class Product:
    """An adapted parameter: ``scale * B @ A``; with a magnitude (DoRA) each row is rescaled to it."""

    parameters: tuple[str, ...]
    kind: Kind
    shape: tuple[int, ...]
    """Of the parameter; a Conv1D's as a linear layer's: (outputs, inputs)."""
    a: Stored
    b: Stored
    magnitude: Stored | None
    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """Left and right, whose product has the shape of the parameter. Experts are a dimension of their own, E."""
        a, b = _finite(self.a), _finite(self.b)
        if self.kind == "matrix":
            return b, a
        if self.kind == "embedding":
            return a.t(), b.t()
        a_ERI = a.view(self.shape[0], -1, a.shape[-1])
        b_EOR = b.view(b.shape[0], -1, self.shape[0]).permute(2, 0, 1)
        if self.kind == "experts":
            return b_EOR, a_ERI
        return a_ERI.transpose(1, 2), b_EOR.transpose(1, 2)

    def load(self) -> Added:
        """As peft merges: ``W + s B A`` (arXiv 2106.09685, Eq. 3), or ``m (W + s B A) / ||W + s B A||`` with the norm
        of each row (arXiv 2402.09353, Eq. 5). Raises :class:`ModelError` for an adapter with NaN or infinity."""
        left, right = self.factors()
        magnitude_O = _finite(self.magnitude).flatten() if self.magnitude else None

        def added(block: Tensor, start: int) -> Tensor:
            sums = block.to(
                torch.float64 if block.dtype == torch.float64 else torch.float32, copy=True
            )
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

        return added


@dataclass(frozen=True)
class Part:
    """A stored tensor of which transformers makes another, or part of another, when it loads it.

    Its delta is that of the parameters, converted back: all of these operations only move numbers.
    """

    name: str
    """In the files."""
    whole: Whole

    @property
    def parameters(self) -> tuple[str, ...]:
        """The adapted parameters that it comes from."""
        return tuple(self.whole.products)

    def load(self) -> Added:
        """Read it."""
        delta = _converted(self.whole)[self.name]

        def added(block: Tensor, start: int) -> Tensor:
            sums = block.to(
                torch.float64 if block.dtype == torch.float64 else torch.float32, copy=True
            )
            return sums.add_(delta[start : start + len(block)])

        return added


@dataclass(frozen=True, eq=False)
class Whole:
    """The adapted parameters of one origin."""

    origin: Origin
    products: Mapping[str, Product]
    """By the name of the parameter."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all its parameters."""
    model: Any
    """Without weights."""


def forget() -> None:
    """Let go of deltas that were kept for more of their parts."""
    _converted.cache_clear()


@lru_cache(2)  # a layer's experts are stored one by one: two projections of each, then the third
def _converted(whole: Whole) -> dict[str, Tensor]:
    values = {name: torch.zeros(shape) for name, shape in whole.shapes.items()}
    for name, product in whole.products.items():
        values[name] = product.load()(values[name], 0)
    return whole.origin.to_stored(values, whole.model)


def _finite(stored: Stored) -> Tensor:
    tensor = read_tensor(stored).float()
    if not tensor.isfinite().all():
        raise ModelError(
            where=str(stored.file),
            found=f"{stored.name} holds numbers that are none",
            expected="finite ones",
        )
    return tensor
