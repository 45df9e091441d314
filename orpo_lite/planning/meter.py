"""Count the bytes of all tensors in a step, and the FLOPs and memory traffic of all operators."""

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

ROUNDING = 512  # bytes: the smallest unit of torch's CUDA allocator
# Operators that allocate memory, but do not write to it.
UNTOUCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def allocated_bytes(storage: torch.UntypedStorage) -> int:
    """Return the bytes that torch's CUDA allocator reserves for a storage."""
    return rounded(storage.nbytes())


def rounded(size: int) -> int:
    """Return a number of bytes, rounded up as torch's CUDA allocator does."""
    return -(-size // ROUNDING) * ROUNDING


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors in use, as a context manager.

    A storage is counted from the operator that returns it until the storage is freed. Pass tensors
    that existed before counting, such as weights, as ``known``. Otherwise these tensors are counted
    at their first use. Views are not counted, and neither are allocations inside kernels. Sizes are
    rounded up to 512 bytes.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        """Bytes in use now, without those of ``known``."""
        self.peak = 0
        """The largest value of ``live`` so far."""
        self.phase = ""
        """The phase of the step. The caller sets it."""
        self.by_phase: Counter[str] = Counter()
        """The bytes of ``live`` by the phase that allocated them."""
        self.peak_by_phase: Counter[str] = Counter()
        """The value of ``by_phase`` when ``live`` was largest."""
        self.host = 0
        """Bytes in host memory now. They are counted only on meta."""
        self.host_peak = 0
        """The largest value of ``host`` so far."""
        self.sent = 0
        """Total bytes copied to host memory. They are copied back later."""
        self.work: Counter[tuple[int, int]] = Counter()
        """(FLOPs, bytes moved) -> number of such operators. FLOPs of attention are missing."""
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """Each storage in use, by its id. A weakref callback is cheaper than weakref.finalize."""
        for tensor in known:
            self._follow(tensor.untyped_storage(), lambda: None)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch calls ``__torch_dispatch__`` without a costly wrapper.

        The wrapper would disable torch.compile while an operator runs. ``_run`` does this already.
        """
        return False

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
        try:
            cached = _results.get(key)
        except TypeError:  # an argument is not hashable
            key, cached = None, None
        if cached is None:
            result, new = _run(function, args, kwargs, tensors)
            if key:
                _results[key] = new
            work = new.work
        elif cached.outputs is None:
            result, work = function(*args, **kwargs), cached.work
        else:
            result, work = cached.repeat(tensors), cached.work
        for tensor in (result,) if isinstance(result, Tensor) else _tensors((result,)):
            self._note(tensor.untyped_storage())
        is_copy = function._overloadpacket is torch.ops.aten.copy_
        if is_copy and is_on_host(args[0]) != is_on_host(args[1]):
            if is_on_host(args[0]):
                self.sent += args[1].nbytes
        else:
            self.work[work] += 1
        return result

    def _follow(self, storage: torch.UntypedStorage, freed: Callable[[], None]) -> None:
        """Call ``freed`` when the storage is freed."""
        key = id(storage)

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            freed()

        self._seen[key] = weakref.ref(storage, gone)

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        size = allocated_bytes(storage)
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
class _CachedResult:
    """The work and outputs of an operator on meta, for arguments with certain shapes and dtypes.

    They are cached, because torch computes the outputs on meta in Python, which is slow.
    """

    work: tuple[int, int]
    outputs: tuple[Any, ...] | None
    """For each output its (size, stride, dtype), or the index of an argument that is returned.

    None if the outputs cannot be cached, so that the operator must run.
    """
    is_single: bool = True

    def repeat(self, tensors: Sequence[Tensor]) -> Any:
        """Return the operator's outputs for other arguments of the same shapes and dtypes."""
        outputs = []
        for output in self.outputs or ():
            if isinstance(output, int):
                outputs.append(tensors[output])
            else:
                size, stride, dtype = output
                outputs.append(torch.empty_strided(size, stride, dtype=dtype, device="meta"))
        return outputs[0] if self.is_single else tuple(outputs)


_results: dict[Any, _CachedResult] = {}


def _key(function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """Return the cache key of an operator and its arguments; None if there is no key for them.

    Add the tensors among the arguments to ``tensors``.
    """
    parts: list[Any] = [id(function)]  # the operator itself hashes slowly; its id never changes
    if not _describe(args, parts, tensors):
        return None
    if kwargs:
        parts.extend(kwargs)
        if not _describe(kwargs.values(), parts, tensors):
            return None
    return tuple(parts)


def _describe(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Add shapes, dtypes and values of the arguments to ``parts``, and tensors to ``tensors``.

    Return False if a tensor is not on meta.
    """
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                return False
            parts += (value.shape, value.stride(), value.dtype, _index(value, tensors))
            tensors.append(value)
        elif isinstance(value, list | tuple):
            parts.append(len(value))
            if not _describe(value, parts, tensors):
                return False
        else:
            parts += (type(value), value)
    return True


def _index(tensor: Tensor, tensors: list[Tensor]) -> int:
    """Return the index of ``tensor`` in ``tensors``, or ``len(tensors)`` if it is missing."""
    for index, other in enumerate(tensors):
        if other is tensor:
            return index
    return len(tensors)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[Any, _CachedResult]:
    """Run an operator. Return its result, and the entry for the cache."""
    before = [(tensor.shape, tensor.stride(), tensor.untyped_storage()) for tensor in tensors]
    result = function(*args, **kwargs)
    made = list(_tensors((result,)))
    work = _work(function, args, kwargs, made)
    is_single = isinstance(result, Tensor)
    if not is_single and not (isinstance(result, tuple) and len(made) == len(result)):
        return result, _CachedResult(work, None)
    if torch.Tag.inplace_view in function.tags:
        return result, _CachedResult(work, None)
    outputs: list[Any] = []
    storages = {storage for _, _, storage in before}
    for tensor in made:
        index = _index(tensor, tensors)
        storage = tensor.untyped_storage()
        is_view = storage in storages or tensor.storage_offset()
        if index < len(tensors):
            outputs.append(index)
        elif not tensor.is_meta or is_view or _storage_size(tensor) != storage.nbytes():
            return result, _CachedResult(work, None)
        else:
            storages.add(storage)
            outputs.append((tensor.shape, tensor.stride(), tensor.dtype))
    return result, _CachedResult(work, tuple(outputs), is_single)


def _storage_size(tensor: Tensor) -> int:
    """Return the bytes of the smallest storage that holds the tensor."""
    if not tensor.numel():
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in an operator's arguments or results, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _work(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> tuple[int, int]:
    """Return the FLOPs of an operator, and the bytes of all tensors that it reads or writes.

    Both are 0 for an operator that returns views.
    """
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
    tensors = {id(tensor): tensor for tensor in (*read, *made)}
    return flops, sum(tensor.nbytes for tensor in tensors.values())
