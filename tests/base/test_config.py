"""A base's files that cannot be used: the message says what they are, and what it offers works when
pasted."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import byte_tokenizer, tiny_llama, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from orpo_lite.base.adapter import find_adapter
from orpo_lite.base.find import fetch_weights, find_base, load_tokenizer
from orpo_lite.base.weights import check_weights
from orpo_lite.errors import Command, ModelError, Overrides

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama's folder; read only."""
    return write_base(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(llama, tmp_path / "base")


def change(base: Path, file: str = "config.json", **values: Any) -> None:
    old = json.loads((base / file).read_text("utf-8"))
    (base / file).write_text(json.dumps(old | values), encoding="utf-8")


def refused(base: Path) -> ModelError:
    """The error of a base that is refused by what is looked at before weights load."""
    with pytest.raises(ModelError) as raised:
        found = fetch_weights(find_base(str(base), "main"))
        load_tokenizer(base)
        check_weights(found)
    return raised.value


def paste(fix: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the Python of a command in ``folder``; the folder that it says to take then."""
    assert isinstance(fix, Command)
    program, option, code = shlex.split(fix.line)
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(folder)
    exec(code, {})  # noqa: S102 - what a person would paste
    return folder / re.findall(r"model\.model_name_or_path=([^\s;]+)", fix)[0]


# --- the kinds of model


@pytest.mark.parametrize(
    ("values", "said", "fix"),
    [
        ({"model_type": "lama"}, "'lama' is not in transformers 5", "misspelt, write llama"),
        (
            {"model_type": "new9", "transformers_version": "99.1.0.dev0"},
            "'new9' is not in",
            "'transformers>=99.1.0'",
        ),
        ({"model_type": None}, "config.json has no model_type", ""),
        ({"model_type": "bert"}, "'bert' is an encoder (BertForMaskedLM)", ""),
        ({"model_type": "whisper"}, "'whisper' is an encoder-decoder", ""),
        ({"model_type": "vit"}, "'vit' is ViTModel, which is not a language model", ""),
        (
            {"model_type": "qwen2_5_vl"},
            "a multimodal model (Qwen2_5_VLForConditionalGeneration",
            "no causal language model for this model's text part (qwen2_5_vl_text)",
        ),
        ({"hidden_act": "nosuch"}, "cannot build the model: KeyError: 'nosuch'", "config.json"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads (3)", ""),
        ({"vocab_size": "98"}, "Field 'vocab_size' expected int, got str", ""),
        ({"rope_parameters": {"rope_type": "weird"}}, "KeyError: 'weird'", ""),
        ({"quantization_config": {}}, "is already quantised", "remove quantization_config or"),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            "already quantised (awq)",
            "model card",
        ),
        (
            {"compression_config": {"quant_method": "gptq"}},
            "already quantised (gptq)",
            "model card",
        ),
    ],
)
def test_what_transformers_has_is_named(
    base: Path, values: dict[str, Any], said: str, fix: str
) -> None:
    change(base, **values)
    error = refused(base)
    assert said in error.found
    assert fix in error.fix


@pytest.mark.parametrize("text", ["[]", '"llama"', "null", "{"])
def test_a_configuration_that_is_no_object(base: Path, text: str) -> None:
    (base / "config.json").write_text(text, encoding="utf-8")
    assert "is not a JSON object" in refused(base).found


def test_a_quantization_config_of_null_is_none(base: Path) -> None:
    change(base, quantization_config=None)
    assert find_base(str(base), "main").config.model_type == "llama"


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_packages_that_an_architecture_needs_are_named(base: Path) -> None:
    change(base, model_type="gemma3n")
    fix = refused(base).fix
    assert isinstance(fix, Command)
    assert "timm" in shlex.split(fix.line.removeprefix("pip install "))


# --- commands that make a base of it


def test_the_text_part_of_a_multimodal_model_is_saved(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied by the whole model's configuration and not by the text part's, as some are."""
    tower = {"image_size": 28, "patch_size": 14, "model_type": "pixtral"} | SIZES
    text = tiny_llama(98).config.to_dict() | {"tie_word_embeddings": False}
    config = hf.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=97, tie_word_embeddings=True
    )
    whole = hf.LlavaForConditionalGeneration(config).eval()
    whole.save_pretrained(base)
    error = refused(base)
    assert "a multimodal model (LlavaForConditionalGeneration" in error.found
    folder = paste(error.fix, base.parent, monkeypatch)
    check_weights(find_base(str(folder), "main"))
    ids = torch.tensor([[1, 5, 9, 20]])
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert load_tokenizer(folder)("a").input_ids == byte_tokenizer()("a").input_ids


def to_fp8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    blocks = weight.view(rows // block, block, columns // block, block)
    scales = blocks.abs().amax((1, 3)) / 448
    return (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn), scales


def test_a_quantised_base_is_dequantised(
    base: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name], 32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
        "activation_scheme": "dynamic",
    }
    change(base, quantization_config=quantization)
    error = refused(base)
    assert error.found == "is already quantised (fp8)"
    folder = paste(error.fix, base.parent, monkeypatch)
    check_weights(find_base(str(folder), "main"))
    own, made = (load_file(path / "model.safetensors") for path in (llama, folder))
    assert own.keys() == made.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(made[name].float(), tensor, rtol=0.07, atol=0.01)  # eight bits


# --- files that are others


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
@pytest.mark.parametrize("cloned", [True, False])
def test_a_pointer_is_no_file(base: Path, file: str, cloned: bool) -> None:
    (base / file).write_text(POINTER, encoding="utf-8")
    if cloned:
        (base / ".git").mkdir()
    error = refused(base)
    assert error.where == str(base / file)
    assert error.found == "is a git-lfs pointer, not the file itself"
    if cloned:
        assert isinstance(error.fix, Command)
        assert error.fix.line == f"git -C {shlex.quote(str(base))} lfs pull"


def test_an_adapter_may_be_a_pointer_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_text(POINTER, encoding="utf-8")
    with pytest.raises(ModelError, match="a git-lfs pointer"):
        find_adapter(str(tmp_path))


def test_a_tokenizer_of_a_later_release(base: Path) -> None:
    change(base, "tokenizer.json", pre_tokenizer={"type": "Later"})
    error = refused(base)
    assert "PreTokenizer" in error.found
    assert isinstance(error.fix, Command)
    assert error.fix.line == "pip install --upgrade tokenizers transformers"


def test_an_adapter_in_place_of_a_base(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base)}), encoding="utf-8"
    )
    for copied in (False, True):  # some save the base's configuration beside it
        if copied:
            shutil.copy(base / "config.json", adapter)
        error = refused(adapter)
        assert "is an adapter, not a base" in error.found
        assert isinstance(error.fix, Overrides)
        expected = {
            "model.model_name_or_path": str(base),
            "model.adapter_name_or_path": str(adapter),
        }
        assert error.fix.values == expected


