"""A run that goes on with other values, elsewhere, or without the adapter that it began with."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from hub_server import NAME, Hub
from safetensors.torch import load_file, save_file

from orpo_lite.api import train, train_events
from orpo_lite.errors import CheckpointError, Command, DivergedError
from orpo_lite.merging.merge import merge
from orpo_lite.model.optimizer import lr_factor
from orpo_lite.objectives.orpo import Orpo
from orpo_lite.publishing.model_card import make_card
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.changes import find_changes, recipe_to_resume, record_changes
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.lock import read_lock, read_recipe
from orpo_lite.runs.records import read_metrics
from orpo_lite.training.checkpoint import STATE
from orpo_lite.training.result import TrainResult
from orpo_lite.training.session import restore_session
from orpo_lite.updates import Update

Build = Callable[..., Recipe]
Call = Callable[..., Answer]
Trained = tuple[list[Update], TrainResult]  # of conftest
FEW = ("output.samples=0", "lora.r=4", "lora.target_modules=q_proj,v_proj")


def go_on(run: Path, *overrides: str) -> tuple[list[str], TrainResult]:
    """Resume as the command line does; what was noted, and the result."""
    notes, generator = [], train_events(recipe_to_resume(run, overrides), resume=True)
    while True:
        try:
            update = next(generator)
        except StopIteration as end:
            return notes, end.value
        notes += [update.text] if update.kind == "note" else []


def stop_at(step: int, recipe: Recipe) -> Path:
    """Train until a signal comes at a step."""
    with pytest.raises(Interrupted):
        for update in train_events(recipe):
            if update.kind == "step" and update.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
    return Path(recipe.training.output_dir)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rates(run: Path) -> list[float]:
    return [row["learning_rate"] for row in read_metrics(run) if "loss" in row]


@pytest.mark.long
def test_a_finished_run_that_is_made_longer_is_the_one_that_began_so(small_recipe: Build) -> None:
    """Data order and rate are functions of the step alone, so nothing tells the two apart."""
    options = (
        *FEW,
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.eval_steps=2",
    )
    train(small_recipe(*options, "training.max_steps=2"))
    _, longer = go_on(Path("run"), "training.max_steps=6")
    whole = train(small_recipe(*options, "training.max_steps=6", "training.output_dir=whole"))
    assert longer.steps == whole.steps == 6  # the fifth step begins a second pass
    assert same_bits(longer.run, whole.run)


def test_another_rate_and_length_hold_from_the_next_step_on_as_if_begun_so(
    trained: Trained,
) -> None:
    run = trained[1].run
    before = rates(run)
    notes, result = go_on(
        run, "training.learning_rate=1e-3", "training.max_steps=8", "output.samples=0"
    )
    recipe = read_recipe(run)
    factor = lr_factor(recipe, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), 8)
    assert rates(run) == [*before, *(1e-3 * factor(step) for step in range(4, 8))]
    assert (result.steps, recipe.training.max_steps, recipe.training.learning_rate) == (8, 8, 1e-3)
    assert "changed after step 4: training.learning_rate: 0.01 -> 0.001" in notes
    assert f"the learning rate of step 5 of 8 is {1e-3 * factor(4):.3g}" in notes
    card = (run / "README.md").read_text()
    assert "| `training.learning_rate` | 0.01, then 0.001 after step 4 |" in card
    assert "| `training.max_steps` | -1, then 8 after step 4 |" in card
    assert "output.samples" not in card


def test_a_card_names_no_value_that_its_steps_were_not_made_with(trained: Trained) -> None:
    """Stopped before a step with the new rate: the adapter that is there was trained with the old one."""
    run = trained[1].run
    recipe, changed = find_changes(run, recipe_to_resume(run, ["training.learning_rate=1e-3"]))
    record_changes(run, recipe, changed, read_lock(run), 4)
    assert "| `training.learning_rate` | 0.01 |" in make_card(run)
    recipe, changed = find_changes(run, recipe_to_resume(run))
    lock = read_lock(run)
    record_changes(
        run, recipe, changed, {**lock, "versions": {**lock["versions"], "peft": "99"}}, 2
    )
    card = make_card(run)
    assert "| `training.learning_rate` | 0.01, then 0.001 after step 2 |" in card
    assert f"peft {lock['versions']['peft']}, then 99 after step 2" in card


@pytest.mark.parametrize("word", ["training.max_steps=3", "training.num_train_epochs=0.5"])
def test_fewer_steps_than_are_done_are_refused_before_weights_load(
    trained: Trained, call: Call, word: str
) -> None:
    code, said, error = call("train", "--resume", "run", word)
    assert code == 5
    assert "loading" not in said
    assert "4 steps are done" in error
    assert error.endswith("fix: orpo-lite train --resume run training.max_steps=4\n")
    assert read_recipe(Path("run")).training.max_steps == -1


def test_a_run_that_stopped_early_says_so_and_goes_on_when_told(small_recipe: Build) -> None:
    options = (
        "training.learning_rate=1e-30",  # too low to change a weight, so no loss is lower
        "training.eval_steps=1",
        "training.warmup_steps=0",
        *FEW,
    )
    result = train(
        small_recipe(*options, "training.early_stopping_patience=1", "training.num_train_epochs=2")
    )
    assert result.steps < 8
    notes, again = go_on(result.run)
    assert again.steps == result.steps
    (note,) = [note for note in notes if "stopped early" in note]
    assert "training.early_stopping_patience" in note
    assert go_on(result.run, "training.early_stopping_patience=null")[1].steps == 8


@pytest.mark.long
def test_a_run_goes_on_without_the_adapter_that_it_began_with(
    small_recipe: Build, tmp_path: Path
) -> None:
    train(small_recipe(*FEW, "training.output_dir=first", "lora.use_rslora=true"))
    source = tmp_path / "first" / "adapter"
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(
        json.dumps({**config, "alpha_pattern": {"v_proj": 64}})
    )
    onward = (f"model.adapter_name_or_path={source}", "output.samples=0")
    whole = train(small_recipe(*onward, "training.output_dir=whole")).run
    stopped = stop_at(2, small_recipe(*onward, "training.output_dir=stopped"))
    begun = train_events(small_recipe(*onward, "training.output_dir=begun"))
    next(update for update in begun if update.text.startswith("loading"))
    begun.close()
    other = {
        name: tensor + 1 for name, tensor in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(other, source / "adapter_model.safetensors")
    assert same_bits(
        whole, go_on(Path("begun"))[1].run
    )  # which has no checkpoint yet, and another adapter lies there
    shutil.rmtree(source)
    assert same_bits(whole, go_on(stopped)[1].run)
    assert merge(stopped).changed
    card = (stopped / "README.md").read_text()
    assert "| `lora.target_modules` | \\[q_proj, v_proj\\] |" in card
    assert "| `alpha_pattern` of the adapter | {v_proj: 64} |" in card
    assert read_recipe(stopped).lora.target_modules == ["q_proj", "v_proj"]


def test_base_pairs_and_template_may_lie_elsewhere_and_are_the_same(
    small_recipe: Build, workspace: Path
) -> None:
    template = workspace / "turns.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    )
    run = stop_at(2, small_recipe(*FEW, "data.chat_template=turns.jinja"))
    (workspace / "there").mkdir()
    for name in ("base", "pairs.jsonl", "turns.jinja"):
        shutil.move(workspace / name, workspace / "there" / name)
    words = ["model.model_name_or_path=there/base", "data.dataset_name=there/pairs.jsonl"]
    words += ["data.chat_template=there/turns.jinja"]
    with pytest.raises(CheckpointError, match="changed since the run began: data"):
        text = (workspace / "there" / "pairs.jsonl").read_text()
        (workspace / "there" / "pairs.jsonl").write_text(text.replace("Item 1:", "Item one:"))
        go_on(run, *words)
    (workspace / "there" / "pairs.jsonl").write_text(text)
    go_on(run, *words)
    assert read_lock(run)["base"]["path"] == str(workspace / "there" / "base")
    assert merge(run).changed


def test_a_run_goes_on_with_the_commit_of_its_base_wherever_main_is_by_then(
    hub: Hub, small_recipe: Build
) -> None:
    run = stop_at(2, small_recipe(*FEW, f"model.model_name_or_path={NAME}"))
    hub.requests.clear()
    go_on(run)
    assert hub.requests
    assert not [line for line in hub.requests if line.endswith("/revision/main")]
    assert read_recipe(run).model.model_revision == "main"


def test_a_memory_setting_that_is_changed_counts_for_more_than_that_of_a_step_out_of_memory(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stop_at(2, small_recipe(*FEW))
    (folder,) = (run / "checkpoints").glob("step-0000002")
    shrunk = {"micro_batch_size": 1, "activation_checkpointing": "all"}
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, "memory": shrunk}))
    monkeypatch.setattr("orpo_lite.training.checkpoint.find_fault", lambda _: None)  # of its hash
    found = []

    def restore(session: Any, changed: Any) -> Any:
        state = yield from restore_session(session, changed)
        found.append((state.memory, session.recipe.memory.micro_batch_size))
        return state

    monkeypatch.setattr("orpo_lite.api.restore_session", restore)
    go_on(run, "memory.micro_batch_size=4")
    assert found == [({"activation_checkpointing": "all"}, 4)]


def test_a_divergence_is_gone_on_from_with_the_line_that_it_prints(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    loss = Orpo.loss
    with monkeypatch.context() as patch:
        patch.setattr(
            Orpo, "loss", lambda *given: tuple(value * float("nan") for value in loss(*given))
        )
        with pytest.raises(DivergedError) as raised:
            train(small_recipe(*FEW))
    assert isinstance(raised.value.fix, Command)
    _, *words = raised.value.fix.line.split()
    code, _, error = call(*words)
    assert code == 0, error
    assert (
        "| `training.learning_rate` | 0.001, then 0.0005 after step 2 |"
        in Path("run/README.md").read_text()
    )
