"""Judge a training: compare the saved adapter with the model before the training."""

import math
from pathlib import Path
from typing import Any

import torch

from orpo_lite.data.cache import TokenizedPairs
from orpo_lite.errors import CheckpointError
from orpo_lite.evaluation.compare import Evaluation, compare, name_pairs
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.records import SCORES, read_scores

VERDICT = "verdict.json"
BASE, START, TUNED = "base", "the adapter it started from", "tuned"
UNTRAINED = "the untrained score head"


def judge_training(recipe: Recipe, pairs: TokenizedPairs, path: Path, kept: int) -> Evaluation:
    """Compare the kept adapter with the model before the training, and write verdict.json.

    Args:
        recipe: the recipe of the run.
        pairs: the held-out pairs of the run.
        path: the run folder.
        kept: the step whose adapter was kept.

    Raises:
        CheckpointError: pair_scores.jsonl has no scores for step 0 or ``kept``, or has scores for
            another number of pairs.
    """
    rows = {row["step"]: row for row in read_scores(path)}
    start = UNTRAINED if recipe.loss.trains_reward_model else BASE
    if recipe.model.adapter_name_or_path:
        start = START
    found: dict[str, PairScores] = {}
    for name, step in ((start, 0), (TUNED, kept)):
        scores = _scores(rows.get(step, {}))
        if len(scores.chosen_P) != len(pairs):
            raise CheckpointError(
                where=str(path / SCORES),
                found=f"has scores for {len(scores.chosen_P)} of {len(pairs)} held-out pairs at "
                f"step {step}",
                expected="a score for each held-out pair of the run",
                fix=f"orpo-lite eval {path} computes the scores",
            )
        found[name] = scores
    evaluation = compare(
        pairs,
        found,
        [(TUNED, start)],
        held_out=True,
        data=name_pairs(recipe.data, is_test=True),
    )
    write_text(path / VERDICT, to_json(evaluation.to_json()))
    return evaluation


def _scores(row: dict[str, Any]) -> PairScores:
    """Return the scores in a row of pair_scores.jsonl. A null in the row becomes NaN."""
    columns = (row.get(name, []) for name in ("chosen", "rejected", "nll", "nll_tokens"))
    known = ([math.nan if value is None else value for value in column] for column in columns)
    return PairScores(*(torch.tensor(column, dtype=torch.float64) for column in known))
