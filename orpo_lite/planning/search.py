"""The fastest levers that fit a budget.

Nothing comes from a formula over a model's shape. For each choice of levers a step of two to four layers is counted;
what one layer more adds, the others add too. The plan that is chosen is then counted once in full.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from orpo_lite.errors import FitError, ModelError, Overrides
from orpo_lite.model.load import choose_dtype
from orpo_lite.planning.extrapolate import LayerExtrapolation, seconds
from orpo_lite.planning.gpus import GPUS, Gpu
from orpo_lite.planning.measure import (
    MetaModels,
    StepMemory,
    loading_bytes,
    measure,
    rounded,
    standing_bytes,
)
from orpo_lite.planning.on_meta import Triples
from orpo_lite.planning.route import PlannedRoute, find_route
from orpo_lite.recipe.schema import LEVERS, Recipe
from orpo_lite.recipe.text import gib, to_text

logger = logging.getLogger(__name__)

MIB = 2**20
# Allowances: what the counted step cannot show. None of them was fitted to a model.
CONTEXT = (
    512 * MIB
)  # of CUDA, with the kernels of torch, cuBLAS and bitsandbytes loaded; 300 to 550 on cards of today
FRAGMENTATION, LEAST_FRAGMENTATION = (
    0.05,
    256 * MIB,
)  # a share of the step's own bytes, and no less than that
# What torch's aten/src/ATen/cuda/CublasHandlePool.cpp allocates for each of two handles, that of the main thread and
# that of autograd's: for cuBLAS 8.125 MiB, on compute capability 9.0 (Hopper) and with CUBLAS_WORKSPACE_CONFIG=:4096:8
# (deterministic) 32 MiB; and 1 MiB for cuBLASLt. They count in torch.cuda.max_memory_allocated.
HANDLES, CUBLAS, CUBLAS_HOPPER, CUBLAS_LT = 2, 8 * MIB + MIB // 8, 32 * MIB, MIB
HOPPER = (9, 0)
TILE, SMALL_CHUNK = 512, 128  # tokens of an MLP, rows of logits
SHORTEST = 128  # tokens of a sequence; no shorter one is proposed
MORE_TOKENS = (
    4_096,
    8_192,
)  # a forward pass of fewer spends much of its time on dequantising the weights


@dataclass(frozen=True)
class Change:
    """A change of the maths that would need less."""

    keys: Mapping[str, Any]
    """``section.key`` -> value."""
    needed: int
    fits: bool


@dataclass(frozen=True)
class GpuRow:
    """What a card makes of the recipe, by extrapolation."""

    gpu: Gpu
    levers: Mapping[str, Any] | None
    """None: it does not fit."""
    needed: int
    seconds_per_pair: float | None


@dataclass(frozen=True)
class MemoryPlan:
    """How a recipe's step fits, or by how much it does not."""

    levers: Mapping[str, Any]
    """Values for the keys of ``memory``."""
    budget: int | None
    """Bytes that the run may take; None where nobody said."""
    gpu: Gpu | None
    """None on a CPU."""
    measured: StepMemory
    """The step as it was run on meta with these levers."""
    deterministic: bool = False
    """Whether the run asks for deterministic kernels."""

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device at the peak of a step."""
        return self.measured.total

    @property
    def parts(self) -> dict[str, int]:
        """The peak by part."""
        return {
            name: size
            for name, size in (*self.measured.held.items(), *self.measured.parts.items())
            if size
        }

    @property
    def allowances(self) -> dict[str, int]:
        """What a program takes besides its tensors."""
        return self._allowances(self.measured.peak)

    @property
    def needed(self) -> int:
        """Peak and allowances; more where loading takes more."""
        loading = self.measured.loading + sum(self._allowances(0).values())
        return max(self.peak + sum(self.allowances.values()), loading)

    def _allowances(self, step: int) -> dict[str, int]:
        return allowances(step, self.gpu, deterministic=self.deterministic)

    @property
    def fits(self) -> bool:
        """Within the budget, if there is one."""
        return self.budget is None or self.needed <= self.budget

    @property
    def flops_per_pair(self) -> float:
        """Of the planned forward pass."""
        return (
            sum(flops * count for (flops, _), count in self.measured.work.items())
            / self.measured.pairs
        )

    @property
    def seconds_per_pair(self) -> float | None:
        """An estimate, from the card's data sheet."""
        if self.gpu is None:
            return None
        return seconds(self.measured.work, self.measured.sent, self.gpu) / self.measured.pairs

    def sentences(self, others: int = 0) -> list[str]:
        """The plan in three lines: memory, levers, time."""
        step, taken = self.measured, self.seconds_per_pair
        held = f"; other processes hold {gib(others)}" if others else ""
        about = f", about {taken * step.pairs:.2g} s for the card" if taken else ""
        pairs = f"{step.pairs} pair{'s' * (step.pairs != 1)}, {step.tokens:,} tokens"
        return [
            f"memory: {gib(self.needed)} of {gib(self.budget or 0)} needed, {gib(self.peak)} in tensors{held}",
            f"levers: {' '.join(f'memory.{key}={to_text(value)}' for key, value in self.levers.items())}",
            f"the largest pass: {pairs}, {self.flops_per_pair * step.pairs / 1e12:.3g} TFLOPs{about}",
        ]

    def to_json(self) -> dict[str, Any]:
        """In bytes and seconds."""
        return {
            "fits": self.fits,
            "budget_bytes": self.budget,
            "peak_bytes": self.peak,
            "needed_bytes": self.needed,
            "parts": self.parts,
            "allowances": self.allowances,
            "paged_bytes": self.measured.paged,
            "loading_bytes": self.measured.loading,
            "host_bytes": self.measured.host,
            "levers": dict(self.levers),
            "micro_batch": {"tokens": self.measured.tokens, "pairs": self.measured.pairs},
            "flops_per_pair": self.flops_per_pair,
            "seconds_per_pair": self.seconds_per_pair,
            "card": self.gpu.name if self.gpu else None,
        }


