"""Each objective against its formula written out, in float64, in every form of the step."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ragged_pairs, tiny_llama
from test_memory import MEMORY_SETTINGS, build
from test_step import gradients, lora_model, recipe

from orpo_lite.data.packing import PairFacts
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.held_out import score
from orpo_lite.model.pair_model import PairModel
from orpo_lite.objectives.objective import Divisors, find_objective
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.loss import LossSection
from orpo_lite.recipe.schema import Recipe
from orpo_lite.updates import run_to_end, staged

LOSSES: dict[str, dict[str, Any]] = {
    "sft": {"type": "sft"},
    "sft by pair": {"type": "sft", "nll_reduction": "pair", "completion_only_loss": "false"},
    "dpo": {"type": "dpo", "beta": 0.3},
    "dpo smoothed": {"type": "dpo", "label_smoothing": 0.1, "rpo_alpha": 0.5},
    "dpo ipo": {"type": "dpo", "dpo_loss_type": "ipo"},
    "dpo hinge": {"type": "dpo", "dpo_loss_type": "hinge"},
    "cpo": {"type": "cpo", "label_smoothing": 0.1},
    "simpo": {"type": "simpo", "beta": 2, "simpo_gamma": 0.7},
    "simpo with nll": {"type": "simpo", "beta": 2, "cpo_alpha": 0.3},
    "probability_ratio": {"type": "probability_ratio", "beta": 0.5},
    "probability_ratio sum": {"type": "probability_ratio", "ratio_of": "sum"},
    "reward": {"type": "reward"},
    "reward centred": {"type": "reward", "center_rewards_coefficient": 0.01},
}
FORMS: dict[str, dict[str, Any]] = {
    "padded": {"memory__packing": "false", "memory__micro_batch_size": 8},
    "packed": {"memory__prompt_sharing": "false", "memory__micro_batch_tokens": 90},
    **{f"shared, {n} a pass": {"memory__micro_batch_size": n} for n in (1, 2, 4, 8)},
    "in chunks": {"memory__head_chunk": 16, "memory__micro_batch_tokens": 150},
}


def pairs_for(loss: LossSection, count: int = 8) -> list[TokenizedPair]:
    """Pairs as a training gives them to the objective: with a reference, or without rejected."""
    rng, needs = random.Random(4), find_objective(loss).needs
    pairs = ragged_pairs(count)
    if "reference" in needs:
        pairs = [replace(p, ref_chosen=-rng.random(), ref_rejected=-rng.random()) for p in pairs]
    if "rejected" not in needs:
        pairs = [replace(pair, rejected_ids=[], rejected_start=0) for pair in pairs]
    return pairs


def written_out(
    model: PairModel, pairs: Sequence[TokenizedPair], loss: LossSection
) -> torch.Tensor:
    """The loss of a step, from the definitions in the papers and in TRL, one sequence at a time."""

    def token_logps(ids: Any) -> torch.Tensor:
        row = torch.tensor([list(ids)])
        logits = model.model(input_ids=row, use_cache=False).logits
        return logits[:, :-1].log_softmax(-1).gather(-1, row[:, 1:, None])[0, :, 0]

    def reward(ids: Any) -> torch.Tensor:
        row = torch.tensor([list(ids)])
        hidden = model.backbone(input_ids=row, use_cache=False).last_hidden_state[0, -1]
        return hidden @ model.score_head.weight[0]

    if loss.type == "reward":
        both = [(reward(pair.chosen_ids), reward(pair.rejected_ids)) for pair in pairs]
        weight = loss.center_rewards_coefficient or 0.0
        losses = [-torch.log(torch.sigmoid(w - r)) + weight * (w + r) ** 2 for w, r in both]
        return torch.stack(losses).mean()
    nll, compared = [], []
    for pair in pairs:
        chosen = token_logps(pair.chosen_ids)
        response = chosen[pair.chosen_start - 1 :]
        prompt_counts = loss.completion_only_loss is False or (
            loss.completion_only_loss is None and loss.type == "probability_ratio"
        )
        nll.append(-(chosen if prompt_counts else response))
        if loss.type == "sft":
            continue
        other = token_logps(pair.rejected_ids)[pair.rejected_start - 1 :]
        n, m = len(response), len(other)
        s, beta = loss.label_smoothing, loss.beta
        if loss.type == "dpo":
            win, lose = response.sum() - n * pair.ref_chosen, other.sum() - m * pair.ref_rejected
            if loss.dpo_loss_type == "ipo":
                compared.append((win / n - lose / m - 1 / (2 * beta)) ** 2)
                continue
            if loss.dpo_loss_type == "hinge":
                compared.append((1 - beta * (win - lose)).clamp(min=0))
                continue
            logit = beta * (win - lose)
        elif loss.type == "cpo":
            logit = beta * (response.sum() - other.sum())
        elif loss.type == "simpo":
            logit = beta * (response.mean() - other.mean()) - loss.simpo_gamma
        else:
            ratio = response.mean() - other.mean()
            ratio = response.sum() - other.sum() if loss.ratio_of == "sum" else ratio
            compared.append(-beta * torch.log(torch.sigmoid(ratio)))
            continue
        up, down = torch.sigmoid(logit), torch.sigmoid(-logit)
        compared.append(-(1 - s) * torch.log(up) - s * torch.log(down))
    by_pair = loss.nll_reduction == "pair"
    mean = torch.stack([x.mean() for x in nll]).mean() if by_pair else torch.cat(nll).mean()
    weight = {
        "sft": 1.0,
        "dpo": loss.rpo_alpha or 0.0,
        "cpo": 1.0 if loss.cpo_alpha is None else loss.cpo_alpha,
        "simpo": loss.cpo_alpha or 0.0,
        "probability_ratio": 1.0,
    }[loss.type]
    return weight * mean + (torch.stack(compared).mean() if compared else 0.0)


def settings_of(loss: dict[str, Any], **values: Any) -> Recipe:
    return recipe(**{f"loss__{key}": value for key, value in loss.items()}, **values)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_objective_is_its_formula_in_every_form_of_the_step(loss: str) -> None:
    settings = settings_of(LOSSES[loss])
    task = "SEQ_CLS" if settings.loss.type == "reward" else "CAUSAL_LM"
    model = build(task=task)
    pairs, objective = pairs_for(settings.loss), find_objective(settings.loss)
    value = written_out(model, pairs, settings.loss)
    parameters = [parameter for _, parameter in model.trained()]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
    assert expected.norm() > 1e-3
    others = (
        MEMORY_SETTINGS if loss in ("sft", "dpo", "reward") else {"all": MEMORY_SETTINGS["all"]}
    )
    forms = FORMS | {
        name: {f"memory__{key}": str(value).lower() for key, value in memory.items()}
        for name, memory in others.items()
    }
    for form, memory in forms.items():
        settings = settings_of(LOSSES[loss], **memory)
        values = {key.removeprefix("memory__"): value for key, value in memory.items()}
        model = build(task=task, **values)
        found, parts = gradients(model, pairs, settings)
        assert (found - expected).norm() / expected.norm() < 1e-12, form
        metrics = objective.metrics(parts)
        assert metrics["loss"] == pytest.approx(value.item(), rel=1e-12), form


@pytest.mark.parametrize("type_", ["dpo", "cpo", "simpo", "probability_ratio"])
def test_metrics_are_those_of_trl(type_: str) -> None:
    """Rewards and accuracy from the log-probabilities, as TRL's trainers compute them."""
    loss = LossSection(type=type_, beta=0.5)  # type: ignore[arg-type]
    mean = torch.tensor([[-1.0, -2.0], [-3.0, -1.5]]).double()
    facts = PairFacts(*torch.tensor([[4.0, 2.0], [3.0, 5.0], [-1.5, -1.0], [-2.0, -2.5]]).double())
    logps = PairScores(mean[0], mean[1], torch.tensor([9.0, 5.0]).double(), torch.tensor([7, 3]))
    objective = find_objective(loss)
    metrics = objective.metrics(objective.loss(logps, facts, Divisors(2, 10))[1].tolist())
    sums = mean * torch.stack(facts[:2])
    scores = {
        "dpo": sums - torch.stack(facts[2:]) * torch.stack(facts[:2]),
        "cpo": sums,
        "simpo": mean,
        "probability_ratio": mean,
    }[type_]
    rewards = 0.5 * scores
    assert metrics["rewards/chosen"] == pytest.approx(rewards[0].mean().item())
    assert metrics["rewards/margins"] == pytest.approx((rewards[0] - rewards[1]).mean().item())
    assert metrics["rewards/accuracies"] == pytest.approx(
        (rewards[0] > rewards[1]).double().mean().item()
    )
    shown = mean if type_ in ("simpo", "probability_ratio") else sums
    assert metrics["logps/rejected"] == pytest.approx(shown[1].mean().item())
    assert metrics["mean_logps/chosen"] == pytest.approx(-1.5)
    assert metrics["nll_loss"] == pytest.approx(1.4)


def test_dpo_of_an_untrained_adapter_is_log_2() -> None:
    """The policy is the reference before the first step, so every log-ratio is 0."""
    loss = LossSection(type="dpo")
    model = lora_model(tiny_llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    pairs = ragged_pairs(6)

    settings = settings_of({"type": "dpo"})
    scores = run_to_end(staged("", score(model, pairs, settings)), lambda _: None)
    known = [
        replace(pair, ref_chosen=float(one), ref_rejected=float(other))
        for pair, one, other in zip(pairs, scores.chosen_P, scores.rejected_P, strict=True)
    ]
    _, parts = gradients(model, known, settings)
    metrics = find_objective(loss).metrics(parts)
    assert metrics["loss"] == pytest.approx(0.6931471805599453, abs=1e-12)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-12)
