"""Real architectures, small and random: the step equals the model's own forward pass, or the probe refuses it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import ragged_pairs, tiny_llama, tiny_opt, write_base
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from orpo_lite.api import train_events
from orpo_lite.base.find import Base
from orpo_lite.data.packing import Batching, make_batch, micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import ModelError
from orpo_lite.model import probe_gradients, probe_values
from orpo_lite.model.load import bare_pair_model, load_pair_model
from orpo_lite.model.memory import apply_memory_settings
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.probe import probe
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.ops import layers, lora
from orpo_lite.ops.attention import (
    NAME,
    UnsupportedError,
    pair_attention,
)
from orpo_lite.ops.segments import Layout, Segment, current_layout, use_layout
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe

CPU = torch.device("cpu")
IDS = {
    "vocab_size": 98,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
LONG = SIZES | {"max_position_embeddings": 256}
GROUPED = LONG | {"num_key_value_heads": 2}
GEMMA = GROUPED | IDS | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
GEMMA["layer_types"] = ["sliding_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
}


def family(
    name: str, config: dict[str, Any], kind: str = "Config", **more: Any
) -> Callable[[], Any]:
    return lambda: getattr(hf, f"{name}ForCausalLM")(
        getattr(hf, f"{name}{kind}")(**(config | IDS | more))
    )


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **IDS))


def gemma3_with_pictures() -> Any:
    """Return the class of the 4B on the hub: a Gemma 3 text model in a model with a vision tower."""
    vision = SIZES | {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    text = GEMMA | {"rope_parameters": GEMMA3_ROPE}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


SHARED: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(98),
    "llama, tied": lambda: tiny_llama(98, tie_word_embeddings=True),
    "llama 3.2: tied, rotary frequencies scaled": lambda: tiny_llama(
        98, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "mistral, window shorter than the pair": family("Mistral", GROUPED, sliding_window=8),
    "qwen2": family("Qwen2", GROUPED),
    "qwen2, one layer with a window": family(
        "Qwen2", GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": family("Qwen3", GROUPED, head_dim=16),
    "qwen3, tied": family("Qwen3", GROUPED, head_dim=32, tie_word_embeddings=True),
    "gemma2": family("Gemma2", GEMMA),
    "gemma3": family("Gemma3", GEMMA, "TextConfig"),
    "gemma3 that reads pictures too": gemma3_with_pictures,
    "phi": family("Phi", LONG),
    "phi3": family("Phi3", GROUPED),
    "opt": lambda: tiny_opt(98),
    "gpt2": gpt2,
    "gpt_neox": family("GPTNeoX", LONG),
    "cohere": family("Cohere", GROUPED),
    "granite": family("Granite", GROUPED, logits_scaling=4.0, residual_multiplier=0.5),
    "olmo2": family("Olmo2", GROUPED),
    "smollm3": family("SmolLM3", GROUPED),
    "stablelm": family("StableLm", GROUPED),
    "mixtral": family("Mixtral", GROUPED, num_local_experts=4, num_experts_per_tok=2),
}
# What cannot share, and a word of the reason.
ALONE: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom: ALiBi": (lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **IDS)), "differ"),
    "qwen3-next: linear attention": (family("Qwen3Next", GROUPED, head_dim=16, **LINEAR), "differ"),
    "gpt-oss: sinks": (
        family(
            "GptOss", GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        "s_aux",
    ),
    "gpt-j: attention that nothing can replace": (
        lambda: hf.GPTJForCausalLM(hf.GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **IDS)),
        "differ",
    ),
    "lfm2: convolutions": (family("Lfm2", GROUPED, layer_types=["conv", "full_attention"]), "differ"),
    "phi3: rotary embedding that changes": (
        family("Phi3", GROUPED, rope_parameters=LONGROPE, original_max_position_embeddings=64),
        "rotary",
    ),
}  # fmt: skip


def recipe(**memory: Any) -> Recipe:
    tree = {
        "model": {"model_name_or_path": "none"},
        "data": {"dataset_name": "none"},
        "memory": memory,
    }
    return Recipe.model_validate(tree)


def adapted(make: Callable[[], Any], **memory: Any) -> PairModel:
    torch.manual_seed(0)
    base = make()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    targets = [
        n
        for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        if any(n in name for name, _ in base.named_modules())
    ]
    moe = any("expert" in name for name, _ in base.named_modules())
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets if moe else "all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return PairModel(model, recipe(**memory).memory).train()


def gradients(
    model: PairModel, pairs: list[TokenizedPair], batching: Batching
) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=True)
    divisors, total = Divisors(len(pairs), 100), 0.0
    for chunk in micro_batches(pairs, batching):
        loss, _ = orpo_loss(
            model(make_batch([pairs[i] for i in chunk], batching)), divisors, beta=0.5
        )
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for _, p in model.trained() if p.grad is not None])


def compare(model: PairModel, route: str) -> None:
    """All memory settings against padded rows with the model's own attention and logits, in float32."""
    pairs = ragged_pairs(6, vocab_size=98)
    expected, wanted = gradients(model, pairs, Batching(False, False, 0, 6, 0, False))
    apply_memory_settings(model, recipe(mlp_tile=16, checkpoint_offload=True))
    probe(model, 256)
    assert model.route == route, model.notes
    loss, found = gradients(model, pairs, Batching(True, route == "shared", 120, None, 0, False))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", SHARED)
