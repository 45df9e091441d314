"""Compute log-probabilities of tokens, from all logits at once or from one chunk after another.

:func:`padded_logps` takes all logits and is the reference. :func:`row_logps` computes the logits
of one chunk of rows after another.

Each log-probability depends on a single hidden state. So the gradient of a log-probability is one
vector. If the head is a frozen linear layer, the forward pass of :func:`row_logps` stores these
vectors, one for each token. The backward pass multiplies each vector by the incoming gradient of
the token. Therefore logits are neither kept nor computed again. For other heads, the backward pass
computes the logits again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orpo_lite.ops.outputs import PairScores, at_least_float32

CHUNK_BYTES = 96 << 20
"""Size of a chunk's float32 logits in bytes. It is large enough to use any device well."""


@dataclass(frozen=True)
class Head:
    """The output layer: ``softcap(scale * (hidden @ weight.T + bias))``."""

    module: Any
    """The output embedding. It may be frozen, trained, adapted or quantised. None: a merged reward
    model has no output embedding."""
    scale: float = 1.0
    """Factor of the logits: Cohere's ``logit_scale``, or 1 / Granite's ``logits_scaling``."""
    softcap: float | None = None
    """Gemma's ``final_logit_softcapping``: ``cap * tanh(logits / cap)``."""

    @property
    def is_plain(self) -> bool:
        """True if the module is a frozen linear layer.

        A frozen matrix does not change between the forward and the backward pass. A Jacobian that
        the forward pass stores is therefore correct in the backward pass.
        """
        is_frozen = not any(p.requires_grad for p in self.module.parameters())
        return type(self.module) is nn.Linear and is_frozen

    def at_temperature(self, temperature: float) -> Head:
        """Return a head whose logits are those of this head, divided by ``temperature``."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits in at least float32, shape (..., V)."""
        logits: Tensor = at_least_float32(self.module(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def chunk_rows(vocab_size: int, rows: int | None = None) -> int:
    """Return how many rows of logits are computed at once.

    If ``rows`` is given, return it. Otherwise return the number of float32 rows that fit into
    :data:`CHUNK_BYTES`, but at least 16 and at most 1024. If at least 128 rows fit, the number is
    rounded down to a multiple of 128, the tile size of GPU kernels.
    """
    if rows:
        return rows
    fitting = CHUNK_BYTES // (4 * vocab_size)
    whole_tiles = fitting // 128 * 128
    return max(16, min(1024, whole_tiles or fitting))


def row_logps(
    hidden_TD: Tensor, rows_N: Tensor, targets_N: Tensor, head: Head, chunk: int
) -> Tensor:
    """Return the log-probabilities of ``targets_N`` given the hidden states ``hidden_TD[rows_N]``.

    Args:
        hidden_TD: hidden states after the model's last norm.
        rows_N: for each target, the row of ``hidden_TD`` that predicts it. A row may appear twice.
        targets_N: token ids.
        head: the output layer. If the head is a frozen linear layer, the forward pass stores the
            Jacobian ``d log p / d hidden``. Otherwise the backward pass computes the logits again.
        chunk: number of rows whose logits are computed at once.

    Returns:
        Shape (N,), float32 or float64.
    """
    if head.is_plain:
        weight_VD, bias_V = head.module.weight, head.module.bias
        logps_N: Tensor = _RowJacobian.apply(
            hidden_TD, weight_VD, bias_V, rows_N, targets_N, head.scale, head.softcap, chunk
        )
        return logps_N

    def logps_of_chunk(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return pick(head.logits(hidden_CD), targets_C)

    parts = zip(rows_N.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat(
        [
            checkpoint(logps_of_chunk, hidden_TD[rows], targets, use_reentrant=False)
            for rows, targets in parts
        ]
    )


def pick(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return the log-probability of each target, ``log softmax(logits)[target]``, shape (C,)."""
    return logits_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1) - logits_CV.logsumexp(-1)


class _RowJacobian(torch.autograd.Function):
    """Computes the log-probability of each target.

    If the hidden states need a gradient, the forward pass stores the Jacobian
    ``d log p / d hidden``, shape (N, D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows_N: Tensor,
        targets_N: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        logps_N = at_least_float32(hidden_TD.new_empty(0)).new_empty(len(rows_N))
        jacobian_ND = hidden_TD.new_empty((len(rows_N), hidden_TD.shape[1]) if wanted else 0)
        for start in range(0, len(rows_N), chunk):
            part = slice(start, start + chunk)
            targets_C1 = targets_N[part].unsqueeze(1)
            logits_CV = torch.nn.functional.linear(hidden_TD[rows_N[part]], weight_VD, bias_V)
            logits_CV = at_least_float32(logits_CV)
            if scale != 1.0:
                logits_CV.mul_(scale)
            slope_CV = None
            if softcap is not None:
                tanh_CV = logits_CV.div_(softcap).tanh_()
                slope_CV = 1 - tanh_CV.square() if wanted else None
                logits_CV = tanh_CV.mul_(softcap)
            picked_C1 = logits_CV.gather(1, targets_C1)
            highest_C1 = logits_CV.amax(1, keepdim=True)
            logits_CV.sub_(highest_C1).exp_()  # in place: only one tensor has this size
            sum_C1 = logits_CV.sum(1, keepdim=True)
            logps_N[part] = (picked_C1 - highest_C1 - sum_C1.log()).squeeze(1)
            if not wanted:
                continue
            # d log p(target) / d logits = onehot(target) - softmax
            slope_of_logits_CV = logits_CV.div_(-sum_C1)
            slope_of_logits_CV[
                torch.arange(len(sum_C1), device=sum_C1.device), targets_N[part]
            ] += 1
            if slope_CV is not None:
                slope_of_logits_CV.mul_(slope_CV)
            torch.mm(slope_of_logits_CV.to(weight_VD.dtype), weight_VD, out=jacobian_ND[part])
        if wanted:
            if scale != 1.0:
                jacobian_ND.mul_(scale)
            ctx.save_for_backward(jacobian_ND, rows_N)
            ctx.shape = hidden_TD.shape
        return logps_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        jacobian_ND, rows_N = ctx.saved_tensors
        # Multiply in the gradient's dtype, at least float32, and round the product once.
        terms_ND = torch.mul(jacobian_ND, grad_N.unsqueeze(1), out=torch.empty_like(jacobian_ND))
        # A row that predicts two tokens gets the sum of two terms.
        grad_TD = jacobian_ND.new_zeros(ctx.shape).index_add_(0, rows_N, terms_ND)
        return grad_TD, None, None, None, None, None, None, None


class Spans(NamedTuple):
    """Where the responses and the NLL tokens of a pair are in the pair's scored rows.

    The scored rows have three parts: the common prefix, the rest of the chosen sequence and the
    rest of the rejected sequence. ``prefix``, ``chosen`` and ``rejected`` are the numbers of rows
    in these parts.

    The other fields are first rows, each counted from the start of its part:

    - chosen response -> prefix[chosen_in_prefix:] and chosen rest[chosen_in_rest:]
    - rejected response -> prefix[rejected_in_prefix:] and rejected rest[rejected_in_rest:]
    - NLL tokens -> prefix[nll_in_prefix:] and chosen rest[nll_in_rest:]
    """

    prefix: int
    chosen: int
    rejected: int
    chosen_in_prefix: int
    chosen_in_rest: int
    rejected_in_prefix: int
    rejected_in_rest: int
    nll_in_prefix: int
    nll_in_rest: int


def packed_logps(logps_N: Tensor, spans: Sequence[Sequence[int]]) -> PairScores:
    """Return the :class:`PairScores` of P packed pairs.

    Args:
        logps_N: the result of :func:`row_logps` for the scored rows of all pairs.
        spans: one entry per pair. An entry has the numbers of a :class:`Spans` in the same order.
    """
    chosen, rejected, nll, counted = [], [], [], []
    parts = logps_N.split([sum(span[:3]) for span in spans])
    for span, part in zip(map(Spans._make, spans), parts, strict=True):
        prefix, rest_w, rest_l = part.split([span.prefix, span.chosen, span.rejected])
        chosen.append(_mean(prefix[span.chosen_in_prefix :], rest_w[span.chosen_in_rest :]))
        rejected.append(_mean(prefix[span.rejected_in_prefix :], rest_l[span.rejected_in_rest :]))
        in_prefix, in_rest = prefix[span.nll_in_prefix :], rest_w[span.nll_in_rest :]
        nll.append(-(in_prefix.sum() + in_rest.sum()))
        counted.append(len(in_prefix) + len(in_rest))
    return PairScores(
        torch.stack(chosen),
        torch.stack(rejected),
        torch.stack(nll),
        torch.tensor(counted, device=logps_N.device),
    )


def _mean(one: Tensor, other: Tensor) -> Tensor:
    return (one.sum() + other.sum()) / (len(one) + len(other))


def padded_logps(
    logits_RTV: Tensor,
    input_ids_RT: Tensor,
    response_RT: Tensor,
    counted_RT: Tensor,
    pairs: int | None = None,
) -> PairScores:
    """Return the log-probabilities of P pairs from the logits of their R padded rows.

    All logits are in memory at once. This function is the reference for :func:`row_logps`.

    Each response must have at least one token, because the mean of no tokens is 0/0. The data
    loading drops pairs with an empty response.

    Args:
        logits_RTV: the logits at position t predict token t + 1.
        input_ids_RT: chosen rows first, then rejected rows in the same order.
        response_RT: True at the tokens of the response. The first token of a row is ignored,
            because no position predicts it.
        counted_RT: True at the tokens that the NLL counts. Only the chosen rows are read.
        pairs: P. None: R / 2. If P is R, the pairs have no rejected sequences, and the rejected
            log-probabilities are NaN.
    """
    targets_RT = input_ids_RT[:, 1:]
    logps_RT = pick(at_least_float32(logits_RTV[:, :-1]), targets_RT)
    response_RT, counted_RT = response_RT[:, 1:], counted_RT[:, 1:]
    mean_R = (logps_RT * response_RT).sum(-1) / response_RT.sum(-1)
    pairs = len(mean_R) // 2 if pairs is None else pairs
    rejected_P = mean_R[pairs:] if len(mean_R) > pairs else mean_R.new_full((pairs,), math.nan)
    nll_P = -(logps_RT * counted_RT)[:pairs].sum(-1)
    return PairScores(mean_R[:pairs], rejected_P, nll_P, counted_RT[:pairs].sum(-1))
