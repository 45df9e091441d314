"""Write the report of a comparison: one HTML file that needs no network and no script."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from orpo_lite import __version__
from orpo_lite.comparing.answers import Judged, Rounds
from orpo_lite.comparing.arms import uses
from orpo_lite.comparing.split import Question
from orpo_lite.comparing.table import ArmRow, Comparison
from orpo_lite.comparing.task import ADAPTER_KEY, Run, Task
from orpo_lite.comparing.win_rates import WinRate
from orpo_lite.evaluation.charts import Chart, Line, draw
from orpo_lite.evaluation.intervals import Interval
from orpo_lite.evaluation.report import render, with_picture
from orpo_lite.evaluation.report_texts import ICONS
from orpo_lite.recipe.loss import LossSection
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.atomic import write_text
from orpo_lite.runs.lock import read_recipe
from orpo_lite.runs.records import read_scores

PAGE = "compare.html"
BINS = 24
SHOWN_PROMPTS = 3
LONGEST = 2000  # characters of a shown text
GRAVITY = {"better": "good", "worse": "serious", "cannot tell": "unknown"}


def write_page(
    task: Task,
    result: Comparison,
    questions: Sequence[Question],
    answers: Mapping[str, Rounds],
    judged: Judged,
) -> None:
    """Write compare.html into the folder of a comparison."""
    charts = [*_log_prob_charts(task), _reward_chart(task, judged)]
    body = render(
        "compare_body.html",
        Path(__file__).parent,
        title=task.folder.name,
        result=result,
        base=_shown_path(task.recipe.model.model_name_or_path),
        judge_base=_shown_path(task.judge_base),
        data=", ".join(map(_shown_path, task.recipe.data.names)),
        names=[row.name for row in result.arms],
        matrix=_matrix(result),
        wins=[_win_row(win) for win in result.wins],
        arms=[_arm_row(row) for row in result.arms],
        costs=[_cost_row(row, result) for row in result.arms],
        accuracy=_share(result.judge.accuracy),
        charts=[with_picture(chart, Markup(draw(chart))) for chart in charts if chart.lines],  # noqa: S704 - matplotlib escapes texts
        trained=_setting_runs(task),
        settings=_settings(task),
        answers=_answers(task, questions, answers),
        icons=ICONS,
        version=__version__,
    )
    page = render("report.html", title=f"{task.folder.name}, comparison", body=body, live=False)
    write_text(task.folder / PAGE, page)


def _shown_path(name: str) -> str:
    """Return the last part of a path. Other names are returned unchanged."""
    return Path(name).name if Path(name).exists() else name


Cell = tuple[str, str]
"""A value and its interval, as texts."""


def _share(found: Interval) -> Cell:
    if found.value is None:
        return "–", ""
    if found.low is None or found.high is None:
        return f"{found.value:.1%}", ""
    return f"{found.value:.1%}", f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def _number(found: Interval) -> Cell:
    if found.value is None:
        return "–", ""
    parts = [found.value, found.low, found.high]
    texts = [f"{part:.3f}".replace("-", "\u2212") for part in parts if part is not None]
    return texts[0], f"{texts[1]} to {texts[2]}" if len(texts) == 3 else ""


def _matrix(result: Comparison) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return a row for each arm: (value, interval, gravity) of its win rate against each arm."""
    cells = {}
    for win in result.wins:
        cells[win.model, win.against] = (*_share(win.rate), GRAVITY[win.outcome])
        back = win.rate
        if back.value is not None:
            low, high = (None if v is None else 1 - v for v in (back.high, back.low))
            back = Interval(1 - back.value, low, high)
        opposite = {"better": "worse", "worse": "better"}.get(win.outcome, win.outcome)
        cells[win.against, win.model] = (*_share(back), GRAVITY[opposite])
    names = [row.name for row in result.arms]
    return [(one, [cells.get((one, other), ("", "", "")) for other in names]) for one in names]


def _win_row(win: WinRate) -> dict[str, Any]:
    rounds = ", ".join(f"{rate:.1%}" for rate in win.by_round)
    return {
        "name": f"{win.model} against {win.against}",
        "outcome": win.outcome,
        "gravity": GRAVITY[win.outcome],
        "rate": _share(win.rate),
        "rounds": rounds,
        "round_sd": _points(win.round_sd),
        "seed_sd": _points(win.seed_sd),
        "length_controlled": _share(win.length_controlled),
        "tokens": " and ".join(f"{tokens:.1f}" for tokens in win.tokens),
        "needed": f"{win.prompts_needed:,}" if win.prompts_needed else "–",
    }


def _points(deviation: float | None) -> str:
    return "–" if deviation is None else f"{100 * deviation:.1f}"


def _arm_row(row: ArmRow) -> dict[str, Any]:
    shown = [
        "–" if value is None else f"{value:.4f}".replace("-", "\u2212")
        for value in (row.diversity.pid, row.diversity.aid)
    ]
    return {
        "name": row.name,
        "reward": _number(row.reward),
        "tokens": f"{row.tokens:.1f}",
        "cut": f"{row.cut:.0%}",
        "pid": shown[0],
        "aid": shown[1],
    }


def passes(row: ArmRow) -> str:
    """Return the sequences of a pair that go through the model, as text: ``2 + 2 reference``."""
    reference = row.cost.reference_sequences
    kind = "forward + sampling" if row.cost.samples else "reference"
    return f"{row.cost.trained_sequences}" + (f" + {reference} {kind}" if reference else "")


def mean_win_rate(name: str, wins: Sequence[WinRate]) -> float | None:
    """Return the mean of an arm's win rates against all other arms; None if one is unknown."""
    rates = [win.rate.value for win in wins if win.model == name]
    against = [win.rate.value for win in wins if win.against == name]
    if None in rates or None in against:
        return None
    values = [*rates, *(1 - rate for rate in against if rate is not None)]
    return float(np.mean([value for value in values if value is not None]))


