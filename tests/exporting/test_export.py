"""Export: the file is the model. Read back without llama.cpp; asked for its tokens, logits and text
where it is."""

import importlib.util
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, Answer, tiny_llama
from safetensors.torch import load_file, save_file
from test_chat_template import WILD
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
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

from orpo_lite import export, merge, train, verify
from orpo_lite.data.chat_template import PAPER_CHAT_TEMPLATE
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import CheckpointError, ModelError, OrpoLiteError, RecipeError
from orpo_lite.exporting.gguf_tokenizer import ASCII, WORDS
from orpo_lite.exporting.llama_cpp import PROBES, score_pairs
from orpo_lite.exporting.targets import export_events
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.updates import run_to_end

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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
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
    "llama, yarn with its own factor": lambda: LlamaConfig(
        **SHAPE, rope_parameters=YARN | {"attention_factor": 1.3}
    ),
    "llama, dynamic rope": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=128),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2, windows in some layers": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=128, max_window_layers=1
    ),
    "qwen2, yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=None),
    "phi3, half of a head turned": lambda: Phi3Config(
        **SHAPE,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "phi3, longrope": lambda: Phi3Config(
        **SHAPE, rope_parameters=LONG, original_max_position_embeddings=256
    ),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=32),
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
    "gemma3 with pictures": lambda: Gemma3Config(
        text_config=SHAPE | SOFT,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
}


def bytes_tokenizer(vocab_size: int = 320, **changes: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, GPT-2's words unless a pre_tokenizer is given, trained on a few texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=changes.get("ignore_merges", False)))
    tokenizer.pre_tokenizer = changes.get(
        "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def random_model(config: Any) -> Any:
    """A model of that configuration; norms and biases random too, so that a wrong one is seen."""
    torch.manual_seed(0)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(0.5 * torch.randn_like(weight))
    return model


def write_run(
    path: Path, model: Any, tokenizer: Any, ends: list[int] | None = None, **adapter: Any
) -> Path:
    """What a finished and merged run leaves, without a training."""
    recipe = load_recipe("demo", [f"training.output_dir={path}"])
    (path / "adapter").mkdir(parents=True)
    config = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]} | adapter
    lora = {f"lora.{key}": config[key] for key in ("r", "lora_alpha", "use_dora") if key in config}
    (path / "recipe.yaml").write_text(recipe.override(lora).to_yaml(), encoding="utf-8")
    base = {"name": "org/base", "revision": "0" * 40, "path": "/there/base", "fingerprint": "f"}
    lock = {
        "base": base,
        "data": {"name": "d", "sha256": ""},
        "chat_template": {"name": "auto", "sha256": ""},
    }
    (path / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "adapter" / "adapter_model.safetensors").touch()
    GenerationConfig(eos_token_id=ends or [tokenizer.eos_token_id]).save_pretrained(
        path / "adapter"
    )
    model.save_pretrained(path / "merged")
    tokenizer.save_pretrained(path / "merged")
    return path


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def llama_cpp_model(file: Path, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the extra llama-cpp is not installed")
    exact = {
        "type_k": 0,
        "type_v": 0,
        "n_threads": 1,
        "n_threads_batch": 1,
        "verbose": False,
        "n_ctx": 128,
    }
    return llama_cpp.Llama(str(file), **exact | options)


def logits_of(file: Path, ids: list[int], **options: Any) -> np.ndarray:
    model = llama_cpp_model(file, logits_all=True, **options)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "length"), [*((name, 120) for name in FAMILIES), ("phi3, longrope", 400)]
)
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
    return pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def known_regex(name: str) -> str:
    (steps,) = {steps for (steps, _), known in WORDS.items() if known == name}
    return steps[0]


def pieces_tokenizer(
    prefix: str,
    *,
    plain: Sequence[str] = (),
    normalized: bool = False,
    stripping: Sequence[str] = (),
    runs: int = 0,
    tab: bool = False,
    **changes: Any,
) -> PreTrainedTokenizerFast:
    """Sentencepiece's kind of BPE: bytes to fall back on, each pair that makes a token a merge, in
    its order."""
    shape = Tokenizer(models.BPE())
    shape.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=200, min_frequency=1, show_progress=False, limit_alphabet=60
    )
    shape.train_from_iterator([f" {text}" for text in TEXTS], trainer)
    pieces = [text for text, _ in sorted(shape.get_vocab().items(), key=lambda item: item[1])]
    pieces = list(dict.fromkeys([*("▁" * length for length in range(1, runs)), *pieces]))
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    if tab:  # as in Gemma 1 and 2
        tokens = ["\t" if token == "<0x09>" else token for token in tokens if token != "\t"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (t[:i], t[i:])
        for t in pieces
        for i in range(1, len(t))
        if t[:i] in vocab and t[i:] in vocab
    ]
    model = models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    if prefix.startswith("metaspace"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix.split()[1], split=False)
    else:
        steps = [normalizers.Prepend("▁")] * (prefix == "always") + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.add_tokens([AddedToken(text, normalized=normalized) for text in plain])
    if stripping:
        tokens = [
            AddedToken(text, normalized=False, rstrip=text != "<|endoftext|>")
            for text in ("</s>", *stripping)
        ]
        tokenizer.add_tokens(tokens)
    single = "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>" if stripping else "</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        **changes,
    )


