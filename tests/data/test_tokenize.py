"""Pairs to tokens: where prompt and response part, both ends exactly once, the limits, and what a
person is shown."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
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
from transformers import PreTrainedTokenizerFast

from orpo_lite.data.chat_template import (
    REWRITTEN,
    SPECIAL,
    PairTexts,
    pair_texts,
    set_chat_template,
)
from orpo_lite.data.pair import Pair, TokenizedPair, common_prefix
from orpo_lite.data.render_process import Renderer
from orpo_lite.data.split import prompt_key
from orpo_lite.data.tokenize import (
    BATCH,
    EQUAL_CUT,
    LONG_PROMPT,
    NO_ROOM,
    Segment,
    _encode,
    _response_start,
    end_token_id,
    show_texts,
    tokenize_pairs,
)
from orpo_lite.errors import DataError, ModelError, OrpoLiteError
from orpo_lite.recipe.schema import DataSection

MANY, SOME = (
    settings(
        max_examples=count,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        deadline=None,
    )
    for count in (150, 60)
)


def section(**fields: Any) -> DataSection:
    return DataSection(**{"dataset_name": "pairs.jsonl", **fields})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def colour(prompt: str = "Name a colour.", chosen: str = "Blue.", rejected: str = "Seven.") -> Pair:
    return Pair((user(prompt),), chosen, rejected, "x:1", prompt_text=prompt)


def tokenize(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerFast, data: DataSection
) -> tuple[list[TokenizedPair], dict[str, int]]:
    """Those that are kept, and how many are not for each reason; the template is installed as a
    run would do it."""
    kept, counts = [], Counter[str]()
    with Renderer(set_chat_template(tokenizer, data)) as renderer:
        for _, found in tokenize_pairs(pairs, renderer, tokenizer, data):
            if isinstance(found, str):
                counts[found.partition(": ")[0]] += 1  # behind it stands which token
            else:
                kept.append(found)
    return kept, dict(counts)


def end_of(tokenizer: PreTrainedTokenizerFast, data: DataSection) -> int:
    return end_token_id(Renderer(set_chat_template(tokenizer, data)), tokenizer)


def message(raised: pytest.ExceptionInfo[OrpoLiteError]) -> str:
    """The text of an error that says all three: the place, what was expected, and what to do."""
    text = str(raised.value)
    assert "expected: " in text
    assert "fix: " in text
    return text


# --- tokenizers like those in the wild, trained on the spot

CORPUS = [
    "Name a colour. Blue. Seven. hello Hello  there the quick brown fox",
    "user assistant system 0 1 2 ab abab",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
TURNS = (user("Hi"), bot("Hello."), user("Name a colour."))


MARKS = ("<|im_start|>", "<|im_end|>")


def byte_level(
    trim_offsets: bool = False, bos: str | None = None, marks: Sequence[str] = MARKS
) -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen: no BOS, any text round-trips. With one, as Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", *marks, *([bos] if bos else [])]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos:
        first = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, first])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama-2 and Mistral: BOS by default, a dummy space after the start and every special
    token, byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False)
    )
    # The trainer made the bytes special too; only the first three are.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] in specials
    ]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: [CLS] before and [SEP] after by default, spaces and case lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [*CORPUS, "< | > \n . ?"],
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials, show_progress=False),
    )
    pieces = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=pieces
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


def unigram() -> PreTrainedTokenizerFast:
    """As T5: compatible characters are made equal, runs of spaces one, and the end is added by
    default."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, trimmed offsets": lambda: byte_level(trim_offsets=True),
    "byte-level, BOS": lambda: byte_level(bos="<|begin_of_text|>"),
    "sentencepiece": sentencepiece_like,
    "word-piece": word_piece,
    "unigram": unigram,
}
LOSSY = ("word-piece", "unigram")  # their tokens do not spell the text


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    tokenizer = MAKERS[request.param]()
    tokenizer.is_lossy = request.param in LOSSY
    return tokenizer


@pytest.fixture
def bpe() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def piece() -> PreTrainedTokenizerFast:
    return sentencepiece_like()


def split_text(tokenizer: PreTrainedTokenizerFast, pair: Pair, **fields: Any) -> tuple[str, str]:
    """(prompt, chosen response) as the tokens decode."""
    ((tokens,), _) = tokenize([pair], tokenizer, section(**fields))
    start = tokens.chosen_start
    return tokenizer.decode(tokens.chosen_ids[:start]), tokenizer.decode(tokens.chosen_ids[start:])


