"""What a CPU build lacks of ``torch.cuda``, by the same names, for the simulated device; and of bitsandbytes."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional
import bitsandbytes.optim.optimizer
import simulated_cuda
import torch
from simulated_cuda import CONTEXT, device_count, library, tell, total_memory
from torch import Tensor

_native_record_stream: Any = Tensor.record_stream


def register() -> None:
    """Put them in place."""
    cuda: Any = torch.cuda
    cuda._initialized = True
    for name in CUDA:
        stand_in = globals().get(name) or CONSTANT[name]
        for module in (cuda, cuda.memory, cuda.random, cuda.streams):
            if module is cuda or hasattr(module, name):
                setattr(module, name, stand_in)
    cuda.device = on_device
    Tensor.record_stream = record_stream  # type: ignore[method-assign,assignment]
    bitsandbytes.functional.get_paged = get_paged
    bitsandbytes.functional.fill = fill
    bitsandbytes.functional.prefetch_tensor = nothing
    bitsandbytes.optim.optimizer.sync_gpu = synchronize
    torch.library.impl("bitsandbytes::gemv_4bit.out", "cuda", gemv_into)


def nothing(*_arguments: Any, **_options: Any) -> None:
    """Do nothing: a simulated device has no use for it."""


CONSTANT: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_is_in_bad_fork": lambda: False,
    "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90"],
    "device_of": lambda _: contextlib.nullcontext(),
}
for _name in ("_lazy_init", "init", "ipc_collect", "manual_seed", "manual_seed_all"):
    CONSTANT[_name] = lambda *_: (
        None
    )  # each its own: torch's compiler refuses a function that has two names


# --- devices


def _index(device: Any = None) -> int:
    index = device if device is None or isinstance(device, int) else torch.device(device).index
    return int(library().sim_device() if index is None else index)


current_device = _index


def set_device(device: Any) -> None:
    library().sim_set_device(_index(device))


@contextlib.contextmanager
def on_device(device: Any) -> Iterator[None]:
    before = _index()
    set_device(device)
    try:
        yield
    finally:
        set_device(before)


def get_device_properties(device: Any = None) -> SimpleNamespace:
    major, minor = simulated_cuda.capability
    return SimpleNamespace(
        name=os.environ.get("SIM_NAME", "NVIDIA GeForce RTX 4090"),
        total_memory=total_memory(),
        uuid=f"00000000-0000-0000-0000-{_index(device):012}",
        major=major,
        minor=minor,
        multi_processor_count=128,
    )


def get_device_name(device: Any = None) -> str:
    return str(get_device_properties(device).name)


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return simulated_cuda.capability


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return including_emulation or simulated_cuda.capability >= (8, 0)


# --- memory


def memory_stats(device: Any = None) -> dict[str, int]:
    found = (ctypes.c_int64 * 6)()
    library().sim_memory(_index(device), found)
    names = (
        "allocated_bytes.all.current",
        "allocated_bytes.all.peak",
        "reserved_bytes.all.current",
    )
    return dict(
        zip(
            (*names, "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms"), found, strict=True
        )
    )


def memory_allocated(device: Any = None) -> int:
    return memory_stats(device)["allocated_bytes.all.current"]


def max_memory_allocated(device: Any = None) -> int:
    return memory_stats(device)["allocated_bytes.all.peak"]


def memory_reserved(device: Any = None) -> int:
    return memory_stats(device)["reserved_bytes.all.current"]


def max_memory_reserved(device: Any = None) -> int:
    return memory_stats(device)["reserved_bytes.all.peak"]


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return total_memory() - CONTEXT - memory_reserved(device), total_memory()


def reset_peak_memory_stats(device: Any = None) -> None:
    library().sim_reset_peak(_index(device))


def empty_cache() -> None:
    library().sim_empty_cache()


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    simulated_cuda.limit_memory(int(fraction * total_memory()), _index(device))


# --- random numbers: the host's generator draws them


def get_rng_state(device: Any = None) -> Tensor:
    return torch.get_rng_state()


def set_rng_state(state: Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def get_rng_state_all() -> list[Tensor]:
    return [torch.get_rng_state()] * device_count()


def set_rng_state_all(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])


# --- streams and events: all is done at once, so nothing is ever waited for


class Stream:
    """A queue of a device."""

    made = 0

    def __init__(
        self, device: Any = None, *_: Any, stream_id: int | None = None, **__: Any
    ) -> None:
        if stream_id is None:
            Stream.made += 1
        self.stream_id = self.cuda_stream = Stream.made if stream_id is None else stream_id
        self.device_index = _index(device)
        self.device = torch.device("cuda", self.device_index)

    wait_stream = wait_event = nothing

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        tell("sync", "stream.synchronize")

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event:
    """A point in a queue."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = wait = nothing

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        tell("sync", "event.synchronize")

    def elapsed_time(self, _end: "Event") -> float:
        return 0.0


def synchronize(device: Any = None) -> None:
    tell("sync", "cuda.synchronize")


def current_stream(device: Any = None) -> Stream:
    return Stream(device, stream_id=library().sim_stream())


def default_stream(device: Any = None) -> Stream:
    return Stream(device, stream_id=0)


def set_stream(stream: Stream) -> None:
    library().sim_set_stream(stream.stream_id)


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    before = current_stream()
    set_stream(stream or before)
    try:
        yield
    finally:
        set_stream(before)


def record_stream(tensor: Tensor, stream: Any) -> None:
    """Tell torch's own, which refuses a tensor of the host."""
    if isinstance(stream, Stream):
        stream = torch.Stream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=1
        )
    _native_record_stream(tensor, stream)


CUDA = (
    *CONSTANT,
    *("current_device", "device_count", "set_device", "get_device_properties", "get_device_name"),
    *(
        "get_device_capability",
        "is_bf16_supported",
        "memory_stats",
        "memory_allocated",
        "max_memory_allocated",
    ),
    *(
        "memory_reserved",
        "max_memory_reserved",
        "mem_get_info",
        "reset_peak_memory_stats",
        "empty_cache",
    ),
    *(
        "set_per_process_memory_fraction",
        "get_rng_state",
        "set_rng_state",
        "get_rng_state_all",
        "set_rng_state_all",
    ),
    *("Stream", "Event", "synchronize", "current_stream", "default_stream", "set_stream", "stream"),
)

# --- bitsandbytes


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """Paged memory is a host tensor to torch, here as on a GPU."""
    paged: Any = torch.zeros(*shape, dtype=dtype)
    paged.is_paged, paged.page_deviceid = True, device.index
    return paged  # type: ignore[no-any-return]


def fill(paged: Tensor, value: float, **_: Any) -> None:
    paged.fill_(value)


def gemv_into(
    a: Tensor,
    b: Tensor,
    shape: list[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    """The product with a 4-bit matrix, written where it is to be: by bitsandbytes' own formula."""
    out.copy_(torch.ops.bitsandbytes.gemv_4bit.default(a, b, shape, absmax, code, blocksize))
