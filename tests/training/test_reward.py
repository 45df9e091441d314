"""Reward models: a rule is learnt, transformers and peft read the same rewards, replies are scored."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer, byte_tokenizer, tiny_opt, write_base
from peft import PeftModel
from test_resume import go_on, same_bits, stop_at
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import orpo_lite
from orpo_lite.api import train
from orpo_lite.errors import DataError, ModelError, RecipeError
from orpo_lite.evaluation import rewards
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe
from orpo_lite.training.result import TrainResult

Build = Callable[..., Recipe]
TEMPLATE = (  # writes a line end after the token that ends a reply, as many templates do
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HELD_OUT = 100


def letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("abcdefghij") for _ in range(count))


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A reward model of the rule that a good reply has an even number of letters; read only."""
    folder = tmp_path_factory.mktemp("parity")
    base = write_base(folder / "base", tiny_opt(len(byte_tokenizer())))
    rng = random.Random(0)
    rows = [
        {
            "prompt": letters(rng, 6),
            "chosen": letters(rng, 2 * rng.randint(2, 10)),
            "rejected": letters(rng, 2 * rng.randint(2, 10) + 1),
        }
        for _ in range(500)
    ]
    (folder / "chat.jinja").write_text(TEMPLATE)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.model_name_or_path": base,
        "quantization.load_in_4bit": "false",
        "lora.r": 16,
        "data.dataset_name": folder / "pairs.jsonl",
        "data.dataset_test_split": "null",
        "data.chat_template": folder / "chat.jinja",
        "data.test_split_size": HELD_OUT,
        "loss.type": "reward",
        "training.output_dir": folder / "run",
        "training.learning_rate": 1e-2,
        "training.max_steps": 30,
        "training.eval_steps": 30,
    }
    return train(load_recipe("demo", [f"{key}={value}" for key, value in settings.items()]))


@pytest.mark.long
def test_a_rule_is_learnt(parity: TrainResult) -> None:
    assert parity.before["eval_rewards/accuracies"] < 0.7
    (model,) = orpo_lite.evaluate(parity.run).models
    assert model.accuracy.value is not None
    assert model.accuracy.low is not None
    assert model.accuracy.value > 0.95
    assert model.accuracy.low > 0.9
    assert model.log_odds.value is None
    assert parity.verdict
    assert parity.verdict["comparisons"][0]["outcome"] == "better"
    assert not parity.samples


def test_transformers_and_peft_read_the_same_rewards(parity: TrainResult, tmp_path: Path) -> None:
    """The adapter and the merged model, in one padded batch of conversations."""
    data, to = tmp_path / "replies.jsonl", tmp_path / "rewards.jsonl"
    texts = ("abcd", "abcde", "abcdefghij", "ab")
    rows = [{"prompt": "abcabc", "response": text} for text in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert orpo_lite.score(parity.run, str(data), to=to).replies == len(texts)
    ours = [json.loads(line)["reward"] for line in to.read_text().splitlines()]
    assert min(ours[0], ours[2], ours[3]) > ours[1]  # the odd one

    adapter = parity.run / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    turns = [
        [{"role": "user", "content": "abcabc"}, {"role": "assistant", "content": text}]
        for text in texts
    ]
    batch = tokenizer(
        tokenizer.apply_chat_template(turns, tokenize=False),
        add_special_tokens=False, padding=True, return_tensors="pt", return_token_type_ids=False,
    )  # fmt: skip
    base = AutoModelForSequenceClassification.from_pretrained(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"],
        num_labels=1,
    )
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    tuned.config.pad_token_id = tokenizer.pad_token_id
    merged, keys = AutoModelForSequenceClassification.from_pretrained(
        orpo_lite.merge(parity.run).folder, output_loading_info=True
    )
    assert not any(keys.values())
    with torch.no_grad():
        for model in (tuned, merged.eval()):
            found = model(**batch).logits[:, 0].tolist()
            assert found == pytest.approx(ours, rel=1e-4, abs=1e-4)
    assert orpo_lite.verify(parity.run).outcome == "passed"
    (of_run,) = orpo_lite.evaluate(parity.run).models
    (of_merged,) = orpo_lite.evaluate(parity.run / "merged").models
    assert of_merged.margin.value == pytest.approx(of_run.margin.value, rel=1e-4)


def test_replies_are_scored_and_a_stopped_command_goes_on(
    parity: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"instruction": "abcabc", "output": "abcd", "id": 1},
        {"instruction": "abcabc", "output": " "},
        {"instruction": "", "output": "abcd"},
        {"instruction": "abcabc", "output": "a" * 2000},
        {"instruction": "abcabc", "output": "abcd\ud800"},
        {"instruction": "abcabc", "output": "abc"},
    ]
    data = tmp_path / "answers.json"
    data.write_text(json.dumps(rows))
    monkeypatch.setattr(rewards, "BLOCK", 2)
    plain, calls = rewards._Scorer.lines, []

    def lines(self: Any, block: Any) -> Any:
        calls.append(len(block))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, block)

    monkeypatch.setattr(rewards._Scorer, "lines", lines)
    to = tmp_path / "rewards.jsonl"
    with pytest.raises(KeyboardInterrupt):
        orpo_lite.score(parity.run, str(data), to=to)
    assert not to.exists()
    result = orpo_lite.score(parity.run, str(data), to=to)
    assert calls == [2, 2, 2, 2]  # the first block was not scored again
    assert result.replies == 2
    found = [json.loads(line) for line in to.read_text().splitlines()]
    assert [row["instruction"] for row in found] == [row["instruction"] for row in rows]
    assert [row["reward"] is None for row in found] == [False, True, True, True, True, False]
    assert "positions" in found[3]["reason"]
    assert found[0]["id"] == 1
    assert [*tmp_path.glob(".*")] == []
    with pytest.raises(RecipeError, match="exists already"):
        orpo_lite.score(parity.run, str(data), to=to)


