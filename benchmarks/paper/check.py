"""Decide whether a claim holds, from a value, its interval and the value of each training."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from orpo_lite.evaluation.intervals import Interval, Numbers, mean_over_pairs

Verdict = Literal["holds", "does not hold", "cannot tell"]


@dataclass(frozen=True)
class Check:
    """A statement about a measured value: the value lies between two bounds.

    The interval shows the error of the sample of pairs. The values of the single trainings show the
    error of the training, such as its order of pairs. A verdict needs both.
    """

    statement: str
    pairs: str
    """The pairs or samples on which the value was measured."""
    value: float
    low: float | None = None
    """Lower end of the 95% interval; None if there is no interval."""
    high: float | None = None
    each: list[float] = field(default_factory=list)
    """The value of each training; empty if nothing was trained."""
    minimum: float | None = None
    """The statement is true if the value is larger than this; None: no lower bound."""
    maximum: float | None = None
    """The statement is true if the value is smaller than this; None: no upper bound. If both bounds
    are equal, the statement is true if the value is equal to them."""
    claim: str = ""
    """The part of the paper's claim that the statement belongs to. The statements of a part have
    one verdict together. "": they have one for each kind of pairs."""
    is_claim: bool = True
    """False: reported next to the claim, and not part of its verdict."""
    is_trusted: bool = True
    """False: what measured the value is not clearly better than chance, so there is no verdict."""

    @property
    def part(self) -> str:
        """Return the name of the statements with which this one has a verdict together."""
        return self.claim or self.pairs

    @property
    def verdict(self) -> Verdict:
        """Return whether the statement is true.

        ``holds``: the interval and the value of each training lie within the bounds. ``does not
        hold``: the interval and the value of each training lie outside, on the same side. Else,
        and for a value that is not trusted, ``cannot tell``.
        """
        ends = [self.value if end is None else end for end in (self.low, self.high)]
        known = np.array([*ends, self.value, *self.each])
        if not (self.is_trusted and np.isfinite(known).all()):
            return "cannot tell"
        minimum = -np.inf if self.minimum is None else self.minimum
        maximum = np.inf if self.maximum is None else self.maximum
        is_above, is_below = known > minimum, known < maximum
        if minimum == maximum:
            is_above, is_below = known >= minimum, known <= maximum
        if (is_above & is_below).all():
            return "holds"
        is_outside = not is_above.any() or not is_below.any()
        return "does not hold" if is_outside else "cannot tell"

    def to_json(self) -> dict[str, Any]:
        """Return the fields, rounded to six digits, and the verdict."""
        fields = asdict(self)
        for name in ("value", "low", "high"):
            fields[name] = _rounded(fields[name])
        return fields | {"each": [_rounded(value) for value in self.each], "verdict": self.verdict}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def together(checks: Sequence[Check]) -> Verdict:
    """Return the verdict of a claim that consists of several statements.

    ``holds``: all of them hold. ``does not hold``: at least one does not hold.
    """
    found = {check.verdict for check in checks if check.is_claim}
    if not found or found == {"holds"}:
        return "holds" if found else "cannot tell"
    return "does not hold" if "does not hold" in found else "cannot tell"


def over_pairs(
    statement: str,
    pairs: str,
    trainings: Sequence[tuple[Numbers, Sequence[Hashable]]],
    **bounds: Any,
) -> Check:
    """Return a check of a mean over the pairs of several trainings.

    The interval is a bootstrap over prompts. A prompt of several trainings counts as one prompt.

    Args:
        statement: what is true if the mean lies within the bounds.
        pairs: the name of the pairs.
        trainings: for each training, a value and a prompt for each of its pairs.
        bounds: ``minimum``, ``maximum`` and ``is_claim`` of the check.
    """
    values_P = np.concatenate([values for values, _ in trainings])
    prompts_P = [prompt for _, prompts in trainings for prompt in prompts]
    (mean,) = mean_over_pairs(values_P[None], np.ones_like(values_P)[None], prompts_P)
    found: Interval = mean.interval()
    each = [float(values.mean()) for values, _ in trainings]
    value = float("nan") if found.value is None else found.value
    return Check(statement, pairs, value, found.low, found.high, each, **bounds)
