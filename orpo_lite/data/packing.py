"""Shuffle tokenized pairs, divide the pairs of a step into batches, and build their tensors."""

import hashlib
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_lite.data.pair import TokenizedPair, common_prefix


class PairFacts(NamedTuple):
    """What is known about P pairs before the forward pass. Each tensor has shape (P,)."""

    chosen_tokens_P: Tensor
    """Number of tokens of the chosen response that the model predicts."""
    rejected_tokens_P: Tensor
    ref_chosen_P: Tensor
    """Mean log-probability of the chosen response under the reference model, float64. NaN: the
    objective has no reference model."""
    ref_rejected_P: Tensor


@dataclass(frozen=True)
class _Batch:
    facts_4P: Tensor
    """The fields of :class:`PairFacts` as rows, float64."""

    @property
    def facts(self) -> PairFacts:
        """What is known about the pairs before the forward pass."""
        return PairFacts(*self.facts_4P)

    def to(self, device: torch.device) -> Self:
        """Return a copy of the batch on the given device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        )


@dataclass(frozen=True)
class PairBatch(_Batch):
    """P pairs as R right-padded rows of T tokens.

    The chosen rows come first, then the rejected rows in the same order. If the pairs have no
    rejected sequences, R is P, else 2P.
    """

    input_ids_RT: Tensor
    attention_RT: Tensor
    """1 at tokens, 0 at padding. Found by length, not by token id, because pad is often eos."""
    response_RT: Tensor
    """True at the tokens of the response."""
    counted_RT: Tensor
    """True at the tokens that the NLL includes. Only the chosen rows are used."""


def pad_pairs(
    pairs: Sequence[TokenizedPair], *, pad_id: int, completion_only_loss: bool
) -> PairBatch:
    """Return the pairs as one batch, padded to the longest sequence.

    ``completion_only_loss``: if True, the NLL does not include the tokens of the prompt.
    """
    rows = [(pair.chosen_ids, pair.chosen_start) for pair in pairs]
    rows += [(pair.rejected_ids, pair.rejected_start) for pair in pairs if len(pair.rejected_ids)]
    width = max(len(ids) for ids, _ in rows)
    input_ids_RT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for row, (ids, _) in enumerate(rows):
        input_ids_RT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    position_T = torch.arange(width)
    length_R1 = torch.tensor([len(ids) for ids, _ in rows]).unsqueeze(1)
    start_R1 = torch.tensor([start for _, start in rows]).unsqueeze(1)
    token_RT = position_T < length_R1
    response_RT = token_RT & (position_T >= start_R1)
    counted_RT = response_RT if completion_only_loss else token_RT
    return PairBatch(_facts(pairs), input_ids_RT, token_RT.long(), response_RT, counted_RT)


@dataclass(frozen=True)
class PackedPairs(_Batch):
    """P pairs as one row of T tokens without padding.

    Each pair is laid out as [common prefix | rest of chosen | rest of rejected]. If prefixes are
    not shared, the prefix is empty and each rest is a whole sequence. A pair may have no rejected
    sequence: then its log-probability is NaN.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    """The position of each token in its own sequence: a rejected rest continues from the prefix."""
    segments: tuple[tuple[int, int, int, int], ...]
    """Two segments for each pair: (start, stop, prefix_start, prefix_stop).

    Tokens start:stop attend causally to one another, and to all tokens prefix_start:prefix_stop.
    The first segment is common prefix + chosen rest, and its prefix range is empty. The second is
    the rejected rest, and its prefix range is the common prefix. Empty segments are left out.
    """
    rows_N: Tensor
    """The positions in the row whose hidden states are scored.

    The last position of a shared prefix appears twice, because it predicts the first token of both
    rests.
    """
    targets_N: Tensor
    """The token to predict at each position in ``rows_N``."""
    spans: tuple[tuple[int, ...], ...]
    """For each pair, the layout of its scored rows: see :class:`orpo_lite.ops.head.Spans`."""
    last_2P: Tensor
    """The positions in the row of the last chosen token and the last rejected token of each pair.
    -1: the pair has no rejected sequence."""


