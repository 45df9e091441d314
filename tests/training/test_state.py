"""A checkpoint's JSON is the training's state, with a version; those of earlier versions still load."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from orpo_lite.api import train, train_events
from orpo_lite.errors import CheckpointError
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import read_metrics
from orpo_lite.training.state import VERSION, TrainState

FORMAT_0 = (
    Path(__file__).parent / "checkpoint-0"
)  # as version 0.1.0 wrote it, before the format had a number
SMALL = ("lora.r=2", "lora.target_modules=q_proj")  # what that run was trained with


def test_a_checkpoint_holds_the_state_and_nothing_else(small_recipe: Callable[..., Recipe]) -> None:
    result = train(small_recipe(*SMALL))
    written = json.loads(
        (result.run / "checkpoints/step-0000004/state.json").read_text(encoding="utf-8")
    )
    assert list(written) == ["version", *(field.name for field in fields(TrainState))]
    assert written["version"] == VERSION
    state = TrainState.from_json(written, "state.json")
    assert {"version": VERSION, **asdict(state)} == written
    assert (state.step, state.before, state.after) == (4, dict(result.before), dict(result.after))


def test_a_checkpoint_of_the_first_format_goes_on(small_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(Interrupted):
        for update in train_events(small_recipe(*SMALL)):
            if update.kind == "step" and update.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    (folder,) = Path("run/checkpoints").glob("step-0000002")
    shutil.rmtree(folder)
    shutil.copytree(FORMAT_0, folder)
    old = json.loads((FORMAT_0 / "state.json").read_text(encoding="utf-8"))
    assert "version" not in old
    result = train(small_recipe(*SMALL), resume=True)
    assert result.steps == 4
    assert result.before == old["before"]
    assert [row["step"] for row in read_metrics(result.run) if "loss" in row] == [1, 2, 3, 4]
    assert read_metrics(result.run)[-2]["num_tokens"] > old["num_tokens"]


def test_the_settings_of_a_step_that_ran_out_of_memory_are_read_under_their_old_name() -> None:
    old = json.loads((FORMAT_0 / "state.json").read_text(encoding="utf-8")) | {
        "levers": {"micro_batch_size": 1}
    }
    assert TrainState.from_json(old, "state.json").memory == {"micro_batch_size": 1}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": VERSION + 1}, f"version {VERSION + 1}"),
        ({"surplus": 1}, "missing or unknown fields"),
        ({"version": "1"}, "ver"),
    ],
)
def test_another_format_is_refused(change: dict[str, object], found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        TrainState.from_json(TrainState().to_json() | change, "state.json")


def test_the_best_evaluation_is_the_one_of_the_lowest_loss() -> None:
    state = TrainState()
    seen = []
    for step, loss in enumerate((3.0, 2.0, math.nan, 2.0, 1.0)):
        state.step = step
        seen.append(
            (state.note_evaluation({"eval_loss": loss}), state.best_step, state.worse_in_a_row)
        )
    assert seen == [(True, 0, 0), (True, 1, 0), (False, 1, 1), (False, 1, 2), (True, 4, 0)]
    assert (state.before, state.after, state.latest) == (
        {"eval_loss": 3.0},
        {"eval_loss": 1.0},
        {"eval_loss": 1.0},
    )
    assert not TrainState().note_evaluation({})
