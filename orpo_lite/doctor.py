"""Check whether this machine can train: packages, GPU, kernels, memory, disk, hub, and a recipe.

Each check runs on its own. Heavy libraries are imported by the checks that use them, so that a
broken one is the fault of its check, and the others still run.
"""

import os
import platform
import re
import resource
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orpo_lite.errors import TOKEN, OrpoLiteError, first_line
from orpo_lite.updates import Update, run_to_end

if TYPE_CHECKING:
    import torch

    from orpo_lite.recipe.schema import Recipe

State = Literal["ok", "warning", "fault"]
TIME_LIMIT = 60.0  # seconds for a check; a driver or a network may never answer
HUB_LIMIT = 20.0
LEAST_DISK = 5 * 2**30  # bytes; less is warned of without a recipe, whose plan knows better
NAMED = ("transformers", "peft", "bitsandbytes", "accelerate", "datasets")
"""Packages whose versions are shown if all is well."""
EXTRAS = ("eval", "gguf", "liger", "llama-cpp", "plot", "track")
TORCH_PAGE = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    state: State
    found: str
    fix: str = ""
    """What to do; "" if there is nothing to do."""
    private: tuple[str, ...] = ()
    """Texts in ``found`` and ``fix`` that a bug report must not show."""


Checks = Iterable[Check]


def doctor(recipe: "Recipe | None" = None) -> list[Check]:
    """Check this machine, and whether ``recipe`` can be trained on it. Nothing is downloaded."""
    return run_to_end(doctor_events(recipe), lambda _: None)


def doctor_events(recipe: "Recipe | None" = None) -> Generator[Update, None, list[Check]]:
    """Check as :func:`doctor` does; yield its progress and return its result."""
    found: list[Check] = []
    for name, check, limit in CHECKS:
        yield Update("stage", f"checking: {name}")
        found += run_check(name, check, limit)
    if recipe is not None:
        yield Update("stage", "checking: recipe")
        found += run_check("recipe", lambda: check_recipe(recipe), 10 * TIME_LIMIT)
    return found


def run_check(name: str, check: Callable[[], Checks], limit: float) -> list[Check]:
    """Run a check; if it raises or takes more than ``limit`` seconds, return that as a fault."""
    found: list[Check] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.extend(check())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return [*found, Check(name, "fault", f"no answer within {limit:.0f} s")]
    for error in errors:
        if isinstance(error, OrpoLiteError):
            found.append(Check(name, "fault", error.found, error.fix))
        else:
            text = f"the check failed: {type(error).__name__}: {first_line(error)[:300]}"
            found.append(Check(name, "fault", text))
    return found


# --- packages


def check_packages() -> Iterator[Check]:
    """Compare the installed versions with those that orpo-lite needs."""
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


# --- device and kernels


def check_device() -> Iterator[Check]:
    """Check that torch can use the GPUs, and report their free memory and who holds the rest."""
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
        local = local_gpu(index)
        assert local is not None
        yield _describe_gpu(local, torch.cuda.get_arch_list())
        yield _describe_gpu_memory(local)


def _no_gpu() -> Check:
    threads = f"the CPU is used, with {os.cpu_count()} cores"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        fix = "unset CUDA_VISIBLE_DEVICES"
        return Check("GPU", "warning", f"hidden by CUDA_VISIBLE_DEVICES: {threads}", fix)
    fix = "if the machine has an NVIDIA GPU, install its driver, so that nvidia-smi lists it"
    if "microsoft" in platform.release().lower():
        fix = "WSL2 uses the driver of Windows: install NVIDIA's driver there, and none inside WSL"
    elif Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        fix += "; a container must be started with its GPUs (--gpus all)"
    return Check("GPU", "warning", f"none found: {threads}", fix)


