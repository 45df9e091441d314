"""Attention over packed pairs: each segment of a row sees its prefix and itself, causally, and nothing else.

A pair that shares its prompt is two segments: ``[prefix chosen]``, and ``[rejected]`` with that prefix before it. The
rejected tokens attend bottom-right causally, as if they stood right behind the prefix. :func:`pair_attention` has the
signature of transformers' ``AttentionInterface``; which segments a row has is said by :func:`using`, not by the model,
for not every model passes keywords down to its attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from orpo_lite.ops.devices import device_kind
from orpo_lite.ops.meta_attention import meta_flash_attention

NAME = "orpo_lite_pairs"  # in transformers' AttentionInterface
BLOCK = 256  # queries whose scores are held at once where a back-end needs a mask


class Segment(NamedTuple):
    """Queries ``start:stop`` of a row, which attend to the keys ``prefix_start:prefix_stop`` and then to their own."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def before(self) -> int:
        """Tokens of the prefix."""
        return self.prefix_stop - self.prefix_start


class UnsupportedError(Exception):
    """What a model asks of its attention and this one does not do; its pairs go unshared, one sequence a row."""


@dataclass(frozen=True)
class Layout:
    """The segments of a row, and the back-end that attends to them."""

    segments: tuple[Segment, ...]
    backend: str = "auto"
    """auto, or one of BACKENDS: flash_cpu, varlen, flash_attn, efficient, sdpa, maths."""
    meant: str | None = None
    """On meta: the kind of device that is meant (:func:`device_kind`)."""


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def using(layout: Layout | None) -> Iterator[None]:
    """Attend as ``layout`` says while this lasts."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current_layout() -> Layout | None:
    """The layout in use; a checkpointed layer takes it along to its second run, which may be on another thread."""
    return _current.get()


# What models hand on to their attention and it does not depend on: positions are in the queries already.
HARMLESS = (
    "position_ids position_embeddings cache_position is_causal past_key_values past_key_value use_cache return_dict "
    "output_attentions output_hidden_states output_router_logits logits_to_keep layer_idx num_items_in_batch"
).split()


def pair_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, as transformers' models call it.

    Args:
        query: shape (1, H, T, E).
        key: shape (1, K, T, E), K dividing H (grouped queries).
        value: shape (1, K, T, E'), E' mostly E.
        attention_mask: None; a model that brings a mask wants something else than segments.
        scaling: of the scores; default ``E ** -0.5``.
        dropout: 0, for the prompt's would be the same for both replies.
        sliding_window: tokens that a query sees, itself among them.
        softcap: Gemma 2's ``cap * tanh(scores / cap)``.
        asked: anything else that the model asks of its attention; what is not known to be harmless is refused.

    Returns:
        Shape (1, T, H, E'), and None for the weights, which are never held.

    Raises:
        UnsupportedError: for a mask, dropout, sinks, a position bias, sparse attention's indices and the like.
    """
    layout = _current.get()
    wanted = [name for name, value in asked.items() if value is not None and name not in HARMLESS]
    wanted += ["attention dropout"] * bool(dropout) + ["a mask"] * (attention_mask is not None)
    wanted += ["attention outside of a packed row"] * (layout is None or query.shape[0] != 1)
    if wanted or layout is None:
        raise UnsupportedError(f"the model asks its attention for {', '.join(wanted)}")
    shape = Shape(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    name = (
        layout.backend
        if layout.backend != "auto"
        else choose_backend(query, value, softcap, layout.meant)
    )
    return BACKENDS[name](query, key, value, layout.segments, shape).transpose(1, 2), None


class Shape(NamedTuple):
    """What a layer's attention looks like, besides its segments."""

    scale: float
    window: int | None
    softcap: float | None

    @property
    def window_size(self) -> tuple[int, int]:
        """As FlashAttention counts it: tokens to the left, besides the query's own, and to the right."""
        return (-1 if self.window is None else self.window - 1, 0)


def choose_backend(
    query: Tensor, value: Tensor, softcap: float | None, meant: str | None = None
) -> str:
    """The fastest back-end that can do this: device, dtype, softcap and the size of a head decide."""
    kind = meant or device_kind(query.device)
    square = query.shape[-1] == value.shape[-1]
    if kind == "cpu":
        return "flash_cpu" if softcap is None and square else "maths"
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and kind == "ampere" and square and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0:
        if softcap is None:
            return "varlen"
        return "flash_attn" if flash_attn() else "maths"
    if softcap is not None:
        return "maths"
    aligned = query.shape[-1] % 8 == 0 and value.shape[-1] % 8 == 0
    return "efficient" if aligned and query.dtype != torch.float64 else "sdpa"


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], shape: Shape
) -> Tensor:
    """torch's own FlashAttention (``torch.nn.attention.varlen``): bfloat16 and float16 from Ampere on."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, lengths = _as_sequences(query, key, value, segments)
    if q.is_meta:
        return meta_flash_attention(q, k, v, len(segments)).transpose(0, 1).unsqueeze(0)
    options: dict[str, Any] = {"scale": shape.scale, "window_size": shape.window_size}
    if (
        "enable_gqa" in signature(varlen_attn).parameters
    ):  # before torch 2.12 grouped heads went without saying
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out: Any = varlen_attn(q, k, v, *lengths, **options)
    found: Tensor = out.transpose(0, 1).unsqueeze(0)
    return found


def _flash_attn_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], shape: Shape
) -> Tensor:
    """The package flash-attn where it is installed: the one fast kernel with a softcap."""
    q, k, v, lengths = _as_sequences(query, key, value, segments)
    if q.is_meta:
        out = meta_flash_attention(q, k, v, len(segments))
    else:
        options = {"softmax_scale": shape.scale, "causal": True, "softcap": shape.softcap or 0.0}
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        out = flash_attn().flash_attn_varlen_func(
            q, k, v, *lengths, window_size=shape.window_size, **options
        )
    return out.transpose(0, 1).unsqueeze(0)


@lru_cache(maxsize=1)
def flash_attn() -> Any:
    """The package where it is installed; it is never asked for."""
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


def _as_sequences(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, int, int]]:
    """(T, H, E) queries, keys with each prefix repeated before its segment, and where the sequences begin."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if any(segment.before for segment in segments):
        index = _key_index(tuple(segments), query.device)
        k, v = k.index_select(0, index), v.index_select(0, index)
    starts_q, starts_k = _starts(tuple(segments), query.device)
    longest_q = max(segment.stop - segment.start for segment in segments)
    longest_k = max(segment.before + segment.stop - segment.start for segment in segments)
    return q, k, v, (starts_q, starts_k, longest_q, longest_k)


