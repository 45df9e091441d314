"""A run, its merged folder and a plain model are opened with the weights that transformers and peft load."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orpo_lite import merge
from orpo_lite.errors import CheckpointError, ModelError
from orpo_lite.evaluation.open_run import NO_DATA, OpenRun, open_run
from orpo_lite.updates import run_to_end

Trained = tuple[list[Any], Any]
IDS = torch.tensor([[1, 5, 9, 33, 60, 12]])


def opened(name: str | Path, **options: Any) -> OpenRun:
    return run_to_end(open_run(name, **options), lambda _: None)


def logits(model: OpenRun) -> torch.Tensor:
    with model.model.evaluating():
        found: torch.Tensor = model.model.model(IDS).logits
    return found


@torch.no_grad()
def test_a_run_and_its_merged_folder_are_base_and_adapter(trained: Trained) -> None:
    run = trained[1].run
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base_4bit = AutoModelForCausalLM.from_pretrained("base", quantization_config=quantized)
    base_4bit.train()  # in evaluation mode some CPUs use a kernel that rounds to bfloat16
    tuned = opened(run)
    assert (tuned.base.path, tuned.recipe.data.test_split_size) == (Path("base").resolve(), 0.2)
    with tuned.model.without_adapter():
        without = logits(tuned)
    assert torch.allclose(without, base_4bit(IDS).logits, atol=1e-4)
    with_adapter = PeftModel.from_pretrained(base_4bit, run / "adapter").train()(IDS).logits
    assert torch.allclose(logits(tuned), with_adapter, atol=1e-4)
    assert (with_adapter - without).abs().max() > 0.1
    base = AutoModelForCausalLM.from_pretrained("base").eval()
    expected_base = base(IDS).logits
    expected = PeftModel.from_pretrained(base, run / "adapter").eval()(IDS).logits
    merged = opened(merge(run).folder)
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert merged.recipe.data.dataset_name == tuned.recipe.data.dataset_name
    assert merged.tokenizer.chat_template == tuned.tokenizer.chat_template
    plain = opened("base")
    assert torch.equal(logits(plain), expected_base)
    with plain.model.without_adapter():
        assert torch.equal(logits(plain), expected_base)
    assert (plain.run, plain.recipe.data.dataset_name) == (None, NO_DATA)
    assert "<|assistant|>" in plain.tokenizer.chat_template


def test_what_cannot_be_opened_is_said(trained: Trained, tmp_path: Path) -> None:
    run = trained[1].run
    for name in ("runs/of/nobody", "./run-2", str(tmp_path / "x")):
        with pytest.raises(CheckpointError, match="no such folder"):
            opened(name)
    with pytest.raises(CheckpointError, match=r"has no recipe\.yaml"):
        opened(run / "checkpoints")
    shutil.move("base", "elsewhere")
    with pytest.raises(ModelError, match="is not a folder") as raised:
        opened(run, command="chat")
    assert raised.value.fix == f"orpo-lite chat {run} --base-path FOLDER"
    assert opened(run, base_path="elsewhere").base.path == Path("elsewhere").resolve()
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no trained adapter") as raised_too:
        opened(run)
    assert "--resume" in raised_too.value.fix
