"""A new objective is its own file and a name in the schema: it trains, plans, evaluates, resumes and is shown."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orpo_lite
from orpo_lite.api import train
from orpo_lite.cli.console import print_before_after
from orpo_lite.errors import RecipeError
from orpo_lite.objectives.objective import find_objective
from orpo_lite.objectives.orpo import Orpo
from orpo_lite.planning.plan import plan
from orpo_lite.recipe.loss import LossSection
from orpo_lite.recipe.schema import Recipe

SQUARED = '''
"""The squared distance of the log odds from 1."""

import torch

from orpo_lite.objectives.objective import Metric, Objective
from orpo_lite.objectives.orpo import log_odds


class Squared(Objective):
    title = "squared log odds"
    paper = "https://example.org/squared"
    formula = "L = (1 - log odds)²."
    parts = ("square", "rewards/accuracies")
    shown = (Metric("loss", "loss", "distance", "loss"), Metric("rewards/accuracies", "right", "share of right pairs"))

    def loss(self, logps, facts, divisors):
        odds_P = log_odds(logps.chosen_P, logps.rejected_P)
        loss = (1 - odds_P).square().sum() / divisors.pairs
        right = (odds_P > 0).to(odds_P.dtype).sum() / divisors.pairs
        return loss, torch.stack([loss, right]).detach()

    def metrics(self, parts):
        return {"loss": parts[0], "rewards/accuracies": parts[1]}


OBJECTIVE = Squared
'''
# Trains in one go and in two, with a plan for a budget; prints what is to be seen of it.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path

from orpo_lite import train
from orpo_lite.api import train_events
from orpo_lite.objectives.objective import find_objective
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.runs.interrupt import Interrupted


def recipe(run):
    keys = ["micro_batch_tokens=512", "head_chunk=64", "activation_checkpointing=1", "checkpoint_offload=false",
            "mlp_tile=null", "embedding_on_cpu=false", "budget=2GiB"]
    keys = [f"memory.{key}" for key in keys] + ["loss.type=squared", f"training.output_dir={run}"]
    return load_recipe("./small.yaml", keys)


whole = train(recipe("whole"))
lines = []
try:
    for update in train_events(recipe("stopped")):
        lines += [update.text] if update.kind in ("step", "eval") else []
        if update.kind == "step" and update.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
except Interrupted:
    resumed = train(recipe("stopped"), resume=True)
bits = [Path(run, "adapter/adapter_model.safetensors").read_bytes() for run in ("whole", "stopped")]
print(json.dumps({
    "plan": json.loads(Path("whole/plan.json").read_text()), "same_bits": bits[0] == bits[1],
    "lines": lines, "rows": Path("whole/metrics.jsonl").read_text(), "card": Path("whole/README.md").read_text(),
    "before": whole.before, "after": resumed.after,
    "shown": [metric.label for metric in find_objective(recipe("none").loss).shown],
}))
"""


@pytest.mark.long
def test_a_new_objective_touches_its_own_file_and_the_schema(
    small_recipe: Callable[..., Recipe], workspace: Path
) -> None:
    small_recipe()  # writes small.yaml
    package = workspace / "site" / "orpo_lite"
    shutil.copytree(
        Path(orpo_lite.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "objectives" / "squared.py").write_text(SQUARED, encoding="utf-8")
    schema = package / "recipe" / "loss.py"
    text = schema.read_text(encoding="utf-8")
    assert text.count('LossType = Literal["orpo", ') == 1
    schema.write_text(
        text.replace('LossType = Literal["orpo", ', 'LossType = Literal["squared", "orpo", '),
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=workspace,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plan"]["fits"]
    assert found["same_bits"]
    rows = [json.loads(line) for line in found["rows"].splitlines()]
    assert {"eval_loss", "eval_rewards/accuracies", "step"} == rows[0].keys()
    assert not {"nll_loss", "log_odds_ratio"} & rows[1].keys()
    assert found["after"]["eval_loss"] < found["before"]["eval_loss"]
    assert found["lines"][0].startswith("loss ")
    assert found["shown"] == ["loss", "right"]
    assert "squared log odds ([https://example.org/squared]" in found["card"]
    assert "L = (1 - log odds)²." in found["card"]
    assert "| distance |" in found["card"]


def test_a_need_that_no_model_fills_is_refused(
    small_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Orpo, "needs", frozenset({"rejected", "scores"}))
    for verb in (train, plan):
        with pytest.raises(RecipeError, match=r"loss\.type: orpo needs scores"):
            verb(small_recipe())
    assert not Path("run").exists()


def test_a_card_names_a_reference_adapter_of_the_hub_and_no_path(workspace: Path) -> None:
    def reference(name: str | None) -> str:
        loss = LossSection(type="dpo", reference_adapter_name_or_path=name)
        return dict(find_objective(loss).described())["reference model"]

    assert reference("owner/sft") == "the base with owner/sft"
    (workspace / "ann" / "sft").mkdir(parents=True)
    for private in ("ann/sft", "./ann/sft", "/home/ann/sft", "~/sft", "runs/ann/adapter", "mine"):
        assert reference(private) == "the base with another adapter"
    assert reference("base") == "the base"
    assert reference(None) == "the model before the training"


def test_the_share_of_pairs_is_not_known_where_all_rewards_are_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def share(after: float, **loss: Any) -> list[str]:
        objective = find_objective(LossSection(**loss))
        names = [f"eval_{metric.name}" for metric in objective.shown]
        print_before_after(dict.fromkeys(names, 0.0), dict.fromkeys(names, after), objective)
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith("reward accuracy")).split()[2:]

    assert share(0.25, type="dpo") == ["-", "25.0%"]
    assert share(0.0, type="dpo") == ["-", "-"]  # the adapter of step 0 is kept
    assert share(0.25, type="dpo", reference_adapter_name_or_path="base") == ["0.0%", "25.0%"]
    assert share(0.25, type="orpo") == ["0.0%", "25.0%"]
