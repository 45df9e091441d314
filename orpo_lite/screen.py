"""What the person sees: a verb's progress, figures in columns, a pair of texts. The only place that prints."""

import json
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from orpo_lite.objectives.objective import Metric
    from orpo_lite.plan import PlanReport
    from orpo_lite.recipe import Recipe
    from orpo_lite.run import Update
    from orpo_lite.verify import Verdict

PLAIN_LINES = 50  # step lines in a log file, besides the evaluations
SHOWN = 1200  # characters of a prompt or reply; the middle of a longer one is left out
MUCH = 0.05  # of the responses: a model that rarely sees an end does not learn to stop
STYLES = {"prompt": "cyan", "response": "green", "end": "bold magenta", "cut": "red"}

Result = TypeVar("Result")


class _Console(Console):
    """Whoever reads the output may go away (`| head`); the work goes on, and writes to nowhere."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


out = _Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def escape_the_rest() -> None:
    """What the output's encoding does not have is written as Python and JSON escape it; data may hold any character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """In ASCII where the output's encoding has not all that JSON can hold."""
    out.print(json.dumps(value, indent=2, ensure_ascii=not out.encoding.startswith("utf")))


def print_columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> None:
    """Aligned columns, never cut: a table of rich's shortens long values to the width of the terminal, or to 80.

    ``right`` aligns all but the first column to the right, as numbers should be.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(rest, widths[1:], strict=True)
        ]
        out.print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def print_levers(recipe: "Recipe") -> None:
    """What the keys of ``memory`` make of a step, in words; none of them changes the result."""
    from orpo_lite.recipe import LEVERS

    memory = recipe.memory.unplanned()
    out.print("\na step")
    if not memory.packing:
        size = memory.micro_batch_size or 1
        out.print(f"  pads rows, {_pairs(size)} a forward pass, and holds all logits: the plain step")
    else:
        shared = "once" if memory.prompt_sharing else "twice"
        tokens = f"{recipe.micro_batch_tokens:,} tokens a forward pass"
        most = f", at most {_pairs(memory.micro_batch_size)}" if memory.micro_batch_size else ""
        out.print(f"  lays pairs end to end without padding, and the prompt of a pair {shared}, {tokens}{most}")
        chunk = {"auto": "a few rows of logits at a time", "none": "all logits of a forward pass"}
        out.print(f"  holds {chunk.get(str(memory.head_chunk), f'{memory.head_chunk} rows of logits at a time')}")
    layers = {"all": "all layers", "none": "no layer", "0": "no layer"}
    amount = layers.get(str(memory.activation_checkpointing), f"{memory.activation_checkpointing} layers")
    where = " from inputs in host memory" if memory.checkpoint_offload else ""
    out.print(f"  runs {amount} again in the backward pass{where if amount != 'no layer' else ''}")
    if memory.mlp_tile:
        out.print(f"  takes {memory.mlp_tile:,} tokens at a time through an MLP, for some 9% more FLOPs")
    if memory.embedding_on_cpu:
        out.print("  looks tokens up in host memory")
    if free := [key for key in LEVERS if getattr(recipe.memory, key) == "auto"]:
        out.print(f"on a GPU, or with memory.budget, the plan sets {', '.join(free)}: see orpo-lite plan")


def print_before_after(before: Mapping[str, float], after: Mapping[str, float], metrics: "Sequence[Metric]") -> None:
    """The held-out metrics before the first step, and those of the adapter that was kept."""
    table: list[tuple[str, ...]] = [("held-out pairs", "before", "after")]
    for metric in metrics:
        values = [found[f"eval_{metric.name}"] for found in (before, after)]
        table.append((metric.label, *(f"{100 * v:.1f}%" if metric.is_share else f"{v:.4f}" for v in values)))
    print_columns(table)


# --- a plan ---------------------------------------------------------------------------------------------------------

BAR = 40  # characters


