"""Judge the health of a training by the curves of its metrics.

Each rule is a function of :class:`Curves` that returns a :class:`Finding` or None. Its threshold is
a constant with its source. :func:`find_health` calls all rules.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]

AUTHORS = "what ORPO's authors advise (docs/metrics.md)"
OURS = "a threshold of orpo-lite"

LEAST_STEPS = 20
"""With fewer steps the first and the last tenth hold fewer than two steps each. OURS."""
NOISE = 4.0
"""Standard errors that a difference of two means must exceed. About 1 in 16,000 by chance, and a
run has some dozens of such differences. OURS."""
RISE = 0.10
"""A mean training loss this much (relative) above its lowest one has diverged. OURS."""
HELD_OUT_RISE = 0.02
"""Held-out loss above its lowest value (relative), twice in a row: over-fitting. OURS."""
STILL_HIGH = 0.9
"""Share of the highest rise that is left at the end; with less the loss is falling again. OURS."""
CHOSEN_NEAR_0 = -0.1
"""Chosen log-prob "at 0": each token has a probability above 0.9. The authors name 0."""
REJECTED_LOW = -5.0
"""The authors name -5 to -10."""
SINK = 0.1
"""Nats that both log-probs must have fallen, 10% of the probability of a token. OURS; that a λ of 1
sinks both and 0.1 keeps them close is the authors' experience, and Figs 7 and 9 of the paper."""
STRONG_BETA = 0.1
"""λ that keeps the log-probs close, by the authors; the paper trains Mistral with it."""
FLAT_LOSS = 0.01
"""A loss that fell less than this (relative) has not fallen. OURS."""
FLAT_ODDS = 0.02
"""Log odds that rose less than this have not risen: odds 2% higher. OURS."""
HIGH_START = 0.75
"""Accuracy before the first step. A base starts near 0.5 to 0.6; a high value means patterned data,
by the authors, who name no number. This one is OURS."""
LENGTH_MATTERS = 0.65
"""Accuracy from which a rule that only looks at length says something about the data. OURS."""

Gravity = Literal["serious", "warning", "unknown", "good"]


@dataclass(frozen=True)
class Finding:
    """One verdict on the health of a run."""

    name: str
    """Its identifier, for programs and for docs/report.md."""
    title: str
    gravity: Gravity
    reason: str
    """What was seen, with its figures."""
    rule: str
    """When this verdict is given."""
    source: str
    """Where the threshold of the rule comes from."""
    advice: str
    """What to do."""
    values: Mapping[str, Any]
    """``section.key`` -> value to train with next time; {} if no key helps."""


@dataclass(frozen=True)
class Curves:
    """The metrics of a run, as the rules read them."""

    train: Sequence[Row]
    """The rows of training steps, in order."""
    held_out: Sequence[Row]
    """The rows of evaluations, in order, without the prefix ``eval_``."""
    settings: Mapping[str, Any]
    """``section.key`` -> value of the recipe."""
    data: Mapping[str, Any]
    """The content of data.json, or {}."""
    length_rule: float | None
    """Accuracy of a rule that only looks at length, on held-out pairs; None if unknown."""

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        settings: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        length_rule: float | None = None,
    ) -> "Curves":
        """Divide the rows of metrics.jsonl into those of training and of evaluations."""
        held_out = [
            {key.removeprefix("eval_"): value for key, value in row.items()}
            for row in rows
            if "eval_loss" in row
        ]
        train = [row for row in rows if "loss" in row]
        if length_rule is None and data:
            length_rule = _length_rule(data)
        return cls(train, held_out, settings, data or {}, length_rule)

    def windows(self, name: str) -> "Windows | None":
        """Return the means of a training metric over parts of the run; None with too few steps."""
        values = [float(row[name]) for row in self.train if _is_finite(row.get(name))]
        return Windows.of(values) if len(values) >= LEAST_STEPS else None

    def change(self, name: str) -> "Change | None":
        """Return how a metric changed from start to end: on held-out pairs, else in training."""
        values = [float(row[name]) for row in self.held_out if _is_finite(row.get(name))]
        if len(values) >= 2 and self.held_out[0].get("step") == 0:
            return Change(values[0], values[-1], 0.0, "held-out")
        windows = self.windows(name)
        if windows is None:
            return None
        return Change(windows.means[0], windows.means[-1], windows.error, "training")


