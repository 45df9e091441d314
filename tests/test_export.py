"""Export: the file is the model. Read back without llama.cpp; asked for its tokens, logits and text where it is."""

import json
import shlex
import unicodedata
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
from orpo_lite.exports.vocabulary import ASCII, WORDS
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


# --- tokens


def split_by(regex: str) -> Any:
    from tokenizers import Regex

    cut = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def known_regex(name: str) -> str:
    (steps,) = {steps for (steps, _), known in WORDS.items() if known == name}
    return steps[0]


def pieces_tokenizer(prefix: str, **changes: Any) -> PreTrainedTokenizerFast:
    """Sentencepiece's kind of BPE: bytes to fall back on, every pair that makes a token a merge, in the tokens' order."""
    shape = Tokenizer(models.BPE())
    shape.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=200, min_frequency=1, show_progress=False, limit_alphabet=60)
    shape.train_from_iterator([f" {text}" for text in TEXTS], trainer)
    pieces = [text for text, _ in sorted(shape.get_vocab().items(), key=lambda item: item[1])]
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        steps = [normalizers.Prepend("▁")] * (prefix == "always") + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(decoder)
    single = "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", **changes
    )


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}[assistant]"
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: bytes_tokenizer(500),
    "smollm": lambda: bytes_tokenizer(
        500,
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "qwen2": lambda: bytes_tokenizer(
        500, pre_tokenizer=split_by(known_regex("qwen2")), normalizer=normalizers.NFC()
    ),
    "llama-bpe": lambda: bytes_tokenizer(500, pre_tokenizer=split_by(known_regex("llama-bpe")), ignore_merges=True),
    "dbrx": lambda: bytes_tokenizer(500, pre_tokenizer=split_by(known_regex("dbrx"))),
    "tekken": lambda: bytes_tokenizer(500, pre_tokenizer=split_by(known_regex("tekken")), ignore_merges=True),
    "gpt-4o": lambda: bytes_tokenizer(500, pre_tokenizer=split_by(known_regex("gpt-4o"))),
    "pieces, a space before each text": lambda: pieces_tokenizer("always"),
    "pieces, no space": lambda: pieces_tokenizer("never"),
}


def different_tokens(run: Path, tokenizer: Any, texts: list[str]) -> list[str]:
    """The texts that llama.cpp tokenises otherwise than transformers, with or without what is added to a text."""
    model = llama_cpp_model(only_file(export(run, "gguf").folder), vocab_only=True)
    differing = []
    for text in texts:
        for added in (False, True):
            expected = tokenizer(text, add_special_tokens=added).input_ids
            found = model.tokenize(text.encode(), add_bos=added, special=True)
            if found != expected:
                differing.append(f"{text!r}: {found} for {expected}")
    return differing


@pytest.mark.long
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), TOKENIZERS[name]())
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    rng = np.random.default_rng(0)
    alphabet = list("".join(TEXTS)) + ["<s>", "</s>", "  ", "\r\n", "'s", "'LL", "Ärger"]
    texts = TEXTS + ["".join(rng.choice(alphabet, 30)) for _ in range(300)]
    texts += [f"<s>{text}</s> {text}" for text in TEXTS]
    if name in ASCII:  # which is noted at the export
        texts = [text for text in texts if not {unicodedata.category(c) for c in text if c > "z"} & {"Mn", "Mc", "Lu"}]
    assert different_tokens(run, tokenizer, texts) == []


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260k", "babyllama1m"])
def test_llama_cpp_gives_the_tokens_of_a_real_model(name: str, tmp_path: Path) -> None:
    folder = SHARED / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    run = write_run(tmp_path / "run", model, tokenizer, [2, 1])
    rows = (SHARED / "data" / "hh-rlhf-harmless.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    texts = [text for row in rows for text in json.loads(row).values() if isinstance(text, str)]
    assert different_tokens(run, tokenizer, [*TEXTS, *texts]) == []


def greedy_both(run: Path, prompts: list[str], outtype: str | None, tokens: int = 40) -> tuple[list[str], list[str]]:
    """Greedy texts of transformers, from RUN/merged, and of llama.cpp, from the exported file."""
    model = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    other = llama_cpp_model(only_file(export(run, "gguf", outtype=outtype).folder), n_ctx=256)
    theirs, ours = [], []
    for prompt in prompts:
        ids = other.tokenize(prompt.encode(), add_bos=True, special=True)
        assert ids == tokenizer(prompt).input_ids
        output = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        theirs.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        answer = other.create_completion(ids, max_tokens=tokens, temperature=0.0, repeat_penalty=1.0)
        ours.append(answer["choices"][0]["text"])
    return theirs, ours


@pytest.mark.long
@pytest.mark.parametrize("outtype", [None, "f16"])
def test_the_demo_speaks_from_llama_cpp(outtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished = demo_run()
    questions = ["Any tips for flute?", "Where do I begin with chess?", "How do I start with something else?"]
    theirs, ours = greedy_both(finished, [f"<s><|user|>{text}<|assistant|>" for text in questions], outtype)
    assert theirs == ours
    assert all(len(text) > 40 for text in ours)


def demo_run() -> Path:
    from orpo_lite import demo
    from orpo_lite.merge import merge
    from orpo_lite.train import train

    recipe = load_recipe("demo", ["training.output_dir=run", "training.max_steps=30"])
    for _ in demo.make_builtin(recipe):
        pass
    run = train(recipe).run
    merge(run)
    return run


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("outtype", [None, "f16", "q8_0"])
def test_a_real_llama_speaks_from_llama_cpp(outtype: str | None, tmp_path: Path) -> None:
    from orpo_lite.merge import merge
    from orpo_lite.train import train

    recipe = load_recipe(
        "mistral-qlora",
        [
            f"model.model_name_or_path={SHARED / 'models' / 'stories260k'}",
            f"data.dataset_name={SHARED / 'data' / 'hh-rlhf-harmless.jsonl'}",
            f"training.output_dir={tmp_path / 'run'}",
            *"data.max_samples=64 data.max_length=256 data.test_split_size=16 data.max_prompt_length=160".split(),
            *"memory.micro_batch_size=8 training.global_batch_size=16 training.max_steps=3".split(),
        ],
    )
    run = train(recipe).run
    merge(run)
    prompts = ["Once upon a time", "The little dog was", "<|user|>\nTell me a story.</s>\n<|assistant|>\n"]
    theirs, ours = greedy_both(run, prompts, outtype)
    if outtype == "q8_0":  # rounds: the same beginnings
        theirs, ours = ([text[:20] for text in texts] for texts in (theirs, ours))
    assert theirs == ours
