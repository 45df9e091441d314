"""The real path on a tiny base: NF4, LoRA, paged AdamW, accelerate; checkpoints, interruption, resume, merge."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import OUT_OF_MEMORY, Answer, first_and_long, tiny_llama, write_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from orpo_lite import train
from orpo_lite.api import train_events
from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    FitError,
    ModelError,
    RecipeError,
)
from orpo_lite.merging.merge import merge
from orpo_lite.model.optimizer import lr_factor, whole_steps
from orpo_lite.objectives.orpo import Orpo
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.folder import KEPT_CHECKPOINTS, locked
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.lock import read_recipe
from orpo_lite.runs.records import read_json, read_metrics, read_scores
from orpo_lite.training.checkpoint import STATE, find_step
from orpo_lite.training.result import TrainResult
from orpo_lite.training.step import update
from orpo_lite.updates import Update

Build = Callable[..., Recipe]
Call = Callable[..., Answer]
Trained = tuple[list[Update], TrainResult]  # of conftest
AS_TRAINED = "training.learning_rate=1e-2"
EIGHT_BIT = "lora.r=64"  # bitsandbytes keeps 8-bit states of tensors from 4,096 numbers on


def train_all(recipe: Recipe, **options: Any) -> tuple[list[Update], TrainResult]:
    updates, generator = [], train_events(recipe, **options)
    while True:
        try:
            updates.append(next(generator))
        except StopIteration as end:
            return updates, end.value


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows_without_clock(folder: Path) -> list[dict[str, Any]]:
    ignored = {"tokens_per_second", "memory_gib"}
    return [{k: v for k, v in row.items() if k not in ignored} for row in read_metrics(folder)]


def records(folder: Path) -> list[Any]:
    """All that a run records of its steps and evaluations, without times."""
    return [rows_without_clock(folder), read_scores(folder), read_json(folder / "verdict.json")]


def test_a_run_folder_holds_what_every_verb_needs(small_recipe: Build) -> None:
    updates, result = train_all(small_recipe(EIGHT_BIT))
    names = {path.name for path in result.run.iterdir()}
    assert {
        "recipe.yaml",
        "lock.json",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "train.log",
    } <= names
    assert {path.name for path in (result.run / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert not list(result.run.rglob(".*tmp*"))
    assert [update.kind for update in updates].count("step") == result.steps == 4
    lock = read_json(result.run / "lock.json")
    assert len(lock["base"]["fingerprint"]) == len(lock["data"]["sha256"]) == 64
    assert (
        lock["versions"]["torch"] == torch.__version__.split("+")[0]
        or lock["versions"]["torch"] == torch.__version__
    )
    data = read_json(result.run / "data.json")
    assert data["train_pairs"] + data["held_out_pairs"] == 40
    here = {
        "model.model_name_or_path": str(Path("base").resolve()),
        "data.dataset_name": str(Path("pairs.jsonl").resolve()),
    }
    assert (
        read_recipe(result.run).model_dump() == small_recipe(EIGHT_BIT).override(here).model_dump()
    )


def test_metrics_carry_trls_names_for_every_step(trained: Trained) -> None:
    _, result = trained
    rows = read_metrics(result.run)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    trl = {
        "nll_loss",
        "log_odds_ratio",
        "log_odds_chosen",
        "logps/chosen",
        "logps/rejected",
        "rewards/chosen",
    }
    trl |= {"rewards/rejected", "rewards/accuracies", "rewards/margins", "loss"}
    assert trl | {"grad_norm", "learning_rate", "epoch", "num_tokens"} <= rows[1].keys()
    assert {f"eval_{name}" for name in trl} <= rows[0].keys()
    assert result.before == {key: value for key, value in rows[0].items() if key != "step"}
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize(
    "optim", first_and_long(["paged_adamw_8bit", "adamw_torch", "paged_adamw_32bit"])
)
def test_every_optimizer_learns_and_resumes_to_the_same_bits(
    small_recipe: Build, optim: str
) -> None:
    """Stopped after two of four steps and gone on with: the adapter and each logged figure are those of one go."""
    options = (
        f"training.optim={optim}",
        EIGHT_BIT,
        "lora.lora_dropout=0.2",
        "training.learning_rate=5e-3",
    )
    _, whole = train_all(small_recipe(*options, "training.output_dir=whole"))
    first_loss, last_loss = (rows_without_clock(whole.run)[i]["eval_loss"] for i in (0, -1))
    assert last_loss < first_loss

    stopped = small_recipe(*options, "training.output_dir=stopped")
    with pytest.raises(Interrupted) as caught:
        for update in train_events(stopped):
            if update.kind == "step" and update.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert "orpo-lite train --resume stopped" in str(caught.value)
    assert not Path("stopped/adapter/adapter_model.safetensors").exists()
    _, resumed = train_all(stopped, resume=True)
    assert same_bits(adapter(whole.run), adapter(resumed.run))
    assert records(whole.run) == records(resumed.run)


# Ctrl-C in a process of its own is also tried where a training pushes; in this process, with SIGTERM, above.
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_killed_process_goes_on_with_the_same_bits(
    small_recipe: Build, workspace: Path, call: Call, number: int
) -> None:
    recipe = small_recipe(
        "training.num_train_epochs=4", "training.eval_steps=2", "training.output_dir=whole"
    )
    train(recipe)
    command = [
        sys.executable,
        "-m",
        "orpo_lite",
        "train",
        "--recipe",
        "./small.yaml",
        "output.merge=false",
    ]
    command += [
        "training.num_train_epochs=4",
        "training.eval_steps=2",
        "training.output_dir=killed",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    for line in child.stdout:
        if line.startswith("held-out at step 6/"):
            break
    child.send_signal(number)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == (-9 if number == signal.SIGKILL else 130), errors
    assert "Traceback" not in errors
    code, _, errors = call("train", "--resume", "killed")
    assert code == 0, errors
    assert same_bits(adapter(Path("whole")), adapter(Path("killed")))
    assert records(Path("whole")) == records(Path("killed"))


def test_what_a_notebook_has_set_changes_no_bit(trained: Trained, small_recipe: Build) -> None:
    """Gradients off, autocast on, another default dtype, an Accelerator of bfloat16; all is back afterwards."""
    recipe = small_recipe("training.learning_rate=1e-2", "training.output_dir=again")
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        Accelerator(mixed_precision="bf16")
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train_all(recipe)
            assert torch.is_autocast_enabled("cpu")
        assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (False, torch.float64)
    finally:
        AcceleratorState._reset_state()
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
    assert same_bits(adapter(trained[1].run), adapter(Path("again")))


def test_evaluation_changes_no_bit_of_the_training(small_recipe: Build) -> None:
    often = small_recipe(
        "training.eval_steps=1", "training.output_dir=often", "lora.lora_dropout=0.2"
    )
    never = small_recipe(
        "training.eval_steps=4", "training.output_dir=never", "lora.lora_dropout=0.2"
    )
    results = [train(recipe) for recipe in (often, never)]
    at_end = [load_file(find_step(result.run, 4) / ADAPTER_WEIGHTS) for result in results]
    assert same_bits(*at_end)


def test_the_best_checkpoint_is_kept_and_an_idle_run_stops(small_recipe: Build) -> None:
    """A learning rate that helps and then spoils: the best step is an early one and the rest is not waited for."""
    options = (
        "training.learning_rate=0.03",
        "training.eval_steps=1",
        "training.num_train_epochs=12",
    )
    recipe = small_recipe(
        *options, "training.lr_scheduler_type=constant", "training.early_stopping_patience=2"
    )
    _, result = train_all(recipe)
    losses = {
        row["step"]: row["eval_loss"] for row in read_metrics(result.run) if "eval_loss" in row
    }
    assert 0 < result.kept_step < result.steps < 48
    assert losses[result.kept_step] == min(losses.values()) == result.after["eval_loss"]
    assert result.steps == result.kept_step + 2
    kept = load_file(find_step(result.run, result.kept_step) / ADAPTER_WEIGHTS)
    assert same_bits(kept, adapter(result.run))
    assert len(list((result.run / "checkpoints").iterdir())) <= KEPT_CHECKPOINTS + 1


@pytest.mark.long
def test_a_run_that_only_gets_worse_ends_where_it_began(small_recipe: Build) -> None:
    """A trained adapter, gone on with at a rate that spoils it."""
    train(
        small_recipe(
            "training.learning_rate=1e-2",
            "training.num_train_epochs=6",
            "training.output_dir=first",
        )
    )
    options = ("training.learning_rate=0.9", "training.eval_steps=1", "training.warmup_steps=0")
    updates, result = train_all(small_recipe(*options, "model.adapter_name_or_path=first/adapter"))
    assert result.kept_step == 0
    assert result.after == result.before
    assert same_bits(adapter(Path("first")), adapter(result.run))
    assert any("no step was better than the start" in update.text for update in updates)


def test_a_damaged_best_checkpoint_does_not_cost_the_run(small_recipe: Build) -> None:
    options = (
        "training.learning_rate=0.03",
        "training.eval_steps=1",
        "training.num_train_epochs=12",
    )
    recipe = small_recipe(
        *options, "training.lr_scheduler_type=constant", "training.early_stopping_patience=2"
    )
    _, result = train_all(recipe)
    shutil.rmtree(result.run / "adapter")
    (find_step(result.run, result.kept_step) / ADAPTER_WEIGHTS).unlink()
    updates, again = train_all(recipe, resume=True)
    assert again.kept_step == result.steps
    assert any("the best checkpoint cannot be used" in update.text for update in updates)
    assert same_bits(
        adapter(result.run), load_file(find_step(result.run, again.kept_step) / ADAPTER_WEIGHTS)
    )


def test_no_filter_can_empty_the_held_out_side(small_recipe: Build, workspace: Path) -> None:
    """Split after the filters: 2% of 40 is one pair, and whichever prompt it is must fit."""
    rows = [json.loads(line) for line in (workspace / "pairs.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["prompt"] = row["prompt"] + " really?" * 20
    (workspace / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(4):
        recipe = small_recipe(
            "data.test_split_size=0.02", f"training.seed={seed}", f"training.output_dir=run{seed}"
        )
        updates = train_events(recipe.override({"training.max_steps": 1}))
        next(
            update for update in updates if update.text.startswith("loading")
        )  # the sides are made, and written down
        updates.close()
        data = read_json(workspace / f"run{seed}" / "data.json")
        assert (data["train_pairs"], data["held_out_pairs"]) == (19, 1)


def test_a_run_can_be_resumed_and_merged_from_another_folder(
    trained: Trained, workspace: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = trained
    bits = adapter(result.run)
    shutil.rmtree(result.run / "adapter")
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    code, _, errors = call("train", "--resume", "../run")
    assert code == 0, errors
    assert same_bits(bits, adapter(workspace / "run"))
    assert (workspace / "run" / "merged" / "config.json").is_file()


def test_a_broken_lock_is_a_fault_of_the_folder(trained: Trained, small_recipe: Build) -> None:
    recipe = small_recipe(AS_TRAINED)
    Path("run/lock.json").write_text("{}\n")
    for go_on in (lambda: train(recipe, resume=True), lambda: merge("run")):
        with pytest.raises(CheckpointError, match=r"lock\.json: the entry base"):
            go_on()


@pytest.mark.long
def test_an_adapter_to_train_on_from_sets_its_shape(small_recipe: Build) -> None:
    train(small_recipe("lora.r=4"))
    onward = ("model.adapter_name_or_path=run/adapter", "training.output_dir=second")
    with pytest.raises(
        RecipeError, match=r"lora\.r: 8 differs from the adapter in model\.adapter_name_or_path"
    ):
        train(small_recipe(*onward, "lora.r=8"))
    assert not Path("second").exists()
    result = train(small_recipe(*onward))
    assert read_recipe(result.run).lora.r == 4


def test_a_step_that_is_not_finite_leaves_the_loss_scale_usable(small_recipe: Build) -> None:
    """float16: the step is skipped each time, the scale goes down, and a good step follows."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
    for _ in range(2):
        scaler.scale(parameter.sum() * math.nan).backward()
        norm, finite = update([parameter], optimizer, scaler, math.nan, 1.0)
        assert not finite
        assert math.isnan(norm)
        assert torch.equal(parameter, torch.ones(3))
    assert scaler.get_scale() == 2.0
    scaler.scale(parameter.sum()).backward()
    assert update([parameter], optimizer, scaler, 3.0, 0.0)[1]
    assert torch.equal(parameter, torch.zeros(3))


