"""Pairs that are known by their lengths alone."""

import numpy as np
from numpy.typing import NDArray

from orpo_lite.data.pair import TokenizedPair

Triples = NDArray[np.int64]
"""Tokens of each pair: (common prefix, chosen, rejected), shape (pairs, 3)."""


def worst_case(max_length: int, pairs: int) -> Triples:
    """Pairs of two sequences of ``max_length`` tokens that share nothing: nothing longer can come."""
    return np.tile(np.array([[0, max_length, max_length]]), (pairs, 1))


def blank_pairs(triples: Triples) -> list[TokenizedPair]:
    """Pairs of these lengths; their tokens are of no account on meta."""
    pairs = []
    for prefix, chosen, rejected in triples.tolist():
        ids = np.zeros(chosen, np.int32), np.r_[np.zeros(prefix, np.int32), np.ones(rejected - prefix, np.int32)]
        start = max(1, min(prefix, chosen - 1, rejected - 1))
        pairs.append(TokenizedPair(*ids, start, start, "plan"))
    return pairs