def test_a_family_shares_its_prompts(name: str) -> None:
    model = adapted(SHARED[name])
    compare(model, "shared")
    assert not [note for note in model.notes if "because" in note]


@pytest.mark.parametrize("name", ALONE)
def test_a_family_that_cannot_share_goes_alone_and_says_so(name: str) -> None:
    make, reason = ALONE[name]
    model = adapted(make)
    compare(model, "rows")
    (note,) = [note for note in model.notes if "because" in note]
    assert reason in note


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            family(
                "DeepseekV3",
                LONG,
                first_k_dense_replace=1,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
            ),
            "memory.mlp_tile has no effect on 1 of 2 layers",
        ),
        (SHARED["mixtral"], "memory.mlp_tile has no effect on this model"),
        (
            lambda: hf.GPTNeoXJapaneseForCausalLM(hf.GPTNeoXJapaneseConfig(**(SIZES | IDS))),
            "memory.activation_checkpointing has no effect: this model's layers",
        ),
    ],
)
def test_memory_settings_that_a_model_cannot_have_are_named(
    make: Callable[[], Any], said: str
) -> None:
    model = adapted(make)
    apply_memory_settings(model, recipe(mlp_tile=16))
    assert sum(note.startswith(said) for note in model.notes) == 1, model.notes


class TwistedLlama(hf.LlamaForCausalLM):
    """Logits changed in a way that nothing in the configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.square() / 100
        return output


def twisted() -> Any:
    plain = tiny_llama(98)
    model = TwistedLlama(plain.config)
    model.load_state_dict(plain.state_dict())
    return model


def test_an_unknown_change_of_the_logits_is_caught() -> None:
    model = adapted(twisted)
    compare(model, "logits")
    assert "all its logits" in model.notes[-1]


@pytest.mark.parametrize("scale", [1.02, 1.0])
def test_a_mild_one_is_caught_in_bfloat16_too(scale: float) -> None:
    """Far within what rounding does to log-probabilities; the logits of the same hidden states tell."""
    model = adapted(lambda: tiny_llama(98)).to(torch.bfloat16)
    plain = model.causal.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * scale
        return output

    model.causal.forward = forward
    probe(model, 256)
    assert model.route == ("shared" if scale == 1 else "logits")


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities are right, but packed rows learn nothing through the values of their attention."""
    honest = pair_attention

    def detached(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return honest(module, q, k, v.detach(), *args, **kwargs)

    hf.AttentionInterface.register(NAME, detached)
    try:
        model = adapted(SHARED["llama"])
        probe(model, 256)
    finally:
        hf.AttentionInterface.register(NAME, honest)
    assert model.route == "rows"
    assert "gradients would differ by" in model.notes[-1]


def test_code_that_takes_no_packed_row_is_named_in_words() -> None:
    model = adapted(lambda: hf.FalconForCausalLM(hf.FalconConfig(alibi=True, **(SIZES | IDS))))
    probe(model, 256)
    assert model.route == "rows"
    assert not re.search("[(]'|TypeError[(]|got an unexpected", model.notes[-1]), model.notes


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"sliding_window": 8, "max_window_layers": 4}, 8),
        ({"sliding_window": 8, "use_sliding_window": False}, None),
        ({"window_size": 16, "_sliding_window_pattern": 6}, 16),
        ({"attention_window_size": 32}, 32),
        ({"attention_chunk_size": 64, "sliding_window": None}, 64),
        ({}, None),
    ],
)
def test_a_window_is_known_by_any_name(keys: dict[str, Any], window: int | None) -> None:
    assert probe_values._smallest_window(hf.PretrainedConfig(**keys)) == window


