"""Extrapolate memory and time of a step to any number of layers, from steps of a few layers."""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from orpo_lite.planning.gpus import Gpu
from orpo_lite.planning.measure import MetaModels, StepMemory, measure
from orpo_lite.planning.on_meta import Triples
from orpo_lite.planning.route import PlannedRoute, with_layers
from orpo_lite.recipe.schema import Recipe

PCIE = 25e9  # bytes per second of version 4 over 16 lanes
REACHED = 0.6  # share of a GPU's data sheet speed that the estimate of time assumes


def seconds(work: Mapping[tuple[int, int], int], sent: int, gpu: Gpu) -> float:
    """Return the estimated seconds of operators (the roofline model).

    Each operator takes as long as its FLOPs or its bytes do, whichever is more. Copies to host
    memory and back are added as if nothing were computed meanwhile.
    """
    bounds = (count * max(f / gpu.flops, b / gpu.bandwidth) for (f, b), count in work.items())
    return sum(bounds) / REACHED + 2 * sent / PCIE


class LayerExtrapolation:
    """The memory and time of a step with any number of layers, for one choice of memory settings.

    It measures steps of two to five layers. The peak of memory is where a checkpointed layer runs
    again, or at the start of the backward pass, where all that layers keep is held. Both grow by a
    fixed number of bytes per layer. ``kept`` is the number of layers that are not checkpointed.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: Any,
        triples: Triples,
        kind: str,
        planned: PlannedRoute,
        models: MetaModels | None = None,
        on_device: "LayerExtrapolation | None" = None,
    ) -> None:
        models = models or MetaModels()

        def small(layers: int, kept: int) -> StepMemory:
            chosen = recipe.with_memory({"activation_checkpointing": layers - kept})
            return measure(chosen, with_layers(config, layers), triples, kind, planned, models)

        self._small, self._on_device = small, on_device
        # With offload an input is on the device until its copy is done, two layers later. So only
        # from the third layer on do all layers add the same.
        self._few = few = 3 if recipe.memory.checkpoint_offload is True else 2
        self._two, self._three = small(few, 0), small(few + 1, 0)
        self.checkpoint = self._three.peak - self._two.peak
        """Bytes that a checkpointed layer adds to the peak."""

    @cached_property
    def _kept(self) -> tuple[StepMemory, StepMemory]:
        return self._small(self._few + 1, 2), self._small(self._few + 2, 3)

    @cached_property
    def _all_kept(self) -> StepMemory:
        """The step of a model in which no layer is checkpointed.

        It is measured separately, because the first layer keeps less than the others: its input,
        the embedding, needs no gradient. Nothing is offloaded in this step, so ``on_device``, the
        same settings without offload, has the same one.
        """
        return self._on_device._all_kept if self._on_device else self._small(3, 3)

    @property
    def layer(self) -> int:
        """Bytes that an un-checkpointed layer adds."""
        fewer, more = self._kept
        return more.peak - fewer.peak

    def peak(self, layers: int, kept: int) -> int:
        """Return the bytes of a step in addition to those that are always held."""
        recomputing = self._two.peak + (layers - kept - self._few) * self.checkpoint
        if not kept:
            return recomputing
        if kept == layers:
            return self._all_kept.peak + (layers - 3) * self.layer
        fewer, _ = self._kept
        checkpointed = layers - kept - self._few + 1
        backward = fewer.peak + (kept - 2) * self.layer + checkpointed * self.checkpoint
        return max(recomputing, backward)

    def work(self, layers: int, kept: int) -> Counter[tuple[int, int]]:
        """Return the operators of such a step."""
        total = Counter(self._two.work)
        parts = [(self._two.work, self._three.work, layers - kept - self._few)]
        if kept:
            fewer, more = self._kept
            parts.append((fewer.work, more.work, kept))
        for before, after, times in parts:
            for key in before.keys() | after.keys():
                total[key] += times * (after[key] - before[key])
        return total

    @property
    def tokens_per_pair(self) -> float:
        """Tokens per pair in the planned forward pass."""
        return self._two.tokens / self._two.pairs

    def seconds_per_token(self, layers: int, kept: int, gpu: Gpu) -> float:
        """Return an estimate, from the GPU's data sheet."""
        sent_by_layer = self._three.sent - self._two.sent
        sent = self._two.sent + (layers - kept - self._few) * sent_by_layer
        return seconds(self.work(layers, kept), sent, gpu) / self._two.tokens
