"""The experiments: what the paper claims, and what is measured here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.paper import answers, cost, graders
from benchmarks.paper.check import Check, over_pairs, together
from benchmarks.paper.study import MAIN, SECOND, Base, Run, Scores, Study

SAMPLES = 50_000
MEANS, SUMS = "mean log P, as printed", "summed log P"
"""The two forms of the probability ratio in E4."""
PAIRS = ("held-out", "training")
SIDES = ("chosen", "rejected", "margin")
LAMBDAS = ("0.1", "0.5", "1", "5")


@dataclass(frozen=True)
class Outcome:
    """What an experiment measured."""

    checks: Sequence[Check]
    plot: Mapping[str, Any] = field(default_factory=dict)
    """The data of the plot; see :mod:`benchmarks.paper.figures`."""
    note: str = ""
    """Sentences about the measurement; "" for none."""
    table: Sequence[Sequence[str]] = ()
    """A table of what was measured. Its first row has the names of the columns."""

    def to_json(self) -> dict[str, Any]:
        """Return the checks, the verdict of each part of the claim, and the data of the plot."""
        parts = dict.fromkeys(check.part for check in self.checks if check.is_claim)
        verdicts = {
            part: together([check for check in self.checks if check.part == part]) for part in parts
        }
        return {
            "verdicts": verdicts,
            "checks": [check.to_json() for check in self.checks],
            "plot": self.plot,
            "note": self.note,
            "table": self.table,
        }


@dataclass(frozen=True)
class Experiment:
    """A claim of the paper, and the function that tries it."""

    title: str
    source: str
    """Where the paper makes the claim."""
    claim: str
    setup: str
    limits: str
    measure: Callable[[Study], Outcome]
    arms: tuple[tuple[Base, str], ...] = ()
    """The trainings that it needs."""
    is_of_answers: bool = False
    """True: it needs the comparison of E5 and E6."""
    first_seed_only: bool = False
    """True: it needs its trainings with the first seed only."""


# --- E0


def spread(_: Study) -> Outcome:
    """Sample the two ratios of two random probabilities, and compare their variances."""
    first, second = np.random.default_rng(0).uniform(size=(2, SAMPLES))
    ratio = np.log(first) - np.log(second)
    odds = ratio - (np.log1p(-first) - np.log1p(-second))
    samples = {"β log ratio, β = 0.2": 0.2 * ratio, "β log ratio, β = 1": ratio, "log odds": odds}
    expected = (2 * 0.2**2, 2.0, 2 * np.pi**2 / 3)
    checks = [
        Check(
            f"variance of {name} is {value:.3g}, within 3%",
            "samples",
            float(values.var()),
            minimum=0.97 * value,
            maximum=1.03 * value,
        )
        for (name, values), value in zip(samples.items(), expected, strict=True)
    ]
    edges = np.linspace(-8, 8, 81)
    shares = {
        name: [round(float(share), 5) for share in np.histogram(values, edges, density=True)[0]]
        for name, values in samples.items()
    }
    return Outcome(checks, {"edges": [round(float(edge), 3) for edge in edges], "density": shares})


# --- E1 to E4: log-probabilities during a training

Value = Callable[[Run, str], Any]
"""Returns a value for each pair of a run: ``held-out`` or ``training`` pairs."""


def end_of(name: str) -> Value:
    """Return the value ``chosen_P``, ``rejected_P`` or ``margin_P`` at the end of the training."""
    return lambda run, pairs: getattr(run.scores(pairs, "end"), name)


def change_of(name: str) -> Value:
    """Return what the training adds to a value."""
    return lambda run, pairs: (
        getattr(run.scores(pairs, "end"), name) - getattr(run.scores(pairs, "start"), name)
    )


def check_runs(
    statement: str,
    runs: Sequence[Run],
    value: Value,
    minus: Sequence[Run] | None = None,
    **bounds: Any,
) -> list[Check]:
    """Return a check of a mean over held-out pairs, and one of a mean over training pairs.

    Args:
        statement: what is true if the mean lies within the bounds.
        runs: the trainings of one arm, one for each seed.
        value: the value of each pair.
        minus: the trainings of the arm whose value is subtracted, in the same order of seeds.
        bounds: ``minimum``, ``maximum`` and ``is_claim`` of the check.
    """
    checks = []
    for pairs in PAIRS:
        trainings = []
        for index, run in enumerate(runs):
            values_P = value(run, pairs)
            if minus is not None:
                values_P = values_P - value(minus[index], pairs)
            trainings.append((values_P, run.prompts[pairs]))
        checks.append(over_pairs(statement, pairs, trainings, **bounds))
    return checks


def curves(arms: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return the data of a plot: the mean log-probabilities of each arm, averaged over its seeds.

    ``curves``: of the held-out pairs, in each evaluation. ``ends``: of all pairs, at the end.
    """
    found: dict[str, Any] = {}
    ends: dict[str, Any] = {}
    for label, runs in arms.items():
        rows = [[*run.held_out.items()] for run in runs]
        count = min(len(row) for row in rows)
        last = rows[0][-1][0]
        found[label] = {"share": [round(step / last, 4) for step, _ in rows[0][:count]]}
        for name in SIDES:
            means = [[_mean(scores, name) for _, scores in row[:count]] for row in rows]
            found[label][name] = [round(value, 5) for value in np.mean(means, 0).tolist()]
        ends[label] = {
            pairs: [
                round(float(np.mean([_mean(run.scores(pairs, "end"), name) for run in runs])), 5)
                for name in SIDES
            ]
            for pairs in PAIRS
        }
    return {"curves": found, "ends": ends}


def _mean(scores: Scores, name: str) -> float:
    return float(getattr(scores, f"{name}_P").mean())


