"""Judge the health of a training by the curves of its metrics.

Each rule is a function that takes :class:`Curves` and returns a :class:`Finding` or None. The
thresholds are constants. The docstring of a constant names its source: ORPO's authors, or OURS for
a threshold of orpo-lite. :func:`find_health` calls all rules.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orpo_lite.evaluation.curves import LEAST_STEPS, OURS, Curves, is_finite

AUTHORS = "what ORPO's authors advise (docs/metrics.md)"

RISE = 0.10
"""The loss diverges if its mean is this much (relative) above its lowest mean. OURS."""
LEAST_RISE = 0.01
"""A smaller rise never counts: a loss near 0 may rise many times over without harm. OURS."""
HELD_OUT_RISE = 0.02
"""A run over-fits if its held-out loss is this much (relative) above its lowest value, twice in a
row. OURS."""
STILL_HIGH = 0.9
"""The held-out loss is falling again if its last rise above the lowest value is at most this share
of its highest rise. OURS."""
CHOSEN_NEAR_0 = -0.1
"""A chosen log-prob above this is near 0: a token has a probability above 0.9 on average. The
authors say 0."""
REJECTED_LOW = -5.0
"""A rejected log-prob below this is low. The authors say -5 to -10."""
SINK = 0.1
"""Both log-probs sink if each falls by this many nats (10% of a token's probability). OURS. Figs 7
and 9 of the paper: λ = 1 sinks both, λ = 0.1 keeps them close."""
STRONG_BETA = 0.1
"""According to the authors, this λ keeps the log-probs close to their start. The paper trains
Mistral with it."""
NLL_WEIGHTS = {"dpo": "loss.rpo_alpha", "simpo": "loss.cpo_alpha"}
"""Objective without an NLL -> the setting that adds it (arXiv 2404.19733 for DPO)."""
FAR_KL = 2.0
"""A PPO policy has left its reference if the KL is this many times the target. OURS."""
KL_TARGET = 6.0
"""The target where ``loss.kl_target`` is null: its default."""
FLAT_LOSS = 0.01
"""A loss that falls by less than this (relative) counts as not fallen. OURS."""
FLAT_ODDS = 0.02
"""Log odds that rise by less than this count as not risen. 0.02 means 2% higher odds. OURS."""
HIGH_START = 0.75
"""An accuracy of this value before the first step is high: a base starts near 0.5 to 0.6. The
authors say that a high value means patterned data. The number is OURS."""
LENGTH_MATTERS = 0.65
"""If a rule that only looks at length has this accuracy, length says much about the pairs. OURS."""

Gravity = Literal["serious", "warning", "unknown", "good"]


@dataclass(frozen=True)
class Finding:
    """One verdict on the health of a run."""

    name: str
    """The identifier of the verdict, for programs and for docs/report.md."""
    title: str
    gravity: Gravity
    reason: str
    """Sentences with the numbers of this run that led to the verdict."""
    rule: str
    """A text that says when a run gets this verdict."""
    source: str
    """Where the threshold of the rule comes from."""
    advice: str
    """What the person should do."""
    values: Mapping[str, Any]
    """``section.key`` -> the value for the next training; {} if no setting helps."""


def find_health(curves: Curves) -> list[Finding]:
    """Return the verdicts on a run, the most serious first. There is at least one."""
    found = [finding for rule in RULES if (finding := rule(curves))]
    if any(finding.name == "diverging" for finding in found):
        # The other verdicts are consequences of the divergence, except the one on the data.
        found = [finding for finding in found if finding.name in ("diverging", "data")]
    return found or [_healthy(curves)]


# --- the rules, the most serious first


def diverging(curves: Curves) -> Finding | None:
    """Return a finding if the training loss rises or is not finite."""
    lost = [row.get("step") for row in curves.train if not is_finite(row["loss"])]
    reason = ""
    if lost:
        count = f"{len(lost)} step{'' if len(lost) == 1 else 's'}"
        reason = f"The loss is not finite at {count}, first at step {lost[0]}."
    elif curves.objective != "ppo" and (windows := curves.windows("loss")):
        lowest, last = min(windows.means), windows.means[-1]
        if last - lowest > max(RISE * abs(lowest), LEAST_RISE, windows.error):
            reason = f"The mean training loss rose from {lowest:.3g} to {last:.3g}."
    if not reason:
        return None
    values: dict[str, Any] = {"training.learning_rate": _rate(curves, 0.2)}
    norm = curves.settings.get("training.max_grad_norm")
    if isinstance(norm, int | float) and not 0 < norm <= 1:
        values["training.max_grad_norm"] = 1.0
    return Finding(
        "diverging",
        "Diverging",
        "serious",
        reason,
        f"The loss is not finite, or its last mean is {RISE:.0%} ({LEAST_RISE} or more) above its "
        "lowest mean.",
        OURS,
        "Train again with a fifth of the learning rate. A run with held-out pairs keeps its best "
        "adapter.",
        values,
    )


def far_from_reference(curves: Curves) -> Finding | None:
    """Return a finding if PPO ends with a policy that is far from its reference model."""
    last = [rows[-1].get("objective/kl", 0) for rows in (curves.held_out, curves.train) if rows]
    kl = max((value for value in last if is_finite(value)), default=0)
    target = curves.settings.get("loss.kl_target") or KL_TARGET
    if kl <= FAR_KL * target:
        return None
    return Finding(
        "far-from-reference",
        "Far from the reference",
        "serious",
        f"The policy left the reference: the KL is {kl:.3g} nats, and the target is {target:g}.",
        f"The KL to the reference model ends above {FAR_KL:g} times loss.kl_target.",
        OURS,
        "Train again with a fifth of the learning rate, or with a higher loss.kl_coef.",
        {"training.learning_rate": _rate(curves, 0.2)},
    )


def over_fitting(curves: Curves) -> Finding | None:
    """Return a finding if the model fits the training pairs too closely.

    One of two signs is enough:

    - The chosen log-prob is near 0 and the rejected log-prob is low. ORPO's authors name this sign.
    - The held-out loss rises.
    """
    if far_from_reference(curves):  # then the KL raises the held-out loss
        return None
    reasons = []
    chosen, rejected = curves.windows("logps/chosen"), curves.windows("logps/rejected")
    if chosen and rejected:
        high, low = chosen.means[-1], rejected.means[-1]
        if high > CHOSEN_NEAR_0 and low <= REJECTED_LOW:
            reasons.append(
                f"The chosen log-prob rose to {high:.2f} while the rejected one fell to {low:.1f}."
            )
    losses = [row for row in curves.held_out if is_finite(row.get("loss"))]
    best = min(losses, key=lambda row: float(row["loss"]), default={})
    if losses:
        lowest = float(best["loss"])
        after = [float(row["loss"]) for row in losses[losses.index(best) + 1 :]]
        rise = max(HELD_OUT_RISE * abs(lowest), LEAST_RISE)
        is_high = len(after) >= 2 and min(after[-2:]) > lowest + rise
        # If only the first steps were too large, the loss rises too, but then falls again.
        if is_high and after[-1] - lowest > STILL_HIGH * (max(after) - lowest):
            reasons.append(
                f"The held-out loss rose from {lowest:.3g} at step {best['step']} to "
                f"{after[-1]:.3g} at step {losses[-1]['step']}."
            )
    if not reasons:
        return None
    return Finding(
        "over-fitting",
        "Over-fitting",
        "serious",
        " ".join(reasons),
        f"The chosen log-prob is above {CHOSEN_NEAR_0} and the rejected one below "
        f"{REJECTED_LOW:g}. Or the held-out loss is over {HELD_OUT_RISE:.0%} (and at "
        f"least {LEAST_RISE}) above its lowest value, twice in a row, and is not falling again.",
        f"{AUTHORS}; the limits of the held-out loss are thresholds of orpo-lite",
        "Train for fewer steps, or with a lower learning rate or more data.",
        _shorter(curves, best.get("step")),
    )


def both_sink(curves: Curves) -> Finding | None:
    """Return a finding if the log-probs of the chosen and of the rejected answers both fall."""
    chosen, rejected = curves.change("logps/chosen"), curves.change("logps/rejected")
    if not chosen or not rejected:
        return None
    if any(-found.difference < max(SINK, found.error) for found in (chosen, rejected)):
        return None
    beta = curves.settings.get("loss.beta")
    is_weight = curves.objective in ("orpo", "probability_ratio")
    weight = NLL_WEIGHTS.get(curves.objective, "")
    value: dict[str, Any] = {"training.learning_rate": _rate(curves, 0.5)}
    advice = "Train again with half the learning rate."
    if is_weight and isinstance(beta, int | float) and beta > STRONG_BETA:
        value = {"loss.beta": STRONG_BETA}
        advice = f"λ is {beta:g}. Train again with λ = {STRONG_BETA:g}."
    elif weight and not curves.settings.get(weight):
        value = {weight: 1.0}
        advice = f"The loss has no NLL. Train again with {weight}=1, which adds the NLL."
    return Finding(
        "sinking",
        "Both log-probs sink",
        "warning",
        f"The chosen log-prob fell {chosen}, and the rejected one {rejected}. So the model also "
        "makes good answers less likely.",
        f"Both log-probs end at least {SINK:g} below their start.",
        f"{AUTHORS}, and Figs 7 and 9 of the paper; the number is {OURS}",
        advice,
        value,
    )


def not_learning(curves: Curves) -> Finding | None:
    """Return a finding if the loss does not fall and the metric of RAISED does not rise."""
    if len(curves.train) < LEAST_STEPS:
        return None
    name, label = curves.comparison or ("", "")
    loss, odds = curves.change("loss"), curves.change(name)
    if not loss or (name and not odds):
        return None
    falls = -loss.difference >= max(FLAT_LOSS * abs(loss.first), loss.error)
    rises = odds is not None and odds.difference >= max(FLAT_ODDS, odds.error)
    if falls or rises:
        return None
    other = f", and the {label} {odds}" if odds else ""
    return Finding(
        "not-learning",
        "Not learning",
        "serious",
        f"The loss went {loss}{other}.",
        f"The loss falls by less than {FLAT_LOSS:.0%} and the log odds or the reward margin rise "
        f"by less than {FLAT_ODDS:g}.",
        OURS,
        "Train again with five times the learning rate. If that changes nothing, look at the pairs "
        "with `orpo-lite data`.",
        {"training.learning_rate": _rate(curves, 5)},
    )


def too_easy_data(curves: Curves) -> Finding | None:
    """Return a finding if most pairs can be ranked correctly without a training.

    One of two signs is enough:

    - The base already ranks most pairs correctly before the training.
    - A rule that only looks at the length of replies ranks most pairs correctly, and is right on
      at least as many pairs as the trained model.
    """
    reasons = []
    first, pairs, where = _accuracy_before(curves)
    if first is not None and first >= HIGH_START and _lower_bound(first, pairs) > LENGTH_MATTERS:
        reasons.append(
            f"Before the first step the base prefers the chosen answer in {first:.0%} of "
            f"{pairs:,} {where} pairs."
        )
    rule, last = curves.length_rule, _last_accuracy(curves)
    is_trained = len(curves.train) >= LEAST_STEPS
    if is_trained and rule is not None and last is not None and rule >= max(LENGTH_MATTERS, last):
        reasons.append(
            f"A rule that only looks at length is right on {rule:.0%} of the pairs. The trained "
            f"model is right on {last:.0%}."
        )
    if not reasons:
        return None
    return Finding(
        "data",
        "The data is too easy",
        "warning",
        " ".join(reasons),
        f"The accuracy is at least {HIGH_START:.0%} before the first step, and its 95% interval "
        f"lies above {LENGTH_MATTERS:.0%}. Or, after {LEAST_STEPS} steps, a rule that only "
        f"looks at length is right on at least {LENGTH_MATTERS:.0%} of the pairs, and at least as "
        "often as the trained model.",
        f"{AUTHORS}; the numbers are thresholds of orpo-lite",
        "Look at the pairs with `orpo-lite data`: chosen and rejected answers may differ in "
        "length, style or source. Use pairs whose two answers have the same source and a similar "
        "length.",
        {},
    )


def too_few_steps(curves: Curves) -> Finding | None:
    """Return a finding if the run has too few steps for a verdict."""
    steps = len(curves.train)
    if steps >= LEAST_STEPS:
        return None
    return Finding(
        "too-few-steps",
        "Too few steps to tell",
        "unknown",
        f"The run has {steps} step{'' if steps == 1 else 's'}.",
        f"The run has fewer than {LEAST_STEPS} steps.",
        OURS,
        "Train longer. With so few steps the curves are mostly noise.",
        {"training.max_steps": 100},
    )


RULES: tuple[Callable[[Curves], Finding | None], ...] = (
    diverging,
    far_from_reference,
    over_fitting,
    not_learning,
    both_sink,
    too_easy_data,
    too_few_steps,
)


def _healthy(curves: Curves) -> Finding:
    named = {"The loss": "loss"}
    if curves.comparison:
        metric, label = curves.comparison
        named[f"The {label}"] = metric
    changes = {label: curves.change(name) for label, name in named.items()}
    reason = " ".join(f"{label} went {change}." for label, change in changes.items() if change)
    return Finding(
        "healthy",
        "Healthy",
        "good",
        reason,
        "No other verdict applies.",
        "the rules in docs/report.md",
        "Nothing to do.",
        {},
    )


# --- figures that several rules use


def _rate(curves: Curves, factor: float) -> float:
    """Return the run's learning rate times ``factor``, rounded to two digits."""
    rate = curves.settings.get("training.learning_rate")
    rate = rate if isinstance(rate, int | float) and is_finite(rate) and rate > 0 else 5e-5
    return float(f"{rate * factor:.2g}")


def _shorter(curves: Curves, best: object) -> dict[str, Any]:
    """Return settings for a shorter training: up to the best evaluation, else half of the steps."""
    last = curves.train[-1].get("step") if curves.train else None
    steps = best if isinstance(best, int) and best > 0 else (last or 2) // 2
    values: dict[str, Any] = {"training.max_steps": max(1, steps)}
    if curves.settings.get("training.load_best_model_at_end") is False:
        values["training.load_best_model_at_end"] = True
    return values


def _accuracy_before(curves: Curves) -> tuple[float | None, int, str]:
    """Return (accuracy before the first step, number of pairs, "held-out" or "training").

    The accuracy is None if it says nothing about the data or was not measured.
    """
    name = "rewards/accuracies"
    if curves.objective in ("dpo", "reward"):  # all rewards are 0, or a new head is random
        return None, 0, ""
    held_out = curves.data.get("held_out_pairs")
    if curves.held_out and curves.held_out[0].get("step") == 0:
        value = curves.held_out[0].get(name)
        if isinstance(value, int | float) and isinstance(held_out, int) and held_out:
            return float(value), held_out, "held-out"
    batch = curves.settings.get("training.global_batch_size")
    if not curves.train or not isinstance(batch, int) or curves.train[0].get("step") != 1:
        return None, 0, ""
    value = curves.train[0].get(name)  # measured before the first update
    return (float(value), batch, "training") if isinstance(value, int | float) else (None, 0, "")


def _last_accuracy(curves: Curves) -> float | None:
    """Return the trained model's accuracy in its best evaluation, else in its last steps."""
    losses = [row for row in curves.held_out if is_finite(row.get("loss")) and row.get("step")]
    if losses:
        value = min(losses, key=lambda row: float(row["loss"])).get("rewards/accuracies")
        return float(value) if isinstance(value, int | float) else None
    windows = curves.windows("rewards/accuracies")
    return windows.means[-1] if windows else None


def _lower_bound(share: float, count: int) -> float:
    """Return the lower end of the 95% interval of a share, by Wilson's score interval."""
    z = 1.96
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count)
