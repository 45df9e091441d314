"""An error's fix is data: applied as it stands, it cures the fault."""

import copy
import pickle
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_lite.errors import (
    Command,
    HubError,
    OrpoLiteError,
    Overrides,
    RecipeError,
    one_of,
    raise_all,
    reworded,
)
from orpo_lite.planning.fit import does_not_fit
from orpo_lite.planning.plan import plan
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.updates import run_to_end

Build = Callable[..., Recipe]
WRONG = [
    ["data.max_prompt_length=128"],
    ["training.early_stopping_patience=2", "data.test_split_size=0"],
    ["memory.packing=false", "memory.head_chunk=64"],
    ["memory.checkpoint_offload=true", "memory.activation_checkpointing=none"],
    ["lora.r=none"],
    ["data.max_length=400"],  # the base reads 256 tokens, and one pair is longer
    ["lora.target_modules=query"],
    ["data.dataset_name=./renamed.jsonl"],
    ["data.test_split_size=40"],
]


def ready(recipe: Recipe) -> None:
    run_to_end(prepare_inputs(recipe), lambda _: None)


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_overrides_cure_the_fault_that_carries_them(
    small_recipe: Build, workspace: Path, wrong: list[str]
) -> None:
    pairs = (workspace / "pairs.jsonl").read_text(encoding="utf-8")
    renamed = (
        pairs.replace('"prompt"', '"my question"')
        .replace('"chosen"', '"good"')
        .replace('"rejected"', '"bad"')
    )
    (workspace / "renamed.jsonl").write_text(renamed, encoding="utf-8")
    if wrong == ["data.max_length=400"]:
        longest = '{"prompt": "Go on?", "chosen": "' + "so " * 110 + '", "rejected": "No."}\n'
        (workspace / "pairs.jsonl").write_text(pairs + longest, encoding="utf-8")
    with pytest.raises(OrpoLiteError) as caught:
        ready(small_recipe(*wrong))
    assert isinstance(caught.value.fix, Overrides), caught.value
    ready(
        small_recipe(
            *wrong, *(f"{key}={to_text(value)}" for key, value in caught.value.fix.values.items())
        )
    )


def test_commands_cure_the_fault_that_carries_them(
    small_recipe: Build, call: Callable[..., Any]
) -> None:
    def cure(*arguments: str) -> str:
        """Run the line that a refused command shows; what that prints."""
        code, _, said = call(*arguments)
        assert code == 5, said
        line = said.partition("  fix: ")[2].partition(", or ")[0]
        code, out, said = call(*shlex.split(line)[1:])
        assert code == 0, said
        return out

    small_recipe()
    code, _, said = call(
        "train", "--recipe", "./small.yaml", "training.max_steps=2", "output.merge=false"
    )
    assert code == 0, said
    assert "adapter of step" in cure("train", "--recipe", "./small.yaml")
    assert "merged model: run/merged" in cure("export", "run", "--to", "gguf")


@pytest.mark.long
def test_what_would_fit_is_data_too(small_recipe: Build) -> None:
    recipe = small_recipe(
        "memory.budget=700MiB", "data.max_length=2048", "lora.r=64", "training.optim=adamw_torch"
    )
    report = plan(recipe)
    error = does_not_fit(report.plan, report.changes)
    if isinstance(error.fix, Overrides):
        assert plan(recipe.override(error.fix.values)).plan.needed < report.plan.needed
    else:
        assert not any(change.fits for change in report.changes)


def test_a_fix_prints_as_words_and_keeps_its_data() -> None:
    fix = Overrides({"data.max_length": 256, "lora.use_dora": False}, ", or another base")
    assert fix == "data.max_length=256 lora.use_dora=false, or another base"
    assert fix.values == {"data.max_length": 256, "lora.use_dora": False}
    error = RecipeError(where="here", found="that", expected="this", fix=fix)
    assert error.fix is fix
    assert str(error) == f"here: that\n  expected: this\n  fix: {fix}"
    line = Command("orpo-lite merge run", ", or another run")
    assert (line, line.line) == ("orpo-lite merge run, or another run", "orpo-lite merge run")
    both = one_of([fix, Overrides({"lora.r": 8})])
    assert both == f"{fix} or lora.r=8"
    assert isinstance(both, Overrides)
    assert both.values == fix.values
    assert one_of(["this", "that"]) == "this or that"


def test_a_token_in_a_fix_is_never_shown() -> None:
    token = "hf_" + "a" * 30
    assert "hf_***" in HubError(found="no", fix=Command(f"export HF_TOKEN={token}")).fix


def test_faults_are_raised_as_one() -> None:
    one, other = RecipeError(found="this"), RecipeError(found="that")
    with pytest.raises(RecipeError, match=r"2 faults:\nthis\nthat"):
        raise_all([one, other])


def test_an_error_keeps_its_fix_when_copied_amended_or_joined_with_others() -> None:
    fix = Overrides({"lora.r": 8})
    of_two, stopped = (
        RecipeError(where="lora.r", found="0", fix=fix),
        Interrupted(signal.SIGTERM, Path("run")),
    )
    for error, part in ((of_two, "values"), (stopped, "line")):
        same = pickle.loads(pickle.dumps(copy.deepcopy(copy.copy(error))))  # noqa: S301 - made here
        assert (type(same), str(same), same.exit_code) == (type(error), str(error), error.exit_code)
        assert getattr(same.fix, part) == getattr(error.fix, part)
    amended = reworded(fix, f"{fix}\n  then: go on")
    assert (amended, amended.values) == ("lora.r=8\n  then: go on", fix.values)  # type: ignore[attr-defined]
    for other, common in (("lora.r=8", None), (Overrides({"lora.r": 8}, " at most"), fix.values)):
        with pytest.raises(RecipeError) as caught:
            raise_all([RecipeError(found="one", fix=fix), RecipeError(found="two", fix=other)])
        assert str(caught.value).count("fix: ") == 2
        assert getattr(caught.value.fix, "values", None) == common
