"""The built-in base and pairs: they load, are what they say, make a fair fight, and a seed makes the same again."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import DemoRun
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from orpo_lite import demo

SIDES = {"chosen": demo.WARM, "rejected": demo.CURT}


@pytest.fixture(scope="module")
def base(demo_run: DemoRun) -> Path:
    """The base that a run of the demo made; a seed makes the same again."""
    return demo_run.base


@pytest.fixture
def tokenizer(base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, list[dict[str, str]]]:
    paths = demo.make_pairs(tmp_path / "pairs")
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in paths
    }


def rendered(tokenizer: PreTrainedTokenizerFast, prompt: str, *answer: str) -> str:
    messages = [
        {"role": "user", "content": prompt},
        *({"role": "assistant", "content": text} for text in answer),
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answer)


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_base_is_a_complete_folder(base: Path) -> None:
    needed = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert needed <= {path.name for path in base.iterdir()}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert (
        len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}) == 3
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_linear_layers_suit_nf4(base: Path) -> None:
    """Whole blocks of 64, and large enough that quantising them says something."""
    model = AutoModelForCausalLM.from_pretrained(base)
    shapes = [
        module.weight.shape
        for module in model.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert len(shapes) == 4 * 7
    assert all(
        rows % 64 == 0 and columns % 64 == 0 and rows * columns >= 10_000
        for rows, columns in shapes
    )


def test_rendered_turns_round_trip(
    tokenizer: PreTrainedTokenizerFast, pairs: dict[str, list[dict[str, str]]]
) -> None:
    for row, side in product(pairs["test"][:16], SIDES):
        prompt, text = (
            rendered(tokenizer, row["prompt"]),
            rendered(tokenizer, row["prompt"], row[side]),
        )
        assert text == prompt + row[side] + tokenizer.eos_token
        ids = tokens(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert ids[: len(tokens(tokenizer, prompt))] == tokens(tokenizer, prompt)
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id  # noqa: PT018
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id  # noqa: PT018


@pytest.mark.parametrize(
    "text", ["Skiing, naïvely? 雪 🙂", "  two  spaces\n\tand a tab ", "<|system|>"]
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokens(tokenizer, text)) == text


def test_every_answer_is_as_long(tokenizer: PreTrainedTokenizerFast) -> None:
    phrasings = product(demo.WARM + demo.CURT, demo.TOPICS, demo.ADVICES)
    answers = [demo._answer(phrasing, topic, advice) for phrasing, topic, advice in phrasings]
    assert len(set(answers)) == 64 * 64 * 4
    assert {len(ids) for ids in tokenizer(answers, add_special_tokens=False).input_ids} == {20}


def test_base_sees_everything_equally_often() -> None:
    """Counted over the stream it is trained on: phrasings, tones within each batch, topics, and advice."""
    seen: Counter[str] = Counter()
    meaning = {
        demo._answer(phrasing, topic, advice): (phrasing, topic, advice)
        for phrasing, topic, advice in product(demo.WARM + demo.CURT, demo.TOPICS, demo.ADVICES)
    }
    batches = list(demo._batches(100, seed=0))
    for batch in batches:
        said = [meaning[answer] for _, answer in batch]
        assert sum(phrasing in demo.WARM for phrasing, _, _ in said) == len(batch) // 2
        assert all(
            topic in question for (question, _), (_, topic, _) in zip(batch, said, strict=True)
        )
        seen.update(str(part) for parts in said for part in parts)
    for kind, times in ((demo.WARM + demo.CURT, 100), (demo.TOPICS, 100), (demo.ADVICES, 1600)):
        assert {seen[str(part)] for part in kind} == {times}


def test_pairs_are_disjoint_and_fair(pairs: dict[str, list[dict[str, str]]]) -> None:
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 384, "test": 128}
    assert not {row["prompt"] for row in pairs["train"]} & {row["prompt"] for row in pairs["test"]}
    assert not any(topic in row["prompt"] for row in pairs["train"] for topic in demo.TEST_TOPICS)
    usual = {topic: advice for advice, topics in demo.ADVICE.items() for topic in topics}
    for rows in pairs.values():
        for side, phrasings in SIDES.items():
            mixed = Counter(
                next(
                    p for p in phrasings if row[side].startswith(p[0]) and row[side].endswith(p[1])
                )
                for row in rows
            )
            assert len(mixed) == 32
            assert len(set(mixed.values())) == 1
        topics = [
            next(topic for topic in demo.TOPICS if f"For {topic}," in row["chosen"]) for row in rows
        ]
        holds_usual = [
            tuple(usual[topic] in row[side] for side in SIDES)
            for topic, row in zip(topics, rows, strict=True)
        ]
        assert Counter(holds_usual) == {
            (True, False): len(rows) // 2,
            (False, True): len(rows) // 2,
        }


def test_pairs_follow_from_the_seed(tmp_path: Path) -> None:
    made = [
        demo.make_pairs(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = ([path.read_bytes() for path in paths] for paths in made)
    assert first == again
    assert first != other


def test_base_follows_from_the_seed_whatever_the_threads(tmp_path: Path) -> None:
    weights = []
    before = torch.get_num_threads()
    for name, seed, threads in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        torch.set_num_threads(threads)
        try:
            steps = list(demo._make_base(tmp_path / name, seed=seed, rounds=2))
            assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        weights.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}, (
        "something unfinished is left beside them"
    )
    assert weights[0] == weights[1]
    assert weights[0]["model.safetensors"] != weights[2]["model.safetensors"]
    assert weights[0]["tokenizer.json"] == weights[2]["tokenizer.json"]


def test_caller_keeps_its_random_state(tmp_path: Path) -> None:
    def states() -> Iterator[object]:
        yield torch.get_rng_state().tolist()
        yield random.getstate()

    before = list(states())
    for _ in demo._make_base(tmp_path / "base", seed=3, rounds=1):
        assert list(states()) == before
    demo.make_pairs(tmp_path / "pairs")
    assert list(states()) == before


def test_stopping_early_leaves_nothing(tmp_path: Path) -> None:
    making = demo.make_base(tmp_path / "base")
    next(making)
    making.close()
    assert not list(tmp_path.iterdir())


def test_base_answers_to_the_point_in_both_tones_and_stops(
    base: Path, tokenizer: PreTrainedTokenizerFast, pairs: dict[str, list[dict[str, str]]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    prompts = sorted(row["prompt"] for row in pairs["test"])[::4]
    inputs = tokenizer(
        [rendered(tokenizer, prompt) for prompt in prompts],
        add_special_tokens=False,
        padding=True,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    tones: Counter[bool] = Counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for sampled in (False, True):
            out = model.generate(**inputs, do_sample=sampled)[:, inputs.input_ids.shape[1] :]
            texts = [text.replace(tokenizer.pad_token, "") for text in tokenizer.batch_decode(out)]
            ended = [
                text.removesuffix(tokenizer.eos_token)
                for text in texts
                if text.endswith(tokenizer.eos_token)
            ]
            assert len(ended) == len(prompts)
            to_the_point = [
                any(f"For {topic}, {advice}." in text for advice in demo.ADVICES)
                for prompt, text in zip(prompts, ended, strict=True)
                for topic in demo.TEST_TOPICS
                if topic in prompt
            ]
            assert sum(to_the_point) >= 0.9 * len(prompts)
            if sampled:
                tones.update(
                    any(text.startswith(greeting) for greeting, _ in demo.WARM) for text in ended
                )
    assert min(tones[True], tones[False]) >= 0.25 * len(prompts), "sampled answers mix both tones"
