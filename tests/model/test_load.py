"""The base in 4 bit with LoRA on it: what is quantised, what trains, what is refused; one maths however it runs."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf
from conftest import ragged_pairs, tiny_llama, tiny_opt, write_base
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lite.base.find import check_targets, fetch_weights, find_base, linear_names
from orpo_lite.data.packing import PairBatch, pad_pairs
from orpo_lite.errors import ModelError, RecipeError
from orpo_lite.model.adapter import adapter_tensors, set_adapter
from orpo_lite.model.load import choose_dtype, load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.quantize import bypassed_layers
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.ops.devices import device_kind
from orpo_lite.recipe.schema import Recipe

CPU = torch.device("cpu")
LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama's folder; read only."""
    return write_base(tmp_path_factory.mktemp("llama") / "base")


def recipe_on(base: Path | str, **values: Any) -> Recipe:
    """A recipe by its keys: ``lora__r=4`` is ``lora.r: 4``."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": str(base)},
        "data": {"dataset_name": "none"},
    }
    for key, value in values.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return Recipe.model_validate(tree)


def load(folder: Path, **values: Any) -> PairModel:
    recipe = recipe_on(folder, **values)
    base = fetch_weights(find_base(str(folder), "main"))
    check_targets(recipe, base)
    return load_pair_model(recipe, base, CPU)


def some_batch(count: int = 3, vocab_size: int = 96) -> PairBatch:
    return pad_pairs(
        ragged_pairs(count, vocab_size=vocab_size), pad_id=0, completion_only_loss=False
    )


def shake(model: PairModel) -> None:
    """Fill LoRA's B, which begins at zero and would hide A's gradients."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def step(model: PairModel, batch: PairBatch, seed: int = 3) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch and its gradients."""
    torch.manual_seed(seed)  # of dropout
    model.zero_grad()
    logps = model(batch)
    divisors = Divisors(len(logps.chosen_P), int(logps.nll_tokens_P.sum()))
    loss, _ = orpo_loss(logps, divisors, beta=0.1)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.trained() if p.grad is not None}


def lora_layers(model: PairModel) -> dict[str, LoraLayer]:
    return {
        name.rsplit(".", 1)[-1]: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- what is quantised and what trains


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_linear_but_the_head_is_nf4_and_lora_alone_trains_in_float32(
    llama: Path, dtype: str
) -> None:
    model = load(llama, model__dtype=dtype)
    plain = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "lora_" not in name
    ]
    assert [name.rsplit(".", 1)[-1] for name in plain] == ["lm_head"]
    quantised = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    own = {name: module for name, module in quantised.items() if name.endswith("base_layer")}
    assert {name.split(".")[-2] for name in own} == LLAMA_LINEARS
    assert (
        len(own)
        == 2 * len(LLAMA_LINEARS)
        == len([m for m in model.modules() if isinstance(m, LoraLayer)])
    )
    for module in own.values():
        assert module.weight.dtype == torch.uint8
        assert module.weight.quant_state.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.compute_dtype == getattr(torch, dtype)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        expected = (
            torch.uint8
            if "base_layer" in name
            else torch.float32
            if "lora_" in name
            else getattr(torch, dtype)
        )
        assert parameter.dtype == expected, name
    kept = [
        name
        for name, _ in model.named_parameters()
        if "base_layer" not in name and "lora_" not in name
    ]
    assert sum("norm" in name for name in kept) == 5
    assert sum("embed_tokens" in name or "lm_head" in name for name in kept) == 2
    assert len(model.trained()) == sum("lora_" in name for name, _ in model.named_parameters())