@lru_cache(maxsize=4)
def _key_index(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    pieces = [
        span for s in segments for span in ((s.prefix_start, s.prefix_stop), (s.start, s.stop))
    ]
    return torch.cat([torch.arange(*piece) for piece in pieces]).to(device)


@lru_cache(maxsize=4)
def _starts(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = [(s.stop - s.start, s.before + s.stop - s.start) for s in segments]
    starts = F.pad(torch.tensor(lengths).cumsum(0), (0, 0, 1, 0)).int().to(device)
    return starts[:, 0].contiguous(), starts[:, 1].contiguous()


def forget_rows() -> None:
    """Drop what is kept of the rows seen last: a step that is counted makes it anew, whatever was counted before."""
    _key_index.cache_clear()
    _starts.cache_clear()


FROM_BOTTOM_RIGHT = 2
"""The causal mask of ``_efficient_attention_forward`` whose last query sees the last key (torch's CausalVariant)."""


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], shape: Shape
) -> Tensor:
    """torch's memory-efficient attention, all segments in one call; for GPUs before Ampere and float32."""
    q, k, v, (starts_q, starts_k, longest_q, longest_k) = _as_sequences(query, key, value, segments)
    if (
        shape.window is not None and longest_k > shape.window
    ):  # its own window is documented nowhere
        return _sdpa(query, key, value, segments, shape)
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    if q.is_meta:
        return meta_flash_attention(q, k, v).transpose(0, 1).unsqueeze(0)
    # By its operator: what is public takes one sequence length, or nested tensors.
    out, *_ = torch.ops.aten._efficient_attention_forward(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        None,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        0.0,
        FROM_BOTTOM_RIGHT,
        torch.is_grad_enabled(),
        scale=shape.scale,
    )
    found: Tensor = out.transpose(1, 2)
    return found


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], shape: Shape
) -> Tensor:
    """torch's scaled_dot_product_attention, segment by segment; for sizes of heads that no other kernel takes."""
    outs = []
    for segment in segments:
        prefix, own = (
            slice(segment.prefix_start, segment.prefix_stop),
            slice(segment.start, segment.stop),
        )
        k, v = (_joined(tensor, prefix, own) for tensor in (key, value))
        q = query[:, :, own]
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
        if q.is_meta:  # there torch would take the way that keeps all scores
            outs.append(meta_flash_attention(q, k, v))
            continue
        fits = shape.window is None or k.shape[2] <= shape.window
        sizes = (q.shape[2], k.shape[2])
        mask = (
            causal_lower_right(*sizes) if fits else _mask(*sizes, segment.before, shape.window, q)
        )
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale))
    return torch.cat(outs, 2)


