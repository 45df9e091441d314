"""Put the results of a comparison together, and say which arm is best or that it is not clear."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orpo_lite.comparing.answers import Judged, Numbers, Rounds
from orpo_lite.comparing.arms import JUDGE, SFT
from orpo_lite.comparing.cost import Cost
from orpo_lite.comparing.diversity import Diversity
from orpo_lite.comparing.reward_models import RewardTraining, advice, verdict_on
from orpo_lite.comparing.split import Question
from orpo_lite.comparing.task import Task
from orpo_lite.comparing.win_rates import FEWEST_SEEDS, Sampled, WinRate, mean_tokens, win_rate
from orpo_lite.data.pair import Pair
from orpo_lite.data.split import prompt_key
from orpo_lite.evaluation.intervals import Interval, mean_over_pairs, share_interval


@dataclass(frozen=True)
class Judge:
    """How well the judge ranks pairs that it was not trained on."""

    accuracy: Interval
    """Share of the pairs whose chosen reply has the higher reward. A tie counts as half."""
    pairs: int
    prompts: int
    kept_step: int
    """The step whose adapter was kept. 0: no step was better than the start."""
    training: RewardTraining | None = None

    @property
    def is_trusted(self) -> bool:
        """True if the judge is clearly better than chance."""
        return self.accuracy.low is not None and self.accuracy.low > 0.5

    @property
    def quality(self) -> str:
        """How the judge compares with chance: clearly better, clearly worse, or neither."""
        if self.is_trusted:
            return "clearly better than chance"
        is_worse = self.accuracy.high is not None and self.accuracy.high < 0.5
        return f"{'clearly worse' if is_worse else 'not clearly better'} than chance"


@dataclass(frozen=True)
class ArmRow:
    """What is known about one arm."""

    name: str
    reward: Interval
    """The mean reward of its answers."""
    tokens: float
    """The mean length of its answers."""
    cut: float
    """Share of its answers that reached the largest length."""
    diversity: Diversity
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison: the content of result.json."""

    folder: Path
    judge: Judge
    arms: Sequence[ArmRow]
    wins: Sequence[WinRate]
    """A win rate for each pair of arms. Each arm is compared with the arms before it."""
    winner: str | None
    """The arm that clearly wins against every other arm; None if there is none."""
    verdict: Sequence[str]
    """Sentences: the winner, or what is not clear and why."""
    embedding: str
    """The embeddings with which the diversity was measured."""
    prompts: int
    rounds: int
    seeds: int
    temperature: float
    remark: str = ""
    reward_models: Sequence[RewardTraining] = ()
    """The reward models of PPO, one for each seed; empty if ppo is no arm."""

    def to_json(self) -> dict[str, Any]:
        """Return all values as JSON."""
        values = asdict(self) | {"folder": str(self.folder)}
        for row, win in zip(values["wins"], self.wins, strict=True):
            row |= {"round_sd": win.round_sd, "seed_sd": win.seed_sd}
        values["judge"]["is_trusted"] = self.judge.is_trusted
        return values


def judge_quality(rewards_P2: Numbers, pairs: Sequence[Pair], training: RewardTraining) -> Judge:
    """Return how well the judge ranks P pairs.

    Args:
        rewards_P2: the rewards of the chosen and the rejected replies. NaN: no reward.
        pairs: the pairs.
        training: how the judge was trained.
    """
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    known_P = np.isfinite(margin_P)
    right = 0.5 + 0.5 * np.sign(margin_P[known_P])
    prompts = [prompt_key(pair) for pair, known in zip(pairs, known_P, strict=True) if known]
    (mean,) = mean_over_pairs(right[None], np.ones_like(right)[None], prompts)
    accuracy, kept = share_interval(mean), training.kept_step
    return Judge(accuracy, len(prompts), len(set(prompts)), kept, training)


