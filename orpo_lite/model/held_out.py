"""Compute the loss and the other metrics on held-out pairs, with the training's forward pass."""

from collections.abc import Generator, Sequence

import torch

from orpo_lite.data.packing import make_batch, micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.objectives.objective import Objective
from orpo_lite.recipe.schema import Recipe


def evaluate(
    model: PairModel,
    objective: Objective,
    pairs: Sequence[TokenizedPair],
    recipe: Recipe,
    *,
    pad_id: int,
    processes: Processes,
) -> Generator[tuple[int, int], None, dict[str, float]]:
    """Return metrics of ``pairs``, under the objective's names with the prefix ``eval_``.

    {} for no pairs. Yields (batch, batches). The NLL is divided by the tokens of all pairs, so it
    does not depend on the micro-batch. The later training is not changed by a single bit: there is
    no dropout, no generator is used, and the 4-bit weights stay as they are.
    """
    if not pairs:
        return {}
    divisors = objective.divisors(pairs)
    total = torch.zeros(len(objective.parts), dtype=torch.float64, device=processes.device)
    batching = model.batching(recipe, pad_id)
    share = micro_batches(pairs, batching, rank=processes.rank, world=processes.count)
    for number, chunk in enumerate(share):
        # Outside of `evaluating`: the caller that draws the progress keeps its gradients and mode.
        yield number, len(share)
        batch = make_batch([pairs[index] for index in chunk], batching)
        with model.evaluating():
            logps = model(batch.to(processes.device))
            total += objective.loss(logps, divisors)[1]
    return {
        f"eval_{name}": value
        for name, value in objective.metrics(processes.sum(total).tolist()).items()
    }
