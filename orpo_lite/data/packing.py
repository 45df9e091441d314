"""From tokenized pairs to the batches of one optimizer step: which pairs, in which order, in which tensors."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from orpo_lite.data.tokens import TokenizedPair


@dataclass(frozen=True)
class PairBatch:
    """P pairs as R = 2P right-padded rows of T tokens: the chosen rows, then the rejected rows in the same order."""

    input_ids_RT: Tensor
    attention_RT: Tensor
    """1 at tokens, 0 at padding; by position, never by id, for pad is often eos."""
    response_RT: Tensor
    """True at the tokens of the response."""
    counted_RT: Tensor
    """True at the tokens that the NLL counts (chosen rows)."""

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on another device."""
        tensors = (self.input_ids_RT, self.attention_RT, self.response_RT, self.counted_RT)
        return PairBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def pad_pairs(pairs: Sequence[TokenizedPair], *, pad_id: int, completion_only_loss: bool) -> PairBatch:
    """Pad pairs to the longest of their sequences. ``completion_only_loss`` leaves the prompt out of the NLL."""
    rows = [(pair.chosen_ids, pair.chosen_start) for pair in pairs]
    rows += [(pair.rejected_ids, pair.rejected_start) for pair in pairs]
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
    return PairBatch(input_ids_RT, token_RT.long(), response_RT, counted_RT)


def nll_tokens(pair: TokenizedPair, *, completion_only_loss: bool) -> int:
    """How many tokens of the pair the NLL counts; the first token of a sequence is predicted by nothing."""
    start = max(pair.chosen_start, 1) if completion_only_loss else 1
    return len(pair.chosen_ids) - start


@lru_cache(maxsize=1)
def epoch_order(count: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """A shuffle of ``range(count)`` that depends on (seed, epoch) alone: no generator state, no library version."""

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(count), key=rank))


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Optimizer steps that one pass over ``count`` pairs takes; the last one may be smaller."""
    return math.ceil(count / global_batch_size)


def micro_batches(
    indices: Sequence[int], pairs: Sequence[TokenizedPair], *, size: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """This process's share of a step's pairs in micro-batches, similar lengths together to save padding."""
    share = sorted(indices[rank::world], key=lambda index: (_width(pairs[index]), index))
    return [share[start : start + size] for start in range(0, len(share), size)]


def _width(pair: TokenizedPair) -> int:
    return max(len(pair.chosen_ids), len(pair.rejected_ids))
