"""The real sets and tokenizers of ../shared. Their text is offensive in places: assertions show
counts and truths."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED, first_and_long
from transformers import AutoTokenizer

from orpo_lite.data.chat_template import set_chat_template
from orpo_lite.data.pair import EMPTY_CHOSEN, PROMPTS_DIFFER, Pair, TokenizedPair
from orpo_lite.data.pairs import PairReader
from orpo_lite.data.render_process import LimitedRenderer, Renderer
from orpo_lite.data.split import held_out_sources, hold_out, prompt_key, training_sources
from orpo_lite.data.tokenize import LONG_PROMPT, end_token_id, show_texts, tokenize_pairs
from orpo_lite.recipe.schema import DataSection

HH = SHARED / "data" / "hh-rlhf-harmless.jsonl"
ALPACA = SHARED / "data" / "alpaca-prefs"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data and models in ../shared"),
]


def section(path: Path, **fields: Any) -> DataSection:
    return DataSection(**{"dataset_name": str(path), "test_split_size": 0, **fields})


def read(path: Path, **fields: Any) -> tuple[list[Pair], PairReader]:
    data = section(path, **fields)
    reader = PairReader(data, training_sources(data))
    return list(reader), reader


def test_hh_rlhf_drops_what_its_readme_counts() -> None:
    pairs, reader = read(HH)
    (sentence,) = reader.detected
    assert sentence.startswith("detected hh_rlhf because ")
    assert reader.drops.counts == {EMPTY_CHOSEN: 2, PROMPTS_DIFFER: 3}
    assert (reader.read, len(pairs)) == (1200, 1195)
    # 0-based rows 43 and 568 are empty; 650, 1018 and 1019 differ before the reply.
    places = {EMPTY_CHOSEN: (43, 568), PROMPTS_DIFFER: (650, 1018, 1019)}
    expected = {reason: [f"{HH.name}:{row + 1}" for row in rows] for reason, rows in places.items()}
    assert reader.drops.places == expected
    left = {f"{HH.name}:{number}" for number in range(1, 1201)} - {pair.where for pair in pairs}
    assert left == {where for wheres in expected.values() for where in wheres}


def test_hh_rlhf_text_is_kept_to_the_character() -> None:
    rows = [json.loads(line) for line in HH.read_text("utf-8").split("\n") if line]
    for pair in read(HH)[0]:
        row = rows[int(pair.where.rpartition(":")[2]) - 1]
        same = [
            (pair.prompt_text or "") + reply == row[side] for side, reply in sides(pair).items()
        ]
        assert same == [True, True], pair.where
        roles = [turn["role"] for turn in pair.messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)], pair.where
        assert roles[-1] == "user", pair.where


def sides(pair: Pair) -> dict[str, str]:
    return {"chosen": pair.chosen, "rejected": pair.rejected}


def test_alpaca_prefs_are_read_without_a_flag() -> None:
    data = section(ALPACA, dataset_test_split="test")
    readers = [
        PairReader(data, sources) for sources in (training_sources(data), held_out_sources(data))
    ]
    sides = [list(reader) for reader in readers]
    for reader in readers:
        (sentence,) = reader.detected
        assert sentence.startswith("detected messages because ")
        assert reader.drops.counts == {}
    assert [len(side) for side in sides] == [reader.read for reader in readers] == [900, 100]
    prompts = [{prompt_key(pair) for pair in side} for side in sides]
    assert [len(keys) for keys in prompts] == [483, 54]
    assert not prompts[0] & prompts[1]
    assert all(
        [turn["role"] for turn in pair.messages] == ["user"] for side in sides for pair in side
    )
    row = json.loads((ALPACA / "train.jsonl").read_text("utf-8").partition("\n")[0])
    first = sides[0][0]
    same = (first.messages[0]["content"], first.chosen) == (
        row["prompt"],
        row["chosen"][-1]["content"],
    )
    assert same
    # Each file alone, and the default split by prompt: 2% of 483 prompts.
    pairs, _ = read(ALPACA / "train.jsonl")
    train, test = hold_out(pairs, [prompt_key(pair) for pair in pairs], 0.02, 42)
    assert len({prompt_key(pair) for pair in test}) == 10
    assert not {prompt_key(pair) for pair in test} & {prompt_key(pair) for pair in train}


@pytest.mark.parametrize("name", first_and_long(["stories260k", "babyllama1m"]))
@pytest.mark.parametrize(("path", "template"), [(HH, "auto"), (HH, "none"), (ALPACA, "auto")])
def test_round_trip(name: str, path: Path, template: str) -> None:
    """Every token of every pair decodes to the rendered text, and the end is there exactly once."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    data = section(path, chat_template=template, max_length=20_000, max_prompt_length=10_000)
    renderer = Renderer(set_chat_template(tokenizer, data))
    bos, end = tokenizer.bos_token_id, end_token_id(renderer, tokenizer)
    count = 0
    for pair, tokens in tokenize_pairs(
        PairReader(data, training_sources(data)), renderer, tokenizer, data
    ):
        assert isinstance(tokens, TokenizedPair), f"{pair.where}: {tokens}"
        assert (tokens.where, tokens.chosen_cut, tokens.rejected_cut) == (pair.where, 0, 0)
        count += 1
        asked = pair.prompt_text or ""
        if template == "auto":
            asked = tokenizer.apply_chat_template(
                list(pair.messages), tokenize=False, add_generation_prompt=True
            )
        alone = tokenizer(asked).input_ids
        for (side, reply), ids, start in zip(
            sides(pair).items(),
            (tokens.chosen_ids, tokens.rejected_ids),
            (tokens.chosen_start, tokens.rejected_start),
            strict=True,
        ):
            place = f"{pair.where}, {side}"
            text = (
                tokenizer.decode(ids).removeprefix("<s>").removeprefix(" ")
            )  # both, with the dummy space, are added
            assert digest(text.replace("</s> ", "</s>")) == digest(asked + reply + "</s>"), place
            assert list(ids).count(bos) == 1, place
            assert max(ids) < len(tokenizer), place
            assert list(ids[start:]).count(end) == 1, place
            assert ids[-1] == end, place
            # The prompt is what generation will see, unless a token of the reply begins in it.
            same = list(ids[:start]) == alone[:start]
            assert same, place
            assert len(alone) - start in (0, 1), place
    assert count == (1195 if path == HH else 900)


