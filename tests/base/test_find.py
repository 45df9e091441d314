"""The tokenizer of a base: it is tokenizer.json as it is written, whatever class the base names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orpo_lite.base.find import load_tokenizer

CORPUS = [
    "Do this:\n\n1. Dig a hole.\n\n2. Put it in.",
    "|  12 |   7 |\n\n2 rows. What is 2024? Café naïve",
] * 4
TEXTS = [
    *CORPUS[:2],
    "a  b   c\n\n\nd 3 2 1 é🦜",
    "<|end|>  x <tool> y</s>\n\nz",
    " leading, trailing ",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    """As SmolLM2's: single digits."""
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"]
    )
    return trained(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.Sequence(steps),
        decoder=decoders.ByteLevel(),
    )


def metaspace() -> Tokenizer:
    """As a Llama's that adds no space in front, with byte fallback."""
    return trained(
        models.BPE(unk_token="<unk>", byte_fallback=True),
        trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *BYTES]),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
    )


def unigram() -> Tokenizer:
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
        ),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def word_piece() -> Tokenizer:
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"]),
        normalizer=normalizers.BertNormalizer(strip_accents=False, lowercase=False),
        pre_tokenizer=pre_tokenizers.Whitespace(),
        decoder=decoders.WordPiece(),
    )


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("make", "name", "model_type", "changed"),
    [
        (byte_level, "GPT2Tokenizer", "llama", "pre_tokenizer"),
        (byte_level, None, "gpt_neox", "pre_tokenizer"),  # the class that goes with the model
        (byte_level, "PreTrainedTokenizerFast", "llama", ""),
        (metaspace, "LlamaTokenizer", "llama", "pre_tokenizer"),
        (metaspace, "GemmaTokenizer", "gemma", "pre_tokenizer"),
        (unigram, "T5Tokenizer", "llama", "normalizer"),
        (word_piece, "BertTokenizer", "bert", "normalizer"),
    ],
)
def test_the_tokenizer_is_the_file(
    tmp_path: Path, make: Callable[[], Tokenizer], name: str | None, model_type: str, changed: str
) -> None:
    """Also when it is saved and loaded as anybody would, with its template, named tokens and flags
    of added ones."""
    written, base, saved = make(), tmp_path / "base", tmp_path / "saved"
    written.add_special_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True)])
    written.add_tokens([AddedToken("<tool>", normalized=False)])
    PreTrainedTokenizerFast(
        tokenizer_object=written,
        **NAMED,
        chat_template="{{ 1 }}",
        model_max_length=77,
        padding_side="left",
    ).save_pretrained(base)
    written.save(str(base / "tokenizer.json"))
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8")) | {
        "tokenizer_class": name
    }
    (base / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(base)
    assert (changed in tokenizer.replaced) if changed else tokenizer.replaced == ""
    tokenizer.save_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({"model_type": model_type}))
    expected = [written.encode(text, add_special_tokens=False) for text in TEXTS]
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(saved), load_tokenizer(saved)):
        encoded = [
            loaded.backend_tokenizer.encode(text, add_special_tokens=False) for text in TEXTS
        ]
        assert [item.ids for item in encoded] == [item.ids for item in expected]
        assert [item.offsets for item in encoded] == [item.offsets for item in expected]
        assert [loaded.decode(item.ids) for item in expected] == [
            written.decode(item.ids, skip_special_tokens=False) for item in expected
        ]
        assert {key: str(loaded.special_tokens_map[key]) for key in NAMED} == NAMED
        assert loaded.chat_template == "{{ 1 }}"
        assert (loaded.model_max_length, loaded.padding_side) == (77, "left")
        flags = loaded.added_tokens_decoder[written.token_to_id("<|end|>")]
        assert (flags.lstrip, flags.rstrip, flags.special) == (True, True, True)
        assert not loaded.added_tokens_decoder[written.token_to_id("<tool>")].special