def gemmas_merges(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Runs of spaces all have one score: their merges come first, those with the longest left half
    before others."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = spec["model"]["merges"]
    runs = sorted(
        (m for m in merges if set("".join(m)) == {"▁"}), key=lambda m: (-len(m[0]), -len(m[1]))
    )
    spec["model"]["merges"] = runs + [m for m in merges if m not in runs]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return tokenizer


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}[assistant]"
)
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: bytes_tokenizer(500),
    "smollm": lambda: bytes_tokenizer(
        500,
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
    ),
    "qwen2": lambda: bytes_tokenizer(
        500, pre_tokenizer=split_by(known_regex("qwen2")), normalizer=normalizers.NFC()
    ),
    "llama-bpe": lambda: bytes_tokenizer(
        500, pre_tokenizer=split_by(known_regex("llama-bpe")), ignore_merges=True
    ),
    "dbrx": lambda: bytes_tokenizer(500, pre_tokenizer=split_by(known_regex("dbrx"))),
    "tekken": lambda: bytes_tokenizer(
        500, pre_tokenizer=split_by(known_regex("tekken")), ignore_merges=True
    ),
    "gpt-4o": lambda: bytes_tokenizer(500, pre_tokenizer=split_by(known_regex("gpt-4o"))),
    "pieces, a space before each text": lambda: pieces_tokenizer("always"),
    "pieces, no space": lambda: pieces_tokenizer("never"),
    "pieces, a tab in place of its byte": lambda: pieces_tokenizer("never", tab=True),
    "pieces, Gemma's runs": lambda: pieces_tokenizer("never", plain=["\n\n", "\n \n", "▁▁", "<b>"]),
    "pieces, runs of spaces found first": lambda: pieces_tokenizer(
        "never", plain=["▁▁", "▁▁▁▁"], normalized=True
    ),
    "pieces, Gemma's merges": lambda: gemmas_merges(pieces_tokenizer("never", runs=6)),
    "pieces, Phi-3's strips": lambda: pieces_tokenizer(
        "always", stripping=["<|endoftext|>", "<|user|>", "<|end|>"]
    ),
}


def without(text: str, words: list[str]) -> str:
    for word in words:
        text = text.replace(word, "")
    return text


def different_tokens(run: Path, tokenizer: Any, texts: list[str]) -> list[str]:
    """The texts that llama.cpp tokenises otherwise than transformers, with or without what is added
    to a text."""
    model = llama_cpp_model(only_file(export(run, "gguf").folder), vocab_only=True)
    differing = []
    for text in texts:
        for added in (False, True):
            expected = tokenizer(text, add_special_tokens=added).input_ids
            found = model.tokenize(text.encode(), add_bos=added, special=True)
            if found != expected:
                differing.append(f"{text!r}: {found} for {expected}")
            ours, theirs = (
                model.detokenize(expected).decode(errors="replace"),
                tokenizer.decode(expected),
            )
            marks = [*tokenizer.all_special_tokens, "</s>"]
            if without(ours, marks).lstrip() != without(theirs, marks).lstrip():
                differing.append(f"{ours!r} for {theirs!r}")
    return differing


@pytest.mark.long
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), TOKENIZERS[name]())
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    rng = np.random.default_rng(0)
    marks = [
        "\n \n",
        "<b>",
        "<|user|>",
        "<|end|> ",
        "<|user|> \n",
        "<s>",
        "</s>",
        "  ",
        "\r\n",
        "'s",
        "'LL",
        "Ärger",
    ]
    alphabet = [*"".join(TEXTS), *marks]
    texts = TEXTS + ["".join(rng.choice(alphabet, 30)) for _ in range(300)]
    texts += [f"<s>{text}</s> {text}" for text in TEXTS]
    if name in ASCII:  # which is noted at the export
        texts = [
            text
            for text in texts
            if not {unicodedata.category(c) for c in text if c > "z"} & {"Mn", "Mc", "Lu"}
        ]
    assert different_tokens(run, tokenizer, texts) == []


