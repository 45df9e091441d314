"""What a choice of levers needs, and how long it takes, for any number of layers: from steps of a few of them."""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from orpo_lite.planning.gpus import Gpu
from orpo_lite.planning.measure import MetaModels, StepMemory, measure
from orpo_lite.planning.on_meta import Triples
from orpo_lite.planning.route import PlannedRoute, with_layers
from orpo_lite.recipe.schema import Recipe

PCIE = 25e9  # bytes a second that version 4 carries over 16 lanes
REACHED = 0.6  # of what a card's data sheet promises, for the estimate of time


def seconds(work: Mapping[tuple[int, int], int], sent: int, gpu: Gpu) -> float:
    """Each operator takes as long as its FLOPs or its bytes do, whichever is more (the roofline model).

    What goes to host memory and back is added as if nothing were computed meanwhile.
    """
    bounds = (count * max(f / gpu.flops, b / gpu.bandwidth) for (f, b), count in work.items())
    return sum(bounds) / REACHED + 2 * sent / PCIE


class LayerExtrapolation:
    """What a choice of levers needs with ``kept`` layers un-checkpointed, from steps of two to five layers.

    A step is largest where a checkpointed layer runs again, or where the backward pass begins and all is held that the
    layers have kept. Either grows by so much a layer.
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
        # Offload holds an input until its copy is done, two layers later: only then do all layers add the same.
        self._few = few = 3 if recipe.memory.checkpoint_offload is True else 2
        self._two, self._three = small(few, 0), small(few + 1, 0)
        self.checkpoint = self._three.peak - self._two.peak
        """Bytes that a checkpointed layer adds to the peak."""

    @cached_property
    def _kept(self) -> tuple[StepMemory, StepMemory]:
        return self._small(self._few + 1, 2), self._small(self._few + 2, 3)

    @cached_property
    def _all_kept(self) -> StepMemory:
        """Where the first layer too keeps all: its input, the embedding, needs no gradient, and it keeps less.

        Nothing goes to host memory then, so the step is that of ``on_device``, the same choice without offload.
        """
        return self._on_device._all_kept if self._on_device else self._small(3, 3)

    @property
    def layer(self) -> int:
        """Bytes that an un-checkpointed layer adds."""
        fewer, more = self._kept
        return more.peak - fewer.peak

    def peak(self, layers: int, kept: int) -> int:
        """Bytes of a step besides what is held."""
        recomputing = self._two.peak + (layers - kept - self._few) * self.checkpoint
        if not kept:
            return recomputing
        if kept == layers:
            return self._all_kept.peak + (layers - 3) * self.layer
        fewer, _ = self._kept
        return max(
            recomputing,
            fewer.peak
            + (kept - 2) * self.layer
            + (layers - kept - self._few + 1) * self.checkpoint,
        )

    def work(self, layers: int, kept: int) -> Counter[tuple[int, int]]:
        """The operators of such a step."""
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
        """Of the forward pass that was planned."""
        return self._two.tokens / self._two.pairs

    def seconds_per_token(self, layers: int, kept: int, gpu: Gpu) -> float:
        """An estimate, from the card's data sheet."""
        a_layer = self._three.sent - self._two.sent
        sent = self._two.sent + (layers - kept - self._few) * a_layer
        return seconds(self.work(layers, kept), sent, gpu) / self._two.tokens
