"""E5 and E6: the answers of the arms of one comparison. Win rates by a judge, and diversity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.paper.check import Check, over_pairs
from benchmarks.paper.study import Base, Study, read_lines
from orpo_lite.comparing.compare import compare_events
from orpo_lite.comparing.diversity import (
    base_states,
    diversity,
    load_sentence_model,
    sentence_model,
)
from orpo_lite.comparing.split import part_sizes
from orpo_lite.comparing.table import Comparison, shown
from orpo_lite.evaluation.intervals import Interval, Mean, Numbers, resample_sums
from orpo_lite.evaluation.open_run import find_model, load_model
from orpo_lite.runs.atomic import write_text
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update, run_to_end

ORPO, DPO = "orpo", "dpo"
# Each arm is compared with the arms before it, so ORPO, as the last one, with all others.
ARMS = ("sft", "sft-equal-epochs", DPO, "simpo", "ppo", ORPO)
NAMES = {
    "sft": "SFT",
    "sft-equal-epochs": "SFT with as many epochs",
    "dpo": "DPO",
    "simpo": "SimPO",
    "ppo": "PPO",
    "orpo": "ORPO",
}
CLAIMED = ("sft", "ppo")
"""The arms against which ORPO is claimed to win with small models."""
DRAWN = ("sft", "dpo", "ppo", "orpo")
"""The arms whose rewards are drawn."""

SHORT = Base("stories260k", 384, 256)
"""Shorter pairs than in the other experiments: six arms are trained, and a judge."""
PROMPTS, ROUNDS, TOKENS, PPO_STEPS = 120, 3, 48, 24
REWARD_RATE = 1e-3
"""Of PPO's reward model, and of a judge with the same base: of 1e-4, 3e-4, 1e-3 and 3e-3, the one
with the lowest loss on the pairs of the evaluations, which are not those that test the judge."""
JUDGE = ("lora.r=16", "lora.lora_alpha=32", "training.learning_rate=2e-4",
         "training.num_train_epochs=2", "training.eval_steps=0.5",
         "memory.micro_batch_tokens=1024")  # fmt: skip
"""The settings of a judge with a base of its own: those of the recipe smollm2-135m."""
BINS = 24


@dataclass(frozen=True)
class Compared:
    """A finished comparison, with what its report does not give."""

    result: Comparison
    vectors: Mapping[str, Numbers]
    """``orpo`` and ``dpo`` -> the embeddings of their answers, shape (rounds, prompts, D)."""
    rewards: Mapping[str, NDArray[np.float64]]
    """Name of an arm -> the judge's rewards of its answers, shape (rounds, prompts)."""
    judge: str
    """The name of the judge's base."""
    pairs: Mapping[str, int]
    """Part of the data, such as arms, judge and test -> its number of pairs."""


@lru_cache
def compared(study: Study) -> Compared:
    """Return the comparison of a study, which is made, or continued, if it is not finished.

    Its folder is ``comparison`` in the study's folder.
    """
    seed = study.seeds[0]
    folder = study.folder / "comparison"
    study.folder.mkdir(parents=True, exist_ok=True)
    recipe = study.folder / "comparison.yaml"
    # Without the defaults: a key that is given must suit each arm.
    given = study.recipe(SHORT, "orpo-1", seed).model_dump(mode="json", exclude_unset=True)
    write_text(recipe, yaml.safe_dump(given))
    words = [
        f"ppo:loss.response_length={TOKENS}",
        f"ppo:training.max_steps={PPO_STEPS}",
    ]
    # The judge and PPO's reward model are instruments, so the best of their adapters is used.
    small = (f"training.learning_rate={REWARD_RATE}",)
    own = (f"model.model_name_or_path={study.judge.resolve()}", *JUDGE) if study.judge else small
    words += [f"judge:{word}" for word in (*own, "training.load_best_model_at_end=true")]
    words += [f"reward:{word}" for word in (*small, "training.load_best_model_at_end=true")]
    seen = set[str]()

    def show(update: Update) -> None:
        if update.text.startswith("training") and update.text not in seen:
            seen.add(update.text)
            print(f"comparison: {update.text}", flush=True)

    updates = compare_events(
        str(recipe),
        words,
        arms=",".join(ARMS),
        seeds=1,
        rounds=ROUNDS,
        prompts=PROMPTS,
        max_new_tokens=TOKENS,
        out=folder,
    )
    result = run_to_end(updates, show)
    rewards = {
        arm: np.array(read_json(folder / "rewards" / f"{arm}-seed{seed}.json")["rewards"], float)
        for arm in ARMS
    }
    texts = {
        arm: [
            [row["text"] for row in read_lines(file) if row["text"] is not None]
            for number in range(1, ROUNDS + 1)
            for file in [folder / "answers" / f"{arm}-seed{seed}-round{number}.jsonl"]
        ]
        for arm in (ORPO, DPO)
    }
    unique = [*dict.fromkeys(text for rows in texts.values() for row in rows for text in row)]
    if path := sentence_model():
        found = load_sentence_model(path)(unique)
    else:
        with base_states(load_model(find_model(folder / "runs" / f"{ORPO}-seed{seed}"))) as embed:
            found = embed(unique)
    known = dict(zip(unique, found, strict=True))
    return Compared(
        result,
        {arm: np.array([[known[t] for t in row] for row in rows]) for arm, rows in texts.items()},
        rewards,
        (study.judge or study.models / SHORT.name).name,
        part_sizes(folder / "data"),
    )


