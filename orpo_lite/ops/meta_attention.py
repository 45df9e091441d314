"""Attention on meta, for kernels that cannot run there: what they return, keep and allocate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MetaAttention(torch.autograd.Function):
    """On meta: what a kernel without scores returns, keeps and needs for itself, for kernels that cannot run there."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: int) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        workspace = (
            varlen_workspace(query, key, value, ctx.segments)
            if ctx.segments
            else _workspace(query, key, value)
        )
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        del workspace  # it lives until the gradients are there
        return *grads, None


MULTIPROCESSORS = (
    192  # more than any card has; only a deterministic kernel's workspace grows with them
)


def varlen_workspace(query: Tensor, key: Tensor, value: Tensor, segments: int) -> list[Tensor]:
    """What FlashAttention 2 allocates for the backward pass of sequences laid end to end.

    From ``mha_varlen_bwd`` in torch's flash_attn/flash_api.cpp, and the same in the package flash-attn: the sum of the
    queries' gradient (``dq_accum``) and one number a query and head (``softmax_d``), both float32 and with 128 rows
    more a sequence; the gradients of keys and values for each query head where heads share them. The deterministic
    kernel has several sums, the more the fewer sequences there are: enough for any row of so many or fewer.

    Args:
        query: shape (T, H, E).
        key: shape (S, K, E).
        value: as ``key``.
        segments: how many sequences.
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


def _workspace(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """What other kernels allocate for the backward pass, shapes (B, H, T, E).

    The queries' gradient is summed in float32. In half precision with heads of more than 64 the memory-efficient kernel
    sums the keys' and values' so too (``kOutputInRF`` in torch's mem_eff_attention/kernel_backward.h).
    """
    made = [query.new_empty(query.shape, dtype=torch.float32)]
    if (group := query.shape[1] // key.shape[1]) > 1:
        made += [tensor.new_empty(group * tensor.numel()) for tensor in (key, value)]
    elif query.dtype != torch.float32 and query.shape[-1] > 64:
        made += [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (key, value)]
    return made


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def meta_flash_attention(query: Tensor, key: Tensor, value: Tensor, segments: int = 0) -> Tensor:
    """What a kernel that never holds scores makes of queries, keys and values, on meta: see :class:`MetaAttention`.

    ``segments`` is how many sequences lie end to end, for FlashAttention; 0 for kernels that take one at a time.
    """
    out: Tensor = MetaAttention.apply(query, key, value, segments)
    return out