@dataclass(frozen=True)
class Windows:
    """The means of a noisy series over windows of equal length."""

    means: Sequence[float]
    error: float
    """Least difference of two means that is not noise: NOISE standard errors."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Windows":
        """Divide a series into windows of a tenth, of 3 to 100 values; the last ends at its end."""
        size = min(max(3, len(values) // 10), 100)
        ends = range(len(values), size - 1, -size)
        means = [statistics.fmean(values[end - size : end]) for end in ends][::-1]
        # The spread of neighbours is that of the noise, whatever the course of the series.
        steps = [abs(one - other) for one, other in itertools.pairwise(values)]
        deviation = 1.4826 * statistics.median(steps) / math.sqrt(2)
        return cls(means, NOISE * deviation * math.sqrt(2 / size))


@dataclass(frozen=True)
class Change:
    """A metric at the start and at the end of a run."""

    first: float
    last: float
    error: float
    """Least difference that is not noise; 0 for the same pairs at both ends."""
    where: Literal["held-out", "training"]

    @property
    def difference(self) -> float:
        return self.last - self.first

    def __str__(self) -> str:
        return f"from {self.first:.3f} to {self.last:.3f} ({self.where} pairs)"


def find_health(curves: Curves) -> list[Finding]:
    """Return the verdicts on a run, the gravest first: at least one."""
    found = [finding for rule in RULES if (finding := rule(curves))]
    if any(finding.name == "diverging" for finding in found):
        # The other curves are consequences then. What the data give away is not.
        found = [finding for finding in found if finding.name in ("diverging", "data")]
    return found or [_healthy(curves)]


# --- the rules, the gravest first


def diverging(curves: Curves) -> Finding | None:
    """The training loss rises, or is not finite."""
    lost = [row.get("step") for row in curves.train if not _is_finite(row["loss"])]
    reason = ""
    if lost:
        reason = f"The loss is not finite at {len(lost)} steps, first at step {lost[0]}."
    elif windows := curves.windows("loss"):
        lowest, last = min(windows.means), windows.means[-1]
        if last - lowest > max(RISE * abs(lowest), windows.error):
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
        f"A loss that is not finite, or a mean training loss over {RISE:.0%} above its lowest one.",
        OURS,
        "Train again with a fifth of the learning rate. The adapter of the best evaluation is kept "
        "if there are held-out pairs.",
        values,
    )


def over_fitting(curves: Curves) -> Finding | None:
    """The authors' pattern of log-probs, or a held-out loss that rises."""
    reasons = []
    chosen, rejected = curves.windows("logps/chosen"), curves.windows("logps/rejected")
    if chosen and rejected:
        high, low = chosen.means[-1], rejected.means[-1]
        if high > CHOSEN_NEAR_0 and low <= REJECTED_LOW:
            reasons.append(
                f"The chosen log-prob rose to {high:.2f} while the rejected one fell to {low:.1f}."
            )
    losses = [row for row in curves.held_out if _is_finite(row.get("loss"))]
    best = min(losses, key=lambda row: float(row["loss"]), default={})
    if losses:
        lowest = float(best["loss"])
        after = [float(row["loss"]) for row in losses[losses.index(best) + 1 :]]
        is_high = len(after) >= 2 and min(after[-2:]) > lowest + HELD_OUT_RISE * abs(lowest)
        # A first step that was too large also raises the loss, but it falls again from there.
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
        f"Chosen log-prob above {CHOSEN_NEAR_0} with the rejected one below {REJECTED_LOW:g}; or "
        f"a held-out loss over {HELD_OUT_RISE:.0%} above its lowest, twice in a row, that is not "
        "falling again.",
        f"{AUTHORS}; the limits of the held-out loss are {OURS}",
        "Train for fewer steps, or with a lower learning rate or more data.",
        _shorter(curves, best.get("step")),
    )


def both_sink(curves: Curves) -> Finding | None:
    """Both log-probs fall: the odds term is too strong for the NLL."""
    chosen, rejected = curves.change("logps/chosen"), curves.change("logps/rejected")
    if not chosen or not rejected:
        return None
    if any(-found.difference < max(SINK, found.error) for found in (chosen, rejected)):
        return None
    beta = curves.settings.get("loss.beta")
    is_strong = isinstance(beta, int | float) and beta > STRONG_BETA
    value = {"loss.beta": STRONG_BETA} if is_strong else {}
    advice = (
        f"λ is {beta:g}. Train again with λ = {STRONG_BETA:g}."
        if is_strong
        else "Train again with half the learning rate."
    )
    return Finding(
        "sinking",
        "Both log-probs sink",
        "warning",
        f"Chosen fell {chosen}, rejected {rejected}: the model makes good answers less likely too.",
        f"Both log-probs end at least {SINK:g} below their start.",
        f"{AUTHORS}, Figs 7 and 9 of the paper; the number is {OURS}",
        advice,
        value or {"training.learning_rate": _rate(curves, 0.5)},
    )


def not_learning(curves: Curves) -> Finding | None:
    """Neither the loss falls nor the log odds rise."""
    if len(curves.train) < LEAST_STEPS:
        return None
    loss, odds = curves.change("loss"), curves.change("log_odds_chosen")
    if not loss or not odds:
        return None
    falls = -loss.difference >= max(FLAT_LOSS * abs(loss.first), loss.error)
    rises = odds.difference >= max(FLAT_ODDS, odds.error)
    if falls or rises:
        return None
    return Finding(
        "not-learning",
        "Not learning",
        "serious",
        f"The loss went {loss}, the log odds {odds}.",
        f"The loss falls by less than {FLAT_LOSS:.0%} and the log odds rise by less than "
        f"{FLAT_ODDS:g}.",
        OURS,
        "Train again with five times the learning rate. If that changes nothing, look at the pairs "
        "with `orpo-lite data`.",
        {"training.learning_rate": _rate(curves, 5)},
    )