def _cost_row(row: ArmRow, result: Comparison) -> dict[str, Any]:
    cost, rate = row.cost, mean_win_rate(row.name, result.wins)
    seconds = f"{cost.seconds:,.1f}"
    if cost.starts_from:
        seconds += f" (+ {cost.before_seconds:,.1f} of {cost.starts_from})"
    return {
        "name": row.name,
        "rate": "–" if rate is None else f"{rate:.1%}",
        "passes": passes(row),
        "steps": f"{cost.steps:,.0f}",
        "kept": f"{cost.kept_step:,.0f}",
        "sequences": f"{cost.pairs * cost.trained_sequences:,.0f}",
        "seconds": seconds,
        "memory": f"{cost.memory_gib:.2f}",
        "learning_rate": f"{cost.learning_rate:g}",
    }


def _log_prob_charts(task: Task) -> list[Chart]:
    """Return charts of the held-out log-probabilities over the steps, with a line for each arm."""
    means: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for arm in task.arms:
        steps = means.setdefault(arm.name, {})
        for run in task.runs_of(arm):
            for row in read_scores(run.path):
                pair = tuple(_mean(row[reply]) for reply in ("chosen", "rejected"))
                steps.setdefault(row["step"], []).append(pair)  # type: ignore[arg-type]
    curves = {
        arm: {step: np.mean(found, 0) for step, found in sorted(steps.items())}
        for arm, steps in means.items()
    }
    specs = (
        ("chosen", "Log-probability of chosen", (1, 0)),
        ("rejected", "Log-probability of rejected", (0, 1)),
        ("margin", "Margin of the log-probabilities", (1, -1)),
    )
    note = "Mean over the tokens of the validation replies, as in Figs 3, 7 and 9 of the paper."
    charts = []
    for key, title, factors in specs:
        lines = [
            Line(
                arm,
                [*steps],
                [float(np.dot(factors, pair)) for pair in steps.values()],
                n,
                n + n // 4,
                True,
            )
            for n, (arm, steps) in enumerate(curves.items())
            if steps
        ]
        charts.append(Chart(key, title, note, lines, "high" if key == "margin" else ""))
    return charts


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _reward_chart(task: Task, judged: Judged) -> Chart:
    """Return a chart of the distribution of the rewards of each arm's answers."""
    found = {}
    for arm in task.arms:
        rewards = np.concatenate([judged.rewards[run.name].ravel() for run in task.runs_of(arm)])
        found[arm.name] = rewards[np.isfinite(rewards)]
    every = np.concatenate([*found.values()])
    lines: list[Line] = []
    if len(every):
        edges = np.histogram_bin_edges(every, BINS)
        centres = [float(value) for value in (edges[:-1] + edges[1:]) / 2]
        for n, (name, rewards) in enumerate(found.items()):
            shares = np.histogram(rewards, edges)[0] / max(1, len(rewards))
            lines.append(Line(name, centres, [float(v) for v in shares], n, n + n // 4, True))
    note = "Share of an arm's answers with this reward of the judge, as in Figs 5 and 11."
    return Chart("rewards", "Rewards of the answers", note, lines, percent=True, axis="reward")


def _setting_runs(task: Task) -> dict[str, Run]:
    """Return the runs of the table of settings by name: the first seed of each training."""
    found = {"judge": task.judge}
    if task.reward_runs:
        found["reward model of ppo"] = task.reward_runs[0]
    return found | {arm.name: task.runs_of(arm)[0] for arm in task.arms}


def _settings(task: Task) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between the trainings, with the value of each.

    A key of the section loss is shown only for the losses that use it.
    """
    runs = [*_setting_runs(task).values()]
    columns = [_values(task, run) for run in runs]
    defaults = {f"loss.{key}": field.default for key, field in LossSection.model_fields.items()}
    rows = []
    for key in columns[0]:
        used = [
            values[key]
            for values, run in zip(columns, runs, strict=True)
            if uses(run.arm.loss, key)
        ]
        unlike = {json.dumps(value) for value in used}
        if len(used) < len(runs):  # a key of some losses counts if it has a value of its own
            unlike.add(json.dumps(defaults[key]))
        if key != "training.output_dir" and len(unlike) > 1:
            texts = [
                to_text(_last_part(values[key])) if uses(run.arm.loss, key) else "–"
                for values, run in zip(columns, runs, strict=True)
            ]
            rows.append((key, texts))
    return rows


def _values(task: Task, run: Run) -> dict[str, Any]:
    """Return the settings of a run.

    Those of the section lora are of the training that made the adapter: the run itself has them
    from the adapter's file, which spells all-linear out.
    """
    values = dict(read_recipe(run.path).items())
    start = task.read_by(run).get(ADAPTER_KEY)
    if start is None:
        return values
    made = dict(read_recipe(start.path).items())
    return values | {key: made[key] for key in values if key.startswith("lora.")}


def _last_part(value: Any) -> Any:
    """Return the last two parts of an absolute path. Other values are returned unchanged."""
    is_path = isinstance(value, str) and value.startswith("/")
    return "/".join(Path(value).parts[-2:]) if is_path else value


def _answers(
    task: Task, questions: Sequence[Question], answers: Mapping[str, Rounds]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the first prompts, each with the first answer of each arm."""
    shown = []
    for row, question in enumerate(questions[:SHOWN_PROMPTS]):
        texts = [
            (arm.name, _cut(answers[task.runs_of(arm)[0].name][0][row].text or ""))
            for arm in task.arms
        ]
        shown.append((_cut("\n".join(turn["content"] for turn in question.messages)), texts))
    return shown


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