# --- E5


def check_wins(found: Compared) -> list[Check]:
    """Return a check of ORPO's win rate against each other arm.

    If the judge is not clearly better than chance, the verdict of each is ``cannot tell``.
    """
    result = found.result
    accuracy = result.judge.accuracy
    checks = [
        _check(
            "the judge ranks more than half of the pairs correctly",
            "pairs of other prompts",
            accuracy,
            minimum=0.5,
            is_claim=False,
        )
    ]
    for win in result.wins:
        if win.model != ORPO:
            continue
        name, is_claim = NAMES[win.against], win.against in CLAIMED
        kind, trust = f"answers against {name}", {"is_trusted": result.judge.is_trusted}
        checks += [
            _check(
                f"ORPO wins against {name} more often than not",
                kind,
                win.rate,
                win.by_seed,
                minimum=0.5,
                is_claim=is_claim,
                **trust,
            ),
            _check(
                f"its win rate against {name} at equal lengths",
                kind,
                win.length_controlled,
                is_claim=False,
                **trust,
            ),
        ]
    return checks


def _check(
    statement: str, pairs: str, found: Interval, each: Sequence[float] = (), **more: Any
) -> Check:
    value = float("nan") if found.value is None else found.value
    return Check(statement, pairs, value, found.low, found.high, [*each], **more)


def describe_wins(found: Compared) -> str:
    """Return how much was trained, answered and judged, and how good the judge is."""
    result, pairs = found.result, found.pairs
    accuracy = f"The judge is a reward model of {found.judge}. It ranks "
    accuracy += f"{shown(result.judge.accuracy)} of {result.judge.pairs} pairs correctly, none of "
    accuracy += "which it was trained on"
    accuracy += (
        ". That is better than chance, and far from certain."
        if result.judge.is_trusted
        else ", which is not clearly better than chance: its rewards decide nothing, and each "
        "verdict is 'cannot tell', whatever the win rates are."
    )
    trainings = "1 training" if result.seeds == 1 else f"{result.seeds} trainings"
    cut = np.mean([arm.cut for arm in result.arms])
    return (
        f"{pairs['arms']} pairs train the arms, {pairs['judge']} other pairs the judge, "
        f"{pairs['validation']} pairs are for the evaluations. {trainings} of each arm gives "
        f"{result.rounds} answers of at most {TOKENS} tokens to each of {result.prompts} held-out "
        f"prompts, at temperature {result.temperature:g}; {cut:.0%} of the answers are cut at that "
        f"length. {accuracy}"
    )


def table_of_wins(found: Compared) -> list[list[str]]:
    """Return a table of the arms: how they were trained, and how ORPO's answers fare."""
    wins = {win.against: win for win in found.result.wins if win.model == ORPO}
    rows = [
        [
            "arm",
            "learning rate",
            "steps",
            "seconds of its steps",
            "mean reward",
            "tokens of an answer",
            "ORPO wins",
            "SD over rounds",
        ]
    ]
    for arm in found.result.arms:
        win, cost = wins.get(arm.name), arm.cost
        before = f" (+ {cost.before_seconds:.0f})" if cost.before_seconds else ""
        deviation = win.round_sd if win else None
        rows.append(
            [
                NAMES[arm.name],
                f"{cost.learning_rate:g}",
                f"{cost.steps:.0f}",
                f"{cost.seconds:.0f}{before}",
                "" if arm.reward.value is None else f"{arm.reward.value:.3f}",
                f"{arm.tokens:.1f}",
                "" if win is None or win.rate.value is None else f"{win.rate.value:.1%}",
                "" if deviation is None else f"{100 * deviation:.1f}",
            ]
        )
    return rows


