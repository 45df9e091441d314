"""Stored figures of TRL's trainers: each objective still gives them where TRL has gone.

Both sides compute in float64, so that the rounding of a CPU does not grow over the steps.

``python tests/training/test_trl_objectives.py`` writes them with the installed TRL.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from test_objectives import settings_of
from test_step import lora_model

from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.held_out import score
from orpo_lite.model.optimizer import make_optimizer
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.objectives.objective import find_objective
from orpo_lite.training.step import accumulate, update
from orpo_lite.updates import run_to_end, staged

BATCH = 4
LEARNING_RATE = 1e-3  # with a higher one, hinge and simpo have almost no gradient after a step
FILE = Path(__file__).with_name("trl_figures.json")


def our_model(loss: dict[str, Any]) -> PairModel:
    task = "SEQ_CLS" if loss["type"] == "reward" else "CAUSAL_LM"
    return lora_model(tiny_llama(len(byte_tokenizer())), torch.float64, task=task)


def our_steps(
    ours: PairModel, loss: dict[str, Any], pairs: Sequence[TokenizedPair]
) -> Iterator[dict[str, float]]:
    """Take a step on each batch of pairs; yield its metrics. The gradients are still there."""
    settings = settings_of(
        loss, training__optim="adamw_torch", training__learning_rate=LEARNING_RATE
    )
    if loss["type"] == "dpo":
        pairs = with_reference(ours, pairs, settings)
    objective, trained = find_objective(settings.loss), [p for _, p in ours.trained()]
    optimizer, scaler = (
        make_optimizer(settings, trained),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    optimizer.param_groups[0]["lr"] = LEARNING_RATE
    for start in range(0, len(pairs), BATCH):
        parts = accumulate(
            ours,
            objective,
            pairs[start : start + BATCH],
            ours.batching(settings, 0),
            step=start // BATCH,
            seed=0,
            processes=Processes(cpu=True),
            scaler=scaler,
        )
        found = objective.metrics(parts)
        yield found
        update(trained, optimizer, scaler, found["loss"], settings.training.max_grad_norm)


def with_reference(
    model: PairModel, pairs: Sequence[TokenizedPair], settings: Any
) -> list[TokenizedPair]:
    scores = run_to_end(staged("", score(model, pairs, settings)), lambda _: None)
    columns = scores.chosen_P.tolist(), scores.rejected_P.tolist()
    return [
        replace(pair, ref_chosen=one, ref_rejected=other)
        for pair, one, other in zip(pairs, *columns, strict=True)
    ]


def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return found


@pytest.mark.parametrize("case", stored())
def test_ten_steps_equal_the_stored_figures_of_trl(case: str) -> None:
    loss, rows, steps = (stored()[case][name] for name in ("loss", "pairs", "steps"))
    ours = our_model(loss)
    pairs = [TokenizedPair(*row, "") for row in rows]
    assert len(steps) == len(pairs) / BATCH == 10
    for step, (found, expected) in enumerate(zip(our_steps(ours, loss, pairs), steps, strict=True)):
        norm = torch.cat([p.grad.flatten() for _, p in ours.trained()]).norm()  # type: ignore[union-attr]
        for name, value in expected.items():
            mine = norm.item() if name == "norm of gradients" else found[name]
            assert mine == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
