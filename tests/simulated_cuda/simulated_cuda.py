"""A simulated CUDA device for a CPU build of torch: :func:`install` it before torch is imported, in its own process.

Its tensors say ``cuda:0`` and compute on the CPU. Operators that mix devices are refused as CUDA refuses them, backward
passes run on autograd's device thread, attention kernels check their arguments as the real ones do, memory is counted
and limited, and syncs and transfers are told with the line that asked. Not simulated: time, races between streams, the
numerics of kernels, several processes.

Environment: ``SIM_CAP`` (9,0; 7,5 is a T4), ``SIM_GIB`` (24), ``SIM_DEVICES`` (1), ``SIM_NAME``.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
TORCH = "2.13."  # whose headers, hooks and schemas the source is written for
CONTEXT = 1 << 29  # bytes that the driver keeps for a process
FAULTS = ("", "allocator", "driver", "cublas")

_library: Any = None
capability = (9, 0)


def missing() -> str:
    """Return why nothing can be simulated here; "" where it can."""
    version = importlib.metadata.version("torch")
    if not version.startswith(TORCH):
        return f"the simulated device is written for torch {TORCH}x, and {version} is here"
    if "+cpu" not in version and importlib.util.find_spec("nvidia") is not None:
        return f"the simulated device takes the place of a real one in a CPU build, and torch {version} is here"
    return "" if shutil.which("g++") else "the simulated device needs g++ to be built"


def build() -> Path:
    """Return the built library; the first call for a version of torch takes some ten seconds, others find it."""
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(version.encode() + sys.version.encode() + SOURCE.read_bytes()).hexdigest()[
        :16
    ]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orpo-lite-tests"
    library = cache / f"simulated-cuda-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        if not library.exists():
            root = _torch_folder()
            headers = (f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include")
            made = library.with_suffix(f".{os.getpid()}")
            # Most of the time goes into the headers.
            command = [
                "g++",
                "-O1",
                "-shared",
                "-fPIC",
                "-std=c++20",
                *headers,
                str(SOURCE),
                "-o",
                str(made),
            ]
            subprocess.run([*command, f"-L{root}/lib", "-ltorch_cpu", "-lc10"], check=True)
            made.replace(library)
    return library


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def install() -> None:
    """Let torch have the device, and ``torch.cuda`` speak of it."""
    global _library, capability
    assert "torch" not in sys.modules, "torch looks for its devices once, when it is imported"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    library = build()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    _library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _library.sim_stream.restype = ctypes.c_int64
    _library.sim_will_fail.restype = ctypes.c_bool
    _library.sim_set_stream.argtypes = [ctypes.c_int64]
    _library.sim_set_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    _library.sim_fail.argtypes = [ctypes.c_int, ctypes.c_int64]
    _library.sim_quiet.argtypes = [ctypes.c_bool]
    _library.sim_start()
    import torch

    honest, torch.compile = torch.compile, _no_compile
    import bitsandbytes  # noqa: F401 - before torch.cuda speaks of a device, for which it would load its kernels

    torch.compile = honest
    major, minor = os.environ.get("SIM_CAP", "9,0").split(",")
    capability = (int(major), int(minor))
    for index in range(device_count()):
        _library.sim_set_limit(index, total_memory() - CONTEXT)
    import attention_kernels
    import stand_ins

    stand_ins.register()
    attention_kernels.register()


def _no_compile(*_: Any, **__: Any) -> Any:
    """Its formulas run again where compiled ones fail, so that no lack of memory would come through."""
    raise RuntimeError("not compiled")


def device_count() -> int:
    """Return how many devices are simulated."""
    return int(os.environ.get("SIM_DEVICES", "1"))


def total_memory() -> int:
    """Return the bytes of a device."""
    return int(float(os.environ.get("SIM_GIB", "24")) * 2**30)


def library() -> Any:
    """Return the device's functions."""
    return _library


# --- what tests ask for


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What this thread does meanwhile is the device's own work: no sync is told, no memory runs out."""
    _library.sim_quiet(True)
    try:
        yield
    finally:
        _library.sim_quiet(False)


def fail(kind: str, after: int = 0) -> None:
    """Let memory run out once, at the allocation (of "cublas": product) after ``after`` others; "" calls it off."""
    _library.sim_fail(FAULTS.index(kind), after)


def will_fail() -> bool:
    """Return whether a failure that was asked for has not come yet."""
    return bool(_library.sim_will_fail())


def limit_memory(size: int, device: int = 0) -> None:
    """Let the device's memory run out above ``size`` bytes."""
    _library.sim_set_limit(device, size)


def pinned_memory() -> tuple[int, int]:
    """Return the bytes of pinned memory, each buffer rounded up to a power of two: now, and at the peak."""
    figures = (ctypes.c_int64 * 2)()
    _library.sim_pinned(figures)
    return figures[0], figures[1]


@contextlib.contextmanager
def told(package: str = "orpo_lite") -> Iterator[Counter[tuple[str, str, str]]]:
    """Count what is told meanwhile as (kind, operator, line): the innermost line of the package, and of any file.

    Kinds: "sync"; "to device" and "to host", with ", waiting" where the host waits for the copy; "record_stream".
    """
    found = Counter[tuple[str, str, str]]()

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
    def listen(kind: bytes, what: bytes, _size: int) -> None:
        found[kind.decode(), what.decode(), _line(package)] += 1

    _library.sim_listen(listen)
    try:
        yield found
    finally:
        _library.sim_listen(None)


def tell(kind: str, what: str) -> None:
    """Count something for :func:`told`."""
    _library.sim_tell(kind.encode(), what.encode())


def _line(package: str) -> str:
    here = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(here)]
    ours = [
        f"{f.filename.rpartition(f'/{package}/')[2]}:{f.lineno}"
        for f in frames
        if f"/{package}/" in f.filename
    ]
    return (ours or [f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "-"])[-1]
