"""Plan a recipe without weights or a GPU: report whether it fits, its speed, and what to change."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orpo_lite import demo
from orpo_lite.base.adapter import INITIAL, adopt_adapter, missing_adapters
from orpo_lite.base.find import check_embedding, find_config, find_text_files
from orpo_lite.data.prepare import find_sources, step_lengths, tokenized_splits
from orpo_lite.errors import ModelError
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS
from orpo_lite.model.parallel import check_processes
from orpo_lite.objectives.objective import find_objective
from orpo_lite.ops.devices import device_kind
from orpo_lite.planning.fit import no_plan
from orpo_lite.planning.gpus import GPUS, Gpu, LocalGpu, local_gpu, memory_budget
from orpo_lite.planning.on_meta import worst_case
from orpo_lite.planning.processes import ProcessPlan, plan_processes
from orpo_lite.planning.search import Change, GpuRow, MemoryPlan, Planner
from orpo_lite.planning.share import why_not_shared
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import gib
from orpo_lite.runs.folder import KEPT_CHECKPOINTS
from orpo_lite.updates import Update, run_to_end, with_torch_defaults

DEFAULT_GPU = next(gpu for gpu in GPUS if "24 GB" in gpu.name)
"""The GPU to plan for if this machine has no GPU and memory.budget is not set."""


@dataclass(frozen=True)
class PlanReport:
    """The report of `orpo-lite plan`."""

    base: str
    plan: MemoryPlan
    local: LocalGpu | None
    """This machine's GPU; None if there is none."""
    from_data: bool
    """True if the plan uses the lengths of the data; False if it uses data.max_length."""
    rows: list[GpuRow]
    """One row per GPU. The first row is the GPU that ``plan`` is for."""
    changes: list[Change]
    """Changes that need less memory; empty if the recipe fits. With several GPUs, they are changes
    of the last of ``processes``, which needs the least memory."""
    disk: dict[str, int]
    """Bytes on disk, for the keys download, checkpoints, adapter and merged."""
    is_verdict: bool
    """Whether ``plan.fits`` is the final answer for the user.

    It is final if the plan is for the user's own GPU or budget. Otherwise the plan is for an
    assumed GPU. Then False is final, because no known GPU fits, but True is not."""
    notes: list[str]
    """Notes for the user, one line each."""
    processes: list[ProcessPlan] = field(default_factory=list)
    """Plans for several GPUs: with the whole base on each, and with a shared base."""

    @property
    def fits(self) -> bool:
        """True if the training fits on one GPU, or on several if these are planned for."""
        plans = [several.memory for several in self.processes] or [self.plan]
        return any(plan.fits for plan in plans)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a dict for JSON. Sizes are in bytes, and times in seconds."""
        return {
            "base": self.base,
            **self.plan.to_json(),
            "lengths": "data" if self.from_data else "data.max_length",
            "disk_bytes": self.disk,
            "notes": self.notes,
            "card_free_bytes": self.local.free if self.local else None,
            "card_held_by_others_bytes": self.local.others if self.local else None,
            "cards": [
                {
                    "card": row.gpu.name,
                    "memory_bytes": row.gpu.memory,
                    "fits": row.settings is not None,
                    "needed_bytes": row.needed,
                    "levers": dict(row.settings) if row.settings else None,
                    "seconds_per_pair": row.seconds_per_pair,
                }
                for row in self.rows
            ],
            "changes": [
                {"keys": dict(c.keys), "needed_bytes": c.needed, "fits": c.fits}
                for c in self.changes
            ],
            **({"processes": [p.to_json() for p in self.processes]} if self.processes else {}),
        }


def plan(recipe: Recipe, *, with_data: bool = False, processes: int = 1) -> PlanReport:
    """Plan a recipe for this machine's GPU, within ``memory.budget`` if this key is set.

    Without a GPU, plan for ``memory.budget``. If ``memory.budget`` is also not set,
    plan for the smallest known GPU with at least 24 GB on which the training fits. If the training
    fits on no known GPU, plan for the largest known GPU.

    Args:
        recipe: the recipe. The configuration of the base is read, but not the weights. For the base
            of a shipped recipe, reading the configuration needs no network.
        with_data: if True, tokenize the data and plan for its longest pairs. If False, plan for
            pairs of two sequences of ``data.max_length`` tokens with no common prefix.
        processes: the number of GPUs. With more than one, the report has plans for them too. It is
            at least ``memory.shard``.

    Raises:
        OrpoLiteError: the base or the data cannot be read.
    """
    events = plan_events(recipe, with_data=with_data, processes=processes)
    return run_to_end(events, lambda _: None)


@with_torch_defaults
def plan_events(
    recipe: Recipe, *, with_data: bool = False, processes: int = 1
) -> Generator[Update, None, PlanReport]:
    """Yield the progress of :func:`plan`; finally return its result."""
    processes = max(processes, recipe.memory.shards)
    if processes > 1:
        check_processes(recipe, processes)
    asked_name, missing = recipe.model.model_name_or_path, missing_adapters(recipe)
    if INITIAL not in missing:
        recipe = adopt_adapter(recipe)
    names = (recipe.model.model_name_or_path, *recipe.data.names)
    if any(name.startswith("builtin:") for name in names):
        for _ in demo.make_builtin(recipe, weights=False):
            pass
        recipe = demo.resolve_builtin(recipe)
    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    config = find_config(name, revision)
    check_embedding(recipe, config)
    has_rejected = "rejected" in find_objective(recipe.loss).needs
    triples = worst_case(
        recipe.data.max_length, recipe.training.global_batch_size, has_rejected=has_rejected
    )
    if with_data:
        train, _, _ = yield from tokenized_splits(
            recipe, find_text_files(name, revision)[0], *find_sources(recipe.data)
        )
        triples = step_lengths(recipe, train if has_rejected else train.without_rejected())
    local = local_gpu()
    if recipe.model.device == "cpu":
        local = None
        yield Update("note", "model.device=cpu trains on the CPU, but this plan is for a GPU")
    kind = device_kind(torch.device("cuda", 0)) if local else "ampere"
    budget = memory_budget(recipe.memory.budget_bytes, local)
    yield Update("stage", "measuring steps of models with few layers")
    try:
        planner = Planner(recipe, config, triples, kind)
        report = yield from _report(
            recipe, asked_name, planner, local, budget, with_data, processes
        )
    except MODEL_CODE_ERRORS as error:
        raise no_plan(asked_name, error) from error
    return replace(report, notes=[*report.notes, *_notes_on_adapters(missing)])


def _report(
    recipe: Recipe,
    name: str,
    planner: Planner,
    local: LocalGpu | None,
    wanted: int | None,
    from_data: bool,
    processes: int,
) -> Generator[Update, None, PlanReport]:
    if local:
        gpu = local.gpu
    elif wanted is not None:
        gpu = replace(_similar_gpu(wanted), memory=wanted)
    else:
        larger = [other for other in GPUS if other.memory >= DEFAULT_GPU.memory]
        fitting = (other for other in larger if planner.least_bytes(other) <= other.memory)
        gpu = next(fitting, GPUS[-1])
    budget = gpu.memory if wanted is None else wanted
    least = planner.least_bytes(gpu)
    verdict = "yes, it fits" if least <= budget else "no, it does not fit"
    yield Update(
        "note", f"{verdict}: at least {gib(least)} are needed, and the limit is {gib(budget)}"
    )
    yield Update("stage", "looking for the fastest memory settings that fit")
    found = planner.plan(budget, gpu)
    yield Update("stage", "planning for other GPUs")
    name_of_first = gpu.name
    if recipe.memory.budget_bytes is not None:
        name_of_first = f"memory.budget={recipe.memory.budget}"
    first = replace(gpu, name=name_of_first, memory=budget)
    others = planner
    if planner.kind != "ampere":  # all known GPUs are of that generation or later
        others = Planner(recipe, planner.config, planner.triples, "ampere")
    rows = [planner.row(first), *(others.row(other) for other in GPUS if other != first)]
    several: list[ProcessPlan] = []
    notes = [*found.measured.notes, *_notes_on_length(planner), *_notes_on_loss(recipe)]
    if processes > 1:
        yield Update("stage", f"planning for {processes} processes")
        whole = found if recipe.memory.shards == 1 else planner.sharing(1).plan(budget, gpu)
        reason = why_not_shared(planner) if recipe.memory.shard != "off" else ""
        several = plan_processes(planner, whole, gpu, budget, processes, can_share=not reason)
        if reason:
            notes.append(f"the processes cannot share the base: {reason}")
    # If no known GPU fits, the user's GPU does not fit either.
    is_verdict = wanted is not None or not found.fits
    changes = []
    if is_verdict and not any(plan.fits for plan in [found, *(p.memory for p in several)]):
        last = planner.sharing(several[-1].shards) if several else planner
        changes = last.changes(budget, gpu)
    return PlanReport(
        base=name,
        plan=found,
        local=local,
        from_data=from_data,
        rows=rows,
        changes=changes,
        disk=_disk(found, recipe, is_local=Path(recipe.model.model_name_or_path).is_dir()),
        is_verdict=is_verdict,
        notes=notes,
        processes=several,
    )


def _notes_on_loss(recipe: Recipe) -> list[str]:
    """Return a note if the training computes log-probabilities of a reference model first."""
    if "reference" not in find_objective(recipe.loss).needs:
        return []
    return [
        f"loss.type={recipe.loss.type}: before the first step, the log-probabilities of the "
        "reference model are computed: one forward pass of each pair, without gradients, which "
        "needs less memory than a step; a later run on the same base and data reads them"
    ]


def _notes_on_adapters(missing: Mapping[str, ModelError]) -> list[str]:
    """Return a note for each adapter that a training would read and that is not there."""
    notes = []
    for key, error in missing.items():
        plan = ""
        if key == INITIAL:
            plan = "; this plan is for a new adapter with the settings of the section lora"
        notes.append(f"{error.where}: {error.found}{plan}; before training: {error.fix}")
    return notes


def _notes_on_length(planner: Planner) -> list[str]:
    """Return a note if the base cannot read the longest sequence. A training would refuse it."""
    limit = getattr(planner.config.get_text_config(), "max_position_embeddings", None)
    longest = int(planner.triples[:, 1:].max())
    if not limit or longest <= limit:
        return []
    return [
        f"the base reads at most {limit:,} tokens, so training refuses a sequence of {longest:,}: "
        f"set data.max_length={limit}"
    ]


def _similar_gpu(budget: int) -> Gpu:
    """Return the smallest known GPU with 95% of ``budget`` bytes or more. Its speed is assumed."""
    return next((gpu for gpu in GPUS if gpu.memory >= 0.95 * budget), GPUS[-1])


def _disk(found: MemoryPlan, recipe: Recipe, *, is_local: bool) -> dict[str, int]:
    """Return the bytes on disk that a run needs. ``is_local``: the base needs no download."""
    base_16bit = 2 * found.measured.weights
    trained = found.measured.held["gradients"]  # in float32, as the adapters
    disk = {}
    if not is_local:
        disk["download"] = base_16bit
    disk["checkpoints"] = 3 * trained * (KEPT_CHECKPOINTS + 2)
    disk["adapter"] = trained // 2 if recipe.loss.type == "ppo" else trained  # no value model
    if recipe.output.merge:
        disk["merged"] = base_16bit
    return disk