def test_without_quantisation_the_linears_stay(llama: Path) -> None:
    model = load(llama, quantization__load_in_4bit=False)
    assert not [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(model.trained()) == 2 * 2 * len(LLAMA_LINEARS)


def test_quantisation_follows_the_recipe(llama: Path) -> None:
    options = {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    model = load(llama, **{f"quantization__{key}": value for key, value in options.items()})
    layer = next(module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == ("fp4", False)
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_steps_are_finite_and_near_the_float32_one(llama: Path, dtype: str) -> None:
    (exact, exact_grads), (loss, grads) = (
        step(load(llama, model__dtype=d), some_batch()) for d in ("float32", dtype)
    )
    assert math.isfinite(loss)
    assert loss == pytest.approx(exact, rel=0.02)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    ours, theirs = (
        torch.cat([g.flatten() for g in every.values()]) for every in (grads, exact_grads)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


# --- the adapter's options


def test_lora_options_reach_peft(llama: Path) -> None:
    model = load(
        llama, lora__r=4, lora__lora_alpha=12, lora__lora_dropout=0.25, lora__use_rslora=True
    )
    for layer in lora_layers(model).values():
        assert layer.r["default"] == 4
        assert layer.scaling["default"] == pytest.approx(12 / math.sqrt(4))
        assert layer.lora_dropout["default"].p == 0.25
    assert (
        lora_layers(load(llama, lora__r=4, lora__lora_alpha=12))["q_proj"].scaling["default"] == 3
    )


def test_dora(llama: Path) -> None:
    model = load(llama, lora__use_dora=True)
    _, grads = step(model, some_batch())
    magnitudes = {name: grad for name, grad in grads.items() if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 2 * len(LLAMA_LINEARS)
    assert all(grad.abs().sum() > 0 for grad in magnitudes.values())


def test_initialisations_and_their_seed(llama: Path) -> None:
    def first(**values: Any) -> dict[str, Tensor]:
        return adapter_tensors(load(llama, lora__r=8, **values))

    kaiming = first()
    a = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    assert not kaiming[b].any()
    assert kaiming[a].abs().max() <= 1 / math.sqrt(128)  # uniform
    assert all(torch.equal(kaiming[name], tensor) for name, tensor in first().items())
    assert not torch.equal(kaiming[a], first(training__seed=7)[a])
    gaussian = first(lora__init_lora_weights="gaussian")[a]
    assert gaussian.abs().max() > 1 / math.sqrt(128)
    assert gaussian.std().item() == pytest.approx(1 / 8, rel=0.2)
    orthogonal = first(lora__init_lora_weights="orthogonal")
    assert orthogonal[a].any()
    assert orthogonal[b].any()
    assert (orthogonal[b] @ orthogonal[a]).abs().max() < 1e-6  # the model begins as the base
    with pytest.raises(RecipeError, match="even"):
        load(llama, lora__r=3, lora__init_lora_weights="orthogonal")


def test_a_list_of_targets(llama: Path) -> None:
    assert set(lora_layers(load(llama, lora__target_modules=["q_proj", "v_proj"]))) == {
        "q_proj",
        "v_proj",
    }
    one = load(llama, lora__target_modules=["layers.1.mlp.up_proj"])
    assert len(one.trained()) == 2


@pytest.mark.parametrize(
    "targets", [["typo"], ["q_proj", "typo"], ["q_proj", "lm_head.typo"], ["layers.7.q_proj"]]
)
def test_a_target_that_matches_nothing(llama: Path, targets: list[str]) -> None:
    with pytest.raises(ModelError, match=targets[-1]) as raised:
        load(llama, lora__target_modules=targets)
    assert all(name in raised.value.expected for name in LLAMA_LINEARS)
    assert "all-linear" in raised.value.fix


# --- bases that are refused


def test_weights_that_are_missing_are_never_left_random(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    lost = "model.layers.1.mlp.up_proj.weight"
    rewrite_weights(folder, lambda tensors: tensors.pop(lost))
    with pytest.raises(
        ModelError, match=r"weights that are missing .*: 1 .*model.layers.1.mlp.up_proj.weight"
    ):
        load(folder)


def test_a_weight_of_another_shape(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    rewrite_weights(
        folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 64)})
    )
    with pytest.raises(ModelError, match=r"up_proj"):
        load(folder)


def test_a_broken_weight_file(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"safetensors"):
        load(folder)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "../base/model.safetensors"])
def test_an_index_whose_files_are_not_all_there(llama: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"lm_head.weight": name, "model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"00002-of-00002|outside"):
        find_base(str(folder), "main")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("auto_map", {"AutoModelForCausalLM": "code.Model"}, "needs Python code"),
        ("quantization_config", {"quant_method": "gptq"}, "already quantised"),
        ("model_type", "t5", "causal"),
        ("is_encoder_decoder", True, "causal"),
    ],
)
def test_a_configuration_that_cannot_be_trained(
    llama: Path, tmp_path: Path, key: str, value: Any, match: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match=match):
        find_base(str(folder), "main")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a JSON object"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "safetensors",
        ),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_folder_that_is_no_base(
    llama: Path, tmp_path: Path, spoil: Callable[[Path], object], match: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    spoil(folder)
    with pytest.raises(ModelError, match=match):
        find_base(str(folder), "main")


def test_the_fingerprint_tells_bases_apart(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")

    def taken() -> str:
        return fetch_weights(find_base(str(folder), "main")).fingerprint

    assert taken() == fetch_weights(find_base(str(llama), "main")).fingerprint
    before = taken()
    rewrite_weights(
        folder, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].mul_(1.001)
    )
    assert taken() != before
    shutil.copy(llama / "model.safetensors", folder)
    assert taken() == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert taken() != before


# --- activation checkpointing


def flagged(model: PairModel) -> list[bool]:
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    return [layer.gradient_checkpointing for layer in layers]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_loss_and_no_gradient(llama: Path, dropout: float) -> None:
    results = {}
    for amount, layers in {
        "none": [False, False],
        "all": [True, True],
        1: [True, False],
        0: [False, False],
    }.items():
        model = load(llama, memory__activation_checkpointing=amount, lora__lora_dropout=dropout)
        shake(model)
        assert flagged(model) == layers
        results[amount] = step(model, some_batch())
    loss, grads = results.pop("none")
    for other_loss, other_grads in results.values():
        assert other_loss == loss
        assert all(torch.equal(other_grads[name], grad) for name, grad in grads.items())
    assert (
        dropout == 0
        or step(load(llama, lora__lora_dropout=dropout), some_batch(), seed=4)[0] != loss
    )


def test_checkpointing_recomputes_the_layers_it_should(llama: Path) -> None:
    calls = []
    for amount in ("none", 1, "all", "auto"):
        model = load(llama, memory__activation_checkpointing=amount)
        count: list[int] = []
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.self_attn.register_forward_hook(lambda *_, count=count: count.append(1))
        step(model, some_batch())
        calls.append(len(count))
    assert calls == [2, 3, 4, 4]


# --- evaluation in between


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often bitsandbytes repacked a weight, on a CPU that it takes for one with AVX512-BF16."""
    calls: list[int] = []

    def spy(weight: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
        calls.append(1)
        return (
            weight,
            quant_state,
        )  # the real one is not run: this machine may lack the kernel for what it makes

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", spy)
    return calls


def test_plain_eval_would_repack_the_weights_and_ours_does_not(
    llama: Path, packed: list[int]
) -> None:
    model = load(llama, memory__fused_lora=False)  # the fused operation never calls the trap
    with model.evaluating():
        model(some_batch())
    assert packed == []
    torch.nn.Module.train(model, False)
    with torch.no_grad():
        model(some_batch())
    assert len(packed) == 2 * len(
        LLAMA_LINEARS
    )  # the trap is there: without it this test shows nothing


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_evaluation_changes_no_bit_of_training(
    llama: Path, packed: list[int], dropout: float, fused: bool
) -> None:
    model = load(llama, lora__lora_dropout=dropout, memory__fused_lora=fused)
    shake(model)
    modes = [module.training for module in model.modules()]
    loss, grads = step(model, some_batch())
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with model.evaluating():
        first, second = model(some_batch()), model(some_batch())
        assert not first.chosen_P.requires_grad
        assert torch.equal(first.chosen_P, second.chosen_P)  # no dropout
    assert [module.training for module in model.modules()] == modes
    again, grads_again = step(model, some_batch())
    assert again == loss
    assert grads.keys() == grads_again.keys() == dict(model.trained()).keys()
    assert all(torch.equal(grad, grads_again[name]) for name, grad in grads.items())
    assert all(
        torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters()
    )
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert not any(
        getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers
    )


def test_training_goes_on_after_an_evaluation_that_failed(llama: Path) -> None:
    model = load(llama)
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), model.evaluating():
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert any(modes)


# --- training on from an adapter


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A shaken rank-4 adapter on disk, and its tensors."""
    model = load(llama, lora__r=4, lora__target_modules=["q_proj", "up_proj"])
    shake(model)
    model.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapter_tensors(model)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_training_on_starts_from_the_adapters_weights(
    llama: Path, adapter: tuple[Path, dict[str, Tensor]], init: bool | str
) -> None:
    folder, tensors = adapter
    change_adapter(folder, init_lora_weights=init)
    model = load(llama, model__adapter_name_or_path=str(folder), model__dtype="bfloat16")
    assert adapter_tensors(model).keys() == tensors.keys()
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in adapter_tensors(model).items()
    )
    assert {parameter.dtype for _, parameter in model.trained()} == {torch.float32}
    _, grads = step(model, some_batch())
    assert len(grads) == len(tensors)


