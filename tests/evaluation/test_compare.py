"""Intervals contain the truth as often as they say, and a verdict says what the scores say."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from conftest import first_and_long

from orpo_lite.evaluation.compare import Evaluation, compare
from orpo_lite.evaluation.intervals import mean_over_pairs, pairs_needed, t_quantile
from orpo_lite.ops.outputs import PairScores

METRICS = ("accuracy", "margin", "log_odds")


@dataclass
class Pairs:
    """The facts of pairs that a comparison reads; replies of 5 and 7 tokens."""

    prompts_P: Sequence[bytes]
    chosen_P: Sequence[int] = ()
    columns: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.prompts_P)
        self.columns = dict.fromkeys(
            ("chosen_start", "rejected_start", "chosen_cut", "rejected_cut"), np.zeros(count, int)
        )
        self.columns["chosen_tokens"] = np.array(self.chosen_P or [5] * count)
        self.columns["rejected_tokens"] = np.full(count, 7)

    def column(self, name: str) -> Any:
        return self.columns[name]

    def prompts(self) -> list[bytes]:
        return [*self.prompts_P]

    def __len__(self) -> int:
        return len(self.prompts_P)


def logps(chosen: Any, rejected: Any) -> PairScores:
    chosen = torch.as_tensor(chosen, dtype=torch.float64)
    return PairScores(
        chosen,
        torch.as_tensor(rejected, dtype=torch.float64),
        -7 * chosen,
        torch.full_like(chosen, 7),
    )


def compared(before: PairScores, after: PairScores, pairs: Pairs | None = None) -> Evaluation:
    pairs = pairs or Pairs([b"%d" % index for index in range(len(before.chosen_P))])
    scores = {"base": before, "tuned": after}
    return compare(pairs, scores, [("tuned", "base")], held_out=True, data="pairs")  # type: ignore[arg-type]


# --- coverage

PROMPTS, SAME = 100, 0.9  # two pairs of each prompt; the correlation of their log-probabilities
MEANS = {"chosen": (0.3, 0.2), "rejected": (0.4, 0.55)}  # of log(-log-prob): before, after
SPREADS = (0.5, 0.3)  # of the base, and of what the training adds


def truth() -> list[float]:
    """The differences in all pairs that there could be."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    variances = (SPREADS[0] ** 2, SPREADS[0] ** 2 + SPREADS[1] ** 2)
    found: list[list[float]] = []
    for after, variance in enumerate(variances):
        chosen, rejected = (MEANS[reply][after] for reply in ("chosen", "rejected"))
        accuracy = 0.5 * (1 + math.erf((rejected - chosen) / math.sqrt(4 * variance)))
        logs = [-np.exp(mean + math.sqrt(variance) * nodes) for mean in (chosen, rejected)]
        odds = [x - np.log(-np.expm1(x)) for x in logs]
        margin, log_odds = (float(weights @ (one - other)) for one, other in (logs, odds))
        found.append([accuracy, margin, log_odds])
    return [after - before for before, after in zip(*found, strict=True)]


def simulated(rng: np.random.Generator) -> tuple[PairScores, PairScores]:
    def part(spread: float) -> Any:
        of_prompt = np.repeat(rng.standard_normal(PROMPTS), 2)
        return spread * (
            SAME**0.5 * of_prompt + (1 - SAME) ** 0.5 * rng.standard_normal(2 * PROMPTS)
        )

    sides: list[tuple[Any, Any]] = []
    for means in MEANS.values():
        base, change = part(SPREADS[0]), part(SPREADS[1])
        sides.append((-np.exp(means[0] + base), -np.exp(means[1] + base + change)))
    (base_chosen, chosen), (base_rejected, rejected) = sides
    return logps(base_chosen, base_rejected), logps(chosen, rejected)


def coverage(count: int, pairs: Pairs) -> dict[str, float]:
    """The share of simulations whose interval contains the truth."""
    rng, expected = np.random.default_rng(18), dict(zip(METRICS, truth(), strict=True))
    hits = dict.fromkeys(METRICS, 0)
    for _ in range(count):
        differences = compared(*simulated(rng), pairs).comparisons[0].differences
        for name in METRICS:
            found = getattr(differences, name)
            hits[name] += found.low <= expected[name] <= found.high
    return {name: hit / count for name, hit in hits.items()}


