"""Simulate attention kernels on the meta device: what they return, keep and allocate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MetaAttention(torch.autograd.Function):
    """Simulates a kernel that never holds scores on the meta device.

    It returns, keeps for the backward pass and allocates tensors of the same sizes.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: int, padding: int
    ) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(padding, *query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.padding = segments, padding
        return out

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        if ctx.segments:
            workspace = varlen_workspace(query, key, value, ctx.segments)
        else:
            workspace = _workspace(query, key, value, ctx.padding)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        del workspace  # kernels free it when the gradients exist
        return *grads, None, None


MULTIPROCESSORS = 192
"""More than any GPU has. Only the workspace of deterministic kernels grows with them."""


def varlen_workspace(query: Tensor, key: Tensor, value: Tensor, segments: int) -> list[Tensor]:
    """Return what FlashAttention 2 allocates for the backward pass of sequences laid end to end.

    From ``mha_varlen_bwd`` in torch's flash_attn/flash_api.cpp; the flash-attn package does the
    same. It allocates the sum of the queries' gradient (``dq_accum``) and one number per query and
    head (``softmax_d``), both float32 and with 128 more rows per sequence. Where heads share keys
    and values, it also allocates their gradients for each query head. The deterministic kernel has
    several sums, more for fewer sequences: the size returned is enough for any row of at most this
    many sequences.

    Args:
        query: shape (T, H, E).
        key: shape (S, K, E).
        value: like ``key``.
        segments: number of sequences.
    """
    tokens, heads, width = query.shape
    wide = _round_up(width, 32 if width <= 128 else 64)
    rows = tokens + 128 * segments
    summed = rows
    if torch.are_deterministic_algorithms_enabled():
        summed = max(
            -(-MULTIPROCESSORS // (count * heads)) * (tokens + 128 * count)
            for count in range(1, segments + 1)
        )
    made = [
        query.new_empty(summed, heads, wide, dtype=torch.float32),
        query.new_empty(heads, rows, dtype=torch.float32),
    ]
    if key.shape[1] != heads:
        made += [tensor.new_empty(len(tensor), heads, tensor.shape[-1]) for tensor in (key, value)]
    return made


def _workspace(query: Tensor, key: Tensor, value: Tensor, padding: int) -> list[Tensor]:
    """Return what other kernels allocate for the backward pass, shapes (B, H, T, E).

    The queries' gradient is summed in float32. In half precision with heads larger than 64, the
    memory-efficient kernel sums those of keys and values in float32 too (``kOutputInRF`` in
    torch's mem_eff_attention/kernel_backward.h). Rows of sequences of different lengths are padded:
    there are up to ``padding`` times as many.
    """
    made = [query.new_empty(padding, *query.shape, dtype=torch.float32)]
    group = query.shape[1] // key.shape[1]  # query heads per key head
    if group > 1:
        made += [tensor.new_empty(group * tensor.numel()) for tensor in (key, value)]
    elif query.dtype != torch.float32 and query.shape[-1] > 64:
        sums = [(padding, *tensor.shape) for tensor in (key, value)]
        made += [query.new_empty(shape, dtype=torch.float32) for shape in sums]
    return made


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def meta_flash_attention(query: Tensor, key: Tensor, value: Tensor, segments: int = 0) -> Tensor:
    """Simulate FlashAttention or a similar kernel on meta tensors: see :class:`MetaAttention`.

    ``segments`` is the number of sequences laid end to end, for FlashAttention. It is 0 for kernels
    that take one sequence at a time.
    """
    out: Tensor = MetaAttention.apply(query, key, value, segments, 1)
    return out


def meta_padded_attention(query: Tensor, key: Tensor, value: Tensor, padding: int) -> Tensor:
    """Simulate the memory-efficient kernel on meta tensors of shape (T, H, E).

    The kernel pads its sequences to the longest one. With padding they have at most ``padding``
    times as many rows. Each query head has its own key head.
    """
    out: Tensor = MetaAttention.apply(query, key, value, 0, padding)
    return out