# --- where prompt and response part


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        # What the template writes after its end token is cut.
        (CHATML, ASKED, "Blue.<|im_end|>"),
        # Of two special tokens after the reply the first ends it.
        (
            "{% for m in messages %}{{ m.content }} <|im_end|>{{ eos_token }}{% endfor %}",
            "Name a colour. <|im_end|><|endoftext|>",
            "Blue. <|im_end|>",
        ),
        # Without one eos does, and a header that the template never asks with is the model's to
        # say.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}",
            "user: Name a colour.\n\n",
            "assistant: Blue.<|endoftext|>",
        ),
        # A thought that the template opens only when it asks, and one that it writes before every
        # reply.
        (CHATML.replace("t\n{% endif", "t\n<think>\n{% endif"), ASKED, "Blue.<|im_end|>"),
        (
            CHATML.replace("{{ m.c", "{% if m.role == 'assistant' %}<think>{% endif %}{{ m.c"),
            ASKED,
            "<think>Blue.<|im_end|>",
        ),
        ("none", "Name a colour.", "Blue.<|endoftext|>"),
    ],
)
def test_where_prompt_and_response_part(
    bpe: PreTrainedTokenizerFast, template: str, prompt: str, response: str
) -> None:
    assert split_text(bpe, colour(), chat_template=template) == (prompt, response)


def test_only_the_last_reply_is_the_response(bpe: PreTrainedTokenizerFast) -> None:
    pair = Pair(({"role": "system", "content": "S"}, *TURNS), "Blue.", "Seven.", "x:1")
    prompt, response = split_text(bpe, pair)
    assert "Hello." in prompt
    assert response == "Blue.<|endoftext|>"


def test_a_token_across_the_boundary_belongs_to_the_response(bpe: PreTrainedTokenizerFast) -> None:
    assert bpe.tokenize("2 ab") == ["2", "Ġab"]
    assert split_text(bpe, colour("1 2 a", "b", "0"), chat_template="none") == (
        "1 2",
        " ab<|endoftext|>",
    )
    # The other side has no such token, so its response starts later.
    ((tokens,), _) = tokenize([colour("1 2 a", "b", "0")], bpe, section(chat_template="none"))
    assert tokens.rejected_start == tokens.chosen_start + 1


def test_spaces_and_bytes_at_the_boundary(piece: PreTrainedTokenizerFast) -> None:
    trimmed = byte_level(trim_offsets=True)
    for tokenizer, start in ((trimmed, ""), (piece, "<s> ")):
        prompt, response = split_text(tokenizer, colour("A:  ", "🦜", "🙂"), chat_template="none")
        assert (prompt, response) == (start + "A:  ", "🦜" + tokenizer.eos_token)
        prompt, response = split_text(
            tokenizer, colour("A🦜", "  Blue.", "🙂"), chat_template="none"
        )
        assert prompt == start + "A🦜"
        assert response.lstrip() == "Blue." + tokenizer.eos_token
    # The space that sentencepiece adds after a special token is the response's when the reply
    # follows the token.
    assert tokenize([colour("Hi", "Hello")], piece, section(chat_template="none"))[1] == {}
    piece.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    ((tokens,), _) = tokenize([colour("Hi", "Hello")], piece, section())
    assert tokens.chosen_ids[tokens.chosen_start - 1] == piece.eos_token_id
    assert tokens.chosen_ids[-1] == piece.eos_token_id
    assert tokens.chosen_start < len(tokens.chosen_ids) - 1


