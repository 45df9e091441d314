"""The real sets and tokenizers of ../shared. Their text is offensive in places: assertions show counts and truths."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from orpo_lite.data.formats import PROMPTS_DIFFER, Pair
from orpo_lite.data.pairs import (
    CUT,
    EMPTY_CHOSEN,
    end_token_id,
    hold_out,
    prompt_key,
    read_pairs,
    set_chat_template,
    tokenize_pairs,
)
from orpo_lite.recipe import DataSection

SHARED = Path(__file__).parents[2] / "shared"
HH = SHARED / "data" / "hh-rlhf-harmless.jsonl"
ALPACA = SHARED / "data" / "alpaca-prefs"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data and models in ../shared"),
]


def section(path: Path, **fields: Any) -> DataSection:
    return DataSection(**{"dataset_name": str(path), "test_split_size": 0, **fields})


def test_hh_rlhf_drops_what_its_readme_counts() -> None:
    found = read_pairs(section(HH))
    assert found.detected.startswith("detected hh_rlhf because ")
    assert found.drops == {EMPTY_CHOSEN: 2, PROMPTS_DIFFER: 3}
    assert (found.read, len(found.train)) == (1200, 1195)
    # 0-based rows 43 and 568 are empty; 650, 1018 and 1019 differ before the reply.
    left = {f"{HH.name}:{number}" for number in range(1, 1201)} - {pair.where for pair in found.train}
    assert left == {f"{HH.name}:{row + 1}" for row in (43, 568, 650, 1018, 1019)}


def test_hh_rlhf_text_is_kept_to_the_character() -> None:
    rows = [json.loads(line) for line in HH.read_text("utf-8").split("\n") if line]
    for pair in read_pairs(section(HH)).train:
        row = rows[int(pair.where.rpartition(":")[2]) - 1]
        same = [(pair.prompt_text or "") + reply == row[side] for side, reply in sides(pair).items()]
        assert same == [True, True], pair.where
        roles = [turn["role"] for turn in pair.messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)], pair.where
        assert roles[-1] == "user", pair.where


def sides(pair: Pair) -> dict[str, str]:
    return {"chosen": pair.chosen, "rejected": pair.rejected}


def test_alpaca_prefs_are_read_without_a_flag() -> None:
    found = read_pairs(section(ALPACA, dataset_test_split="test"))
    assert found.detected.startswith("detected messages because ")
    assert (len(found.train), len(found.test), found.drops) == (900, 100, {})
    prompts = [{prompt_key(pair) for pair in side} for side in (found.train, found.test)]
    assert [len(keys) for keys in prompts] == [483, 54]
    assert not prompts[0] & prompts[1]
    assert all([turn["role"] for turn in pair.messages] == ["user"] for pair in found.train)
    row = json.loads((ALPACA / "train.jsonl").read_text("utf-8").partition("\n")[0])
    first = found.train[0]
    assert (first.messages[0]["content"], first.chosen) == (row["prompt"], row["chosen"][-1]["content"])
    # Each file alone, and the default split by prompt: 2% of 483 prompts.
    pairs = read_pairs(section(ALPACA / "train.jsonl")).train
    train, test = hold_out(pairs, [prompt_key(pair) for pair in pairs], 0.02, 42)
    assert len({prompt_key(pair) for pair in test}) == 10
    assert not {prompt_key(pair) for pair in test} & {prompt_key(pair) for pair in train}


@pytest.mark.parametrize("name", ["stories260k", "babyllama1m"])
@pytest.mark.parametrize(("path", "template"), [(HH, "auto"), (HH, "none"), (ALPACA / "train.jsonl", "auto")])
def test_round_trip(name: str, path: Path, template: str) -> None:
    """Every token of every pair decodes to the rendered text, and the end is there exactly once."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    data = section(path, chat_template=template, max_length=20_000, max_prompt_length=10_000)
    set_chat_template(tokenizer, data)
    pairs = read_pairs(data).train[::3]
    kept, counts = tokenize_pairs(pairs, tokenizer, data, vocab_size=len(tokenizer))
    assert (len(kept), counts) == (len(pairs), {})
    bos, end = tokenizer.bos_token_id, end_token_id(tokenizer, data)
    for pair, tokens in zip(pairs, kept, strict=True):
        asked = pair.prompt_text or ""
        if template == "auto":
            asked = tokenizer.apply_chat_template(list(pair.messages), tokenize=False, add_generation_prompt=True)
        for (side, reply), ids, start in zip(
            sides(pair).items(),
            (tokens.chosen_ids, tokens.rejected_ids),
            (tokens.chosen_start, tokens.rejected_start),
            strict=True,
        ):
            place = f"{pair.where}, {side}"
            text = tokenizer.decode(ids).removeprefix("<s>").removeprefix(" ")  # both, with the dummy space, are added
            assert digest(text.replace("</s> ", "</s>")) == digest(asked + reply + "</s>"), place
            assert list(ids).count(bos) == 1, place
            assert list(ids[start:]).count(end) == 1, place
            assert ids[-1] == end, place
            # The prompt is what generation will see, unless a token of the reply begins in it.
            alone = tokenizer(asked).input_ids
            assert list(ids[:start]) == alone[:start], place
            assert len(alone) - start in (0, 1), place


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_models_own_context_cuts_and_counts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k")
    data = section(HH, max_length=512, max_prompt_length=384)
    set_chat_template(tokenizer, data)
    pairs = read_pairs(data).train
    kept, counts = tokenize_pairs(pairs, tokenizer, data, vocab_size=512)
    end = tokenizer.eos_token_id
    ends = [ids[-1] == end for tokens in kept for ids in (tokens.chosen_ids, tokens.rejected_ids)]
    assert all(
        tokens.chosen_start <= 384 and max(len(tokens.chosen_ids), len(tokens.rejected_ids)) <= 512 for tokens in kept
    )
    assert counts[CUT] == ends.count(False) > 0
    assert len(kept) + sum(count for reason, count in counts.items() if reason != CUT) == len(pairs)
