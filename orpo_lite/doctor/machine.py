"""Check the machine: packages, GPUs, memory, disk, and the hub."""

import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from orpo_lite.doctor.check import Check, State
from orpo_lite.doctor.kernels import TORCH_PAGE
from orpo_lite.errors import first_line

LEAST_DISK = 5 * 2**30  # bytes; with less free space, the check warns
NAMED = ("transformers", "peft", "bitsandbytes", "accelerate", "datasets")
"""Packages whose versions are shown if all versions are right."""
EXTRAS = ("eval", "gguf", "liger", "llama-cpp", "plot", "track")


def check_packages() -> Iterator[Check]:
    """Compare the installed package versions with the versions that orpo-lite requires."""
    from packaging.requirements import Requirement

    from orpo_lite import __version__

    yield Check("Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    try:
        needed = [Requirement(text) for text in metadata.requires("orpo-lite") or []]
    except metadata.PackageNotFoundError:
        fix = "pip install -c requirements.lock . (in a clone of the repository)"
        yield Check("packages", "fault", "orpo-lite is not installed in this Python", fix)
        return
    is_fine = True
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            is_fine = False
            found = f"{requirement.name} is {version or 'not installed'}"
            text = f"{found}; {requirement.specifier} is needed"
            yield Check("packages", "fault", text, f"pip install '{requirement}'")
    if is_fine:
        versions = ", ".join(f"{name} {_version(name)}" for name in NAMED)
        yield Check("packages", "ok", f"orpo-lite {__version__}, {versions}")
    yield Check("extras", "ok", _describe_extras())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _describe_extras() -> str:
    """Return text that lists which packages of the extras are installed and which are not."""
    from packaging.requirements import Requirement

    present, absent = [], []
    for extra in EXTRAS:
        for text in metadata.requires("orpo-lite") or []:
            requirement = Requirement(text)
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                version, name = _version(requirement.name), requirement.name
                if version:
                    is_enough = requirement.specifier.contains(version, prereleases=True)
                    old = "" if is_enough else f" (too old: {requirement.specifier})"
                    present.append(f"{name} {version}{old}")
                else:
                    absent.append(name)
    parts = [", ".join(dict.fromkeys(present)) or "none"]
    if absent:
        parts.append(f"not installed: {', '.join(dict.fromkeys(absent))}")
    return "; ".join(parts)


# --- GPUs


def check_device() -> Iterator[Check]:
    """Check that torch can use the GPUs. Report free memory, and the processes that use memory."""
    import torch

    from orpo_lite.planning.device import find_unusable_gpu
    from orpo_lite.planning.gpus import local_gpu

    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    yield Check("torch", "ok", f"{torch.__version__}, {cuda}")
    if unusable := find_unusable_gpu():
        yield Check("GPU", "fault", str(unusable), unusable.remedy)
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield _no_gpu()
    for index in range(count):
        if local := local_gpu(index):
            yield _describe_gpu(local, torch.cuda.get_arch_list())
            yield _describe_gpu_memory(local)


def _no_gpu() -> Check:
    threads = f"the CPU is used, with {os.cpu_count()} cores"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        fix = "unset CUDA_VISIBLE_DEVICES"
        return Check("GPU", "warning", f"hidden by CUDA_VISIBLE_DEVICES: {threads}", fix)
    fix = "if the machine has an NVIDIA GPU, install its driver; nvidia-smi must list the GPU"
    if "microsoft" in platform.release().lower():
        fix = "WSL2 uses the driver of Windows: install NVIDIA's driver in Windows, not in WSL2"
    elif Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        fix += "; a container must be started with access to the GPUs (--gpus all)"
    return Check("GPU", "warning", f"none found: {threads}", fix)


def _describe_gpu(local: Any, architectures: Sequence[str]) -> Check:
    """Return the check of one GPU: a fault if this torch has no kernels for the GPU."""
    major, minor = local.gpu.capability
    dtype = "bfloat16" if major >= 8 else "float16, because it has no bfloat16"
    driver = f"driver {local.driver}, " if local.driver else ""
    found = f"{local.gpu.name}, {driver}compute capability {major}.{minor}, {dtype}"
    if not _has_kernels((major, minor), architectures):
        found += f"; this torch has no kernels for it ({' '.join(architectures)})"
        return Check("GPU", "fault", found, f"install another build of torch ({TORCH_PAGE})")
    return Check("GPU", "ok", found)


def _has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether one of the architectures that torch was built for runs on a GPU.

    sm_86 is a binary. It runs on GPUs of the same major version with the same or a higher minor
    version (NVIDIA, "CUDA C++ Programming Guide", binary compatibility). compute_90 is code that
    the driver compiles. It runs on GPUs of the same or a higher version.
    """
    for architecture in architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture):
            built = int(match[2]), int(match[3])
            is_same = built[0] == capability[0] and built <= capability
            if is_same or (match[1] == "compute" and built <= capability):
                return True
    return False


def _describe_gpu_memory(local: Any) -> Check:
    from orpo_lite.recipe.text import gib

    found = f"{gib(local.free)} of {gib(local.gpu.memory)} are free"
    holders = sorted(local.holders, key=lambda holder: -holder.memory)
    if holders:
        found += "; " + ", ".join(
            f"{holder.program or 'a program'} (pid {holder.pid}) uses {gib(holder.memory)}"
            for holder in holders[:5]
        )
    if local.free > 0.9 * local.gpu.memory:
        return Check("GPU memory", "ok", found)
    fix = "end programs that you do not need (nvidia-smi lists them); a plan uses only free memory"
    return Check("GPU memory", "warning", found, fix)


# --- memory and disk


def check_host_memory() -> Iterator[Check]:
    """Report the free RAM, and whether RAM can be pinned (page-locked) for copies to a GPU."""
    import torch

    from orpo_lite.recipe.text import gib

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "no limit" if limit == resource.RLIM_INFINITY else f"at most {gib(limit)}"
    yield Check("RAM", "ok", f"{gib(free_ram())} are free; locked memory: {locked}")
    if torch.cuda.is_available():
        try:
            torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            found = f"64 MiB cannot be pinned ({first_line(error)})"
            fix = (
                "set memory.checkpoint_offload=false memory.embedding_on_cpu=false; under WSL2, "
                "raise `memory` in .wslconfig"
            )
            yield Check("pinned memory", "warning", found, fix)


def free_ram() -> int:
    """Return the free bytes of RAM.

    If the container has a memory limit, return at most the limit minus the memory in use.
    """
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    free = 1024 * int(found[1]) if found else 0
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # there is no such file, or it holds "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def check_disk_space() -> Iterator[Check]:
    """Report the free disk space for each folder that a training writes to."""
    from huggingface_hub import constants

    from orpo_lite.data.cache import VARIABLE, configured_folder

    folders = {
        "disk, models": (Path(constants.HF_HUB_CACHE), "HF_HOME"),
        "disk, tokens": (configured_folder(), VARIABLE),
        "disk, runs": (Path("runs"), "training.output_dir"),
    }
    for name, (folder, key) in folders.items():
        yield _describe_disk(name, folder, key)


def _describe_disk(name: str, folder: Path, key: str) -> Check:
    from orpo_lite.recipe.text import gib

    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    found, fix = f"{gib(free)} are free in {folder}", f"set {key} to another folder"
    if not os.access(existing, os.W_OK):
        return Check(name, "fault", f"{existing} cannot be written to", fix, (str(existing),))
    state: State = "ok" if free >= LEAST_DISK else "warning"
    return Check(
        name, state, found, "" if state == "ok" else f"free some space, or {fix}", (str(folder),)
    )


# --- the hub


def check_hub() -> Iterator[Check]:
    """Report whether the hub answers, and what the access token permits. The token is not shown."""
    from huggingface_hub import constants, get_session

    from orpo_lite.publishing.account import find_account
    from orpo_lite.publishing.retry import LOGIN, own_token

    if constants.is_offline_mode():
        yield Check("hub", "ok", "not tested: HF_HUB_OFFLINE is set, so nothing is downloaded")
        return
    unreachable = "set HF_HUB_OFFLINE=1 to use only the cache, or set a proxy (HTTPS_PROXY)"
    if own_token("hub") is None:
        try:
            get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=10.0)
        except Exception as error:
            yield Check(
                "hub", "warning", f"cannot be reached ({type(error).__name__})", unreachable
            )
            return
        yield Check("hub", "ok", "answers")
        yield Check("hub token", "ok", "none found; gated models and `orpo-lite push` need one")
        return
    asking = find_account()
    try:
        note = next(asking).text  # an update means that the first attempt failed
    except StopIteration as end:
        name, role = end.value
    else:
        asking.close()
        yield Check("hub", "warning", f"cannot be reached ({note.partition(';')[0]})", unreachable)
        return
    yield Check("hub", "ok", "answers")
    rights = {"fineGrained": "fine-grained rights", "": "unknown rights"}
    found = f"belongs to {name}, with {rights.get(role, f'{role} access')}"
    if role == "read":
        fix = f"a push needs write access: {LOGIN}"
        yield Check("hub token", "warning", found, fix, (name,))
    else:
        yield Check("hub token", "ok", found, private=(name,))