def _joined(tensor: Tensor, prefix: slice, own: slice) -> Tensor:
    """The tokens of a prefix, if there are any, and those behind it; without a prefix a view of the row."""
    behind = tensor[:, :, own]
    return torch.cat([tensor[:, :, prefix], behind], 2) if prefix.stop > prefix.start else behind


def _mask(queries: int, keys: int, offset: int, window: int | None, like: Tensor) -> Tensor:
    """0 where query i, at position ``offset + i`` among the keys, may look, else -inf; shape (queries, keys)."""
    position_Q1 = torch.arange(offset, offset + queries, device=like.device).unsqueeze(1)
    position_K = torch.arange(keys, device=like.device)
    hidden_QK = position_K > position_Q1
    if window is not None:
        hidden_QK |= position_K <= position_Q1 - window
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(
        hidden_QK, -math.inf
    )


class _Block(NamedTuple):
    """Queries ``start:stop`` of a row and all keys that some of them sees."""

    start: int
    stop: int
    prefix: slice
    own: slice
    offset: int
    """Place of the first query among these keys."""


def _blocks(segments: Sequence[Segment], window: int | None, whole: bool) -> Iterator[_Block]:
    """``whole``: a segment without prefix and window is one block, which the kernel itself masks causally."""
    for segment in segments:
        length = segment.stop - segment.start
        plain = whole and not segment.before and (window is None or length <= window)
        size = length if plain else BLOCK
        for begin in range(0, length, size):
            end = min(begin + size, length)
            # Among prefix and own keys, the first that the block's first query sees.
            first = 0 if window is None else max(0, segment.before + begin - window + 1)
            prefix = slice(segment.prefix_start + min(first, segment.before), segment.prefix_stop)
            own = slice(segment.start + max(0, first - segment.before), segment.start + end)
            yield _Block(
                segment.start + begin,
                segment.start + end,
                prefix,
                own,
                segment.before + begin - first,
            )


