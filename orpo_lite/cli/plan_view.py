"""Print the report of ``orpo-lite plan``, and describe the memory settings of a recipe."""

from typing import TYPE_CHECKING

from orpo_lite.cli.console import out, print_columns

if TYPE_CHECKING:
    from orpo_lite.planning.plan import PlanReport
    from orpo_lite.planning.processes import ProcessPlan
    from orpo_lite.planning.search import MemoryPlan
    from orpo_lite.recipe.schema import MemorySection, Recipe


def print_memory_settings(recipe: "Recipe") -> None:
    """Print how a step runs with the ``memory`` settings. The settings do not change results."""
    from orpo_lite.recipe.schema import PLANNED_SETTINGS

    memory = recipe.memory.unplanned()
    out.print("\na step")
    if memory.packing:
        _print_packing(memory, recipe.micro_batch_tokens)
    else:
        pairs = _pairs(memory.micro_batch_size or 1)
        out.print(f"  pads rows, {pairs} per forward pass, and holds all logits: the plain step")
    _print_checkpointing(memory)
    if memory.mlp_tile:
        out.print(f"  runs an MLP on {memory.mlp_tile:,} tokens at a time, for about 9% more FLOPs")
    if memory.embedding_on_cpu:
        out.print("  keeps the input embedding in host memory")
    planned = [key for key in PLANNED_SETTINGS if getattr(recipe.memory, key) == "auto"]
    if planned:
        out.print(
            f"on a GPU, or with memory.budget, the plan sets {', '.join(planned)}: "
            "see orpo-lite plan"
        )


def _print_packing(memory: "MemorySection", tokens: int) -> None:
    shared = "once" if memory.prompt_sharing else "twice"
    limit = f"at most {tokens:,} tokens"
    if memory.micro_batch_size:
        limit += f" and {_pairs(memory.micro_batch_size)}"
    out.print(f"  packs pairs without padding, with the prompt of a pair {shared}")
    out.print(f"  takes {limit} per forward pass")
    if memory.head_chunk == "auto":
        logits = "a few rows of logits at a time"
    elif memory.head_chunk == "none":
        logits = "all logits of a forward pass"
    else:
        logits = f"{memory.head_chunk} rows of logits at a time"
    out.print(f"  holds {logits}")


def _print_checkpointing(memory: "MemorySection") -> None:
    amount = memory.activation_checkpointing
    if amount in ("none", 0):
        out.print("  runs no layer again in the backward pass")
        return
    layers = "all layers" if amount == "all" else f"{amount} layers"
    inputs = " from inputs in host memory" if memory.checkpoint_offload else ""
    out.print(f"  runs {layers} again in the backward pass{inputs}")


BAR = 40  # characters


def print_plan(report: "PlanReport", recipe: str) -> None:
    """Print a plan: the verdict, the memory of each part, the memory settings, and other GPUs.

    ``recipe``: the words after ``--recipe`` of a command that trains it.
    """
    from orpo_lite.recipe.text import gib, to_text

    plan, step = report.plan, report.plan.measured
    verdict = "fits" if plan.fits else "does not fit"
    budget = f"{gib(plan.budget or 0)} {_budget_source(report)}"
    out.print(f"{report.base}: {verdict}, {gib(plan.needed)} needed, {budget}")
    if report.local and report.local.others:
        others = gib(report.local.others)
        out.print(f"other processes use {others} of the GPU; the plan does not use that memory")
    pairs = "the longest pairs of the data"
    if not report.from_data:
        pairs = "the longest pairs that data.max_length allows"
    size = f"{_pairs(step.pairs)} with {step.tokens:,} tokens"
    out.print(f"measured for a forward pass of {size}: {pairs}\n")
    _print_parts(plan)
    settings = [f"memory.{key}={to_text(value)}" for key, value in plan.settings.items()]
    out.print(f"\nmemory settings: {' '.join(settings)}")
    for note in report.notes:
        out.print(f"note: {note}")
    if plan.seconds_per_pair is not None:
        flops = f"{plan.flops_per_pair / 1e12:.3g} TFLOPs"
        seconds = f"about {plan.seconds_per_pair:.2g} s (estimated from the GPU's data sheet)"
        out.print(f"a pair of that length: {flops}, {seconds}")
    disk = ", ".join(f"{name} {gib(size)}" for name, size in report.disk.items())
    out.print(f"host memory: {gib(step.host)}; disk: {disk}\n")
    _print_gpus(report)
    if report.processes:
        _print_processes(report.processes, recipe)