@pytest.mark.parametrize("space", ["", " ", "\n", "    ", "\n\n"])
def test_a_token_that_strips_spaces_stays_on_its_side(space: str) -> None:
    """As Phi-3's <|assistant|>, which takes the white space behind it along, that of the reply
    too."""
    tokenizer = byte_level(marks=())
    tokenizer.add_tokens([AddedToken("<|ask|>", rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<|stop|>", lstrip=True, rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<think>", lstrip=True, special=True)])
    ask, stop = tokenizer.convert_tokens_to_ids(["<|ask|>", "<|stop|>"])
    template = (
        "{% for m in messages %}{{ m.content }}<|stop|>\n"
        "{% if m.role == 'user' %}<|ask|>\n{% endif %}{% endfor %}"
    )
    pairs = [colour(chosen=f"{space}Blue.{space}", rejected=f"{space}<think>a")]
    ((tokens,), counts) = tokenize(pairs, tokenizer, section(chat_template=template))
    assert counts == {}
    for ids, start, said in (
        (list(tokens.chosen_ids), tokens.chosen_start, tokenizer("Blue.").input_ids),
        (list(tokens.rejected_ids), tokens.rejected_start, tokenizer("<think>a").input_ids),
    ):
        assert ids[start - 1] == ask
        assert ids[start:] == [*said, stop]
    ((tokens,), _) = tokenize(
        [colour("a <|ask|>", f"{space}b", f"{space}c")], tokenizer, section(chat_template="none")
    )
    assert (
        tokens.chosen_ids[tokens.chosen_start - 1]
        == tokens.rejected_ids[tokens.rejected_start - 1]
        == ask
    )


# --- both ends


@pytest.mark.parametrize("template", ["auto", "{{ bos_token }}", "none"])
@pytest.mark.parametrize("make", [sentencepiece_like, lambda: byte_level(bos="<|begin_of_text|>")])
def test_bos_once(make: Callable[[], PreTrainedTokenizerFast], template: str) -> None:
    tokenizer = make()
    if template.startswith("{"):
        template += CHATML.replace("<|im_end|>", "{{ eos_token }}")
    ((tokens,), _) = tokenize([colour()], tokenizer, section(chat_template=template))
    for ids in (tokens.chosen_ids, tokens.rejected_ids):
        assert ids[0] == tokenizer.bos_token_id
        assert list(ids).count(tokenizer.bos_token_id) == 1


def test_bos_of_others(bpe: PreTrainedTokenizerFast) -> None:
    bert = word_piece()
    ((tokens,), _) = tokenize([colour("hello", "blue")], bert, section(chat_template="none"))
    assert (
        list(tokens.chosen_ids).count(bert.sep_token_id) == 1
    )  # the [SEP] it adds by default is not doubled
    assert list(tokens.chosen_ids).index(bert.cls_token_id) == 0
    ((tokens,), _) = tokenize([colour("hello", "Blue")], bpe, section(chat_template="none"))
    assert (
        bpe.decode(tokens.chosen_ids) == "helloBlue<|endoftext|>"
    )  # none where the tokenizer adds none


@pytest.mark.parametrize(
    ("template", "name"),
    [(CHATML, "<|im_end|>"), ("auto", "<|endoftext|>"), ("none", "<|endoftext|>")],
)
def test_the_end_token_is_the_templates_own(
    bpe: PreTrainedTokenizerFast, template: str, name: str
) -> None:
    assert end_of(bpe, section(chat_template=template)) == bpe.convert_tokens_to_ids(name)


# --- the limits


def test_lengths(bpe: PreTrainedTokenizerFast) -> None:
    def run(pair: Pair, **fields: Any) -> tuple[list[TokenizedPair], dict[str, int]]:
        return tokenize(
            [pair, colour()],
            bpe,
            section(chat_template="none", **{"max_prompt_length": 999, **fields}),
        )

    long = colour("1 " * 15, "2 " * 15, "0 " * 5)
    (tokens, _), _ = run(long)
    prompt, whole = tokens.chosen_start, len(tokens.chosen_ids)
    assert (tokens.chosen_cut, tokens.rejected_cut) == (0, 0)
    # Exactly at its limit a prompt stays, and a response keeps its end.
    assert run(long, max_prompt_length=prompt)[1] == {}
    assert run(long, max_prompt_length=prompt - 1)[1] == {LONG_PROMPT: 1}
    (kept, _), counts = run(long, max_length=whole)
    assert (counts, kept.chosen_cut) == ({}, 0)
    (cut, _), counts = run(long, max_length=whole - 1)
    assert (counts, cut.chosen_cut, cut.rejected_cut) == ({}, 1, 0)
    assert list(cut.chosen_ids) == list(tokens.chosen_ids)[:-1]
    assert list(cut.rejected_ids) == list(tokens.rejected_ids)
    # One token of the response is enough, none is not.
    (cut, _), counts = run(long, max_length=prompt + 1)
    assert counts == {}
    assert (cut.chosen_cut, cut.rejected_cut) == (
        whole - prompt - 1,
        len(tokens.rejected_ids) - prompt - 1,
    )
    assert len(cut.chosen_ids) == cut.chosen_start + 1
    assert run(long, max_length=prompt)[1] == {NO_ROOM: 1}
    # On either side alone: here a token across the boundary starts one response earlier.
    for replies in (("0", "b"), ("b", "0")):
        ((tokens, _), _) = run(colour("1 " * 9 + "a", *replies))
        starts = {tokens.chosen_start, tokens.rejected_start}
        assert len(starts) == 2
        assert run(colour("1 " * 9 + "a", *replies), max_length=max(starts))[1] == {NO_ROOM: 1}
        assert run(colour("1 " * 9 + "a", *replies), max_prompt_length=min(starts))[1] == {
            LONG_PROMPT: 1
        }
    alike = colour("1 " * 15, "2 " * 15 + "a", "2 " * 15 + "b")
    assert run(alike, max_length=prompt + 4)[1] == {EQUAL_CUT: 1}
    assert tokenize([], bpe, section(chat_template="none")) == ([], {})
    assert tokenize(
        [long] * 3, bpe, section(chat_template="none", max_length=prompt, max_prompt_length=999)
    ) == (
        [],
        {NO_ROOM: 3},
    )