class _Blockwise(torch.autograd.Function):
    """Attention block by block; queries, keys, values, the output and one number a query and head are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment],
        shape: Shape,
        kernel: Any,
    ) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(batch, heads, tokens, dtype=precise, device=query.device)
        for block in _blocks(segments, shape.window, kernel.masks_causally):
            q = query[:, :, block.start : block.stop]
            k, v = (_joined(tensor, block.prefix, block.own) for tensor in (key, value))
            mask = _block_mask(block, q, k, shape, kernel)
            out[:, :, block.start : block.stop], lse[:, :, block.start : block.stop] = (
                kernel.forward(q, k, v, mask, shape)
            )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.shape, ctx.kernel = segments, shape, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, out, lse = ctx.saved_tensors
        shape, kernel = ctx.shape, ctx.kernel
        grad_q, grad_k, grad_v = (
            torch.empty_like(query),
            torch.zeros_like(key),
            torch.zeros_like(value),
        )
        for block in _blocks(ctx.segments, shape.window, kernel.masks_causally):
            rows = slice(block.start, block.stop)
            q = query[:, :, rows]
            k, v = (_joined(tensor, block.prefix, block.own) for tensor in (key, value))
            mask = _block_mask(block, q, k, shape, kernel)
            found = kernel.backward(
                grad[:, :, rows], q, k, v, out[:, :, rows], lse[:, :, rows], mask, shape
            )
            grad_q[:, :, rows] = found[0]
            size = block.prefix.stop - block.prefix.start
            for whole, part in ((grad_k, found[1]), (grad_v, found[2])):
                whole[:, :, block.prefix] += part[:, :, :size]
                whole[:, :, block.own] += part[:, :, size:]
        return grad_q, grad_k, grad_v, None, None, None


def _block_mask(block: _Block, q: Tensor, k: Tensor, shape: Shape, kernel: Any) -> Tensor | None:
    """None for a block that the kernel masks itself: its queries and keys are the same tokens."""
    if kernel.masks_causally and block.offset == 0 and q.shape[2] == k.shape[2]:
        plain = shape.window is None or q.shape[2] <= shape.window
        if plain:
            return None
    return _mask(q.shape[2], k.shape[2], block.offset, shape.window, q)


class _FlashCPU:
    """torch's FlashAttention for CPUs, called by name so that the meta device takes the same way."""

    masks_causally = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(q, k, v, 0.0, mask is None, attn_mask=mask, scale=shape.scale)
        return out, lse

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        shape: Shape,
    ) -> tuple[Tensor, Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found: tuple[Tensor, Tensor, Tensor]
        found = attend(
            grad, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=shape.scale
        )
        return found


class _Maths:
    """The formula, in at least float32, with scores of one block held; any device, softcap too: the reference."""

    masks_causally = False

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        scores, _ = _scores(q, k, mask, shape)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse.unsqueeze(-1)).exp_()
        out = weights @ _grouped(v, k).to(weights.dtype)
        return _flat(out).to(q.dtype), _flat(lse)

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        shape: Shape,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, slope = _scores(q, k, mask, shape)
        weights = scores.sub_(_grouped(lse.unsqueeze(-1), k)).exp_()
        dtype = weights.dtype
        grad_g, out_g, q_g = (_grouped(tensor, k).to(dtype) for tensor in (grad, out, q))
        k_g, v_g = (_grouped(tensor, k).to(dtype) for tensor in (k, v))
        grad_v = (weights.transpose(-1, -2) @ grad_g).sum(2)
        grad_scores = weights.mul_(
            grad_g @ v_g.transpose(-1, -2) - (grad_g * out_g).sum(-1, keepdim=True)
        )
        if slope is not None:
            grad_scores.mul_(slope)
        grad_q = _flat(grad_scores @ k_g).mul_(shape.scale)
        grad_k = (grad_scores.transpose(-1, -2) @ q_g).sum(2).mul_(shape.scale)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """(1, K, H / K, queries, keys), and the softcap's derivative there."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (_grouped(q, k).to(dtype) @ _grouped(k, k).to(dtype).transpose(-1, -2)).mul_(
        shape.scale
    )
    slope = None
    if shape.softcap is not None:
        tanh = scores.div_(shape.softcap).tanh_()
        slope = 1 - tanh.square()
        scores = tanh.mul_(shape.softcap)
    return (scores if mask is None else scores.add_(mask)), slope


def _grouped(tensor: Tensor, k: Tensor) -> Tensor:
    """(1, H, ...) as (1, K, H / K, ...), so that the heads of a group meet the key that they share."""
    groups, heads = k.shape[1], tensor.shape[1]
    return tensor.reshape(1, groups, heads // groups, *tensor.shape[2:])


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1, 2)


def _flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], shape: Shape
) -> Tensor:
    out: Tensor = _Blockwise.apply(query, key, value, segments, shape, _FlashCPU)
    return out


def _maths(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], shape: Shape
) -> Tensor:
    out: Tensor = _Blockwise.apply(query, key, value, segments, shape, _Maths)
    return out


BACKENDS = {
    "flash_cpu": _flash_cpu,
    "varlen": _varlen,
    "flash_attn": _flash_attn_varlen,
    "efficient": _efficient,
    "sdpa": _sdpa,
    "maths": _maths,
}