def sft(study: Study) -> Outcome:
    """Measure how SFT on the chosen replies changes both log-probabilities."""
    checks, lines = [], {}
    for base in (MAIN, SECOND):
        runs = study.runs("sft", base)
        lines[base.name] = runs
        for side in ("chosen", "rejected"):
            statement = f"{base.name}: SFT adds more than 0.5 nat to the {side} log-probability"
            checks += check_runs(statement, runs, change_of(f"{side}_P"), minimum=0.5)
        statement = f"{base.name}: change of the margin, chosen minus rejected"
        checks += check_runs(statement, runs, change_of("margin_P"), is_claim=False)
    return Outcome(checks, curves(lines))


def orpo(study: Study) -> Outcome:
    """Compare ORPO with λ = 1 and SFT at the end of their trainings."""
    checks, lines = [], {}
    for base in (MAIN, SECOND):
        plain, tuned = study.runs("sft", base), study.runs("orpo-1", base)
        lines |= {f"{base.name} SFT": plain, f"{base.name} ORPO": tuned}
        for side in ("chosen", "margin"):
            what = "the margin" if side == "margin" else "the chosen log-probability"
            statement = f"{base.name}: ORPO raises {what}"
            checks += check_runs(statement, tuned, change_of(f"{side}_P"), minimum=0.0)
        checks += check_runs(
            f"{base.name}: the margin of ORPO is larger than that of SFT",
            tuned,
            end_of("margin_P"),
            plain,
            minimum=0.0,
        )
        checks += check_runs(
            f"{base.name}: the rejected log-probability of ORPO is lower than that of SFT",
            tuned,
            end_of("rejected_P"),
            plain,
            maximum=0.0,
        )
        checks += check_runs(
            f"{base.name}: the chosen log-probability of ORPO minus that of SFT",
            tuned,
            end_of("chosen_P"),
            plain,
            is_claim=False,
        )
        checks += check_runs(
            f"{base.name}: ORPO lowers the rejected log-probability below that of the base",
            tuned,
            change_of("rejected_P"),
            maximum=0.0,
            is_claim=False,
        )
        checks += check_runs(
            f"{base.name}: share of pairs whose chosen reply is more likely, after ORPO",
            tuned,
            lambda run, pairs: (run.scores(pairs, "end").margin_P > 0).astype(float),
            is_claim=False,
        )
    return Outcome(checks, curves(lines))


def weight(study: Study) -> Outcome:
    """Compare the ends of the trainings with four values of λ."""
    arms = {name: study.runs(f"orpo-{name}") for name in LAMBDAS}
    checks: list[Check] = []
    for less, more in pairwise(LAMBDAS):
        checks += check_runs(
            f"the margin grows from λ = {less} to λ = {more}",
            arms[more],
            end_of("margin_P"),
            arms[less],
            minimum=0.0,
        )
        checks += check_runs(
            f"the chosen log-probability falls from λ = {less} to λ = {more}",
            arms[more],
            end_of("chosen_P"),
            arms[less],
            maximum=0.0,
        )
    return Outcome(checks, curves({f"λ = {name}": runs for name, runs in arms.items()}))


def ratio(study: Study) -> Outcome:
    """Compare the odds ratio with the probability ratio, of means and of sums."""
    odds, mean, total = (study.runs(name) for name in ("orpo-1", "pr-mean", "pr-sum"))
    rejected, checks = change_of("rejected_P"), list[Check]()
    ratios = ((MEANS, "the ratio of means", mean), (SUMS, "the ratio of sums", total))
    for claim, name, runs in ratios:
        statement = f"{name} pushes the rejected log-probability below that of the base"
        checks += check_runs(statement, runs, rejected, maximum=0.0, claim=claim)
        statement = f"{name}: the rejected log-probability ends under -4"
        checks += check_runs(statement, runs, end_of("rejected_P"), maximum=-4.0, claim=claim)
    statement = "the odds ratio does not push the rejected log-probability below that of the base"
    checks += check_runs(statement, odds, rejected, minimum=0.0, claim="odds ratio")
    for side in ("chosen", "rejected"):
        checks += check_runs(
            f"{side} log-probability: the odds ratio and the ratio of means end within 0.05 nat",
            odds,
            end_of(f"{side}_P"),
            mean,
            minimum=-0.05,
            maximum=0.05,
            is_claim=False,
        )
    for name, runs in (("the odds ratio", odds), *((name, runs) for _, name, runs in ratios)):
        statement = f"{name}: change of the chosen log-probability from the base"
        checks += check_runs(statement, runs, change_of("chosen_P"), is_claim=False)
    lines = {"odds ratio": odds, "ratio of means": mean, "ratio of sums": total}
    return Outcome(checks, curves(lines))


def wins(study: Study) -> Outcome:
    """Compare ORPO with the other arms by the rewards that a judge gives to their answers."""
    found = answers.compared(study)
    return Outcome(
        answers.check_wins(found),
        answers.plot_of_wins(found),
        answers.describe_wins(found),
        answers.table_of_wins(found),
    )


def diversity(study: Study) -> Outcome:
    """Compare how much the answers of ORPO and of DPO differ, for one prompt and across prompts."""
    found = answers.compared(study)
    return Outcome(
        answers.check_diversity(found),
        answers.plot_of_diversity(found),
        answers.describe_diversity(found),
        answers.table_of_diversity(found),
    )


def passes(study: Study) -> Outcome:
    """Count the rows of a step of ORPO and of DPO, and time the steps."""
    checks, plot = cost.compare(study)
    return Outcome(checks, plot)


def formats(study: Study) -> Outcome:
    """Answer some prompts of each grader, and read the answers as the grader does."""
    return Outcome(graders.check(study))
