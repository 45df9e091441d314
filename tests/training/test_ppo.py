"""PPO: its formulas, exact ratios and KL at the start, rising rewards, equal bits when resumed."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, Answer, byte_tokenizer, write_base
from test_resume import go_on, same_bits, stop_at
from test_reward import letters

import orpo_lite
from orpo_lite.api import train
from orpo_lite.errors import ModelError, RecipeError
from orpo_lite.objectives.ppo import (
    adapted_kl_coef,
    advantages,
    policy_loss,
    token_rewards,
    value_loss,
    whitened,
)
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.records import read_metrics
from orpo_lite.training.ppo import Rollout, _roll_out
from orpo_lite.training.result import TrainResult
from orpo_lite.training.session import Session

Build = Callable[..., Recipe]


def test_advantages_are_those_of_a_written_out_loop() -> None:
    generator, lengths = torch.Generator().manual_seed(0), [3, 1, 7]
    kl, values = (torch.randn(11, generator=generator).double() for _ in range(2))
    scores = torch.randn(3, generator=generator).double()
    rewards = token_rewards(scores, kl, lengths, 0.2)
    found = advantages(rewards, values, lengths, 0.99, 0.95)
    expected, start = [], 0
    for length, score in zip(lengths, scores.tolist(), strict=True):
        r = [-0.2 * value for value in kl[start : start + length].tolist()]
        r[-1] += score
        v = [*values[start : start + length].tolist(), 0.0]
        deltas = [r[t] + 0.99 * v[t + 1] - v[t] for t in range(length)]
        expected += [
            sum((0.99 * 0.95) ** (k - t) * deltas[k] for k in range(t, length))
            for t in range(length)
        ]
        start += length
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_ratio_and_value_are_clipped_and_the_weight_of_kl_adapts() -> None:
    old = torch.zeros(4).double()
    new = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5]).double())
    gains = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    loss, ratio = policy_loss(new, old, gains, 0.2)
    assert ratio.tolist() == pytest.approx([1.5, 0.5, 1.5, 0.5])
    assert loss.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    new = old.clone().requires_grad_()
    (slope,) = torch.autograd.grad(policy_loss(new, old, gains, 0.2)[0].sum(), new)
    assert slope.tolist() == pytest.approx((-gains).tolist())  # raises what has an advantage
    values = torch.tensor([1.0, 0.1]).double()
    lost = value_loss(values, torch.zeros(2).double(), torch.ones(2).double(), 0.2)
    assert lost.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])
    white = whitened(torch.tensor([1.0, 2.0, 6.0]).double())
    assert [white.mean().item(), white.var(unbiased=False).item()] == pytest.approx(
        [0, 1], abs=1e-6
    )
    assert adapted_kl_coef(0.1, 60.0, 6.0, 64, 2000) == pytest.approx(0.1 * (1 + 0.2 * 0.032))
    assert adapted_kl_coef(0.1, 0.0, 6.0, 64, 2000) == pytest.approx(0.1 * (1 - 0.2 * 0.032))
    assert adapted_kl_coef(0.1, 60.0, None, 64, 2000) == 0.1


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A reward model of the rule that a good reply has many a's; read only."""
    folder = tmp_path_factory.mktemp("rule")
    write_base(folder / "base")
    rng, rows = random.Random(0), []
    for _ in range(128):
        few, many = letters(rng, 6).replace("a", "b"), letters(rng, 3) + "aaa"
        rows.append({"prompt": letters(rng, 4), "chosen": many, "rejected": few})
    (folder / "rule.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    settings = (
        f"model.model_name_or_path={folder / 'base'}", f"data.dataset_name={folder / 'rule.jsonl'}",
        f"training.output_dir={folder / 'reward'}", "loss.type=reward", "output.samples=0",
        "training.learning_rate=1e-2", "training.max_steps=16", "lora.r=8",
        "data.test_split_size=0",
    )  # fmt: skip
    return train(load_recipe(str(folder / "small.yaml"), settings))


def ppo(small_recipe: Build, reward: TrainResult, *more: str) -> Recipe:
    return small_recipe(
        "loss.type=ppo", f"loss.reward_adapter_name_or_path={reward.run / 'adapter'}",
        f"model.model_name_or_path={reward.run.parent / 'base'}",
        f"data.dataset_name={reward.run.parent / 'rule.jsonl'}",
        "loss.response_length=8", "data.max_prompt_length=64",
        "training.learning_rate=3e-3", "training.global_batch_size=16", "lora.r=8",
        "loss.kl_coef=0.02", "output.samples=0", *more,
    )  # fmt: skip