def test_tensors_of_an_adapter_go_out_and_in(
    llama: Path, adapter: tuple[Path, dict[str, Tensor]]
) -> None:
    _, tensors = adapter
    model = load(llama, lora__r=4, lora__target_modules=["q_proj", "up_proj"])
    set_adapter(model, tensors)
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in adapter_tensors(model).items()
    )
    with pytest.raises(ModelError, match=r"\(in all: 1\)"):
        set_adapter(model, dict(list(tensors.items())[1:]))
    first = next(iter(tensors))
    before = adapter_tensors(model)
    with pytest.raises(ModelError, match="lora_"):
        set_adapter(model, tensors | {first: torch.zeros(2, 2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


def change_adapter(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "no adapter_model.safetensors",
        ),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (partial(change_adapter, modules_to_save=["lm_head"]), "modules_to_save.*lm_head"),
        (partial(change_adapter, bias="all"), "bias"),
        (partial(change_adapter, peft_type="IA3"), "IA3"),
        (partial(change_adapter, target_modules=["q_proj", "up_proj", "v_proj"]), "v_proj"),
        (partial(change_adapter, init_lora_weights="pissa"), "pissa"),
        (partial(change_adapter, r=8), "adapter"),
    ],
)
def test_an_adapter_that_is_refused(
    llama: Path,
    adapter: tuple[Path, dict[str, Tensor]],
    spoil: Callable[[Path], object],
    match: str,
) -> None:
    folder, _ = adapter
    spoil(folder)
    with pytest.raises(ModelError, match=match):
        load(llama, model__adapter_name_or_path=str(folder))


# --- other families


SMALL = {"vocab_size": 98, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
FAMILIES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **SMALL)
        ),
        {"c_attn", "c_proj", "c_fc"},
    ),
    "gpt_neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=128, **LAYERS, **SMALL)),
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "opt": (lambda: tiny_opt(98), {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "qwen2": (
        lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **LAYERS, **SMALL)),
        LLAMA_LINEARS,
    ),
    "phi": (
        lambda: PhiForCausalLM(PhiConfig(**LAYERS, **SMALL)),
        {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    ),
    "llama, tied": (lambda: tiny_llama(98, tie_word_embeddings=True), LLAMA_LINEARS),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_train_all_their_linears(family: str, dtype: str, tmp_path: Path) -> None:
    make, targets = FAMILIES[family]
    torch.manual_seed(0)
    folder = write_base(tmp_path / "base", make())
    names = linear_names(find_base(str(folder), "main"))
    assert {name.rsplit(".", 1)[-1] for name in names} == targets
    model = load(folder, model__dtype=dtype)
    assert set(lora_layers(model)) == targets
    shake(model)
    loss, grads = step(model, some_batch(vocab_size=98))
    assert math.isfinite(loss)
    assert grads.keys() == dict(model.trained()).keys()
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_the_card_chooses_the_dtype(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    """A T4 has no bfloat16, Ampere has; a CPU computes in float32; a named dtype is what it says."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", device_kind(torch.device("cuda", 0))) == expected
    assert choose_dtype("auto", device_kind(torch.device("cpu"))) == torch.float32
    assert choose_dtype("float32", "cuda") == torch.float32


# --- layers whose weight the model's own code takes

TINY = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
TINY |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
MAMBA = {
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}
ALTUP = {
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
ALTUP |= {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "head_dim": 16}
BYPASSED: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "clamped in place": (
        lambda: hf.Gemma3nForCausalLM(
            hf.Gemma3nTextConfig(**TINY, **ALTUP, activation_sparsity_pattern=[0.0, 0.0])
        ),
        {"correction_coefs", "prediction_coefs"},
    ),
    "given to a kernel": (
        lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**TINY, **MAMBA)),
        {"out_proj"},
    ),
    "multiplied by": (
        lambda: hf.JambaForCausalLM(hf.JambaConfig(**TINY, num_experts=1)),
        {"dt_proj"},
    ),
}


@pytest.mark.parametrize("case", BYPASSED)
def test_a_layer_whose_weight_other_code_takes_stays_as_it_is(tmp_path: Path, case: str) -> None:
    make, expected = BYPASSED[case]
    torch.manual_seed(0)
    base = make()
    names = bypassed_layers(base)
    assert {name.rsplit(".", 1)[-1] for name in names} == expected
    model = load(write_base(tmp_path / "base", base))
    own = {name: type(model.causal.get_submodule(name)) for name in names}
    assert own == dict.fromkeys(
        names, nn.Linear
    )  # neither in 4 bit nor adapted; the others are both
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    assert [
        note
        for note in model.notes
        if note.startswith("layers that are not in 4 bit") and min(expected) in note
    ]
    loss, gradients = step(model, some_batch())
    assert math.isfinite(loss)
    assert any(gradient.any() for gradient in gradients.values())


def test_a_slice_of_a_weight_for_split_checkpoints_is_no_bypass() -> None:
    assert (
        bypassed_layers(
            hf.BloomForCausalLM(hf.BloomConfig(vocab_size=99, hidden_size=64, n_layer=1, n_head=2))
        )
        == []
    )
    assert bypassed_layers(tiny_llama()) == []