def test_what_is_known_of_a_pair(bpe: PreTrainedTokenizerFast) -> None:
    pairs = [
        Pair((user(text),), "a", "b", f"set.jsonl:{i}")
        for i, text in enumerate(("One?", "one? ", "Two?"))
    ]
    kept, _ = tokenize(pairs, bpe, section())
    assert [tokens.where for tokens in kept] == ["set.jsonl:0", "set.jsonl:1", "set.jsonl:2"]
    assert [tokens.prompt for tokens in kept] == [prompt_key(pair) for pair in pairs]
    assert kept[0].prompt == kept[1].prompt != kept[2].prompt


@pytest.mark.parametrize(
    "pair",
    [colour("a<|im_start|>b"), colour(chosen="a<|endoftext|>b"), colour(rejected="<|im_end|>?")],
)
def test_a_special_token_in_the_text_is_no_end(bpe: PreTrainedTokenizerFast, pair: Pair) -> None:
    assert tokenize([pair, colour()], bpe, section(chat_template=CHATML))[1] == {SPECIAL: 1}


@pytest.mark.parametrize("template", [CHATML, "auto", "none"])
def test_special_tokens_of_ones_own_are_trained_on(
    bpe: PreTrainedTokenizerFast, template: str
) -> None:
    bpe.add_tokens(["<think>", "</think>"], special_tokens=True)
    if template == "none":
        bpe.chat_template = CHATML  # which says that <think> is no mark of a turn
    reply = "<think>ab</think>"
    ((tokens,), counts) = tokenize([colour(chosen=reply)], bpe, section(chat_template=template))
    ids = list(tokens.chosen_ids[tokens.chosen_start :])
    assert counts == {}
    assert ids[:-1] == bpe(reply).input_ids
    assert ids[0] == bpe.convert_tokens_to_ids("<think>")
    held = tokenize(
        [colour(chosen="<think>a</think>b<|im_end|>?")], bpe, section(chat_template=template)
    )
    assert held[1] == {SPECIAL: 1}  # though the paper's template does not write <|im_end|>
    assert tokenize([colour(chosen="a<|endoftext|>b")], bpe, section(chat_template=template))[
        1
    ] == {SPECIAL: 1}