def _describe_gpu(local: Any, architectures: Sequence[str]) -> Check:
    """Return the check of one GPU: whether this torch has kernels for it."""
    major, minor = local.gpu.capability
    dtype = "bfloat16" if major >= 8 else "float16, for it has no bfloat16"
    driver = f"driver {local.driver}, " if local.driver else ""
    found = f"{local.gpu.name}, {driver}compute capability {major}.{minor}, {dtype}"
    if not _has_kernels((major, minor), architectures):
        found += f"; this torch has no kernels for it ({' '.join(architectures)})"
        return Check("GPU", "fault", found, f"install another build of torch ({TORCH_PAGE})")
    return Check("GPU", "ok", found)


def _has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether binaries (sm_86) or code to compile (compute_90) run on a GPU.

    A binary runs on the same major version with the same or a higher minor one (NVIDIA, "CUDA C++
    Programming Guide", binary compatibility).
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
            f"{holder.program or 'a program'} (pid {holder.pid}) holds {gib(holder.memory)}"
            for holder in holders[:5]
        )
    if local.free > 0.9 * local.gpu.memory:
        return Check("GPU memory", "ok", found)
    fix = "end programs that are not needed (nvidia-smi lists them); a plan uses what is free"
    return Check("GPU memory", "warning", found, fix)


def used_device() -> "torch.device":
    """Return the device that a training would use."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def check_four_bit() -> Iterator[Check]:
    """Multiply by a 4-bit matrix with bitsandbytes, and compare with the same product by torch.

    The packed numbers are unpacked by torch alone, so that a wrong kernel of bitsandbytes cannot
    be in both products.
    """
    import bitsandbytes as bnb
    import torch

    from orpo_lite.model.load import choose_dtype
    from orpo_lite.ops.devices import device_kind, dtype_name

    device = used_device()
    dtype = choose_dtype("auto", device_kind(device))
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 256, generator=generator)
    x_TI = torch.randn(8, 256, generator=generator)
    layer = bnb.nn.Linear4bit(
        256, 96, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight_OI.to(dtype), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    layer = layer.to(device)
    unpacked_OI = unpack_nf4(layer.weight).to(torch.float64).cpu()
    rounding = relative_error(unpacked_OI, weight_OI)
    x = x_TI.to(device, dtype).requires_grad_()
    out = layer(x)
    out.backward(torch.ones_like(out))
    with torch.no_grad():
        one = layer(x[:1])  # another kernel
    exact = x.detach().double().cpu() @ unpacked_OI.T
    gradient = unpacked_OI.sum(0).expand(8, -1)
    errors = {
        "its product": relative_error(out, exact),
        "its product of one row": relative_error(one, exact[:1]),
        "its gradient": relative_error(x.grad, gradient),
    }
    where = f"{device.type}, {dtype_name(dtype)}"
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    wrong = [f"{name} is off by {error:.1%}" for name, error in errors.items() if error > limit]
    if not rounding < ROUNDING_OF_NF4:
        wrong.append(f"its rounding is off by {rounding:.0%}")
    name = f"bitsandbytes {_version('bitsandbytes')}"
    if wrong:
        fix = "pip install --force-reinstall bitsandbytes; or quantization.load_in_4bit=false"
        yield Check(
            "4-bit product", "fault", f"{name} is wrong on {where}: {'; '.join(wrong)}", fix
        )
        return
    largest = max(errors.values())
    yield Check("4-bit product", "ok", f"{name} is right on {where} (within {largest:.0e})")


ROUNDING_OF_NF4 = 0.3
"""Largest error of a normal weight in NF4, relative to the largest weight.