@pytest.mark.parametrize("path", [HH, ALPACA])
def test_what_a_person_is_shown_is_the_rendered_text(path: Path) -> None:
    """And a process apart renders no other."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "babyllama1m")
    data = section(path, max_length=256)
    template = set_chat_template(tokenizer, data)
    end = end_token_id(Renderer(template), tokenizer)
    pairs, _ = read(path)
    here = Renderer(template)
    with LimitedRenderer(template) as apart:
        here.send(pairs)
        apart.send(pairs)
        rendered = here.receive()
        assert [item == other for item, other in zip(rendered, apart.receive(), strict=True)] == [
            True
        ] * len(pairs)
    for pair, texts in list(zip(pairs, rendered, strict=True))[::10]:
        assert isinstance(texts, tuple)
        shown = show_texts(texts, tokenizer, data, end)
        for side, reply in (("chosen", texts.chosen), ("rejected", texts.rejected)):
            whole = "".join(piece.text for piece in shown[side])
            decoded = whole.removeprefix("<s>").removeprefix(" ").replace("</s> ", "</s>")
            assert digest(decoded) == digest(texts.prompt + reply), pair.where


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_models_own_context_cuts_and_counts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k")
    data = section(HH, max_length=512, max_prompt_length=384)
    renderer = Renderer(set_chat_template(tokenizer, data))
    reader = PairReader(data, training_sources(data))
    found = [tokens for _, tokens in tokenize_pairs(reader, renderer, tokenizer, data)]
    kept = [tokens for tokens in found if isinstance(tokens, TokenizedPair)]
    end = tokenizer.eos_token_id
    cuts = [(tokens.chosen_cut, tokens.rejected_cut) for tokens in kept]
    ends = [(tokens.chosen_ids[-1] == end, tokens.rejected_ids[-1] == end) for tokens in kept]
    assert ends == [(chosen == 0, rejected == 0) for chosen, rejected in cuts]
    assert any(not chosen or not rejected for chosen, rejected in ends)
    assert all(
        tokens.chosen_start <= 384 and max(len(tokens.chosen_ids), len(tokens.rejected_ids)) <= 512
        for tokens in kept
    )
    assert (
        max(max(ids) for tokens in kept for ids in (tokens.chosen_ids, tokens.rejected_ids)) < 512
    )
    assert len(found) == 1195
    assert 0 < len(kept) < len(found)


@pytest.mark.long
def test_the_benchmark_of_the_data_screen_runs(tmp_path: Path) -> None:
    where = tmp_path / "figures.json"
    arguments = [
        str(ALPACA / "train.jsonl"),
        str(SHARED / "models" / "stories260k"),
        "--count",
        "150",
    ]
    command = [sys.executable, "-m", "benchmarks.data", *arguments, "--json", str(where)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    figures = json.loads(where.read_text("utf-8"))
    assert (figures["pairs"], figures["dropped"]) == (150, {LONG_PROMPT: 1})
    assert figures["seconds_second_start"] < figures["seconds_first_start"]
