"""Merging: block by block, equal to peft's merge, whole or not at all, and checked against base and adapter."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from bitsandbytes import functional
from conftest import OUT_OF_MEMORY, Answer, byte_tokenizer, first_and_long, tiny_llama, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import ALONE, GEMMA, GROUPED, IDS, LINEAR, LONG, SHARED, family
from test_loop import Trained, train_all
from torch import Tensor, nn

from orpo_lite import export, merge, verify
from orpo_lite.base import blocks
from orpo_lite.base.blocks import in_blocks, read_header, read_tensor, stored_tensors
from orpo_lite.base.find import fingerprint
from orpo_lite.errors import CheckpointError, Command, FitError, ModelError, RecipeError
from orpo_lite.merging.merge import round_to_4_bit
from orpo_lite.model import quantize
from orpo_lite.publishing.card_facts import CardOptions
from orpo_lite.publishing.model_card import make_card
from orpo_lite.recipe.schema import QuantizationSection, Recipe
from orpo_lite.runs.folder import find_merged
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.lock import read_lock, read_recipe
from orpo_lite.updates import run_to_end

Build = Callable[..., Recipe]
Call = Callable[..., Answer]
SIZES = GROUPED | {"hidden_size": 96, "intermediate_size": 160}


RECIPE_KEYS = ("r", "lora_alpha", "use_rslora", "use_dora")


def make_run(folder: Path, model: Any, *, four_bit: bool = True, **lora: Any) -> Path:
    """A base on disk and a run whose adapter is random, as a training leaves them."""
    base, path = write_base(folder / "base", model), folder / "run"
    adapter = path / "adapter"
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    adapted = get_peft_model(model, LoraConfig(**lora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(adapter)
    byte_tokenizer().save_pretrained(adapter)
    hf.GenerationConfig(eos_token_id=2).save_pretrained(adapter)
    text = f"model:\n  model_name_or_path: {base}\nquantization:\n  load_in_4bit: {str(four_bit).lower()}\nlora:\n"
    text += "".join(f"  {key}: {value}\n" for key, value in lora.items() if key in RECIPE_KEYS)
    (path / "recipe.yaml").write_text(f"{text}data:\n  dataset_name: none\n", encoding="utf-8")
    other = {"name": "none", "sha256": ""}
    known = {
        "name": str(base),
        "revision": None,
        "path": str(base),
        "fingerprint": fingerprint(base),
    }
    (path / "lock.json").write_text(
        json.dumps({"base": known, "data": other, "chat_template": other})
    )
    return path


def by_peft(path: Path, dtype: Any = "auto") -> Any:
    """The model that peft merges in memory."""
    base = hf.AutoModelForCausalLM.from_pretrained(path.parent / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, path / "adapter").merge_and_unload()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(torch.arange(3, 60).unsqueeze(0)).logits
    return found


def off(found: Tensor, wanted: Tensor) -> float:
    return float(
        (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    )


FAMILIES = {
    "llama": lambda: tiny_llama(98),
    "llama, tied": lambda: tiny_llama(98, tie_word_embeddings=True),
    "mistral": family("Mistral", SIZES),
    "qwen2, biases": family("Qwen2", SIZES),
    "qwen3": family("Qwen3", SIZES, head_dim=16),
    "phi3, fused projections": family("Phi3", SIZES),
    "gemma2": family("Gemma2", GEMMA),
    "opt": SHARED["opt"],
    "gpt2, stored transposed": SHARED["gpt2"],
    "bloom": ALONE["bloom: ALiBi"][0],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_is_peft_s_and_answers_as_base_and_adapter(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for key, parameter in model.named_parameters():
        if "bias" in key:
            nn.init.normal_(parameter)
    path = make_run(tmp_path, model)
    result = merge(path)
    assert result.changed == result.targets > 0
    wanted = by_peft(path)
    found = hf.AutoModelForCausalLM.from_pretrained(result.folder)
    for key, tensor in wanted.state_dict().items():
        assert off(found.state_dict()[key], tensor) <= 1e-6, key
    adapted = PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), path / "adapter"
    )
    assert (logits(found) - logits(adapted)).abs().max() <= 1e-5 * logits(
        adapted
    ).abs().max().clamp_min(1)
    base, merged = stored_tensors(tmp_path / "base"), stored_tensors(result.folder)
    assert list(base) == list(merged)  # names as they were; what is tied stays tied
    same = [key for key in base if torch.equal(read_tensor(base[key]), read_tensor(merged[key]))]
    assert len(same) == len(base) - result.targets  # each target changed, all else equal


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_each_shape_of_adapter_is_merged_as_by_peft(lora: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = make_run(tmp_path, tiny_llama(98), **lora)
    found, wanted = load_file(merge(path).folder / "model.safetensors"), by_peft(path).state_dict()
    assert max(off(tensor, wanted[key]) for key, tensor in found.items()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Against float64, no further off than peft's own."""
    torch.manual_seed(0)
    path = make_run(tmp_path, family("Llama", SIZES)().to(dtype))
    found, peft = load_file(merge(path).folder / "model.safetensors"), by_peft(path).state_dict()
    exact = by_peft(path, torch.float64).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for key, tensor in found.items():
        assert off(tensor, exact[key]) <= off(peft[key], exact[key]) * (1 + 1e-6), key