@pytest.mark.parametrize("inside", ["merged", "snapshots/0123"])
def test_a_folder_around_a_base(base: Path, tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "around"
    shutil.copytree(base, folder / inside)
    error = refused(folder)
    assert isinstance(error.fix, Overrides)
    assert find_base(error.fix.values["model.model_name_or_path"], "main").path == folder / inside


@pytest.mark.parametrize(
    ("values", "said", "fix"),
    [
        (
            {"vocab_size": 128},
            "lm_head.weight is (99, 64) in model.safetensors, not (128, 64)",
            "vocab_size to 99",
        ),
        ({"hidden_size": 32}, "and 18 more", "download all files of the model again"),
        (
            {"num_key_value_heads": 4},
            "k_proj.weight is (32, 64) in model.safetensors, not (64, 64)",
            "download",
        ),
    ],
)
def test_a_configuration_of_another_model(
    base: Path, values: dict[str, int], said: str, fix: str
) -> None:
    change(base, **values)
    error = refused(base)
    assert said in error.found
    assert fix in error.fix


def test_weights_that_are_renamed_or_transposed_as_they_load_pass(tmp_path: Path) -> None:
    """A Llama saved without its prefix, and GPT-2's transposed matrices."""
    torch.manual_seed(0)
    bare = write_base(tmp_path / "bare", tiny_llama(99).model)
    change(bare, architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    gpt2 = write_base(
        tmp_path / "gpt2",
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2)),
    )
    for folder in (bare, gpt2):
        check_weights(find_base(str(folder), "main"))
    change(bare, vocab_size=128)
    assert "embed_tokens.weight is (99, 64)" in refused(bare).found
