"""Export: the file is the model. Read back without llama.cpp; asked for its tokens, logits and text where it is."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, Answer, tiny_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from orpo_lite.errors import CheckpointError, ModelError, OrpoLiteError, RecipeError
from orpo_lite.export import export
from orpo_lite.recipe import load_recipe

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

TEXTS = [
    "Hello, world!",
    "  two  spaces,   three\tand a tab\n\nand lines \n \n",
    "It's what we've; I'LL say they're don't DON'T",
    "1 22 333 4444 55555 3.14159 x2y3",
    "naïve café, 日本語 и русский, עברית, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🙂!! and ... --- ###",
    "def f(x):\n    return x+1  # why?\n",
    "a",
    " ",
    " leading and trailing ",
    "\n",
    "the the the thethethe aaaaaaaaaaaaaaaa",
    "https://example.com/a?b=c&d=[e]{f}",
    "",
]
SHAPE = {
    "vocab_size": 336,  # more than the tokens: the rest is padding
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 256,
    "factor": 2.0,
}
SOFT = {"query_pre_attn_scalar": 32, "head_dim": 32, "sliding_window": 16}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama with biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, wide heads": lambda: LlamaConfig(**SHAPE, head_dim=32),
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama3 rope": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama, linear rope": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama, yarn": lambda: LlamaConfig(**SHAPE, rope_parameters=YARN),
    "llama, yarn with its own factor": lambda: LlamaConfig(**SHAPE, rope_parameters=YARN | {"attention_factor": 1.3}),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=128),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2, yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=None),
    "phi3, half of a head turned": lambda: Phi3Config(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "phi3, longrope": lambda: Phi3Config(**SHAPE, rope_parameters=LONG, original_max_position_embeddings=256),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=32, hidden_activation="gelu_pytorch_tanh"),
    "gemma2": lambda: Gemma2Config(**SHAPE, **SOFT),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 7}, **SOFT),
    "gemma3, another pattern": lambda: Gemma3TextConfig(
        **SHAPE, **SOFT, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gemma3, linear rope": lambda: Gemma3TextConfig(
        **SHAPE,
        **SOFT,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def bytes_tokenizer(vocab_size: int = 320, **changes: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, GPT-2's words unless a pre_tokenizer is given, trained on a few texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=changes.get("ignore_merges", False)))
    tokenizer.pre_tokenizer = changes.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    if "normalizer" in changes:
        tokenizer.normalizer = changes["normalizer"]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def random_model(config: Any) -> Any:
    """A model of that configuration; norms and biases random too, so that a wrong one is seen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(0.5 * torch.randn_like(weight))
    return model


def write_run(path: Path, model: Any, tokenizer: Any, ends: list[int] | None = None, **adapter: Any) -> Path:
    """What a finished and merged run leaves, without a training."""
    recipe = load_recipe("demo", [f"training.output_dir={path}"])
    (path / "adapter").mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    base = {"name": "org/base", "revision": "0" * 40, "path": "/there/base", "fingerprint": "f"}
    lock = {"base": base, "data": {"name": "d", "sha256": ""}, "chat_template": {"name": "auto", "sha256": ""}}
    (path / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    (path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 16} | adapter), encoding="utf-8")
    GenerationConfig(eos_token_id=ends or [tokenizer.eos_token_id]).save_pretrained(path / "adapter")
    model.save_pretrained(path / "merged")
    tokenizer.save_pretrained(path / "merged")
    return path


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def llama_cpp_model(file: Path, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the extra llama-cpp is not installed")
    exact = {"type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "n_ctx": 128}
    return llama_cpp.Llama(str(file), **exact | options)


def logits_of(file: Path, ids: list[int], **options: Any) -> np.ndarray:
    model = llama_cpp_model(file, logits_all=True, **options)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.long
@pytest.mark.parametrize(("name", "length"), [*((name, 120) for name in FAMILIES), ("phi3, longrope", 400)])
def test_llama_cpp_gives_the_logits_of_transformers(name: str, length: int, tmp_path: Path) -> None:
    model = random_model(FAMILIES[name]())
    run = write_run(tmp_path / "run", model, bytes_tokenizer())
    ids = torch.randint(3, 320, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    file = only_file(export(run, "gguf").folder)
    # It takes the long rope for any text when it is started with a context over the original one.
    found = logits_of(file, ids[0].tolist(), n_ctx=256 if length < 256 else 512)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))