def sampled(
    task: Task, answers: Mapping[str, Rounds], judged: Judged, arm_name: str
) -> tuple[Sampled, float]:
    """Return the answers of an arm as numbers, and the share of them that were cut."""
    names = [run.name for arm in task.arms if arm.name == arm_name for run in task.runs_of(arm)]
    tokens = [[[a.tokens for a in rows] for rows in answers[name]] for name in names]
    given = [a for name in names for rows in answers[name] for a in rows if a.text is not None]
    rewards = np.stack([judged.rewards[name] for name in names])
    cut = sum(a.cut for a in given) / max(1, len(given))
    return Sampled(arm_name, rewards, np.array(tokens, np.float64)), cut


def make_comparison(
    task: Task,
    questions: Sequence[Question],
    answers: Mapping[str, Rounds],
    judged: Judged,
    judge: Judge,
    found: tuple[str, Mapping[str, Diversity]],
    costs: Mapping[str, Cost],
    *,
    temperature: float,
    remark: str,
    reward_models: Sequence[RewardTraining] = (),
) -> Comparison:
    """Return the result of a comparison.

    Args:
        task: the task.
        questions: the test prompts.
        answers: name of a run -> its answers.
        judged: the rewards of the judge.
        judge: how good the judge is.
        found: the name of the embeddings, and the diversity of each arm by name.
        costs: name of an arm -> its cost.
        temperature: the temperature of the answers.
        remark: a remark about the recipe; "" for none.
        reward_models: how the reward models of PPO were trained.
    """
    numbers = {arm.name: sampled(task, answers, judged, arm.name) for arm in task.arms}
    rows = [
        ArmRow(
            name,
            _mean_reward(arm),
            mean_tokens(arm),
            cut,
            found[1][name],
            costs[name],
        )
        for name, (arm, cut) in numbers.items()
    ]
    names = [*numbers]
    wins = [
        win_rate(numbers[model][0], numbers[against][0])
        for place, model in enumerate(names)
        for against in names[:place]
    ]
    if not judge.is_trusted:
        wins = [replace(win, outcome="cannot tell", prompts_needed=None) for win in wins]
    winner, verdict = decide(names, wins, judge)
    return Comparison(
        folder=task.folder,
        judge=judge,
        arms=rows,
        wins=wins,
        winner=winner,
        verdict=[*verdict, *_not_trained(task, costs), *verdict_on(reward_models)],
        embedding=found[0],
        prompts=len(questions),
        rounds=task.rounds,
        seeds=task.seeds,
        temperature=temperature,
        remark=remark,
        reward_models=reward_models,
    )


def _not_trained(task: Task, costs: Mapping[str, Cost]) -> list[str]:
    """Return a sentence for each arm whose answers are those of its start, with each seed."""
    adapter = task.recipe.model.adapter_name_or_path
    start = f"the adapter {adapter}" if adapter else "the base"
    return [
        f"{arm.name} kept step 0: its answers are those of {SFT if arm.after_sft else start}"
        for arm in task.arms
        if costs[arm.name].kept_step == 0
    ]


def _mean_reward(arm: Sampled) -> Interval:
    known_SRP = np.isfinite(arm.rewards_SRP)
    sums_P = np.nan_to_num(arm.rewards_SRP).sum((0, 1))
    counts_P = known_SRP.sum((0, 1)).astype(np.float64)
    keep_P = counts_P > 0
    (mean,) = mean_over_pairs(
        sums_P[keep_P][None], counts_P[keep_P][None], range(int(keep_P.sum()))
    )
    return mean.interval()