def test_ppo_starts_exactly_and_resumes_with_the_same_bits(
    small_recipe: Build, reward: TrainResult
) -> None:
    # Ratio and KL are those of the distribution that is sampled, so they hold at any temperature.
    more = (
        "loss.temperature=2.5", "loss.num_ppo_epochs=2", "data.max_samples=24",
        "training.max_steps=2", "training.global_batch_size=8", "training.warmup_steps=0",
    )  # fmt: skip
    run = train(ppo(small_recipe, reward, *more, "training.output_dir=ppo")).run
    rows = [row for row in read_metrics(run) if "loss" in row]
    assert all(row["val/ratio_first"] == 1 for row in rows)
    assert rows[0]["objective/kl"] == 0
    assert rows[-1]["objective/kl"] > 0
    assert rows[-1]["objective/kl_coef"] != 0.02
    killed = stop_at(1, ppo(small_recipe, reward, *more, "training.output_dir=b"))
    assert same_bits(go_on(killed)[1].run, run)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_reward_of_64_answers_rises(
    small_recipe: Build, reward: TrainResult, seed: int
) -> None:
    """After 60 steps the mean reward is at least 2 standard errors above the start."""
    more = ("training.max_steps=60", "training.eval_steps=60", "data.test_split_size=64")
    settings = ppo(small_recipe, reward, *more, f"training.seed={seed}")
    first, last = (row for row in read_metrics(train(settings).run) if "eval_loss" in row)
    error = (
        first["eval_objective/scores_std"] ** 2 + last["eval_objective/scores_std"] ** 2
    ) ** 0.5
    rise = last["eval_objective/scores"] - first["eval_objective/scores"]
    assert rise > 2 * error / 8


@pytest.mark.long
def test_ppo_after_sft_has_the_start_as_its_reference(
    small_recipe: Build,
    reward: TrainResult,
    trained: tuple[list[Any], TrainResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, now in (("ppo", 0.0), ("step", 2.0)):  # a step takes 2 seconds
        clock = SimpleNamespace(monotonic=lambda now=now: now)
        monkeypatch.setattr(f"orpo_lite.training.{module}.time", clock)
    start = f"model.adapter_name_or_path={trained[1].run / 'adapter'}"
    more = (
        start, "lora.r=16", "training.max_steps=1", "data.max_samples=24",
        "training.global_batch_size=8", "training.output_dir=after",
    )  # fmt: skip
    rows = read_metrics(train(ppo(small_recipe, reward, *more)).run)
    assert rows[0]["eval_objective/kl"] == 0
    (step,) = (row for row in rows if "num_tokens" in row)
    assert step["tokens_per_second"] == step["num_tokens"] / 2
    seen: list[tuple[Rollout, list[float]]] = []
    monkeypatch.setattr("orpo_lite.training.ppo._roll_out", partial(observed, seen))
    to_base = (
        *more[:-1], "training.output_dir=to-base", "loss.reference_adapter_name_or_path=base",
        "loss.temperature=1.5",
    )  # fmt: skip
    rows = read_metrics(train(ppo(small_recipe, reward, *to_base)).run)
    assert rows[0]["eval_objective/kl"] != 0
    rollout, expected = seen[1]  # of the first step; the first one is of the evaluation before it
    assert rollout.logps_N.tolist() == pytest.approx(expected, abs=1e-4)
    rewards_are_those_of_score(reward, rollout)


def observed(
    seen: list[tuple[Rollout, list[float]]], session: Session, *more: Any, **named: Any
) -> Rollout:
    """Sample answers, and add the log-probabilities of their tokens by transformers' logits."""
    rollout = _roll_out(session, *more, **named)
    logps: list[float] = []
    for index in (index for chunk in rollout.chunks for index in chunk):
        answer = rollout.answers[index]
        ids = torch.tensor([answer.chosen_ids])
        with torch.no_grad():
            logits = session.pair_model.causal(input_ids=ids).logits[0].float()
        logs = (logits / session.recipe.loss.temperature).log_softmax(-1)[:-1]
        found = logs.gather(1, ids[0, 1:, None])[answer.chosen_start - 1 :, 0]
        logps += found.tolist()
    seen.append((rollout, logps))
    return rollout


def rewards_are_those_of_score(reward: TrainResult, rollout: Rollout) -> None:
    """Compare the scores of a step with what `orpo-lite score` gives to the same texts."""
    tokenizer = byte_tokenizer()
    data = (reward.run.parent / "rule.jsonl").read_text().splitlines()
    pairs = zip(rollout.answers, rollout.scores_R.tolist(), strict=True)
    rows, expected, cut = [], [], 0
    for answer, score in pairs:
        ids = answer.chosen_ids[answer.chosen_start :]
        text = tokenizer.decode([token for token in ids if token != tokenizer.eos_token_id])
        if not text.strip() or set(ids) & {0, 1}:  # score refuses an empty reply
            continue
        cut += ids[-1] != tokenizer.eos_token_id
        prompt = json.loads(data[int(answer.where.rpartition(":")[2]) - 1])["prompt"]
        rows.append({"prompt": prompt, "output": text})
        expected.append(score)
    assert cut > 0
    Path("sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    orpo_lite.score(reward.run, "sampled.jsonl", to="rewards.jsonl")
    found = [json.loads(line)["reward"] for line in Path("rewards.jsonl").read_text().splitlines()]
    assert found == pytest.approx(expected, abs=1e-4)


def test_ppo_needs_the_adapter_of_a_reward_model(
    small_recipe: Build, trained: tuple[list[Any], TrainResult], call: Callable[..., Answer]
) -> None:
    with pytest.raises(RecipeError, match="reward_adapter_name_or_path"):
        small_recipe("loss.type=ppo")
    adapter = trained[1].run / "adapter"
    more = (f"loss.reward_adapter_name_or_path={adapter}", "loss.response_length=8")
    with pytest.raises(ModelError, match="not the adapter of a reward model"):
        train(small_recipe("loss.type=ppo", *more, "training.output_dir=x"))
    assert not Path("x").exists()