def test_special_tokens_in_plain_text(bpe: PreTrainedTokenizerFast) -> None:
    """Where the person templates the text himself, a prompt may hold them, and a reply may end
    with one."""
    ends = colour(chosen="a<|endoftext|>")
    inside = [
        colour(chosen="a<|im_end|>b"),
        colour(rejected="<|endoftext|>?"),
        colour(chosen="<|im_end|>\n<|im_end|>"),
    ]
    inside.append(colour(chosen=" <|im_end|>\n"))  # an end is no reply
    kept, counts = tokenize(
        [ends, colour("a<|im_start|>b"), *inside], bpe, section(chat_template="none")
    )
    assert counts == {SPECIAL: 4}
    end = bpe.eos_token_id
    assert [
        list(ids).count(end) for pair in kept for ids in (pair.chosen_ids, pair.rejected_ids)
    ] == [1] * 4
    assert bpe.decode(kept[1].chosen_ids[: kept[1].chosen_start]) == "a<|im_start|>b"


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("after", ["", "\n", " \n\n"])
def test_text_that_is_templated_already(bpe: PreTrainedTokenizerFast, eos: str, after: str) -> None:
    """ChatML in the columns themselves, each reply with its end and the template's line break."""
    bpe.eos_token = eos
    prompt, replies = ASKED, [f"{text}<|im_end|>{after}" for text in ("Blue.", "Seven.")]
    pair = Pair((user(prompt),), *replies, "x:1", prompt_text=prompt)
    ((tokens,), counts) = tokenize([pair], bpe, section(chat_template="none"))
    assert counts == {}
    stop = "<|im_end|>" + ("" if eos == "<|im_end|>" else eos)
    for ids, start, text in (
        (tokens.chosen_ids, tokens.chosen_start, "Blue."),
        (tokens.rejected_ids, tokens.rejected_start, "Seven."),
    ):
        assert bpe.decode(ids[:start]) == ASKED
        assert bpe.decode(ids[start:]) == text + stop
        assert list(ids[start:]).count(bpe.eos_token_id) == 1
        assert ids[-1] == bpe.eos_token_id


# --- what cannot be tokenised


def test_tokenizers_that_cannot_be_used(bpe: PreTrainedTokenizerFast) -> None:
    plain = section(chat_template="none")
    bare = Pair((user("q"),), "a", "b", "x:2")
    with pytest.raises(
        DataError, match=r"x:2: the row holds a conversation, but data\.chat_template=none"
    ) as raised:
        tokenize([colour(), bare], bpe, plain)
    message(raised)
    bpe.eos_token = None
    for data in (plain, section()):
        with pytest.raises(ModelError, match="no token ends a reply") as raised_model:
            set_chat_template(bpe, data)
        message(raised_model)
    # A template without an end of its own.
    with pytest.raises(ModelError, match="no token ends a reply"):
        tokenize(
            [colour()],
            bpe,
            section(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"),
        )
    assert (
        len(tokenize([colour()], bpe, section(chat_template=CHATML))[0]) == 1
    )  # the template's own end will do


def test_a_slow_tokenizer_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match="ByT5Tokenizer is a slow tokenizer") as raised:
        tokenize([colour()], ByT5Tokenizer(), section(chat_template="none"))
    message(raised)


def test_pairs_on_which_a_template_raises_are_left_out(bpe: PreTrainedTokenizerFast) -> None:
    no_reply_first = (
        CHATML
        + "{% if messages[0].role == 'assistant' %}{{ raise_exception('asks first') }}{% endif %}"
    )
    pairs = [colour(prompt=str(i)) for i in range(BATCH * 2 + 3)]
    for place in (0, BATCH, BATCH * 2 + 2):
        pairs[place] = Pair((bot("S"), user("q")), "a", "b", f"x:{place}")
    kept, counts = tokenize(pairs, bpe, section(chat_template=no_reply_first))
    assert (len(kept), counts) == (len(pairs) - 3, {"the chat template raises TemplateError": 3})
    told = (
        CHATML
        + "{% if 'canary' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% "
        "endif %}"
    )
    renderer = Renderer(set_chat_template(bpe, section(chat_template=told)))
    ((_, reason),) = tokenize_pairs([colour(prompt="a canary text")], renderer, bpe, section())
    assert reason == "the chat template raises TemplateError"


def test_faults_are_reported_together_when_all_is_read(bpe: PreTrainedTokenizerFast) -> None:
    pairs = [colour(prompt=str(i)) for i in range(BATCH * 2 + 3)]
    for place in (0, BATCH, BATCH * 2 + 2):
        pairs[place] = Pair((bot("S"), user("q")), "a", "b", f"x:{place}")
    data, kept = section(chat_template="none"), 0
    with pytest.raises(DataError, match="3 faults") as raised:
        for _ in tokenize_pairs(pairs, Renderer(set_chat_template(bpe, data)), bpe, data):
            kept += 1
    assert kept == len(pairs) - 3
    assert all(
        f"x:{place}: the row holds a conversation" in message(raised)
        for place in (0, BATCH, BATCH * 2 + 2)
    )


