"""Parts that run steps in their own process: the GPU, gradients, plans, running out of memory."""

import gc
import json
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import Tensor

from benchmarks import lengths, ours
from benchmarks.gpu.commands import recipe as recipe_arguments
from benchmarks.gpu.commands import reserved_planned, steps_of
from benchmarks.gpu.figures import NOT_MEASURED, Figures
from benchmarks.gpu.scale import Scale
from orpo_lite.api import train_events
from orpo_lite.data.packing import micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.load import bare_pair_model
from orpo_lite.model.optimizer import make_optimizer
from orpo_lite.model.pair_model import PairModel
from orpo_lite.ops.attention import choose_backend
from orpo_lite.ops.devices import device_kind, is_out_of_memory
from orpo_lite.planning.device import describe_device
from orpo_lite.planning.gpus import local_gpu
from orpo_lite.planning.search import Planner
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe

CUDA = torch.device("cuda", 0)
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors",
    "tokenizers", "huggingface_hub", "pydantic", "typer", "triton", "trl", "flash-attn",
    "orpo-lite",
)  # fmt: skip
GIB = 2**30


# --- the GPU


def card(scale: Scale, figures: Figures) -> None:
    """Write versions, the GPU, an NF4 round trip, a paged step, the speed of a matrix product."""
    figures.note("versions", {name: _version(name) for name in PACKAGES})
    figures.note("cuda_of_torch", torch.version.cuda)
    figures.note(
        "allocator",
        os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    )
    figures.attempt("torch_sees", _torch_sees)
    figures.attempt("nvml_sees", _nvml_sees)
    figures.attempt("said", describe_device, CUDA)
    own = local_gpu(0)
    figures.note("free_bytes", own.free if own else None)
    query = torch.empty(1, 8, 16, 128, dtype=torch.bfloat16, device=CUDA)
    figures.attempt("attention", choose_backend, query, query, None)
    figures.attempt("nf4", _nf4, scale.of(4_096, 128))
    figures.attempt("paged_step", _paged_step, scale.of(2_048, 512))
    figures.attempt("bf16_tflops", _matrix_product, scale.of(8_192, 256))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch_sees() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "capability": torch.cuda.get_device_capability(0),
        "devices": torch.cuda.device_count(),
        "processors": properties.multi_processor_count,
        "total_bytes": total,
        "free_bytes": free,
        "built_for": torch.cuda.get_arch_list(),
    }


def _nvml_sees() -> dict[str, Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": str(error)}
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda_of_driver": pynvml.nvmlSystemGetCudaDriverVersion_v2(),
        "total_bytes": memory.total,
        "used_bytes": memory.used,
        "free_bytes": memory.free,
        "uuid": pynvml.nvmlDeviceGetUUID(handle),
        "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    }


def _nf4(size: int) -> dict[str, Any]:
    """Quantise a matrix to NF4 and back; return the error and how often GPU and CPU differ."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    back = []
    for device in (CUDA, torch.device("cpu")):
        packed, state = functional.quantize_4bit(
            weight.to(device), quant_type="nf4", compress_statistics=True
        )
        back.append(functional.dequantize_4bit(packed, state).cpu().float())
    differing = int((back[0] != back[1]).sum())
    error = float((back[0] - weight.float()).norm() / weight.float().norm())
    return {
        "relative_error": round(error, 6),
        "values_that_differ_from_cpu": differing,
        "values": weight.numel(),
    }


def _paged_step(size: int) -> dict[str, Any]:
    """Return the relative difference of PagedAdamW8bit's steps from un-paged and torch's AdamW."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(size, size, generator=generator) for _ in range(2))
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "paged": bnb.optim.PagedAdamW8bit,
        "unpaged": bnb.optim.AdamW8bit,
        "torch": torch.optim.AdamW,
    }
    moved = {}
    for name, make in optimizers.items():
        parameter = torch.nn.Parameter(start.clone().to(CUDA))
        optimizer = make([parameter], lr=1e-3, weight_decay=0.0)
        for _ in range(2):
            parameter.grad = gradient.to(CUDA)
            optimizer.step()
        torch.cuda.synchronize()
        moved[name] = parameter.detach().cpu() - start
    return {
        f"from_{name}": round(float((moved["paged"] - moved[name]).norm() / moved[name].norm()), 6)
        for name in ("unpaged", "torch")
    }


