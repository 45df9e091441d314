"""Counts what a step holds and does: a mode that follows every storage, and what each operator reads and computes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from orpo_lite.ops.devices import is_on_host, making_host_memory, mark_as_host

ROUNDING = 512  # bytes: torch's CUDA allocator hands out no less
UNTOUCHED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}  # they make, and write nothing


def allocated(storage: torch.UntypedStorage) -> int:
    """Bytes that the allocator hands out for it."""
    return -(-storage.nbytes() // ROUNDING) * ROUNDING


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, while they live.

    Storages that are there before (weights) are to be named in ``known``, else they would count at their first use.
    What a kernel allocates for itself and gives back is invisible, as are views. Sizes are rounded up to 512 bytes.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now, besides the known ones."""
        self.peak = 0
        """The most that were alive at once."""
        self.phase = ""
        """What is being done: whoever runs the step says so."""
        self.by_phase: Counter[str] = Counter()
        """The bytes alive now by the phase that made them."""
        self.peak_by_phase: Counter[str] = Counter()
        """The same at the peak."""
        self.host = 0
        """Bytes in host memory now, of a step on the meta device; on a GPU everything on the CPU."""
        self.host_peak = 0
        self.sent = 0
        """Bytes that went to host memory in all; what waits there comes back."""
        self.work: Counter[tuple[int, int]] = Counter()
        """How many operators did so many FLOPs and moved so many bytes (attention's kernels do not show theirs)."""
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """Each storage that lives, by its id; what is called at its end is cheaper here than weakref.finalize."""
        for tensor in known:
            self._follow(tensor.untyped_storage(), lambda: None)

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        key = _key(function, args, kwargs, tensors)
        known = _answers.get(key) if key else None
        if known is None:
            result, answer = _run(function, args, kwargs, tensors)
            if key:
                _answers[key] = answer
            work = answer.work
        elif known.makes is None:
            result, work = function(*args, **kwargs), known.work
        else:
            result, work = known.again(tensors), known.work
        for tensor in (result,) if isinstance(result, Tensor) else _tensors((result,)):
            self._note(tensor.untyped_storage())
        if function._overloadpacket is torch.ops.aten.copy_ and is_on_host(args[0]) != is_on_host(
            args[1]
        ):
            self.sent += args[1].nbytes * is_on_host(args[0])
        else:
            self.work[work] += 1
        return result

    def _follow(self, storage: torch.UntypedStorage, freed: Callable[[], None]) -> None:
        """Call ``freed`` when the storage is gone."""
        place = id(storage)

        def gone(_: Any) -> None:
            self._seen.pop(place, None)
            freed()

        self._seen[place] = weakref.ref(storage, gone)

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        size = allocated(storage)
        if making_host_memory():
            mark_as_host(storage)
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            self._follow(storage, partial(self._free_host, size))
            return
        self.live += size
        self.by_phase[self.phase] += size
        self._follow(storage, partial(self._free, self.phase, size))
        if self.live > self.peak:
            self.peak = self.live
            self.peak_by_phase = self.by_phase.copy()

    def _free(self, phase: str, size: int) -> None:
        self.live -= size
        self.by_phase[phase] -= size

    def _free_host(self, size: int) -> None:
        self.host -= size


@dataclass(frozen=True)
class _Answer:
    """What an operator does on meta, for arguments of the same kind: torch finds that out in Python, and slowly."""

    work: tuple[int, int]
    makes: tuple[Any, ...] | None
    """A result each: the place of the argument that it is, or size, stride and dtype. None where it has to run."""
    is_single: bool = True

    def again(self, tensors: Sequence[Tensor]) -> Any:
        """Its results for other tensors of the same kind."""
        made = [
            tensors[one]
            if isinstance(one, int)
            else torch.empty_strided(*one[:2], dtype=one[2], device="meta")
            for one in self.makes or ()
        ]
        return made[0] if self.is_single else tuple(made)


_answers: dict[Any, _Answer] = {}


def _key(function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """All that an operator's result on meta depends on; None where that is not known. Fills ``tensors``."""
    parts = [function]
    if not _describe(args, parts, tensors):
        return None
    if kwargs:
        parts.extend(kwargs)
        if not _describe(kwargs.values(), parts, tensors):
            return None
    key = tuple(parts)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _describe(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Add what matters of these arguments to ``parts``; False for one that is not on meta."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                return False
            parts += (value.shape, value.stride(), value.dtype, _place(value, tensors))
            tensors.append(value)
        elif isinstance(value, list | tuple):
            parts.append(len(value))
            if not _describe(value, parts, tensors):
                return False
        else:
            parts += (type(value), value)
    return True


def _place(tensor: Tensor, tensors: list[Tensor]) -> int:
    """Where the tensor stands first among these; how many there are, where it does not."""
    return next((place for place, other in enumerate(tensors) if other is tensor), len(tensors))


def _run(function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[Any, _Answer]:
    """An operator's result, and what of it holds for other arguments of the same kind."""
    before = [(tensor.shape, tensor.stride(), tensor.untyped_storage()) for tensor in tensors]
    result = function(*args, **kwargs)
    made = list(_tensors((result,)))
    work = _work(function, args, kwargs, made)
    is_single = isinstance(result, Tensor)
    if not is_single and not (isinstance(result, tuple) and len(made) == len(result)):
        return result, _Answer(work, None)
    if torch.Tag.inplace_view in function.tags:
        return result, _Answer(work, None)
    makes: list[Any] = []
    storages = {storage for _, _, storage in before}
    for tensor in made:
        place = _place(tensor, tensors)
        storage = tensor.untyped_storage()
        if place < len(tensors):
            makes.append(place)
        elif (
            not tensor.is_meta
            or storage in storages
            or tensor.storage_offset()
            or _bytes(tensor) != storage.nbytes()
        ):
            return result, _Answer(work, None)
        else:
            storages.add(storage)
            makes.append((tensor.shape, tensor.stride(), tensor.dtype))
    return result, _Answer(work, tuple(makes), is_single)


def _bytes(tensor: Tensor) -> int:
    """Of the smallest storage that holds it."""
    if not tensor.numel():
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operator's arguments or results, which hold lists at most one deep."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _work(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> tuple[int, int]:
    """FLOPs of an operator, and the bytes of all tensors that it reads and writes; a view does neither."""
    packet = function._overloadpacket
    if packet.__name__ in UNTOUCHED:
        return 0, 0
    read = [*_tensors(args), *_tensors(kwargs.values())]
    sources = {tensor.untyped_storage() for tensor in read}
    if not function._schema.is_mutable and all(
        tensor.untyped_storage() in sources for tensor in made
    ):
        return 0, 0
    flops = 0
    if packet.__name__ == "gemm_4bit":  # (x, packed weight, shape of the weight, ...)
        flops = 2 * args[0].numel() * args[2][0]
    elif packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=made[0] if made else None))
    return flops, sum(
        tensor.nbytes for tensor in {id(tensor): tensor for tensor in (*read, *made)}.values()
    )
