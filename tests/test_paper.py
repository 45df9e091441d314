"""The replication of the paper: its verdicts can come out each way, and its page is its figures."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED

from benchmarks.paper import answers, cost, experiments, page, study
from benchmarks.paper.answers import ARMS, Compared, across_inputs, cosines
from benchmarks.paper.check import Check, over_pairs, together
from benchmarks.paper.claims import EXPERIMENTS
from benchmarks.paper.experiments import Outcome
from benchmarks.paper.study import Base, Run, Scores, Study
from orpo_lite.comparing.diversity import diversity
from orpo_lite.comparing.table import Comparison, Judge
from orpo_lite.comparing.win_rates import Sampled, win_rate
from orpo_lite.errors import DataError, ModelError, RecipeError
from orpo_lite.evaluation.intervals import Interval

PAIRS = 40
START = (-4.0, -4.0)


def planted(ends: dict[str, tuple[float, float]], noise: float = 0.02) -> Study:
    """A study whose trainings end with these log-probabilities, chosen and rejected."""

    class Planted:
        def runs(self, arm: str, _: Base = study.MAIN) -> list[Run]:
            return [self.one(arm, seed) for seed in (0, 1)]

        def one(self, arm: str, seed: int) -> Run:
            rng = np.random.default_rng([seed, [*ends].index(arm)])

            def scores(means: Sequence[float]) -> Scores:
                return Scores(*(mean + noise * rng.standard_normal(PAIRS) for mean in means))

            prompts = [bytes([number]) for number in range(PAIRS)]
            return Run(
                name=arm,
                held_out={0: scores(START), 9: scores(ends[arm])},
                training={"start": scores(START), "end": scores(ends[arm])},
                prompts=dict.fromkeys(("held-out", "training"), prompts),
            )

    return Planted()  # type: ignore[return-value]


# Chosen and rejected log-probabilities at the end of each arm.
AS_CLAIMED = {
    "sft": (-2.0, -2.2),
    "orpo-0.1": (-2.1, -2.4),
    "orpo-0.5": (-2.3, -2.8),
    "orpo-1": (-2.5, -3.2),
    "orpo-5": (-2.8, -3.9),
    "pr-mean": (-3.4, -4.9),
    "pr-sum": (-3.5, -5.0),
}
REVERSED = {
    "sft": (-3.7, -3.9),
    "orpo-0.1": (-2.8, -2.9),
    "orpo-0.5": (-2.5, -2.6),
    "orpo-1": (-2.3, -2.4),
    "orpo-5": (-2.0, -2.0),
    "pr-mean": (-2.8, -3.0),
    "pr-sum": (-3.0, -3.5),
}


@pytest.mark.parametrize("name", ["E1", "E2", "E3", "E4"])
def test_each_verdict_follows_the_numbers(name: str) -> None:
    def verdicts(ends: dict[str, tuple[float, float]], noise: float = 0.02) -> set[str]:
        return {*EXPERIMENTS[name].measure(planted(ends, noise)).to_json()["verdicts"].values()}

    assert verdicts(AS_CLAIMED) == {"holds"}
    # In E4 each loss has a verdict of its own.
    ends = REVERSED | {"orpo-1": (-2.3, -4.8)} if name == "E4" else REVERSED
    assert verdicts(ends) == {"does not hold"}
    assert "holds" not in verdicts(AS_CLAIMED, noise=20.0)


def planted_answers(
    better: float, accuracy: tuple[float, float, float], *, alike: str = "orpo"
) -> Compared:
    """A comparison with planted numbers.

    ``better``: by how much the rewards of ORPO are higher. ``accuracy``: of the judge, with its
    interval. ``alike``: the arm whose answers depend on the prompt alone.
    """
    rng = np.random.default_rng(0)
    rewards = {name: rng.standard_normal((3, PAIRS)) for name in ARMS}
    rewards["orpo"] += better
    numbers = {
        name: Sampled(name, values[None], rng.integers(20, 40, (1, 3, PAIRS)).astype(float))
        for name, values in rewards.items()
    }
    *others, orpo = numbers.values()
    by_prompt = np.tile(rng.standard_normal((PAIRS, 16)), (3, 1, 1))
    by_chance = 1 + 0.7 * rng.standard_normal((3, PAIRS, 16))
    vectors = {"orpo": by_prompt, "dpo": by_chance}
    if alike != "orpo":
        vectors = {"orpo": by_chance, "dpo": by_prompt}
    result = Comparison(
        folder=Path(),
        judge=Judge(Interval(*accuracy), PAIRS, PAIRS, 9),
        arms=[],
        wins=[win_rate(orpo, other) for other in others],
        winner=None,
        verdict=[],
        embedding="",
        prompts=PAIRS,
        rounds=3,
        seeds=1,
        temperature=1.0,
    )
    pairs = dict.fromkeys(("arms", "judge", "validation", "test"), PAIRS)
    return Compared(result, vectors, rewards, "base", pairs)


GOOD_JUDGE, POOR_JUDGE = (0.7, 0.6, 0.8), (0.55, 0.45, 0.65)


def test_the_verdicts_about_answers_follow_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(name: str, found: Compared) -> list[str]:
        monkeypatch.setattr(answers, "compared", lambda _: found)
        return [*EXPERIMENTS[name].measure(planted({})).to_json()["verdicts"].values()]

    better, worse = (planted_answers(by, GOOD_JUDGE) for by in (1.5, -1.5))
    assert verdicts("E5", better) == ["holds"] * 2
    assert verdicts("E5", worse) == ["does not hold"] * 2
    for by in (1.5, -1.5):
        assert verdicts("E5", planted_answers(by, POOR_JUDGE)) == ["cannot tell"] * 2
    assert "decide nothing" in answers.describe_wins(planted_answers(1.5, POOR_JUDGE))

    assert verdicts("E6", better) == ["holds"] * 2
    other = planted_answers(1.5, POOR_JUDGE, alike="dpo")
    assert verdicts("E6", other) == ["does not hold"] * 2
    twins = np.random.default_rng(1).standard_normal((2, 3, PAIRS, 16))
    mixed = replace(better, vectors=dict(zip(("orpo", "dpo"), twins, strict=True)))
    assert verdicts("E6", mixed) == ["cannot tell"] * 2


def test_the_similarity_across_prompts_is_that_of_the_comparison() -> None:
    vectors = np.random.default_rng(0).standard_normal((2, PAIRS, 16)) + 0.3
    found = across_inputs(cosines(vectors[0]))
    assert found.value == pytest.approx(diversity(vectors).aid, abs=1e-12)
    without = diversity(np.delete(vectors, 7, axis=1)).aid
    assert found.without_M[7] == pytest.approx(without, abs=1e-12)
    # A prompt that is drawn twice would be alike to itself, and would raise the mean.
    assert found.resampled_B.mean() == pytest.approx(found.value, abs=0.01)


@pytest.mark.parametrize(
    ("value", "low", "high", "each", "verdict"),
    [
        (0.2, 0.1, 0.3, [0.1, 0.3], "holds"),
        (0.2, 0.1, 0.3, [-0.1, 0.5], "cannot tell"),  # the seeds disagree
        (0.2, -0.1, 0.5, [0.1, 0.3], "cannot tell"),  # the sample of pairs may be the reason
        (-0.2, -0.3, -0.1, [-0.3, -0.1], "does not hold"),
        (-0.2, -0.3, -0.1, [-0.5, 0.1], "cannot tell"),
        (2.0, 1.9, 2.1, [1.9, 2.1], "does not hold"),
        (0.2, None, None, [], "holds"),
        (0.0, 0.0, 0.0, [0.0, 0.0], "does not hold"),  # 0 is not larger than 0
        (float("nan"), None, None, [], "cannot tell"),
    ],
)
def test_a_verdict_needs_the_interval_and_each_training(
    value: float, low: float | None, high: float | None, each: list[float], verdict: str
) -> None:
    check = Check("", "", value, low, high, each, minimum=0.0, maximum=1.0)
    assert check.verdict == verdict
    sure = Check("", "", 0.5, minimum=0.5, maximum=0.5)
    assert together([sure, check]) == verdict
    assert together([sure, Check("", "", -1.0, minimum=0.0), check]) == "does not hold"
    assert together([sure, Check("", "", -1.0, minimum=0.0, is_claim=False)]) == "holds"


def test_a_prompt_of_two_trainings_counts_once() -> None:
    values = np.random.default_rng(0).standard_normal(PAIRS)
    once, twice = (
        over_pairs("", "", [(values, range(PAIRS))] * number, minimum=0.0) for number in (1, 2)
    )
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high))


def test_the_spread_of_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(experiments.spread(planted({})).to_json()["verdicts"].values()) == {"holds"}
    monkeypatch.setattr(experiments, "SAMPLES", 60)
    found = experiments.spread(planted({})).to_json()["verdicts"]
    assert set(found.values()) == {"does not hold"}


def test_the_page_is_what_the_results_give(tmp_path: Path) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "paper.json").read_text("utf-8"))
    assert [*result["experiments"]] == [*EXPERIMENTS]
    page.write_page(result, tmp_path / "paper.md")
    committed = [ROOT / "docs" / "paper.md", *(ROOT / "docs" / "paper").glob("*.svg")]
    made = [tmp_path / "paper.md", *(tmp_path / "paper").glob("*.svg")]
    assert {file.name for file in committed} == {file.name for file in made}
    for file in made:
        folder = ROOT / "docs" / file.parent.relative_to(tmp_path)
        assert file.read_text("utf-8") == (folder / file.name).read_text("utf-8"), file.name
    for name, found in result["experiments"].items():
        checks = [
            Check(**{key: value for key, value in check.items() if key != "verdict"})
            for check in found["checks"]
        ]
        assert Outcome(checks).to_json()["verdicts"] == found["verdicts"], name


def test_missing_models_and_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--models FOLDER"):
        Study(models=tmp_path, data=tmp_path)
    for base in (study.MAIN, study.SECOND):
        (tmp_path / base.name).mkdir()
        (tmp_path / base.name / "config.json").touch()
    with pytest.raises(DataError, match="--data FOLDER"):
        Study(models=tmp_path, data=tmp_path)


@pytest.mark.real
@pytest.mark.long
def test_a_small_study_of_real_pairs(
    tmp_path: Path, token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a step, the formats of the graders; a training is made once."""
    small = Study(
        SHARED / "models", SHARED / "data", folder=tmp_path, seeds=(42,), epochs=0.5, rows=50
    )
    monkeypatch.setattr(cost, "STEPS", 1)
    monkeypatch.setattr(cost, "BATCH", 2)
    verdicts = {
        name: EXPERIMENTS[name].measure(small).to_json()["verdicts"] for name in ("E7", "E8")
    }
    assert {verdict for found in verdicts.values() for verdict in found.values()} == {"holds"}
    (training,) = small.trainings()
    assert (training["arm"], training["steps"]) == ("orpo-1", 1)

    monkeypatch.setattr(study, "train_events", None)
    assert small.run("orpo-1", 42).scores("held-out", "end").chosen_P.size == training["held_out"]
    other = Study(small.models, small.data, folder=tmp_path, seeds=(42,), epochs=0.6, rows=50)
    with pytest.raises(RecipeError, match=r"another value of training\.num_train_epochs"):
        other.run("orpo-1", 42)
