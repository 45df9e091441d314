"""Win rates, the verdict and the diversity, on numbers whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from orpo_lite.comparing.diversity import (
    Diversity,
    diversity,
    load_sentence_model,
    sentence_model,
)
from orpo_lite.comparing.reward_models import RewardTraining, verdict_on
from orpo_lite.comparing.table import Judge, decide
from orpo_lite.comparing.win_rates import Sampled, WinRate, win_rate
from orpo_lite.evaluation.intervals import Interval

TRUSTED = Judge(Interval(0.7, 0.6, 0.8), 100, 100, 9)


def sampled(
    rng: np.random.Generator,
    prompts_P: np.ndarray,
    *,
    better: float = 0.0,
    per_token: float = 0.0,
    length: float = 20.0,
    seeds: int = 1,
    name: str = "model",
) -> Sampled:
    """Answers to prompts of different difficulty: the reward rises with quality and length."""
    shape = (seeds, 3, len(prompts_P))
    tokens = rng.normal(length, 5, shape)
    rewards = prompts_P + rng.normal(better, 1, shape) + per_token * tokens
    return Sampled(name, rewards, tokens)


def contains(found: Interval, value: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= value <= found.high


def test_a_model_against_itself_wins_half() -> None:
    """The same answers give exactly 50%; other answers of the same model give it within the interval."""
    same, fresh, controlled = [], [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        prompts = rng.normal(0, 2, 32)
        one, other = sampled(rng, prompts), sampled(rng, prompts)
        if seed < 20:
            found = win_rate(one, one)
            same.append((found.rate.value, contains(found.rate, 0.5), found.outcome))
        found = win_rate(one, other)
        fresh.append(contains(found.rate, 0.5))
        controlled.append(contains(found.length_controlled, 0.5))
    assert same == [(0.5, True, "cannot tell")] * 20
    assert sum(fresh) >= 36  # of a 95% interval: at least 36 of 40 in 95% of the cases
    assert sum(controlled) >= 36


def test_a_better_model_wins_as_often_as_it_should_and_the_other_loses_as_often() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 2, 400)
    one, other = sampled(rng, prompts, better=1.0), sampled(rng, prompts, name="other")
    truth = 0.5 * (1 + math.erf(1 / math.sqrt(2) / math.sqrt(2)))  # P(N(1, sqrt 2) > 0)
    found, back = win_rate(one, other), win_rate(other, one)
    assert contains(found.rate, truth)
    assert contains(found.length_controlled, truth)  # the lengths have no effect
    assert found.outcome == "better"
    assert back.outcome == "worse"
    assert found.rate.value == pytest.approx(1 - back.rate.value, abs=1e-12)
    assert np.mean(found.by_round) == pytest.approx(found.rate.value, abs=1e-12)
    assert found.round_sd == pytest.approx(np.std(found.by_round, ddof=1))
    values = [one_way.length_controlled.value for one_way in (found, back)]
    assert sum(values) == pytest.approx(1, abs=1e-9)


def test_a_win_by_length_alone_is_seen() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.normal(0, 2, 200)
    long = sampled(rng, prompts, per_token=0.2, length=26)
    found = win_rate(long, sampled(rng, prompts, per_token=0.2))
    assert found.outcome == "better"
    assert contains(found.length_controlled, 0.5)
    _, sentences = decide(["short", "long"], [renamed(found, "long", "short")], TRUSTED)
    assert any("may explain the difference" in sentence for sentence in sentences)


def test_an_arm_that_always_wins_and_answers_without_a_reward() -> None:
    rng = np.random.default_rng(2)
    prompts = rng.normal(0, 1, 30)
    one, other = sampled(rng, prompts, better=50), sampled(rng, prompts)
    one.rewards_SRP[:, :, :10] = np.nan
    other.rewards_SRP[:, 0, 10] = np.nan
    found = win_rate(one, other)
    assert found.rate.value == found.length_controlled.value == 1
    assert found.prompts == 20
    assert 0.8 < (found.rate.low or 0) < 1
    one.rewards_SRP[:] = np.nan
    assert win_rate(one, other).outcome == "cannot tell"


def test_three_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 1, 100)
    one, other = (sampled(rng, prompts, seeds=3) for _ in range(2))
    one.rewards_SRP[0] += 2.0
    found = win_rate(one, other)
    alone = win_rate(*(Sampled("m", a.rewards_SRP[:2], a.tokens_SRP[:2]) for a in (one, other)))
    assert alone.outcome == "better"
    assert found.outcome == "cannot tell"
    assert (found.seed_sd or 0) > 0.2


# --- the verdict


def renamed(win: WinRate, model: str, against: str) -> WinRate:
    return WinRate(**vars(win) | {"model": model, "against": against})


def a_win(model: str, against: str, low: float, high: float) -> WinRate:
    middle = (low + high) / 2
    outcome = "better" if low > 0.5 else "worse" if high < 0.5 else "cannot tell"
    share = Interval(middle, low, high)
    return WinRate(model, against, share, [middle], [middle], share, (20.0, 20.0), 64, outcome, 910)


def test_a_winner_is_named_only_if_it_clearly_beats_every_other_arm() -> None:
    wins = [a_win("b", "a", 0.6, 0.8), a_win("c", "a", 0.2, 0.4), a_win("c", "b", 0.1, 0.3)]
    winner, sentences = decide(["a", "b", "c"], wins, TRUSTED)
    assert winner == "b"
    assert sentences[0].startswith("b is best: the judge clearly prefers its answers")
    wins[2] = a_win("c", "b", 0.3, 0.6)
    winner, sentences = decide(["a", "b", "c"], wins, TRUSTED)
    assert winner is None
    assert sentences[0].endswith("a and b both have the most clear wins (1 of 2)")
    assert "c against b is not clear: it wins 45.0% (95% interval 30.0 to 60.0); about 910 prompts" in sentences[1]  # fmt: skip


def test_a_judge_no_better_than_chance_decides_nothing() -> None:
    wins = [a_win("b", "a", 0.6, 0.8)]
    weak = Judge(Interval(0.55, 0.45, 0.65), 100, 100, 9)
    trained = RewardTraining("judge", 90, 96, 30, 9, 5e-3, 1.0, -1, 0.5, 8)
    winner, sentences = decide(["a", "b"], wins, weak)
    assert winner is None
    assert sentences[0].startswith("cannot tell: the judge ranks 55.0%")
    assert "judge:training.num_train_epochs=3" in sentences[0]
    assert "55.0% (95% interval 45.0 to 65.0) of 100 pairs correctly; none of them was in its training; this is not clearly better than chance" in sentences[0]  # fmt: skip
    worse = replace(weak, accuracy=Interval(0.147, 0.018, 0.276), training=trained)
    (sentence,) = decide(["a", "b"], wins, worse)[1]
    assert "was in its training on 90 of 96 pairs; this is clearly worse than chance" in sentence
    for changes, hint in (
        ({}, "lower learning rate, such as judge:training.learning_rate=0.0005"),
        ({"steps": 2}, "more epochs, such as judge:training.num_train_epochs=10"),
        ({"steps": 1, "max_steps": 1}, "more steps, such as judge:training.max_steps=20"),
    ):
        training = replace(trained, kept_step=0, **changes)
        (sentence,) = decide(["a", "b"], wins, replace(weak, kept_step=0, training=training))[1]
        assert "it is untrained" in sentence
        assert hint in sentence


def test_an_untrained_reward_model_of_ppo_is_named() -> None:
    first = RewardTraining("reward-seed1", 96, 96, 30, 9, 5e-3, 1.0, -1, 0.75, 8)
    (sentence,) = verdict_on([first, replace(first, name="reward-seed2", kept_step=0)])
    assert sentence.startswith("ppo's reward models rank 75.0%, 75.0% of 8 validation pairs")
    assert "reward-seed2 kept step 0, so it is untrained" in sentence
    assert sentence.endswith("such as reward:training.learning_rate=0.0005")
    assert "untrained" not in verdict_on([first])[0]


# --- diversity


def test_equal_answers_have_similarity_1_and_orthogonal_ones_0_exactly() -> None:
    for seed in range(20):
        vector = np.random.default_rng(seed).normal(size=384 + seed)
        assert diversity(np.tile(vector, (3, 5, 1))) == Diversity(1.0, 1.0)
    assert diversity(np.eye(6).reshape(2, 3, 6)) == Diversity(0.0, 0.0)
    alike = np.repeat(np.eye(3)[None], 4, 0)  # four equal answers to each of three unlike prompts
    assert diversity(alike) == Diversity(1.0, 0.0)
    assert diversity(alike[:1]) == Diversity(None, 0.0)


def test_the_sentence_model_knows_which_sentences_are_alike() -> None:
    folder = sentence_model()
    if folder is None:
        pytest.skip("the extra sentences is not installed")
    embed = load_sentence_model(folder)
    texts = ("A dog runs in the park.", "A puppy is running outdoors.", "Rates rose again.")
    dog, puppy, rates = embed(texts)
    alike, unlike = (diversity(np.stack([dog, other])[:, None]).pid for other in (puppy, rates))
    assert (alike or 0) > 0.5 > 0.2 > (unlike or 1)
