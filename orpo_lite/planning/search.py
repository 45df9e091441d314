"""Search for the fastest memory settings that fit a budget.

Memory is measured, not computed from the shape of a model. For each choice of settings, steps of
models with two to four layers are measured. It is assumed that each further layer adds as much as
one measured layer. The chosen settings are then measured once with all layers.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from orpo_lite.model.load import choose_dtype
from orpo_lite.model.pair_model import PairModel
from orpo_lite.planning.extrapolate import LayerExtrapolation, seconds
from orpo_lite.planning.gathers import LAYER_COPIES, largest_layer, part_sizes
from orpo_lite.planning.gpus import GPUS, Gpu, allowances
from orpo_lite.planning.measure import (
    MetaModels,
    StepMemory,
    loading_bytes,
    measure,
    resident_bytes,
    storage_bytes,
)
from orpo_lite.planning.on_meta import Triples
from orpo_lite.planning.route import PlannedRoute, find_route
from orpo_lite.recipe.schema import PLANNED_SETTINGS, Recipe
from orpo_lite.recipe.text import gib, to_text

TILE, SMALL_CHUNK = 512, 128  # tokens per MLP tile, rows of logits per chunk
SHORTEST = 128  # tokens; after a data.max_length below this, no shorter one is tried
# Tokens per forward pass. A smaller pass spends much of its time on dequantising the weights.
MORE_TOKENS = (4_096, 8_192)


@dataclass(frozen=True)
class Change:
    """A change of the recipe that saves memory, such as a lower data.max_length."""

    keys: Mapping[str, Any]
    """``section.key`` -> value."""
    needed: int
    """Bytes that the training needs after the change."""
    fits: bool


@dataclass(frozen=True)
class GpuRow:
    """A row of the plan's table: memory settings for one GPU, with extrapolated memory and time."""

    gpu: Gpu
    settings: Mapping[str, Any] | None
    """Key of ``memory`` -> value; None if the training does not fit the GPU."""
    needed: int
    seconds_per_pair: float | None


@dataclass(frozen=True)
class MemoryPlan:
    """Memory settings, and the memory and time that a step needs with these settings."""

    settings: Mapping[str, Any]
    """Key of ``memory`` -> value."""
    budget: int | None
    """Bytes that the run may use; None if unknown."""
    gpu: Gpu | None
    """The GPU; None on a CPU."""
    measured: StepMemory
    """The step as measured on meta with these settings."""
    deterministic: bool = False
    """Whether the run uses deterministic kernels."""

    @property
    def peak(self) -> int:
        """Bytes of all tensors on the device at the peak of a step."""
        return self.measured.total

    @property
    def parts(self) -> dict[str, int]:
        """Name of a part, such as base or gradients -> its bytes at the peak of a step."""
        parts = {**self.measured.held, **self.measured.parts}
        return {name: size for name, size in parts.items() if size}

    @property
    def allowances(self) -> dict[str, int]:
        """Name of an allowance ("CUDA context") -> bytes that are needed in addition to tensors."""
        return self._allowances(self.measured.peak)

    @property
    def needed(self) -> int:
        """Bytes of a step or of loading the base, whichever is larger. Both include allowances."""
        loading = self.measured.loading + sum(self._allowances(0).values())
        return max(self.peak + sum(self.allowances.values()), loading)

    def _allowances(self, step: int) -> dict[str, int]:
        return allowances(step, self.gpu, deterministic=self.deterministic)

    @property
    def fits(self) -> bool:
        """True if ``needed`` is within the budget, or if there is no budget."""
        return self.budget is None or self.needed <= self.budget

    @property
    def flops_per_pair(self) -> float:
        """FLOPs of the measured forward and backward pass, divided by the number of pairs."""
        flops = sum(flops * count for (flops, _), count in self.measured.work.items())
        return flops / self.measured.pairs

    @property
    def seconds_per_pair(self) -> float | None:
        """Seconds per pair, estimated from the GPU's data sheet; None on a CPU."""
        if self.gpu is None:
            return None
        return seconds(self.measured.work, self.measured.sent, self.gpu) / self.measured.pairs

    def sentences(self, others: int = 0) -> list[str]:
        """Return three lines for the user: memory, memory settings, and the heaviest micro-batch.

        ``others``: bytes of the GPU that other processes use.
        """
        step, pair_seconds = self.measured, self.seconds_per_pair
        memory = (
            f"{gib(self.needed)} needed of {gib(self.budget or 0)} ({gib(self.peak)} for tensors)"
        )
        if others:
            memory += f"; other processes use {gib(others)}"
        settings = [f"memory.{key}={to_text(value)}" for key, value in self.settings.items()]
        pairs = "1 pair" if step.pairs == 1 else f"{step.pairs} pairs"
        flops = self.flops_per_pair * step.pairs / 1e12
        work = f"{pairs}, {step.tokens:,} tokens, {flops:.3g} TFLOPs"
        if pair_seconds:
            work += f", about {pair_seconds * step.pairs:.2g} s on this GPU"
        return [
            f"memory: {memory}",
            f"memory settings: {' '.join(settings)}",
            f"the largest pass: {work}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a dict for JSON. Sizes are in bytes, and times in seconds."""
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
            "levers": dict(self.settings),
            "micro_batch": {"tokens": self.measured.tokens, "pairs": self.measured.pairs},
            "flops_per_pair": self.flops_per_pair,
            "seconds_per_pair": self.seconds_per_pair,
            "card": self.gpu.name if self.gpu else None,
        }


