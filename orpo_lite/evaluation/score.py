"""Score pairs with a loaded model: compute log-probabilities or rewards of both replies."""

from collections.abc import Generator, Sequence

from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.held_out import score
from orpo_lite.model.pair_model import PairModel, Route
from orpo_lite.model.probe import probe
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.schema import Recipe
from orpo_lite.updates import Update, staged


def score_pairs(
    model: PairModel,
    pairs: Sequence[TokenizedPair],
    recipe: Recipe,
    stage: str,
    route: Route | None = None,
) -> Generator[Update, None, PairScores]:
    """Yield progress; finally return the scores of P pairs: float64 tensors of shape (P,).

    The scores are in the order of the pairs. Afterwards, ``model.route`` is the route that packed
    pairs used.

    Args:
        model: the model, with or without an adapter.
        pairs: the P pairs.
        recipe: the recipe that says how pairs are packed.
        stage: the name of this task in the updates.
        route: how packed pairs go through the model. None: the probe chooses the fastest route that
            gives the same results as the model's own forward pass. If the recipe does not pack
            pairs, no route is used.
    """
    yield Update("stage", stage)
    if model.head.module is None:  # a merged reward model, but the probe needs an output head
        route = route or "rows"
    if route:
        model.route = route
    elif recipe.memory.packing:
        lengths = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
        probe(model, max(lengths))
    return (yield from staged(stage, score(model, pairs, recipe)))
