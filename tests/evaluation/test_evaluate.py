"""Runs, merged folders and plain models are scored on the same pairs, and what is compared is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer, byte_tokenizer, write_base, write_pairs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orpo_lite import merge, train
from orpo_lite.errors import CheckpointError, OrpoLiteError, Overrides, RecipeError
from orpo_lite.evaluation.compare import Evaluation
from orpo_lite.evaluation.evaluate import evaluate, evaluate_events
from orpo_lite.evaluation.report import make_page
from orpo_lite.evaluation.run_record import RunRecord
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.lock import read_recipe
from orpo_lite.runs.records import read_json, read_metrics, read_scores
from orpo_lite.updates import run_to_end

Build = Callable[..., Any]
Call = Callable[..., Answer]
Trained = tuple[list[Any], Any]


def evaluated(*models: Any, **options: Any) -> tuple[Evaluation, list[str]]:
    """The result, and the stages and notes on the way."""
    said: list[str] = []
    updates = evaluate_events(*models, **options)
    return run_to_end(updates, lambda update: said.append(update.text)), said


def test_a_training_records_the_scores_of_each_pair_and_judges_by_them(trained: Trained) -> None:
    run, result = trained[1].run, trained[1]
    rows = {row["step"]: row for row in read_scores(run)}
    metrics = {row["step"]: row for row in read_metrics(run) if "eval_loss" in row}
    assert rows.keys() == metrics.keys() == {0, 2, 4}
    for step, row in rows.items():
        chosen, rejected = np.array(row["chosen"]), np.array(row["rejected"])
        assert len(chosen) == 8
        means = [chosen.mean(), rejected.mean(), sum(row["nll"]) / sum(row["nll_tokens"])]
        names = ("eval_logps/chosen", "eval_logps/rejected", "eval_nll_loss")
        assert means == pytest.approx([metrics[step][name] for name in names], rel=1e-6)
    verdict = read_json(run / "verdict.json")
    assert verdict == result.verdict
    assert [model["name"] for model in verdict["models"]] == ["base", "tuned"]
    for model, known in zip(verdict["models"], (result.before, result.after), strict=True):
        assert model["accuracy"]["value"] == known["eval_rewards/accuracies"]
        assert model["log_odds"]["value"] == pytest.approx(known["eval_log_odds_chosen"], rel=1e-5)
        assert model["nll"]["value"] == pytest.approx(known["eval_nll_loss"], rel=1e-6)
    assert (verdict["pairs"], verdict["prompts"], verdict["held_out"]) == (8, 8, True)


def test_a_run_is_scored_as_in_its_training_and_its_base_by_the_same_load(
    trained: Trained, call: Call
) -> None:
    run = trained[1].run
    code, printed, _ = call("eval", str(run))
    assert code == 0
    found, verdict = (read_json(run / f"{name}.json") for name in ("eval", "verdict"))
    for ours, known in zip(found["models"], verdict["models"], strict=True):
        for name in ("accuracy", "margin", "log_odds", "nll"):
            assert ours[name] == pytest.approx(known[name], abs=1e-5)
    (ours,), (known,) = found["comparisons"], verdict["comparisons"]
    assert (ours["against"], ours["outcome"]) == ("base", known["outcome"])
    assert found["length_rule"] == verdict["length_rule"]
    assert printed.count("loading") == 1
    assert "the pairs that the run held out" in printed
    assert ours["text"] in printed


def test_other_pairs_are_scored_and_those_trained_on_are_named(
    trained: Trained, workspace: Path, call: Call
) -> None:
    run = trained[1].run
    found, said = evaluated(run, data=["data.dataset_name=pairs.jsonl"])
    assert (found.pairs, found.held_out) == (40, False)
    assert (
        f"warning: {run} was trained on the prompts of 32 of the 40 pairs, so its results will look too good"
        in said
    )
    assert "scoring 40 pairs of pairs.jsonl: all pairs" in said
    assert "on 40 pairs of 40 prompts" in found.comparisons[0].text
    folder = workspace / "others"
    folder.mkdir()
    for name, count in (("train", 20), ("test", 12)):
        rows = write_pairs(folder / f"{name}.jsonl", count, seed=3).read_text()
        (folder / f"{name}.jsonl").write_text(rows.replace("Item", f"Another {name}"))
    code, printed, _ = call("eval", str(run), "data.dataset_name=others", "--json")
    shown = json.loads(printed)
    kept = read_json(run / "eval.json")
    assert (code, shown) == (0, {key: kept[key] for key in shown})
    assert kept["run"] == str(run)
    # Of a run that was trained further, the evaluation is no longer shown.
    (said,) = [row["text"] for row in shown["comparisons"]]
    assert said in make_page([RunRecord.read(run)])
    (run / "eval.json").write_text(json.dumps(kept | {"adapter": "another"}))
    record = RunRecord.read(run)
    assert said not in make_page([record])
    assert "earlier adapter" in record.notes[0]
    # It has a split of its own to test on.
    assert (shown["pairs"], shown["held_out"], shown["data"]) == (12, True, "others, split test")


def test_two_runs_on_one_base_are_loaded_once(trained: Trained) -> None:
    run = trained[1].run
    shutil.copytree(run, "half")
    file = Path("half/adapter/adapter_model.safetensors")
    save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file)
    found, said = evaluated(run, "half")
    base, tuned, half = found.models
    assert [base.name, tuned.name, half.name] == ["base", str(run), "half"]
    assert [text.startswith("loading") for text in said].count(True) == 1
    assert half.margin.value == pytest.approx(evaluate("half").models[1].margin.value, abs=1e-6)
    known = read_json(run / "verdict.json")["models"][1]
    assert tuned.margin.value == pytest.approx(known["margin"]["value"], abs=1e-5)
    names = [(one.model, one.against) for one in found.comparisons]
    assert names == [(str(run), "base"), ("half", "base")]
    (against,) = evaluate(run, against="half").comparisons
    expected = (tuned.margin.value or 0) - (half.margin.value or 0)
    assert against.differences.margin.value == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 0.01


@torch.no_grad()
def test_a_merged_folder_and_a_plain_model_are_scored_too(trained: Trained) -> None:
    run = trained[1].run
    merged = merge(run).folder
    found = evaluate(merged)
    assert ([model.name for model in found.models], found.comparisons) == ([str(merged)], ())
    assert not Path(merged, "eval.json").exists()
    found = evaluate(merged, against="./base")
    assert [model.name for model in found.models] == [str(merged), "./base"]
    inputs = run_to_end(prepare_inputs(read_recipe(run)), lambda _: None)
    model = AutoModelForCausalLM.from_pretrained("base").eval()
    margins = []
    for pair in inputs.test:
        means = []
        for ids, start in (
            (pair.chosen_ids, pair.chosen_start),
            (pair.rejected_ids, pair.rejected_start),
        ):
            row = torch.tensor(np.array(ids), dtype=torch.long)
            logps = model(row[None]).logits[0].log_softmax(-1)
            means.append(float(logps[start - 1 : -1].gather(1, row[start:, None]).mean()))
        margins.append(means[0] - means[1])
    assert found.models[1].margin.value == pytest.approx(np.mean(margins), abs=1e-5)
    assert found.models[1].accuracy.value == np.mean(np.array(margins) > 0)


def test_what_cannot_be_compared_is_said(trained: Trained, workspace: Path) -> None:
    run = trained[1].run
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[OrpoLiteError], str]] = [
        ((), {}, RecipeError, "no model to score"),
        (("./base",), {}, RecipeError, "no pairs to score"),
        ((run,), {"data": ["lora.r=4"]}, RecipeError, "is not data.KEY=VALUE"),
        ((run,), {"data": ["data.max_lenght=4"]}, RecipeError, "max_length"),
        (("./base",), {"against": "base", "data": ["data.dataset_name=pairs.jsonl"]},
         CheckpointError, "no adapter to switch off"),
    ]  # fmt: skip
    for models, options, kind, text in cases:
        with pytest.raises(kind, match=text):
            evaluate(*models, **options)
    with pytest.raises(RecipeError) as raised:
        evaluate(run, data=["pairs.jsonl"])
    assert isinstance(raised.value.fix, Overrides)
    data = [f"{key}={value}" for key, value in raised.value.fix.values.items()]
    write_pairs(workspace / "pairs.jsonl", 39)
    with pytest.raises(CheckpointError, match="changed since the run began"):
        evaluate(run)
    found, said = evaluated(run, data=data)
    assert any("unknown whether run was trained on these pairs" in text for text in said)
    assert (found.pairs, found.held_out) == (39, False)


def test_a_training_that_starts_from_an_adapter_is_judged_against_it(
    trained: Trained, small_recipe: Build
) -> None:
    recipe = small_recipe(
        "model.adapter_name_or_path=run/adapter", "training.output_dir=further", "output.samples=0"
    )
    verdict = train(recipe).verdict
    assert verdict is not None
    start, _ = verdict["models"]
    assert start["name"] == "the adapter it started from"
    known = read_json(trained[1].run / "verdict.json")["models"][1]
    assert start["margin"]["value"] == pytest.approx(known["margin"]["value"], abs=1e-5)


def test_another_template_scores_the_same_pairs(trained: Trained, workspace: Path) -> None:
    """Pairs that one of two models has no room for are left out for both."""
    write_base(workspace / "other")
    tokenizer = byte_tokenizer()
    prefix = "x" * (96 - len("<s>") // 3 - len("Item 7: how is it?"))
    turn = "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = f"{prefix}{{% for m in messages %}}{turn}{{% endfor %}}"
    tokenizer.save_pretrained(workspace / "other")
    found = evaluate(trained[1].run, against="./other", data=["data.dataset_name=pairs.jsonl"])
    assert found.pairs == 10  # their numbers have one digit
    assert found.comparisons[0].differences.margin.value is not None
    assert found.comparisons[0].differences.nll.value is None  # not the same tokens
