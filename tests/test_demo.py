"""The embedded default, from the command to the merged model, as a new user runs it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Answer, DemoRun
from transformers import AutoModelForCausalLM

import orpo_lite
from orpo_lite.recipe.reader import find_recipe
from orpo_lite.recipe.schema import KEYS
from orpo_lite.runs.lock import read_recipe
from orpo_lite.runs.records import read_json, read_metrics, read_samples


@pytest.fixture
def demo(demo_run: DemoRun) -> tuple[Path, str, float]:
    """The run folder, what was printed, and the processor seconds that it took."""
    assert demo_run.complained == ""
    return demo_run.run, demo_run.printed, demo_run.seconds


def test_a_fair_fight_is_won_by_training(demo: tuple[Path, str, float]) -> None:
    """Held-out accuracy after quantisation and before the first step, and at the end; on at least 100 pairs."""
    rows = [row for row in read_metrics(demo[0]) if "eval_loss" in row]
    assert read_json(demo[0] / "data.json")["held_out_pairs"] >= 100
    assert 0.35 <= rows[0]["eval_rewards/accuracies"] <= 0.65
    assert rows[-1]["eval_rewards/accuracies"] >= 0.95


def test_it_went_through_the_real_path(demo: tuple[Path, str, float]) -> None:
    recipe = read_recipe(demo[0])
    assert recipe.quantization.load_in_4bit
    assert recipe.quantization.bnb_4bit_quant_type == "nf4"
    assert recipe.training.optim == "paged_adamw_8bit"
    assert recipe.lora.target_modules == "all-linear"


def test_at_most_three_minutes(demo: tuple[Path, str, float]) -> None:
    """In processor time, which a busy neighbour does not stretch; on free cores the clock shows no more than that."""
    assert demo[2] < 180


def test_it_ends_with_a_table_answers_and_a_remark(demo: tuple[Path, str, float]) -> None:
    path, printed, _ = demo
    assert "held-out pairs" in printed
    assert "before" in printed
    assert "reward accuracy" in printed
    samples = read_samples(path)
    assert [sample.source for sample in samples] == ["neutral"] * 3 + ["held-out"] * 3
    assert "3 more, to neutral prompts, in runs/demo/samples.jsonl" in printed
    for sample in samples:
        assert (sample.prompt in printed) is (sample.source == "held-out")
        assert (sample.after in printed) is (sample.source == "held-out")
    assert any(sample.before != sample.after for sample in samples)
    assert "not" in printed.splitlines()[-1]  # the remark: machinery, not quality
    assert "\x1b[" not in printed


def test_the_merged_model_is_plain_transformers(demo: tuple[Path, str, float]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo[0] / "merged")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_demo_is_a_recipe_like_any_other() -> None:
    """No line of the code knows its name, and it may hold no key that another recipe may not."""
    for file in (Path(orpo_lite.__file__).parent).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert '== "demo"' not in text
        assert "== 'demo'" not in text
    written = yaml.safe_load(find_recipe("demo").read_text(encoding="utf-8"))
    assert all(set(section) <= set(KEYS[name]) for name, section in written.items())


def test_demo_with_another_base_and_other_data_is_an_ordinary_run(
    workspace: Path, call: Callable[..., Answer]
) -> None:
    command = [
        "train",
        "--recipe",
        "demo",
        "model.model_name_or_path=./base",
        "data.dataset_name=./pairs.jsonl",
    ]
    code, said, complaint = call(*command, "training.max_steps=2", "output.samples=1")
    assert code == 0, complaint
    assert "built-in" not in said
    assert (workspace / "runs" / "demo" / "merged" / "config.json").is_file()
    assert not (workspace / "runs" / "builtin").exists()
