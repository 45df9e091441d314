"""Predict the memory and time of a step of a model.

Steps of models with few layers are measured, and extrapolated to the model's number of layers.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from orpo_lite.planning.gpus import Gpu
from orpo_lite.planning.measure import MetaModels, StepMemory, measure
from orpo_lite.planning.on_meta import Triples
from orpo_lite.planning.route import PlannedRoute, with_layers
from orpo_lite.recipe.schema import Recipe

PCIE = 25e9  # bytes per second of PCIe 4.0 with 16 lanes
REACHED = 0.6  # share of the data sheet's speed that a GPU is assumed to reach


def seconds(work: Mapping[tuple[int, int], int], sent: int, gpu: Gpu) -> float:
    """Return the estimated seconds of a step by the roofline model.

    An operator takes the time of its FLOPs or the time of its memory traffic, whichever is longer.
    Copies to host memory and back are assumed not to overlap with operators, so their time is
    added. A GPU is assumed to reach 60% of the speeds in its data sheet.

    Args:
        work: (FLOPs, bytes moved) of an operator -> number of such operators.
        sent: bytes that are copied to host memory and later copied back.
        gpu: the GPU, with the speeds in its data sheet.
    """
    bounds = (count * max(f / gpu.flops, b / gpu.bandwidth) for (f, b), count in work.items())
    return sum(bounds) / REACHED + 2 * sent / PCIE


class LayerExtrapolation:
    """Predicts the memory and time of a step for any number of layers. Memory settings are fixed.

    Steps of models with two to four layers are measured. Memory has its peak at one of two moments:

    - the start of the backward pass, when everything that the layers keep is in memory
    - later in the backward pass, when a checkpointed layer is recomputed

    At both moments, each further layer adds a fixed number of bytes. A layer that is not
    checkpointed adds the same number of bytes with and without offload.

    In the methods, ``layers`` is the number of layers of the model. ``kept`` is the number of these
    layers that are not checkpointed.
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
        """Store the arguments. A step is measured later, when a result first needs it.

        Args:
            recipe: the recipe with the chosen memory settings.
            config: transformers' configuration of the base.
            triples: the token counts of the pairs: see :data:`orpo_lite.planning.on_meta.Triples`.
            kind: the kind of device to plan for: see :func:`orpo_lite.ops.devices.device_kind`.
            planned: the route of pairs through the model.
            models: the cache of models from earlier measurements of the recipe; None for a new one.
            on_device: the extrapolation for the same settings without offload; None if these
                settings have no offload.
            alike: an extrapolation for other settings, with which an un-checkpointed layer needs
                the same bytes and operators. Its measurement of this layer is used. None: this
                extrapolation measures the layer.
            untiled: the extrapolation for the same settings without MLP tiles and with the recipe's
                ``head_chunk``; None if these settings have no MLP tiles.
        """
        models = models or MetaModels()

        def small(layers: int, kept: int) -> StepMemory:
            chosen = recipe.with_memory({"activation_checkpointing": layers - kept})
            return measure(chosen, with_layers(config, layers), triples, kind, planned, models)

        self._small, self._on_device, self._alike = small, on_device, alike
        self.untiled = untiled
        # With offload, the input of a layer stays on the device until its copy is done, two layers
        # later. So each layer adds the same only after the first three.
        self._few = 3 if recipe.memory.checkpoint_offload is True else 2

    @cached_property
    def _two(self) -> StepMemory:
        """The step of a model with ``_few`` layers, all checkpointed."""
        return self._small(self._few, 0)

    @cached_property
    def _three(self) -> StepMemory:
        """The step of a model with ``_few + 1`` layers, all checkpointed."""
        return self._small(self._few + 1, 0)

    @property
    def checkpoint(self) -> int:
        """Bytes that a checkpointed layer adds to the peak."""
        return self._three.peak - self._two.peak

    @cached_property
    def _kept(self) -> StepMemory:
        """The step of a model with ``_few + 1`` layers, two of them not checkpointed."""
        return self._small(self._few + 1, 2)

    @cached_property
    def _layer(self) -> tuple[int, dict[tuple[int, int], int]]:
        """The bytes and the operators that each kept (un-checkpointed) layer adds."""
        if self._alike:
            return self._alike._layer
        fewer, more = self._small(self._few, 1), self._kept
        return more.peak - fewer.peak, _added(fewer.work, more.work)

    @cached_property
    def _all_kept(self) -> StepMemory:
        """The step of a model with three layers, none of them checkpointed.

        It is measured separately, because the first layer keeps less than the others: the input of
        the first layer is the embedding, which needs no gradient. Without checkpoints nothing is
        offloaded. Therefore ``on_device``, the same settings without offload, has the same step.
        """
        return self._on_device._all_kept if self._on_device else self._small(3, 3)

    @property
    def layer(self) -> int:
        """Bytes that an un-checkpointed layer adds to the peak."""
        return self._layer[0]

    def peak(self, layers: int, kept: int) -> int:
        """Return the peak bytes of a step, without tensors that stay on the device in all steps."""
        recomputing = self._two.peak + (layers - kept - self._few) * self.checkpoint
        if not kept:
            return recomputing
        if kept == layers:
            return self._all_kept.peak + (layers - 3) * self.layer
        checkpointed = layers - kept - self._few + 1
        backward = self._kept.peak + (kept - 2) * self.layer + checkpointed * self.checkpoint
        return max(recomputing, backward)

    def work(self, layers: int, kept: int) -> Counter[tuple[int, int]]:
        """Return how often a step runs each kind of operator: (FLOPs, bytes moved) -> count."""
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
        """Tokens of the measured forward pass, divided by its number of pairs."""
        return self._two.tokens / self._two.pairs

    def seconds_per_token(self, layers: int, kept: int, gpu: Gpu) -> float:
        """Return the estimated seconds per token of a step.

        The result is linear in ``kept``, the number of layers that are not checkpointed.
        """
        sent_by_layer = self._three.sent - self._two.sent
        sent = self._two.sent + (layers - kept - self._few) * sent_by_layer
        return seconds(self.work(layers, kept), sent, gpu) / self._two.tokens

    def least_peak(self, untiled: "LayerExtrapolation", kept: int) -> int:
        """Return a lower bound of :meth:`peak`. Fewer steps are measured than for the peak.

        The bound counts the bytes of ``kept - 1`` un-checkpointed layers, because the first layer
        of a model needs fewer bytes. ``untiled`` has the same settings without MLP tiles.
        """
        on_device, plain = self._on_device or self, untiled._on_device or untiled
        return max(0, on_device._kept.peak - plain.checkpoint + (kept - 3) * self.layer)

    def least_seconds_per_token(
        self, untiled: "LayerExtrapolation", layers: int, kept: int, gpu: Gpu
    ) -> float:
        """Return a lower bound of :meth:`seconds_per_token`. The bound needs fewer measured steps.

        ``untiled`` is the extrapolation without MLP tiles. The bound uses the time that a
        checkpointed layer takes without tiles. With tiles the layer is never faster, because tiles
        only add work.
        """
        plain = untiled._on_device or untiled
        without = untiled.seconds_per_token(layers, 0, gpu)
        work = Counter(self._layer[1])
        work.subtract(_added(plain._two.work, plain._three.work))
        return without + kept * seconds(work, 0, gpu) / plain._two.tokens


def _added(
    before: Counter[tuple[int, int]], after: Counter[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """Return the change of each count from ``before`` to ``after``. It may be negative."""
    return {key: after[key] - before[key] for key in before.keys() | after.keys()}
