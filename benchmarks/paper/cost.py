"""E7: the rows and the time of a step of ORPO and of DPO."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.ours import our_step
from benchmarks.paper.check import Check, over_pairs
from benchmarks.paper.study import MAIN, Study, read_pairs
from orpo_lite.base.find import fetch_weights, find_base
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.held_out import score
from orpo_lite.model.load import load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.recipe.schema import Recipe
from orpo_lite.updates import run_to_end, staged

STEPS, BATCH = 8, 16
ORPO, DPO = {"loss.type": "orpo", "loss.beta": 1.0}, {"loss.type": "dpo", "loss.beta": 0.1}


class Trainer:
    """A model with its optimizer, on which steps of ORPO and of DPO are taken."""

    def __init__(self, study: Study, *, packing: bool) -> None:
        made = study.recipe(MAIN, "orpo-1", study.seeds[0])
        self.recipe: Recipe = made.override({"memory.packing": packing})
        base = fetch_weights(find_base(self.recipe.model.model_name_or_path, "main"))
        self.model: PairModel = load_pair_model(self.recipe, base, torch.device("cpu"))
        # So small that the model stays the same, and so does the work of a step.
        self.optimizer = torch.optim.AdamW([p for _, p in self.model.trained()], lr=1e-7)

    def reference(self, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """Return the pairs with their log-probabilities under the base: one forward pass."""
        with self.model.without_adapter():
            task = staged("", score(self.model, pairs, self.recipe))
            found = run_to_end(task, lambda _: None)
        known = zip(pairs, found.chosen_P.tolist(), found.rejected_P.tolist(), strict=True)
        return [replace(pair, ref_chosen=one, ref_rejected=two) for pair, one, two in known]

    def orpo(self, pairs: Sequence[TokenizedPair]) -> None:
        """Take a step of ORPO."""
        our_step(self.model, self.optimizer, [*pairs], self.recipe.override(ORPO))

    def dpo(self, pairs: Sequence[TokenizedPair]) -> None:
        """Take a step of DPO on pairs whose reference is known."""
        our_step(self.model, self.optimizer, [*pairs], self.recipe.override(DPO))

    def dpo_with_reference(self, pairs: Sequence[TokenizedPair]) -> None:
        """Take a step of DPO as in the paper: the reference is computed in the step."""
        self.dpo(self.reference(pairs))


@contextmanager
def counted_rows(model: PairModel) -> Iterator[list[int]]:
    """Collect the number of rows of each forward pass inside the ``with`` block."""
    rows: list[int] = []
    wrapped: Any = model.model
    embedding = wrapped.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    try:
        yield rows
    finally:
        hook.remove()


def compare(study: Study) -> tuple[list[Check], dict[str, Any]]:
    """Return the checks of E7, and the data of its plot."""
    train, _ = read_pairs(study.recipe(MAIN, "orpo-1", study.seeds[0]))
    batches = [
        [train[index] for index in range(start, start + BATCH)]
        for start in range(0, min(len(train) - BATCH + 1, STEPS * BATCH), BATCH)
    ]
    padded = Trainer(study, packing=False)
    known = padded.reference(batches[0])
    rows: dict[str, int] = {}
    for name, step, pairs in (
        ("ORPO", padded.orpo, batches[0]),
        ("DPO, reference in the step", padded.dpo_with_reference, batches[0]),
        ("DPO, reference known", padded.dpo, known),
    ):
        with counted_rows(padded.model) as found:
            step(pairs)
        rows[name] = sum(found)
    packed = Trainer(study, packing=True)
    steps = {
        "ORPO": packed.orpo,
        "DPO, reference in the step": packed.dpo_with_reference,
        "DPO, reference known": packed.dpo,
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate([batches[0], *batches]):
        with_reference = packed.reference(batch)
        for name, step in steps.items():
            began = time.perf_counter()
            step(with_reference if name == "DPO, reference known" else batch)
            if number:  # the first batch warms up
                seconds[name].append(time.perf_counter() - began)
    return _checks(rows, seconds, study.epochs), {
        "rows": rows,
        "seconds": {name: round(float(np.median(values)), 4) for name, values in seconds.items()},
    }


def _checks(rows: dict[str, int], seconds: dict[str, list[float]], epochs: float) -> list[Check]:
    orpo, in_step, known = rows
    reference = rows[in_step] - rows[known]  # the rows of one reference pass
    checks = [
        Check(
            "rows of a step of ORPO over those of DPO with the reference in the step: exactly half",
            "one step",
            rows[orpo] / rows[in_step],
            minimum=0.5,
            maximum=0.5,
        ),
        Check(
            f"the same for a training of {epochs:g} epochs, with the reference computed once",
            "calculated from it",
            epochs * rows[orpo] / (epochs * rows[known] + reference),
            is_claim=False,
        ),
    ]
    for name in (in_step, known):
        ratios = np.array(seconds[name]) / np.array(seconds[orpo])
        timed = over_pairs(
            f"time of a step of {name}, over a step of ORPO",
            f"{len(ratios)} steps",
            [(ratios, range(len(ratios)))],
            is_claim=False,
        )
        checks.append(replace(timed, each=[]))  # no training
    return checks