def test_without_held_out_pairs_the_last_step_is_kept(small_recipe: Build) -> None:
    _, result = train_all(small_recipe("data.test_split_size=0"))
    assert result.before == result.after == {}
    assert result.kept_step == result.steps == 5


def test_a_merge_is_the_base_with_the_adapter(trained: Trained, workspace: Path) -> None:
    from peft import PeftModel

    _, result = trained
    merged = merge(result.run)
    assert merged.folder == result.run / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    base = AutoModelForCausalLM.from_pretrained(workspace / "base")
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, result.run / "adapter")(ids).logits
        found = model(ids).logits
    assert (found - adapted).abs().max() / adapted.abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-2
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert "<|assistant|>" in tokenizer.chat_template
    assert model.generation_config.eos_token_id in ([2], 2)
    assert "quantization_config" not in json.loads((merged.folder / "config.json").read_text())


def test_a_merge_onto_another_base_is_refused(trained: Trained, workspace: Path) -> None:
    from conftest import byte_tokenizer, tiny_llama

    _, result = trained
    other = tiny_llama(len(byte_tokenizer()))
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    other.save_pretrained(workspace / "base")
    with pytest.raises(ModelError, match="fingerprint"):
        merge(result.run)
    assert not (result.run / "merged").exists()


def test_a_merge_before_the_end_is_refused_with_the_command(trained: Trained) -> None:
    _, result = trained
    shutil.rmtree(result.run / "adapter")
    with pytest.raises(CheckpointError, match="orpo-lite train --resume run"):
        merge(result.run)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.max_steps=1"], "all 1 steps have learning rate 0 (warm-up)"),
        (
            ["training.max_steps=2", "training.warmup_steps=100"],
            "has 100 steps, but the training only 2: the learning rate reaches only "
            "1e-05 instead of 0.001",
        ),
    ],
)
@pytest.mark.long
def test_a_warm_up_that_leaves_no_step_is_said(
    small_recipe: Build, overrides: list[str], said: str
) -> None:
    def warnings(*more: str) -> list[str]:
        updates, _ = train_all(small_recipe(*overrides, *more, "output.samples=0"))
        return [
            update.text
            for update in updates
            if update.kind == "note" and "learning rate" in update.text
        ]

    found = warnings()
    assert [said in text for text in found] == [True]
    key = re.findall(r"training\.warmup_steps=\d+", found[0])[0]
    assert warnings(key, "training.output_dir=other") == []


