"""A causal language model that takes pairs and returns their log-probabilities or rewards."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Self

import bitsandbytes as bnb
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lite.base.adapter import SEQ_CLS
from orpo_lite.data.packing import Batch, Batching, PackedPairs
from orpo_lite.model.score_head import SCORE, output_head_names
from orpo_lite.ops.attention import NAME, UnsupportedError, pair_attention
from orpo_lite.ops.head import Head, chunk_rows, packed_logps, padded_logps, pick, row_logps
from orpo_lite.ops.outputs import PairScores, at_least_float32, pair_rewards
from orpo_lite.ops.segments import Layout, Segment, use_layout
from orpo_lite.recipe.schema import MemorySection, Recipe

AttentionInterface.register(NAME, pair_attention)

# Errors that a model's own code raises if it does not support packed rows or meta tensors.
MODEL_CODE_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    IndexError,
    KeyError,
    UnsupportedError,
)

Route = Literal["shared", "packed", "rows", "logits"]
"""How packed pairs go through the model, from the fastest route to the simplest.

shared: all pairs are in one row, which contains the common prefix of a pair once. packed: all pairs
are in one row, which contains each sequence completely. rows: each sequence goes through the model
alone, with the model's own attention. logits: like rows, and the model computes the logits itself.
"""
ROUTES: tuple[Route, ...] = ("shared", "packed", "rows", "logits")
POLICY, VALUE = "default", "ppo_value"  # peft's names of the adapters that PPO trains
ROUTE_NOTES: dict[Route, str] = {
    "packed": "prompts are not shared",
    "rows": "pairs are neither packed nor shared: each sequence goes through the model alone",
    "logits": "each sequence goes through the model alone, with all its logits in memory",
}


class PairModel(nn.Module):
    """A causal language model that takes pairs and returns their log-probabilities.

    With a score head (:mod:`orpo_lite.model.score_head`) it is a reward model and returns rewards.
    """

    def __init__(self, model: nn.Module, memory: MemorySection | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = self.causal.config
        self.head = find_head(self.causal)
        memory = memory or MemorySection()
        self.chunk = None
        if memory.head_chunk != "none":
            self.chunk = chunk_rows(
                self.config.get_text_config().vocab_size, _number(memory.head_chunk)
            )
        self.route: Route = "shared" if memory.prompt_sharing else "packed"
        """The route of packed pairs. ``model.probe`` sets a simpler one if this model needs it."""
        self.backend = "auto"
        """The attention back-end of packed rows: see :class:`orpo_lite.ops.segments.Layout`."""
        self.target_kind: str | None = None
        """The device kind for which a plan is made, if the model is on meta; else None."""
        self.notes: list[str] = []
        """Notes for the user on how this model is loaded and trained, one line each."""
        # Without the layers of an image encoder: no pair goes through them.
        decoder = self.causal.get_decoder()
        self.layers = [
            module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)
        ]
        """The decoder layers that can be checkpointed."""
        adapters = getattr(model, "peft_config", {})
        self.returns_rewards = self.score_head is not None
        """True for a reward model. With PPO, a language model has a score head too."""
        if adapters:
            self.returns_rewards = adapters["default"].task_type == SEQ_CLS
        self.checkpointed = 0
        """Number of decoder layers, counted from the first one, that keep only their input."""
        if getattr(self.config.get_text_config(), "output_router_logits", False):
            self.notes.append(
                "the auxiliary loss of the model's routers (output_router_logits) is not added: "
                "the loss has only the terms of loss.type"
            )
        self.own_attention = self.config._attn_implementation

    @property
    def causal(self) -> Any:
        """The causal language model of transformers, without peft's wrapper."""
        wrapped: Any = self.model
        return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped

    @property
    def backbone(self) -> Any:
        """The model without its head. It returns the hidden states after the last norm."""
        causal = self.causal
        if causal.base_model is causal:  # some models lack the attribute base_model_prefix names
            return causal.model
        return causal.base_model

    @property
    def has_value_model(self) -> bool:
        """True if PPO trains a value model (:mod:`orpo_lite.model.ppo_adapters`)."""
        return VALUE in getattr(self.model, "peft_config", {})

    @property
    def score_head(self) -> Any:
        """The score head of a reward model; None for a language model."""
        return getattr(self.causal, SCORE, None)

    def drop_output_head(self) -> None:
        """Free the output head of a reward model, unless it is tied to the embedding.

        The head is needed until the probe has chosen the route.
        """
        if self.returns_rewards and output_head_names(self.causal):
            self.causal.set_output_embeddings(None)
            self.head = replace(self.head, module=None)

    def forward(self, batch: Batch) -> PairScores:
        """Return the log-probabilities of the batch's pairs, or their rewards, from one pass."""
        if self.returns_rewards:
            return pair_rewards(self.rewards(batch))
        if isinstance(batch, PackedPairs):
            return packed_logps(self.score(batch, self.route), batch.spans)
        output = self.model(
            input_ids=batch.input_ids_RT, attention_mask=batch.attention_RT, use_cache=False
        )
        return padded_logps(
            output.logits,
            batch.input_ids_RT,
            batch.response_RT,
            batch.counted_RT,
            pairs=batch.facts_4P.shape[1],
        )

    def rewards(self, batch: Batch) -> Tensor:
        """Return the rewards of P pairs, shape (2, P), at least float32.

        The score head reads the hidden states of the responses' last tokens.
        """
        if isinstance(batch, PackedPairs):
            last_2PD = self._hidden(batch, self.route)[batch.last_2P]
            rewards_2P = self._reward(last_2PD)
            return rewards_2P.masked_fill(batch.last_2P < 0, math.nan)
        output = self.backbone(
            input_ids=batch.input_ids_RT, attention_mask=batch.attention_RT, use_cache=False
        )
        last_R = batch.attention_RT.sum(1) - 1
        last_RD = output.last_hidden_state[torch.arange(len(last_R), device=last_R.device), last_R]
        rewards_RP = self._reward(last_RD).view(-1, batch.facts_4P.shape[1])
        if len(rewards_RP) == 2:
            return rewards_RP
        return torch.cat([rewards_RP, torch.full_like(rewards_RP, math.nan)])

    def _reward(self, hidden: Tensor) -> Tensor:
        """Return the rewards of hidden states; shape (..., D) -> (...)."""
        rewards: Tensor = self.score_head(hidden.to(self.score_head.weight.dtype)).squeeze(-1)
        return rewards

    def score(self, batch: PackedPairs, route: Route, temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities of the tokens in ``batch.targets_N``, shape (N,).

        ``temperature`` divides the logits, as in sampling.
        """
        if route == "logits" or self.chunk is None:
            logits_NV = at_least_float32(self.row_logits(batch, route))
            if temperature != 1:
                logits_NV = logits_NV / temperature
            return pick(logits_NV, batch.targets_N)
        head = self.head.at_temperature(temperature)
        return row_logps(
            self._hidden(batch, route), batch.rows_N, batch.targets_N, head, self.chunk
        )

    def row_logits(self, batch: PackedPairs, route: Route) -> Tensor:
        """Return the logits that predict the batch's targets, shape (N, V).

        All logits are in memory at once.
        """
        if route == "logits":
            outputs = self._each_row(self.model, batch)
            return torch.cat([output.logits[0] for output in outputs])[batch.rows_N]
        return self.head.logits(self._hidden(batch, route)[batch.rows_N])

    def _hidden(self, batch: PackedPairs, route: Route) -> Tensor:
        """Return the hidden states after the last norm, shape (T, D)."""
        if route in ("shared", "packed"):
            return self._packed_hidden(batch)
        return torch.cat(
            [output.last_hidden_state[0] for output in self._each_row(self.backbone, batch)]
        )

    @staticmethod
    def _each_row(run: Any, batch: PackedPairs) -> Iterator[Any]:
        """Yield the output of ``run`` for each sequence alone, with the model's own attention."""
        for start, stop, *_ in batch.segments:
            yield run(input_ids=batch.input_ids_T[start:stop].unsqueeze(0), use_cache=False)

    def _packed_hidden(self, batch: PackedPairs) -> Tensor:
        """Return the hidden states after the last norm, shape (T, D).

        All segments are in one row, each with its own positions.
        """
        segments = tuple(Segment(*numbers) for numbers in batch.segments)
        layout = Layout(segments, self.backend, self.target_kind)
        ids, positions = batch.input_ids_T.unsqueeze(0), batch.position_ids_T.unsqueeze(0)
        with self.use_layout(layout):
            output = self.backbone(input_ids=ids, position_ids=positions, use_cache=False)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    @contextmanager
    def use_layout(self, layout: Layout | None) -> Iterator[None]:
        """Use this package's attention for ``layout`` inside the ``with`` block.

        If ``layout`` is None, use the model's own attention.
        """
        before = self.config._attn_implementation
        self.config._attn_implementation = NAME if layout else self.own_attention
        try:
            with use_layout(layout):
                yield
        finally:
            self.config._attn_implementation = before

    def fall_back(self, route: Route, reason: str) -> None:
        """Use ``route``, a later route in ROUTES, from now on. Add the reason to ``notes``."""
        self.notes.append(f"{ROUTE_NOTES[route]}, because {reason}")
        self.route = route

    def batching(self, recipe: Recipe, pad_id: int) -> Batching:
        """Return the rules for dividing pairs into batches, from the recipe and the route."""
        return Batching(
            packed=recipe.memory.packing,
            share=recipe.memory.packing and self.route == "shared",
            tokens=recipe.micro_batch_tokens,
            pairs=recipe.memory.micro_batch_size,
            pad_id=pad_id,
            completion_only_loss=recipe.loss.counts_only_completion,
        )

    @property
    def device(self) -> torch.device:
        """The device to which a batch must be moved."""
        layer: Any = self.score_head if self.returns_rewards else self.head.module
        return layer.weight.device  # type: ignore[no-any-return]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) of each trained parameter. All belong to adapters."""
        named = self.model.named_parameters()
        if not self.has_value_model:
            return [(name, parameter) for name, parameter in named if parameter.requires_grad]
        adapters = {POLICY, VALUE}
        return [(name, parameter) for name, parameter in named if adapters & {*name.split(".")}]

    @contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """Use the adapter with this peft name inside the ``with`` block.

        A gradient must be computed in the same block as its loss, because checkpointed layers run
        again.
        """
        wrapped: Any = self.model
        before = wrapped.active_adapter
        wrapped.set_adapter(adapter)
        try:
            yield
        finally:
            wrapped.set_adapter(before)

    def values(self, batch: PackedPairs) -> Tensor:
        """Return the score head's output at each position in ``batch.rows_N``, shape (N,)."""
        return self._reward(self._hidden(batch, self.route)[batch.rows_N])

    def train(self, mode: bool = True) -> Self:
        """Switch the adapter to training mode, or to evaluation mode if ``mode`` is False.

        The base stays in evaluation mode. Training mode could switch on its dropout, skipped
        layers, router jitter or random experts. In a frozen base, these would only add noise.

        Two kinds of modules of the base are exceptions:

        - Checkpointed layers get the adapter's mode. Their submodules do not.
        - Linear4bit modules are always in training mode. In evaluation mode, bitsandbytes 0.50 may
          repack their weights on CPUs with AVX512-BF16. After that, their input gets no gradient.
        """
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, BaseTunerLayer):
                module.training = mode
                for name, child in module.named_children():
                    if name != "base_layer":
                        child.train(mode)
            elif isinstance(module, bnb.nn.Linear4bit):
                module.training = True
            elif isinstance(module, GradientCheckpointingLayer):
                # transformers checkpoints a layer only in training mode.
                module.training = mode and module.gradient_checkpointing
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch off gradients and the adapter's dropout inside the ``with`` block."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Switch the adapter off inside the ``with`` block, so that the model is equal to its base.

        A model without an adapter does not change.
        """
        wrapped: Any = self.model
        if not hasattr(wrapped, "disable_adapter"):
            yield
            return
        with wrapped.disable_adapter():
            yield

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Switch off the adapter's dropout inside the ``with`` block. Gradients stay on."""
        noisy = [
            module
            for module in self.modules()
            if isinstance(module, nn.Dropout) and module.training
        ]
        for module in noisy:
            module.eval()
        try:
            yield
        finally:
            for module in noisy:
                module.train()


def find_head(causal: Any) -> Head:
    """Return the model's output layer, with the scale and softcap of its logits.

    The scale and the softcap are read from the configuration. If a model also changes its logits in
    a different way, the head lacks this change. ``model.probe`` detects such models.
    """
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if not scale:
        scale = 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(causal.get_output_embeddings(), float(scale), softcap)


def _number(value: str | int) -> int | None:
    return None if isinstance(value, str) else value
