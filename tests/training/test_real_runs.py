"""Whole runs on a real Llama and real preference pairs: evaluation, best checkpoint, merge."""

import math
from pathlib import Path

import pytest
import torch
from conftest import SHARED, first_and_long
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lite.api import train
from orpo_lite.merging.merge import merge
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.runs.records import read_json, read_metrics

pytestmark = pytest.mark.real

SETS = {
    "hh-rlhf": ("hh-rlhf-harmless.jsonl", "hh_rlhf", {}),
    "alpaca-prefs": (
        "alpaca-prefs/train.jsonl",
        "messages",
        {"data.dataset_test_split": "alpaca-prefs/test.jsonl"},
    ),
}


@pytest.mark.parametrize("name", first_and_long(SETS))
def test_a_real_llama_learns_real_preferences(name: str, tmp_path: Path) -> None:
    file, form, more = SETS[name]
    overrides = []
    for key, value in more.items():  # the first rows are enough to choose a checkpoint by
        rows = (SHARED / "data" / value).read_text("utf-8").splitlines(keepends=True)
        (tmp_path / "some.jsonl").write_text("".join(rows[:24]), encoding="utf-8")
        overrides.append(f"{key}={tmp_path / 'some.jsonl'}")
    recipe = load_recipe(
        "mistral-qlora",
        [
            f"model.model_name_or_path={SHARED / 'models' / 'stories260k'}",
            f"data.dataset_name={SHARED / 'data' / file}",
            f"training.output_dir={tmp_path / 'run'}",
            "data.max_samples=96",
            "data.max_length=256",
            "data.test_split_size=16",
            "data.max_prompt_length=160",
            "memory.micro_batch_size=8",
            "training.global_batch_size=16",
            "training.max_steps=8",
            "training.learning_rate=4e-3",
            "training.eval_steps=4",
            "output.samples=1",
            "output.max_new_tokens=8",
            *overrides,
        ],
    )
    result = train(recipe)
    data = read_json(result.run / "data.json")
    (said,) = data["format"]
    assert form in said
    assert "the paper's" in data["chat_template"]
    losses = {
        row["step"]: row["eval_loss"] for row in read_metrics(result.run) if "eval_loss" in row
    }
    assert losses[result.kept_step] == min(losses.values())
    assert result.after["eval_nll_loss"] < result.before["eval_nll_loss"] - 0.05
    assert all(math.isfinite(value) for value in result.after.values())

    merged = merge(result.run)
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    base = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert set(model.generation_config.eos_token_id) == {1, 2}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 1e-3
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert len(changed) == 5 * 7  # every linear layer, and nothing else
