"""Compute attention block by block: with a kernel for CPUs, or with a formula for any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_lite.ops.segments import AttentionOptions, Segment, causal_mask, join_tokens

BLOCK = 256
"""Number of queries in a block that needs a mask."""


class _Block(NamedTuple):
    """The queries ``start:stop`` of a row, and all keys that at least one of these queries sees.

    The keys are the tokens ``prefix`` followed by the tokens ``own``.
    """

    start: int
    stop: int
    prefix: slice
    own: slice
    offset: int
    """Position of the block's first query among the block's keys."""


def _blocks(segments: Sequence[Segment], window: int | None, whole: bool) -> Iterator[_Block]:
    """Yield the blocks of a row.

    If ``whole`` is True, a segment without a prefix that fits into the window is a single block,
    because the kernel applies the causal mask to such a block.
    """
    for segment in segments:
        length, prefix_length = segment.length, segment.prefix_length
        fits_window = window is None or length <= window
        is_one_block = whole and not prefix_length and fits_window
        size = length if is_one_block else BLOCK
        for begin in range(0, length, size):
            end = min(begin + size, length)
            # Index of the first key that the block's first query sees: 0 is the prefix's first key.
            first = 0 if window is None else max(0, prefix_length + begin - window + 1)
            prefix = slice(segment.prefix_start + min(first, prefix_length), segment.prefix_stop)
            own = slice(segment.start + max(0, first - prefix_length), segment.start + end)
            start, stop = segment.start + begin, segment.start + end
            yield _Block(start, stop, prefix, own, prefix_length + begin - first)


class _Blockwise(torch.autograd.Function):
    """Computes attention block by block.

    The tensors kept for the backward pass are queries, keys, values, the output, and one number per
    query and head (the log-sum-exp of its scores).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment],
        options: AttentionOptions,
        kernel: Any,
    ) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(batch, heads, tokens, dtype=precise, device=query.device)
        for block in _blocks(segments, options.window, kernel.masks_causally):
            q = query[:, :, block.start : block.stop]
            k, v = (join_tokens(tensor, block.prefix, block.own) for tensor in (key, value))
            mask = _block_mask(block, q, k, options, kernel)
            out[:, :, block.start : block.stop], lse[:, :, block.start : block.stop] = (
                kernel.forward(q, k, v, mask, options)
            )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.options, ctx.kernel = segments, options, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, out, lse = ctx.saved_tensors
        options, kernel = ctx.options, ctx.kernel
        grad_q, grad_k, grad_v = (
            torch.empty_like(query),
            torch.zeros_like(key),
            torch.zeros_like(value),
        )
        for block in _blocks(ctx.segments, options.window, kernel.masks_causally):
            rows = slice(block.start, block.stop)
            q = query[:, :, rows]
            k, v = (join_tokens(tensor, block.prefix, block.own) for tensor in (key, value))
            mask = _block_mask(block, q, k, options, kernel)
            found = kernel.backward(
                grad[:, :, rows], q, k, v, out[:, :, rows], lse[:, :, rows], mask, options
            )
            grad_q[:, :, rows] = found[0]
            size = block.prefix.stop - block.prefix.start
            for whole, part in ((grad_k, found[1]), (grad_v, found[2])):
                whole[:, :, block.prefix] += part[:, :, :size]
                whole[:, :, block.own] += part[:, :, size:]
        return grad_q, grad_k, grad_v, None, None, None


def _block_mask(
    block: _Block, q: Tensor, k: Tensor, options: AttentionOptions, kernel: Any
) -> Tensor | None:
    """Return the mask of a block, or None if the kernel applies the causal mask.

    A kernel with ``masks_causally`` applies the causal mask if the queries and keys of the block
    are the same tokens and fit into the window.
    """
    queries_are_keys = block.offset == 0 and q.shape[2] == k.shape[2]
    fits_window = options.window is None or q.shape[2] <= options.window
    if kernel.masks_causally and queries_are_keys and fits_window:
        return None
    return causal_mask(q.shape[2], k.shape[2], block.offset, options.window, q)


class _FlashCPU:
    """torch's FlashAttention for CPUs.

    The operator is called by its name, so that meta tensors go through the same operator.
    """

    masks_causally = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(q, k, v, 0.0, mask is None, attn_mask=mask, scale=options.scale)
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
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found: tuple[Tensor, Tensor, Tensor]
        found = attend(
            grad, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=options.scale
        )
        return found


class _Maths:
    """The formula of attention in at least float32. The other back-ends are compared with it.

    Only the scores of one block are in memory. The formula runs on any device and allows a softcap.
    """

    masks_causally = False

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        scores, _ = _scores(q, k, mask, options)
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
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, slope = _scores(q, k, mask, options)
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
        grad_q = _flat(grad_scores @ k_g).mul_(options.scale)
        grad_k = (grad_scores.transpose(-1, -2) @ q_g).sum(2).mul_(options.scale)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor | None]:
    """Return the scores, shape (1, K, H / K, queries, keys), and the softcap's derivatives.

    There is one derivative per score. Without a softcap, the second result is None.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (_grouped(q, k).to(dtype) @ _grouped(k, k).to(dtype).transpose(-1, -2)).mul_(
        options.scale
    )
    slope = None
    if options.softcap is not None:
        tanh = scores.div_(options.softcap).tanh_()
        slope = 1 - tanh.square()
        scores = tanh.mul_(options.softcap)
    if mask is not None:
        scores.add_(mask)
    return scores, slope


def _grouped(tensor: Tensor, k: Tensor) -> Tensor:
    """Reshape (1, H, ...) to (1, K, H / K, ...): the query heads of a group share one key head."""
    groups, heads = k.shape[1], tensor.shape[1]
    return tensor.reshape(1, groups, heads // groups, *tensor.shape[2:])


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1, 2)


def flash_cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    options: AttentionOptions,
) -> Tensor:
    """Compute attention with torch's FlashAttention for CPUs, block by block."""
    out: Tensor = _Blockwise.apply(query, key, value, segments, options, _FlashCPU)
    return out


def maths_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    options: AttentionOptions,
) -> Tensor:
    """Compute attention from its formula, in at least float32, block by block."""
    out: Tensor = _Blockwise.apply(query, key, value, segments, options, _Maths)
    return out