The widest gap between two of its 16 numbers is 0.30, of which rounding takes at most half."""


def unpack_nf4(parameter: Any) -> "torch.Tensor":
    """Return the matrix that a 4-bit parameter holds, unpacked by torch. Its scales are float32.

    A byte holds two numbers, the first one in its high half. Each block has one scale.
    """
    import torch

    state = parameter.quant_state
    packed = parameter.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    values = state.code.to(codes.device)[codes].view(-1, state.blocksize)
    return (values * state.absmax.view(-1, 1)).view(state.shape)


def relative_error(found: Any, exact: Any) -> float:
    """Return the largest difference of two tensors, relative to the largest exact value."""
    exact = exact.detach().double().cpu()
    difference = (found.detach().double().cpu() - exact).abs().max()
    return float(difference / exact.abs().max())


def check_attention() -> Iterator[Check]:
    """Try the attention back-ends of this device on two segments, with gradients.

    They are compared with the softmax formula in float64.
    """
    import torch

    from orpo_lite.model.load import choose_dtype
    from orpo_lite.ops.attention import BACKENDS, choose_backend, flash_attn
    from orpo_lite.ops.devices import device_kind
    from orpo_lite.ops.segments import AttentionOptions, Segment

    device = used_device()
    kind = device_kind(device)
    dtype = choose_dtype("auto", kind)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 24, 64), (1, 2, 24, 64), (1, 2, 24, 64))  # grouped heads
    leaves = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    segments = (Segment(0, 14), Segment(14, 24, 0, 6))
    options = AttentionOptions(64**-0.5, None, None)
    exact = _with_gradients(_plain_attention, leaves, torch.float64, segments, options)
    names = {
        "cpu": ["flash_cpu", "sdpa", "maths"],
        "cuda": ["efficient", "sdpa", "maths"],
        "ampere": ["varlen", "efficient", "sdpa", "maths"],
    }[kind]
    if _version("flash-attn") and flash_attn() is None:
        fix = "pip uninstall flash-attn; only models with a softcap are faster with it"
        yield Check("attention", "warning", "flash-attn is installed, and cannot be imported", fix)
    elif kind == "ampere" and flash_attn() is not None:
        names.append("flash_attn")
    used = choose_backend(leaves[0], leaves[2], None)
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    right = []
    for name in names:
        try:
            found = _with_gradients(BACKENDS[name], leaves, dtype, segments, options)
            error = max(relative_error(*pair) for pair in zip(found, exact, strict=True))
            text = "" if error <= limit else f"is off by {error:.1%}"
        except Exception as failure:
            text = f"fails ({type(failure).__name__}: {first_line(failure)[:200]})"
        label = f"{name} (used)" if name == used else name
        if not text:
            right.append(label)
            continue
        fix = f"install the build of torch for this GPU ({TORCH_PAGE})"
        if name == "flash_attn":
            fix = "pip uninstall flash-attn, or build it for this torch"
        yield Check("attention", "fault" if name == used else "warning", f"{label} {text}", fix)
    if right:
        yield Check("attention", "ok", f"right on {device.type}: {', '.join(right)}")


def _with_gradients(
    function: Callable[..., Any],
    leaves: Sequence["torch.Tensor"],
    dtype: "torch.dtype",
    segments: Any,
    options: Any,
) -> list["torch.Tensor"]:
    """Return the output of an attention function, and the gradients of its sum of squares."""
    copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out = function(*copies, segments, options)
    out.float().square().sum().backward()
    return [out, *(copy.grad for copy in copies if copy.grad is not None)]


def _plain_attention(query: Any, key: Any, value: Any, segments: Any, options: Any) -> Any:
    """Return softmax(q k^T * scale) v for each segment, which sees its prefix and itself."""
    import torch

    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    outs = []
    for segment in segments:
        own = torch.arange(segment.start, segment.stop, device=query.device)
        prefix = torch.arange(segment.prefix_start, segment.prefix_stop, device=query.device)
        seen = torch.cat([prefix, own])
        scores = query[:, :, own] @ key[:, :, seen].transpose(-1, -2) * options.scale
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + segment.prefix_length)
        outs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value[:, :, seen])
    return torch.cat(outs, 2)


# --- memory and disk


def check_host_memory() -> Iterator[Check]:
    """Report the free RAM, and whether memory can be pinned for copies to and from a GPU."""
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
                "memory.checkpoint_offload=false memory.embedding_on_cpu=false; under WSL2 "
                "raise `memory` in .wslconfig"
            )
            yield Check("pinned memory", "warning", found, fix)


def free_ram() -> int:
    """Return the bytes of RAM that programs can still get, also by the limit of a container."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    free = 1024 * int(found[1]) if found else 0
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # there is no such file, or it holds "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def check_disk_space() -> Iterator[Check]:
    """Report the free space of the folders that a training writes to."""
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
    """Report whether the hub answers, and what the access token may do. It is never shown."""
    from huggingface_hub import constants, get_session

    from orpo_lite.publishing.account import find_account
    from orpo_lite.publishing.retry import LOGIN, own_token

    if constants.is_offline_mode():
        yield Check("hub", "ok", "not asked: HF_HUB_OFFLINE is set, and nothing is downloaded")
        return
    unreachable = "HF_HUB_OFFLINE=1, which uses only what is in the cache; or a proxy (HTTPS_PROXY)"
    if own_token("hub") is None:
        try:
            get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=10.0)
        except Exception as error:
            found = f"cannot be reached ({type(error).__name__})"
            yield Check("hub", "warning", found, unreachable)
            return
        yield Check("hub", "ok", "answers; there is no token, which gated models and a push need")
        return
    asking = find_account()
    try:
        note = next(asking)  # the first attempt failed
    except StopIteration as end:
        name, role = end.value
        rights = {"fineGrained": "rights of its own (fine-grained)", "": "unknown rights"}
        found = f"answers; the token of {name} has {rights.get(role, f'{role} access')}"
        fix = f"a push needs write access: {LOGIN}" if role == "read" else ""
        yield Check("hub", "warning" if fix else "ok", found, fix, (name,))
        return
    asking.close()
    yield Check("hub", "warning", f"cannot be reached ({note.text.partition(';')[0]})", unreachable)