# --- order over batches


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, 3 * BATCH + 7])
def test_batches_keep_the_order(bpe: PreTrainedTokenizerFast, count: int) -> None:
    pairs = [
        Pair((user(f"{i}"),), f"{i} a", "b" if i % 7 else "<|im_end|>", f"x:{i}")
        for i in range(count)
    ]
    data = section(chat_template=CHATML)
    found = list(tokenize_pairs(pairs, Renderer(set_chat_template(bpe, data)), bpe, data))
    assert [pair for pair, _ in found] == pairs
    left_out = [pair.where for pair, tokens in found if tokens == f"{SPECIAL}: <|im_end|>"]
    assert left_out == [f"x:{i}" for i in range(0, count, 7)]
    for pair, tokens in found:
        if isinstance(tokens, TokenizedPair):
            assert tokens.where == pair.where
            reply = bpe.decode(tokens.chosen_ids[tokens.chosen_start :])
            assert reply == f"{pair.where[2:]} a<|im_end|>"


def test_a_batch_of_which_nothing_is_tokenised(bpe: PreTrainedTokenizerFast) -> None:
    left_out = [colour("<|im_end|>")] * BATCH
    kept, counts = tokenize([*left_out, colour(), *left_out], bpe, section(chat_template=CHATML))
    assert (len(kept), counts) == (1, {SPECIAL: 2 * BATCH})


def test_pairs_are_read_at_most_a_few_batches_ahead(bpe: PreTrainedTokenizerFast) -> None:
    read = 0

    def count() -> Iterable[Pair]:
        nonlocal read
        for i in range(50 * BATCH):
            read += 1
            yield colour(prompt=str(i))

    data = section()
    results = tokenize_pairs(count(), Renderer(set_chat_template(bpe, data)), bpe, data)
    next(results)
    assert read <= 4 * BATCH
    results.close()  # type: ignore[attr-defined]


# --- properties

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=24)
REPLY = (
    TEXT
    | st.sampled_from(
        ["a  b ", " Hello", "\ue0fe", "\n", "🦜🦜", "é\u0301", "x</s>", "[SEP]", "<|endoftext|>"]
    )
).filter(str.strip)
TEMPLATES = st.sampled_from(["auto", "none", CHATML, "{{ bos_token }}" + CHATML])


@given(
    prompt=TEXT, replies=st.tuples(REPLY, REPLY), template=TEMPLATES, max_length=st.integers(8, 80)
)
@MANY
def test_the_end_is_supervised_exactly_once_or_cut(
    any_tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    replies: tuple[str, str],
    template: str,
    max_length: int,
) -> None:
    any_tokenizer.chat_template = None
    data = section(chat_template=template, max_length=max_length)
    end = end_of(any_tokenizer, data)
    whole, _ = tokenize([colour(prompt, *replies)], any_tokenizer, section(chat_template=template))
    kept, _ = tokenize([colour(prompt, *replies)], any_tokenizer, data)
    assert len(kept) <= len(whole)
    for pair, full in zip(kept, whole, strict=False):
        for ids, start, cut, full_ids in (
            (pair.chosen_ids, pair.chosen_start, pair.chosen_cut, full.chosen_ids),
            (pair.rejected_ids, pair.rejected_start, pair.rejected_cut, full.rejected_ids),
        ):
            response = list(ids[start:])
            assert 0 < len(ids) <= max_length
            assert response
            assert end not in response[:-1]
            assert (response[-1] == end) == (cut == 0)
            assert cut == 0 or len(ids) == max_length
            assert list(ids) == list(full_ids)[: len(ids)]
            assert len(ids) + cut == len(full_ids)


