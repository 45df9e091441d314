"""Answers in batches: those of transformers one prompt at a time, in far less time."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SHARED, first_and_long, tiny_llama, tiny_opt
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from orpo_lite.model.generate import Answerer, Decoding, prompt_seed
from orpo_lite.model.pair_model import PairModel
from orpo_lite.ops.devices import OUT_OF_MEMORY

ENDS = {"eos_token_id": [2, 5], "pad_token_id": 0}
NEAR = 1e-4  # of two logits: which one is the larger depends on the order of sums


def prompts_of(count: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(0)
    return [
        [1, *(rng.randrange(6, 96) for _ in range(rng.randrange(1, longest)))] for _ in range(count)
    ]


def alone(model: Any, prompt: list[int], limit: int, **options: Any) -> list[int]:
    """The answer by transformers, one prompt at a time."""
    ids = torch.tensor([prompt])
    config = {"eos_token_id": [2, 5], "pad_token_id": 0, "max_new_tokens": limit, **options}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **config)
    row = found[0, len(prompt) :].tolist()
    return row[: next((place for place, token in enumerate(row) if token in (2, 5)), len(row))]


def all_answers(answerer: Answerer, prompts: Any, decoding: Decoding) -> list[list[int]]:
    found = {}
    for batch in answerer.answer(prompts, decoding):
        found |= batch
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def assert_same(model: Any, prompt: list[int], found: list[int], expected: list[int]) -> None:
    """Equal, or first different where the two highest logits of the model are nearly equal."""
    if found == expected:
        return
    same = next(
        (at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(expected)),
    )
    highest = model(torch.tensor([prompt + expected[:same]])).logits[0, -1].topk(2).values
    assert highest[0] - highest[1] < NEAR, f"differs at {same}: {found} and {expected}"


def sliding() -> Any:
    """Some prompts are longer than its window, some are shorter."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    return MistralForCausalLM(MistralConfig(vocab_size=96, initializer_range=0.2, **shape, **heads))


def gpt2() -> Any:
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, initializer_range=0.2, **shape))


def bloom() -> Any:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))


def mamba() -> Any:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


FAMILIES = {
    "llama": tiny_llama,
    "opt: learned positions": tiny_opt,
    "mistral: sliding window": sliding,
    "gpt2": gpt2,
    "bloom: alibi": bloom,
}


@pytest.mark.parametrize("family", first_and_long(FAMILIES))
def test_greedy_answers_of_a_batch_are_those_of_transformers(family: str) -> None:
    model = FAMILIES[family]().eval()
    answerer = Answerer(PairModel(model), ENDS)
    assert answerer.note == ""
    prompts = prompts_of(10)
    assert len(answerer.batches(prompts, 16)) == 1
    for prompt, found in zip(prompts, all_answers(answerer, prompts, Decoding(16)), strict=True):
        assert_same(model, prompt, found, alone(model, prompt, 16, do_sample=False))