def allowances(step: int, gpu: Gpu | None, *, deterministic: bool = False) -> dict[str, int]:
    """Bytes besides the tensors, for a step that holds so many."""
    if not gpu:
        return {"fragmentation": int(FRAGMENTATION * step)}
    cublas = CUBLAS_HOPPER if deterministic or gpu.capability == HOPPER else CUBLAS
    return {
        "CUDA context": CONTEXT,
        "kernels' workspaces": HANDLES * (cublas + CUBLAS_LT),
        "fragmentation": max(int(FRAGMENTATION * step), LEAST_FRAGMENTATION),
    }


class Planner:
    """The plans of one recipe, for any budget; extrapolations are made when first asked for, and kept."""

    def __init__(self, recipe: Recipe, config: Any, triples: Triples, kind: str) -> None:
        self.recipe, self.config, self.triples, self.kind = recipe, config, triples, kind
        self.layers = int(config.get_text_config().num_hidden_layers)
        self._models = MetaModels()
        self._extrapolations: dict[tuple[Any, ...], LayerExtrapolation] = {}

    @cached_property
    def planned(self) -> PlannedRoute:
        """How pairs go through this model."""
        return find_route(self.recipe, self.config, self.triples, self.kind)

    @cached_property
    def _whole(self) -> tuple[int, int, int]:
        """Bytes held by all layers; by the input embedding, which may be moved; on the device while the base loads."""
        here = self.recipe.with_memory({"embedding_on_cpu": False})
        model = self._models.get(here, self.config, choose_dtype(here.model.dtype, self.kind))
        standing, _ = standing_bytes(model, here)
        tied = self.config.get_text_config().tie_word_embeddings
        embedding = 0 if tied else rounded(model.causal.get_input_embeddings().weight)
        return sum(standing.values()), embedding, loading_bytes(model, standing)

    def choices(self) -> list[dict[str, Any]]:
        """All values of the levers but the number of checkpointed layers, the simplest first."""
        memory, longest = self.recipe.memory, self.longest
        whole = self._longest(
            self.recipe.training.global_batch_size
        )  # of a step; a pass of more would be the same
        tokens = sorted(
            {longest, *(min(more, whole) for more in MORE_TOKENS if longest < more)}, reverse=True
        )
        options: dict[str, list[Any]] = {
            "head_chunk": ["auto"],
            "mlp_tile": [None, TILE],
            "checkpoint_offload": [False, True],
            "embedding_on_cpu": [False, True] if self._whole[1] else [False],
            "micro_batch_tokens": tokens if memory.packing else ["auto"],
        }
        if not self._amounts(partly=True):
            options["checkpoint_offload"] = [False]
        for key in options:
            if getattr(memory, key) != "auto":
                options[key] = [getattr(memory, key)]
        found = [
            dict(zip(options, values, strict=True))
            for values in itertools.product(*options.values())
        ]
        return [*found, self.tightest()]

    def tightest(self) -> dict[str, Any]:
        """The levers that need the least memory."""
        memory = self.recipe.memory
        least: dict[str, Any] = {
            "head_chunk": SMALL_CHUNK,
            "mlp_tile": TILE,
            "micro_batch_tokens": self.longest,
        }
        least |= {
            "checkpoint_offload": bool(self._amounts(partly=True)),
            "embedding_on_cpu": self._whole[1] > 0,
        }
        if not memory.packing:
            least |= {"head_chunk": "auto", "micro_batch_tokens": "auto"}
        return {
            key: value if getattr(memory, key) == "auto" else getattr(memory, key)
            for key, value in least.items()
        }

    @property
    def longest(self) -> int:
        """Tokens of the longest pair through the model."""
        return self._longest(1)

    def _longest(self, count: int) -> int:
        share = self.planned.route == "shared"
        tokens = self.triples[:, 1] + self.triples[:, 2] - self.triples[:, 0] * share
        return int(np.sort(tokens)[-count:].sum())

    def _amounts(self, *, partly: bool = False) -> list[int]:
        """Numbers of layers that may be left un-checkpointed; ``partly`` leaves out that of all."""
        amount = self.recipe.memory.activation_checkpointing
        if amount == "auto":
            amounts = list(range(self.layers + 1))
        else:
            amounts = [self.layers - self.recipe.memory.checkpointed(self.layers)]
        return [kept for kept in amounts if kept < self.layers or not partly]

    def extrapolation(self, choice: Mapping[str, Any]) -> LayerExtrapolation:
        """That of a choice; where the embedding lies makes no difference to a step."""
        if (known := self._extrapolations.get(_step_of(choice))) is not None:
            return known
        plain = {**choice, "checkpoint_offload": False, "embedding_on_cpu": False}
        on_device = self._extrapolations.get(_step_of(plain))
        chosen = self.recipe.with_memory({**choice, "embedding_on_cpu": False})
        found = LayerExtrapolation(
            chosen, self.config, self.triples, self.kind, self.planned, self._models, on_device
        )
        self._extrapolations[_step_of(choice)] = found
        return found

    def best(self, budget: int | None, gpu: Gpu | None) -> dict[str, Any] | None:
        """The fastest levers that fit by the extrapolations; None if none does."""
        fastest: tuple[float, dict[str, Any]] | None = None
        for choice in self.choices():
            found, room = self.extrapolation(choice), math.inf if budget is None else budget
            kept = max(
                (k for k in self._amounts() if self._needed(choice, k, gpu) <= room), default=None
            )
            if kept is None:
                continue
            taken = found.seconds_per_token(self.layers, kept, gpu or GPUS[0])
            if fastest is None or taken < fastest[0]:
                fastest = taken, choice | {"activation_checkpointing": self.layers - kept}
            if kept == self.layers and not any(
                choice[name] for name in ("mlp_tile", "checkpoint_offload")
            ):
                break  # the largest forward pass without any lever: nothing is faster
        return fastest[1] if fastest else None

    def run(self, levers: Mapping[str, Any], budget: int | None, gpu: Gpu | None) -> MemoryPlan:
        """The plan of these levers, from a step with all layers."""
        found = measure(
            self.recipe.with_memory(levers),
            self.config,
            self.triples,
            self.kind,
            self.planned,
            self._models,
        )
        return MemoryPlan(levers, budget, gpu, found, self.recipe.training.full_determinism)

    def plan(self, budget: int | None, gpu: Gpu | None) -> MemoryPlan:
        """The fastest plan that fits, run once in full; where nothing fits, the one that needs the least."""
        tightest = self.tightest() | {
            "activation_checkpointing": self.layers - min(self._amounts())
        }
        levers = self.best(budget, gpu) or tightest
        plan = self.run(levers, budget, gpu)
        while not plan.fits and self.layers - levers["activation_checkpointing"] > min(
            self._amounts()
        ):
            # The extrapolation was a little low: layers of different kinds.
            levers = levers | {"activation_checkpointing": levers["activation_checkpointing"] + 1}
            plan = self.run(levers, budget, gpu)
        return plan if plan.fits or levers == tightest else self.run(tightest, budget, gpu)

    def row(self, gpu: Gpu) -> GpuRow:
        """What that card would make of it."""
        levers = self.best(gpu.memory, gpu)
        if levers is None:
            return GpuRow(gpu, None, self.least(gpu), None)
        choice = {
            name: value for name, value in levers.items() if name != "activation_checkpointing"
        }
        found, kept = self.extrapolation(choice), self.layers - levers["activation_checkpointing"]
        taken = found.seconds_per_token(self.layers, kept, gpu) * found.tokens_per_pair
        return GpuRow(gpu, levers, self._needed(choice, kept, gpu), taken)

    def least(self, gpu: Gpu | None) -> int:
        """Bytes that the tightest levers need."""
        return self._needed(self.tightest(), min(self._amounts()), gpu)

    def _needed(self, choice: Mapping[str, Any], kept: int, gpu: Gpu | None) -> int:
        whole, embedding, loaded = self._whole
        moved = embedding if choice["embedding_on_cpu"] else 0
        step = self.extrapolation(choice).peak(self.layers, kept)
        deterministic = self.recipe.training.full_determinism
        besides, least = (
            sum(allowances(size, gpu, deterministic=deterministic).values()) for size in (step, 0)
        )
        return max(whole - moved + step + besides, loaded + least)

    def changes(self, budget: int, gpu: Gpu | None) -> list[Change]:
        """Changes of the maths that need less, and which of them would fit; none is made by itself."""
        recipe, memory = self.recipe, self.recipe.memory
        levers: dict[str, Any] = {
            f"memory.{name}": "auto" for name in LEVERS if getattr(memory, name) != "auto"
        }
        switches = ("packing", "prompt_sharing", "fused_lora")
        levers |= {f"memory.{name}": True for name in switches if not getattr(memory, name)}
        if memory.micro_batch_size is not None:
            levers["memory.micro_batch_size"] = 1
        rank = {"lora.r": 8} if recipe.lora.r > 8 else {}
        alone: list[dict[str, Any]] = [levers] * bool(levers)
        alone += [{"quantization.load_in_4bit": True}] * (not recipe.quantization.load_in_4bit)
        alone += [{"training.optim": "paged_adamw_8bit"}] * (
            recipe.training.optim != "paged_adamw_8bit"
        )
        found = [self._changed(keys, budget, gpu) for keys in [*alone, *([rank] * bool(rank))]]
        longest = int(self.triples[:, 1:].max())
        for shorter in (longest // 2, longest // 4, longest // 8):
            limits = {"data.max_length": shorter}
            if recipe.data.prompt_limit > shorter // 2 and recipe.data.max_prompt_length != "auto":
                limits["data.max_prompt_length"] = shorter // 2
            found.append(self._changed(limits, budget, gpu))
            if not any(change.fits for change in found) and rank:
                found.append(self._changed(limits | rank, budget, gpu))
            if found[-1].fits or shorter < SHORTEST:
                break
        as_it_is = self.least(gpu)
        return [change for change in found if change.needed < as_it_is]

    def _changed(self, keys: Mapping[str, Any], budget: int, gpu: Gpu | None) -> Change:
        limit = keys.get("data.max_length")
        triples = self.triples if limit is None else np.minimum(self.triples, limit)
        needed = Planner(self.recipe.override(dict(keys)), self.config, triples, self.kind).least(
            gpu
        )
        return Change(keys, needed, needed <= budget)


def _step_of(choice: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a choice makes a difference to the passes of a step."""
    return tuple(value for name, value in sorted(choice.items()) if name != "embedding_on_cpu")


def no_plan(name: str, error: Exception) -> ModelError:
    """That a model cannot be planned, and how to go on."""
    logger.warning("the step could not be counted", exc_info=error)
    return ModelError(
        where=f"model {name}",
        found=f"its step cannot be counted without weights ({type(error).__name__})",
        fix="set the levers of memory by hand; training takes them as they are",
    )


def fit(
    recipe: Recipe, config: Any, triples: Triples, kind: str, budget: int, gpu: Gpu | None
) -> MemoryPlan:
    """The fastest plan within ``budget`` bytes. Raises :class:`FitError` with what would help."""
    planner = Planner(recipe, config, triples, kind)
    plan = planner.plan(budget, gpu)
    if not plan.fits:
        raise does_not_fit(plan, planner.changes(budget, gpu))
    return plan


def does_not_fit(plan: MemoryPlan, changes: Sequence[Change]) -> FitError:
    """The error that says so, with each change that would fit and what it saves."""
    found = f"the smallest step needs {gib(plan.needed)}, and there are {gib(plan.budget or 0)}"
    lines = []
    for change in changes:
        keys = " ".join(f"{key}={to_text(value)}" for key, value in change.keys.items())
        verdict = "fits" if change.fits else "still too much"
        lines.append(
            f"{keys}: {gib(change.needed)} ({gib(plan.needed - change.needed)} less), {verdict}"
        )
    useful = [line for line, change in zip(lines, changes, strict=True) if change.fits]
    if useful:
        first = "one of these; all but the levers of memory change what is trained:"
    else:
        useful, first = (
            lines[-1:],
            "another base, or a card with more memory; no single change is enough",
        )
    text = "\n    ".join([first, *useful])
    fitting = next((change.keys for change in changes if change.fits), None)
    return FitError(
        where="memory.budget", found=found, fix=Overrides(fitting, text=text) if fitting else text
    )
