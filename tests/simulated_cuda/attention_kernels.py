"""CUDA's attention kernels for the simulated device: the formula, behind the checks of the real ones' arguments.

The checks are those of torch 2.13 (aten/src/ATen/native/transformers/cuda: flash_api.cpp, attention.cu).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import simulated_cuda
import torch
from torch import Tensor

LOWER_RIGHT = 2  # custom_mask_type; 1 is causal from the upper left
_library: Any = None


def register() -> None:
    """Give torch's operators these kernels."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    for kernel in (
        _flash_attention_forward,
        _flash_attention_backward,
        _efficient_attention_forward,
        _efficient_attention_backward,
    ):
        _library.impl(kernel.__name__, kernel, "CUDA")


class Rows:
    """Sequences one after another, and which keys a query sees: ``left`` and ``right`` around its own place, if set."""

    def __init__(
        self,
        starts_q: Sequence[int],
        starts_k: Sequence[int],
        *,
        left: int = -1,
        right: int = -1,
        upper: bool = False,
    ) -> None:
        self.starts_q, self.starts_k, self.left, self.right, self.upper = (
            starts_q,
            starts_k,
            left,
            right,
            upper,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (T, H, E) outputs of (T, H, E) queries and (S, K, E) keys, and each sequence's (H, T) logsumexp."""
        outs, sums = [], []
        for own, seen in self._sequences():
            q, k, v = _heads_first(query[own], key[seen], value[seen])
            scores = self._scores(q, k, scale)
            sums.append(scores.logsumexp(-1))
            outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outs), sums

    def gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """Return those of queries, keys and values; by hand, for no autograd runs within a kernel."""
        grads = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        for own, seen in self._sequences():
            q, k, v = _heads_first(query[own], key[seen], value[seen])
            grad_out = grad[own].transpose(0, 1)
            weights = self._scores(q, k, scale).softmax(-1)
            grad_weights = grad_out @ v.transpose(1, 2)
            grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
            parts = (
                grad_scores @ k * scale,
                grad_scores.transpose(1, 2) @ q * scale,
                weights.transpose(1, 2) @ grad_out,
            )
            for whole, rows, part in zip(grads, (own, seen, seen), parts, strict=True):
                groups = part.unflatten(
                    0, (whole.shape[1], -1)
                )  # the heads that share a key each add to it
                whole[rows] += groups.sum(1).transpose(0, 1)
        return grads

    def _sequences(self) -> Iterator[tuple[slice, slice]]:
        for of_queries, of_keys in zip(
            pairwise(self.starts_q), pairwise(self.starts_k), strict=True
        ):
            yield slice(*of_queries), slice(*of_keys)

    def _scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        scores = q @ k.transpose(1, 2) * scale
        return scores.masked_fill(self._hidden(*scores.shape[1:]), -math.inf)

    def _hidden(self, queries: int, keys: int) -> Tensor:
        offset = 0 if self.upper else keys - queries
        distance = torch.arange(keys) - (torch.arange(queries) + offset).unsqueeze(1)
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        if self.right >= 0:
            hidden |= distance > self.right
        if self.left >= 0:
            hidden |= distance < -self.left
        return hidden


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(H, T, E), each key and value repeated for the heads that share it."""
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    return q, k.repeat_interleave(len(q) // len(k), 0), v.repeat_interleave(len(q) // len(v), 0)


def _on_host(tensors: Sequence[Tensor], compute: Callable[..., Any]) -> Any:
    """What ``compute`` makes of the tensors in float32; none of it is seen as a transfer, or takes device memory."""
    with simulated_cuda.quiet():
        return compute(*(tensor.detach().to("cpu", torch.float32) for tensor in tensors))


def _like(found: Tensor, original: Tensor) -> Tensor:
    """The result where and as the kernel returns it."""
    out = torch.empty_like(original, memory_format=torch.contiguous_format)
    with simulated_cuda.quiet():
        return out.copy_(found.to(original.dtype))


def _gradients(rows: Rows, scale: float, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    found = _on_host([grad, *tensors], lambda *inputs: rows.gradients(*inputs, scale))
    return [_like(part, tensor) for part, tensor in zip(found, tensors, strict=True)]


def _check_starts(starts: Tensor | None, tokens: int, longest: int | None) -> list[int]:
    assert starts is not None, "one sequence a row is not simulated"
    assert starts.dtype == torch.int32, f"offsets are {starts.dtype}, expected int32"
    assert starts.is_cuda, "offsets are on the host"
    assert starts.dim() == 1, "offsets have one dimension"
    assert starts.is_contiguous(), "offsets are not contiguous"
    assert isinstance(longest, int), "the longest sequence is a number of the host"
    found: list[int] = _on_host([starts], lambda starts: starts.int().tolist())
    lengths = [end - begin for begin, end in pairwise(found)]
    assert found[0] == 0, found
    assert found[-1] == tokens, f"offsets end at {found[-1]} of {tokens} tokens"
    assert min(lengths) >= 0, found
    assert max(lengths) <= longest, f"a sequence of {max(lengths)} tokens, {longest} said"
    return found


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


# --- FlashAttention 2, sequences by offsets


def _flash_rows(
    query: Tensor, key: Tensor, value: Tensor, starts: Any, causal: bool, left: Any, right: Any
) -> Rows:
    """Raise for what the kernel refuses."""
    _check(
        simulated_cuda.capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer."
    )
    half = query.dtype in (torch.float16, torch.bfloat16)
    _check(half, "FlashAttention only support fp16 and bf16 data type")
    _check(key.dtype == query.dtype == value.dtype, "query and key must have the same dtype")
    for tensor in (query, key, value):
        _check(tensor.is_cuda, "Input tensor must be on CUDA device")
        _check(tensor.dim() == 3, "Input tensor must have shape (tokens, heads, head size)")
        _check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    heads, size = query.shape[1:]
    _check(size <= 256, "FlashAttention forward only supports head dimension at most 256")
    _check(size % 8 == 0, "query must have head_size that is a multiple of 8")
    _check(
        heads % key.shape[1] == 0,
        "Number of heads in key/value must divide number of heads in query",
    )
    _check(
        key.shape == value.shape and key.shape[2] == size,
        "key and value must have the shape of each other",
    )
    (starts_q, starts_k), (longest_q, longest_k) = starts
    found_q = _check_starts(starts_q, len(query), longest_q)
    found_k = _check_starts(starts_k, len(key), longest_k)
    _check(len(found_q) == len(found_k), "as many sequences of keys as of queries")
    left, right = (-1 if side is None else side for side in (left, right))
    return Rows(found_q, found_k, left=left, right=0 if causal else right)


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **_others: Any,
) -> tuple[Tensor, ...]:
    starts = (cum_seq_q, cum_seq_k), (max_q, max_k)
    rows = _flash_rows(query, key, value, starts, is_causal, window_size_left, window_size_right)
    scale = scale or query.shape[-1] ** -0.5
    out, sums = _on_host((query, key, value), lambda *inputs: rows.attend(*inputs, scale))
    logsumexp = _like(
        torch.cat(sums, 1), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    )
    nothing = query.new_empty(0)
    return (
        _like(out, query),
        logsumexp,
        query.new_empty(2, dtype=torch.int64),
        nothing,
        nothing.clone(),
    )


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    starts = (cum_seq_q, cum_seq_k), (max_q, max_k)
    rows = _flash_rows(query, key, value, starts, is_causal, window_size_left, window_size_right)
    _check(grad_out.dtype == query.dtype == out.dtype, "query and dout must have the same dtype")
    _check(
        logsumexp.shape == (query.shape[1], len(query)), "logsumexp is not that of the forward pass"
    )
    return tuple(_gradients(rows, scale or query.shape[-1] ** -0.5, (query, key, value), grad_out))


# --- memory-efficient attention: GPUs before Ampere, and float32


def _efficient_rows(
    query: Tensor, key: Tensor, value: Tensor, starts: Any, mask_type: int, window: Any
) -> Rows:
    """Raise for what the kernel refuses; rows of one batch, or sequences by offsets."""
    for tensor in (query, key, value):
        _check(tensor.is_cuda, "Input tensor must be on CUDA device")
        _check(tensor.dim() == 4, "Input tensor must have shape (batch, tokens, heads, head size)")
        _check(tensor.dtype == query.dtype, "query, key and value must have the same dtype")
        _check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        aligned = 4 if query.dtype in (torch.float16, torch.bfloat16) else 1
        strides = [
            stride
            for size, stride in zip(tensor.shape[1:3], tensor.stride()[1:3], strict=True)
            if size > 1
        ]
        _check(
            all(stride % aligned == 0 for stride in strides),
            "query is not correctly aligned (strideM)",
        )
    _check(
        query.dtype != torch.bfloat16 or simulated_cuda.capability >= (8, 0),
        "bfloat16 needs an Ampere GPU",
    )
    _check(
        query.shape[2] == key.shape[2] == value.shape[2],
        "query, key and value must have as many heads",
    )
    _check(query.shape[3] == key.shape[3], "query and key must have one head size")
    _check(key.shape[:2] == value.shape[:2], "as many values as keys")
    (starts_q, starts_k), (longest_q, longest_k) = starts
    if starts_q is None and starts_k is None:
        batch, tokens, keys = *query.shape[:2], key.shape[1]
        found_q, found_k = ([size * row for row in range(batch + 1)] for size in (tokens, keys))
    else:
        _check(len(query) == 1, "cu_seqlen only supports batch_size=1")
        found_q = _check_starts(starts_q, query.shape[1], longest_q)
        found_k = _check_starts(starts_k, key.shape[1], longest_k)
        _check(len(found_q) == len(found_k), "as many sequences of keys as of queries")
    _check(mask_type in (0, 1, LOWER_RIGHT), "invalid custom_mask_type")
    _check(not window or mask_type != 0, "a window needs a causal mask")
    # Unlike FlashAttention's, a window counts the query's own place.
    left = window - 1 if window else -1
    return Rows(found_q, found_k, left=left, right=0 if mask_type else -1, upper=mask_type == 1)


def _efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Tensor | None = None,
    window_size: int | None = None,
) -> tuple[Any, ...]:
    assert bias is None and seqlen_k is None and dropout_p == 0.0, "not simulated"  # noqa: PT018
    starts = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    rows = _efficient_rows(query, key, value, starts, custom_mask_type, window_size)
    scale = scale or query.shape[-1] ** -0.5
    flat = [tensor.flatten(0, 1) for tensor in (query, key, value)]
    found, sums = _on_host(flat, lambda *inputs: rows.attend(*inputs, scale))
    longest_q = max(part.shape[1] for part in sums)
    out = _like(
        found.unflatten(0, query.shape[:2]), query.new_empty(*query.shape[:3], value.shape[3])
    )
    # A multiple of 32 queries, infinite where there are none.
    width = (max_seqlen_q or longest_q) + 31 >> 5 << 5 if compute_log_sumexp else 0
    padded = torch.full((len(sums), query.shape[2], width), math.inf)
    for row, part in zip(padded, sums, strict=True):
        row[:, : part.shape[1]] = part[:, :width]
    state = torch.zeros((), dtype=torch.int64)
    logsumexp = _like(padded, query.new_empty(padded.shape, dtype=torch.float32))
    return (
        out,
        logsumexp,
        state,
        state.clone(),
        max_seqlen_q or query.shape[1],
        max_seqlen_k or key.shape[1],
    )


def _efficient_attention_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    num_splits_key: int | None = None,
    window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Any, ...]:
    assert bias is None and dropout_p == 0.0 and not shared_storage_dqdkdv, "not simulated"  # noqa: PT018
    starts = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    rows = _efficient_rows(query, key, value, starts, custom_mask_type, window_size)
    _check(
        grad_out_.dtype == query.dtype == out.dtype, "grad_out and query must have the same dtype"
    )
    _check(grad_out_.shape == out.shape, "grad_out must have the shape of the output")
    longest = max(end - begin for begin, end in pairwise(rows.starts_q))
    _check(logsumexp.shape[2] >= longest, "logsumexp was not asked for in the forward pass")
    flat = [tensor.flatten(0, 1) for tensor in (query, key, value)]
    found = _gradients(rows, scale or query.shape[-1] ** -0.5, flat, grad_out_.flatten(0, 1))
    shaped = (
        part.view(tensor.shape) for part, tensor in zip(found, (query, key, value), strict=True)
    )
    return *shaped, query.new_empty(0)