def decide(
    names: Sequence[str], wins: Sequence[WinRate], judge: Judge
) -> tuple[str | None, list[str]]:
    """Return the best arm or None, and sentences that give the reasons.

    An arm is the best if the judge is clearly better than chance, and if the interval of the arm's
    win rate against every other arm is above 50%.
    """
    accuracy = f"the judge ranks {shown(judge.accuracy)} of {judge.pairs:,} pairs correctly; none "
    accuracy += f"of them was in its training{_on_pairs(judge.training)}"
    if not judge.is_trusted:
        fix = "give it more pairs, or more epochs, such as judge:training.num_train_epochs=3"
        if judge.training:
            fix = advice(JUDGE, judge.training)
        if judge.kept_step == 0:
            accuracy += "; it is untrained: no step of its training was better than the start"
        return None, [
            f"cannot tell: {accuracy}; this is {judge.quality}, so its rewards decide nothing; "
            f"{fix}, or a better base, such as judge:model.model_name_or_path=NAME"
        ]
    beaten: dict[str, set[str]] = {name: set() for name in names}
    for win in wins:
        if win.outcome != "cannot tell":
            pair = (win.model, win.against)
            better, worse = pair if win.outcome == "better" else pair[::-1]
            beaten[better].add(worse)
    winner = next((name for name in names if len(beaten[name]) == len(names) - 1), None)
    unclear = [win for win in wins if win.outcome == "cannot tell"]
    if winner:
        first = f"{winner} is best: the judge clearly prefers its answers to those of "
        first += f"{'the other arm' if len(names) == 2 else 'every other arm'}"
        unclear = []
        if len(wins[0].by_seed) < FEWEST_SEEDS:
            first += "; the intervals do not cover other seeds of the trainings (--seeds 3 does)"
    else:
        # Only the pairs that keep one of the best arms from winning are of interest.
        most = max(len(found) for found in beaten.values())
        best = [name for name in names if len(beaten[name]) == most]
        unclear = [win for win in unclear if win.model in best or win.against in best]
        first = "cannot tell which arm is best: no arm clearly wins against another"
        if most:
            have = "has" if len(best) == 1 else "each have" if len(best) > 2 else "both have"
            wins_of = f"the most clear wins ({most} of {len(names) - 1})"
            first = f"cannot tell which arm is best; {_and(best)} {have} {wins_of}"
    sentences = [first, *map(_unclear, unclear)]
    decided = [win for win in wins if winner in (win.model, win.against)]
    sentences += [text for win in decided if (text := _by_length(win))]
    return winner, [*sentences, accuracy]


def _on_pairs(training: RewardTraining | None) -> str:
    """Return the number of pairs of a training as text: `` on 12 of 16 pairs``."""
    if training is None:
        return ""
    whole = "" if training.pairs == training.part_pairs else f" of {training.part_pairs:,}"
    return f" on {training.pairs:,}{whole} pairs"


def _unclear(win: WinRate) -> str:
    text = f"{win.model} against {win.against} is not clear: it wins {shown(win.rate)}"
    if win.prompts_needed:
        text += f"; about {_rounded(win.prompts_needed):,} prompts would be needed"
    return text


def _by_length(win: WinRate) -> str:
    """Return a warning if a clear win is not clear at equal lengths; else ""."""
    low, high = win.length_controlled.low, win.length_controlled.high
    if low is None or high is None or not low <= 0.5 <= high:
        return ""
    longer, shorter = (f"{tokens:.0f}" for tokens in win.tokens)
    return (
        f"{win.model} against {win.against}: at equal lengths the win rate is "
        f"{shown(win.length_controlled)}, so the lengths of the answers ({longer} and {shorter} "
        "tokens) may explain the difference"
    )


def _rounded(count: int) -> int:
    """Return a number with two significant digits, because it is only an estimate."""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // unit) * unit


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def shown(share: Interval) -> str:
    """Return a share with its interval: ``62.5% (95% interval 58.1 to 66.9)``."""
    if share.value is None:
        return "an unknown share"
    if share.low is None or share.high is None:
        return f"{share.value:.1%}"
    low, high = 100 * share.low, 100 * share.high
    return f"{share.value:.1%} (95% interval {low:.1f} to {high:.1f})"
