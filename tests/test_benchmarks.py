"""The counted figures of the step, against their goals; times are reported and gate nothing."""

import operator
from pathlib import Path

import numpy as np
import pytest
from conftest import first_and_long

pytest.importorskip("trl.experimental.orpo", reason="TRL, the peer, comes with the extra `bench`")

from benchmarks import lengths, step

COMPARE = {"<=": operator.le, ">=": operator.ge}


def meets(key: str, value: float) -> bool:
    """Whether a figure reaches the goal that the benchmark states."""
    sign, _, goal = step.GOALS[key].partition(" ")
    return COMPARE[sign](value, float(goal))


def test_goals_are_compared() -> None:
    assert meets("head_bytes_per_logit", 0.5)
    assert not meets("head_bytes_per_logit", 0.51)
    assert not meets("tokens_ratio_hh_b8", 3.74)


def test_the_heads_bytes_a_logit() -> None:
    assert meets("head_bytes_per_logit", step.head_bytes_per_logit())


@pytest.mark.parametrize(
    ("key", "name", "size"),
    [
        ("tokens_ratio_hh_b8", "hh", 8),
        ("tokens_ratio_hh_b1", "hh", 1),
        ("tokens_ratio_alpaca_b8", "alpaca", 8),
    ],
)
def test_tokens_through_the_model(key: str, name: str, size: int) -> None:
    assert meets(key, lengths.tokens_ratio(lengths.shipped(step.SETS[name]), size))


@pytest.mark.long
@pytest.mark.parametrize("name", step.SETS)
def test_flops_a_pair(name: str) -> None:
    triples = lengths.shipped(step.SETS[name])
    assert meets(
        f"flops_ratio_{name}", step.flops_ratio(triples, step.SHAPES["peak_gib_mistral_7b"][1])
    )


@pytest.mark.long
def test_live_bytes_of_a_large_vocabulary() -> None:
    found = step.live_bytes_ratio(lengths.shipped("hh-rlhf"))
    assert meets("live_bytes_ratio_152k", found["live_bytes_ratio_152k"])
    assert found["live_bytes_ratio_152k"] < found["live_bytes_ratio_152k_default_levers"] < 0.06


@pytest.mark.long
@pytest.mark.parametrize("key", first_and_long(step.SHAPES))
def test_peak_at_7b(key: str) -> None:
    config = step.SHAPES[key][1]
    ours = step.peak_of_7b(config, step.ALL_SETTINGS)
    assert meets(key, ours)
    assert ours < step.peak_of_7b(config, {})


def test_lengths_and_pairs_agree() -> None:
    """Random pairs have the lengths they were asked for, prefix and all."""
    triples = np.array([[3, 5, 9], [0, 4, 4], [1, 2, 2], [6, 6, 9], [6, 9, 6]])
    pairs = lengths.random_pairs(triples, 50)
    from orpo_lite.data.packing import packed_tokens

    assert [packed_tokens(pair, share=True) for pair in pairs] == (
        triples[:, 1] + triples[:, 2] - triples[:, 0]
    ).tolist()
    assert lengths.padded(triples[:2]) == 2 * 2 * 9


def test_the_tables_of_the_docs_are_the_benchmarks(tmp_path: Path) -> None:
    """Every figure in them is in the results file, and the command that writes them changes nothing."""
    import json

    root = Path(__file__).parents[1]
    results = root / "benchmarks" / "results" / "step.json"
    page = tmp_path / "memory.md"
    before = (root / "docs" / "memory.md").read_text("utf-8")
    page.write_text(before, encoding="utf-8")
    step.write_tables(page, json.loads(results.read_text("utf-8")))
    assert page.read_text("utf-8") == before


def test_the_readmes_plans_are_the_benchmarks(tmp_path: Path) -> None:
    """Every figure of its table is in the results file; they reach their goals; the picture is drawn from them."""
    import json

    from benchmarks import plan

    root = Path(__file__).parents[1]
    result = json.loads((root / "benchmarks" / "results" / "plan.json").read_text("utf-8"))
    readme = tmp_path / "README.md"
    before = (root / "README.md").read_text("utf-8")
    readme.write_text(before, encoding="utf-8")
    step.write_between(readme, plan.STARTS, plan.table(result))
    assert readme.read_text("utf-8") == before
    assert (root / "benchmarks" / "results" / "memory.svg").read_text("utf-8") == plan.picture(
        result["parts_7b"]
    )
    for key, goal in plan.GOALS.items():
        sign, _, bound = goal.partition(" ")
        assert COMPARE[sign](result[key], float(bound)), key


@pytest.mark.long  # what is counted at 7B above, of more and larger layers
@pytest.mark.parametrize(
    ("name", "goal"), [("qwen2.5-32b-qlora", 19.5), ("llama3-70b-qlora", 39.5)]
)
def test_peaks_of_the_large_ones(name: str, goal: float) -> None:
    from benchmarks import plan

    assert plan.least_peak(name) <= goal