@pytest.mark.parametrize("count", first_and_long([100, 1000]))
def test_the_intervals_contain_the_truth_in_95_of_100(count: int) -> None:
    allowed = 0.02 * math.sqrt(1000 / count)  # 93 to 97% of 1000
    found = coverage(count, Pairs([b"%d" % (pair // 2) for pair in range(2 * PROMPTS)]))
    assert all(abs(share - 0.95) <= allowed for share in found.values()), found


@pytest.mark.long
def test_pairs_that_are_resampled_without_their_prompt_are_too_sure() -> None:
    found = coverage(1000, Pairs([b"%d" % pair for pair in range(2 * PROMPTS)]))
    assert all(share < 0.93 for share in found.values()), found


def test_as_many_pairs_as_it_names_would_tell_in_4_of_5_cases() -> None:
    rng, prompts = np.random.default_rng(1), 40
    values_P = np.repeat(rng.standard_normal(prompts), 2) + 0.1
    values_P += 0.1 - values_P.mean()
    which = [pair // 2 for pair in range(2 * prompts)]
    (mean,) = mean_over_pairs(values_P[None], np.ones((1, len(values_P))), which)
    error = values_P[::2].std(ddof=1) / math.sqrt(prompts)  # the textbook's, of one value a prompt
    assert mean.standard_error() == pytest.approx(error, rel=1e-12)
    needed = pairs_needed(mean, len(values_P))
    assert needed is not None
    told = rng.normal(0.1, error * math.sqrt(len(values_P) / needed), 20_000)
    limit = 1.96 * error * math.sqrt(len(values_P) / needed)
    assert (told > limit).mean() == pytest.approx(0.8, abs=0.01)


def test_the_quantiles_are_those_of_the_tables() -> None:
    tables = {4: 2.776, 10: 2.228, 30: 2.042, 99: 1.984}
    for freedom, quantile in tables.items():
        assert t_quantile(freedom) == pytest.approx(quantile, rel=0.005)


def test_ten_thousand_pairs_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    both = [logps(*(-rng.random((2, 10_000)) - 0.01)) for _ in range(2)]
    began = time.process_time()
    compared(*both)
    assert time.process_time() - began < 1


# --- verdicts


def outcome(won_before: int, won_after: int, count: int = 40, shift: float = 0.0) -> Any:
    """The comparison where so many of the pairs are right; ``shift`` is added to all margins."""
    sides = []
    for won, more in ((won_before, 0.0), (won_after, shift)):
        margins = np.where(np.arange(count) < won, 0.5, -0.5) + more
        sides.append(logps(-1 + margins / 2, -1 - margins / 2))
    return compared(*sides).comparisons[0]


def test_the_outcome_and_its_words() -> None:
    better = outcome(20, 36)
    assert (better.outcome, better.decided_by, better.pairs_needed) == ("better", "accuracy", None)
    assert better.differences.accuracy.value == pytest.approx(0.4)
    assert better.text.startswith(
        "better by reward accuracy, on 40 held-out pairs of 40 prompts: tuned prefers the chosen "
        "reply in 90.0% of them, base in 50.0%: +40.0 points (95% interval +2"
    )
    worse = outcome(36, 20)
    assert worse.outcome == "worse"
    assert worse.differences.accuracy.high == pytest.approx(-better.differences.accuracy.low)
    unclear = outcome(20, 22)
    assert (unclear.outcome, unclear.decided_by) == ("cannot tell", None)
    # 2 of 40 pairs change: an error of sqrt(0.05 * 0.95 / 39) for an effect of 0.05.
    assert unclear.pairs_needed == pytest.approx(40 * 7.849 * 0.05 * 0.95 / 39 / 0.05**2, rel=0.01)
    assert "about 150 pairs are needed" in unclear.text
    assert "log odds" not in unclear.text


def test_log_odds_that_alone_can_tell_are_named() -> None:
    found = outcome(20, 20, shift=0.2)
    assert (found.outcome, found.pairs_needed) == ("cannot tell", None)
    assert "The log odds clearly differ: they rise by" in found.text


def test_metrics_that_contradict_decide_nothing() -> None:
    count = 40
    before = logps(np.where(np.arange(count) < 20, -0.5, -1.01), np.full(count, -1.0))
    after = logps(np.where(np.arange(count) < 38, -0.99, -1.01), np.full(count, -1.0))
    found = compared(before, after).comparisons[0]
    assert found.differences.accuracy.low > 0 > found.differences.log_odds.high
    assert (found.outcome, found.decided_by) == ("cannot tell", None)
    assert "log odds clearly change in the opposite direction" in found.text


def test_a_model_against_itself_differs_by_exactly_nothing() -> None:
    same = logps(*(-np.random.default_rng(0).random((2, 30)) - 0.01))
    found = compared(same, same).comparisons[0]
    assert (found.outcome, found.pairs_needed) == ("cannot tell", None)
    for difference in vars(found.differences).values():
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert "have equal scores on 30 held-out pairs" in found.text


def test_few_prompts_and_unknown_scores_tell_nothing() -> None:
    pairs = Pairs([b"%d" % (pair % 5) for pair in range(40)])
    lost, won = (
        logps(np.full(40, -2.0), np.full(40, -1.0)),
        logps(np.full(40, -0.5), np.full(40, -1.0)),
    )
    found = compared(lost, won, pairs).comparisons[0]
    assert (found.outcome, found.pairs_needed) == ("cannot tell", 48)
    assert compared(lost, won).comparisons[0].outcome == "better"
    one = compared(lost, won, Pairs([b"the same"] * 40)).models[1]
    assert (one.accuracy.value, one.accuracy.low) == (1, None)
    broken = logps([math.nan, *[-0.5] * 39], np.full(40, -1.0))
    unknown = compared(lost, broken)
    assert unknown.models[1].accuracy.value is None
    assert unknown.comparisons[0].outcome == "cannot tell"
    assert "not finite" in unknown.comparisons[0].text


def test_a_tie_is_no_win_and_a_full_score_is_no_certainty() -> None:
    tied = logps([-1.0] * 10 + [0.0] * 10, [-1.0] * 10 + [0.0] * 10)
    won = logps([-0.5] * 20, [-1.0] * 20)
    base, tuned = compared(tied, won).models
    assert (base.accuracy.value, base.log_odds.value) == (0, 0)
    # 20 of 20 is not surprising, at 2.5%, from 83.2% on.
    assert (tuned.accuracy.low, tuned.accuracy.high) == (pytest.approx(0.8316, abs=1e-4), 1)


def test_a_gain_of_long_replies_only_is_seen() -> None:
    """The model comes to prefer the longer reply, which is the chosen one in 28 of 38 pairs."""
    lengths = [9] * 28 + [5] * 10 + [7] * 2
    before = logps([-0.9] * 4 + [-1.1] * 24 + [-0.9] * 10 + [-1.1] * 2, np.full(40, -1.0))
    after = logps(np.where(np.array(lengths) > 7, -0.5, -1.5), np.full(40, -1.0))
    found = compared(before, after, Pairs([b"%d" % pair for pair in range(40)], lengths))
    (comparison,) = found.comparisons
    assert (found.length_rule.pairs, found.length_rule.accuracy) == (38, pytest.approx(28 / 38))
    assert (
        found.models[1].shorter_chosen.pairs,
        found.models[1].shorter_chosen.accuracy.value,
    ) == (10, 0)
    assert (comparison.shorter_chosen.outcome, comparison.shorter_chosen.accuracy.value) == (
        "worse",
        -1,
    )
    assert comparison.outcome == "better"
    assert (
        "But it is worse on the 10 pairs whose chosen reply is the shorter one" in comparison.text
    )


def test_a_difference_that_never_varies_has_an_interval() -> None:
    """12 prompts of which none disagrees; 26% of other prompts still may (exact binomial)."""
    low, high = np.full(12, -2.0), np.full(12, -1.0)
    (won,) = compared(logps(low, high), logps(high, low)).comparisons
    found = won.differences.accuracy
    assert (won.outcome, found.value, found.high) == ("better", 1, 1)
    assert found.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 12)))
    (equal,) = compared(logps(low, high), logps(low - 1, high)).comparisons
    found = equal.differences.accuracy
    assert (equal.outcome, found.value) == ("cannot tell", 0)
    assert (found.low, found.high) == pytest.approx((-0.2646, 0.2646), abs=1e-4)
