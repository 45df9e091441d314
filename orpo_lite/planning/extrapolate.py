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

    It measures steps of two to four layers. The peak of memory is where a checkpointed layer runs
    again, or at the start of the backward pass, where all that layers keep is held. Both grow by a
    fixed number of bytes per layer. ``kept`` is the number of layers that are not checkpointed. A
    layer that is not checkpointed adds the same with and without offload.
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
        alike: "LayerExtrapolation | None" = None,
        untiled: "LayerExtrapolation | None" = None,
    ) -> None:
        """Keep what is needed to measure. Each step is measured at its first use.

        Args:
            recipe: with the memory settings of the choice.
            config: transformers' configuration of the base.
            triples: lengths of the pairs.
            kind: kind of the device to plan for.
            planned: how pairs go through the model.
            models: models of earlier steps of the recipe.
            on_device: the same choice without offload, if this one has it.
            alike: a choice whose un-checkpointed layers are the same; None: this one.
            untiled: the same choice without tiles and without fewer rows of logits, if this one
                has tiles.
        """
        models = models or MetaModels()

        def small(layers: int, kept: int) -> StepMemory:
            chosen = recipe.with_memory({"activation_checkpointing": layers - kept})
            return measure(chosen, with_layers(config, layers), triples, kind, planned, models)

        self._small, self._on_device, self._alike = small, on_device, alike
        self.untiled = untiled
        # Offload holds an input until its copy is done, two layers later. Only then do all layers
        # add the same.
        self._few = 3 if recipe.memory.checkpoint_offload is True else 2

    @cached_property
    def _two(self) -> StepMemory:
        """The step with ``_few`` checkpointed layers."""
        return self._small(self._few, 0)

    @cached_property
    def _three(self) -> StepMemory:
        """The same with one more."""
        return self._small(self._few + 1, 0)

    @property
    def checkpoint(self) -> int:
        """Bytes that a checkpointed layer adds to the peak."""
        return self._three.peak - self._two.peak

    @cached_property
    def _kept(self) -> StepMemory:
        """The step with ``_few - 1`` checkpointed layers and two others."""
        return self._small(self._few + 1, 2)

    @cached_property
    def _layer(self) -> tuple[int, dict[tuple[int, int], int]]:
        """The bytes and the operators that an un-checkpointed layer adds."""
        if self._alike:
            return self._alike._layer
        fewer, more = self._small(self._few, 1), self._kept
        return more.peak - fewer.peak, _added(fewer.work, more.work)

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
        return self._layer[0]

    def peak(self, layers: int, kept: int) -> int:
        """Return the bytes of a step in addition to those that are always held."""
        recomputing = self._two.peak + (layers - kept - self._few) * self.checkpoint
        if not kept:
            return recomputing
        if kept == layers:
            return self._all_kept.peak + (layers - 3) * self.layer
        checkpointed = layers - kept - self._few + 1
        backward = self._kept.peak + (kept - 2) * self.layer + checkpointed * self.checkpoint
        return max(recomputing, backward)

    def work(self, layers: int, kept: int) -> Counter[tuple[int, int]]:
        """Return the operators of such a step."""
        total = Counter(self._two.work)
        parts = [(_added(self._two.work, self._three.work), layers - kept - self._few)]
        if kept:
            parts.append((self._layer[1], kept))
        for added, times in parts:
            for key, count in added.items():
                total[key] += times * count
        return total

    @property
    def tokens_per_pair(self) -> float:
        """Tokens per pair in the planned forward pass."""
        return self._two.tokens / self._two.pairs

    def seconds_per_token(self, layers: int, kept: int, gpu: Gpu) -> float:
        """Return an estimate, from the GPU's data sheet. It is linear in ``kept``."""
        sent_by_layer = self._three.sent - self._two.sent
        sent = self._two.sent + (layers - kept - self._few) * sent_by_layer
        return seconds(self.work(layers, kept), sent, gpu) / self._two.tokens

    def least_peak(self, untiled: "LayerExtrapolation", kept: int) -> int:
        """Return bytes that :meth:`peak` reaches at least, from fewer steps.

        One layer, the first, may keep nothing.
        """
        on_device, plain = self._on_device or self, untiled._on_device or untiled
        return max(0, on_device._kept.peak - plain.checkpoint + (kept - 3) * self.layer)

    def least_seconds_per_token(
        self, untiled: "LayerExtrapolation", layers: int, kept: int, gpu: Gpu
    ) -> float:
        """Return seconds that :meth:`seconds_per_token` reaches at least, from fewer steps.

        Tiles only add work: a checkpointed layer takes at least as long as one without tiles.
        """
        plain = untiled._on_device or untiled
        without = untiled.seconds_per_token(layers, 0, gpu)
        work = Counter(self._layer[1])
        work.subtract(_added(plain._two.work, plain._three.work))
        return without + kept * seconds(work, 0, gpu) / plain._two.tokens


def _added(
    before: Counter[tuple[int, int]], after: Counter[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """Return by how much each count grew. It may have become less."""
    return {key: after[key] - before[key] for key in before.keys() | after.keys()}
