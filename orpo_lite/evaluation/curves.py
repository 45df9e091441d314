"""The curves of a training, in the form in which the health verdicts read them."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]

OURS = "a threshold of orpo-lite"

RAISED = {
    "log_odds_chosen": "log odds of chosen to rejected",
    "rewards/margins": "reward margin of chosen to rejected",
    "objective/scores": "reward of sampled answers",
}
"""Metric that a training should raise -> its name in sentences."""
LEAST_STEPS = 20
"""With fewer steps the first and the last tenth hold fewer than two steps each. OURS."""
NOISE = 4.0
"""A difference of two means counts if it exceeds this many standard errors. By chance, about 1 in
16,000 differences is so large, and a run has some dozens of differences. OURS."""


@dataclass(frozen=True)
class Curves:
    """The metrics and settings of a run, in the form that the health rules read."""

    train: Sequence[Row]
    """The rows of training steps, in order."""
    held_out: Sequence[Row]
    """The rows of evaluations, in order, without the prefix ``eval_``."""
    settings: Mapping[str, Any]
    """``section.key`` -> value of the recipe."""
    data: Mapping[str, Any]
    """The content of data.json, or {}."""
    length_rule: float | None
    """Accuracy (0 to 1) of a rule that looks only at the length of replies. None if unknown."""

    @classmethod
    def of(
        cls, rows: Sequence[Row], settings: Mapping[str, Any], data: Mapping[str, Any] | None = None
    ) -> "Curves":
        """Create curves from the rows of metrics.jsonl, the settings, and data.json.

        ``logps/*`` of the rows are means over tokens.
        """
        held_out = [
            {key.removeprefix("eval_"): value for key, value in row.items()}
            for row in rows
            if "eval_loss" in row
        ]
        train = [row for row in rows if "loss" in row]
        return cls(train, held_out, settings, data or {}, _length_rule(data or {}))

    @property
    def objective(self) -> str:
        """The value of ``loss.type``."""
        return str(self.settings.get("loss.type", "orpo"))

    @property
    def comparison(self) -> tuple[str, str] | None:
        """(metric, its name) of the first metric of RAISED that the run has, or None."""
        known = {name for row in self.train for name in row}
        return next(((name, label) for name, label in RAISED.items() if name in known), None)

    def windows(self, name: str) -> "Windows | None":
        """Return the means of a training metric over windows of steps; None for too few steps."""
        values = [float(row[name]) for row in self.train if is_finite(row.get(name))]
        return Windows.of(values) if len(values) >= LEAST_STEPS else None

    def change(self, name: str) -> "Change | None":
        """Return how a metric changed from the start of the training to its end.

        If held-out pairs were evaluated before the first step, the change on held-out pairs is
        returned. Otherwise the change on training pairs is returned. If there are too few steps for
        this change, the result is None.
        """
        values = [float(row[name]) for row in self.held_out if is_finite(row.get(name))]
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
    """The smallest difference of two means that is not noise: NOISE standard errors."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Windows":
        """Divide a series into windows of equal length.

        A window has a tenth of the values, but at least 3 and at most 100. The last window ends
        with the series. Values at the start that do not fill a window are left out.
        """
        size = min(max(3, len(values) // 10), 100)
        ends = range(len(values), size - 1, -size)
        means = [statistics.fmean(values[end - size : end]) for end in ends][::-1]
        # Differences of neighbours measure the noise, because a trend changes them very little.
        steps = [abs(one - other) for one, other in itertools.pairwise(values)]
        deviation = 1.4826 * statistics.median(steps) / math.sqrt(2)
        return cls(means, NOISE * deviation * math.sqrt(2 / size))


@dataclass(frozen=True)
class Change:
    """A metric at the start and at the end of a run."""

    first: float
    last: float
    error: float
    """The smallest difference that is not noise. 0 if start and end are on the same pairs."""
    where: Literal["held-out", "training"]

    @property
    def difference(self) -> float:
        return self.last - self.first

    def __str__(self) -> str:
        return f"from {self.first:.3f} to {self.last:.3f} ({self.where} pairs)"


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _length_rule(data: Mapping[str, Any]) -> float | None:
    """Return the accuracy of "prefer the longer" or "prefer the shorter", whichever is higher.

    Half of the pairs with two replies of equal length count as right. None if data.json has no
    lengths.
    """
    longer, shorter = data.get("chosen_longer"), data.get("rejected_longer")
    if not isinstance(longer, int | float) or not isinstance(shorter, int | float):
        return None
    return float(max(longer, shorter) + (1 - longer - shorter) / 2)