def plot_of_wins(found: Compared) -> dict[str, Any]:
    """Return the win rates of ORPO with their intervals, and the distributions of the rewards."""
    wins = {
        NAMES[win.against]: [_rounded(end) for end in (win.rate.value, win.rate.low, win.rate.high)]
        for win in found.result.wins
        if win.model == ORPO
    }
    known = {
        NAMES[arm]: found.rewards[arm][np.isfinite(found.rewards[arm])]
        for arm in DRAWN
        if arm in found.rewards
    }
    every = np.concatenate([*known.values()])
    edges = np.linspace(every.min(), every.max(), BINS + 1)
    shares = {
        name: [_rounded(share) for share in np.histogram(values, edges, density=True)[0]]
        for name, values in known.items()
    }
    return {"wins": wins, "reward_edges": [_rounded(edge) for edge in edges], "rewards": shares}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)


# --- E6


def check_diversity(found: Compared) -> list[Check]:
    """Return checks of PID and AID of ORPO minus those of DPO. The interval is over prompts."""
    one, other = found.vectors[ORPO], found.vectors[DPO]
    prompts = range(one.shape[1])
    values = [
        np.array([diversity(vectors[:, [prompt]]).pid for prompt in prompts], np.float64)
        for vectors in (one, other)
    ]
    across = across_inputs(cosines(one[0]) - cosines(other[0]))
    return [
        over_pairs(
            "PID of ORPO minus PID of DPO is above 0",
            "answers to one prompt",
            [(values[0] - values[1], prompts)],
            minimum=0.0,
        ),
        _check(
            "AID of ORPO minus AID of DPO is below 0",
            "answers to different prompts",
            across.interval(),
            [across.value],
            maximum=0.0,
        ),
    ]


def cosines(vectors_PD: Numbers) -> Numbers:
    """Return the cosine of each pair of P vectors, shape (P, P). A zero vector has cosine 0."""
    lengths_P1 = np.linalg.norm(vectors_PD, axis=1, keepdims=True)
    unit_PD = np.divide(vectors_PD, lengths_P1, out=np.zeros_like(vectors_PD), where=lengths_P1 > 0)
    found: Numbers = unit_PD @ unit_PD.T
    return found


def across_inputs(values_PP: Numbers) -> Mean:
    """Return the mean over all pairs of different prompts, with its values in resamples.

    A prompt that a resample has twice is not paired with itself.
    """
    prompts = len(values_PP)
    between_PP = values_PP * (1 - np.identity(prompts))
    times_BP = resample_sums(np.identity(prompts))

    def means(weights_WP: Numbers) -> Numbers:
        total_W = weights_WP.sum(1) ** 2 - (weights_WP**2).sum(1)
        found: Numbers = ((weights_WP @ between_PP) * weights_WP).sum(1) / total_W
        return found

    return Mean(
        float(means(np.ones((1, prompts)))[0]),
        means(times_BP),
        means(1 - np.identity(prompts)),
    )


def describe_diversity(found: Compared) -> str:
    """Return of which answers and embeddings the diversity is."""
    result = found.result
    return (
        f"The answers are those of E5: {result.rounds} to each of {result.prompts} prompts, from "
        f"{result.seeds} training of each arm. The embeddings are those of {result.embedding}."
    )


def table_of_diversity(found: Compared) -> list[list[str]]:
    """Return PID and AID of each arm."""
    rows = [["arm", "PID", "AID"]]
    for arm in found.result.arms:
        values = (arm.diversity.pid, arm.diversity.aid)
        rows.append([NAMES[arm.name], *("" if v is None else f"{v:.3f}" for v in values)])
    return rows


def plot_of_diversity(found: Compared) -> dict[str, Any]:
    """Return PID and AID of each arm, for the plot."""
    return {
        "diversity": {
            NAMES[arm.name]: [_rounded(arm.diversity.pid), _rounded(arm.diversity.aid)]
            for arm in found.result.arms
        }
    }