def print_plan(report: "PlanReport") -> None:
    """The verdict, the memory of a step by part, the levers, what else is needed, and what other cards make of it."""
    from orpo_lite.recipe import gib, to_text

    plan = report.plan
    whose = "of memory.budget"
    if report.own and plan.card and plan.budget == report.own.free:
        whose = f"free on this machine's {plan.card.name}"
    if not report.own and not report.rows[0].card.name.startswith("memory.budget") and plan.card:
        whose = f"of a {plan.card.name} (no GPU here, and no memory.budget)"
    verdict = "fits" if plan.fits else "does not fit"
    out.print(f"{report.base}: {verdict}, {gib(plan.needed)} needed, {gib(plan.budget or 0)} {whose}")
    if report.own and report.own.others:
        out.print(f"other processes hold {gib(report.own.others)} of the card, which is left alone")
    step = plan.measured
    most = "of the longest pairs of the data" if report.from_data else "which is the most that data.max_length allows"
    out.print(f"counted for a forward pass of {_pairs(step.pairs)}, {step.tokens:,} tokens, {most}\n")
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
        out.print(f"  more than that, {gib(plan.needed)}, while the base is loaded, its embedding still on the card")
    if step.paged:
        out.print(f"  of the optimizer {gib(step.paged)} are paged: the driver moves them to host memory if it must")
    out.print(f"\nlevers: {' '.join(f'memory.{key}={to_text(value)}' for key, value in plan.levers.items())}")
    for note in report.notes:
        out.print(f"note: {note}")
    if plan.seconds_per_pair is not None:
        per_pair = f"{plan.flops_per_pair / 1e12:.3g} TFLOPs and about {plan.seconds_per_pair:.2g} s"
        out.print(f"a pair of that length: {per_pair} (estimated from the card's data sheet)")
    disk = ", ".join(f"{name} {gib(size)}" for name, size in report.disk.items())
    out.print(f"host memory for what is kept there: {gib(step.host)}; disk: {disk}\n")
    table = [("card", "needed", "fits", "s a pair", "layers that run again", "other levers")]
    for row in report.rows:
        levers = dict(row.levers or {})
        again = str(levers.pop("activation_checkpointing", ""))
        used = {key: value for key, value in levers.items() if value not in (None, False, "auto")}
        others = [key if value is True else f"{key}={to_text(value)}" for key, value in used.items()]
        seconds = "" if row.seconds_per_pair is None else f"{row.seconds_per_pair:.2g}"
        fits = "yes" if row.levers else "no"
        table.append((row.card.name, gib(row.needed), fits, seconds, again, " ".join(others)))
    print_columns(table)


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"


def print_verdict(verdict: "Verdict") -> None:
    """What base, adapter and the merged model say of the same pairs."""
    kind = "held-out pairs" if verdict.held_out else "training pairs, for none were held out"
    rows = [(f"{verdict.pairs} {kind}", "reward accuracy", "margin", "log-prob of chosen")]
    rows += [(r.model, f"{r.accuracy:.1%}", f"{r.margin:+.4f}", f"{r.chosen:.4f}") for r in verdict.rows]
    print_columns(rows)
    out.print(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.said}")


# --- progress -------------------------------------------------------------------------------------------------------


def draw(updates: "Generator[Update, None, Result]", *, silent: bool = False, plain: bool = False) -> Result:
    """Show each update; returns the generator's result. Live on a terminal, plain lines elsewhere, or where asked."""
    from orpo_lite.run import drain

    if silent:
        return drain(updates, lambda _: None)
    if plain or not out.is_terminal:
        return drain(updates, _PlainLines().show)
    screen = _Screen()
    with Live(screen.layout, console=out, refresh_per_second=4, transient=True):
        return drain(updates, screen.show)