def test_a_sampled_answer_is_transformers_own_and_depends_on_no_neighbour() -> None:
    model = tiny_llama().eval()
    sampling = {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    answerer = Answerer(PairModel(model), ENDS | sampling)
    prompts, decoding = prompts_of(6), Decoding(16, temperature=0.8, seed=7)
    state = torch.get_rng_state()
    found = all_answers(answerer, prompts, decoding)
    assert torch.equal(torch.get_rng_state(), state)
    for prompt, answer in zip(prompts, found, strict=True):
        torch.manual_seed(prompt_seed(7, prompt))
        expected = alone(model, prompt, 16, do_sample=True, temperature=0.8, **sampling)
        assert answer == expected
        assert all_answers(answerer, [prompt], decoding) == [answer]
    other = all_answers(answerer, prompts, Decoding(16, temperature=0.8, seed=8))
    assert sum(one != two for one, two in zip(found, other, strict=True)) >= 5


class Shifted(nn.Module):
    """A model whose padded rows are at the wrong positions, or attend to their padding."""

    def __init__(self, model: Any, fault: str) -> None:
        super().__init__()
        plain = model.forward

        def forward(input_ids: Tensor, attention_mask: Any = None, **options: Any) -> Any:
            if fault == "positions":
                options.pop("position_ids", None)
            else:
                attention_mask = None
            return plain(input_ids, attention_mask=attention_mask, **options)

        model.forward = forward
        self.model = model


@pytest.mark.parametrize("fault", ["positions", "mask"])
@pytest.mark.parametrize("make", [tiny_llama, gpt2], ids=["llama", "gpt2"])
def test_a_model_that_padding_changes_answers_one_at_a_time(
    make: Callable[[], Any], fault: str
) -> None:
    model = make().eval()
    Shifted(model, fault)
    answerer = Answerer(PairModel(model), ENDS)
    if fault == "positions" and make is tiny_llama:  # rotary positions are relative
        assert answerer.note == ""
        return
    assert "one at a time, because padding changes the model's logits" in answerer.note
    assert max(map(len, answerer.batches(prompts_of(8), 8))) == 1


def test_a_state_space_model_is_right_whichever_way() -> None:
    model = mamba().eval()
    answerer = Answerer(PairModel(model), ENDS, tokens=10_000)
    prompts = prompts_of(6)
    for prompt, found in zip(prompts, all_answers(answerer, prompts, Decoding(8)), strict=True):
        assert_same(model, prompt, found, alone(model, prompt, 8, do_sample=False))


def test_each_token_goes_through_the_model_once() -> None:
    """With a cache of keys and values: the prompts, then one token of each row at a time."""
    model = tiny_llama().eval()
    answerer, seen = Answerer(PairModel(model), {"pad_token_id": 0}), list[int]()
    assert answerer.padding_fault == ""
    model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].numel())
    )
    all_answers(answerer, [[1, 7, 8], [1, 9, 9, 9, 9]], Decoding(10))
    assert seen == [2 * 5] + [2] * 9


def test_batches_are_bounded_and_no_answer_is_cut_for_another() -> None:
    answerer = Answerer(PairModel(tiny_llama(max_position_embeddings=64)), ENDS, tokens=200)
    lengths = [3, 40, 64, 12, 44, 60, 3, 70]
    prompts = [[9] * length for length in lengths]
    batches = answerer.batches(prompts, 20)
    assert sorted(index for rows in batches for index in rows) == [
        0,
        1,
        3,
        4,
        5,
        6,
    ]  # no room for an answer in 2 and 7
    assert [5] in batches  # it has room for 4 tokens
    for rows in batches:
        assert len(rows) * (max(lengths[row] for row in rows) + 20) <= 200 or len(rows) == 1
    found = dict.fromkeys(range(8))
    for batch in answerer.answer(prompts, Decoding(20), done={1, 3, 4}):
        found |= batch
    assert [index for index, answer in found.items() if answer is None] == [1, 2, 3, 4, 7]


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().eval()
    answerer, run = Answerer(PairModel(model), ENDS), Answerer._run
    prompts = prompts_of(7)
    whole = all_answers(answerer, prompts, Decoding(8))

    def small_only(self: Answerer, rows: Any, decoding: Decoding) -> Any:
        if len(rows) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY[1])
        return run(self, rows, decoding)

    monkeypatch.setattr(Answerer, "_run", small_only)
    assert all_answers(answerer, prompts, Decoding(8)) == whole


@pytest.mark.real
def test_batches_of_a_trained_model_are_five_times_as_fast() -> None:
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "babyllama1m").eval()
    answerer = Answerer(PairModel(model), ENDS)
    rng = random.Random(0)
    letters = [
        [1, *(rng.randrange(259, 361) for _ in range(rng.randrange(20, 60)))] for _ in range(32)
    ]
    began = time.process_time()
    found = all_answers(answerer, letters, Decoding(48))
    batched = sum(map(len, found)) / (time.process_time() - began)
    began = time.process_time()
    expected = [alone(model, prompt, 48, do_sample=False) for prompt in letters[:4]]
    single = sum(map(len, expected)) / (time.process_time() - began)
    assert batched >= 5 * single, f"{batched:.0f} and {single:.0f} tokens/s"
    for prompt, one, other in zip(letters, found, expected, strict=False):
        assert_same(model, prompt, one, other)
