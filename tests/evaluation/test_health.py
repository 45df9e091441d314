"""Health verdicts: right on planted curves of each kind, silent on healthy runs, real ones too."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED

from orpo_lite.api import train
from orpo_lite.evaluation.curves import Curves
from orpo_lite.evaluation.health import RULES, Finding, find_health
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.runs.records import read_json, read_metrics

RUNS = 20
SETTINGS = {"loss.beta": 0.1, "training.learning_rate": 5e-5, "training.global_batch_size": 32}
DATA = {"held_out_pairs": 200, "chosen_longer": 0.5, "rejected_longer": 0.45}


def eased(start: float, end: float, share: float) -> float:
    """From ``start`` at 0 to ``end`` at 1: fast at first, as trainings go."""
    return start + (end - start) * (1 - math.exp(-4 * share)) / (1 - math.exp(-4))


def curves_of(kind: str, rng: random.Random) -> Curves:  # noqa: C901 - a few lines for each kind
    """A run of a kind: its curves, the noise of batches of 32 pairs, of 10 evaluations of 200."""
    steps, beta = rng.randrange(40, 400), rng.choice((0.05, 0.1, 0.25))
    nll = rng.uniform(0.9, 2.0)
    chosen = -rng.uniform(0.8, 1.8)
    margin, settings = rng.uniform(-0.05, 0.1), dict(SETTINGS)
    gain, fall, sink = rng.uniform(0.2, 1.5), rng.uniform(0.08, 0.4), -rng.uniform(0.05, 0.3)
    rising = far = 0.0
    if kind == "not-learning":
        gain = fall = sink = 0.0
    elif kind == "sinking":
        beta, sink = rng.choice((1.0, 5.0)), rng.uniform(0.25, 1.5)
        gain += 0.5
    elif kind == "data":
        margin = rng.uniform(1.2, 2.0)
    elif kind == "too-few-steps":
        steps = rng.randrange(1, 19)
    elif kind == "over-fitting":
        rising = rng.uniform(0.15, 0.6)
    elif kind == "far-from-reference":
        far, rising, settings["loss.type"] = rng.uniform(15, 40), 0.5, "ppo"
    settings["loss.beta"] = beta
    at_end = kind == "over-fitting" and rng.random() < 0.5  # the authors' pattern of log-probs
    blown = rng.uniform(0.4, 0.8) if kind == "diverging" else 2.0
    lost = kind == "diverging" and rng.random() < 0.5

    def truth(share: float) -> dict[str, float]:
        c = eased(chosen, chosen - sink, share)
        m = eased(margin, margin + gain, share)
        if at_end:
            c, m = eased(chosen, -0.03, share), eased(margin, rng.uniform(5.6, 9), share)
        n = eased(nll, nll * (1 - fall), share)
        if kind == "sinking":
            n = eased(nll, nll * 1.05, share)
        if share > blown:
            n *= 1 + 1.5 * (share - blown) / (1 - blown)
        odds = m * 1.3
        loss = n + beta * math.log1p(math.exp(-odds))
        accuracy = 1 / (1 + math.exp(-1.7 * m))
        row = {"loss": loss, "nll_loss": n, "log_odds_chosen": odds, "logps/chosen": c,
               "logps/rejected": c - m, "rewards/accuracies": accuracy}  # fmt: skip
        return row | ({"objective/kl": eased(0.0, far, share)} if far else {})

    def noisy(row: dict[str, float], pairs: int, scale: float) -> dict[str, Any]:
        spread = scale / math.sqrt(pairs)
        out: dict[str, Any] = {k: v + rng.gauss(0, spread * 0.5) for k, v in row.items()}
        # The binomial count of right pairs, by its normal approximation.
        share = row["rewards/accuracies"]
        right = round(rng.gauss(pairs * share, math.sqrt(pairs * share * (1 - share))))
        out["rewards/accuracies"] = min(max(right, 0), pairs) / pairs
        return out

    rows: list[dict[str, Any]] = []
    every = max(1, steps // 10)
    drawn: dict[str, float] = {}  # held-out pairs are the same ones at each evaluation
    for step in range(steps + 1):
        share = step / steps
        if step:
            row = noisy(truth((step - 1) / steps), 32, 1.0)  # measured before the update
            if lost and share > blown:
                row["loss"] = row["grad_norm"] = None
            rows.append({"step": step, **row})
        if step % every == 0:
            row = truth(share)
            if rising and share > 0.4:
                row["loss"] *= 1 + rising * (share - 0.4)
            if not drawn:
                drawn = {key: rng.gauss(0, 0.03) for key in row}
            row = {key: value + drawn[key] + rng.gauss(0, 0.002) for key, value in row.items()}
            row["rewards/accuracies"] = min(1.0, max(0.0, row["rewards/accuracies"]))
            rows.append({"step": step, **{f"eval_{key}": value for key, value in row.items()}})
    if rng.random() < 0.3 and not (rising and not at_end):  # nothing is held out
        rows = [row for row in rows if "eval_loss" not in row]
    return Curves.of(rows, settings, DATA)


KINDS = (
    "healthy", "not-learning", "over-fitting", "sinking", "data", "diverging", "too-few-steps",
    "far-from-reference",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_planted_curves_are_recognised(kind: str) -> None:
    wrong = []
    for seed in range(RUNS):
        found = [finding.name for finding in find_health(curves_of(kind, random.Random(seed)))]
        if found[0] != kind or (kind in ("healthy", "not-learning") and len(found) > 1):
            wrong.append((seed, found))
        if kind == "far-from-reference":
            assert "over-fitting" not in found
    assert wrong == []


def test_a_length_rule_that_does_as_well_is_reported() -> None:
    curves = curves_of("healthy", random.Random(1))
    best = max(row["rewards/accuracies"] for row in curves.held_out or curves.train)
    rows = [*curves.train, *({f"eval_{k}": v for k, v in row.items()} | {"step": row["step"]} for row in curves.held_out)]  # fmt: skip
    for rule, names in ((best, ["data"]), (0.6, ["healthy"])):
        lengths = {"chosen_longer": rule, "rejected_longer": 1 - rule}
        found = find_health(Curves.of(rows, SETTINGS, DATA | lengths))
        assert [finding.name for finding in found] == names
    by_data = Curves.of(rows, SETTINGS, {**DATA, "chosen_longer": 0.96, "rejected_longer": 0.0})
    assert by_data.length_rule == pytest.approx(0.98)


def test_each_verdict_says_what_to_do_and_the_keys_are_recipe_keys() -> None:
    seen = set()
    for kind in KINDS:
        for finding in find_health(curves_of(kind, random.Random(0))):
            seen.add(finding.name)
            assert finding.advice
            assert finding.rule
            assert finding.source
            words = [f"{key}={json.dumps(value)}" for key, value in finding.values.items()]
            load_recipe("demo", words)  # refuses an unknown key or a value that is none
    assert len(seen) == len(RULES) + 1


def test_the_rules_know_the_other_objectives() -> None:
    def found(kind: str, objective: str) -> list[Finding]:
        curves, names = curves_of(kind, random.Random(3)), {}
        if objective != "orpo":
            names = {"log_odds_chosen": "rewards/margins" if objective != "sft" else ""}
        if objective == "sft":
            names |= {"logps/rejected": "", "rewards/accuracies": ""}
        rows = [
            [{names.get(key, key): value for key, value in row.items()} for row in part]
            for part in (curves.train, curves.held_out)
        ]
        settings = {**curves.settings, "loss.type": objective}
        return find_health(replace(curves, train=rows[0], held_out=rows[1], settings=settings))

    for objective, key in (("dpo", "loss.rpo_alpha"), ("simpo", "loss.cpo_alpha")):
        (sinking,) = found("sinking", objective)
        assert (sinking.name, sinking.values) == ("sinking", {key: 1.0})
    (sinking,) = found("sinking", "orpo")
    assert sinking.values == {"loss.beta": 0.1}
    for kind in ("healthy", "not-learning"):
        for objective, label in (("orpo", "log odds"), ("dpo", "reward margin"), ("sft", "loss")):
            (finding,) = found(kind, objective)
            assert finding.name == kind
            assert label in finding.reason
    assert found("data", "orpo")[0].name == "data"
    assert found("data", "dpo")[0].name != "data"  # its accuracy before the first step is 0


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": None}], [{"step": 0, "eval_loss": 1.0}]])
def test_a_run_without_figures_is_no_fault(rows: list[dict[str, Any]]) -> None:
    names = [finding.name for finding in find_health(Curves.of(rows, {}))]
    assert "too-few-steps" in names or names == ["diverging"]


# --- real runs

HEALTHY = {
    "a Llama of 260k": ("stories260k", {"training.learning_rate": 4e-3}),
    "another seed and rate": ("stories260k", {"training.learning_rate": 2e-3, "training.seed": 7}),
    "a Llama of 1M": ("babyllama1m", {"training.learning_rate": 2e-3}),
    "batches of 8": ("babyllama1m", {"training.learning_rate": 1e-3, "training.seed": 3,
                                     "training.global_batch_size": 8}),
    "a higher rank": ("babyllama1m", {"training.learning_rate": 1e-3, "lora.r": 32}),
}  # fmt: skip


def real_findings(model: str, path: Path, values: dict[str, Any]) -> list[str]:
    given = {
        "model.model_name_or_path": SHARED / "models" / model,
        "data.dataset_name": SHARED / "data" / "hh-rlhf-harmless.jsonl",
        "training.output_dir": path,
        "data.max_samples": 600,
        "data.max_length": 256,
        "data.max_prompt_length": 160,
        "data.test_split_size": 64,
        "memory.micro_batch_size": 8,
        "training.global_batch_size": 16,
        "training.max_steps": 30,
        "training.eval_steps": 6,
        "output.samples": 0,
        "output.report": "false",
        "output.merge": "false",
        **values,
    }
    train(load_recipe("mistral-qlora", [f"{key}={value}" for key, value in given.items()]))
    settings, data = read_json(path / "lock.json")["recipe"], read_json(path / "data.json")
    return [f.name for f in find_health(Curves.of(read_metrics(path), settings, data))]


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm_on_a_healthy_real_run(name: str, tmp_path: Path) -> None:
    model, values = HEALTHY[name]
    assert real_findings(model, tmp_path / "run", values) == ["healthy"]


@pytest.mark.real
@pytest.mark.long
def test_a_high_lambda_sinks_the_log_probs_of_a_model_that_knows_such_answers(
    tmp_path: Path,
) -> None:
    """A raw base first learns how such answers look, and its log-probs rise at any λ."""
    model, values = HEALTHY["a Llama of 1M"]
    assert real_findings(model, tmp_path / "first", values) == ["healthy"]
    more = {**values, "model.adapter_name_or_path": tmp_path / "first" / "adapter"}
    more["training.warmup_steps"] = 3
    for beta, name in ((0.1, "healthy"), (1, "sinking"), (5, "sinking")):
        path = tmp_path / f"beta-{beta}"
        assert real_findings(model, path, {**more, "loss.beta": beta})[0] == name