def test_an_auxiliary_loss_is_said_to_be_left_out() -> None:
    model = adapted(
        family(
            "Mixtral",
            GROUPED,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
        )
    )
    probe(model, 256)
    assert (model.route, "auxiliary loss" in model.notes[0]) == ("shared", True)


class PeekingLlama(hf.LlamaForCausalLM):
    """Each token's state depends on all tokens of the row before the first layer, as a convolution's would."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out + 0.1 * out.cumsum(1))


def test_a_state_that_runs_along_the_row_is_caught() -> None:
    model = adapted(lambda: PeekingLlama(tiny_llama(98).config))
    probe(model, 256)
    assert model.route == "rows"


class CountingLlama(hf.LlamaForCausalLM):
    """Tokens late in a row are scaled by their place in it, whatever their position: Llama 4 beyond floor_scale."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(self.scale)

    @staticmethod
    def scale(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        place_T1 = torch.arange(out.shape[1]).unsqueeze(1)
        return out * (1 + 0.2 * (place_T1 // 400))


@pytest.mark.parametrize(("tokens", "route"), [(0, "shared"), (500, "rows")])
def test_a_place_in_a_long_row_that_matters_is_caught(tokens: int, route: str) -> None:
    """Of rows as short as a pair nothing is seen, and in them nothing is wrong."""
    model = adapted(lambda: CountingLlama(tiny_llama(98).config))
    probe(model, 128, tokens)
    assert model.route == route
    assert not model.notes or "in rows of 500 tokens" in model.notes[-1]


def test_a_model_that_fails_by_itself_is_refused_in_words() -> None:
    class Broken(hf.LlamaForCausalLM):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = adapted(lambda: Broken(tiny_llama(98).config))
    with pytest.raises(
        ModelError, match=r"its own forward pass fails with this adapter \(RuntimeError"
    ):
        probe(model, 128)


@pytest.mark.parametrize("every", [2, 0])
def test_a_model_that_changes_its_weights_is_refused_with_what_keeps_them(every: int) -> None:
    """RWKV halves some of them for evaluation, so that float16 does not overflow; what is beside them stays whole."""
    config = hf.RwkvConfig(
        hidden_size=64,
        attention_hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        rescale_every=every,
        **IDS,
    )
    model = bare_pair_model(
        recipe().override({"quantization.load_in_4bit": False}), config, torch.float32, CPU
    )
    if every:
        with pytest.raises(ModelError, match="its forward pass changes its weights") as raised:
            probe(model, 128)
        assert raised.value.fix == "set rescale_every to 0 in the model's config.json"
    else:
        probe(model, 128)


def test_a_model_that_sees_what_comes_after_is_refused() -> None:
    bert = hf.BertConfig(**(SIZES | IDS), is_decoder=False)
    with pytest.raises(ModelError, match="its logits at a token depend on later tokens"):
        probe(adapted(lambda: hf.BertLMHeadModel(bert)), 128)


def test_a_configuration_without_a_pad_token_is_no_fault() -> None:
    config = hf.CodeGenConfig(
        n_embd=64, n_layer=2, n_head=4, rotary_dim=16, vocab_size=98, initializer_range=0.2
    )
    model = adapted(lambda: hf.CodeGenForCausalLM(config))
    assert not hasattr(config, "pad_token_id") or config.pad_token_id is None
    probe(model, 128)
    assert model.route in ("rows", "shared")


def test_adapters_that_the_loss_does_not_reach_are_named() -> None:
    class Idle(hf.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.extra = nn.Linear(64, 64)

    model = adapted(lambda: Idle(tiny_llama(98).config))
    probe(model, 128)
    assert model.route == "shared"
    (note,) = model.notes
    assert note.startswith("1 of 15 adapted layers get no gradient (model.extra ...)"), note


def test_a_new_adapter_is_random_only_while_it_is_probed() -> None:
    torch.manual_seed(0)
    model = PairModel(
        get_peft_model(tiny_llama(98), LoraConfig(r=4, target_modules="all-linear")),
        recipe().memory,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.trained()}
    probe(model, 128)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.trained())
    assert all(parameter.grad is None for _, parameter in model.trained())


def test_a_fused_operation_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only A's gradient is, which a new adapter's B, zero, would hide."""
    honest = lora._LoraLinear.backward

    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = list(honest(ctx, *grads))
        found[2] = found[2] * 0.5
        return tuple(found)

    monkeypatch.setattr(lora._LoraLinear, "backward", staticmethod(backward))
    torch.manual_seed(0)
    settings = recipe()
    model = PairModel(
        get_peft_model(tiny_llama(98), LoraConfig(r=4, target_modules="all-linear")),
        settings.memory,
    )
    apply_memory_settings(model, settings)
    probe(model, 128)
    (note,) = model.notes
    assert note.startswith("not used: memory.fused_lora, because gradients would differ by"), note
    assert model.route == "shared"
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def halved(honest: Callable[..., Any]) -> Any:
    """A backward pass whose last gradients, those of the trained tensors, are half of what they should be."""
    return staticmethod(
        lambda ctx, *grads: tuple(
            g * 0.5 if isinstance(g, Tensor) else g for g in honest(ctx, *grads)
        )
    )


def test_tiles_longer_than_the_pairs_of_the_probe_are_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers._Tiles, "backward", halved(layers._Tiles.backward))
    model = adapted(SHARED["llama"], fused_lora=False, mlp_tile=512)
    apply_memory_settings(model, recipe(fused_lora=False, mlp_tile=512))
    probe(model, 128)
    (note,) = model.notes
    assert note.startswith("not used: memory.mlp_tile, because gradients would differ by"), note


def test_what_comes_back_from_the_host_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = layers.HostStore._unpack
    monkeypatch.setattr(
        layers.HostStore, "_unpack", lambda store, stored: honest(store, stored) * 1.5
    )
    model = adapted(SHARED["llama"], checkpoint_offload=True)
    apply_memory_settings(model, recipe(checkpoint_offload=True))
    with pytest.raises(
        ModelError, match=r"its gradient with activation checkpointing differs by .* without it"
    ):
        probe(model, 128)


def test_padded_rows_are_probed_too(
    monkeypatch: pytest.MonkeyPatch, small_recipe: Callable[..., Recipe]
) -> None:
    monkeypatch.setattr(lora._LoraLinear, "backward", halved(lora._LoraLinear.backward))
    updates = train_events(small_recipe("memory.packing=false", "memory.prompt_sharing=false"))
    notes = [update.text for update in updates if update.kind == "note"]
    assert any(
        note.startswith("not used: memory.fused_lora, because gradients") for note in notes
    ), notes


def test_numbers_that_are_none_are_named_as_such() -> None:
    model = adapted(SHARED["llama"])
    model.causal.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="its logits are not finite in float32"):
        probe(model, 128)


SEEING = hf.Gemma3Config(
    text_config=GEMMA | {"attention_dropout": 0.3},
    vision_config={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    mm_tokens_per_image=4,
)  # fmt: skip


def test_a_model_that_sees_checkpoints_the_layers_that_read() -> None:
    settings = recipe(activation_checkpointing=1)
    model = bare_pair_model(settings, SEEING, torch.float32, torch.device("cpu"))
    assert len(model.layers) == 2
    assert [layer.gradient_checkpointing for layer in model.layers] == [True, False]
    assert (
        sum(bool(getattr(module, "gradient_checkpointing", False)) for module in model.modules())
        == 1
    )
    assert not any(
        layer.self_attn.training for layer in model.layers
    )  # so that its own dropout is off
    assert not any("vision" in name for name, _ in model.trained())


def test_layers_get_what_ours_do_not_take() -> None:
    """Float32 into a bfloat16 layer in 4 bit, as of DeepSeek's indexers; and a state beside the tokens, as of RWKV."""
    model = bare_pair_model(
        recipe(mlp_tile=4), tiny_llama(98).config, torch.bfloat16, torch.device("cpu")
    )
    layer = model.layers[0]
    x = torch.randn(1, 8, layer.self_attn.q_proj.in_features)
    assert layer.self_attn.q_proj(x).dtype == torch.float32
    with pytest.raises(TypeError, match="state"):  # Llama's own complaint, so it was asked
        layer.mlp(x, state=None)


def test_a_router_that_is_no_plain_linear_layer_gets_no_adapter() -> None:
    config = hf.PhimoeConfig(**(GROUPED | IDS), num_local_experts=4, num_experts_per_tok=2)
    settings = recipe().override({"quantization.load_in_4bit": False})
    model = bare_pair_model(settings, config, torch.float32, torch.device("cpu"))
    assert not [name for name, _ in model.trained() if "router" in name]
    probe(model, 128)
    assert model.route == "shared", model.notes


@pytest.mark.parametrize("name", ["mistral, window shorter than the pair", "gemma3"])
def test_a_window_that_is_not_kept_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent fault of a mask that does not know the window; short pairs would not show it."""
    honest = pair_attention

    def blind(*args: Any, **kwargs: Any) -> Any:
        return honest(*args, **kwargs | {"sliding_window": None})

    hf.AttentionInterface.register(NAME, blind)
    monkeypatch.setattr(probe_values, "random_pairs", short_pairs)
    monkeypatch.setattr(probe_gradients, "random_pairs", short_pairs)
    try:
        model = adapted(SHARED[name])
        probe(model, 256)
        assert model.route == "rows"
        assert "in rows of 256 tokens" in model.notes[-1]
        model = adapted(SHARED[name])
        probe(model, 8)  # no pair of the run reaches beyond it
        assert model.route == "shared"
    finally:
        hf.AttentionInterface.register(NAME, honest)


random_pairs = probe_values.random_pairs


def short_pairs(config: Any, lengths: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    """The long pairs as they are, the others so short that no window matters."""
    return random_pairs(
        config, [(3, 2, 3), (1, 4, 2)] if lengths[:1] == probe_values.SHORT_PAIRS[:1] else lengths
    )


def test_a_model_that_asks_for_a_mask_is_refused_by_name() -> None:
    q = torch.zeros(1, 2, 3, 4)
    masks: list[dict[str, Any]] = [
        {"attention_mask": torch.zeros(1)},
        {"s_aux": torch.zeros(1)},
        {"dropout": 0.1},
    ]
    for asked in [*masks, {"block_indices": torch.zeros(1)}, {"whatever comes next": 1}]:
        arguments: dict[str, Any] = {"attention_mask": None} | asked
        layout = Layout((Segment(0, 3),))
        with use_layout(layout), pytest.raises(UnsupportedError):
            pair_attention(nn.Module(), q, q, q, **arguments)
    with pytest.raises(UnsupportedError):
        pair_attention(nn.Module(), q, q, q, None)


def test_the_models_own_attention_is_as_before_after_a_step() -> None:
    model = adapted(SHARED["llama"])
    before = model.config._attn_implementation
    gradients(model, ragged_pairs(3), Batching(True, True, 120, None, 0, False))
    assert model.config._attn_implementation == before
    assert current_layout() is None


def test_an_embedding_in_host_memory_keeps_its_scale() -> None:
    """Gemma multiplies what it looks up; the memory setting moves the table and nothing else."""
    model = adapted(family("Gemma3", GEMMA | {"tie_word_embeddings": False}, "TextConfig"))
    pairs, batching = ragged_pairs(4, vocab_size=98), Batching(True, True, 120, None, 0, False)
    expected, wanted = gradients(model, pairs, batching)
    apply_memory_settings(model, recipe(embedding_on_cpu=True))
    loss, found = gradients(model, pairs, batching)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_dropout": 0.2}
NOISY: dict[str, Callable[[], Any]] = {
    "phimoe: its router draws experts, and its jitter is a threshold in evaluation too": family(
        "Phimoe", GROUPED | EXPERTS, router_jitter_noise=0.3, input_jitter_noise=0.3
    ),
    "mixtral: jitter": family("Mixtral", GROUPED | EXPERTS, router_jitter_noise=0.3),
    "opt: dropout in the layer itself, layers left out": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **(SIZES | IDS), ffn_dim=128, word_embed_proj_dim=64, dropout=0.3, layerdrop=0.5
        )
    ),
    "falcon: dropout read from the configuration": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**(SIZES | IDS), hidden_dropout=0.3, attention_dropout=0.3)
    ),
    "gpt2: modules of dropout": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.3, **IDS)
    ),
}


@pytest.mark.parametrize("name", NOISY)
def test_a_base_computes_in_training_what_it_does_in_evaluation(name: str, tmp_path: Path) -> None:
    """As transformers loads it, with all layers run again, against plain transformers and peft in evaluation mode."""
    torch.manual_seed(0)
    folder = write_base(tmp_path / "base", NOISY[name]())
    targets = [
        part for part in ("q_proj", "query_key_value", "c_attn") if part in str(NOISY[name]())
    ]
    wanted = recipe(activation_checkpointing="all").override(
        {"lora.target_modules": targets, "quantization.load_in_4bit": False}
    )
    config = hf.AutoConfig.from_pretrained(folder)
    model = load_pair_model(wanted, Base("base", folder, None, "", config), torch.device("cpu"))
    for _, parameter in model.trained():
        nn.init.normal_(parameter, std=0.1)
    pairs, batching = ragged_pairs(4, vocab_size=98), Batching(False, False, 0, 4, 0, False)
    loss, found = gradients(model, pairs, batching)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = get_peft_model(
        plain, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    )
    plain.load_state_dict(model.model.state_dict())
    reference = nn.Module.train(PairModel(plain), False)
    expected, exact = gradients(reference, pairs, batching)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    probe(model, 128)  # nothing random is left to refuse


@pytest.mark.parametrize("key", ["lora.use_dora=true", "lora.lora_dropout=0.1"])
def test_what_adapted_experts_cannot_have_is_said_with_a_way_out(key: str) -> None:
    config = hf.MixtralConfig(**(GROUPED | IDS), num_local_experts=4, num_experts_per_tok=2)
    wanted = load_recipe("demo", [key, "lora.target_modules=all-linear"])
    with pytest.raises(ModelError, match="peft supports neither DoRA nor dropout") as raised:
        bare_pair_model(wanted, config, torch.float32, torch.device("cpu"))
    routes = raised.value.fix.split(", or ")
    for route in (routes[0], f"{key} {routes[1]}"):
        bare_pair_model(
            load_recipe("demo", route.split()), config, torch.float32, torch.device("cpu")
        )
