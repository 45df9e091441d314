"""Compute the scores and metrics of held-out pairs, with the forward pass of the training."""

from collections.abc import Generator, Sequence

import torch

from orpo_lite.data.packing import PairFacts, make_batch, micro_batches, shortest
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.model.sharding import is_sharded
from orpo_lite.objectives.objective import Objective
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.schema import Recipe

Passes = list[tuple[list[int], PairScores, PairFacts]]
"""For each forward pass, the indices of its pairs, their log-probabilities and their facts."""


def evaluate(
    model: PairModel,
    objective: Objective,
    pairs: Sequence[TokenizedPair],
    recipe: Recipe,
    *,
    pad_id: int,
    processes: Processes,
) -> Generator[tuple[int, int], None, tuple[dict[str, float], PairScores]]:
    """Yield (batches done, all batches) as progress; finally return metrics and scores of P pairs.

    An evaluation does not change the training that follows, not even by rounding: there is no
    dropout, no random generator is used, and the 4-bit weights do not change.

    Returns:
        The objective's metrics, with names such as ``eval_loss``; {} if there are no pairs.
        The metrics do not depend on the micro-batches, because the sum of the NLL over all pairs
        is divided by the number of tokens in this sum.

        The scores: the log-probabilities of each pair, in the order of ``pairs``. Each tensor has
        shape (P,), float64, and is on the CPU. Every process gets the scores of all pairs.
    """
    passes = yield from _forward(
        model, pairs, recipe, pad_id=pad_id, rank=processes.rank, world=processes.count
    )
    scores = _in_order(passes, len(pairs), processes.device)
    if not pairs:
        return {}, PairScores(*scores)
    divisors = objective.divisors(pairs)
    total = torch.zeros(len(objective.parts), dtype=torch.float64, device=processes.device)
    for _, logps, facts in passes:
        total += objective.loss(logps, facts, divisors)[1]
    metrics = objective.metrics(processes.sum(total).tolist())
    named = {f"eval_{name}": value for name, value in metrics.items()}
    return named, PairScores(*processes.sum(scores).cpu())


def score(
    model: PairModel,
    pairs: Sequence[TokenizedPair],
    recipe: Recipe,
    *,
    pad_id: int = 0,
    processes: Processes | None = None,
) -> Generator[tuple[int, int], None, PairScores]:
    """Yield (batches done, all batches) as progress; finally return the scores of the pairs.

    The scores have the same form as in :func:`evaluate`. ``processes`` divide the pairs among them;
    if it is None, each process that calls this function computes the scores of all pairs.
    """
    rank, world = (processes.rank, processes.count) if processes else (0, 1)
    passes = yield from _forward(model, pairs, recipe, pad_id=pad_id, rank=rank, world=world)
    scores = _in_order(passes, len(pairs), model.device)
    return PairScores(*(processes.sum(scores) if processes else scores).cpu())


def _forward(
    model: PairModel,
    pairs: Sequence[TokenizedPair],
    recipe: Recipe,
    *,
    pad_id: int,
    rank: int = 0,
    world: int = 1,
) -> Generator[tuple[int, int], None, Passes]:
    batching = model.batching(recipe, pad_id)
    share = micro_batches(pairs, batching, rank=rank, world=world)
    passes: Passes = []
    for number, chunk in enumerate(share):
        # Yield outside of `evaluating`, so that the caller's gradient setting does not change.
        yield number, len(share)
        if not chunk and not is_sharded(model):
            continue
        # Processes that share the base run the same number of passes, with the shortest pair if
        # they have no other.
        chosen = [pairs[index] for index in chunk] or [shortest(pairs)]
        batch = make_batch(chosen, batching).to(model.device)
        with model.evaluating():
            logps = model(batch)
        if chunk:
            passes.append((chunk, logps, batch.facts))
    return passes


def _in_order(passes: Passes, count: int, device: torch.device) -> torch.Tensor:
    """Return the scores of P pairs, shape (4, P). The scores of other processes' pairs are 0."""
    scores_4P = torch.zeros(4, count, dtype=torch.float64, device=device)
    for chunk, logps, _ in passes:
        scores_4P[:, chunk] = torch.stack([values_P.double() for values_P in logps])
    return scores_4P