def data_gives_itself_away(curves: Curves) -> Finding | None:
    """Pairs that can be sorted without understanding them."""
    reasons = []
    first, pairs, where = _accuracy_before(curves)
    if first is not None and first >= HIGH_START and _lower_bound(first, pairs) > LENGTH_MATTERS:
        reasons.append(
            f"The base prefers {first:.0%} of the chosen answers before the first step "
            f"({pairs:,} {where} pairs)."
        )
    rule, last = curves.length_rule, _last_accuracy(curves)
    is_trained = len(curves.train) >= LEAST_STEPS
    if is_trained and rule is not None and last is not None and rule >= max(LENGTH_MATTERS, last):
        reasons.append(
            f"A rule that only looks at length is right on {rule:.0%} of the pairs, the trained "
            f"model on {last:.0%}."
        )
    if not reasons:
        return None
    return Finding(
        "data",
        "The data gives itself away",
        "warning",
        " ".join(reasons),
        f"An accuracy of at least {HIGH_START:.0%} before the first step; or a length rule of at "
        f"least {LENGTH_MATTERS:.0%} that does as well as the trained model.",
        f"{AUTHORS}; the numbers are {OURS}",
        "Look at the pairs with `orpo-lite data`: chosen and rejected answers may differ in "
        "length, style or source. Use pairs of one source and of similar length.",
        {},
    )


def too_few_steps(curves: Curves) -> Finding | None:
    """Too short to be judged."""
    steps = len(curves.train)
    if steps >= LEAST_STEPS:
        return None
    return Finding(
        "too-few-steps",
        "Too few steps to tell",
        "unknown",
        f"The run has {steps} step{'' if steps == 1 else 's'}.",
        f"Fewer than {LEAST_STEPS} steps.",
        OURS,
        "Train longer. Curves of so few steps are mostly noise.",
        {"training.max_steps": 100},
    )


RULES: tuple[Callable[[Curves], Finding | None], ...] = (
    diverging,
    over_fitting,
    not_learning,
    both_sink,
    data_gives_itself_away,
    too_few_steps,
)


def _healthy(curves: Curves) -> Finding:
    named = {"The loss": "loss", "The log odds of chosen to rejected": "log_odds_chosen"}
    changes = {label: curves.change(name) for label, name in named.items()}
    reason = " ".join(f"{label} went {change}." for label, change in changes.items() if change)
    return Finding(
        "healthy",
        "Healthy",
        "good",
        reason,
        "No other verdict is given.",
        "the rules in docs/report.md",
        "Nothing to do.",
        {},
    )


# --- figures that several rules use


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rate(curves: Curves, factor: float) -> float:
    """Return the learning rate times a factor, with two digits."""
    rate = curves.settings.get("training.learning_rate")
    rate = rate if isinstance(rate, int | float) and _is_finite(rate) and rate > 0 else 5e-5
    return float(f"{rate * factor:.2g}")


def _shorter(curves: Curves, best: object) -> dict[str, Any]:
    """Return the setting that ends a training at its best evaluation, else at half its length."""
    last = curves.train[-1].get("step") if curves.train else None
    steps = best if isinstance(best, int) and best > 0 else (last or 2) // 2
    values: dict[str, Any] = {"training.max_steps": max(1, steps)}
    if curves.settings.get("training.load_best_model_at_end") is False:
        values["training.load_best_model_at_end"] = True
    return values


def _accuracy_before(curves: Curves) -> tuple[float | None, int, str]:
    """Return the accuracy before the first step, of how many pairs, and which ones."""
    name = "rewards/accuracies"
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
    """Return the trained model's accuracy: of its best evaluation, else of its last steps."""
    losses = [row for row in curves.held_out if _is_finite(row.get("loss")) and row.get("step")]
    if losses:
        value = min(losses, key=lambda row: float(row["loss"])).get("rewards/accuracies")
        return float(value) if isinstance(value, int | float) else None
    windows = curves.windows("rewards/accuracies")
    return windows.means[-1] if windows else None


def _length_rule(data: Mapping[str, Any]) -> float | None:
    """Return the accuracy of the better length rule, with half of the pairs of equal length."""
    longer, shorter = data.get("chosen_longer"), data.get("rejected_longer")
    if not isinstance(longer, int | float) or not isinstance(shorter, int | float):
        return None
    return float(max(longer, shorter) + (1 - longer - shorter) / 2)


def _lower_bound(share: float, count: int) -> float:
    """Return the lower end of the 95% interval of a share, by Wilson's formula."""
    z = 1.96
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count)