class _PlainLines:
    """A line for an evaluation, one for a stage and for each quarter of a long one, and some fifty for the steps."""

    def __init__(self) -> None:
        self.stage, self.quarter, self.began = "", 1, 0.0

    def show(self, update: "Update") -> None:
        if update.kind == "step":
            if self.began == 0.0:
                self.began = time.monotonic()
            elif update.step % max(1, update.steps // PLAIN_LINES) == 0 or update.step == update.steps:
                each = (time.monotonic() - self.began) / max(1, update.step - 1)
                left = f"  {_clock(each * (update.steps - update.step))} left"
                out.print(f"step {update.step}/{update.steps}  {_figures(update)}{left}")
        elif update.kind != "stage":
            out.print(_line(update))
        elif update.text != self.stage:
            self.stage, self.quarter = update.text, 1
            out.print(f"{update.text} ...")
        elif update.steps and 4 * update.step >= self.quarter * update.steps and update.step < update.steps:
            self.quarter = 1 + 4 * update.step // update.steps
            out.print(f"{update.text} ... {update.step:,} of {update.steps:,}")


class _Screen:
    """The last step's figures over a bar for the training and one for what interrupts it; the rest scrolls above."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=out
        )
        self.figures = Text()
        self.layout = Group(self.figures, self.progress)
        self.tasks: dict[str, TaskID] = {}

    def show(self, update: "Update") -> None:
        if update.kind in ("note", "eval"):
            out.print(_line(update))
            return
        if update.metrics:
            self.figures.plain = _figures(update)
        text = "training" if update.kind == "step" else update.text
        if text not in self.tasks:
            self.tasks[text] = self.progress.add_task(text, total=update.steps or None)
        for name, task in self.tasks.items():
            self.progress.update(task, visible=name == text or (name == "training" and update.steps > 0))
        self.progress.update(self.tasks[text], completed=update.step, total=update.steps or None)


def _figures(update: "Update") -> str:
    metrics = update.metrics
    return f"{update.text}  {metrics['tokens_per_second']:,.0f} tok/s  {metrics['memory_gib']:.2f} GiB"


def _line(update: "Update") -> str:
    if update.kind == "note" or not update.metrics:
        return update.text
    return f"held-out at step {update.step}/{update.steps}: {update.text}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


# --- the data, for a person to look at -------------------------------------------------------------------------------


def print_preview(
    figures: Mapping[str, Any], samples: Mapping[str, Any], warnings: Sequence[str], max_length: int
) -> None:
    """A pair as the model sees it, then the figures, then what may be wrong; what ``prepare.preview`` returns."""
    sample = samples["first"]
    out.print(f"\none pair, {sample['where']}, as the model sees it")
    if sample.get("dropped"):
        out.print(f"(left out of the training: {sample['dropped']})", style="bold red")
    print_pair(sample)
    if "cut" in samples and not any(piece["kind"] == "cut" for piece in sample.get("chosen", [])):
        cut = samples["cut"]
        out.print(f"\na pair that data.max_length={max_length} cuts, {cut['where']}")
        print_pair(cut)
    _print_figures(figures, max_length)
    for warning in warnings:
        out.print(f"\n{warning}", style="bold red")


def _print_figures(figures: Mapping[str, Any], max_length: int) -> None:
    from orpo_lite.data.preview import COUNTED

    out.print()
    for columns in figures["columns"]:
        out.print(f"{columns['format']}\n  {_columns_line(columns)}")
    out.print(figures["chat_template"])
    kept = f"{figures['train_pairs']:,} to train on, {figures['held_out_pairs']:,} held out"
    out.print(
        f"{figures['rows_read']:,} rows: {kept}, {sum(d['pairs'] for d in figures['dropped'].values()):,} left out"
    )
    for reason, drop in figures["dropped"].items():
        more = ", ..." if drop["pairs"] > len(drop["first"]) else ""
        out.print(f"  {drop['pairs']:>7,}  {reason} ({', '.join(drop['first'])}{more})")
    names = list(figures["tokens"]["prompt"])
    lengths = [[f"{value:,.0f}" for value in row.values()] for row in figures["tokens"].values()]
    out.print()
    print_columns(
        [["tokens", *names], *([name, *row] for name, row in zip(figures["tokens"], lengths, strict=True))], right=True
    )
    out.print()
    cut, prompts, step = figures["cut"], figures["prompts"], figures["step"]
    padded, whole, shared = step.values()
    lost = cut["responses_without_end"]
    _print_count(
        f"data.max_length={max_length} cuts {_share(cut['pairs_share'])} of the pairs; "
        f"{lost:,} of the responses ({_share(cut['responses_without_end_share'])}) lose their end",
        cut["responses_without_end_share"] >= MUCH,
    )
    for name, said in COUNTED.items():
        if count := figures[name]:
            _print_count(f"{said}: {count:,}", True)
    longer = [_share(figures[f"{side}_longer"]) for side in ("chosen", "rejected")]
    out.print(f"chosen is the longer one in {longer[0]} of the pairs, rejected in {longer[1]}")
    _print_count(
        f"{prompts['train']:,} different prompts to train on, {prompts['held_out']:,} held out, "
        f"{prompts['shared']:,} on both sides{': the evaluation will flatter' if prompts['shared'] else ''}",
        prompts["shared"] > 0,
    )
    out.print(
        f"tokens a pair: {padded:,.0f} in rows padded to the longest of 8 pairs, {whole:,.0f} without padding, "
        f"{shared:,.0f} with the prompt shared as well ({padded / shared:.1f}x fewer than padded)"
    )


def _columns_line(columns: Mapping[str, Any]) -> str:
    read = [ours if ours == theirs else f"{ours} from {theirs}" for ours, theirs in columns["read"].items()]
    return visible(
        "; ".join(
            f"{title}: {', '.join(names)}"
            for title, names in (("read", read), ("not read", columns["not_read"]))
            if names
        )
    )


def _print_count(text: str, bad: bool) -> None:
    out.print(text, style="bold red" if bad else None)


def print_pair(sample: Mapping[str, Any]) -> None:
    """Prompt once, then both replies; each kind of segment has a mark of its own and a colour, where there is one."""
    if "chosen" not in sample:
        out.print("  (it cannot be rendered)")
        return
    shared = ""
    for side in ("chosen", "rejected"):
        pieces = {piece["kind"]: piece["text"] for piece in sample[side]}
        if side == "chosen" or pieces.get("prompt") != shared:
            shared = pieces.get("prompt", "")
            _print_piece(f"prompt{'' if side == 'chosen' else ' of rejected'}", "prompt", shared)
        _print_piece(side, "response", pieces.get("response", ""), pieces)


def _print_piece(title: str, kind: str, text: str, pieces: Mapping[str, str] | None = None) -> None:
    line = Text(f"--- {title} ", style="bold") + Text("-" * max(3, 60 - len(title)), style="dim")
    out.print(line)
    body = Text(_seams(visible(text)), style=STYLES[kind])
    if pieces and "end" in pieces:
        body.append(f"[end: {pieces['end']}]", style=STYLES["end"])
    if pieces and "cut" in pieces:
        body.append(f"[cut off: {visible(pieces['cut'], 200)}]", style=STYLES["cut"])
    out.print(body)


def visible(text: str, shown: int = SHOWN) -> str:
    """Text that is safe to print, its middle left out when it is long; data may hold a terminal's control codes."""
    if len(text) > shown:
        half = shown // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _seams(text: str) -> str:
    """White space at either end made visible: there prompt and reply meet."""
    inner = text.strip()
    before, _, after = text.partition(inner) if inner else (text, "", "")
    marks = str.maketrans({" ": "·", "\n": "⏎\n", "\t": "→"})
    return before.translate(marks) + inner + after.translate(marks)


def _share(share: float) -> str:
    return f"{100 * share:.1f}%"
