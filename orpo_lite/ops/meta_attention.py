"""Simulate the memory use of attention kernels with meta tensors, which have no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MetaAttention(torch.autograd.Function):
    """Simulates the memory use of an attention kernel that never stores all scores.

    Its tensors are on the meta device. The output, the tensors kept for the backward pass and the
    workspace have the same sizes as in the kernel.
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
        del workspace  # kernels free it after they have computed the gradients
        return *grads, None, None


MULTIPROCESSORS = 192
"""Upper bound for a GPU's multiprocessors. Only the workspace of deterministic kernels needs it."""


def varlen_workspace(query: Tensor, key: Tensor, value: Tensor, segments: int) -> list[Tensor]:
    """Return tensors of the sizes that FlashAttention 2 allocates for a backward pass.

    The pass is that of one row with 1 to ``segments`` sequences. The sizes are from
    ``mha_varlen_bwd`` in torch's flash_attn/flash_api.cpp:

    - ``dq_accum``: the sum of the queries' gradient, in float32.
    - ``softmax_d``: one float32 number per query and head.
    - If query heads share keys and values: the gradients of keys and values per query head.

    ``dq_accum`` and ``softmax_d`` have space for 128 additional tokens per sequence. Deterministic
    kernels allocate several copies of ``dq_accum``. The number of copies depends on the number of
    sequences, so the largest total size is returned.

    Args:
        query: shape (T, H, E).
        key: shape (S, K, E).
        value: shape (S, K, E').
        segments: largest number of sequences in the row.
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
    """Return tensors of the sizes that other kernels allocate for the backward pass.

    The kernels sum the queries' gradient in float32. In half precision with heads larger than 64,
    the memory-efficient kernel also sums the gradients of keys and values in float32
    (``kOutputInRF`` in torch's mem_eff_attention/kernel_backward.h). ``padding`` is as in
    :func:`meta_padded_attention`.

    The arguments have the shape (B, H, T, E), or (T, H, E) without grouped queries.
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
    """Simulate the memory use of FlashAttention or a similar kernel (:class:`MetaAttention`).

    ``segments``: the number of sequences in a packed row, for FlashAttention. 0 for other kernels,
    which take one sequence or a padded batch.
    """
    out: Tensor = MetaAttention.apply(query, key, value, segments, 1)
    return out


def meta_padded_attention(query: Tensor, key: Tensor, value: Tensor, padding: int) -> Tensor:
    """Simulate the memory use of torch's memory-efficient kernel for tensors of shape (T, H, E).

    The kernel pads some of its own tensors: each sequence gets the length of the longest sequence.
    ``padding`` is an upper bound for the growth of these tensors: 2 -> at most twice as many rows.
    Each query head must have its own key head.
    """
    out: Tensor = MetaAttention.apply(query, key, value, 0, padding)
    return out
