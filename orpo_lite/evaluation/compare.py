"""Compare the scores of models on the same pairs: a table, differences, and an outcome in words.

Reward accuracy decides whether a model is better, because it is the only metric in which every pair
counts the same. Margin and log odds also rise if a model becomes surer of pairs that it already
ranked correctly. The NLL ignores the rejected replies.

A difference is clear if its 95% interval excludes 0. A clear difference in accuracy gives the
outcome "better" or "worse". Otherwise the outcome is "cannot tell". It is also "cannot tell" in two
other cases: there are fewer prompts than FEWEST_PROMPTS, or the difference in log odds is clear too
and has the opposite sign. If only the difference in log odds is clear, the text says so.

Log odds alone never give "better" or "worse", although ORPO trains them. If two metrics could
decide, two equal models would get "better" or "worse" in more than 5% of the cases.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from orpo_lite.data.cache import NUMBERS, TokenizedPairs
from orpo_lite.data.sources.source import is_path
from orpo_lite.data.statistics import response_lengths
from orpo_lite.evaluation.intervals import (
    LEVEL,
    Interval,
    Mean,
    Numbers,
    mean_over_pairs,
    pairs_needed,
    share_difference,
    share_interval,
)
from orpo_lite.objectives.orpo import log_odds
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.schema import DataSection

FEWEST_PROMPTS = 6
"""With fewer prompts, a two-sided sign test does not reach 5%, even if all prompts agree."""

Outcome = Literal["better", "worse", "cannot tell"]
LISTS = ("models", "comparisons")
Means = dict[str, Mean]
"""Name of a field of :class:`Metrics` -> its mean."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of one model, or differences between the metrics of two models.

    Each value has a 95% interval.
    """

    accuracy: Interval
    """Share of pairs whose chosen reply has the higher mean log-probability or reward. A tie does
    not count as higher."""
    margin: Interval
    """Mean log-probability of the chosen reply minus the mean log-probability of the rejected
    reply, in nats per token. TRL's rewards/margins is this value times beta. Of a reward model: the
    reward of the chosen reply minus the reward of the rejected reply."""
    log_odds: Interval
    """Log of the odds ratio of chosen to rejected, Eq. 4 and 5 of the ORPO paper. A reward model
    has no odds."""
    nll: Interval
    """Negative log-likelihood of the chosen sequences per counted token. A reward model has
    none."""


@dataclass(frozen=True)
class ShorterChosen:
    """A model's accuracy on the pairs whose chosen reply has fewer tokens than the rejected one."""

    pairs: int
    accuracy: Interval


@dataclass(frozen=True)
class ShorterDifference:
    """The comparison of two models on some of the pairs.

    These are the pairs whose chosen reply has fewer tokens than the rejected reply.
    """

    pairs: int
    prompts: int
    outcome: Outcome
    accuracy: Interval
    """The difference between the two models' accuracies."""


@dataclass(frozen=True)
class ModelScores:
    """The metrics of one model with 95% intervals: one row of the table."""

    name: str
    accuracy: Interval
    margin: Interval
    log_odds: Interval
    nll: Interval
    shorter_chosen: ShorterChosen


@dataclass(frozen=True)
class Comparison:
    """The comparison of the model ``model`` with the model ``against``."""

    model: str
    against: str
    outcome: Outcome
    decided_by: str | None
    """The metric that decided. None if the outcome is "cannot tell"."""
    differences: Metrics
    """The metrics of ``model`` minus the metrics of ``against``."""
    shorter_chosen: ShorterDifference
    pairs_needed: int | None
    """About how many pairs are needed for a clear outcome, if the true difference is as large as
    observed. None if the outcome is clear, if accuracy and log odds contradict each other, or if no
    difference was observed."""
    text: str
    """The outcome and its reasons, in words."""


@dataclass(frozen=True)
class LengthRule:
    """The accuracy of a rule that prefers the longer reply of every pair."""

    accuracy: float | None
    """Share of ``pairs`` whose chosen reply is the longer one. None if there are no such pairs."""
    pairs: int
    """Number of pairs whose replies have different lengths."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: the content of verdict.json or eval.json."""

    pairs: int
    prompts: int
    held_out: bool
    """True if it is known that no compared run was trained on a prompt of these pairs."""
    data: str
    """The name of the dataset."""
    models: tuple[ModelScores, ...]
    comparisons: tuple[Comparison, ...]
    length_rule: LengthRule

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        lists = {name: [asdict(row) for row in getattr(self, name)] for name in LISTS}
        return asdict(self) | lists