def _budget_source(report: "PlanReport") -> str:
    """Return words that name the source of the budget: ``of memory.budget``, for example."""
    plan = report.plan
    if report.local and plan.gpu and plan.budget == report.local.free:
        return f"free on this machine's {plan.gpu.name}"
    has_budget = report.rows[0].gpu.name.startswith("memory.budget")
    if not report.local and not has_budget and plan.gpu:
        return f"of a {plan.gpu.name} (no GPU found, and no memory.budget)"
    return "of memory.budget"


def _print_parts(plan: "MemoryPlan") -> None:
    from orpo_lite.recipe.text import gib

    rows = [
        *((name, size) for name, size in plan.parts.items() if size >= 2**20),
        *((f"{name} (allowance)", size) for name, size in plan.allowances.items()),
    ]
    largest = max(size for _, size in rows)
    width = max(len(name) for name, _ in rows)
    for name, size in rows:
        bar = "█" * round(BAR * size / largest) or "▏"
        out.print(f"  {name.ljust(width)}  {gib(size):>10}  {bar}")
    out.print(f"  {'total'.ljust(width)}  {gib(sum(size for _, size in rows)):>10}")
    if plan.needed > plan.peak + sum(plan.allowances.values()):
        out.print(
            f"  loading the base needs more memory, {gib(plan.needed)}, "
            "because its embedding is on the GPU until the base is loaded"
        )
    if plan.measured.paged:
        out.print(
            f"  {gib(plan.measured.paged)} of the optimizer state are paged: "
            "the driver moves them to host memory if the GPU is full"
        )


def _print_gpus(report: "PlanReport") -> None:
    from orpo_lite.recipe.text import gib, to_text

    table = [("GPU", "needed", "fits", "s per pair", "layers run again", "other settings")]
    for row in report.rows:
        settings = dict(row.settings or {})
        checkpointed = str(settings.pop("activation_checkpointing", ""))
        others = []
        for key, value in settings.items():
            if value is True:
                others.append(key)
            elif value not in (None, False, "auto"):
                others.append(f"{key}={to_text(value)}")
        seconds = "" if row.seconds_per_pair is None else f"{row.seconds_per_pair:.2g}"
        fits = "yes" if row.settings else "no"
        columns = (row.gpu.name, gib(row.needed), fits, seconds, checkpointed, " ".join(others))
        table.append(columns)
    print_columns(table)


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count} pairs"


def _print_processes(forms: "list[ProcessPlan]", recipe: str) -> None:
    """Print the plans for several GPUs, the formulas of their figures, and which one to use."""
    from orpo_lite.recipe.text import gib, to_text

    first = forms[0]
    gpu = first.memory.gpu.name if first.memory.gpu else "device"
    out.print(f"\n{first.processes} processes, each on one {gpu}: counted, not measured")
    names = ["whole base", *(f"shared by {form.shards}" for form in forms[1:])]
    parts = [{**form.memory.parts, **form.memory.allowances} for form in forms]
    rows: list[tuple[str, ...]] = [("memory of a GPU", *names)]
    rows += [
        (part, *(gib(sizes.get(part, 0)) for sizes in parts))
        for part in {name: None for sizes in parts for name in sizes}
        if any(sizes.get(part, 0) >= 2**20 for sizes in parts)
    ]
    memory = [form.memory for form in forms]
    rows.append(("needed", *(gib(plan.needed) for plan in memory)))
    rows.append(("fits", *("yes" if plan.fits else "no" for plan in memory)))
    rows.append(("seconds of a step", *(f"{form.seconds:.3g}" for form in forms)))
    print_columns(rows)
    for name, form in zip(names, forms, strict=True):
        out.print(f"\n{name}:")
        settings = form.memory.settings.items()
        words = [f"memory.{key}={to_text(value)}" for key, value in settings if key != "shard"]
        out.print(f"  memory settings: {' '.join(words)}")
        for line in form.formulas():
            out.print(f"  {line}")
    fitting = [form for form in forms if form.memory.fits]
    if not fitting:
        out.print(f"\nneither fits on {first.processes} GPUs")
        return
    best = min(fitting, key=lambda form: form.seconds)
    is_faster = any(form.seconds > best.seconds for form in fitting)
    why = "fits and is faster" if is_faster else "fits"
    setting = f"memory.shard={best.shards if best.shards > 1 else 'off'}"
    launch = f"orpo-lite launch --processes {first.processes} -- train"
    out.print(f"\n{setting} {why}: {launch} --recipe {recipe} {setting}")
