"""Plan: whether a recipe fits a card, how fast it will be and what to change, without weights and without a GPU."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orpo_lite import demo
from orpo_lite.base.adapter import adopt_adapter
from orpo_lite.base.find import check_embedding, find_config, find_texts
from orpo_lite.data.prepare import find_sources, pair_lengths, tokenized_splits
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS
from orpo_lite.ops.devices import device_kind
from orpo_lite.planning.gpus import GPUS, Gpu, LocalGpu, local_gpu, memory_budget
from orpo_lite.planning.on_meta import worst_case
from orpo_lite.planning.search import Change, GpuRow, MemoryPlan, Planner, no_plan
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import gib
from orpo_lite.runs.folder import KEPT_CHECKPOINTS
from orpo_lite.updates import Update, run_to_end, with_torch_defaults

ASSUMED = next(
    gpu for gpu in GPUS if "24 GB" in gpu.name
)  # where there is no card and nobody names a budget


@dataclass(frozen=True)
class PlanReport:
    """What `orpo-lite plan` shows."""

    base: str
    plan: MemoryPlan
    own: LocalGpu | None
    """The card that is here."""
    from_data: bool
    """Whether lengths are those of the data, not the most that data.max_length allows."""
    rows: list[GpuRow]
    """Other cards, and first the one that was planned for."""
    changes: list[Change]
    """What would help where it does not fit."""
    disk: dict[str, int]
    """Bytes: download, checkpoints, merged."""
    is_verdict: bool
    """Whether the answer stands: for the person's budget or card; or because no card that is known has the memory."""
    notes: list[str]
    """What the person should know, a line each."""

    def to_json(self) -> dict[str, Any]:
        """All of it, in bytes and seconds."""
        return {
            "base": self.base,
            **self.plan.to_json(),
            "lengths": "data" if self.from_data else "data.max_length",
            "disk_bytes": self.disk,
            "notes": self.notes,
            "card_free_bytes": self.own.free if self.own else None,
            "card_held_by_others_bytes": self.own.others if self.own else None,
            "cards": [
                {
                    "card": row.gpu.name,
                    "memory_bytes": row.gpu.memory,
                    "fits": row.levers is not None,
                    "needed_bytes": row.needed,
                    "levers": dict(row.levers) if row.levers else None,
                    "seconds_per_pair": row.seconds_per_pair,
                }
                for row in self.rows
            ],
            "changes": [
                {"keys": dict(c.keys), "needed_bytes": c.needed, "fits": c.fits}
                for c in self.changes
            ],
        }


def plan(recipe: Recipe, *, with_data: bool = False) -> PlanReport:
    """Plan a recipe for the card that is here, for ``memory.budget``, or else for one of 24 GB.

    Args:
        recipe: its base is known by its configuration alone; that of a shipped recipe needs no network.
        with_data: read the data, which needs the tokenizer, and plan for its longest pairs; else for two sequences of
            ``data.max_length`` tokens that share nothing.

    Raises:
        OrpoLiteError: a base or data that cannot be read.
    """
    return run_to_end(plan_events(recipe, with_data=with_data), lambda _: None)


@with_torch_defaults
def plan_events(recipe: Recipe, *, with_data: bool = False) -> Generator[Update, None, PlanReport]:
    """:func:`plan` as a generator of what is being done."""
    recipe, asked_name = adopt_adapter(recipe), recipe.model.model_name_or_path
    if any(
        name.startswith("builtin:")
        for name in (recipe.model.model_name_or_path, *recipe.data.names)
    ):
        for _ in demo.make_builtin(recipe, weights=False):
            pass
        recipe = demo.resolve_builtin(recipe)
    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    config = find_config(name, revision)
    check_embedding(recipe, config)
    triples = worst_case(recipe.data.max_length, recipe.training.global_batch_size)
    if with_data:
        train, _, _ = yield from tokenized_splits(
            recipe, find_texts(name, revision)[0], *find_sources(recipe.data)
        )
        triples = pair_lengths(train)
    own = local_gpu()
    kind = device_kind(torch.device("cuda", 0)) if own else "ampere"
    budget = memory_budget(recipe.memory.budget_bytes, own)
    yield Update("stage", "counting steps of a few layers")
    try:
        planner = Planner(recipe, config, triples, kind)
        return (yield from _report(recipe, asked_name, planner, own, budget, with_data))
    except MODEL_CODE_ERRORS as error:
        raise no_plan(asked_name, error) from error


def _report(
    recipe: Recipe,
    name: str,
    planner: Planner,
    own: LocalGpu | None,
    asked: int | None,
    from_data: bool,
) -> Generator[Update, None, PlanReport]:
    if own:
        gpu = own.gpu
    elif asked is not None:
        gpu = replace(_like(asked), memory=asked)
    else:
        larger = [other for other in GPUS if other.memory >= ASSUMED.memory]
        gpu = next((other for other in larger if planner.least(other) <= other.memory), GPUS[-1])
    budget = gpu.memory if asked is None else asked
    least = planner.least(gpu)
    verdict = "yes, it fits" if least <= budget else "no, it does not fit"
    yield Update(
        "note", f"{verdict}: the settings that need least take {gib(least)} of {gib(budget)}"
    )
    yield Update("stage", "looking for the fastest settings that fit")
    found = planner.plan(budget, gpu)
    yield Update("stage", "planning for other cards")
    name_of_first = (
        gpu.name if recipe.memory.budget_bytes is None else f"memory.budget={recipe.memory.budget}"
    )
    first = replace(gpu, name=name_of_first, memory=budget)
    rows = [planner.row(first), *(planner.row(other) for other in GPUS if other != first)]
    is_verdict = asked is not None or not found.fits  # what fits none of the cards fits nobody's
    changes = planner.changes(budget, gpu) if is_verdict and not found.fits else []
    return PlanReport(
        base=name,
        plan=found,
        own=own,
        from_data=from_data,
        rows=rows,
        changes=changes,
        disk=_disk(found, recipe, is_local=Path(recipe.model.model_name_or_path).is_dir()),
        is_verdict=is_verdict,
        notes=[*found.measured.notes, *_too_long(planner)],
    )


def _too_long(planner: Planner) -> list[str]:
    """That training would refuse such pairs, as ``prepare_inputs`` does."""
    limit = getattr(planner.config.get_text_config(), "max_position_embeddings", None)
    longest = int(planner.triples[:, 1:].max())
    if not limit or longest <= limit:
        return []
    return [
        f"the base reads {limit:,} tokens, and training refuses pairs of {longest:,}: data.max_length={limit}"
    ]


def _like(budget: int) -> Gpu:
    """The smallest of the known cards that has so much, for its speed."""
    return next((gpu for gpu in GPUS if gpu.memory >= 0.95 * budget), GPUS[-1])


def _disk(found: MemoryPlan, recipe: Recipe, *, is_local: bool) -> dict[str, int]:
    half = 2 * found.measured.weights
    adapter = found.measured.held["adapter"]
    disk = {} if is_local else {"download": half}
    disk |= {"checkpoints": 3 * adapter * (KEPT_CHECKPOINTS + 2), "adapter": adapter}
    return disk | ({"merged": half} if recipe.output.merge else {})