# --- a recipe


def check_recipe(recipe: "Recipe") -> Iterator[Check]:
    """Plan the recipe for this machine, and look for its base and data without a download."""
    from orpo_lite.planning.plan import plan
    from orpo_lite.planning.search import does_not_fit
    from orpo_lite.recipe.text import gib

    private = _private_names(recipe)
    for name, check in (("base", _check_base), ("data", _check_data)):
        found = run_check(name, lambda check=check: [check(recipe)], TIME_LIMIT)  # type: ignore[misc]
        yield from (Check(c.name, c.state, c.found, c.fix, (*c.private, *private)) for c in found)
    report = plan(recipe)
    needed = f"{gib(report.plan.needed)} of GPU memory"
    if report.plan.fits and report.local is None and recipe.memory.budget == "auto":
        yield Check("plan", "ok", f"needs {needed}; there is no GPU here to compare with")
    elif report.plan.fits:
        yield Check("plan", "ok", f"fits: needs {needed}, of {gib(report.plan.budget or 0)}")
    else:
        error = does_not_fit(report.plan, report.changes)
        yield Check("plan", "fault", f"does not fit: {error.found}", error.fix, private)
    if report.plan.measured.host > free_ram():
        found = f"needs {gib(report.plan.measured.host)} of RAM, and {gib(free_ram())} are free"
        yield Check("plan", "warning", found, "end other programs, or train on a smaller base")


def _private_names(recipe: "Recipe") -> tuple[str, ...]:
    """Return what a recipe names of a person's own: the data, a local base, the run folder."""
    names = [*recipe.data.names, recipe.data.dataset_test_split, recipe.training.output_dir]
    if Path(recipe.model.model_name_or_path).exists():
        names.append(recipe.model.model_name_or_path)
    names += [recipe.model.adapter_name_or_path, recipe.output.hub_model_id]
    return tuple(name for name in names if name and not name.startswith("builtin:"))


def _check_base(recipe: "Recipe") -> Check:
    from huggingface_hub import constants

    from orpo_lite.base.download import TEXT, WEIGHTS, find_cached, manual_download
    from orpo_lite.base.find import find_base, weight_files

    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    if name.startswith("builtin:"):
        return Check("base", "ok", "is made here")
    folder: Path | None = Path(name).expanduser()
    if folder is None or not folder.is_dir():
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        folder = None if is_path else find_cached(name, revision, [*TEXT, *WEIGHTS])
        if is_path or folder is None or not all(file.is_file() for file in weight_files(folder)):
            if is_path or constants.is_offline_mode():
                fix = "name a folder that exists" if is_path else manual_download(name, revision)
                return Check("base", "fault", f"{name} is not on this machine", fix)
            return Check("base", "ok", f"{name} will be downloaded")
        return Check("base", "ok", f"{name} is in the cache")
    find_base(name, revision)
    return Check("base", "ok", f"{name} is on this machine")


