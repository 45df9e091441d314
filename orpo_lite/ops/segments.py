"""Define the segments of a packed row, and the attention options that every back-end reads.

A segment is a part of the row whose tokens attend to each other causally. A segment can have a
prefix: another part of the row, to which all tokens of the segment attend too.

The chosen and the rejected sequence of a pair begin with the same tokens, the common prefix. If the
row contains the prefix only once, it is ``[prefix | chosen rest | rejected rest]``. The first
segment is the common prefix and the chosen rest. The second segment is the rejected rest, and its
prefix is the common prefix. So the rejected tokens attend as if they followed the common prefix
directly. A segment with a prefix has more keys than queries. Its causal mask is aligned
bottom-right: the last query is at the position of the last key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor


class Segment(NamedTuple):
    """The tokens ``start:stop`` of a row.

    These tokens attend to all tokens ``prefix_start:prefix_stop``. They attend to each other
    causally.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def length(self) -> int:
        """Number of the segment's own tokens, without the prefix."""
        return self.stop - self.start

    @property
    def prefix_length(self) -> int:
        """Number of tokens in the prefix; 0 without a prefix."""
        return self.prefix_stop - self.prefix_start


@dataclass(frozen=True)
class Layout:
    """The segments of a row, and the back-end that computes their attention."""

    segments: tuple[Segment, ...]
    backend: str = "auto"
    """auto, or one of BACKENDS: flash_cpu, varlen, flash_attn, efficient, sdpa, maths."""
    target_kind: str | None = None
    """The :func:`device_kind` for which a plan is made, if the tensors are on meta; else None."""


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Make :func:`current_layout` return ``layout`` inside the ``with`` block."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current_layout() -> Layout | None:
    """Return the layout that :func:`use_layout` has set, or None if none is set.

    A checkpointed layer runs again in the backward pass. The second run may be on another thread,
    which has no layout. Therefore the layer stores the layout of its first run.
    """
    return _current.get()


class AttentionOptions(NamedTuple):
    """The options of a layer's attention, apart from its segments."""

    scale: float
    """Factor by which the scores are multiplied."""
    window: int | None
    """Number of tokens that a query sees, including itself; None: no limit."""
    softcap: float | None
    """``cap * tanh(scores / cap)``; None: no softcap."""

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as FlashAttention expects it: (tokens before the query, tokens after it).

        -1 means no limit.
        """
        return (-1 if self.window is None else self.window - 1, 0)


def as_sequences(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, int, int]]:
    """Return a row's queries, keys and values in the input format of varlen kernels.

    Each segment becomes one sequence. All sequences are in one tensor, one after another. In keys
    and values, a copy of the segment's prefix comes first in the sequence.

    Returns:
        Queries (T, H, E), keys (S, K, E), values (S, K, E'), and a tuple of four entries:
        (starts_q, starts_k, longest_q, longest_k). ``starts_q`` has the index at which each
        sequence begins in the queries, and then T. ``longest_q`` is the length of the longest
        sequence in the queries. ``starts_k`` and ``longest_k`` are the same for the keys.
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if any(segment.prefix_length for segment in segments):
        index = _key_index(tuple(segments), query.device)
        k, v = k.index_select(0, index), v.index_select(0, index)
    starts_q, starts_k = _starts(tuple(segments), query.device)
    longest_q = max(segment.length for segment in segments)
    longest_k = max(segment.prefix_length + segment.length for segment in segments)
    return q, k, v, (starts_q, starts_k, longest_q, longest_k)


@lru_cache(maxsize=4)
def _key_index(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    pieces = []
    for segment in segments:
        pieces.append(torch.arange(segment.prefix_start, segment.prefix_stop))
        pieces.append(torch.arange(segment.start, segment.stop))
    return torch.cat(pieces).to(device)


@lru_cache(maxsize=4)
def _starts(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = [(s.length, s.prefix_length + s.length) for s in segments]
    starts = F.pad(torch.tensor(lengths).cumsum(0), (0, 0, 1, 0)).int().to(device)
    return starts[:, 0].contiguous(), starts[:, 1].contiguous()


class Run(NamedTuple):
    """Consecutive segments of a row, with similar lengths.

    ``queries``: the slice of the queries from :func:`as_sequences` that holds these segments.
    ``starts_q``: the start of each segment in this slice, and then the length of the slice.
    Example: segments with 3 and 4 queries -> [0, 3, 7]. ``keys`` and ``starts_k``: the same for the
    keys. The keys of a segment begin with the keys of its prefix.
    """

    queries: slice
    keys: slice
    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


PADDING = 2
"""Upper bound, for each run, of (number of rows with padding) / (number without padding)."""


@lru_cache(maxsize=4)
def similar_runs(segments: tuple[Segment, ...], device: torch.device) -> tuple[Run, ...]:
    """Split the segments of a row into runs. The segments of a run have similar lengths.

    Some kernels pad each sequence to the longest sequence of a call. Such a kernel is called once
    per run, so that less memory is used. A run with padding has at most :data:`PADDING` times as
    many queries as the same run without padding. This is also true for the keys.
    """
    groups: list[list[Segment]] = []
    for segment in segments:
        grown = [*groups[-1], segment] if groups else [segment]
        if groups and _is_similar(grown):
            groups[-1] = grown
        else:
            groups.append([segment])
    runs, q, k = [], 0, 0
    for group in groups:
        queries = [segment.length for segment in group]
        keys = [segment.prefix_length + segment.length for segment in group]
        starts_q, starts_k = _starts(tuple(group), device)
        ends = q + sum(queries), k + sum(keys)
        rows = slice(q, ends[0]), slice(k, ends[1])
        runs.append(Run(*rows, starts_q, starts_k, max(queries), max(keys)))
        q, k = ends
    return tuple(runs)


def _is_similar(group: Sequence[Segment]) -> bool:
    queries = [segment.length for segment in group]
    keys = [segment.prefix_length + segment.length for segment in group]
    return all(len(group) * max(sizes) <= PADDING * sum(sizes) for sizes in (queries, keys))


def clear_row_caches() -> None:
    """Empty the caches of recent rows, which hold index tensors.

    Call this before the memory of a step is measured. The step then allocates all its index tensors
    again, so they are measured too.
    """
    _key_index.cache_clear()
    _starts.cache_clear()
    similar_runs.cache_clear()


def join_tokens(tensor: Tensor, prefix: slice, own: slice) -> Tensor:
    """Return the tokens at ``prefix``, followed by the tokens at ``own``.

    If ``prefix`` is empty, return a view of ``tensor``, not a copy.
    """
    own_tokens = tensor[:, :, own]
    if prefix.stop <= prefix.start:
        return own_tokens
    return torch.cat([tensor[:, :, prefix], own_tokens], 2)


def causal_mask(queries: int, keys: int, offset: int, window: int | None, like: Tensor) -> Tensor:
    """Return a mask of shape (queries, keys): 0 where a query sees a key, else -inf.

    Query i is at position ``offset + i`` among the keys. ``window`` is the number of tokens that a
    query sees, including itself; None: no limit.
    """
    position_Q1 = torch.arange(offset, offset + queries, device=like.device).unsqueeze(1)
    position_K = torch.arange(keys, device=like.device)
    hidden_QK = position_K > position_Q1
    if window is not None:
        hidden_QK |= position_K <= position_Q1 - window
    mask_QK = torch.zeros(queries, keys, dtype=like.dtype, device=like.device)
    return mask_QK.masked_fill_(hidden_QK, -math.inf)