def pack_pairs(
    pairs: Sequence[TokenizedPair], *, completion_only_loss: bool, share: bool
) -> PackedPairs:
    """Return the pairs in one row without padding.

    ``share``: if True, the common prefix of each pair is in the row only once.
    """
    ids: list[NDArray[Any]] = []
    positions: list[NDArray[Any]] = []
    rows: list[NDArray[Any]] = []
    targets: list[NDArray[Any]] = []
    segments, spans, last = [], [], []
    start = 0
    for pair in pairs:
        chosen, rejected = np.asarray(pair.chosen_ids), np.asarray(pair.rejected_ids)
        prefix = common_prefix(chosen, rejected) if share else 0
        middle, stop = start + len(chosen), start + len(chosen) + len(rejected) - prefix
        ids += [chosen, rejected[prefix:]]
        positions += [np.arange(len(chosen)), np.arange(prefix, len(rejected))]
        segments += [(start, middle, 0, 0), (middle, stop, start, start + prefix)]
        # Row i predicts token i + 1. The scored rows begin with the first row that a sum needs, and
        # end with the second to last row.
        chosen_row, rejected_row = max(pair.chosen_start, 1) - 1, max(pair.rejected_start, 1) - 1
        nll_row = chosen_row if completion_only_loss else 0
        fork = max(prefix - 1, 0)  # the row that predicts the first token of both rests
        first = min(nll_row, rejected_row, fork)
        first_w, first_l = max(nll_row, fork), max(rejected_row, fork)
        scored = (
            np.arange(first, fork),
            np.arange(first_w, len(chosen) - 1),
            np.arange(first_l, len(rejected) - 1),
        )
        in_rejected = np.where(scored[2] < prefix, scored[2], scored[2] - prefix + len(chosen))
        rows += [start + scored[0], start + scored[1], start + in_rejected]
        targets += [chosen[scored[0] + 1], chosen[scored[1] + 1], rejected[scored[2] + 1]]
        froms = ((chosen_row, first_w), (rejected_row, first_l), (nll_row, first_w))
        starts = (max(row - part, 0) for row, rest in froms for part in (first, rest))
        spans.append((*map(len, scored), *starts))
        # If the rejected sequence is the beginning of the chosen one, its last token is there.
        last_rejected = stop - 1 if stop > middle else start + len(rejected) - 1
        last.append((middle - 1, last_rejected if len(rejected) else -1))
        start = stop
    tensors = (
        torch.from_numpy(np.concatenate(parts).astype(np.int64))
        for parts in (ids, positions, rows, targets)
    )
    ids_T, positions_T, rows_N, targets_N = tensors
    # A segment is empty if one reply is the beginning of the other.
    kept = tuple(segment for segment in segments if segment[1] > segment[0])
    last_2P = torch.tensor(last).T.contiguous()
    return PackedPairs(
        _facts(pairs), ids_T, positions_T, kept, rows_N, targets_N, tuple(spans), last_2P
    )


def _facts(pairs: Sequence[TokenizedPair]) -> Tensor:
    """Return the fields of :class:`PairFacts` of P pairs, shape (4, P), float64."""
    rows = [
        (
            len(pair.chosen_ids) - max(pair.chosen_start, 1),
            max(len(pair.rejected_ids) - max(pair.rejected_start, 1), 0),
            pair.ref_chosen,
            pair.ref_rejected,
        )
        for pair in pairs
    ]
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


def nll_tokens(pair: TokenizedPair, *, completion_only_loss: bool) -> int:
    """Return how many tokens of the chosen sequence the NLL includes.

    The first token of a sequence never counts, because it is not predicted.
    """
    start = max(pair.chosen_start, 1) if completion_only_loss else 1
    return len(pair.chosen_ids) - start