@given(prompt=TEXT, replies=st.tuples(REPLY, REPLY), template=TEMPLATES)
@MANY
def test_the_tokens_decode_to_the_rendered_text(
    any_tokenizer: PreTrainedTokenizerFast, prompt: str, replies: tuple[str, str], template: str
) -> None:
    any_tokenizer.chat_template = None
    data = section(chat_template=template)
    kept, _ = tokenize([colour(prompt, *replies)], any_tokenizer, data)
    asked = prompt
    if template != "none":
        asked = any_tokenizer.apply_chat_template(
            [user(prompt)], tokenize=False, add_generation_prompt=True
        )
    end = any_tokenizer.decode([end_of(any_tokenizer, data)])
    for pair in kept:
        for ids, start, reply in zip(
            (pair.chosen_ids, pair.rejected_ids),
            (pair.chosen_start, pair.rejected_start),
            replies,
            strict=True,
        ):
            said = asked + (
                reply if reply.endswith(end) else reply + end
            )  # plain text may bring its own
            if any_tokenizer.is_lossy:  # compare its tokens
                bare = any_tokenizer(said, add_special_tokens=False).input_ids
                assert (
                    list(ids) == [i for i in [any_tokenizer.cls_token_id] if i is not None] + bare
                )
                if template != "none" and any_tokenizer.cls_token:
                    assert list(ids[:start]) == any_tokenizer(asked).input_ids[:-1]
                continue
            whole, inside, beyond = (
                plain(any_tokenizer.decode(ids[:n])) for n in (len(ids), start, start + 1)
            )
            assert whole == plain(said)
            # The prompt's tokens lie within what is asked with, and the next token does not.
            assert plain(asked).startswith(inside)
            assert len(beyond) > len(plain(asked)) or not asked


def plain(text: str) -> str:
    """The text less the BOS and the spaces that a sentencepiece tokenizer adds after special
    tokens."""
    text = text.removeprefix("<|begin_of_text|>")
    text = text.removeprefix("<s> ") if text.startswith("<s> ") else text.removeprefix("<s>")
    return text.replace("</s> ", "</s>")


ODD = (
    "a| |  |\n|Blue| colour|é|e\u0301|ﬁ|…|\u00ad|🦜|👩\u200d🚀|한|İ|ß|<!im_end!>|</s>|[SEP]|<s>"
    "|\x00|▁|\u0345α|\u0344"
)
PIECES = st.lists(st.sampled_from(ODD.split("|")), max_size=12).map(
    lambda pieces: "".join(pieces).replace("!", "|")
)