def _matrix_product(size: int) -> float:
    """Return the TFLOP per second of a bfloat16 matrix product on this GPU."""
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    for _ in range(3):
        one @ other
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        one @ other
    torch.cuda.synchronize()
    return round(10 * 2 * size**3 / (time.perf_counter() - began) / 1e12, 1)


# --- gradients


def gradients(scale: Scale, figures: Figures) -> None:
    """Compare loss and gradient with each memory setting with those of the plain step.

    The model has the width of a 7B model and 8 layers; each step is repeated five times.
    """
    config, repeats = scale.config(layers=8), scale.of(5, 2)
    triples = scale.lengths("hh-rlhf")[:8]
    figures.note("pairs", triples.tolist())
    figures.note("layers", config.num_hidden_layers)
    pairs = lengths.random_pairs(triples, config.vocab_size)
    expected: list[Tensor] = []
    # cuBLAS is deterministic only with this.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, chosen in memory_settings(scale).items():
        settings = ours.recipe(**chosen)
        model = figures.attempt(f"{name}.built", drawn_model, settings, config)
        if model is None:
            continue
        step = partial(loss_and_gradient, model, pairs, settings)
        figures.attempt(f"{name}.deterministic", deterministic, step, repeats, expected)
        figures.attempt(f"{name}.repeated", repeated, step, repeats, expected)
        del model, step
        free()


def memory_settings(scale: Scale) -> dict[str, dict[str, Any]]:
    """Return each setting of ``memory`` alone, then those that save the most together."""
    tile, chunk = scale.of((512, 128), (16, 8))
    return {
        "plain": {},
        "offload": {"checkpoint_offload": True},
        "tiles": {"mlp_tile": tile},
        "embedding": {"embedding_on_cpu": True},
        "head_chunk": {"head_chunk": chunk},
        "no_checkpoints": {"activation_checkpointing": "none"},
        "all": ours.ALL_SETTINGS | {"mlp_tile": tile, "head_chunk": chunk},
    }


def deterministic(
    step: Callable[[], Tensor], repeats: int, expected: list[Tensor]
) -> dict[str, Any]:
    """Repeat a step with deterministic kernels.

    Return whether the bits are equal, and the differences from the plain step.
    """
    torch.use_deterministic_algorithms(True)
    try:
        found = [step() for _ in range(repeats)]
    finally:
        torch.use_deterministic_algorithms(False)
    if not expected:
        expected.append(found[0])  # the first setting is the plain step
    return {
        "same_bits": all(torch.equal(found[0], other) for other in found[1:]),
        **differences(found, expected[0]),
    }


def repeated(step: Callable[[], Tensor], repeats: int, expected: list[Tensor]) -> dict[str, Any]:
    """Repeat a step with the usual kernels; return the differences, the seconds and the memory."""
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = [step() for _ in range(repeats)]
    seconds = (time.perf_counter() - began) / repeats
    peak = gib(torch.cuda.max_memory_allocated())
    return differences(found, (expected or found)[0]) | {
        "seconds_a_step": round(seconds, 4),
        "peak_gib": peak,
    }


def differences(found: list[Tensor], expected: Tensor) -> dict[str, Any]:
    """Return the largest relative differences of losses and gradients.

    They are compared with the expected ones; the repeats also with the first of them.
    """
    return {
        "loss": float(found[0][0]),
        "loss_from_plain": largest(abs(float(one[0] / expected[0]) - 1) for one in found),
        "gradient_from_plain": largest(relative(one[1:], expected[1:]) for one in found),
        "spread_of_repeats": largest(relative(one[1:], found[0][1:]) for one in found),
        "finite": bool(torch.stack(found).isfinite().all()),
    }