@lru_cache(maxsize=1)
def epoch_order(count: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """Return a shuffle of ``range(count)`` that depends only on seed and epoch.

    The indices are sorted by a hash. No random generator is used: a generator has a state, and a
    new version of the generator's library may give another order.
    """

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(count), key=rank))


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Return how many optimizer steps ``count`` pairs need. The last step may have fewer pairs."""
    return math.ceil(count / global_batch_size)


@dataclass(frozen=True)
class Batching:
    """Settings for dividing the pairs of a step into forward passes.

    The loss of a step is the sum over all passes, so these settings do not change it.
    """

    packed: bool
    """True: all pairs of a pass are in one row without padding. False: rows are padded."""
    share: bool
    """True: the common prefix of a pair is computed once. Used only if packed."""
    tokens: int
    """The maximum number of tokens in one packed forward pass. A longer pair has its own pass."""
    pairs: int | None
    """The maximum number of pairs in one forward pass.

    None: if packed, as many pairs as ``tokens`` allows; otherwise one pair.
    """
    pad_id: int
    completion_only_loss: bool


Batch = PairBatch | PackedPairs


def make_batch(pairs: Sequence[TokenizedPair], batching: Batching) -> Batch:
    """Return the batch of one forward pass over these pairs."""
    only = batching.completion_only_loss
    if batching.packed:
        return pack_pairs(pairs, completion_only_loss=only, share=batching.share)
    return pad_pairs(pairs, pad_id=batching.pad_id, completion_only_loss=only)


def micro_batches(
    pairs: Sequence[TokenizedPair], batching: Batching, *, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """Return the micro-batches that one process runs in a step, as lists of indices into ``pairs``.

    The processes get nearly the same numbers of tokens, and the same number of micro-batches. If a
    process has fewer pairs than micro-batches, some of its micro-batches are empty. The result
    depends only on the arguments.

    A single process packs pairs by first-fit decreasing bin packing, so that a step has few
    micro-batches. Padded pairs are grouped by length.

    Args:
        pairs: all pairs of the step.
        batching: the settings.
        rank: the number of the process, from 0.
        world: the number of processes.
    """
    sizes = [_size(pair, batching) for pair in pairs]
    if world > 1:
        return _dealt(sizes, batching, world)[rank]
    if not batching.packed:
        return _grouped(sizes, range(len(pairs)), batching.pairs or 1)
    return _first_fit(sizes, range(len(pairs)), batching)


def _size(pair: TokenizedPair, batching: Batching) -> int:
    """Return the tokens of a pair in a packed row, or the width of its rows."""
    if batching.packed:
        return packed_tokens(pair, share=batching.share)
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


def _grouped(sizes: Sequence[int], members: Iterable[int], count: int) -> list[list[int]]:
    """Return groups of ``count`` members of similar size."""
    ordered = sorted(members, key=sizes.__getitem__)
    return [ordered[start : start + count] for start in range(0, len(ordered), count)]


def _first_fit(sizes: Sequence[int], members: Iterable[int], batching: Batching) -> list[list[int]]:
    """Return members in bins of at most ``batching.tokens``. A larger member is alone."""
    bins: list[list[int]] = []
    free: list[int] = []  # tokens
    most = batching.pairs or len(sizes)
    for index in sorted(members, key=lambda index: (-sizes[index], index)):
        fitting = (
            i for i, found in enumerate(bins) if sizes[index] <= free[i] and len(found) < most
        )
        place = next(fitting, len(bins))
        if place == len(bins):
            bins.append([])
            free.append(batching.tokens)
        bins[place].append(index)
        free[place] -= sizes[index]
    return bins


def _dealt(sizes: Sequence[int], batching: Batching, world: int) -> list[list[list[int]]]:
    """Return the micro-batches of each process.

    The pairs are dealt to the processes, and the pairs of a process to its micro-batches, so that
    the sizes are nearly equal. Processes that wait for each other in each pass then wait little.
    """
    if not sizes:
        return [[] for _ in range(world)]
    shares = deal(sizes, range(len(sizes)), world)
    if not batching.packed:
        count = batching.pairs or 1
        passes = max(-(-len(share) // count) for share in shares)
        grouped = [_grouped(sizes, share, -(-len(share) // passes) or 1) for share in shares]
        return [[*groups, *([] for _ in range(passes - len(groups)))] for groups in grouped]
    passes = max(len(_first_fit(sizes, share, batching)) for share in shares)
    while True:
        found = [deal(sizes, share, passes) for share in shares]
        if all(_fits(sizes, chunk, batching) for share in found for chunk in share):
            return found
        passes += 1


def _fits(sizes: Sequence[int], chunk: Sequence[int], batching: Batching) -> bool:
    is_small = sum(sizes[index] for index in chunk) <= batching.tokens
    return len(chunk) <= 1 or (is_small and len(chunk) <= (batching.pairs or len(chunk)))


def deal(sizes: Sequence[int], members: Iterable[int], count: int) -> list[list[int]]:
    """Return the members in ``count`` groups with nearly equal sums of sizes.

    The largest member that is left goes to the group with the smallest sum (longest processing time
    first: Graham, 1969). The group with the largest sum is the first one.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, 0, number) for number in range(count)]  # (sum, members, number)
    for index in sorted(members, key=lambda index: (-sizes[index], index)):
        total, length, number = heapq.heappop(heap)
        groups[number].append(index)
        heapq.heappush(heap, (total + sizes[index], length + 1, number))
    return [groups[number] for _, _, number in sorted(heap, key=lambda row: (-row[0], row[2]))]


def shortest(pairs: Sequence[TokenizedPair]) -> TokenizedPair:
    """Return the pair with the fewest tokens."""
    return min(pairs, key=lambda pair: len(pair.chosen_ids) + len(pair.rejected_ids))


def packed_tokens(pair: TokenizedPair, *, share: bool) -> int:
    """Return how many tokens a pair has in a packed row.

    ``share``: if True, the common prefix of chosen and rejected counts only once.
    """
    total = len(pair.chosen_ids) + len(pair.rejected_ids)
    if not share:
        return total
    return total - common_prefix(np.asarray(pair.chosen_ids), np.asarray(pair.rejected_ids))