def compare(
    pairs: TokenizedPairs,
    scores: Mapping[str, PairScores],
    comparisons: Sequence[tuple[str, str]],
    *,
    held_out: bool,
    data: str,
) -> Evaluation:
    """Return the metrics of each model, and the outcome of each comparison.

    Args:
        pairs: the P pairs.
        scores: name of a model -> its scores of the P pairs, in the order of ``pairs``.
        comparisons: the names (model, against) of the models to compare.
        held_out: True if it is known that no compared run was trained on a prompt of these pairs.
        data: the name of the pairs' dataset.
    """
    columns = {name: pairs.column(name) for name in NUMBERS}
    chosen_P, rejected_P = (response_lengths(columns, reply) for reply in ("chosen", "rejected"))
    prompts_P = pairs.prompts()
    shorter_P = chosen_P < rejected_P
    means = dict(zip(scores, _means([*scores.values()], prompts_P), strict=True))
    short_prompts = [prompt for prompt, is_in in zip(prompts_P, shorter_P, strict=True) if is_in]
    short_scores = [PairScores(*(part[shorter_P] for part in parts)) for parts in scores.values()]
    short_means = dict(zip(scores, _means(short_scores, short_prompts), strict=True))
    count, kind = len(pairs), "held-out pairs" if held_out else "pairs"
    differ = int((chosen_P != rejected_P).sum())
    rule = float((chosen_P > rejected_P).sum() / differ) if differ else None
    found = []
    for model, against in comparisons:
        judged = _Judged(model, against, means[model], means[against], count, kind)
        shorter = _Judged(
            model, against, short_means[model], short_means[against], len(short_prompts), kind
        )
        found.append(_comparison(judged, shorter))
    rows = [
        ModelScores(
            name,
            **vars(_intervals(means[name])),
            shorter_chosen=ShorterChosen(
                len(short_prompts), share_interval(short_means[name]["accuracy"])
            ),
        )
        for name in scores
    ]
    return Evaluation(
        pairs=count,
        prompts=len(set(prompts_P)),
        held_out=held_out,
        data=data,
        models=tuple(rows),
        comparisons=tuple(found),
        length_rule=LengthRule(rule, differ),
    )


def name_pairs(data: DataSection, *, is_test: bool) -> str:
    """Return a name of the scored pairs. ``is_test``: True if the pairs are held out.

    - A file or folder of held-out pairs: its path, ``test.jsonl``.
    - A held-out split of the dataset: ``owner/name, split test``.
    - All other pairs: the dataset, ``owner/name`` or ``pairs.jsonl``.
    """
    names, split = ", ".join(data.names), data.dataset_test_split
    if split is None or not is_test:
        return names
    return split if is_path(split) else f"{names}, split {split}"


def _means(scores: Sequence[PairScores], prompts_P: Sequence[bytes]) -> list[Means]:
    """Return the metrics of each model. All are computed on the same resamples.

    The log odds are computed in float32 as in a training, so that a log-probability near 0 is
    clamped at the same value.
    """
    numerators: list[Numbers] = []
    denominators: list[Numbers] = []
    is_same = all(np.array_equal(one.nll_tokens_P, scores[0].nll_tokens_P) for one in scores)
    for one in scores:
        chosen_P, rejected_P = one.chosen_P.numpy(), one.rejected_P.numpy()
        margin_P = chosen_P - rejected_P
        odds_P = log_odds(one.chosen_P.float(), one.rejected_P.float()).double().numpy()
        if one.are_rewards:
            odds_P = np.full_like(margin_P, np.nan)
        # If the score of a pair is not finite, the accuracy is unknown too.
        won_P = np.where(np.isfinite(margin_P), chosen_P > rejected_P, np.nan)
        numerators += [won_P, margin_P, odds_P, one.nll_P.numpy()]
        ones_P, tokens_P = np.ones(len(won_P)), one.nll_tokens_P.numpy()
        # NLLs per token of two tokenizers are not comparable.
        denominators += [ones_P, ones_P, ones_P, tokens_P if is_same else tokens_P * np.nan]
    found = mean_over_pairs(np.stack(numerators), np.stack(denominators), prompts_P)
    names = tuple(Metrics.__annotations__)
    return [
        dict(zip(names, found[start : start + len(names)], strict=True))
        for start in range(0, len(found), len(names))
    ]


def _intervals(means: Means) -> Metrics:
    return Metrics(
        share_interval(means["accuracy"]),
        *(means[name].interval() for name in ("margin", "log_odds", "nll")),
    )


