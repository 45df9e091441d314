"""Write docs/paper.md and its plots from the figures of ``python -m benchmarks.paper``."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.claims import EXPERIMENTS
from benchmarks.paper.experiments import PAIRS
from benchmarks.paper.figures import draw

INTRO = """\
# The paper's claims, tried

The [ORPO paper](https://arxiv.org/abs/2403.07691) trains models of 125M to 7B parameters on GPUs.
This page tries its claims at the scale of a workstation, with orpo-lite. The command below
measures, and writes the page:

```sh not run: trains for more than an hour, and needs models and pairs
python -m benchmarks.paper --json benchmarks/results/paper.json --write docs/paper.md
```

The command can be stopped and started again. It needs a folder with two story models
(`--models`), a folder with pairs of HH-RLHF and prompts of graders (`--data`), and a chat model to
judge answers (`--judge`).
"""
VERDICTS = """\
## How a verdict is made

A verdict is about a statement on a measured value. **Holds**: the 95% interval and the value of
each training are on the claimed side. **Does not hold**: all of them are on the other side.
**Cannot tell**: anything else. If a claim consists of several statements, it holds if all of them
hold, and does not hold if one of them does not hold. E5 needs a judge that is clearly better than
chance; without one, its verdicts are "cannot tell".

The interval is a bootstrap over prompts. It shows the error that comes from the sample of pairs.
The spread over the seeds shows the error that comes from the training: a seed changes the order of
the pairs, the first weights of the adapter, and which pairs are held out. The intervals are not
corrected for the number of statements.
"""
LIMITS = """\
## What is not tried

The scores of Tables 1 and 6 and of MT-Bench need models of billions of parameters and judges behind
an API. The trends over model sizes of Tables 2 and 3 need several sizes. The paper's bases (OPT,
Phi-2, Llama-2, Mistral) and UltraFeedback are not used.

## Where the paper disagrees with itself

This page follows the formulas that agree with the authors' code and figures:

- Eq. 8 is printed without the minus sign of the gradient of a loss.
- The text says that 1/(1 - P) amplifies the gradient if P is low. It is 1 there, and grows with P.
- Eq. 13 as printed has a factor that limits PID to 0.25, but Table 4 has values from 0.5 to 0.9. A
  mean over pairs of answers is meant.
