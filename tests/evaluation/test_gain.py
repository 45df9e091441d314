"""How much of the gain is kept: the share, its interval, and when it cannot be told."""

import numpy as np
import pytest

from orpo_lite.evaluation.gain import kept_gain

PROMPTS = [number // 2 for number in range(40)]


def gains(mean: float) -> np.ndarray:
    return mean + np.random.default_rng(0).normal(size=40)


@pytest.mark.parametrize(("share", "is_enough"), [(1.0, True), (0.91, True), (0.89, False), (0.0, False)])  # fmt: skip
def test_a_share_of_the_gain(share: float, is_enough: bool) -> None:
    kept = kept_gain("q4_k_m", share * gains(2.0), gains(2.0), PROMPTS)
    assert (kept.share.value, kept.share.low, kept.share.high) == pytest.approx((share,) * 3)
    assert (kept.is_known, kept.is_enough) == (True, is_enough)
    assert f" keeps {share:.1%} (" in kept.sentence("it")


def test_no_share_of_a_gain_that_may_be_0() -> None:
    kept = kept_gain("q4_k_m", gains(0.02) / 2, gains(0.02), PROMPTS)
    assert (kept.is_known, kept.is_enough) == (False, True)
    assert kept.sentence("it").startswith("cannot tell")


def test_a_share_that_varies_has_a_wide_interval() -> None:
    """Noise of the size of the gain, the same for the pairs of a prompt."""
    noise = np.repeat(np.random.default_rng(1).normal(size=20), 2)
    kept = kept_gain("q3_k_m", gains(2.0) + noise, gains(2.0), PROMPTS)
    low, value, high = (end or 0.0 for end in (kept.share.low, kept.share.value, kept.share.high))
    assert low < value < high
    assert high - low == pytest.approx(2 * 2.1 * noise.std() / 20**0.5 / 2.0, rel=0.3)
