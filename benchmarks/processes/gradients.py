"""Gradients of a step on several processes, which hold the base whole or share it."""

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.lengths import random_pairs
from benchmarks.processes.memory import peaks
from orpo_lite.base.find import fetch_weights, find_base
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.load import load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.model.probe import probe
from orpo_lite.model.sharding import divide_layer, divide_root
from orpo_lite.objectives.objective import find_objective
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe
from orpo_lite.training.step import accumulate

# Steps of 13 pairs, which no number of processes divides, and of 1, so that the others are idle.
COUNTS = (13, 1)
LONGEST, ROW = 60, 120  # tokens


def gradient_figures(folder: Path, worlds: Sequence[int]) -> dict[str, float | bool]:
    """Return the differences of the gradients of 1, 2, ... processes, the largest of all steps."""
    found = {world: _launch(folder, world) for world in (1, *worlds)}
    one = found[1]

    def error(name: str) -> float:
        return max(
            float((vector - expected).norm() / expected.norm())
            for world in worlds
            for vector, expected in zip(
                found[world][name],
                one[name.replace("shared", "whole")],
                strict=True,
            )
        )

    return {
        "ddp_gradient_error": error("4 bit, whole"),
        "fsdp2_gradient_error": error("4 bit, shared"),
        "float64_gradient_error": max(error("float64, whole"), error("float64, shared")),
        "fsdp2_equals_ddp": all(
            torch.equal(a, b)
            for world in worlds
            for a, b in zip(
                found[world]["4 bit, whole"],
                found[world]["4 bit, shared"],
                strict=True,
            )
        ),
    } | {
        key + (f"_{world}" if world > 2 else ""): found[world][name]
        for world in worlds
        for key, name in (
            ("fsdp2_packed_bytes_share", "packed share"),
            ("plan_peak_error", "peak error"),
        )
    }


def _launch(folder: Path, world: int) -> dict[str, Any]:
    """Run :func:`_run_process` in ``world`` processes. Return what the first one found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", __name__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found: dict[str, Any] = torch.load(folder / f"gradients-{world}.pt")
    return found


def _run_process(folder: Path) -> None:
    processes = Processes(cpu=True)
    found: dict[str, Any] = {}
    for form in ("whole", "shared") if processes.count > 1 else ("whole",):
        shard = processes.count if form == "shared" else "off"
        recipe = load_recipe(
            str(folder / "recipe.yaml"), [f"memory.shard={shard}", "memory.micro_batch_size=2"]
        )
        base = fetch_weights(find_base(str(folder / "base"), "main"))
        model = load_pair_model(recipe, base, processes.device, processes)
        probe(model, LONGEST, ROW)
        found[f"4 bit, {form}"] = _gradients(model, recipe, processes)
        if form == "shared":
            found["packed share"] = _largest(_live_share(model), processes)
            errors = [abs(planned / live - 1) for planned, live in peaks(model, recipe)]
            found["peak error"] = _largest(max(errors), processes)
        plain = _float64_model(folder / "base", recipe)
        if form == "shared":
            mesh = init_device_mesh("cpu", (processes.count,))
            for layer in plain.layers:
                divide_layer(layer, mesh)
            divide_root(plain, mesh)
        found[f"float64, {form}"] = _gradients(plain, recipe, processes)
    if processes.is_main:
        torch.save(found, folder / f"gradients-{processes.count}.pt")
    processes.wait()


def _largest(value: float, processes: Processes) -> float:
    return -processes.smallest(round(-value * 10**9)) / 10**9


def _live_share(model: PairModel) -> float:
    """Return the bytes of packed weights that are alive in this process, divided by the base's.

    All tensors of the process are counted, not only parameters: a forgotten reference to a whole
    weight would keep it alive.
    """
    states = [layer.quant_state for layer in model.modules() if hasattr(layer, "quant_state")]
    statistics = {s.absmax.untyped_storage().data_ptr() for s in states}
    gc.collect()
    alive = {}
    for tensor in gc.get_objects():
        is_plain = isinstance(tensor, Tensor) and not isinstance(tensor, DTensor)
        if is_plain and tensor.dtype == torch.uint8:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in statistics:
                alive[storage.data_ptr()] = storage.nbytes()
    return sum(alive.values()) / sum(state.shape.numel() // 2 for state in states)


def _gradients(model: PairModel, recipe: Recipe, processes: Processes) -> list[Tensor]:
    """Return the gradients of a step of each of COUNTS pairs, all parameters in one vector."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trained():
        if "lora_B" in name:  # at B = 0 the gradient of A would be 0
            nn.init.normal_(parameter, std=0.1, generator=generator)
    found = []
    for count in COUNTS:
        model.zero_grad(set_to_none=True)
        accumulate(
            model,
            find_objective(recipe.loss),
            _pairs(count),
            model.batching(recipe, 0),
            step=0,
            seed=0,
            processes=processes,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
        )
        grads = [parameter.grad for _, parameter in model.trained() if parameter.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
    return found


def _pairs(count: int) -> list[TokenizedPair]:
    """Return pairs of random tokens and very different lengths."""
    triples = [(8 + 3 * i % 7, 16 + 11 * i % 40, 16 + 23 * i % 40) for i in range(count)]
    return random_pairs(triples, 96)


def _float64_model(folder: Path, recipe: Recipe) -> PairModel:
    """Return the base in float64, not quantised, with an adapter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).double()

    def norm(module: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
        weight: Tensor = module.weight
        return weight * x * scale

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            # transformers' own rounds to float32, and then a last bit becomes 1e-8.
            module.forward = partial(norm, module)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return PairModel(get_peft_model(model, lora).double(), recipe.memory).train()


if __name__ == "__main__":
    _run_process(Path(sys.argv[1]))