@pytest.mark.long
@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("[", " ["), PAPER_CHAT_TEMPLATE])
@pytest.mark.parametrize("prefix", ["metaspace first", "metaspace always", "metaspace never"])
def test_llama_cpp_gives_the_tokens_of_a_conversation_where_only_some_texts_get_a_space(
    prefix: str, template: str, tmp_path: Path
) -> None:
    tokenizer = pieces_tokenizer(prefix, chat_template=template)
    run = write_run(tmp_path / "run", tiny_llama(520), tokenizer)
    talks = [[{"role": "user", "content": text}] for text in TEXTS]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    file = only_file(export(run, "gguf").folder)
    model = llama_cpp_model(file, vocab_only=True)
    tokenizer.chat_template = read_back(file)[0][
        "tokenizer.chat_template"
    ]  # which may begin with a space
    asked = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    for text, theirs in zip(texts, asked, strict=True):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert model.tokenize(theirs.encode(), add_bos=False, special=True) == expected


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260k", "babyllama1m"])
def test_llama_cpp_gives_the_tokens_of_a_real_model(name: str, tmp_path: Path) -> None:
    folder = SHARED / "models" / name
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    run = write_run(tmp_path / "run", model, tokenizer, [2, 1])
    rows = (
        (SHARED / "data" / "hh-rlhf-harmless.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    )
    texts = [text for row in rows for text in json.loads(row).values() if isinstance(text, str)]
    assert different_tokens(run, tokenizer, [*TEXTS, *texts]) == []


GIVEN = [
    Path(name) for name in os.environ.get("ORPO_LITE_TOKENIZERS", "").split(os.pathsep) if name
]


@pytest.mark.long
@pytest.mark.skipif(not GIVEN, reason="ORPO_LITE_TOKENIZERS names no folders of tokenizers")
@pytest.mark.parametrize("folder", GIVEN, ids=str)
def test_llama_cpp_gives_the_tokens_of_a_tokenizer_that_is_given(
    folder: Path, tmp_path: Path
) -> None:
    """Of any tokenizer at hand, and the conversations that its template writes; but for scripts
    that a note names."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    run = write_run(tmp_path / "run", tiny_llama(len(tokenizer), hidden_size=32), tokenizer)
    result = export(run, "gguf")
    texts = [
        *TEXTS,
        *(text for text in PROBES if text),
        "I'LL we'Ve 12345678 ½ ǅ ไทย हिन्दी עברית العربية 한국어 🎉",
    ]
    if any("Hindi" in note for note in result.notes):
        texts = [
            text
            for text in texts
            if not {unicodedata.category(c) for c in text if c > "z"} & {"Mn", "Mc", "Lu"}
        ]
    if any("a space at the start" in note for note in result.notes):
        texts = [text.lstrip() for text in texts]
    if tokenizer.chat_template:
        talks = [[{"role": "user", "content": text}] for text in texts]
        texts += [
            tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)
            for t in talks
        ]
    model = llama_cpp_model(only_file(result.folder), vocab_only=True)
    found = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    assert found == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def greedy_both(
    run: Path, prompts: list[str], outtype: str | None, tokens: int = 40
) -> tuple[list[str], list[str]]:
    """Greedy texts of transformers, from RUN/merged, and of llama.cpp, from the exported file."""
    model = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    other = llama_cpp_model(only_file(export(run, "gguf", outtype=outtype).folder), n_ctx=256)
    theirs, ours = [], []
    for prompt in prompts:
        ids = other.tokenize(prompt.encode(), add_bos=True, special=True)
        assert ids == tokenizer(prompt).input_ids
        output = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        theirs.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip())
        answer = other.create_completion(
            ids, max_tokens=tokens, temperature=0.0, repeat_penalty=1.0
        )
        ours.append(
            answer["choices"][0]["text"].strip()
        )  # a decoder that begins here takes the first space away
    return theirs, ours


@pytest.mark.long
def test_the_demo_speaks_from_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", ["training.output_dir=run", "training.max_steps=30"])
    finished = train(recipe).run
    merge(finished)
    assert verify(finished).passed
    questions = [
        "Any tips for flute?",
        "Where do I begin with chess?",
        "How do I start with something else?",
    ]
    prompts = [f"<s><|user|>{text}<|assistant|>" for text in questions]
    for outtype in (None, "f16"):
        theirs, ours = greedy_both(finished, prompts, outtype)
        assert theirs == ours
        assert all(len(text) > 40 for text in ours)
    chat = llama_cpp_model(
        only_file(export(finished, "gguf").folder)
    )  # by the template in the file
    said = [{"role": "user", "content": questions[0]}]
    reply = chat.create_chat_completion(said, temperature=0.0, repeat_penalty=1.0, max_tokens=40)
    assert reply["choices"][0]["message"]["content"] == ours[0]


@pytest.mark.long
@pytest.mark.real
def test_a_real_llama_speaks_from_llama_cpp(tmp_path: Path) -> None:
    recipe = load_recipe(
        "mistral-qlora",
        [
            f"model.model_name_or_path={SHARED / 'models' / 'stories260k'}",
            f"data.dataset_name={SHARED / 'data' / 'hh-rlhf-harmless.jsonl'}",
            f"training.output_dir={tmp_path / 'run'}",
            "data.max_samples=64",
            "data.max_length=256",
            "data.test_split_size=16",
            "data.max_prompt_length=160",
            *"memory.micro_batch_size=8 training.global_batch_size=16 training.max_steps=3".split(),
        ],
    )
    run = train(recipe).run
    merge(run)
    assert verify(run).passed
    prompts = [
        "Once upon a time",
        "The little dog was",
        "<|user|>\nTell me a story.</s>\n<|assistant|>\n",
    ]
    for outtype in (None, "f16"):
        theirs, ours = greedy_both(run, prompts, outtype)
        assert theirs == ours
    theirs, ours = greedy_both(run, prompts[:2], "q8_0")  # rounds: the same beginnings
    assert [text[:12] for text in theirs] == [text[:12] for text in ours]


@pytest.mark.long
@pytest.mark.parametrize("outtype", ["q3_k_m", "q4_k_m", "q5_k_m", "q6_k"])
def test_llama_cpp_quantises(outtype: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the extra llama-cpp is not installed")
    config = LlamaConfig(
        **SHAPE | {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.04}
    )
    model = random_model(config).bfloat16()
    run = write_run(tmp_path / "run", model, bytes_tokenizer())
    folder = export(run, "gguf", outtype=outtype).folder
    assert [file.name for file in folder.iterdir()] == [f"run-{outtype}.gguf"]
    ids = torch.randint(3, 320, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.float()(ids).logits[0].numpy()
    found = logits_of(only_file(folder), ids[0].tolist())
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > (
        0.9 if outtype == "q3_k_m" else 0.97
    )


@pytest.mark.long
def test_llama_cpp_scores_pairs_as_the_model_does(tmp_path: Path) -> None:
    """Replies that begin alike, one that is the start of the other, one token alone."""
    pytest.importorskip("llama_cpp", reason="the extra llama-cpp is not installed")
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer())
    file = only_file(export(run, "gguf", outtype="f32").folder)
    ids = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    pairs = [
        TokenizedPair(ids[:30], ids[:20] + ids[30:50], 15, 15, ""),
        TokenizedPair(ids[:30], ids[:20], 15, 15, ""),
        TokenizedPair([*ids[:30], 5], [*ids[:30], 6], 30, 30, ""),
    ]
    found = run_to_end(score_pairs(file, pairs), lambda _: None)  # type: ignore[arg-type, var-annotated]
    with torch.no_grad():
        for column, pair in enumerate(pairs):
            for row, sequence in enumerate((pair.chosen_ids, pair.rejected_ids)):
                logits = tiny_llama(520)(torch.tensor([sequence])).logits[0, :-1]
                logps = logits.log_softmax(-1)[range(len(sequence) - 1), sequence[1:]]
                expected = float(logps[pair.chosen_start - 1 :].mean())
                assert float(found[row, column]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.long
def test_other_tokens_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pre-tokenizer under a wrong name, as a table that lags behind would have it."""
    words = split_by(known_regex("llama-bpe"))
    run = write_run(
        tmp_path / "run",
        tiny_llama(520),
        bytes_tokenizer(500, pre_tokenizer=words, ignore_merges=True),
    )
    monkeypatch.setattr("orpo_lite.exporting.gguf_tokenizer.WORDS", dict.fromkeys(WORDS, "smollm"))
    with pytest.raises(ModelError, match=r"llama.cpp and transformers tokenise .* differently"):
        export(run, "gguf")
    assert not list((run / "export").rglob("*.gguf"))


@pytest.mark.long
@pytest.mark.parametrize(("outtype", "like"), [("f16", 0.9999), ("bf16", 0.999), ("q8_0", 0.999)])
def test_logits_of_a_rounded_file_are_alike(outtype: str, like: float, tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**SHAPE | {"initializer_range": 0.05}))
    run = write_run(tmp_path / "run", model, bytes_tokenizer())
    ids = torch.randint(3, 320, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    found = logits_of(only_file(export(run, "gguf", outtype=outtype).folder), ids[0].tolist())
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > like


# --- what needs no llama.cpp


def read_back(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys of a GGUF file, and its tensors in float32."""
    reader = gguf.GGUFReader(file)
    keys = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    shapes = {tensor.name: [int(n) for n in reversed(tensor.shape)] for tensor in reader.tensors}
    numbers = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors
    }
    return keys, {
        name: np.array(numbers[name], np.float32).reshape(shape) for name, shape in shapes.items()
    }


def halves_apart(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rotary pairs side by side -> half a head apart: the way back."""
    heads = rows.reshape(len(rows) // head_dim, head_dim // 2, 2, -1)
    return heads.transpose(0, 2, 1, 3).reshape(rows.shape)


NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
    "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
    "blk.2.ffn_gate.weight": "model.layers.2.mlp.gate_proj.weight",
    "blk.2.ffn_up.weight": "model.layers.2.mlp.up_proj.weight",
    "blk.2.ffn_down.weight": "model.layers.2.mlp.down_proj.weight",
    "blk.0.attn_qkv.weight": "model.layers.0.self_attn.qkv_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.gate_up_proj.weight",
    "blk.0.attn_q_norm.weight": "model.layers.0.self_attn.q_norm.weight",
    "blk.0.attn_q.bias": "model.layers.0.self_attn.q_proj.bias",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_holds_the_models_tensors(name: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES[name]())
    config = model.config.get_text_config()
    run = write_run(tmp_path / "run", model, bytes_tokenizer())
    keys, tensors = read_back(only_file(export(run, "gguf").folder))
    arch = keys["general.architecture"]
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    if "pictures" in name:
        state = {
            key.replace("language_model.", ""): state[key] for key in state if "vision" not in key
        }
        state = {key: state[key] for key in state if "multi_modal" not in key}
    compared = 0
    for ours, theirs in NAMES.items():
        if ours not in tensors or theirs not in state:
            continue
        found = tensors[ours]
        if arch == "llama" and ("attn_q." in ours or "attn_k." in ours):
            found = halves_apart(found, keys["llama.attention.key_length"])
        if arch.startswith("gemma") and "norm" in ours:
            found = found - 1
        np.testing.assert_allclose(found, state[theirs], atol=1e-6)
        compared += 1
    assert compared >= 8
    tied = config.tie_word_embeddings
    assert ("output.weight" in tensors) != tied
    made_up = sum("rope_f" in name for name in tensors)
    assert len(tensors) == len(state) - tied + made_up
    assert keys[f"{arch}.block_count"] == config.num_hidden_layers
    assert keys[f"{arch}.attention.head_count_kv"] == 2
    assert len(keys["tokenizer.ggml.tokens"]) == tensors["token_embd.weight"].shape[0] == 336


def test_each_type_rounds_as_it_says(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"]()).bfloat16()
    run = write_run(tmp_path / "run", model, bytes_tokenizer())
    want = model.state_dict()["model.layers.2.mlp.up_proj.weight"].float().numpy()
    largest = np.abs(want.reshape(len(want), -1, 32)).max(-1, keepdims=True)
    bounds = {"f32": 0, "bf16": 0, "f16": 1e-6, "q8_0": largest / 127 * 0.51 + 1e-4}
    for outtype, bound in bounds.items():
        keys, tensors = read_back(only_file(export(run, "gguf", outtype=outtype).folder))
        error = np.abs(tensors["blk.2.ffn_up.weight"] - want).reshape(len(want), -1, 32)
        assert (error <= bound).all(), outtype
        assert keys["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[outtype]
        norm = model.state_dict()["model.norm.weight"].float().numpy()
        assert np.array_equal(tensors["output_norm.weight"], norm)
    assert only_file(export(run, "gguf").folder).name == "run-bf16.gguf"  # as stored


@pytest.mark.long
def test_shards_are_read_and_no_more_than_a_block_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    from orpo_lite.base import blocks
    from orpo_lite.exporting import gguf_file

    model = tiny_llama(
        20_000, hidden_size=256, num_hidden_layers=1
    )  # an embedding and an output of 20 MB each
    run = write_run(tmp_path / "run", model, bytes_tokenizer())
    whole = read_back(only_file(export(run, "gguf", outtype="q8_0").folder))[1]
    model.save_pretrained(run / "merged", max_shard_size="8MB")
    (run / "merged" / "model.safetensors").unlink()
    monkeypatch.setattr(blocks, "BLOCK", 1 << 18)
    held = []

    def read_rows(rows: Any) -> Any:
        held.append(blocks.read_rows(rows).nbytes)
        return blocks.read_rows(rows)

    monkeypatch.setattr(gguf_file, "read_rows", read_rows)
    export(run, "gguf", outtype="q8_0")  # the libraries are loaded, and what they keep is kept
    tracemalloc.start()
    folder = export(run, "gguf", outtype="q8_0").folder
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 14e6, "the tokens take 8 MB; a matrix of the model would be 20"
    assert max(held) <= 1 << 18
    again = read_back(only_file(folder))[1]
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_the_rope_of_llama3_is_a_tensor_of_divisors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(FAMILIES["llama3 rope"]()), bytes_tokenizer())
    _, tensors = read_back(only_file(export(run, "gguf").folder))
    factors = tensors["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    assert (np.diff(factors) > -1e-5).all()


@pytest.mark.parametrize("name", ["mistral", "qwen2, windows in some layers"])
def test_the_context_ends_where_an_unknown_window_would_begin(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(FAMILIES[name]()), bytes_tokenizer())
    result = export(run, "gguf")
    keys, _ = read_back(only_file(result.folder))
    assert keys[f"{keys['general.architecture']}.context_length"] == 128
    assert "no sliding window" in result.notes[0]


def test_the_end_of_an_answer_comes_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer(), [2, 1])
    keys, _ = read_back(only_file(export(run, "gguf").folder))
    assert [
        keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")
    ] == [1, 2, 1, 0]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    kinds = keys["tokenizer.ggml.token_type"]
    assert kinds[:4] == [3, 3, 3, 1]
    assert kinds[-1] == 5


def test_a_name_does_not_change_the_tokens(tmp_path: Path) -> None:
    """By some names llama.cpp knows tokens that strip spaces, whatever tokens there are."""
    run = write_run(tmp_path / "my-Phi-3-try", tiny_llama(520), bytes_tokenizer())
    keys, _ = read_back(only_file(export(run, "gguf").folder))
    assert keys["general.name"] == "my-model-try"


def test_the_scores_of_pieces_are_the_places_of_their_merges(tmp_path: Path) -> None:
    tokenizer = pieces_tokenizer("always", chat_template=TEMPLATE)
    run = write_run(tmp_path / "run", tiny_llama(520), tokenizer)
    keys, _ = read_back(only_file(export(run, "gguf").folder))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.chat_template"] == TEMPLATE
    made = {
        left + right
        for left, right in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    }
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    assert sorted(scores[text] for text in made) == [-float(n) for n in reversed(range(len(made)))]
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


@pytest.mark.parametrize(("template", "prefix"), [(None, True), (TEMPLATE, False)])
def test_a_space_at_the_start_alone_is_left_to_the_template(
    template: str | None, prefix: bool, tmp_path: Path
) -> None:
    run = write_run(
        tmp_path / "run",
        tiny_llama(520),
        pieces_tokenizer("metaspace first", chat_template=template),
    )
    result = export(run, "gguf")
    keys, _ = read_back(only_file(result.folder))
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert any("space" in note for note in result.notes)


def test_a_character_may_stand_in_the_place_of_its_byte(tmp_path: Path) -> None:
    """Gemma 1 and 2 have a tab for <0x09>; any other byte that is lacking would be lost."""
    run = write_run(tmp_path / "run", tiny_llama(520), pieces_tokenizer("never", tab=True))
    export(run, "gguf")
    file = run / "merged" / "tokenizer.json"
    file.write_text(file.read_text().replace('"<0xE2>"', '"<0xE2"'))
    with pytest.raises(ModelError, match="without byte fallback"):
        export(run, "gguf")


def test_ollamas_template_begins_with_the_space_too(tmp_path: Path) -> None:
    tokenizer = pieces_tokenizer("metaspace first", chat_template=PAPER_CHAT_TEMPLATE)
    folder = export(write_run(tmp_path / "run", tiny_llama(520), tokenizer), "ollama").folder
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    assert '{{- " <|user|>\\n" }}' in modelfile
    assert '{{- " <|system|>\\n" }}' in modelfile
    keys, _ = read_back(only_file(folder))
    assert keys["tokenizer.chat_template"] == "{{ ' ' }}" + PAPER_CHAT_TEMPLATE
    assert keys["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_half_way_there_is_no_file_or_the_one_before(earlier: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer())
    before = export(run, "gguf").folder if earlier else run / "export" / "gguf-f32"
    there = only_file(before).read_bytes() if earlier else b""

    def end_half_way() -> None:
        for update in export_events(run, "gguf"):
            if update.step == 5:
                os._exit(9)

    process = multiprocessing.get_context("fork").Process(
        target=end_half_way
    )  # it has nothing to import
    process.start()
    process.join()
    assert process.exitcode == 9
    assert (only_file(before).read_bytes() == there) if earlier else not before.exists()
    export(run, "gguf")
    assert [folder.name for folder in (run / "export").iterdir()] == ["gguf-f32"]


def test_spaces_that_are_put_before_some_texts_alone_are_refused(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "[{{ m.role }}] {{ m.content }}{{ eos_token }} {% endfor %}"
    )
    tokenizer = pieces_tokenizer("metaspace always", chat_template=template)
    with pytest.raises(ModelError, match="only some texts of the chat template begin with a space"):
        export(write_run(tmp_path / "run", tiny_llama(520), tokenizer), "gguf")


# --- what is refused


def wrong(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes the tokenizer.json of a run."""

    def apply(run: Path) -> None:
        file = run / "merged" / "tokenizer.json"
        spec = json.loads(file.read_text(encoding="utf-8"))
        change(spec)
        file.write_text(json.dumps(spec), encoding="utf-8")

    return apply


def other_words(spec: dict[str, Any]) -> None:
    steps = [
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    ]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def cut_short(run: Path) -> None:
    file = run / "merged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def f16_overflow(run: Path) -> None:
    file = run / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(tensors, file)


def not_merged(run: Path) -> None:
    (run / "merged" / "config.json").unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], str, type[OrpoLiteError]]] = {
    "words cut otherwise": (wrong(other_words), "it splits texts by", ModelError),
    "lower case": (
        wrong(lambda s: s.update(normalizer={"type": "Lowercase"})),
        "a normalizer of type Lowercase",
        ModelError,
    ),
    "a token that strips": (
        wrong(lambda s: s["added_tokens"][1].update(lstrip=True)),
        "the space before",
        ModelError,
    ),
    "cut short": (cut_short, "is truncated", ModelError),
    "too large for f16": (f16_overflow, "too large for f16", ModelError),
    "not merged": (
        lambda run: (run / "merged" / "config.json").unlink(),
        "merged/ has no config.json",
        CheckpointError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer())
    change, said, kind = REFUSED[name]
    change(run)
    with pytest.raises(kind, match=said) as caught:
        export(run, "gguf", outtype="f16")
    assert not list((run / "export").rglob("*"))
    assert ".tmp" not in str(caught.value)


def test_a_model_that_is_not_that_of_its_config_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", tiny_llama(520), bytes_tokenizer())
    config = run / "merged" / "config.json"
    for old, new, said in (
        (
            '"num_hidden_layers": 2',
            '"num_hidden_layers": 3',
            r"the tensor model.layers.2.self_attn.q_proj.weight is missing",
        ),
        (
            '"num_key_value_heads": 2',
            '"num_key_value_heads": 4',
            "model.layers.0.self_attn.k_proj.weight has the shape 32x64",
        ),
    ):
        whole = config.read_text()
        assert old in whole
        config.write_text(whole.replace(old, new))
        with pytest.raises(ModelError, match=said) as raised:
            export(run, "gguf")
        assert raised.value.fix == f"run orpo-lite merge '{run}' to write the merged model again"
        config.write_text(whole)
    assert not (run / "export" / "gguf-f32").exists()


@pytest.mark.parametrize("template", ["{% for m in ", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails_is_refused(template: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer())
    (run / "merged" / "chat_template.jinja").write_text(template)
    for target in ("gguf", "ollama"):
        with pytest.raises(
            ModelError, match=r"cannot render a question|raises Template(Syntax)?Error"
        ):
            export(run, target)


def test_a_head_that_is_said_to_be_tied_and_is_not_is_written(tmp_path: Path) -> None:
    """transformers takes the numbers of the file then, so training and merging do too."""
    model = tiny_llama(520, tie_word_embeddings=True)
    run = write_run(tmp_path / "run", model, bytes_tokenizer())
    file = run / "merged" / "model.safetensors"
    tensors = load_file(file)
    assert "output.weight" not in read_back(only_file(export(run, "gguf").folder))[1]
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    assert "output.weight" not in read_back(only_file(export(run, "gguf").folder))[1]
    head[7, 5] += 1
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    found = read_back(only_file(export(run, "gguf").folder))[1]["output.weight"]
    assert np.array_equal(found, head.numpy())
    del tensors["model.embed_tokens.weight"]  # one of two that are the same
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    written = read_back(only_file(export(run, "gguf").folder))[1]
    assert "output.weight" not in written
    assert np.array_equal(written["token_embd.weight"], head.numpy())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "activation 'gelu'"),
        (Qwen2Config(**SHAPE, rope_parameters=LLAMA3), "rope_type 'llama3'"),
        (Qwen3Config(**SHAPE, attention_bias=True), "k_proj.bias"),
        (Gemma2Config(**SHAPE, **SOFT | {"query_pre_attn_scalar": 100}), "query_pre_attn_scalar"),
        (LlamaConfig(**SHAPE, rope_parameters=YARN | {"beta_fast": 8}), "beta_fast: 8"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(config: Any, said: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(config), bytes_tokenizer())
    with pytest.raises(ModelError, match=said):
        export(run, "gguf")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    from conftest import tiny_opt

    run = write_run(tmp_path / "run", tiny_opt(520), bytes_tokenizer())
    with pytest.raises(ModelError, match="cannot export model_type 'opt' to GGUF"):
        export(run, "gguf")


def test_merges_that_no_score_can_order_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), pieces_tokenizer("always"))

    def shuffle(spec: dict[str, Any]) -> None:
        merges = spec["model"]["merges"]
        at = next(i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1]))
        merges.append(merges.pop(at))

    wrong(shuffle)(run)
    with pytest.raises(ModelError, match="are not next to each other"):
        export(run, "gguf")
    lacking = write_run(tmp_path / "lacking", tiny_llama(520), pieces_tokenizer("always"))
    wrong(lambda spec: spec["model"]["merges"].pop())(lacking)
    with pytest.raises(ModelError, match="there is no merge of"):
        export(lacking, "gguf")


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("onnx", {}, "one of gguf, ollama, vllm"),
        ("gguf", {"outtype": "int3"}, "one of f32"),
        ("vllm", {"outtype": "f16"}, "serves the weights unchanged"),
        ("gguf", {"weights": "none"}, "one of original, dequantized"),
    ],
)
def test_a_wrong_option_is_answered(
    to: str, options: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        export(tmp_path, to, **options)


def test_a_library_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer())
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "llama_cpp" else real(name)
    )
    with pytest.raises(OrpoLiteError, match="pip install 'llama-cpp-python") as caught:
        export(run, "gguf", outtype="q4_k_m")
    assert caught.value.exit_code == 6
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "gguf" else real(name)
    )
    with pytest.raises(OrpoLiteError, match="pip install 'gguf"):
        export(run, "gguf")


def test_the_other_merge_is_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer())
    with pytest.raises(CheckpointError, match=r"orpo-lite merge .*run --base dequantized"):
        export(run, "gguf", weights="dequantized")
    (run / "merged").rename(run / "merged-dequantized")
    assert export(run, "gguf", weights="dequantized").folder.name == "gguf-f32-dequantized"


# --- Ollama


OTHERS = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    ),
    "system in the first question": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{% set s = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{% for m in messages %}"
        "<start>{{ m.role }}\n{% if loop.first %}{{ s }}{% endif %}{{ m.content }}<end>\n"
        "{% endfor %}<start>model\n"
    ),
    "system in the last question": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{% set s = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last %}{{ s }}{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "no system": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        '{{ m.role }} said "{{ m.content }}"\n{% endfor %}assistant said "'
    ),
}


@pytest.mark.parametrize("name", OTHERS | WILD)
def test_a_template_is_taken_apart_and_put_together(name: str) -> None:
    from orpo_lite.exporting.ollama_template import find_turns, renderer

    tokenizer = pieces_tokenizer("always", chat_template=(OTHERS | WILD)[name])
    render = renderer(tokenizer, {})
    turns, notes = find_turns(render, "here")
    talk = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": 'And "that"?'},
    ]
    assert turns.rebuild(talk) == render(talk)
    if name in ("no system", "gemma"):
        assert "Ollama leaves system texts out" in notes[-1]
        return
    with_system = [{"role": "system", "content": "Be brief."}, *talk]
    assert turns.rebuild(with_system) == render(with_system)
    assert [note for note in notes if "white space" not in note] == []
    assert bool(notes) == (name in ("llama-2", "llama-3"))


# What Ollama hands to a template: all messages, and the system text once more.
GO = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	parsed := template.Must(template.New("").Parse(string(text)))
	var talks [][]message
	if json.NewDecoder(os.Stdin).Decode(&talks) != nil {
		panic("no talks")
	}
	for _, talk := range talks {
		system := ""
		if talk[0].Role == "system" {
			system = talk[0].Content
		}
		values := map[string]any{"System": system, "Messages": talk, "Response": ""}
		if parsed.Execute(os.Stdout, values) != nil {
			panic("a template that fails")
		}
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("go") is None, reason="no Go here, whose templates Ollama's are")
@pytest.mark.parametrize("name", OTHERS | WILD)
def test_go_writes_what_jinja_writes(name: str, tmp_path: Path) -> None:
    from orpo_lite.exporting.ollama_template import find_turns, renderer

    render = renderer(pieces_tokenizer("always", chat_template=(OTHERS | WILD)[name]), {})
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    (tmp_path / "template").write_text(find_turns(render, "here")[0].to_go(), encoding="utf-8")
    turns = [
        {"role": "user", "content": 'Why? "{{ .System }}"'},
        {"role": "assistant", "content": "So.\n\nThen."},
        {"role": "user", "content": "Ähm \\ %s"},
        {"role": "assistant", "content": "Well"},
        {"role": "user", "content": "x"},
    ]
    talks = [turns[:length] for length in (1, 3, 5)]
    if name not in ("no system", "gemma"):
        talks += [[{"role": "system", "content": "Be brief."}, *talk] for talk in talks]
    asked = ["go", "run", "main.go", "template"]
    given = json.dumps(talks)
    done = subprocess.run(
        asked, cwd=tmp_path, input=given, capture_output=True, check=True, encoding="utf-8"
    )
    assert done.stdout.split("\0")[:-1] == [render(talk) for talk in talks]


def test_thoughts_that_a_template_takes_out_are_told() -> None:
    """As Qwen3's does of all answers but the last."""
    from orpo_lite.exporting.ollama_template import find_turns, renderer

    plain = OTHERS["system in the first question"]
    note = "the chat template removes <think> from earlier answers; Ollama's template keeps it"
    for template, told in (
        (plain, False),
        (plain.replace("m.content", "m.content.split('</think>')[-1]"), True),
    ):
        _, notes = find_turns(
            renderer(pieces_tokenizer("always", chat_template=template), {}), "here"
        )
        assert (note in notes) is told, template


def test_a_template_that_counts_its_turns_is_refused(tmp_path: Path) -> None:
    counting = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
    run = write_run(
        tmp_path / "run", tiny_llama(520), pieces_tokenizer("always", chat_template=counting)
    )
    with pytest.raises(
        ModelError, match="cannot be converted for Ollama, because it writes other texts"
    ):
        export(run, "ollama")
    assert not (run / "export").exists()


def test_the_modelfile(tmp_path: Path) -> None:
    tokenizer = pieces_tokenizer("always", chat_template=OTHERS["system in the first question"])
    run = write_run(tmp_path / "My Run", tiny_llama(520), tokenizer, [2])
    result = export(run, "ollama", outtype="q8_0")
    modelfile = (result.folder / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.splitlines()[0] == "FROM ./My-Run-q8_0.gguf"
    assert (result.folder / "My-Run-q8_0.gguf").is_file()
    assert '{{- "<start>user\\n" }}' in modelfile  # and no <s>, which Ollama adds by itself
    assert "<s>" not in modelfile
    assert 'PARAMETER stop "</s>"' in modelfile
    assert "PARAMETER num_ctx 256" in modelfile
    assert result.command.startswith("ollama create my-run -f ")
    assert str(tmp_path) not in modelfile
    assert str(tmp_path).encode() not in (result.folder / "My-Run-q8_0.gguf").read_bytes()


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ('{"do_sample": false, "temperature": 0.0, "top_k": 20}', ["PARAMETER temperature 0"]),
        (
            '{"temperature": 0.6, "top_p": 0.9, "min_p": null}',
            ["PARAMETER temperature 0.6", "PARAMETER top_p 0.9"],
        ),
        ("{", []),
    ],
)
def test_ollama_decodes_as_the_generation_config_says(
    config: str, lines: list[str], tmp_path: Path
) -> None:
    tokenizer = pieces_tokenizer("always", chat_template=OTHERS["system in the first question"])
    run = write_run(tmp_path / "run", tiny_llama(520), tokenizer)
    (run / "adapter" / "generation_config.json").write_text(config)
    modelfile = (
        (export(run, "ollama").folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    )
    parameters = [
        line for line in modelfile if line.startswith("PARAMETER") and "num_ctx" not in line
    ]
    assert parameters == ['PARAMETER stop "</s>"', *lines]


def test_named_templates_are_in_the_file(tmp_path: Path) -> None:
    tokenizer = pieces_tokenizer(
        "always", chat_template={"default": TEMPLATE, "tool_use": "tools: " + TEMPLATE}
    )
    run = write_run(tmp_path / "run", tiny_llama(520), tokenizer)
    keys = read_back(only_file(export(run, "gguf").folder))[0]
    assert keys["tokenizer.chat_template"] == TEMPLATE
    assert keys["tokenizer.chat_template.tool_use"] == "tools: " + TEMPLATE
    assert keys["tokenizer.chat_templates"] == ["tool_use"]


# --- vLLM


@pytest.mark.parametrize(("rank", "allowed"), [(1, "8"), (16, "16"), (17, "32"), (300, "320")])
def test_the_command_of_vllm(rank: int, allowed: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", tiny_llama(520), bytes_tokenizer(), r=rank)
    result = export(run, "vllm")
    words = shlex.split(result.command)
    adapter = str(run / "adapter")
    assert words[:5] == ["vllm", "serve", "org/base", "--revision", "0" * 40]
    assert words[-5:] == [
        "--enable-lora",
        "--lora-modules",
        f"a-run={adapter}",
        "--max-lora-rank",
        allowed,
    ]
    assert (result.folder / "serve.sh").read_text(encoding="utf-8").splitlines()[
        1
    ] == result.command


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_dora": True},
        {"r": 1024},
        {"alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["model.embed_tokens", "q_proj"]},
        {"target_modules": r".*(embed_tokens|q_proj)"},
    ],
    ids=str,
)
def test_what_vllm_does_not_serve_is_served_merged(adapter: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer(), **adapter)
    result = export(run, "vllm")
    assert shlex.split(result.command)[2] == str(run / "merged")
    assert "cannot serve" in result.notes[0]
    (run / "merged" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="orpo-lite merge"):
        export(run, "vllm")


def reward_run(path: Path, *overrides: str) -> Path:
    """What a finished and merged training of a reward model leaves."""
    run = write_run(path, tiny_llama(520), bytes_tokenizer())
    recipe = load_recipe(str(run / "recipe.yaml"), ["loss.type=reward", *overrides])
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return run


@pytest.mark.parametrize("is_merged", [True, False])
@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_a_reward_model_is_refused_with_a_command_that_works(
    to: str, is_merged: bool, tmp_path: Path, call: Callable[..., Answer]
) -> None:
    run = reward_run(tmp_path / "a run")
    if not is_merged:
        (run / "merged" / "config.json").unlink()
    code, printed, complained = call("export", str(run), "--to", to, "--verify")
    assert (code, printed) == (4, "")  # before a library that is not installed is asked for
    for said in (str(run), f"is a reward model, which --to {to} cannot export", "expected: --to"):
        assert said in complained, said
    assert not (run / "export").exists()
    fix = complained.partition("fix: ")[2].split("\n")[0].strip("`")
    first, *others = [shlex.split(command)[1:] for command in fix.split(" && ")]
    if is_merged:
        assert call(*first)[0] == 0
    else:
        assert first == ["merge", str(run)]
        assert others == [["export", str(run), "--to", "vllm"]]


def test_vllm_serves_a_reward_model_merged_and_as_a_pooling_model(tmp_path: Path) -> None:
    run = reward_run(tmp_path / "run")
    result = export(run, "vllm")
    words = ["vllm", "serve", str(run / "merged"), "--served-model-name", "run"]
    assert shlex.split(result.command) == [*words, "--runner", "pooling"]
    assert "an adapter with a score head" in result.notes[0]
    assert 'as "messages" to /classify, with "use_activation": false;' in result.notes[1]
    assert result.command in (result.folder / "serve.sh").read_text(encoding="utf-8")
    (run / "merged" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="orpo-lite merge"):
        export(run, "vllm")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.chat_template=none", 'prompt, reply and end token, joined, as "input"'),
        ('data.chat_template_kwargs={"short": true}', '"chat_template_kwargs": {"short": true}'),
    ],
)
def test_a_request_for_a_reward_is_told_as_in_training(
    setting: str, said: str, tmp_path: Path
) -> None:
    assert said in export(reward_run(tmp_path / "run", setting), "vllm").notes[1]


# --- the command


def test_the_command(tmp_path: Path, call: Callable[..., Answer]) -> None:
    run = write_run(tmp_path / "run", tiny_llama(520), bytes_tokenizer())
    code, printed, complained = call("export", str(run), "--to", "gguf", "--outtype", "q8_0")
    assert (code, complained) == (0, "")
    assert "run-q8_0.gguf" in printed.splitlines()[-1]
    code, _, complained = call("export", str(run), "--to", "cake")
    assert code == 2
    assert "one of gguf, ollama, vllm" in complained
    code, _, complained = call("export", str(tmp_path), "--to", "vllm")
    assert code == 5