@pytest.mark.long
def test_an_adapter_of_another_base_is_said(trained: Trained, small_recipe: Build) -> None:
    """Also where it still fits; the same base in a folder of another name is no other."""

    def notes(base: str, run: str, *more: str) -> list[str]:
        keys = [
            f"model.model_name_or_path={base}",
            f"training.output_dir={run}",
            "training.max_steps=1",
        ]
        updates, _ = train_all(
            small_recipe(*keys, *more, "model.adapter_name_or_path=run/adapter", "output.samples=0")
        )
        return [update.text for update in updates if "the adapter was trained on" in update.text]

    shutil.copytree("base", "moved")
    assert notes("moved", "again") == []
    write_base(Path("other"), tiny_llama(99, rms_norm_eps=1e-4))
    reference = "loss.reference_adapter_name_or_path"
    found = notes("other", "third", "loss.type=dpo", f"{reference}=run/adapter")
    assert ["other" in text and "useless" in text for text in found] == [True, True]
    assert [text.partition(":")[0] for text in found] == ["model.adapter_name_or_path", reference]
    config = json.loads(Path("run/adapter/adapter_config.json").read_text("utf-8"))
    Path("run/adapter/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "owner/Other"})
    )
    assert notes("other", "fourth") == []
    weights = Path("run/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: cannot be read"):
        notes("other", "fifth")


