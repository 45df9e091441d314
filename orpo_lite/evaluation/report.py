"""Write the report of one or more runs: one HTML file that needs no network and no script."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from orpo_lite import __version__
from orpo_lite.errors import RecipeError
from orpo_lite.evaluation.charts import Better, Chart, Line, draw
from orpo_lite.evaluation.health import Finding
from orpo_lite.evaluation.report_texts import ICONS, differing_settings, run_texts
from orpo_lite.evaluation.run_record import RunRecord, rows_of
from orpo_lite.recipe.text import GIB
from orpo_lite.runs.atomic import write_text
from orpo_lite.runs.records import REPORT

MOST_RUNS = 8
MARK, HEAD = b"orpo-lite report", 4096  # every report contains MARK in its first HEAD bytes


class Spec(NamedTuple):
    """The texts and metrics of a chart."""

    key: str
    title: str
    note: str
    metrics: Mapping[str, str]
    """Name of a metric -> its label. The label is "" if the chart has only one metric."""
    better: Better = ""
    percent: bool = False


SPECS = (
    Spec("loss", "Loss", "What the training minimises: see loss.type in the settings.",
         {"loss": ""}, "low"),
    Spec("nll", "NLL of the chosen answers", "Mean negative log-likelihood of a token.",
         {"nll_loss": ""}, "low"),
    Spec("logps", "Log-probabilities", "Mean log-probability of an answer's tokens, as in Figs 3, "
         "7 and 9 of the paper.", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, "high"),
    Spec("odds", "Log odds ratio", "How much more likely the chosen answer is than the rejected "
         "one.", {"log_odds_chosen": ""}, "high"),
    Spec("accuracy", "Reward accuracy", "Share of pairs whose chosen answer has the higher "
         "reward. ORPO's reward is β times the mean log-probability.",
         {"rewards/accuracies": ""}, "high", percent=True),
    Spec("margin", "Reward margin", "Reward of the chosen minus reward of the rejected answer.",
         {"rewards/margins": ""}, "high"),
    Spec("rate", "Learning rate", "The learning rate of each step.", {"learning_rate": ""}),
    Spec("norm", "Gradient norm", "Length of the gradient before clipping.", {"grad_norm": ""}),
    Spec("speed", "Tokens per second", "Tokens of both sequences of a pair, in training steps.",
         {"tokens_per_second": ""}),
)  # fmt: skip
MEAN_REWARD = Spec(
    "mean-reward", "Mean reward", "Mean over both answers of a pair, by a reward model. Only "
    "differences of rewards have a meaning.", {"mean_reward": ""},
)  # fmt: skip
SAMPLED = (
    Spec("sampled-reward", "Reward of sampled answers", "Mean score by the reward model, without "
         "the KL penalty.", {"objective/scores": ""}, "high"),
    Spec("kl", "KL to the reference model", "Mean over sampled answers, in nats. The penalty is "
         "meant to keep it near loss.kl_target.", {"objective/kl": ""}),
)  # fmt: skip
"""The charts of PPO."""
MEMORY = Spec(
    "memory", "GPU memory", "Peak so far in GiB: memory of tensors, and memory reserved by torch.",
    {"memory_gib": "tensors", "memory_reserved_gib": "reserved"},
)  # fmt: skip


@dataclass(frozen=True)
class ReportResult:
    """The result of writing a report."""

    file: Path
    health: Mapping[str, Sequence[Finding]]
    """Run folder -> verdicts on its curves, the most serious first."""
    verdicts: Mapping[str, Sequence[str]]
    """Run folder -> sentences that say whether the model got better; [] without an evaluation."""
    notes: Sequence[str]
    """Sentences that say which files of the runs could not be read."""


def report(
    *run_folders: str | Path, to: str | Path | None = None, data_texts: bool = True
) -> ReportResult:
    """Write an HTML report on one run, or on several runs with their curves in the same charts.

    Args:
        run_folders: folders of runs. A run may still be training.
        to: the file to write. None: report.html in the run folder, or in the current folder if
            there are several runs.
        data_texts: True: show whole paths, and the held-out prompts with the model's answers.
            False: shorten paths to their last part, and leave out these prompts and answers. Use
            False for a copy that other people will see.

    Raises:
        CheckpointError: a folder is not a run, or the file cannot be written.
        RecipeError: ``to`` exists and is not a report; there is no run folder, or there are more
            than :data:`MOST_RUNS`.
    """
    paths = [Path(folder).expanduser() for folder in run_folders]
    if to:
        _refuse_other_file(Path(to).expanduser())
    records = read_runs(paths)
    file = Path(to).expanduser() if to else (paths[0] if len(paths) == 1 else Path()) / REPORT
    write_text(file, make_page(records, data_texts=data_texts))
    return ReportResult(
        file,
        {str(record.path): record.health for record in records},
        {
            str(record.path): [
                str(row.get("text", ""))
                for verdict in record.verdicts.values()
                for row in rows_of(verdict, "comparisons")
            ]
            for record in records
        },
        [note for record in records for note in record.notes],
    )


def _is_report(file: Path) -> bool:
    with file.open("rb") as stream:
        return MARK in stream.read(HEAD)


def _refuse_other_file(file: Path) -> None:
    """Raise :class:`RecipeError` if a path exists and is not a report that this package wrote."""
    if not file.exists():
        return
    if file.is_dir():
        found, free = "is a folder", file / REPORT
    elif _is_report(file):
        return
    else:
        found, free = "exists already and is not a report", file.with_name(REPORT)
    raise RecipeError(
        where=f"--to {file}",
        found=found,
        expected="a new file, or a report to replace",
        fix=f"--to {free}",
    )


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read 1 to :data:`MOST_RUNS` runs. Raise :class:`RecipeError` for fewer or more."""
    if not 0 < len(paths) <= MOST_RUNS:
        raise RecipeError(
            where="orpo-lite report",
            found=f"{len(paths)} runs",
            expected=f"1 to {MOST_RUNS} run folders",
            fix=f"give the folders of at most {MOST_RUNS} runs",
        )
    return [RunRecord.read(path) for path in paths]