def largest(values: Any) -> float:
    """Return the largest value, with six digits."""
    return float(f"{max(values):.6g}")


def relative(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference over the norm of ``other``."""
    return float((one - other).norm() / other.norm())


def drawn_model(settings: Recipe, config: Any) -> PairModel:
    """Return a random model whose adapter is not zero, with the same values at every call."""
    torch.manual_seed(0)
    model = bare_pair_model(settings, config, torch.bfloat16, CUDA)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trained():
            noise = torch.randn_like(parameter)
            parameter.add_(noise, alpha=0.01)
    free()
    return model


def loss_and_gradient(model: PairModel, pairs: list[TokenizedPair], settings: Recipe) -> Tensor:
    """Return the loss of an optimizer step and its whole gradient as one vector in host memory."""
    model.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=CUDA)
    for share in ours.step_losses(model, pairs, settings):
        share.backward()
        loss += share.detach()
    grads = [
        parameter.grad.flatten() for _, parameter in model.trained() if parameter.grad is not None
    ]
    return torch.cat([loss.reshape(1), *grads]).float().cpu()


def free() -> None:
    """Free the memory that no tensor uses."""
    gc.collect()
    torch.cuda.empty_cache()


def gib(size: float) -> float | str:
    """Return bytes in GiB; the simulated device may not count them."""
    return round(size / GIB, 4) if size else NOT_MEASURED


# --- plans


def make_plans(scale: Scale, figures: Figures) -> None:
    """Plan short pairs for three budgets, from the least one up, and for the whole GPU."""
    own, began = local_gpu(0), time.monotonic()
    assert own is not None
    gpu = own.gpu
    planner = Planner(
        plan_recipe(scale), scale.config(), scale.lengths("hh-rlhf"), device_kind(CUDA)
    )
    least = planner.least_bytes(gpu)
    figures.note("least_gib", round(least / GIB, 3))
    spare = scale.of((0.1, 1.5, 6), (0.001, 0.002, 0.01))
    plans = []
    for budget in (*(least + int(more * GIB) for more in spare), int(0.95 * gpu.memory)):
        plan = planner.plan(budget, gpu)
        plans.append(plan.to_json())
        figures.note(f"seconds_of_plan_{len(plans)}", round(time.monotonic() - began, 1))
        (scale.work / "plans.json").write_text(json.dumps(plans), "utf-8")
        began = time.monotonic()
    figures.note("plans", plans)


def plan_recipe(scale: Scale) -> Recipe:
    """Return the default recipe; for a rehearsal with the length limit of its data."""
    longest = {"data.max_length": 256, "training.global_batch_size": 8} if scale.rehearse else {}
    return ours.recipe().override(longest)


def plan_kept(scale: Scale, figures: Figures) -> None:
    """Take steps of real lengths with torch's allocator limited to each plan's budget.

    The CUDA context is subtracted from the budget. The limit is set after the model is built,
    because random weights are 16-bit for a moment.
    """
    plans = json.loads((scale.work / "plans.json").read_text("utf-8"))[:3]
    triples = scale.lengths("hh-rlhf")
    for number, plan in enumerate(plans, 1):
        figures.note(f"budget_{number}.levers", plan["levers"])
        figures.attempt(f"budget_{number}.found", one_budget, scale, plan, triples)
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        free()


def one_budget(scale: Scale, plan: dict[str, Any], triples: lengths.Triples) -> dict[str, Any]:
    """Take four steps with a plan: with the longest pairs, the shortest pairs, and two others."""
    config, settings = scale.config(), plan_recipe(scale).with_memory(plan["levers"])
    size = settings.training.global_batch_size
    model = drawn_model(settings, config)
    optimizer = make_optimizer(settings, [parameter for _, parameter in model.trained()])
    order = (triples[:, 1] + triples[:, 2] - triples[:, 0]).argsort()
    context = plan["allowances"].get("CUDA context", 0)
    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (plan["budget_bytes"] - context) / total), 0
    )
    steps: dict[str, Any] = {}
    peaks = [0]
    batches = {
        "longest": order[-size:],
        "shortest": order[:size],
        "first": slice(size),
        "next": slice(size, 2 * size),
    }
    for name, chosen in batches.items():
        pairs = lengths.random_pairs(triples[chosen], config.vocab_size)
        batching = model.batching(settings, pad_id=0)
        passes = micro_batches(pairs, batching)
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            ours.our_step(model, optimizer, pairs, settings)
            torch.cuda.synchronize()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            steps[name] = {"out_of_memory": str(error)[:300]}
            continue
        peaks.append(torch.cuda.max_memory_allocated())
        steps[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "passes": len(passes),
            "most_pairs_in_a_pass": max(map(len, passes)),
            "peak_gib": gib(peaks[-1]),
            "reserved_gib": gib(torch.cuda.max_memory_reserved()),
        }
    stats = torch.cuda.memory_stats() if max(peaks) else {}
    paged = plan["paged_bytes"]
    return {
        "steps": steps,
        "gib": {
            "budget": round(plan["budget_bytes"] / GIB, 3),
            "needed_planned": round(plan["needed_bytes"] / GIB, 3),
            # torch does not count paged memory.
            "tensors_planned": round((plan["peak_bytes"] - paged) / GIB, 3),
            "tensors_measured": gib(max(peaks)),
            "reserved_planned": round(reserved_planned(plan) / GIB, 3),
            "reserved_measured": gib(torch.cuda.max_memory_reserved()),
        },
        "retries_of_allocator": stats.get("num_alloc_retries", NOT_MEASURED),
        "seconds_per_pair_planned": plan["seconds_per_pair"],
    }


# --- running out of memory


def out_of_memory(scale: Scale, figures: Figures) -> None:
    """Compare the losses of a training that runs out of memory with one that does not.

    A step that runs out of memory is repeated with smaller micro-batches. From the first evaluation
    on, which is before the first step, the training may take 85% of the other one's peak.
    """
    outs = [scale.work / f"run-{name}" for name in ("free", "held")]
    figures.note("notes_with_all_memory", train_notes(scale, outs[0], None))
    peak = max(row["memory_gib"] for row in steps_of(outs[0])) * GIB
    figures.note("peak_gib", gib(peak))
    free()
    notes = figures.note("notes_with_85_percent", train_notes(scale, outs[1], 0.85 * peak))
    retried = [note for note in notes if note.startswith("out of memory at step")]
    figures.note("retried", retried or f"{NOT_MEASURED}: nothing ran out of memory")
    losses = [[row["loss"] for row in steps_of(out)] for out in outs]
    figures.note("losses", losses)
    pairs = zip(*losses, strict=True)
    figures.note("losses_differ_by", largest(abs(a - b) / abs(a) for a, b in pairs))


def train_notes(scale: Scale, out: Path, limit: float | None) -> list[str]:
    """Train in this process, after the first evaluation in ``limit`` bytes; return the notes."""
    keys = ["training.max_steps=4", "output.samples=0", "memory.head_chunk=64"]
    keys += ["memory.activation_checkpointing=none", "memory.micro_batch_tokens=8192"]
    arguments = recipe_arguments(scale, "small", out, *keys)
    notes = []
    for update in train_events(load_recipe(arguments[2], arguments[3:])):
        if update.kind == "eval" and update.step == 0 and limit:
            total = torch.cuda.mem_get_info(0)[1]
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(limit / total, 0)
        if update.kind == "note":
            notes.append(update.text)
    return notes