def _check_data(recipe: "Recipe") -> Check:
    import datasets
    from huggingface_hub import constants

    from orpo_lite.data.sources.local import find_files
    from orpo_lite.data.sources.source import is_local

    names = [name for name in recipe.data.names if not name.startswith("builtin:")]
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    missing = []
    for name in names:
        if is_local(name):
            find_files(name, recipe.data.dataset_train_split)
        elif not (cache / name.replace("/", "___").lower()).is_dir():
            missing.append(name)
    if not missing:
        return Check("data", "ok", "are on this machine" if names else "are made here")
    if constants.is_offline_mode():
        fix = f"on a connected machine: hf download --repo-type dataset {missing[0]}"
        return Check("data", "fault", f"{', '.join(missing)}: not in the cache", fix)
    return Check("data", "ok", f"{', '.join(missing)}: will be downloaded")


CHECKS: list[tuple[str, Callable[[], Checks], float]] = [
    ("packages", check_packages, TIME_LIMIT),
    ("GPU", check_device, TIME_LIMIT),
    ("4-bit product", check_four_bit, TIME_LIMIT),
    ("attention", check_attention, TIME_LIMIT),
    ("memory", check_host_memory, TIME_LIMIT),
    ("disk", check_disk_space, TIME_LIMIT),
    ("hub", check_hub, HUB_LIMIT),
]
"""The checks in their order: name, function, and seconds that it may take."""


# --- the text of a bug report

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL|COOKIE", re.IGNORECASE)
PATH = re.compile(r"(?<![\w:/.])(?:~[\w-]*)?/[^\s,;:'\"()\[\]<>|]+")
URL = re.compile(r"https?://(?!huggingface\.co/|pytorch\.org/)[^\s,;'\")]+")
MARKS = {"fault": "FAULT", "warning": "warning", "ok": "ok"}


def bug_report(checks: Sequence[Check]) -> str:
    """Return the checks as Markdown for an issue: no names of people or machines, paths, tokens."""
    lines = [f"**orpo-lite doctor**, {platform.system()} {platform.machine()}", ""]
    for check in checks:
        fix = f" (to do: {check.fix})" if check.fix else ""
        text = f"{check.found}{fix}"
        for name in sorted(check.private, key=len, reverse=True):
            text = text.replace(name, "...")
        lines.append(f"- {MARKS[check.state]}: {check.name}: {' '.join(text.split())}")
    return anonymous("\n".join(lines)) + "\n"


def anonymous(text: str) -> str:
    """Return a text without tokens, paths, addresses, and names of this user and this machine."""
    secrets = [value for name, value in os.environ.items() if SECRET.search(name)]
    with suppress(Exception):  # a login that cannot be renewed
        from huggingface_hub import get_token

        secrets.append(get_token() or "")
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, "***")
    text = TOKEN.sub("***", text)
    folders = [str(Path.cwd()), str(Path.home()), sys.prefix, *_folders()]
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, "PATH")
    text = PATH.sub("PATH", URL.sub("URL", text))
    for name in _own_names():
        text = re.sub(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])", "NAME", text, flags=re.I)
    return text


def _folders() -> list[str]:
    """Return the folders that environment variables name."""
    return [value for value in os.environ.values() if value.startswith("/") and ":" not in value]


def _own_names() -> list[str]:
    """Return the names of the user and of the machine."""
    host = socket.gethostname()
    names = {host, host.partition(".")[0], Path.home().name}
    names |= {os.environ.get(variable, "") for variable in ("USER", "LOGNAME", "SUDO_USER")}
    return sorted((name for name in names if len(name) > 1), key=len, reverse=True)