def make_page(records: Sequence[RunRecord], *, data_texts: bool = True) -> str:
    """Return the page as HTML, without a script. For ``data_texts`` see :func:`report`."""
    return wrap_body(make_body(records, data_texts=data_texts), records)


def make_body(
    records: Sequence[RunRecord], *, data_texts: bool = True, live: bool = False
) -> Markup:
    """Return the visible content of the page. On a live page, a script replaces it."""
    # matplotlib escapes the texts in its pictures.
    charts = [with_picture(chart, Markup(draw(chart))) for chart in make_charts(records)]  # noqa: S704
    labels = _labels(records)
    runs = [
        run_texts(record, label, data_texts) for record, label in zip(records, labels, strict=True)
    ]
    differing = differing_settings(records, labels, data_texts) if len(runs) > 1 else []
    return render(
        "report_body.html",
        title=_title(records),
        runs=runs,
        charts=charts,
        differing=differing,
        icons=ICONS,
        version=__version__,
        live=live,
    )


def wrap_body(body: Markup, records: Sequence[RunRecord], *, live: bool = False) -> str:
    """Return the whole page with the given body. Only a page with ``live=True`` has a script."""
    return render("report.html", title=_title(records), body=body, live=live)


def _title(records: Sequence[RunRecord]) -> str:
    return records[0].name if len(records) == 1 else f"{len(records)} runs"


def render(template: str, *folders: Path, **values: Any) -> Markup:
    """Return a template of this folder with the values filled in. Every text is escaped.

    ``folders``: further folders with templates.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return Markup(environment.get_template(template).render(values))  # noqa: S704 - escaped


def _code(text: str) -> Markup:
    """Return a text as HTML, with words in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


# --- charts


def make_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts of one or more runs.

    For one run a chart shows its training and held-out curves. For several runs a chart shows one
    curve of each run.
    """
    charts = []
    for spec in (*SPECS, MEAN_REWARD, *SAMPLED, MEMORY):
        on_gpu = any("memory_reserved_gib" in row for record in records for row in record.rows)
        if spec is MEMORY and not on_gpu:
            continue
        if len(records) == 1:
            charts.append(_chart(spec, [*_lines(spec, records[0])], _level(spec, records[0])))
            continue
        labels = _labels(records)
        for metric, name in spec.metrics.items():
            lines = [
                line
                for number, record in enumerate(records)
                if (line := _one_line(metric, record, labels[number], number))
            ]
            title = f"{spec.title}, {name}" if name else spec.title
            part = spec._replace(key=f"{spec.key}{name}", title=title)
            charts.append(_chart(part, lines, None))
    return [chart for chart in charts if chart.lines]


def _chart(spec: Spec, lines: list[Line], level: tuple[str, float] | None) -> Chart:
    return Chart(spec.key, spec.title, spec.note, lines, spec.better, spec.percent, level)


def _level(spec: Spec, record: RunRecord) -> tuple[str, float] | None:
    planned = record.plan.get("peak_bytes")
    if spec is not MEMORY or not isinstance(planned, int | float):
        return None
    return "planned peak of tensors", planned / GIB


def _lines(spec: Spec, record: RunRecord) -> Iterator[Line]:
    for number, (metric, name) in enumerate(spec.metrics.items()):
        for held_out, kind in ((False, "training"), (True, "held-out")):
            steps, values = _series(record, f"eval_{metric}" if held_out else metric)
            if not steps:
                continue
            single = len(spec.metrics) == 1
            colour = int(held_out) if single else number
            label = ", ".join(part for part in (name, kind) if part)
            if not any(f"eval_{metric}" in row for row in record.rows):
                label = name or kind
            yield Line(label, steps, values, colour, 2 * number + held_out, held_out)


def _one_line(metric: str, record: RunRecord, label: str, number: int) -> Line | None:
    """Return a run's curve of a metric: the held-out curve if there is one, else the training's."""
    for held_out in (True, False):
        steps, values = _series(record, f"eval_{metric}" if held_out else metric)
        if steps:
            style = number + number // 4
            return Line(label, steps, values, number, style, held_out, faint=False)
    return None


def _series(record: RunRecord, key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in record.rows if key in row]
    values = [math.nan if row[key] is None else float(row[key]) for row in rows]
    return [row["step"] for row in rows], values


def with_picture(chart: Chart, picture: object) -> dict[str, Any]:
    """Return what report_charts.html shows of a chart. ``picture``: the chart as SVG."""
    header, rows = chart.table()
    return {
        "key": chart.key,
        "title": chart.title,
        "note": chart.note,
        "picture": picture,
        "summary": chart.summary(),
        "header": header,
        "rows": rows,
    }


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Return a short name for each run, with a letter before it if there are several runs."""
    if len(records) == 1:
        return [records[0].name]
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in (r.name for r in records)]
    return [f"{chr(65 + number)} {name}" for number, name in enumerate(short)]