class Planner:
    """Plans one recipe for any budget. Each :class:`LayerExtrapolation` is made once, if needed."""

    def __init__(self, recipe: Recipe, config: Any, triples: Triples, kind: str) -> None:
        self.recipe, self.config, self.triples, self.kind = recipe, config, triples, kind
        self.layers = int(config.get_text_config().num_hidden_layers)
        self._models = MetaModels()
        self._extrapolations: dict[tuple[Any, ...], LayerExtrapolation] = {}
        self._smallest: StepMemory | None = None  # of a shared base

    def sharing(self, shards: int) -> "Planner":
        """Return a planner for processes of which ``shards`` share one copy of the base.

        It uses what this planner has measured: a step's own tensors are the same.
        """
        recipe = self.recipe.with_memory({"shard": shards if shards > 1 else "off"})
        other = Planner(recipe, self.config, self.triples, self.kind)
        other.planned = self.planned
        other._models, other._extrapolations = self._models, self._extrapolations
        return other

    @cached_property
    def planned(self) -> PlannedRoute:
        """The predicted route of pairs through the model."""
        return find_route(self.recipe, self.config, self.triples, self.kind)

    @cached_property
    def _whole(self) -> tuple[int, int, int]:
        """(bytes on the device in all steps, bytes of the input embedding, bytes while loading).

        The second number is 0 for a tied embedding, because it cannot move to host memory.
        """
        on_device = self.recipe.with_memory({"embedding_on_cpu": False})
        model = self._models.get(on_device, self.config, self._dtype)
        resident, _ = resident_bytes(model, on_device)
        tied = self.config.get_text_config().tie_word_embeddings
        embedding = 0 if tied else storage_bytes(model.causal.get_input_embeddings().weight)
        gathered = 0
        if on_device.memory.shards > 1:
            # At most: fewer may exist at the peak of a step.
            gathered = LAYER_COPIES * largest_layer(model)
        loading = loading_bytes(model, resident, on_device.memory.shards)
        return sum(resident.values()) + gathered, embedding, loading

    @property
    def _dtype(self) -> torch.dtype:
        return choose_dtype(self.recipe.model.dtype, self.kind)

    @property
    def model(self) -> PairModel:
        """The model on meta. A later measurement changes its memory settings."""
        return self._models.get(self.recipe, self.config, self._dtype)

    @cached_property
    def divided(self) -> int:
        """Bytes of the matrices of all layers, which processes that share the base divide."""
        return sum(sum(part_sizes(layer, 1)) for layer in self.model.layers)

    def choices(self) -> list[dict[str, Any]]:
        """Return the combinations of memory settings to try, without ``activation_checkpointing``.

        The simplest combinations come first. The last one is :meth:`smallest_settings`.
        """
        memory, longest = self.recipe.memory, self.longest
        # A step has no more tokens than this. A higher limit would change nothing.
        step_tokens = self._longest(self.recipe.training.global_batch_size)
        more_tokens = [min(more, step_tokens) for more in MORE_TOKENS if longest < more]
        tokens = sorted({longest, *more_tokens}, reverse=True)
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
        combinations = itertools.product(*options.values())
        found = [dict(zip(options, values, strict=True)) for values in combinations]
        return [*found, self.smallest_settings()]

    def smallest_settings(self) -> dict[str, Any]:
        """Return the settings that need the least memory, without ``activation_checkpointing``."""
        memory = self.recipe.memory
        smallest: dict[str, Any] = {
            "head_chunk": SMALL_CHUNK,
            "mlp_tile": TILE,
            "micro_batch_tokens": self.longest,
            "checkpoint_offload": bool(self._amounts(partly=True)),
            "embedding_on_cpu": self._whole[1] > 0,
        }
        if not memory.packing:
            smallest |= {"head_chunk": "auto", "micro_batch_tokens": "auto"}
        for key in smallest:
            if getattr(memory, key) != "auto":
                smallest[key] = getattr(memory, key)
        return smallest

    @property
    def longest(self) -> int:
        """Tokens of the longest pair. With the route "shared", the common prefix counts once."""
        return self._longest(1)

    def _longest(self, count: int) -> int:
        """Return the sum of the tokens of the ``count`` longest pairs."""
        tokens = self.triples[:, 1] + self.triples[:, 2]
        if self.planned.route == "shared":
            tokens = tokens - self.triples[:, 0]
        return int(np.sort(tokens)[-count:].sum())

    def _amounts(self, *, partly: bool = False) -> list[int]:
        """Return the possible numbers of un-checkpointed layers.

        If ``partly``, at least one layer is checkpointed.
        """
        amount = self.recipe.memory.activation_checkpointing
        if amount == "auto":
            amounts = list(range(self.layers + 1))
        else:
            amounts = [self.layers - self.recipe.memory.checkpointed(self.layers)]
        return [kept for kept in amounts if kept < self.layers or not partly]

    def extrapolation(self, choice: Mapping[str, Any]) -> LayerExtrapolation:
        """Return a step's extrapolated memory and time; ``embedding_on_cpu`` has no effect."""
        known = self._extrapolations.get(_step_key(choice))
        if known is not None:
            return known
        # Gathered layers of a shared base are counted in ``_whole``.
        whole = self.recipe.with_memory({"shard": "off"})
        chosen = whole.with_memory({**choice, "embedding_on_cpu": False})
        # Offload and head_chunk do not change what an un-checkpointed layer needs.
        same_layers = {
            **choice,
            "checkpoint_offload": False,
            "head_chunk": self.recipe.memory.head_chunk,
        }
        others = {"on_device": {**choice, "checkpoint_offload": False}, "alike": same_layers}
        if choice["mlp_tile"] and self.recipe.memory.mlp_tile == "auto":
            head_chunk = self.recipe.memory.head_chunk
            others["untiled"] = {**choice, "mlp_tile": None, "head_chunk": head_chunk}
        found = LayerExtrapolation(
            chosen,
            self.config,
            self.triples,
            self.kind,
            self.planned,
            self._models,
            **{
                name: self.extrapolation(other)
                for name, other in others.items()
                if _step_key(other) != _step_key(choice)
            },
        )
        self._extrapolations[_step_key(choice)] = found
        return found

    def fastest_settings(self, budget: int | None, gpu: Gpu | None) -> dict[str, Any] | None:
        """Return the fastest settings that fit, or None. Time and memory are extrapolated."""
        fastest: dict[str, Any] | None = None
        fastest_time = math.inf
        for choice in self.choices():
            found = self.extrapolation(choice)
            if self._is_slower(choice, fastest_time, budget, gpu):
                continue
            kept = self._most_kept(choice, budget, gpu)
            if kept is None:
                continue
            time = found.seconds_per_token(self.layers, kept, gpu or GPUS[0])
            if time < fastest_time:
                fastest = choice | {"activation_checkpointing": self.layers - kept}
                fastest_time = time
            if kept == self.layers and not choice["mlp_tile"] and not choice["checkpoint_offload"]:
                break  # the largest forward pass without any setting that costs time
        return fastest

    def _most_kept(
        self, choice: Mapping[str, Any], budget: int | None, gpu: Gpu | None
    ) -> int | None:
        """Return the largest number of kept layers that fits; None if no number fits."""
        most = None
        for kept in self._amounts():
            if budget is None or self._needed(choice, kept, gpu) <= budget:
                most = kept
            elif most is not None:
                break  # more un-checkpointed layers need more memory
        return most

    def _is_slower(
        self, choice: Mapping[str, Any], fastest: float, budget: int | None, gpu: Gpu | None
    ) -> bool:
        """Return True if a choice cannot be faster than ``fastest`` seconds per token."""
        found, amounts = self.extrapolation(choice), self._amounts()
        untiled = found.untiled
        if math.isinf(fastest) or not untiled:
            return False
        fitting = [
            kept
            for kept in amounts
            if budget is None
            or self._in_step(choice, found.least_peak(untiled, kept), gpu) <= budget
        ]
        # The time is linear in ``kept``, so its smallest and largest value are enough.
        return all(
            found.least_seconds_per_token(untiled, self.layers, kept, gpu or GPUS[0]) >= fastest
            for kept in (amounts[0], max(fitting, default=amounts[0]))
        )

    def run(self, settings: Mapping[str, Any], budget: int | None, gpu: Gpu | None) -> MemoryPlan:
        """Measure a step of the whole model with memory settings ``settings``. Return the plan."""
        found = measure(
            self.recipe.with_memory(settings),
            self.config,
            self.triples,
            self.kind,
            self.planned,
            self._models,
        )
        return MemoryPlan(settings, budget, gpu, found, self.recipe.training.full_determinism)

    def plan(self, budget: int | None, gpu: Gpu | None) -> MemoryPlan:
        """Return the fastest plan within ``budget`` bytes. Its step is measured, not extrapolated.

        If no plan fits, return the plan that needs the least memory.
        """
        least_kept = min(self._amounts())
        smallest = self.smallest_settings() | {"activation_checkpointing": self.layers - least_kept}
        settings = self.fastest_settings(budget, gpu) or smallest
        plan = self.run(settings, budget, gpu)
        while not plan.fits and self.layers - settings["activation_checkpointing"] > least_kept:
            # The extrapolation was a little too low, because layers differ.
            checkpointed = settings["activation_checkpointing"] + 1
            settings = settings | {"activation_checkpointing": checkpointed}
            plan = self.run(settings, budget, gpu)
        if plan.fits or settings == smallest:
            return plan
        return self.run(smallest, budget, gpu)

    def row(self, gpu: Gpu) -> GpuRow:
        """Return a GPU's row: the fastest settings that fit. If none fit: :meth:`least_bytes`."""
        settings = self.fastest_settings(gpu.memory, gpu)
        if settings is None:
            return GpuRow(gpu, None, self.least_bytes(gpu), None)
        choice = dict(settings)
        kept = self.layers - choice.pop("activation_checkpointing")
        found = self.extrapolation(choice)
        pair_seconds = found.seconds_per_token(self.layers, kept, gpu) * found.tokens_per_pair
        return GpuRow(gpu, settings, self._needed(choice, kept, gpu), pair_seconds)

    def least_bytes(self, gpu: Gpu | None) -> int:
        """Return the bytes that a run needs with :meth:`smallest_settings`."""
        smallest, least_kept = self.smallest_settings(), min(self._amounts())
        if self.recipe.memory.shards == 1:
            return self._needed(smallest, least_kept, gpu)
        settings = smallest | {"activation_checkpointing": self.layers - least_kept}
        self._smallest = self._smallest or self.run(settings, None, gpu).measured
        deterministic = self.recipe.training.full_determinism
        return MemoryPlan(settings, None, gpu, self._smallest, deterministic).needed

    def _needed(self, choice: Mapping[str, Any], kept: int, gpu: Gpu | None) -> int:
        step = self.extrapolation(choice).peak(self.layers, kept)
        return max(self._in_step(choice, step, gpu), self._whole[2] + self._allowances(0, gpu))

    def _in_step(self, choice: Mapping[str, Any], step: int, gpu: Gpu | None) -> int:
        """Return all device bytes during a step. ``step``: bytes of the step's own tensors."""
        whole, embedding, _ = self._whole
        if choice["embedding_on_cpu"]:
            whole -= embedding
        return whole + step + self._allowances(step, gpu)

    def _allowances(self, step: int, gpu: Gpu | None) -> int:
        deterministic = self.recipe.training.full_determinism
        return sum(allowances(step, gpu, deterministic=deterministic).values())

    def changes(self, budget: int, gpu: Gpu | None) -> list[Change]:
        """Return recipe changes that save memory. ``Change.fits``: the change alone is enough."""
        recipe, memory = self.recipe, self.recipe.memory
        settings: dict[str, Any] = {
            f"memory.{name}": "auto" for name in PLANNED_SETTINGS if getattr(memory, name) != "auto"
        }
        for name in ("packing", "prompt_sharing", "fused_lora"):
            if not getattr(memory, name):
                settings[f"memory.{name}"] = True
        if memory.micro_batch_size is not None:
            settings["memory.micro_batch_size"] = 1
        rank = {"lora.r": 8} if recipe.lora.r > 8 else {}
        single: list[dict[str, Any]] = []
        if settings:
            single.append(settings)
        if not recipe.quantization.load_in_4bit:
            single.append({"quantization.load_in_4bit": True})
        if recipe.training.optim != "paged_adamw_8bit":
            single.append({"training.optim": "paged_adamw_8bit"})
        if rank:
            single.append(rank)
        found = [self._change(keys, budget, gpu) for keys in single]
        longest = int(self.triples[:, 1:].max())
        for shorter in (longest // 2, longest // 4, longest // 8):
            limits = {"data.max_length": shorter}
            if recipe.data.prompt_limit > shorter // 2 and recipe.data.max_prompt_length != "auto":
                limits["data.max_prompt_length"] = shorter // 2
            found.append(self._change(limits, budget, gpu))
            if not any(change.fits for change in found) and rank:
                found.append(self._change(limits | rank, budget, gpu))
            if found[-1].fits or shorter < SHORTEST:
                break
        unchanged = self.least_bytes(gpu)
        return [change for change in found if change.needed < unchanged]

    def _change(self, keys: Mapping[str, Any], budget: int, gpu: Gpu | None) -> Change:
        limit = keys.get("data.max_length")
        triples = self.triples if limit is None else np.minimum(self.triples, limit)
        planner = Planner(self.recipe.override(dict(keys)), self.config, triples, self.kind)
        needed = planner.least_bytes(gpu)
        return Change(keys, needed, needed <= budget)


def _step_key(choice: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values of a choice, except for ``embedding_on_cpu``, as a dictionary key."""
    return tuple(value for name, value in sorted(choice.items()) if name != "embedding_on_cpu")