def test_training_goes_on_from_an_adapter(small_recipe: Build) -> None:
    _, first = train_all(small_recipe("training.learning_rate=1e-2", "data.test_split_size=8"))
    continued = small_recipe(
        "model.adapter_name_or_path=run/adapter",
        "training.output_dir=second",
        "data.test_split_size=8",
    )
    _, second = train_all(continued)
    assert second.before["eval_loss"] == pytest.approx(first.after["eval_loss"], abs=1e-6)


def test_altered_checkpoints_are_passed_over_and_named(small_recipe: Build) -> None:
    recipe = small_recipe("training.eval_steps=1")
    _, result = train_all(recipe)
    newest = max((result.run / "checkpoints").iterdir())
    content = bytearray((newest / ADAPTER_WEIGHTS).read_bytes())
    content[-5] ^= 1
    (newest / ADAPTER_WEIGHTS).write_bytes(content)
    updates, again = train_all(recipe, resume=True)
    assert any(
        newest.name in update.text and "altered" in update.text
        for update in updates
        if update.kind == "note"
    )
    assert again.steps == result.steps
    for folder in (result.run / "checkpoints").iterdir():
        (folder / STATE).unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        train_all(recipe, resume=True)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(small_recipe: Build) -> None:
    _, whole = train_all(small_recipe("training.output_dir=whole"))
    recipe = small_recipe()
    updates = train_events(recipe)
    next(update for update in updates if update.text.startswith("loading"))
    updates.close()
    assert not Path("run/checkpoints").exists()
    _, resumed = train_all(recipe, resume=True)
    assert same_bits(adapter(whole.run), adapter(resumed.run))


