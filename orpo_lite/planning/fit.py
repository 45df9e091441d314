"""Fit a training into a budget, or say which changes of the recipe would fit."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orpo_lite.errors import FitError, ModelError, Overrides
from orpo_lite.planning.gpus import Gpu
from orpo_lite.planning.on_meta import Triples
from orpo_lite.planning.search import Change, MemoryPlan, Planner
from orpo_lite.planning.share import why_not_shared
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import gib, to_text

logger = logging.getLogger(__name__)


def no_plan(name: str, error: Exception) -> ModelError:
    """Return the error for a model whose memory cannot be measured with meta tensors."""
    logger.warning("the step could not be measured", exc_info=error)
    return ModelError(
        where=f"model {name}",
        found=f"a training step cannot be measured without weights ({type(error).__name__})",
        fix="set the memory.* keys in the recipe; the training uses their values unchanged",
    )


def fit(
    recipe: Recipe,
    config: Any,
    triples: Triples,
    kind: str,
    budget: int,
    gpu: Gpu | None,
    shares: Sequence[int] = (),
) -> MemoryPlan:
    """Return the fastest plan within ``budget`` bytes.

    ``shares``: numbers of processes that may share the base if it does not fit whole. The first one
    that fits is a setting of the plan: ``shard``. A base that cannot be shared stays whole.

    Raises:
        FitError: no plan fits. The fix lists the recipe changes that are enough, if there are any.
    """
    planner = Planner(recipe, config, triples, kind)
    plan = planner.plan(budget, gpu)
    if plan.fits:
        return plan
    reason = why_not_shared(planner) if shares else ""
    for shards in [] if reason else shares:
        planner = planner.sharing(shards)
        plan = planner.plan(budget, gpu)
        if plan.fits:
            return replace(plan, settings={**plan.settings, "shard": shards})
    raise does_not_fit(plan, planner.changes(budget, gpu), planner.recipe.memory.shards, reason)


def does_not_fit(
    plan: MemoryPlan, changes: Sequence[Change], shards: int = 1, not_shared: str = ""
) -> FitError:
    """Return the error for a plan over budget. The fix lists each change that alone is enough.

    Args:
        plan: the plan that needs the least memory.
        changes: changes of its recipe.
        shards: the number of processes that share the base in this plan.
        not_shared: why the processes do not share the base; "" if there is no reason to say.
    """
    found = f"at least {gib(plan.needed)} are needed, and the budget is {gib(plan.budget or 0)}"
    if shards > 1:
        found += f"; {shards} processes share the base"
    if not_shared:
        found += f"; the processes cannot share the base: {not_shared}"
    lines = []
    for change in changes:
        keys = " ".join(f"{key}={to_text(value)}" for key, value in change.keys.items())
        verdict = "fits" if change.fits else "still too much"
        lines.append(
            f"{keys}: {gib(change.needed)} ({gib(plan.needed - change.needed)} less), {verdict}"
        )
    useful = [line for line, change in zip(lines, changes, strict=True) if change.fits]
    if useful:
        first = "set one of these; keys other than memory.* change the trained model:"
    else:
        useful = lines[-1:]
        more = "more processes, " if shards > 1 else ""
        first = f"use another base, {more}or a GPU with more memory; no single change is enough"
    text = "\n    ".join([first, *useful])
    fitting = [change.keys for change in changes if change.fits]
    return FitError(
        where="memory.budget",
        found=found,
        fix=Overrides(fitting[0], text=text) if fitting else text,
    )