def test_each_reply_has_its_own_reward(parity: TrainResult, tmp_path: Path) -> None:
    """A reply that cannot be scored costs no other one its reward."""

    def scored(name: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
        data, to = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-rewards.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        orpo_lite.score(parity.run, str(data), to=to)
        return [json.loads(line) for line in to.read_text().splitlines()]

    long = "a" * 2000
    (one,) = scored("one", {"prompt": "abcabc", "response": "abcd"})
    for column in ("responses", "output"):
        (row,) = scored(column, {"prompt": "abcabc", column: ["abcd", "", long, "abcd"]})
        same = pytest.approx(one["reward"], rel=1e-4)
        assert row["rewards"] == [same, None, None, same]
        assert "positions" in row["reason"]
    pairs = {"prompt": "abcabc", "chosen": "abcd"}
    both, cut = scored("pairs", {**pairs, "rejected": "abc"}, {**pairs, "rejected": long})
    assert both["reward_chosen"] == pytest.approx(one["reward"], rel=1e-4)
    assert both["reward_rejected"] < both["reward_chosen"]
    assert cut["reward_chosen"] == pytest.approx(one["reward"], rel=1e-4)
    assert cut["reward_rejected"] is None
    with pytest.raises(DataError, match="column reward already"):
        scored("clash", {"prompt": "abcabc", "response": "abcd", "reward": 9})
    with pytest.raises(DataError, match="no reply can be scored"):
        scored("none", {"prompt": "abcabc", "response": ""})
    assert not (tmp_path / "none-rewards.jsonl").exists()


def test_a_model_that_reads_its_reward_elsewhere_is_refused(
    parity: TrainResult, tmp_path: Path
) -> None:
    """transformers reads at the last token that is not the pad token."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "abcabc", "response": "abcd"}) + "\n")
    folder = tmp_path / "model"
    shutil.copytree(orpo_lite.merge(parity.run).folder, folder)
    assert orpo_lite.score(folder, str(data), to=tmp_path / "same.jsonl").replies == 1
    for name, key, value, said in (
        ("config.json", "pad_token_id", 2, "pad token"),
        ("chat_template.jinja", "", TEMPLATE, "does not end"),
    ):
        file = folder / name
        text = file.read_text()
        file.write_text(json.dumps(json.loads(text) | {key: value}) if key else str(value))
        with pytest.raises(ModelError, match=said):
            orpo_lite.score(folder, str(data), to=tmp_path / "other.jsonl")
        file.write_text(text)


def test_a_reward_model_writes_no_text(
    parity: TrainResult, call: Callable[..., Answer], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abcabc"}\n')
    for words in (
        ("generate", str(parity.run), "--prompts", str(prompts)),
        ("chat", str(parity.run)),
    ):
        code, _, complaint = call(*words)
        assert code == ModelError.exit_code
        assert f"orpo-lite score {parity.run} --data" in complaint


def test_a_reward_model_starts_from_a_language_model_and_resumes_with_the_same_bits(
    small_recipe: Build, trained: tuple[list[Any], TrainResult]
) -> None:
    start = f"model.adapter_name_or_path={trained[1].run / 'adapter'}"
    reward = ("loss.type=reward", start, "training.max_steps=2", "training.eval_steps=1")
    whole = train(small_recipe(*reward, "training.output_dir=whole"))
    killed = stop_at(1, small_recipe(*reward, "training.output_dir=killed"))
    assert same_bits(go_on(killed)[1].run, whole.run)
    again = f"model.adapter_name_or_path={whole.run / 'adapter'}"
    train(small_recipe("loss.type=reward", again, "training.max_steps=1", "training.output_dir=b"))
    with pytest.raises(ModelError, match="adapter of a reward model") as raised:
        train(small_recipe(again, "training.output_dir=c"))
    assert "model.adapter_name_or_path=null" in raised.value.fix
    assert not Path("c").exists()
    weights = whole.run / "adapter" / "adapter_model.safetensors"
    shutil.copy(trained[1].run / "adapter" / weights.name, weights)
    with pytest.raises(ModelError, match="score head"):
        orpo_lite.merge(whole.run)


def test_a_model_without_a_class_for_rewards_is_refused(small_recipe: Build) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = CohereConfig(
        vocab_size=len(byte_tokenizer()), num_attention_heads=2, num_key_value_heads=2, **sizes
    )
    write_base(Path("cohere"), CohereForCausalLM(config))
    with pytest.raises(ModelError, match="cannot be a reward model"):
        train(small_recipe("loss.type=reward", "model.model_name_or_path=cohere"))
    assert not Path("run").exists()
