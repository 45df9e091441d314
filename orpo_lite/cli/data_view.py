"""Print the results of ``orpo-lite data``: a pair, lengths, and the rows that are left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from orpo_lite.cli.console import out, print_columns

SHOWN = 1200  # most characters of a prompt or reply; the middle of a longer one is left out
# A warning is shown if at least this share of the responses lose their end token. A model that
# rarely sees the end token does not learn to stop.
MANY_WITHOUT_END = 0.05
STYLES = {"prompt": "cyan", "response": "green", "end": "bold magenta", "cut": "red"}


def print_preview(
    figures: Mapping[str, Any], samples: Mapping[str, Any], warnings: Sequence[str], max_length: int
) -> None:
    """Print what ``orpo_lite.runs.inputs.preview`` returns: a pair, statistics and warnings."""
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
    from orpo_lite.data.statistics import warning_lines

    out.print()
    for columns in figures["columns"]:
        out.print(f"{columns['format']}\n  {_columns_line(columns)}")
    out.print(figures["chat_template"])
    if figures["tokenizer"]:
        out.print(figures["tokenizer"])
    kept = f"{figures['train_pairs']:,} to train on, {figures['held_out_pairs']:,} held out"
    out.print(
        f"{figures['rows_read']:,} rows: {kept}, "
        f"{sum(d['pairs'] for d in figures['dropped'].values()):,} left out"
    )
    for reason, drop in figures["dropped"].items():
        more = ", ..." if drop["pairs"] > len(drop["first"]) else ""
        out.print(f"  {drop['pairs']:>7,}  {reason} ({', '.join(drop['first'])}{more})")
        if reason in figures["hints"]:
            out.print(f"           {figures['hints'][reason]}")
    names = list(figures["tokens"]["prompt"])
    lengths = [[f"{value:,.0f}" for value in row.values()] for row in figures["tokens"].values()]
    out.print()
    print_columns(
        [
            ["tokens", *names],
            *([name, *row] for name, row in zip(figures["tokens"], lengths, strict=True)),
        ],
        right=True,
    )
    out.print()
    cut, prompts, step = figures["cut"], figures["prompts"], figures["step"]
    padded, whole, shared = step.values()
    lost = cut["responses_without_end"]
    lost_share = cut["responses_without_end_share"]
    _print_count(
        f"data.max_length={max_length} cuts {_percent(cut['pairs_share'])} of the pairs; "
        f"{lost:,} of the responses ({_percent(lost_share)}) lose their end token",
        lost_share >= MANY_WITHOUT_END,
    )
    for line in warning_lines(figures):
        _print_count(line, True)
    longer = [_percent(figures[f"{side}_longer"]) for side in ("chosen", "rejected")]
    out.print(f"chosen is the longer one in {longer[0]} of the pairs, rejected in {longer[1]}")
    _print_count(
        f"{prompts['train']:,} different prompts to train on, {prompts['held_out']:,} held out, "
        f"{prompts['shared']:,} in both"
        f"{': the evaluation will look too good' if prompts['shared'] else ''}",
        prompts["shared"] > 0,
    )
    out.print(
        f"tokens per pair: {padded:,.0f} in rows padded to the longest of 8 pairs, "
        f"{whole:,.0f} without padding, "
        f"{shared:,.0f} with the prompt shared as well ({padded / shared:.1f}x fewer than padded)"
    )


def _columns_line(columns: Mapping[str, Any]) -> str:
    """Return a line that names the columns that are read and the columns that are not read."""
    read = [
        ours if ours == theirs else f"{ours} from {theirs}"
        for ours, theirs in columns["read"].items()
    ]
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
    """Print the prompt, the chosen reply and the rejected reply, each with a title and a colour.

    If the two replies have different prompts, print both prompts.
    """
    if "chosen" not in sample:
        out.print("  (the pair cannot be rendered)")
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
    body = Text(_mark_outer_space(visible(text)), style=STYLES[kind])
    if pieces and "end" in pieces:
        body.append(f"[end: {pieces['end']}]", style=STYLES["end"])
    if pieces and "cut" in pieces:
        body.append(f"[cut off: {visible(pieces['cut'], 200)}]", style=STYLES["cut"])
    out.print(body)


def visible(text: str, shown: int = SHOWN) -> str:
    """Return a text with its control characters escaped.

    If the text has more than ``shown`` characters, its middle is left out.
    """
    if len(text) > shown:
        half = shown // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def _mark_outer_space(text: str) -> str:
    """Return the text with visible marks for the white space at its start and end.

    This is where prompt and reply are joined, so a missing or extra space matters.
    """
    inner = text.strip()
    before, _, after = text.partition(inner) if inner else (text, "", "")
    marks = str.maketrans({" ": "·", "\n": "⏎\n", "\t": "→"})
    return before.translate(marks) + inner + after.translate(marks)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
