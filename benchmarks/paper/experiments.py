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
        """Return the checks, the verdict of each kind of pairs, and the data of the plot."""
        kinds = dict.fromkeys(check.pairs for check in self.checks if check.is_claim)
        verdicts = {
            kind: together([check for check in self.checks if check.pairs == kind])
            for kind in kinds
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
    checks: list[Check] = []
    for side in ("chosen", "rejected"):
        checks += check_runs(
            f"{side} log-probability: the odds ratio and the ratio of mean log-probabilities "
            "end within 0.05 nat of each other",
            odds,
            end_of(f"{side}_P"),
            mean,
            minimum=-0.05,
            maximum=0.05,
        )
    checks += check_runs(
        "the ratio of mean log-probabilities: the rejected log-probability ends under -4",
        mean,
        end_of("rejected_P"),
        maximum=-4.0,
        is_claim=False,
    )
    named = (("the odds ratio", odds), ("the ratio of summed log-probabilities", total))
    for name, runs in named:
        bounds = {"maximum": -4.0} if runs is total else {"minimum": -4.0}
        where = "under" if runs is total else "above"
        checks += check_runs(
            f"{name}: the rejected log-probability ends {where} -4",
            runs,
            end_of("rejected_P"),
            **bounds,
        )
        for side in ("chosen", "rejected"):
            statement = f"{name}: change of the {side} log-probability from the base"
            checks += check_runs(statement, runs, change_of(f"{side}_P"), is_claim=False)
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


LOGPS = (
    "Log-probabilities are means over the tokens of a reply (Eq. 3). The paper's Fig. 7 is drawn "
    "from training batches. Here they are measured on pairs that were not trained on, and also on "
    "the training pairs."
)
SMALL = (
    "The bases are small story models that cannot answer instructions, and a few hundred pairs "
    "teach them little about which reply is better."
)

EXPERIMENTS: dict[str, Experiment] = {
    "E0": Experiment(
        "The spread of the two ratios",
        "Fig. 6, Appendix B",
        "For two random probabilities, the log odds ratio has a much wider distribution than the "
        "log probability ratio times β. A loss on the odds ratio is therefore satisfied without "
        "an extreme contrast between the two replies.",
        f"{SAMPLES:,} samples of X1 and X2, uniform between 0 and 1. Exact values: 2β² for "
        "β(log X1 - log X2), and 2π²/3 for logit X1 - logit X2.",
        "This is a fact about uniform probabilities. The probability of a reply is not uniform: "
        "where it is small, log odds and log-probability are nearly equal (see E4).",
        spread,
    ),
    "E1": Experiment(
        "SFT also makes rejected replies likely",
        "Fig. 3, Section 3",
        "Fine-tuning on the chosen replies alone raises the log-probability of the rejected "
        "replies too. The NLL has nothing that holds rejected replies back.",
        f"SFT on both bases. {LOGPS}",
        "Part of the rise is the chat template and the style of the data, which are new to the "
        "bases. The paper's model, OPT-350M, is hundreds of times larger.",
        sft,
        ((MAIN, "sft"), (SECOND, "sft")),
    ),
    "E2": Experiment(
        "ORPO separates the two replies",
        "Fig. 7, Section 7",
        "ORPO learns the chosen replies as SFT does, and holds the rejected replies back: the "
        "ratio between the two grows during the training.",
        f"SFT, and ORPO with λ = 1, on both bases with the same pairs in the same order. {LOGPS}",
        f"{SMALL} A lower rejected log-probability alone is no success, because the chosen one may "
        "be lower too: see the first table. In the paper's figure the rejected log-probability "
        "itself falls. That stronger form is a row of the table, and no part of the verdict.",
        orpo,
        ((MAIN, "sft"), (MAIN, "orpo-1"), (SECOND, "sft"), (SECOND, "orpo-1")),
    ),
    "E3": Experiment(
        "A larger λ separates more, and costs likelihood",
        "Fig. 9, Appendix E",
        "As λ grows, the margin between chosen and rejected replies grows, and the chosen "
        "replies end with a lower log-probability.",
        f"ORPO with λ = 0.1, 0.5, 1 and 5, from the same base and pairs. {LOGPS} Each step from "
        "one λ to the next must hold.",
        f"{SMALL} The paper compares λ = 0.1, 0.5 and 1 with Mistral 7B on UltraFeedback.",
        weight,
        tuple((MAIN, f"orpo-{name}") for name in LAMBDAS),
    ),
    "E4": Experiment(
        "The odds ratio, or the probability ratio of sums",
        "Fig. 8, Appendix B",
        "With the probability ratio in place of the odds ratio, the rejected replies are pushed "
        "too far: their log-probability falls under -4. With the odds ratio it does not.",
        "ORPO with λ = 1, and the probability ratio with weight 1, of mean and of summed "
        f"log-probabilities. {LOGPS} P is a mean over tokens in Eq. 3. Then log(1 - P) is close to "
        "0, because P is small, and both ratios should be nearly one loss. So the fall of Fig. 8 "
        "is looked for in the ratio of sums, and the verdict is about sums.",
        "The base gives these replies about -4 before any training, so -4 is no deep "
        "level here. The changes from the base are in the table too.",
        ratio,
        ((MAIN, "orpo-1"), (MAIN, "pr-mean"), (MAIN, "pr-sum")),
    ),
    "E5": Experiment(
        "ORPO wins against SFT, DPO and PPO",
        "Tables 2 and 3, Figs. 5 and 11",
        "A reward model prefers the answers of ORPO to those of SFT (69 to 84% of the pairs of "
        "answers), to those of PPO (66 to 86%), and to those of DPO: with OPT-1.3B (58 and 71%), "
        "and more so as the model grows; with the smaller models it is 42 to "
        "51%. The paper trains ORPO for up to ten epochs and SFT for one. It has no SFT with as "
        "many epochs: that arm is added here, because without it a win over SFT may only show more "
        "training.",
        "`orpo-lite compare` on stories260k and pairs of at most "
        f"{answers.SHORT.max_length} tokens. λ is 1, as for OPT in the paper. DPO, SimPO and PPO "
        "start from the adapter of SFT. Three epochs, but one for SFT, and "
        f"{answers.PPO_STEPS} steps for PPO. The last adapter of each arm is measured. DPO, SimPO "
        "and PPO have a tenth of the learning rate of SFT and ORPO, because their losses have no "
        "NLL. Two reward models are trained on disjoint halves of the prompts: the judge, and "
        "that of PPO, which is an adapter of the same base as the arms and sees the pairs of the "
        f"arms. The latter has a learning rate of {answers.REWARD_RATE:g}, the best of four by its "
        "loss on the evaluation pairs. Both keep the adapter with the lowest such loss. A tie "
        "counts as half a win. SimPO is not in the paper; it is reported.",
        "A judge as small as this one sees style more than content: a win is a difference of its "
        "rewards, and people may prefer the other answer. There is one training of each arm and "
        "one judge, so their errors are not in the intervals. No arm's learning rate was searched: "
        "one that loses may need another. PPO had few steps and short answers. Nearly all answers "
        "are cut at the largest length. The paper's judge has 1.3B parameters, and later tables, "
        "such as that of SimPO (arXiv 2405.14734), have DPO ahead of ORPO.",
        wins,
        is_of_answers=True,
    ),
    "E6": Experiment(
        "Diversity of the answers of ORPO and DPO",
        "Table 4, Section 6.3",
        "The answers of ORPO to one prompt are more alike than those of DPO (higher per-input "
        "diversity PID), and its answers to different prompts are less alike (lower across-input "
        "diversity AID).",
        "PID is the mean cosine of the embeddings of the answers to the same prompt, and AID that "
        "of the first answers to different prompts (Eq. 12 to 15). A high value means little "
        "diversity. The intervals are over prompts; both arms answer the same prompts with the "
        "same random numbers.",
        "There is one training of each arm, so the error of the training is not measured. The "
        "answers are short, and those of a story model have little to do with the prompt, so AID "
        "measures style more than content. The paper's Phi-2 and Llama-2 answer prompts of "
        "AlpacaEval.",
        diversity,
        is_of_answers=True,
    ),
    "E7": Experiment(
        "Passes through the model",
        "Section 7.3",
        "A step of ORPO needs half the forward passes of a step of DPO, because ORPO has no "
        "reference model.",
        "Rows that go through the model are counted in a step of 16 padded pairs. Times are those "
        "of the packed step, in one process; steps of ORPO and of DPO with its reference pass "
        "alternate on the same pairs.",
        "orpo-lite computes the reference once, before the first step, and keeps it on disk. Then "
        "a step of DPO has as many rows as one of ORPO, and the reference costs one forward pass "
        "of each pair for the whole training. The backward pass is the same in both, so half the "
        "rows is not half the time. The time depends on the machine.",
        passes,
    ),
    "E8": Experiment(
        "The formats of the graders",
        "Tables 1 and 6, Fig. 12",
        "The paper grades answers with AlpacaEval, MT-Bench and IFEval. This is no claim of the "
        "paper: the answers that `orpo-lite generate` writes must be readable by these graders.",
        "A trained run answers real prompts of each grader. Each answer must be read back under "
        "its own prompt, with the fields of the answers that the authors published.",
        "No grader runs here: AlpacaEval and MT-Bench need a model behind an API. The answers of "
        "a small story model would get no score worth reporting.",
        formats,
        ((MAIN, "orpo-1"),),
        first_seed_only=True,
    ),
}
"""Name -> experiment, in the order of the page."""
