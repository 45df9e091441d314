"""Runs of segments for a kernel that pads: all of a row, in order, and never much larger padded."""

import random

import pytest
import torch

from orpo_lite.ops.segments import PADDING, Segment, similar_runs

CPU = torch.device("cpu")


def row(lengths: list[tuple[int, int]]) -> tuple[Segment, ...]:
    """Segments of these (own, prefix) lengths; each prefix is the beginning of the row."""
    segments, start = [], 0
    for length, prefix in lengths:
        segments.append(Segment(start, start + length, 0, prefix))
        start += length
    return tuple(segments)


LENGTHS = {
    "one long, many short": [(2_048, 0)] + [(20, 0)] * 100,
    "long and short in turn": [(900, 0), (30, 850)] * 6,
    "random": [(random.Random(i).randrange(1, 500), 0) for i in range(40)],
    "one": [(7, 0)],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_run_padded_to_its_longest_sequence_is_at_most_twice_as_large(name: str) -> None:
    segments = row(LENGTHS[name])
    runs = similar_runs(segments, CPU)
    assert runs[0].queries.start == runs[0].keys.start == 0
    for before, after in zip(runs, runs[1:], strict=False):
        assert (after.queries.start, after.keys.start) == (before.queries.stop, before.keys.stop)
    assert runs[-1].queries.stop == sum(segment.length for segment in segments)
    for run in runs:
        count = len(run.starts_q) - 1
        tokens = run.queries.stop - run.queries.start
        keys = run.keys.stop - run.keys.start
        assert (int(run.starts_q[-1]), int(run.starts_k[-1])) == (tokens, keys)
        assert count * run.longest_q <= PADDING * tokens
        assert count * run.longest_k <= PADDING * keys
    assert len(similar_runs(row([(100, 0)] * 50), CPU)) == 1