def sees(name: str, text: dict[str, Any], vision: dict[str, Any]) -> Callable[[], Any]:
    """A model that reads pictures, as its files lie on the hub; of it AutoModelForCausalLM builds the text part."""
    config = getattr(hf, f"{name}Config")
    made = config(text_config=GROUPED | IDS | text, vision_config=vision)
    return lambda: getattr(hf, f"{name}ForConditionalGeneration")(made)


QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}
QWEN_VISION["num_position_embeddings"] = 16
LLAMA_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA_VISION |= {
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "image_size": 28,
}
QWEN_TEXT = LINEAR | {"head_dim": 16}
LLAMA_TEXT = {"head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 4}
FURTHER = {  # layers that predict further tokens, which transformers does not build
    "model.layers.2.eh_proj.weight": torch.ones(64, 128),
    "model.layers.2.self_attn.q_proj.weight": torch.ones(64, 64),
    "mtp.fc.weight": torch.ones(64, 128),
}
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
# A base as it lies on the hub, what more its files hold, and an adapter.
STORED: dict[str, tuple[Callable[[], Any], dict[str, Tensor], dict[str, Any]]] = {
    "qwen3.5: a tower, other names": (sees("Qwen3_5", QWEN_TEXT, QWEN_VISION), {}, {}),
    "qwen3.5-moe": (sees("Qwen3_5Moe", QWEN_TEXT, QWEN_VISION), {}, EXPERTS),
    "llama4: experts stored as (inputs, outputs)": (sees("Llama4", LLAMA_TEXT, LLAMA_VISION), {}, EXPERTS),
    "qwen3-next: layers that predict further tokens": (
        family("Qwen3Next", GROUPED, head_dim=16, **LINEAR), FURTHER, {"target_modules": ["q_proj", "down_proj"]}
    ),
    "mixtral: experts stored one by one": (SHARED["mixtral"], FURTHER, EXPERTS),
    "hrm: two projections stored as one": (family("HrmText", LONG | {"head_dim": 16}), {}, {}),
    "gpt2: stored without the prefix": (SHARED["gpt2"], {}, {"use_dora": True}),
    "llama: an embedding": (lambda: tiny_llama(98), {}, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "llama: all but the layers of a pattern": (lambda: tiny_llama(98), {}, {"exclude_modules": r".*layers\.0.*"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_every_tensor_of_the_base_is_in_the_merged_model(name: str, tmp_path: Path) -> None:
    """Adapted as by peft, or bit by bit as it was, under its own name."""
    torch.manual_seed(0)
    make, more, lora = STORED[name]
    make().save_pretrained(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    path = make_run(tmp_path, hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hub"), **lora)
    shutil.copytree(tmp_path / "hub", tmp_path / "base", dirs_exist_ok=True)
    lock = json.loads((path / "lock.json").read_text())
    lock["base"]["fingerprint"] = fingerprint(tmp_path / "base")
    (path / "lock.json").write_text(json.dumps(lock))
    result = merge(path)
    assert result.changed == result.targets > 0
    assert json.loads((result.folder / "config.json").read_text()) == config
    found, base = load_file(result.folder / "model.safetensors"), load_file(file)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in base.items()
    }
    same = {key for key in base if torch.equal(found[key], base[key])}
    assert same >= more.keys()
    assert not [key for key in base.keys() - same if "visual" in key or "vision" in key]
    wanted = logits(by_peft(path))
    assert off(logits(hf.AutoModelForCausalLM.from_pretrained(result.folder)), wanted) <= 1e-5
    assert off(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")), wanted) > 1e-3


# --- whether it can be merged is known before it is trained


def write_adapter(folder: Path, **lora: Any) -> Path:
    """A random adapter for the workspace's base."""
    adapted = get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained("base"), LoraConfig(r=4, lora_alpha=8, **lora)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


TRAINED_ON: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"},
]


@pytest.mark.parametrize("lora", first_and_long(TRAINED_ON), ids=str)
def test_an_adapter_that_is_trained_on_can_be_merged(
    lora: dict[str, Any], small_recipe: Build, workspace: Path
) -> None:
    folder = write_adapter(workspace / "given", **lora)
    _, result = train_all(
        small_recipe("training.max_steps=2", f"model.adapter_name_or_path={folder}")
    )
    merged = merge(result.run)
    assert merged.changed == merged.targets > 0
    saved = read_header(result.run / "adapter" / "adapter_model.safetensors")
    assert not [tensor.name for tensor in saved if "base_layer" in tensor.name]
    verdict = verify(result.run)
    assert verdict.passed, verdict.explanation


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("base", "lora", "change", "said"),
    [
        (
            TIED,
            {"target_modules": ["lm_head"]},
            {},
            "lm_head is adapted and tied to model.embed_tokens",
        ),
        (
            TIED,
            {"target_modules": ["embed_tokens"]},
            {},
            "embed_tokens is adapted and tied to lm_head",
        ),
        (
            {},
            {"target_modules": ["embed_tokens"], "use_dora": True},
            {},
            "its type, Embedding with DoRA, cannot be merged",
        ),
        ({}, {"target_modules": ["q_proj"]}, {"task_type": "SEQ_CLS"}, "task_type SEQ_CLS"),
        ({}, {"target_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 2}}, "has rank 4"),
        (
            {},
            {"target_modules": ["q_proj"]},
            {"target_modules": ["q_proj", "k_proj"]},
            "lacks 2 of the layers",
        ),
        (
            {},
            {"target_modules": ["q_proj", "k_proj"]},
            {"target_modules": ["q_proj"]},
            "4 of its tensors match nothing",
        ),
        ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_not_trained(
    base: dict[str, Any],
    lora: dict[str, Any],
    change: dict[str, Any],
    said: str,
    small_recipe: Build,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_base(workspace / "base", tiny_llama(99, **base))
    folder = write_adapter(workspace / "given", **lora)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr(
        "orpo_lite.training.session.load_pair_model", lambda *_: pytest.fail("weights were loaded")
    )
    with pytest.raises(ModelError, match=said) as raised:
        train_all(small_recipe(f"model.adapter_name_or_path={folder}"))
    assert not (workspace / "run").exists()
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    if change.get("task_type"):
        train_all(small_recipe("training.max_steps=1", raised.value.fix.split(",")[0]))


def test_an_adapter_with_another_base_s_embedding_is_not_trained(
    small_recipe: Build, workspace: Path
) -> None:
    """peft saves an adapted embedding whole, and would put it in the place of the base's own."""
    folder = write_adapter(workspace / "given", target_modules=["embed_tokens"])
    write_base(workspace / "base", tiny_llama(99, initializer_range=0.1))
    with pytest.raises(ModelError, match=r"its copy of model.* differs from this base"):
        train_all(small_recipe(f"model.adapter_name_or_path={folder}"))


@pytest.mark.parametrize("given", first_and_long([True, False]))
def test_a_matrix_that_the_model_reads_by_itself_is_not_adapted(
    given: bool, small_recipe: Build, workspace: Path
) -> None:
    """Jamba's time step: an adapter beside it has an effect where the matrix is in 4 bit, and none where it is not."""
    config = (
        GROUPED
        | IDS
        | {"vocab_size": 99, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False}
    )
    write_base(
        workspace / "base", hf.JambaForCausalLM(hf.JambaConfig(**config, attn_layer_offset=1))
    )
    if given:
        folder = write_adapter(workspace / "given", target_modules=["dt_proj", "q_proj"])
        with pytest.raises(
            ModelError, match="dt_proj is adapted, but the model's code reads the weight of this"
        ):
            train_all(small_recipe(f"model.adapter_name_or_path={folder}"))
        return
    updates, result = train_all(small_recipe("training.max_steps=2", "training.learning_rate=1e-2"))
    assert any(
        "not in 4 bit and not adapted" in update.text and "dt_proj" in update.text
        for update in updates
    )
    merge(result.run)
    assert verify(result.run).passed


def test_a_base_whose_files_lack_what_is_adapted_is_not_trained(
    small_recipe: Build, workspace: Path
) -> None:
    file = workspace / "base" / "model.safetensors"
    whole = load_file(file)
    save_file(
        {key: t for key, t in whole.items() if "1.self_attn.q_proj" not in key},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ModelError, match=r"the base's files lack 1 of the adapted parameters \(model.layers.1"
    ):
        train_all(small_recipe())
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(whole | {name: torch.ones(32, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj.weight is \(32, 64\)"):
        train_all(small_recipe())


# --- onto what 4 bit left


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(1_000, 96), (65, 33), (3, 7)], ids=str)
@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16], ids=str)
def test_weights_go_through_4_bit_as_in_training(
    nested: bool, shape: tuple[int, int], trained_in: torch.dtype, tmp_path: Path
) -> None:
    """By blocks of rows as bitsandbytes does the whole; stored in float16, as Llama 2 is."""
    torch.manual_seed(0)
    matrix = torch.randn(shape).half()
    save_file({"w": matrix}, tmp_path / "w.safetensors")
    (stored,) = read_header(tmp_path / "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 64 * 96 * 2)
        pieces = [(rows, blocks.read_rows(rows)) for rows in in_blocks(stored)]
    found = torch.cat(
        [
            block
            for _, block in round_to_4_bit(
                pieces, QuantizationSection(bnb_4bit_use_double_quant=nested), trained_in
            )
        ]
    )
    given = matrix.to(trained_in)
    packed, state = functional.quantize_4bit(given, quant_type="nf4", compress_statistics=nested)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    scales = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        if nested
        else state.absmax
    )
    wanted = (state.code[codes] * scales.repeat_interleave(64)[: len(codes)])[
        : matrix.numel()
    ].view(shape)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2, stored transposed"])
def test_the_dequantised_base_is_the_one_that_was_trained_on(name: str, tmp_path: Path) -> None:
    path = make_run(tmp_path, FAMILIES[name]())
    result = merge(path, weights="dequantized")
    assert result.folder == path / "merged-dequantized"
    four_bit = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=four_bit, device_map={"": "cpu"}
    )
    trained = PeftModel.from_pretrained(base, path / "adapter")
    found = hf.AutoModelForCausalLM.from_pretrained(result.folder)
    adapted = [(n, m) for n, m in trained.named_modules() if getattr(m, "lora_A", None)]
    for key, layer in adapted:
        packed = layer.base_layer.weight
        product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        wanted = functional.dequantize_4bit(packed.data, packed.quant_state) + product
        module = found.get_submodule(key.removeprefix("base_model.model."))
        assert (
            off(module.weight.t() if name.startswith("gpt2") else module.weight, wanted) <= 1e-6
        ), key
    assert len(adapted) == result.targets
    assert (
        off(logits(found), logits(hf.AutoModelForCausalLM.from_pretrained(merge(path).folder)))
        > 1e-3
    )
    assert json.loads((result.folder / "merge.json").read_text())["weights"] == "dequantized"


def test_rows_that_a_kernel_errs_on_stay_in_16_bit_and_are_merged_so(
    small_recipe: Build, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 96 elements, down_proj's here: some kernels of bitsandbytes 0.50 err on them, by the CPU."""
    monkeypatch.setattr(quantize, "wrong_widths", lambda widths: widths & {96})
    write_base(workspace / "base", tiny_llama(99, intermediate_size=96))
    updates, result = train_all(small_recipe("training.learning_rate=1e-2"))
    assert any(
        "down_proj and similar layers are not quantised" in update.text for update in updates
    )
    assert "model.layers.0.mlp.down_proj" in read_lock(result.run)["not_quantised"]
    assert read_lock(result.run)["dtype"] == "float32"  # which the weights go through 4 bit in
    assert merge(result.run, weights="dequantized").changed > 0
    verdict = verify(result.run, weights="dequantized")
    assert verdict.passed, verdict.explanation


def test_what_was_trained_in_16_bit_has_no_dequantised_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="16-bit weights"):
        merge(make_run(tmp_path, tiny_llama(98), four_bit=False), weights="dequantized")


# --- refusals


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    trained_on = fingerprint(tmp_path / "base")
    nn.init.normal_((other := tiny_llama(98)).model.embed_tokens.weight)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelError, match=f"{fingerprint(tmp_path / 'base')[:12]}, not {trained_on[:12]}"
    ):
        merge(path)
    assert not (path / "merged").exists()


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_an_adapter_that_changes_nothing_is_refused(scale: float, tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    file = path / "adapter" / "adapter_model.safetensors"
    save_file(
        {key: t * (scale if "lora_B" in key else 1) for key, t in load_file(file).items()}, file
    )
    with pytest.raises(
        ModelError, match="changes nothing: after rounding, 14 of 14 adapted matrices are equal"
    ):
        merge(path)
    assert not [entry for entry in path.iterdir() if "merged" in entry.name]


def test_a_trial_that_has_learnt_nothing_is_no_fault(
    call: Call, small_recipe: Build, workspace: Path
) -> None:
    recipe = small_recipe(
        "training.max_steps=1"
    )  # at the first step of a warm-up the learning rate is 0
    (workspace / "trial.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    code, said, complaint = call("train", "--recipe", "./trial.yaml")
    assert code == 0, complaint
    assert "not merged: adapter run/adapter changes nothing" in said
    assert call("merge", "run")[0] == ModelError.exit_code


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight",
            "1 of its tensors match nothing",
        ),
        (
            "base_model.model.model.layers.0.mlp.up_proj.lora_C.weight",
            "1 of its tensors match nothing",
        ),
        ("anything", "1 of its tensors match nothing"),
    ],
)
def test_keys_that_match_nothing_are_refused(key: str, said: str, tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    file = path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {key: torch.ones(2, 2)}, file)
    with pytest.raises(ModelError, match=said):
        merge(path)


def test_a_layer_that_is_lacking_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    file = path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({key: tensor for key, tensor in whole.items() if "layers.0.mlp" not in key}, file)
    with pytest.raises(
        ModelError,
        match=r"lacks 3 of the layers that its configuration selects \(model.layers.0.mlp",
    ):
        merge(path)
    next(tensor for key, tensor in whole.items() if "lora_B" in key)[0, 0] = float("nan")
    save_file(whole, file)
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        merge(path)


def test_a_merge_of_another_adapter_is_not_used(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    merge(path)
    assert find_merged(path) == path / "merged"
    file = path / "adapter" / "adapter_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="was made from another adapter"):
        find_merged(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": 80}, "lora_alpha is 80"),
        ({"r": 2}, "r is 2"),
        ({"r": None}, "r is None"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank 4, but its adapter_config.json says 2"),
        ({"target_modules": None}, "has no target_modules"),
        ({"alpha_pattern": {"q_proj": 3}, "lora_alpha": 8.5}, "lora_alpha is 8.5"),
    ],
)
def test_a_config_that_is_not_the_adapter_s_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Another scale would make another model of the same tensors, and nothing would be seen."""
    path = make_run(tmp_path, tiny_llama(98))
    merge(path)
    file = path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((CheckpointError, ModelError), match=said):
        merge(path)
    with pytest.raises(CheckpointError, match="was made from another adapter"):
        find_merged(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora_alpha: 32", "lora_alpha: 64"),
        ("use_rslora: false", "use_rslora: true"),
        ("r: 16", "r: 8"),
    ],
)
def test_a_recipe_that_was_changed_makes_no_other_adapter(
    old: str, new: str, trained: Trained
) -> None:
    """Gone on with, the same tensors would be saved under another scale, and published with figures of the first."""
    _, result = trained
    file = result.run / "recipe.yaml"
    assert f"  {old}\n" in file.read_text()
    file.write_text(file.read_text().replace(f"  {old}\n", f"  {new}\n"))
    for verb in (merge, verify, lambda path: train_all(read_recipe(path), resume=True)):
        with pytest.raises(
            CheckpointError, match=f"lora.{old.split(':')[0]}: .*\n.*as at the start of the run"
        ) as raised:
            verb(result.run)
        key, _, value = old.partition(": ")
        assert raised.value.fix.line == f"orpo-lite train --resume run lora.{key}={value}"


def test_where_the_base_lies_is_no_part_of_an_adapter(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    merge(path)
    file = path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    assert find_merged(path) == path / "merged"
    file.write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 3}}))
    with pytest.raises(CheckpointError, match="was made from another adapter"):
        find_merged(path)


def test_where_the_base_once_lay_is_not_merged_in(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"_name_or_path": "/home/ann/base"})
    )
    lock = json.loads((path / "lock.json").read_text())
    lock["base"]["fingerprint"] = fingerprint(tmp_path / "base")
    (path / "lock.json").write_text(json.dumps(lock))
    assert json.loads((merge(path).folder / "config.json").read_text()) == config


def test_other_pairs_are_not_called_held_out(trained: Trained, workspace: Path) -> None:
    _, result = trained
    merge(result.run)
    pairs = workspace / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("how is it", "what about it"))
    with pytest.raises(CheckpointError, match="changed since the run began"):
        verify(result.run)


def test_a_base_that_was_moved_is_found_by_its_new_place(
    call: Call, trained: Trained, workspace: Path
) -> None:
    _, result = trained
    (workspace / "base").rename(workspace / "moved base")
    code, _, complaint = call("merge", str(result.run), "--verify")
    assert (code, "fix: orpo-lite merge run --base-path FOLDER" in complaint) == (4, True)
    code, said, complaint = call("merge", str(result.run), "--verify", "--base-path", "moved base")
    assert code == 0, complaint
    assert "passed: log-probabilities differ by" in said
    write_base(workspace / "other", tiny_llama(99, initializer_range=0.1))
    code, _, complaint = call("merge", str(result.run), "--base-path", "other")
    assert (code, "is not the base of this run" in complaint) == (4, True)
    assert call("merge", str(result.run), "--base-path", "nowhere")[0] == 4
    assert "does not exist any more" in call("export", str(result.run), "--to", "vllm")[1]


@pytest.mark.parametrize("kind", ["symbolic link", "file"])
def test_what_is_no_folder_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path, elsewhere = make_run(tmp_path, tiny_llama(98)), tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "file":
        (path / "merged").write_text("mine")
    else:
        (path / "merged").symlink_to(elsewhere)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"is a {kind}"):
            merge(path)
    assert (path / "merged").is_symlink() or (path / "merged").read_text() == "mine"


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    merge(path)
    (path / "merged").rename(path / ".merged.old")
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError):
        merge(path)
    assert (path / "merged" / "model.safetensors").is_file()


def said_where_it_does_not_fit(code: str, path: Path) -> str:
    """The complaint of a merge in a process of its own, which must leave nothing behind."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == FitError.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert not [entry for entry in path.iterdir() if "merged" in entry.name]
    return done.stderr


@pytest.mark.long
def test_a_limit_on_files_is_not_a_full_disk(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    code = (
        "import resource, signal, sys, orpo_lite; from orpo_lite.cli import app as commands; import bitsandbytes, tempfile\n"
        "tempfile.gettempdir(); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "sys.argv = ['orpo-lite', 'merge', sys.argv[1]]; commands.main()"
    )
    assert "the file is larger than the system's size limit" in said_where_it_does_not_fit(
        code, path
    )


def test_a_tokenizer_that_is_lacking_is_missed_before_the_merge(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    (path / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=f"tokenizer in {path}/adapter"):
        merge(path)


def test_a_folder_that_cannot_be_written_to_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    (path / ".lock").mkdir()  # as root nothing else refuses
    with pytest.raises(CheckpointError, match="cannot be written to"):
        merge(path)


def test_a_tied_head_is_not_changed_behind_the_embedding_s_back(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98, tie_word_embeddings=True), target_modules=["lm_head"])
    with pytest.raises(ModelError, match="lm_head is adapted and tied to"):
        merge(path)


def test_a_sum_beyond_float16_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98).half())
    file = path / "adapter" / "adapter_model.safetensors"
    save_file({key: t * 1e4 for key, t in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="overflows float16"):
        merge(path)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_a_file_that_is_no_safetensors_is_refused(data: bytes) -> None:
    file = Path(f"/tmp/orpo-lite-test-{os.getpid()}.safetensors")
    file.write_bytes(data)
    try:
        read_header(file)
    except ModelError:
        pass
    finally:
        file.unlink()


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_refused(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(30, 30), "b": torch.ones(3)}, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match="cannot be read"):
        read_header(file)


# --- files


def test_files_of_weights_are_read_and_written_as_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(70, 3), "b.bf16": torch.randn(5).bfloat16(), "c": torch.tensor(3.0), "d": torch.arange(4),
        "empty": torch.empty(0, 3), "e": torch.randn(129, 4, 2).half(), "yes": torch.tensor([True]),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert all(torch.equal(read_tensor(stored[name]), tensor) for name, tensor in tensors.items())
    for most, count in ((10**9, 1), (300, 6)):
        folder = tmp_path / str(most)
        folder.mkdir()
        files = blocks.split_into_files(stored.values(), most)
        pieces = (
            blocks.read_rows(rows) for held in files for each in held for rows in in_blocks(each)
        )
        assert list(blocks.write_model(folder, files, pieces))[-1] == sum(
            t.nbytes for t in tensors.values()
        )
        assert len(list(folder.glob("*.safetensors"))) == len(files) >= count - 3
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_shards_are_what_transformers_loads(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    whole = logits(hf.AutoModelForCausalLM.from_pretrained(merge(path).folder))
    result = merge(path, max_shard_size=20_000)
    assert len(list(result.folder.glob("*.safetensors"))) > 3
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(result.folder)), whole)


def test_what_is_beside_the_weights(trained: Trained, workspace: Path) -> None:
    _, result = trained
    merged = merge(result.run)
    tokenizer = hf.AutoTokenizer.from_pretrained(merged.folder)
    assert "<|assistant|>" in tokenizer.chat_template
    assert hf.GenerationConfig.from_pretrained(merged.folder).eos_token_id in ([2], 2)
    assert "quantization_config" not in json.loads((merged.folder / "config.json").read_text())
    assert not any(str(workspace).encode() in file.read_bytes() for file in merged.folder.iterdir())


# --- faults


def test_killed_at_any_time_there_is_a_whole_model_or_none(tmp_path: Path) -> None:
    """Twenty kills of a bigger model are in benchmarks/merge.py."""
    path = make_run(
        tmp_path,
        family("Llama", SIZES, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)(),
    )

    def start() -> Any:
        process = multiprocessing.get_context("fork").Process(
            target=merge, args=(path,)
        )  # it has nothing to import
        process.start()
        return process

    def wait(process: Any) -> None:
        process.join()
        assert process.exitcode == 0

    began = time.monotonic()
    wait(start())
    longest, whole = time.monotonic() - began, load_file(path / "merged" / "model.safetensors")
    for number in range(2):
        shutil.rmtree(path / "merged")
        process = start()
        time.sleep(longest * (0.5 + 0.3 * number))
        process.kill()
        process.join()
        if not (path / "merged").exists():
            wait(start())  # nothing that is left is in the way
        found = load_file(path / "merged" / "model.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())
        assert {entry.name for entry in path.iterdir()} >= {"adapter", "merged"}
        assert not (path / ".merged.tmp").exists()


@pytest.mark.long
def test_too_little_memory_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path, tiny_llama(98))
    code = (
        "import resource, sys, transformers.models.llama.modeling_llama, peft, orpo_lite, bitsandbytes\n"
        "from orpo_lite.base import blocks\n"
        "from orpo_lite.cli import app as commands\n"
        "from orpo_lite.merging import merge\n"
        "import importlib, torch; read = blocks.read_rows\n"
        "def starved(rows):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))\n"
        "    torch.empty(1 << 28)\n"  # more than is left
        "    return read(rows)\n"
        "merge.read_rows = starved\n"
        "sys.argv = ['orpo-lite', 'merge', sys.argv[1]]; commands.main()"
    )
    assert "memory ran out" in said_where_it_does_not_fit(code, path)


@pytest.mark.long
def test_a_model_much_larger_than_a_block_needs_no_memory_of_its_size(tmp_path: Path) -> None:
    """300 MB of weights under a limit of 160 MB more than the process has; benchmarks/merge.py measures 3 GB."""
    config = hf.LlamaConfig(
        **(SIZES | IDS | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5})
    )
    model = hf.LlamaForCausalLM(config)
    path = make_run(tmp_path, model)
    size = sum(stored.nbytes for stored in stored_tensors(tmp_path / "base").values())
    assert size > 250 << 20
    code = (
        "import sys, transformers.models.llama.modeling_llama, peft, bitsandbytes; from orpo_lite import merge\n"
        "import pathlib, resource\n"
        "key = lambda name: next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if name in line)\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5'); before = key('VmRSS')\n"
        "merge(sys.argv[1]); print(key('VmHWM') - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1]) < size // 2


# --- verify


def test_a_merged_model_is_verified_from_the_command_line(
    call: Call, trained: Trained, workspace: Path
) -> None:
    _, result = trained
    for base in ("original", "dequantized"):
        code, said, complaint = call(
            "merge", str(result.run), "--base", base, "--verify", "--max-shard-size", "50KB"
        )
        assert code == 0, complaint
        assert "passed: log-probabilities differ by" in said
        assert "4-bit base + adapter, as trained" in said
        assert "of the adapter's gain in log odds" in said
    kept = json.loads((result.run / "merged" / "verify.json").read_text())
    assert (kept["passed"], kept["held_out"], len(kept["rows"])) == (True, True, 3)
    card = (result.run / "README.md").read_text()
    assert "Merged onto the base's own weights:\n\n| 8 held-out pairs" in card
    assert "Merged onto the base's weights as rounded to 4 bit in training:" in card
    merge(result.run, weights="dequantized")  # made anew, and not measured
    make = make_card(result.run, CardOptions(merged="dequantized"))
    assert "Check of the merge" not in make
    assert make_card(result.run).count("| merged |") == 1
    assert len(list((result.run / "merged").glob("*.safetensors"))) > 1
    for size in ("lots", "0", "-1GB", "5"):
        code, _, complaint = call("merge", str(result.run), "--max-shard-size", size)
        assert (code, "a number and a unit" in complaint) == (2, True), size
    for wrong in (0, -1, "much"):
        with pytest.raises(RecipeError, match="--max-shard-size"):
            merge(result.run, max_shard_size=wrong)
    for verb in (merge, verify):
        with pytest.raises(RecipeError, match="one of original, dequantized"):
            verb(result.run, weights="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", first_and_long([torch.bfloat16, torch.float16]))
def test_in_16_bit_rounding_passes_and_a_lost_adapter_does_not(
    dtype: torch.dtype, small_recipe: Build, workspace: Path
) -> None:
    write_base(workspace / "base", tiny_llama(99).to(dtype))
    _, result = train_all(small_recipe("training.learning_rate=1e-2"))
    for base in ("original", "dequantized"):
        merge(result.run, weights=base)
        verdict = verify(result.run, weights=base)
        assert verdict.passed, verdict.explanation
    shutil.copy(
        workspace / "base" / "model.safetensors", result.run / "merged" / "model.safetensors"
    )
    assert verdict.kept is not None
    assert verdict.kept.share.value == pytest.approx(1, abs=0.05)
    verdict = verify(result.run)
    assert not verdict.passed
    assert verdict.difference == pytest.approx(verdict.effect, rel=0.05)
    assert verdict.kept is not None
    assert verdict.kept.share.value == pytest.approx(0, abs=0.05)


def test_a_run_of_another_device_is_compared_on_its_own_4_bit_base(trained: Trained) -> None:
    """Quantised from bfloat16, as on a GPU: of the base in float32 the merged model is another."""
    _, result = trained
    file = result.run / "lock.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    merge(result.run, weights="dequantized")
    verdict = verify(result.run, weights="dequantized")
    assert verdict.outcome == "passed", verdict.explanation
    assert verdict.difference < 0.1 * verdict.effect


@pytest.mark.long
def test_an_adapter_that_changes_less_than_rounding_is_no_failure(
    small_recipe: Build, call: Call
) -> None:
    keys = ("model.dtype=bfloat16", "training.learning_rate=1e-4", "training.max_steps=2")
    _, result = train_all(small_recipe(*keys, "training.warmup_steps=0"))
    code, said, complaint = call("merge", str(result.run), "--verify")
    assert code == 0, complaint
    assert "cannot tell: log-probabilities differ by" in said
    assert "less than rounding to 16 bit" in said


@pytest.mark.parametrize("error", first_and_long(OUT_OF_MEMORY), ids=str)
def test_a_gpu_that_is_too_small_to_verify_on_is_said(
    error: RuntimeError, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any) -> None:
        raise error

    _, result = trained
    merge(result.run)
    monkeypatch.setattr("orpo_lite.evaluation.verify.load_merged", explode)
    with pytest.raises(FitError, match="the GPU is out of memory") as raised:
        verify(result.run)
    assert isinstance(raised.value.fix, Command)
    assert raised.value.fix.line == f"CUDA_VISIBLE_DEVICES= orpo-lite merge {result.run} --verify"


def test_the_template_writes_the_bos_that_training_had(trained: Trained, workspace: Path) -> None:
    """The base has no template, its tokenizer writes a bos: who renders the saved template gets what was trained on."""
    _, result = trained
    tokenizer = hf.AutoTokenizer.from_pretrained(merge(result.run).folder)
    turns = [{"role": "user", "content": "How is it?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    (pair, *_) = run_to_end(prepare_inputs(read_recipe(result.run)), lambda _: None).train
    assert list(pair.chosen_ids[: pair.chosen_start])[:2] == ids[:2]


def test_a_merged_model_that_is_another_fails(
    call: Call, small_recipe: Build, workspace: Path
) -> None:
    _, result = train_all(small_recipe("training.learning_rate=1e-2", "data.test_split_size=0"))
    with pytest.raises(CheckpointError, match="orpo-lite merge run"):
        verify(result.run)
    merged = merge(result.run)
    file = merged.folder / "model.safetensors"
    shutil.copy(workspace / "base" / "model.safetensors", file)  # a merge that has lost the adapter
    verdict = verify(result.run)
    assert not verdict.passed
    assert not verdict.held_out
    assert verdict.difference > verdict.bound


@pytest.mark.long
def test_a_model_around_the_one_that_is_trained_is_merged_and_served_whole(
    small_recipe: Build, workspace: Path
) -> None:
    torch.manual_seed(0)
    write_base(workspace / "base", sees("Llama4", LLAMA_TEXT | {"vocab_size": 99}, LLAMA_VISION)())
    _, result = train_all(
        small_recipe(
            "training.learning_rate=1e-2", "training.max_steps=3", "lora.target_modules=q_proj"
        )
    )
    merged = merge(result.run)
    verdict = verify(result.run)
    assert verdict.passed, verdict.explanation
    exported = export(result.run, "vllm")
    assert f"vllm serve {merged.folder.resolve()} " in exported.command
    assert "an adapter of a part of the base" in exported.notes[0]
    assert "vLLM cannot serve this adapter" in (result.run / "README.md").read_text()
    file = merged.folder / "model.safetensors"
    kept = {
        key: tensor
        for key, tensor in load_file(file).items()
        if "vision_model.layernorm_pre" not in key
    }
    save_file(kept, file, metadata={"format": "pt"})
    verdict = verify(result.run)
    assert not verdict.passed
    assert "of the base's tensors are missing (vision_model.layernorm_pre" in verdict.explanation