@given(text=PIECES | TEXT)
@MANY
def test_the_response_starts_with_the_first_token_that_reaches_beyond_the_boundary(
    any_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    encoded = _encode([text, "another " + text], any_tokenizer)
    for row, whole in enumerate((text, "another " + text)):
        offsets = encoded.encodings[row].offsets
        for boundary in range(len(whole) + 1):
            beyond = (index for index, (_, end) in enumerate(offsets) if end > boundary)
            assert _response_start(encoded, row, boundary) == next(beyond, len(offsets)), boundary


@given(one=st.lists(st.integers(0, 2), max_size=8), other=st.lists(st.integers(0, 2), max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_common_prefix(one: list[int], other: list[int]) -> None:
    expected = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        expected += 1
    assert common_prefix(np.array(one, np.int32), np.array(other, np.int32)) == expected


# --- for people


def shown(
    pair: Pair, tokenizer: PreTrainedTokenizerFast, data: DataSection
) -> dict[str, list[Segment]]:
    template = set_chat_template(tokenizer, data)
    texts = pair_texts(pair, template)
    assert isinstance(texts, PairTexts)
    return show_texts(texts, tokenizer, data, end_token_id(Renderer(template), tokenizer))


def pieces(segments: list[Segment]) -> list[tuple[str, str]]:
    return [(segment.kind, segment.text) for segment in segments]


def test_what_a_person_is_shown(bpe: PreTrainedTokenizerFast) -> None:
    found = shown(colour(), bpe, section(chat_template=CHATML))
    assert pieces(found["chosen"]) == [
        ("prompt", ASKED),
        ("response", "Blue."),
        ("end", "<|im_end|>"),
    ]
    assert pieces(found["rejected"]) == [
        ("prompt", ASKED),
        ("response", "Seven."),
        ("end", "<|im_end|>"),
    ]
    # A token across the boundary, a BOS, and what is cut.
    found = shown(colour("1 2 a", "b", "0"), bpe, section(chat_template="none"))
    assert pieces(found["chosen"]) == [
        ("prompt", "1 2"),
        ("response", " ab"),
        ("end", "<|endoftext|>"),
    ]
    tokenizer = byte_level(bos="<|begin_of_text|>")
    for template in ("none", "{{ bos_token }}" + CHATML):
        found = shown(colour(), tokenizer, section(chat_template=template))
        assert found["chosen"][0].text.count("<|begin_of_text|>") == 1
        assert found["chosen"][0].text.startswith("<|begin_of_text|>")
    long = colour("1 " * 3, "2 " * 8, "0 ")
    found = shown(long, bpe, section(chat_template="none", max_length=12))
    kinds = [kind for kind, _ in pieces(found["chosen"])]
    assert kinds == ["prompt", "response", "cut"]
    assert found["chosen"][2].text.endswith("<|endoftext|>")
    assert [kind for kind, _ in pieces(found["rejected"])] == ["prompt", "response", "end"]


@given(
    prompt=TEXT, replies=st.tuples(REPLY, REPLY), template=TEMPLATES, max_length=st.integers(8, 60)
)
@SOME
def test_the_segments_are_what_the_tokens_stand_for(
    any_tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    replies: tuple[str, str],
    template: str,
    max_length: int,
) -> None:
    any_tokenizer.chat_template = None
    pair, data = colour(prompt, *replies), section(chat_template=template, max_length=max_length)
    found, _ = tokenize([pair], any_tokenizer, section(chat_template=template))
    assume(found)
    (whole,) = found
    kept, _ = tokenize([pair], any_tokenizer, data)
    for side, segments in shown(pair, any_tokenizer, data).items():
        full, start = getattr(whole, f"{side}_ids"), getattr(whole, f"{side}_start")
        texts = {piece.kind: piece.text for piece in segments}
        cut, asked, all_but_cut, everything = (
            len(full) > max_length,
            *(any_tokenizer.decode(full[:stop]) for stop in (start, max(start, max_length), None)),
        )
        assert list(texts) == [
            kind for kind in ("prompt", "response", "end", "cut") if kind in texts
        ]
        assert ("cut" in texts) == cut != ("end" in texts)
        if "\ufffd" in asked + all_but_cut and "\ufffd" not in everything:
            continue  # a boundary goes through a character
        assert "".join(texts.values()) == everything
        assert texts.get("prompt", "") == asked[: len(texts.get("prompt", ""))]
        assert any_tokenizer.is_lossy or texts.get("prompt", "") == asked
        if kept:
            assert list(getattr(kept[0], f"{side}_ids")) == list(full[:max_length])
            assert "".join(text for kind, text in texts.items() if kind != "cut") == all_but_cut


def test_many_pairs_at_once_are_as_each_alone(any_tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    words = ["a", "Blue", " ", "🦜", "é", "\n", "hello ", "0"]
    pairs = [
        colour(*("".join(rng.choices(words, k=rng.randrange(1, 12))) + "x" for _ in range(3)))
        for _ in range(200)
    ]
    any_tokenizer.chat_template = None
    data = section(max_length=60, max_prompt_length=40)
    kept, counts = tokenize(pairs, any_tokenizer, data)
    alone = [tokenize([pair], any_tokenizer, data) for pair in pairs]
    assert [list(pair.chosen_ids) for pair in kept] == [
        list(p.chosen_ids) for found, _ in alone for p in found
    ]
    assert [list(pair.rejected_ids) for pair in kept] == [
        list(p.rejected_ids) for found, _ in alone for p in found
    ]
    assert sum(counts.values()) == sum(bool(reasons) for _, reasons in alone)


def test_a_template_that_strips_the_reply_is_followed_and_one_that_rewrites_it_refused(
    bpe: PreTrainedTokenizerFast,
) -> None:
    strips, lowers = (
        CHATML.replace("m.content", f"m.content | {verb}") for verb in ("trim", "lower")
    )
    pair = colour("name", chosen="  Blue. \n")
    assert split_text(bpe, pair, chat_template=strips)[1] == "Blue.<|im_end|>"
    assert split_text(bpe, pair, chat_template=CHATML)[1] == "  Blue. \n<|im_end|>"
    kept, counts = tokenize(
        [pair, colour("a", "blue", "seven")], bpe, section(chat_template=lowers)
    )
    assert (len(kept), counts) == (1, {REWRITTEN: 1})


def test_places_ascend(bpe: PreTrainedTokenizerFast) -> None:
    pairs = [
        Pair((user(f"{i}"),), f"{i} a", "b" if i % 7 else "<|im_end|>", f"x:{i}")
        for i in range(300)
    ]
    kept, counts = tokenize(pairs, bpe, section(chat_template=CHATML))
    assert counts == {SPECIAL: 43}
    places = [int(pair.where[2:]) for pair in kept]
    assert all(one < other for one, other in pairwise(places))
