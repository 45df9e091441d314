"""What may change before a run goes on: every key of the recipe is refused with its place, or
allowed and recorded."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from orpo_lite.cli.train_command import RESUME
from orpo_lite.errors import CheckpointError, Command
from orpo_lite.recipe.checks import LOSSES_WITH
from orpo_lite.recipe.schema import KEYS
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.changes import (
    CHANGEABLE,
    OUTPUT_DIR,
    Change,
    find_changes,
    read_changes,
    recipe_to_resume,
    record_changes,
    trained_recipe,
    values_in_force,
)
from orpo_lite.runs.lock import read_lock, read_recipe

ALLOWED: dict[str, Any] = {
    "model.device": "cpu",
    "training.learning_rate": 1e-4,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 2,
    "training.num_train_epochs": 3,
    "training.max_steps": 100,
    "training.early_stopping_patience": 3,
    "training.eval_steps": 2,
    "training.load_best_model_at_end": False,
    "training.full_determinism": True,
    "training.report_to": ["tensorboard"],
    "memory.budget": "12GiB",
    "memory.packing": False,
    "memory.prompt_sharing": False,
    "memory.micro_batch_tokens": 1000,
    "memory.micro_batch_size": 1,
    "memory.head_chunk": 100,
    "memory.fused_lora": False,
    "memory.activation_checkpointing": "none",
    "memory.checkpoint_offload": True,
    "memory.mlp_tile": 64,
    "memory.embedding_on_cpu": True,
    "memory.shard": 2,
    "output.merge": False,
    "output.report": True,
    "output.samples": 2,
    "output.max_new_tokens": 9,
    "output.push_to_hub": True,  # asks for a name too, which the command line can give
    "output.hub_model_id": "ann/tuned",
    "output.hub_private_repo": False,
    "output.send_report": True,
}
MOVED: dict[
    str, Any
] = {  # allowed from one local place to another: hashes tell whether it is the same
    "model.model_name_or_path": "/elsewhere/base",
    "data.dataset_name": "/elsewhere/pairs.jsonl",
}
REFUSED: dict[str, Any] = {
    "model.model_revision": "v1",
    "model.adapter_name_or_path": "ann/adapter",
    "model.dtype": "float16",
    "model.attn_implementation": "eager",
    "quantization.load_in_4bit": False,
    "quantization.bnb_4bit_quant_type": "fp4",
    "quantization.bnb_4bit_use_double_quant": False,
    "quantization.bnb_4bit_compute_dtype": "float32",
    "lora.r": 8,
    "lora.lora_alpha": 64,
    "lora.lora_dropout": 0.2,
    "lora.target_modules": ["q_proj", "v_proj"],
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.init_lora_weights": "gaussian",
    "data.dataset_config": "en",
    "data.dataset_train_split": "train_prefs",
    "data.dataset_test_split": "test",  # none was named: it would be another set
    "data.test_split_size": 0.3,
    "data.format": "explicit",
    "data.column_map": {"chosen": ["good", "win"]},
    "data.max_samples": 20,
    "data.max_bad_rows": 0.5,
    "data.max_length": 256,
    "data.max_prompt_length": 64,
    "data.chat_template": "none",
    "data.chat_template_kwargs": {"enable_thinking": False},
    "loss.type": "sft",
    "loss.beta": 1.0,
    "loss.completion_only_loss": True,
    "loss.nll_reduction": "pair",
    "loss.dpo_loss_type": "ipo",
    "loss.label_smoothing": 0.1,
    "loss.rpo_alpha": 1.0,
    "loss.cpo_alpha": 0.5,
    "loss.simpo_gamma": 1.0,
    "loss.ratio_of": "sum",
    "loss.reference_adapter_name_or_path": "ann/adapter",
    "loss.center_rewards_coefficient": 0.01,
    "loss.reward_adapter_name_or_path": "ann/reward",
    "loss.response_length": 64,
    "loss.temperature": 0.7,
    "loss.num_ppo_epochs": 2,
    "loss.ppo_mini_batch_size": 4,
    "loss.kl_coef": 0.2,
    "loss.kl_target": 3.0,
    "loss.kl_horizon": 100,
    "loss.gamma": 1.0,
    "loss.lam": 0.9,
    "loss.cliprange": 0.1,
    "loss.cliprange_value": 0.1,
    "loss.vf_coef": 0.5,
    "training.global_batch_size": 4,
    "training.optim": "adamw_torch",
    "training.adam_beta1": 0.8,
    "training.adam_beta2": 0.99,
    "training.adam_epsilon": 1e-6,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 0.5,
    "training.seed": 43,
    "training.output_dir": "other",
}
EDITS = {**ALLOWED, **MOVED, **REFUSED}


@pytest.fixture
def run(
    one_training: tuple[Path, list[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A finished run of which only recipe.yaml and lock.json are there."""
    folder, *_ = one_training
    (tmp_path / "run").mkdir()
    for name in ("recipe.yaml", "lock.json"):
        shutil.copy(folder / "run" / name, tmp_path / "run" / name)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def edit(run: Path, key: str, value: Any) -> int:
    """Write another value into recipe.yaml; returns the line."""
    section, _, field = key.partition(".")
    lines = (run / "recipe.yaml").read_text("utf-8").splitlines()
    start = lines.index(f"{section}:")
    number = next(n for n in range(start, len(lines)) if lines[n].startswith(f"  {field}: "))
    lines[number] = f"  {field}: {to_text(value)}"
    (run / "recipe.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return number + 1


def changed_by(run: Path, *overrides: str) -> dict[str, Any]:
    return find_changes(run, recipe_to_resume(run, overrides))[1]


def test_every_key_has_a_decision() -> None:
    assert EDITS.keys() == {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
    assert len(EDITS) == len(ALLOWED) + len(MOVED) + len(REFUSED)


def test_the_help_names_every_key_that_may_change() -> None:
    assert ALLOWED.keys() == CHANGEABLE
    for key in CHANGEABLE:
        section, _, name = key.partition(".")
        assert f"{section}.*" in RESUME or name in RESUME


@pytest.mark.parametrize(
    "key", [key for key in REFUSED if key.partition(".")[2] not in LOSSES_WITH]
)
def test_an_edit_that_may_not_be_is_refused_with_its_place(run: Path, key: str) -> None:
    line = edit(run, key, REFUSED[key])
    before = json.loads((run / "lock.json").read_text())["recipe"][key]
    with pytest.raises(CheckpointError, match=rf"(?s)^run/recipe.yaml:{line}: {key}: ") as raised:
        changed_by(run)
    fix = raised.value.fix
    assert isinstance(fix, Command)
    if key == OUTPUT_DIR:
        return
    assert raised.value.expected == f"{to_text(before)}, as at the start of the run"
    with pytest.raises(CheckpointError, match=key):
        trained_recipe(run)
    start, words = shlex.split(fix.line)[:4], shlex.split(fix.line)[4:]
    assert start == ["orpo-lite", "train", "--resume", "run"]
    assert changed_by(run, *words) == {}


@pytest.mark.parametrize("key", [key for key in (*ALLOWED, *MOVED) if key != "output.push_to_hub"])
def test_an_edit_that_may_be_is_recorded_with_its_step(run: Path, key: str) -> None:
    before, value = values_in_force(run, read_lock(run))[key], EDITS[key]
    edit(run, key, value)
    has_effect = key in MOVED  # any other one has none yet
    assert dict(trained_recipe(run).items())[key] == (value if has_effect else before)
    recipe, changed = find_changes(run, recipe_to_resume(run))
    assert changed == {key: value}
    record_changes(run, recipe, changed, read_lock(run), 3)
    assert read_changes(read_lock(run), "") == [Change(key, before, value, 3)]
    assert (
        values_in_force(run, read_lock(run))[key] == value == dict(trained_recipe(run).items())[key]
    )
    assert changed_by(run) == {}


def test_a_change_on_the_command_line_is_written_into_the_recipe(run: Path) -> None:
    words = (
        "output.push_to_hub=true",
        "output.hub_model_id=ann/tuned",
        "training.learning_rate=1e-4",
    )
    recipe, changed = find_changes(run, recipe_to_resume(run, words))
    assert changed == {
        "training.learning_rate": 1e-4,
        "output.push_to_hub": True,
        "output.hub_model_id": "ann/tuned",
    }
    record_changes(run, recipe, changed, read_lock(run), 2)
    written = read_recipe(run)
    assert (written.training.learning_rate, written.output.hub_model_id) == (1e-4, "ann/tuned")
    assert written.training.output_dir == "run"
    assert changed_by(run) == {}


def test_all_edits_are_refused_at_once_and_what_may_change_is_kept(run: Path) -> None:
    edit(run, "training.seed", 7)
    edit(run, "loss.beta", 0.5)
    with pytest.raises(
        CheckpointError, match=r"(?s)2 faults.*loss\.beta: 0\.5.*training\.seed: 7"
    ) as raised:
        changed_by(run, "training.learning_rate=1e-4", "training.max_steps=9")
    words = shlex.split(raised.value.fix.line)[4:]
    assert changed_by(run, *words) == {"training.learning_rate": 1e-4, "training.max_steps": 9}
    assert (
        "`orpo-lite train --recipe run/recipe.yaml training.output_dir=run-2`" in raised.value.fix
    )


def test_what_may_not_change_is_refused_on_the_command_line(run: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^command line: training\.seed: 7\n.*42, as at the start of the run"
    ) as raised:
        changed_by(run, "training.seed=7")
    assert raised.value.fix.line == "orpo-lite train --resume run"
    assert "training.seed=7 training.output_dir=run-2" in raised.value.fix
    with pytest.raises(
        CheckpointError, match=r"training\.output_dir: other\n.*run, the folder of the run"
    ):
        changed_by(run, "training.output_dir=other")
    assert changed_by(run, f"training.output_dir={run.resolve()}") == {}


def test_a_line_that_is_gone_leaves_its_value_as_it_is(run: Path) -> None:
    edit(run, "training.learning_rate", 0.01)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("  learning_rate: 0.01\n", ""))
    recipe, changed = find_changes(run, recipe_to_resume(run))
    assert (recipe.training.learning_rate, changed) == (0.01, {})


def test_epochs_beside_a_number_of_steps_are_refused(run: Path) -> None:
    words = ["training.max_steps=50"]
    recipe, changed = find_changes(run, recipe_to_resume(run, words))
    record_changes(run, recipe, changed, read_lock(run), 2)
    with pytest.raises(
        CheckpointError, match=r"num_train_epochs: 3.0 has no effect, because"
    ) as raised:
        changed_by(run, "training.num_train_epochs=3")
    assert changed_by(run, *shlex.split(raised.value.fix.line)[4:]) == {
        "training.num_train_epochs": 3.0,
        "training.max_steps": -1,
    }


def test_a_run_that_goes_back_to_an_older_checkpoint_has_its_changes_from_there_on(
    run: Path,
) -> None:
    def go_on(step: int, *words: str) -> list[tuple[Any, ...]]:
        recipe, changed = find_changes(run, recipe_to_resume(run, words))
        record_changes(run, recipe, changed, read_lock(run), step)
        return [(c.before, c.after, c.after_step) for c in read_changes(read_lock(run), "")]

    assert go_on(10, "training.learning_rate=0.1") == [(0.01, 0.1, 10)]
    assert go_on(20, "training.learning_rate=0.2") == [(0.01, 0.1, 10), (0.1, 0.2, 20)]
    assert go_on(15) == [(0.01, 0.1, 10), (0.1, 0.2, 15)]
    assert go_on(5) == [(0.01, 0.2, 5)]
    assert go_on(5, "training.learning_rate=0.01") == []
    assert read_recipe(run).training.learning_rate == 0.01


def test_other_versions_of_packages_are_recorded(run: Path) -> None:
    lock = read_lock(run)
    now = {**lock, "versions": {**lock["versions"], "peft": "99"}}
    recipe, changed = find_changes(run, recipe_to_resume(run))
    for _ in range(2):
        record_changes(run, recipe, changed, now, 4)
        (change,) = read_changes(read_lock(run), "")
        assert change == Change("versions.peft", lock["versions"]["peft"], "99", 4)
    assert changed_by(run) == {}


def test_a_run_of_an_older_version_goes_on_and_is_recorded_from_then_on(run: Path) -> None:
    lock = read_lock(run)
    del lock["recipe"]
    (run / "lock.json").write_text(json.dumps(lock))
    edit(run, "training.seed", 7)  # which nobody can tell
    recipe, changed = find_changes(run, recipe_to_resume(run, ["training.learning_rate=1e-4"]))
    assert changed == {"training.learning_rate": 1e-4}
    record_changes(run, recipe, changed, read_lock(run), 2)
    edit(run, "training.seed", 42)
    with pytest.raises(
        CheckpointError, match=r"training\.seed: 42\n.*7, as at the start of the run"
    ):
        changed_by(run)


def test_a_broken_record_is_a_fault_of_the_folder(run: Path) -> None:
    lock = read_lock(run)
    for broken in (
        {"recipe": []},
        {"changes": {}},
        {"changes": ["a"]},
        {"changes": [{"key": 1, "after_step": 2}]},
    ):
        (run / "lock.json").write_text(json.dumps({**lock, **broken}))
        with pytest.raises(CheckpointError, match=r"lock\.json"):
            changed_by(run)
