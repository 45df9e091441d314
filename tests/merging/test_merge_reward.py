"""A merged reward model: transformers' class loads every tensor and gives the rewards of base and adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import byte_tokenizer, write_base
from peft import PeftModel
from safetensors.torch import save_file
from test_families import GROUPED, LONG, family, gpt2
from torch import nn

from orpo_lite.base.blocks import stored_tensors
from orpo_lite.base.find import find_base, fingerprint
from orpo_lite.merging.merge import merge
from orpo_lite.model.adapter import adapter_tensors
from orpo_lite.model.load import load_pair_model
from orpo_lite.recipe.reader import load_recipe


def opt_with_narrow_ends() -> Any:
    """As the OPT of 350M: embeddings and last hidden states have half the width of the layers."""
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    narrow = {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "dropout": 0.0}
    return hf.OPTForCausalLM(hf.OPTConfig(vocab_size=98, pad_token_id=0, **sizes, **narrow))


FAMILIES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "qwen3, tied head": (family("Qwen3", GROUPED, head_dim=16, tie_word_embeddings=True), set()),
    "phi, head with bias": (family("Phi", LONG), {"lm_head.weight", "lm_head.bias"}),
    "opt, narrow ends": (opt_with_narrow_ends, set()),
    "gpt2, stored transposed": (gpt2, set()),
}  # name -> model, and the stored tensors of a head that the merged model has no use for


@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_model_gives_the_rewards_of_the_training(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, unused = FAMILIES[name]
    model = make()
    for key, parameter in model.named_parameters():
        if "bias" in key:
            nn.init.normal_(parameter, std=0.1)
    base, path = write_base(tmp_path / "base", model), tmp_path / "run"
    adapter = path / "adapter"
    adapter.mkdir(parents=True)
    settings = {"model.model_name_or_path": base, "quantization.load_in_4bit": "false"}
    settings |= {"data.dataset_name": "none", "loss.type": "reward", "lora.r": 4}
    recipe = load_recipe("demo", [f"{key}={value}" for key, value in settings.items()])
    (path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    other = {"name": "none", "sha256": ""}
    known = {"name": str(base), "revision": None, "path": str(base)}
    known["fingerprint"] = fingerprint(base)
    lock = {"base": known, "data": other, "chat_template": other}
    (path / "lock.json").write_text(json.dumps(lock), encoding="utf-8")

    trained = load_pair_model(recipe, find_base(str(base), "main"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in trained.model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    save_file(adapter_tensors(trained), adapter / "adapter_model.safetensors")
    trained.model.peft_config["default"].save_pretrained(adapter)
    byte_tokenizer().save_pretrained(adapter)

    ids = torch.arange(3, 60).unsqueeze(0)
    kind = hf.AutoModelForSequenceClassification
    with torch.no_grad():
        last = trained.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        wanted = trained.score_head(last)
        result = merge(path)
        merged, info = kind.from_pretrained(result.folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert (merged(ids).logits[0] - wanted).abs() < 1e-5 * wanted.abs().clamp_min(1)
        by_peft = PeftModel.from_pretrained(kind.from_pretrained(base, num_labels=1), adapter)
        assert (by_peft(ids).logits[0] - wanted).abs() < 1e-6
    before, after = stored_tensors(base), stored_tensors(result.folder)
    assert set(after) == set(before) - unused | {"score.weight"}
    assert result.changed == result.targets > 0
