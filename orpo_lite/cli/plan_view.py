"""A plan, and what the memory settings do, as the person sees them."""

from typing import TYPE_CHECKING

from orpo_lite.cli.console import out, print_columns

if TYPE_CHECKING:
    from orpo_lite.planning.plan import PlanReport
    from orpo_lite.recipe.schema import Recipe


def print_levers(recipe: "Recipe") -> None:
    """What the keys of ``memory`` make of a step, in words; none of them changes the result."""
    from orpo_lite.recipe.schema import LEVERS

    memory = recipe.memory.unplanned()
    out.print("\na step")
    if not memory.packing:
        size = memory.micro_batch_size or 1
        out.print(
            f"  pads rows, {_pairs(size)} a forward pass, and holds all logits: the plain step"
        )
    else:
        shared = "once" if memory.prompt_sharing else "twice"
        tokens = f"{recipe.micro_batch_tokens:,} tokens a forward pass"
        most = f", at most {_pairs(memory.micro_batch_size)}" if memory.micro_batch_size else ""
        out.print(
            f"  lays pairs end to end without padding, and the prompt of a pair {shared}, {tokens}{most}"
        )
        chunk = {"auto": "a few rows of logits at a time", "none": "all logits of a forward pass"}
        out.print(
            f"  holds {chunk.get(str(memory.head_chunk), f'{memory.head_chunk} rows of logits at a time')}"
        )
    layers = {"all": "all layers", "none": "no layer", "0": "no layer"}
    amount = layers.get(
        str(memory.activation_checkpointing), f"{memory.activation_checkpointing} layers"
    )
    where = " from inputs in host memory" if memory.checkpoint_offload else ""
    out.print(f"  runs {amount} again in the backward pass{where if amount != 'no layer' else ''}")
    if memory.mlp_tile:
        out.print(
            f"  takes {memory.mlp_tile:,} tokens at a time through an MLP, for some 9% more FLOPs"
        )
    if memory.embedding_on_cpu:
        out.print("  looks tokens up in host memory")
    if free := [key for key in LEVERS if getattr(recipe.memory, key) == "auto"]:
        out.print(
            f"on a GPU, or with memory.budget, the plan sets {', '.join(free)}: see orpo-lite plan"
        )


BAR = 40  # characters


def print_plan(report: "PlanReport") -> None:
    """The verdict, the memory of a step by part, the levers, what else is needed, and what other cards make of it."""
    from orpo_lite.recipe.text import gib, to_text

    plan = report.plan
    whose = "of memory.budget"
    if report.own and plan.gpu and plan.budget == report.own.free:
        whose = f"free on this machine's {plan.gpu.name}"
    if not report.own and not report.rows[0].gpu.name.startswith("memory.budget") and plan.gpu:
        whose = f"of a {plan.gpu.name} (no GPU here, and no memory.budget)"
    verdict = "fits" if plan.fits else "does not fit"
    out.print(
        f"{report.base}: {verdict}, {gib(plan.needed)} needed, {gib(plan.budget or 0)} {whose}"
    )
    if report.own and report.own.others:
        out.print(f"other processes hold {gib(report.own.others)} of the card, which is left alone")
    step = plan.measured
    most = (
        "of the longest pairs of the data"
        if report.from_data
        else "which is the most that data.max_length allows"
    )
    out.print(
        f"counted for a forward pass of {_pairs(step.pairs)}, {step.tokens:,} tokens, {most}\n"
    )
    rows = [
        *((name, size) for name, size in plan.parts.items() if size >= 2**20),
        *((f"{name} (allowance)", size) for name, size in plan.allowances.items()),
    ]
    largest = max(size for _, size in rows)
    width = max(len(name) for name, _ in rows)
    for name, size in rows:
        bar = "█" * round(BAR * size / largest) or "▏"
        out.print(f"  {name.ljust(width)}  {gib(size):>10}  {bar}")
    out.print(f"  {'in all'.ljust(width)}  {gib(sum(size for _, size in rows)):>10}")
    if plan.needed > plan.peak + sum(plan.allowances.values()):
        out.print(
            f"  more than that, {gib(plan.needed)}, while the base is loaded, its embedding still on the card"
        )
    if step.paged:
        out.print(
            f"  of the optimizer {gib(step.paged)} are paged: the driver moves them to host memory if it must"
        )
    out.print(
        f"\nlevers: {' '.join(f'memory.{key}={to_text(value)}' for key, value in plan.levers.items())}"
    )
    for note in report.notes:
        out.print(f"note: {note}")
    if plan.seconds_per_pair is not None:
        per_pair = (
            f"{plan.flops_per_pair / 1e12:.3g} TFLOPs and about {plan.seconds_per_pair:.2g} s"
        )
        out.print(f"a pair of that length: {per_pair} (estimated from the card's data sheet)")
    disk = ", ".join(f"{name} {gib(size)}" for name, size in report.disk.items())
    out.print(f"host memory for what is kept there: {gib(step.host)}; disk: {disk}\n")
    table = [("card", "needed", "fits", "s a pair", "layers that run again", "other levers")]
    for row in report.rows:
        levers = dict(row.levers or {})
        again = str(levers.pop("activation_checkpointing", ""))
        used = {key: value for key, value in levers.items() if value not in (None, False, "auto")}
        others = [
            key if value is True else f"{key}={to_text(value)}" for key, value in used.items()
        ]
        seconds = "" if row.seconds_per_pair is None else f"{row.seconds_per_pair:.2g}"
        fits = "yes" if row.levers else "no"
        table.append((row.gpu.name, gib(row.needed), fits, seconds, again, " ".join(others)))
    print_columns(table)


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"
