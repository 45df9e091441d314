"""The loss against mpmath, the paper's closed form and a float64 reference written out term by term."""

import math

import mpmath
import pytest
import torch
from torch import Tensor

from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import Orpo, log1mexp, log_odds, orpo_loss
from orpo_lite.ops.head import padded_logps
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.loss import LossSection

EXACT = [-50.0, -30.0, -8.0, -2.5, -0.7, -0.69, -0.1, -1e-2, -1e-3]
EXTREME = [-1e4, -745.0, -50.0, -1e-3, -1e-7, -1e-12, -1e-300, 0.0]


def logps(
    chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64
) -> PairScores:
    """Pairs with the given mean log-probabilities and an NLL of nothing."""
    sides = [torch.tensor(values, dtype=dtype, requires_grad=True) for values in (chosen, rejected)]
    zeros = torch.zeros(len(chosen), dtype=dtype)
    return PairScores(sides[0], sides[1], zeros, zeros + 1)


def odds_ratio_loss(pairs: PairScores) -> Tensor:
    loss, _ = orpo_loss(pairs, Divisors(1, 1), beta=1.0)
    return loss


@pytest.mark.parametrize("value", EXACT)
def test_log1mexp_equals_fifty_digits(value: float) -> None:
    with mpmath.workdps(50):
        exact = float(mpmath.log(1 - mpmath.exp(mpmath.mpf(value))))
    assert log1mexp(torch.tensor(value, dtype=torch.float64)).item() == pytest.approx(
        exact, rel=1e-14
    )
    assert log1mexp(torch.tensor(value)).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("chosen", EXACT)
@pytest.mark.parametrize("rejected", EXACT)
def test_gradient_equals_closed_form(chosen: float, rejected: float) -> None:
    """dL_OR/dlogP_w = -P_l / D and dL_OR/dlogP_l = P_l (1 - P_w) / ((1 - P_l) D), D = P_w + P_l - 2 P_w P_l."""
    pairs = logps([chosen], [rejected])
    odds_ratio_loss(pairs).backward()
    with mpmath.workdps(60):
        p_w, p_l = mpmath.exp(mpmath.mpf(chosen)), mpmath.exp(mpmath.mpf(rejected))
        d = p_w + p_l - 2 * p_w * p_l
        by_chosen, by_rejected = float(-p_l / d), float(p_l * (1 - p_w) / ((1 - p_l) * d))
        loss = float(mpmath.log1p(p_l * (1 - p_w) / (p_w * (1 - p_l))))
    assert pairs.chosen_P.grad is not None
    assert pairs.rejected_P.grad is not None
    assert odds_ratio_loss(pairs).item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert pairs.chosen_P.grad.item() == pytest.approx(by_chosen, rel=1e-12, abs=1e-12)
    assert pairs.rejected_P.grad.item() == pytest.approx(by_rejected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", EXTREME)
@pytest.mark.parametrize("rejected", EXTREME)
def test_finite_up_to_certainty(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    """At logp = 0 the odds are infinite; peers' gradients are NaN there."""
    pairs = logps([chosen], [rejected], dtype)
    loss = odds_ratio_loss(pairs)
    loss.backward()
    bound = 2 / torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for value in (loss, pairs.chosen_P.grad, pairs.rejected_P.grad):
        assert value is not None
        assert math.isfinite(value.item())
        assert abs(value.item()) <= bound


def test_the_odds_are_computed_in_float32_at_least() -> None:
    assert (
        log_odds(torch.tensor([-0.5], dtype=torch.bfloat16), torch.tensor([-1.5])).dtype
        == torch.float32
    )
    assert (
        log_odds(torch.tensor([-0.5]).double(), torch.tensor([-1.5]).double()).dtype
        == torch.float64
    )


def reference(
    logits: Tensor, ids: Tensor, starts: list[int], lengths: list[int], only: bool, mean: str
) -> Tensor:
    """Eq. 1 to 7 with loops over pairs and tokens, and the textbook's forms of odds and sigmoid."""
    pairs = len(ids) // 2

    def token_logp(row: int, position: int) -> Tensor:
        return torch.log(torch.softmax(logits[row, position - 1], -1)[ids[row, position]])

    def mean_logp(row: int) -> Tensor:
        return torch.stack(
            [token_logp(row, t) for t in range(max(starts[row], 1), lengths[row])]
        ).mean()

    nll, ratio, counted = [], [], 0
    for row in range(pairs):
        first = max(starts[row], 1) if only else 1
        terms = torch.stack([-token_logp(row, t) for t in range(first, lengths[row])])
        counted += len(terms)
        nll.append(terms.mean() if mean == "pair" else terms.sum())
        p_w, p_l = mean_logp(row).exp(), mean_logp(row + pairs).exp()
        odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        ratio.append(-torch.log(1 / (1 + 1 / odds_ratio)))
    divisor = pairs if mean == "pair" else counted
    return torch.stack(nll).sum() / divisor + 0.3 * torch.stack(ratio).mean()


@pytest.mark.parametrize("only", [False, True], ids=["prompt counted", "completion only"])
@pytest.mark.parametrize("mean", ["token", "pair"])
def test_loss_and_gradient_equal_the_written_out_reference(only: bool, mean: str) -> None:
    torch.manual_seed(0)
    starts, lengths = (
        [3, 0, 5, 3, 1, 6],
        [9, 4, 6, 12, 2, 7],
    )  # an empty prompt and a one-token response among them
    logits = torch.randn(6, 12, 17, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(17, (6, 12))
    position = torch.arange(12)
    token = position < torch.tensor(lengths).unsqueeze(1)
    response = token & (position >= torch.tensor(starts).unsqueeze(1))
    pairs = padded_logps(logits, ids, response, response if only else token)
    divisors = Divisors(3, int(pairs.nll_tokens_P.sum()))
    loss, parts = orpo_loss(pairs, divisors, beta=0.3, nll_reduction=mean)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = reference(logits, ids, starts, lengths, only, mean)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert (gradient - expected_gradient).abs().max() < 1e-12
    assert Orpo(LossSection(beta=0.3)).metrics(parts.tolist())["loss"] == pytest.approx(
        expected.item(), abs=1e-12
    )


def test_gradcheck() -> None:
    chosen = torch.tensor([-0.2, -1.7, -9.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.4, -0.01, -3.0], dtype=torch.float64, requires_grad=True)
    nll = torch.tensor([3.0, 7.0, 1.0], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([4.0, 9.0, 2.0], dtype=torch.float64)

    def loss(chosen: Tensor, rejected: Tensor, nll: Tensor) -> Tensor:
        return orpo_loss(PairScores(chosen, rejected, nll, tokens), Divisors(3, 15), beta=0.5)[0]

    assert torch.autograd.gradcheck(loss, (chosen, rejected, nll))


def test_metrics_are_those_of_trl() -> None:
    named = Orpo(LossSection(beta=0.1)).metrics([1.0, -0.5, 2.0, -1.0, -3.0, 0.75])
    assert len(Orpo.parts) == 6
    assert named["loss"] == pytest.approx(1.05)
    assert named["rewards/chosen"] == pytest.approx(-0.1)
    assert named["rewards/margins"] == pytest.approx(0.2)
    assert named["rewards/accuracies"] == 0.75


def test_beta_zero_is_supervised_fine_tuning() -> None:
    pairs = PairScores(*(torch.tensor([value]).double() for value in (-1.0, -0.2, 12.0, 4.0)))
    assert orpo_loss(pairs, Divisors(1, 4), beta=0.0)[0].item() == 3.0
