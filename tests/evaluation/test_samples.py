"""Answers before and after: those that transformers and peft give, and nothing of a training is lost for them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, first_and_long, tiny_llama, tiny_opt, write_base
from peft import PeftModel
from test_loop import train_all
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from orpo_lite.api import train_events
from orpo_lite.errors import CheckpointError
from orpo_lite.evaluation.samples import NEUTRAL, TEMPERATURE
from orpo_lite.model.generate import Answerer, prompt_seed
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import RESULT, SAMPLES, read_json, read_samples

Build = Callable[..., Recipe]
FULL = ("quantization.load_in_4bit=false", "model.dtype=float32", "training.learning_rate=1e-2")
MEMORY_SETTINGS = {
    "plain": ("memory.packing=false",),
    "all": ("memory.mlp_tile=3", "memory.embedding_on_cpu=true", "memory.checkpoint_offload=true"),
}


def answered(model: Any, folder: Path, ids: list[int], seed: int) -> str:
    """By transformers alone."""
    tokenizer, config = (
        AutoTokenizer.from_pretrained(folder),
        GenerationConfig.from_pretrained(folder),
    )
    config.update(do_sample=True, temperature=TEMPERATURE, max_new_tokens=8)
    torch.manual_seed(prompt_seed(seed, ids))
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=config
    )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("memory_settings", MEMORY_SETTINGS.values(), ids=list(MEMORY_SETTINGS))
def test_the_answers_are_those_of_base_and_adapter(
    small_recipe: Build, memory_settings: tuple[str, ...]
) -> None:
    """To the prompt as whoever loads the result will render it; under the memory settings as without them."""
    _, result = train_all(
        small_recipe(*FULL, *memory_settings, "output.samples=2", "training.seed=5")
    )
    folder = result.run / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained("base").eval()
    neutral = [sample for sample in result.samples if sample.source == "neutral"]
    assert [sample.prompt for sample in neutral] == list(NEUTRAL[:2])
    assert [sample.source for sample in result.samples] == ["neutral"] * 2 + ["held-out"] * 2
    turns = [[{"role": "user", "content": sample.prompt}] for sample in neutral]
    ids = [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        for turn in turns
    ]
    before = [answered(base, folder, prompt, 5) for prompt in ids]
    adapted = PeftModel.from_pretrained(base, folder).eval()
    after = [answered(adapted, folder, prompt, 5) for prompt in ids]
    assert [sample.before for sample in neutral] == before
    assert [sample.after for sample in neutral] == after
    assert before != after
    assert all("Item" in sample.prompt for sample in result.samples[2:])
    written = [json.loads(line) for line in (result.run / SAMPLES).read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in written] == [
        (step, sample.prompt) for step in (0, 2, 4) for sample in result.samples
    ]
    assert [sample.by_step[4] for sample in neutral] == after


def test_a_training_with_samples_is_the_one_without_them(small_recipe: Build) -> None:
    """Dropout draws from torch's generators at each step; answers between the steps must not."""
    adapters = []
    for count in (0, 2):
        _, result = train_all(
            small_recipe(
                "lora.lora_dropout=0.2",
                f"output.samples={count}",
                "training.eval_steps=1",
                f"training.output_dir=run-{count}",
            )
        )
        adapters.append((result.run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(result.samples[0].by_step) == 5
    assert adapters[0] == adapters[1]


@pytest.mark.long
def test_none_and_many(small_recipe: Build) -> None:
    _, result = train_all(small_recipe("output.samples=0", "training.max_steps=1"))
    assert result.samples == ()
    assert not (result.run / SAMPLES).exists()
    assert "## Samples" not in (result.run / "README.md").read_text()
    keys = (
        "output.samples=20",
        "training.max_steps=1",
        "training.output_dir=many",
        "output.max_new_tokens=1",
    )
    _, result = train_all(small_recipe(*keys))
    held_out = read_json(result.run / "data.json")["held_out_pairs"]
    assert len(result.samples) == len(NEUTRAL) + held_out


def test_a_text_may_hold_any_line_separator(small_recipe: Build) -> None:
    """Python's splitlines takes U+2028 and its kin for the end of a line, JSON does not."""
    recipe = small_recipe("training.max_steps=1")
    base = write_base(Path("base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.add_tokens(["\u2028", "\u0085"]) == 2
    write_base(base, tiny_llama(len(tokenizer)))
    tokenizer.save_pretrained(base)
    rows = [
        {"prompt": f"Tell{i}\u2028me\u0085", "chosen": "yes", "rejected": "no"} for i in range(10)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, result = train_all(recipe)
    assert "\u2028" in result.samples[-1].prompt
    assert tuple(read_samples(result.run)) == result.samples
    (result.run / SAMPLES).write_text('{"prompt"\n')
    with pytest.raises(CheckpointError, match=r"samples\.jsonl:1: cannot be read"):
        read_samples(result.run)


def test_without_template_and_without_held_out_pairs(small_recipe: Build) -> None:
    keys = ("data.chat_template=none", "data.test_split_size=0", "training.max_steps=1")
    _, result = train_all(small_recipe(*keys))
    assert [(sample.source, sample.prompt) for sample in result.samples] == [
        ("neutral", NEUTRAL[0])
    ]


@pytest.mark.long
def test_an_answer_ends_where_the_model_has_no_positions_left(small_recipe: Build) -> None:
    """OPT has learned 256; looking for more of them is an error."""
    recipe = small_recipe(
        "data.max_length=256", "data.max_prompt_length=254", "training.max_steps=1"
    )
    write_base(Path("base"), tiny_opt(len(byte_tokenizer())))
    rows = [{"prompt": f"{i}" + "x" * 240, "chosen": "yes", "rejected": "no"} for i in range(10)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe.override(
        {"data.chat_template": "none", "output.max_new_tokens": 64, "output.samples": 10}
    )
    updates, result = train_all(recipe)
    assert not [update.text for update in updates if "answered" in update.text]
    held_out = [sample for sample in result.samples if sample.source == "held-out"]
    assert held_out
    assert all(max(len(sample.before), len(sample.after)) <= 256 - 242 for sample in held_out)


def test_a_fault_while_answering_costs_the_answers_only(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(Answerer, "answer", fail)
    updates, result = train_all(small_recipe("training.max_steps=1"))
    assert any("prompts are not answered: CUDA out of memory" in update.text for update in updates)
    assert {"adapter", "README.md", RESULT} <= {path.name for path in result.run.iterdir()}


@pytest.mark.parametrize("stop_at", first_and_long([2, 0, 4]))
def test_stopped_while_answering_it_goes_on_and_each_answer_is_there_once(
    small_recipe: Build, stop_at: int
) -> None:
    recipe, step = small_recipe("output.samples=2"), 0
    with pytest.raises(Interrupted) as stopped:
        for update in train_events(recipe):
            step = update.step if update.kind in ("step", "eval") else step
            if update.text == "answering prompts" and step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 130
    with (Path("run") / SAMPLES).open("a") as stream:  # as if killed while it wrote
        stream.write('{"step": 3, "source": "neutral", "prompt": "a", "answer": "b"}\n{"step": 3, ')
    updates, result = train_all(recipe, resume=True)
    assert [update.step for update in updates if update.kind == "step"] == [*range(stop_at + 1, 5)]
    _, whole = train_all(recipe.override({"training.output_dir": "whole"}))
    rows = [(run / SAMPLES).read_text().splitlines() for run in (result.run, whole.run)]
    assert sorted(rows[0]) == sorted(rows[1])
    assert len(rows[0]) == 12
    assert result.samples == whole.samples


def test_the_same_under_full_determinism(small_recipe: Build) -> None:
    _, result = train_all(small_recipe("training.full_determinism=true", "training.max_steps=1"))
    assert len(result.samples) == 2
