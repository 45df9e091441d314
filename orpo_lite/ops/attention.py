"""Compute the attention of packed pairs, and choose the back-end that computes it.

:func:`pair_attention` is registered in transformers' ``AttentionInterface``, and models call it. A
row consists of segments: see :mod:`orpo_lite.ops.segments`. A token sees itself and the earlier
tokens of its segment. If the segment has a prefix, which is another part of the row, the token sees
the whole prefix too. :func:`orpo_lite.ops.segments.use_layout` sets the segments of a row. They are
not passed through the model, because not every model passes keyword arguments to its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from orpo_lite.ops.blockwise_attention import flash_cpu_attention, maths_attention
from orpo_lite.ops.devices import device_kind
from orpo_lite.ops.meta_attention import meta_flash_attention, meta_padded_attention
from orpo_lite.ops.segments import (
    PADDING,
    AttentionOptions,
    Segment,
    as_sequences,
    causal_mask,
    current_layout,
    join_tokens,
    similar_runs,
)

NAME = "orpo_lite_pairs"  # the key of pair_attention in transformers' AttentionInterface


class UnsupportedError(Exception):
    """A model calls :func:`pair_attention` with an option that this function does not support.

    Such a model cannot process packed rows. So each sequence needs its own forward pass.
    """


# Arguments that models pass to their attention, but that do not change the result of
# pair_attention. For instance, queries and keys already contain the positions.
IGNORED_ARGUMENTS = (
    "position_ids position_embeddings cache_position is_causal past_key_values past_key_value "
    "use_cache return_dict output_attentions output_hidden_states output_router_logits "
    "logits_to_keep layer_idx num_items_in_batch"
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
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one packed row. The models of transformers call this function.

    Args:
        query: shape (1, H, T, E).
        key: shape (1, K, T, E). H is a multiple of K (grouped queries).
        value: shape (1, K, T, E'). For most models E' is E.
        attention_mask: must be None, because segments cannot describe every mask.
        scaling: factor of the scores; default ``E ** -0.5``.
        dropout: must be 0, because both replies would get the same dropout in a shared prompt.
        sliding_window: number of tokens that a query sees, including itself.
        softcap: Gemma 2's ``cap * tanh(scores / cap)``.
        others: the model's other arguments. Each must be None or have a name in
            IGNORED_ARGUMENTS.

    Returns:
        The output, shape (1, T, H, E'), and None instead of the attention weights.

    Raises:
        UnsupportedError: the model passes a mask, dropout, sinks, a position bias, the indices of
            sparse attention, or another argument that may change the result.
    """
    layout = current_layout()
    unsupported = [
        name
        for name, argument in others.items()
        if argument is not None and name not in IGNORED_ARGUMENTS
    ]
    if dropout:
        unsupported.append("attention dropout")
    if attention_mask is not None:
        unsupported.append("a mask")
    if layout is None or query.shape[0] != 1:
        unsupported.append("a batch that is not one packed row")
    if unsupported or layout is None:
        raise UnsupportedError(f"packing does not support {', '.join(unsupported)} in attention")
    options = AttentionOptions(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    name = layout.backend
    if name == "auto":
        name = choose_backend(query, value, softcap, layout.target_kind)
    return BACKENDS[name](query, key, value, layout.segments, options).transpose(1, 2), None


def choose_backend(
    query: Tensor, value: Tensor, softcap: float | None, target_kind: str | None = None
) -> str:
    """Return the name of the fastest back-end for this device, dtype, softcap and head size.

    ``target_kind`` is the :func:`device_kind` of the device for which a plan is made. If it is
    None, the device of ``query`` decides.
    """
    kind = target_kind or device_kind(query.device)
    width = query.shape[-1]
    square = width == value.shape[-1]
    if kind == "cpu":
        return "flash_cpu" if softcap is None and square else "maths"
    half = query.dtype in (torch.float16, torch.bfloat16)
    takes_flash = square and width <= 256 and width % 8 == 0
    if half and kind == "ampere" and takes_flash:
        if softcap is None:
            return "varlen"
        return "flash_attn" if flash_attn() else "maths"
    if softcap is not None:
        return "maths"
    aligned = width % 8 == 0 and value.shape[-1] % 8 == 0
    return "efficient" if aligned and query.dtype != torch.float64 else "sdpa"


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    options: AttentionOptions,
) -> Tensor:
    """Compute attention with torch's FlashAttention (``torch.nn.attention.varlen``).

    FlashAttention needs 16-bit tensors and an Ampere GPU or a later one.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, lengths = as_sequences(query, key, value, segments)
    if q.is_meta:
        return meta_flash_attention(q, k, v, len(segments)).transpose(0, 1).unsqueeze(0)
    arguments: dict[str, Any] = {"scale": options.scale, "window_size": options.window_size}
    if _names_grouped_heads(varlen_attn):
        arguments["enable_gqa"] = q.shape[1] != k.shape[1]
    out: Any = varlen_attn(q, k, v, *lengths, **arguments)
    found: Tensor = out.transpose(0, 1).unsqueeze(0)
    return found


@lru_cache(maxsize=1)
def _names_grouped_heads(varlen_attn: Callable[..., Any]) -> bool:
    """Return whether torch's ``varlen_attn`` has the argument ``enable_gqa``, as newer versions do.

    The result is cached, because every layer needs it in every pass.
    """
    return "enable_gqa" in signature(varlen_attn).parameters


def _flash_attn_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    options: AttentionOptions,
) -> Tensor:
    """Compute attention with the flash-attn package. No other fast kernel supports a softcap."""
    q, k, v, lengths = as_sequences(query, key, value, segments)
    if q.is_meta:
        out = meta_flash_attention(q, k, v, len(segments))
    else:
        out = flash_attn().flash_attn_varlen_func(
            q,
            k,
            v,
            *lengths,
            softmax_scale=options.scale,
            causal=True,
            window_size=options.window_size,
            softcap=options.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    return out.transpose(0, 1).unsqueeze(0)


@lru_cache(maxsize=1)
def flash_attn() -> Any:
    """Return the optional package flash-attn, or None if it is not installed."""
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


FROM_BOTTOM_RIGHT = 2
"""Value of torch's CausalVariant for a causal mask in which the last query sees the last key."""


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    options: AttentionOptions,
) -> Tensor:
    """Compute attention with torch's memory-efficient kernel, one call per run of segments.

    This is for GPUs before Ampere and for float32. :func:`similar_runs` divides the segments into
    runs, because the kernel pads its log-sum-exp and its backward workspace to the longest sequence
    of a call.
    """
    q, k, v, (*_, longest_k) = as_sequences(query, key, value, segments)
    # The operator has a window argument, but it is not documented.
    if options.window is not None and longest_k > options.window:
        return _sdpa(query, key, value, segments, options)
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    if q.is_meta:
        padding = PADDING if len(segments) > 1 else 1
        return meta_padded_attention(q, k, v, padding).transpose(0, 1).unsqueeze(0)
    outs = []
    for run in similar_runs(tuple(segments), q.device):
        # Call the operator, because the public function needs equal lengths or nested tensors.
        out, *_ = torch.ops.aten._efficient_attention_forward(
            q[run.queries].unsqueeze(0),
            k[run.keys].unsqueeze(0),
            v[run.keys].unsqueeze(0),
            None,
            run.starts_q,
            run.starts_k,
            run.longest_q,
            run.longest_k,
            0.0,
            FROM_BOTTOM_RIGHT,
            torch.is_grad_enabled(),
            scale=options.scale,
        )
        outs.append(out)
    joined: Tensor = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    return joined.transpose(1, 2)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    options: AttentionOptions,
) -> Tensor:
    """Compute attention with torch's scaled_dot_product_attention, one segment at a time.

    This is for head sizes that no other kernel supports, and for windows on GPUs before Ampere.
    """
    outs = []
    for segment in segments:
        prefix = slice(segment.prefix_start, segment.prefix_stop)
        own = slice(segment.start, segment.stop)
        q = query[:, :, own]
        k, v = (join_tokens(tensor, prefix, own) for tensor in (key, value))
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
        if q.is_meta:  # on meta, torch would use the kernel that keeps all scores
            outs.append(meta_flash_attention(q, k, v))
            continue
        sizes = (q.shape[2], k.shape[2])
        if options.window is None or k.shape[2] <= options.window:
            mask: Any = causal_lower_right(*sizes)
        else:
            mask = causal_mask(*sizes, segment.prefix_length, options.window, q)
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale))
    return torch.cat(outs, 2)


BACKENDS = {
    "flash_cpu": flash_cpu_attention,
    "varlen": _varlen,
    "flash_attn": _flash_attn_varlen,
    "efficient": _efficient,
    "sdpa": _sdpa,
    "maths": maths_attention,
}