- Eq. 16 with the P of Eq. 3 does not give the fall of Fig. 8 (E4).
"""


def write_page(result: Mapping[str, Any], page: Path) -> None:
    """Write the page and its plots, which are in a folder with the name of the page."""
    page.write_text(text(result, page.stem), encoding="utf-8")
    for name, found in result["experiments"].items():
        if found["plot"]:
            draw(name, found["plot"], page.with_suffix("") / f"{name.lower()}.svg")


def text(result: Mapping[str, Any], folder: str) -> str:
    """Return the text of the page. ``folder``: the folder of the plots, next to the page."""
    parts = [INTRO, *_summary(result["experiments"]), VERDICTS, *_common(result)]
    for name, found in result["experiments"].items():
        seeds = result["settings"]["seeds"]
        used = seeds[:1] if EXPERIMENTS[name].first_seed_only else seeds
        trainings = [row for row in result["trainings"] if row["seed"] in used]
        parts += _section(name, found, trainings, folder)
    parts.append(LIMITS)
    return "\n".join(parts)


def _summary(experiments: Mapping[str, Any]) -> Iterator[str]:
    yield "| | claim | verdict |\n|---|---|---|"
    for name, found in experiments.items():
        title = EXPERIMENTS[name].title
        anchor = f"{name}-{title}".lower().replace(" ", "-").replace(",", "").replace(".", "")
        yield f"| [{name}](#{anchor}) | {title} | {verdict_text(found)} |"
    yield ""


def verdict_text(found: Mapping[str, Any]) -> str:
    """Return the verdicts of an experiment: "holds", or one for each kind of pairs."""
    verdicts = found["verdicts"]
    if len({*verdicts.values()}) == 1:
        return str(next(iter(verdicts.values())))
    return ", ".join(
        f"{verdict} ({pairs} pairs)" if pairs in PAIRS else f"{verdict} ({pairs})"
        for pairs, verdict in verdicts.items()
    )


def _common(result: Mapping[str, Any]) -> Iterator[str]:
    yield "## What is trained\n"
    settings = result["settings"]
    yield _paragraph(
        f"All trainings but those of E5 and E6 have the same settings: "
        f"{settings['epochs']:g} epochs, batches of "
        f"{settings['batch']} pairs, AdamW with a learning rate of {settings['learning_rate']:g} "
        f"(warm-up of 10%, then cosine), and a LoRA adapter of rank {settings['rank']} on all "
        "linear layers of a base in 32 bit. The last adapter is measured, not the best one. All "
        "arms of a seed see the same pairs in the same order. A pilot of SFT chose the number of "
        "epochs: its held-out NLL fell by only 0.01 in the third one."
    )
    yield _paragraph(
        "E5 and E6 have trainings of their own, on fewer and shorter pairs; they are described "
        "there."
    )
    yield "| base | arm | seed | pairs | held out | steps | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for row in result["trainings"]:
        values = (row[key] for key in ("base", "arm", "seed", "pairs", "held_out", "steps"))
        yield f"| {' | '.join(str(value) for value in values)} | {row['seconds']:.0f} |"
    yield ""
    yield _paragraph(
        "The bases are small Llamas that were trained on children's stories: stories260k (260 "
        "thousand parameters, 512 positions) and babyllama1m (1 million parameters, single "
        "characters, 256 positions). The pairs are 1,200 rows of the test part of HH-RLHF "
        "harmless. Pairs whose prompt is too long for the base are left out, and the end of a "
        "reply that is too long is cut off. No text of the pairs is printed here."
    )
    machine = f"Machine: {result['machine']}, shared with other work. Date: {result['date']}."
    if whole := result.get("whole"):
        machine += (
            f" From an empty folder, the command took {whole['seconds'] / 60:.0f} minutes, with "
            f"{whole['processes']} trainings at the same time, each on one core."
        )
    yield _paragraph(machine)
    yield _paragraph(
        "Limits of all experiments: the paper trains all weights, and orpo-lite trains an adapter. "
        "The bases are hundreds of times smaller than the paper's smallest model, and the pairs "
        "are fewer by a factor of a hundred or more. A claim that does not hold here may hold at "
        "the paper's scale, and the other way round."
    )


def _section(
    name: str, found: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]], folder: str
) -> Iterator[str]:
    experiment = EXPERIMENTS[name]
    yield f"## {name}: {experiment.title}\n"
    yield _paragraph(f"**Claim** ({experiment.source}). {experiment.claim}")
    yield _paragraph(f"**Set-up.** {experiment.setup}{_sizes(experiment.arms, trainings)}")
    if found.get("note"):
        yield _paragraph(f"**Measured.** {found['note']}")
    if found["plot"]:
        yield f"![{experiment.title}]({folder}/{name.lower()}.svg)\n"
    yield from _ends(found["plot"].get("ends", {}))
    yield from _table(found.get("table", ()))
    claims = [check for check in found["checks"] if check["is_claim"]]
    others = [check for check in found["checks"] if not check["is_claim"]]
    yield from _checks(claims)
    yield f"**Verdict: {verdict_text(found)}.**\n"
    if others:
        yield "Not part of the claim:\n"
        yield from _checks(others)
    yield _paragraph(f"**Limits.** {experiment.limits}")


def _ends(ends: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    """Yield a table of the log-probabilities at the end of each arm."""
    if not ends:
        return
    kinds = [*next(iter(ends.values()))]
    names = [f"{kind}: {name}" for kind in kinds for name in ("chosen", "rejected", "margin")]
    yield f"| end of the training | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for label, found in ends.items():
        values = [_number(value) for kind in kinds for value in found[kind]]
        yield f"| {label} | {' | '.join(values)} |"
    yield ""


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table. Its first row has the names of the columns."""
    for number, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield f"|{'---|' * len(row)}"
    if rows:
        yield ""


def _sizes(arms: Sequence[tuple[Any, str]], trainings: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence with the numbers of pairs and steps of the trainings of an experiment."""
    texts = []
    for base in dict.fromkeys(base.name for base, _ in arms):
        names = [arm for found, arm in arms if found.name == base]
        rows = [row for row in trainings if row["base"] == base and row["arm"] in names]
        if rows:
            pairs, held_out, steps = (
                " or ".join(str(value) for value in sorted({row[key] for row in rows}))
                for key in ("pairs", "held_out", "steps")
            )
            texts.append(
                f" {base}, {' and '.join(names)}: {pairs} pairs, {steps} steps, "
                f"{held_out} held-out pairs."
            )
    return "".join(texts)


def _checks(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| statement | measured on | value | 95% interval | each seed | verdict |"
    yield "|---|---|---|---|---|---|"
    for check in checks:
        low, high = check["low"], check["high"]
        interval = "" if low is None else f"{_number(low)} to {_number(high)}"
        each = ", ".join(_number(value) for value in check["each"])
        has_bounds = check["minimum"] is not None or check["maximum"] is not None
        verdict = check["verdict"] if has_bounds else "reported"
        cells = (check["statement"], check["pairs"], _number(check["value"]), interval, each)
        yield f"| {' | '.join(cells)} | {verdict} |"
    yield ""


def _number(value: float) -> str:
    return f"{value:.3f}"


def _paragraph(text: str) -> str:
    """Return a text as lines of at most 100 characters, followed by an empty line."""
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, ""])