def test_resume_refuses_another_template_and_other_data(
    small_recipe: Build, workspace: Path
) -> None:
    from conftest import write_pairs

    template = workspace / "turns.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    )
    recipe = small_recipe("data.chat_template=turns.jinja")
    train(recipe)
    template.write_text(
        "{% for m in messages %}{{ m.role + '> ' + m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(CheckpointError, match="chat_template"):
        train_all(recipe, resume=True)
    write_pairs(workspace / "pairs.jsonl", 40, seed=9)
    with pytest.raises(CheckpointError, match="data"):
        train_all(recipe, resume=True)


def test_one_process_a_run(trained: Trained, small_recipe: Build) -> None:
    recipe = small_recipe(AS_TRAINED)
    with locked(Path("run")), pytest.raises(CheckpointError, match="another process"):
        train_all(recipe, resume=True)


def test_an_existing_run_is_refused_with_the_resume_command(
    trained: Trained, small_recipe: Build
) -> None:
    with pytest.raises(CheckpointError, match="orpo-lite train --resume run"):
        train(small_recipe())


def test_nonfinite_steps_leave_the_adapter_alone_and_end_the_run(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Orpo.loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss, parts = real(*args, **kwargs)
        return loss * math.nan, parts * math.nan

    monkeypatch.setattr(Orpo, "loss", poisoned)
    updates = []
    with pytest.raises(DivergedError) as caught:
        for update in train_events(small_recipe("training.num_train_epochs=3")):
            updates.append(update)  # noqa: PERF402 - what came before the error is looked at
    assert caught.value.exit_code == 7
    notes = [
        update.text for update in updates if update.kind == "note" and "not finite" in update.text
    ]
    assert len(notes) == 2
    assert "the 3rd such step in a row" in str(caught.value)
    assert "pairs.jsonl:" in notes[0]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_names_the_memory_settings(
    error: RuntimeError, small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("orpo_lite.training.step.accumulate", explode)
    with pytest.raises(FitError, match=r"memory\.micro_batch_tokens"):
        train(small_recipe())


PLAIN = (
    "packing=false",
    "fused_lora=false",
    "head_chunk=none",
    "activation_checkpointing=none",
    "micro_batch_size=2",
)
ALL = (
    "mlp_tile=16",
    "checkpoint_offload=true",
    "embedding_on_cpu=true",
    "head_chunk=16",
    "micro_batch_tokens=100",
)


def test_the_memory_settings_of_memory_change_no_run(small_recipe: Build) -> None:
    """NF4 and paged AdamW: losses of all steps and evaluations, and the adapter, with every memory setting and with none."""
    found = []
    for name, memory_settings in (("plain", PLAIN), ("all", ALL)):
        keys = [f"memory.{setting}" for setting in memory_settings]
        _, result = train_all(
            small_recipe(f"training.output_dir={name}", "training.optim=adamw_torch", *keys)
        )
        found.append((rows_without_clock(result.run), adapter(result.run)))
    (rows, weights), (others, other_weights) = found
    assert len(rows) == len(others) == 7
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
    for tensor_name, tensor in weights.items():
        assert (other_weights[tensor_name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-5


def test_full_determinism_trains_and_ends_with_the_run(small_recipe: Build) -> None:
    _, result = train_all(small_recipe("training.full_determinism=true", "training.max_steps=2"))
    assert result.steps == 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert (
        os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    )  # with less cuBLAS has slow kernels only


def test_an_operation_without_a_deterministic_kernel_is_named(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        assert (
            not torch.is_deterministic_algorithms_warn_only_enabled()
        )  # with it, FlashAttention would stay as it is
        raise RuntimeError(
            "kthvalue CUDA does not have a deterministic implementation, but you set more."
        )

    monkeypatch.setattr("orpo_lite.training.step.accumulate", explode)
    with pytest.raises(RecipeError, match=r"kthvalue CUDA.*\n.*training\.full_determinism=false"):
        train_all(small_recipe("training.full_determinism=true"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_says_when_its_base_cannot_share_prompts(
    small_recipe: Build, workspace: Path
) -> None:
    shape = {
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 99,
        "initializer_range": 0.2,
    }
    write_base(
        workspace / "bloom", BloomForCausalLM(BloomConfig(**shape, bos_token_id=1, eos_token_id=2))
    )
    updates, result = train_all(
        small_recipe("model.model_name_or_path=./bloom", "training.max_steps=2")
    )
    notes = [update.text for update in updates if update.kind == "note"]
    assert [note for note in notes if note.startswith("pairs are neither packed nor shared")], notes
    assert result.steps == 2


def test_an_embedding_that_is_the_head_too_stays_on_the_device(
    small_recipe: Build, workspace: Path
) -> None:
    write_base(workspace / "tied", tiny_llama(98, tie_word_embeddings=True))
    keys = ("model.model_name_or_path=./tied", "memory.embedding_on_cpu=true")
    with pytest.raises(
        RecipeError, match=r"command line: memory.embedding_on_cpu: true\n.*output head"
    ):
        train_all(small_recipe(*keys))
    assert not (workspace / "run").exists()


def test_bad_data_leaves_no_run_folder(small_recipe: Build, workspace: Path) -> None:
    (workspace / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError):
        train(small_recipe())
    assert not (workspace / "run").exists()


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_schedules_warm_up_and_are_functions_of_the_step(small_recipe: Build, kind: str) -> None:
    recipe = small_recipe(f"training.lr_scheduler_type={kind}", "training.warmup_steps=10")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = lr_factor(recipe, optimizer, 100)
    assert factor(5) == pytest.approx(0.5)
    assert factor(10) == pytest.approx(1.0)
    expected = {
        "cosine": 0.5 * (1 + math.cos(math.pi * 45 / 90)),
        "linear": 0.5,
        "constant": 1.0,
        "inverse_sqrt": (10 / 55) ** 0.5,
    }
    assert factor(55) == pytest.approx(expected[kind])
    assert factor(55) == factor(55)


def test_shares_and_numbers_of_steps() -> None:
    assert [whole_steps(value, 50) for value in (0.1, 0.001, 1.0, 7.0)] == [5, 1, 1, 7]


def test_sixteen_bit_base_and_dora(small_recipe: Build) -> None:
    """Without quantisation, in bfloat16, with DoRA and rsLoRA: the same loop."""
    _, result = train_all(
        small_recipe(
            "quantization.load_in_4bit=false",
            "model.dtype=bfloat16",
            "lora.use_dora=true",
            "lora.use_rslora=true",
        )
    )
    assert math.isfinite(result.after["eval_loss"])
    assert any("magnitude" in name for name in adapter(result.run))


def test_float16_scales_its_loss(small_recipe: Build) -> None:
    recipe = small_recipe(
        "model.dtype=float16", "training.learning_rate=5e-3", "training.num_train_epochs=2"
    )
    _, result = train_all(recipe)
    assert result.after["eval_loss"] < result.before["eval_loss"]