@dataclass(frozen=True)
class _Judged:
    """Two models with their metrics on the same pairs."""

    model: str
    against: str
    after: Means
    before: Means
    pairs: int
    kind: str

    @property
    def prompts(self) -> int:
        return len(self.after["accuracy"].without_M)

    @cached_property
    def differences(self) -> Means:
        return {name: self.after[name] - self.before[name] for name in self.after}

    @cached_property
    def intervals(self) -> Metrics:
        found = {name: mean.interval() for name, mean in self.differences.items()}
        if not self.is_equal:
            found["accuracy"] = share_difference(self.differences["accuracy"])
        return Metrics(**found)

    @property
    def is_equal(self) -> bool:
        """True if all scores are equal. Then the difference is exactly 0."""
        known = [mean for mean in self.differences.values() if not math.isnan(mean.value)]
        return not any(mean.resampled_B.any() or mean.value for mean in known)

    @property
    def contradicts(self) -> bool:
        """True if the differences in accuracy and log odds are clear and have opposite signs."""
        accuracy, odds = self.intervals.accuracy, self.intervals.log_odds
        is_clear = accuracy.excludes_zero() and odds.excludes_zero()
        return is_clear and (self.differences["accuracy"].value > 0) != (
            self.differences["log_odds"].value > 0
        )

    @property
    def outcome(self) -> Outcome:
        is_clear = self.intervals.accuracy.excludes_zero() and not self.contradicts
        if self.prompts < FEWEST_PROMPTS or not is_clear:
            return "cannot tell"
        return "better" if self.differences["accuracy"].value > 0 else "worse"

    @property
    def needed(self) -> int | None:
        if self.outcome != "cannot tell" or self.contradicts:
            return None
        needed = pairs_needed(self.differences["accuracy"], self.pairs)
        if needed is None:
            return None
        return max(needed, math.ceil(FEWEST_PROMPTS * self.pairs / self.prompts))


def _comparison(judged: _Judged, shorter: _Judged) -> Comparison:
    outcome = judged.outcome
    return Comparison(
        model=judged.model,
        against=judged.against,
        outcome=outcome,
        decided_by=None if outcome == "cannot tell" else "accuracy",
        differences=judged.intervals,
        shorter_chosen=ShorterDifference(
            shorter.pairs, shorter.prompts, shorter.outcome, shorter.intervals.accuracy
        ),
        pairs_needed=judged.needed,
        text=" ".join(filter(None, (_verdict(judged), _odds(judged), _length(judged, shorter)))),
    )


def _verdict(judged: _Judged) -> str:
    pairs, prompts = _counted(judged.pairs, judged.kind), _counted(judged.prompts, "prompts")
    accuracy = judged.differences["accuracy"]
    if not math.isfinite(accuracy.value) or not math.isfinite(judged.differences["margin"].value):
        return f"cannot tell: on {pairs}, some of the scores are not finite numbers."
    if judged.is_equal:
        return f"cannot tell: {judged.model} and {judged.against} have equal scores on {pairs}."
    after, before = (f"{means['accuracy'].value:.1%}" for means in (judged.after, judged.before))
    change = (
        f"{judged.model} prefers the chosen reply in {after} of them, {judged.against} in {before}"
    )
    text = f"on {pairs} of {prompts}: {change}: {_points(judged.intervals.accuracy)}."
    if judged.outcome != "cannot tell":
        return f"{judged.outcome} by reward accuracy, {text}"
    text = f"cannot tell by reward accuracy, {text}"
    if judged.prompts < FEWEST_PROMPTS:
        text += f" At least {FEWEST_PROMPTS} prompts are needed to tell."
    if judged.contradicts:
        return f"{text} The log odds clearly change in the opposite direction."
    needed = judged.needed
    if needed is None:
        return text
    return f"{text} To show a difference of this size, about {_rounded(needed)} are needed."


def _odds(judged: _Judged) -> str:
    """Return a sentence on the log odds if they are clear and the accuracy is not; else ""."""
    odds = judged.intervals.log_odds
    is_only = not judged.intervals.accuracy.excludes_zero() and odds.excludes_zero()
    if judged.prompts < FEWEST_PROMPTS or not is_only or odds.value is None:
        return ""
    verb = "rise" if odds.value > 0 else "fall"
    return (
        f"The log odds clearly differ: they {verb} by {abs(odds.value):.3g} "
        f"({LEVEL:.0%} interval {odds.low:+.3g} to {odds.high:+.3g})."
    )


def _length(judged: _Judged, shorter: _Judged) -> str:
    """Return a warning if the model may only prefer longer replies than before; else ""."""
    if judged.outcome != "better" or shorter.outcome != "worse":
        return ""
    pairs = f"{shorter.pairs:,} pairs whose chosen reply is the shorter one"
    return f"But it is worse on the {pairs}: it may only prefer longer replies than before."


def _points(difference: Interval) -> str:
    """Return a difference of shares in percentage points, with its interval."""
    if difference.value is None:
        return "an unknown difference"
    points = f"{100 * difference.value:+.1f} points"
    if difference.low is None or difference.high is None:
        return points
    return (
        f"{points} ({LEVEL:.0%} interval {100 * difference.low:+.1f} to "
        f"{100 * difference.high:+.1f})"
    )


def _counted(count: int, nouns: str) -> str:
    return f"{count:,} {nouns.removesuffix('s') if count == 1 else nouns}"


def _rounded(count: int) -> str:
    """Return an estimated number of pairs, rounded to two digits: ``1234`` -> ``1,200 pairs``."""
    if count >= 1_000_000:
        return "a million pairs or more"
    digits = max(0, len(str(count)) - 2)
    return f"{round(count, -digits):,} pairs"
