"""Trackers get what metrics.jsonl holds, once, also over a resume; and none of them can end a training."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker

from orpo_lite import train
from orpo_lite.api import train_events
from orpo_lite.errors import Command, FitError, HubError
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.records import read_json, read_metrics

pytest.importorskip("tensorboard")
Build = Callable[..., Recipe]


def shown(folder: Path) -> tuple[list[tuple[str, int, float]], dict[str, Any]]:
    """Return the scalars that tensorboard shows of a folder of logs, and its hyper-parameters."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = [
        (tag, event.step, event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    ]
    (child,) = (path for path in folder.iterdir() if any(path.glob("events.*")))
    settings = EventAccumulator(str(child))
    settings.Reload()
    content = settings.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info.hparams
    return scalars, {key: value.WhichOneof("kind") for key, value in start.items()}


def test_tensorboard_shows_each_row_once_after_a_kill_and_a_resume(small_recipe: Build) -> None:
    recipe = small_recipe(
        "training.report_to=tensorboard", "training.max_steps=4", "output.samples=0"
    )
    updates = train_events(recipe)
    next(update for update in updates if (update.kind, update.step) == ("step", 3))
    updates.close()  # as a kill: the checkpoint is of step 2, and step 3 is logged already
    run = Path("run")
    assert read_metrics(run)[-1]["step"] == 3
    train(recipe, resume=True)
    scalars, settings = shown(run / "tensorboard")
    assert len(scalars) > 40
    expected = {
        (key, row["step"]): value
        for row in read_metrics(run)
        for key, value in row.items()
        if key != "step"
    }
    found = {(tag, step): value for tag, step, value in scalars}
    assert len(found) == len(scalars)
    assert found == pytest.approx(expected, rel=1e-6)
    assert {"loss.beta", "lora.target_modules"} <= settings.keys()


def test_a_tracker_that_raises_ends_nothing_and_is_said_once(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        calls.append(None)
        raise OSError(28, "No space left on device")

    calls: list[None] = []
    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    recipe = small_recipe(
        "training.report_to=tensorboard", "training.max_steps=2", "output.samples=0"
    )
    notes = [update.text for update in train_events(recipe) if update.kind == "note"]
    (note,) = (note for note in notes if note.startswith("tensorboard failed"))
    assert "No space left on device" in note
    assert len(calls) == 1
    assert read_json(Path("run/result.json"))["steps"] == 2


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    recipe = small_recipe("training.report_to=tensorboard,wandb")
    monkeypatch.setattr("orpo_lite.training.trackers.metadata.version", version)
    with pytest.raises(FitError, match=r"command line.*: tensorboard is not installed") as refused:
        list(train_events(recipe))
    assert isinstance(refused.value.fix, Command)
    assert refused.value.fix.line == "pip install tensorboard"
    assert not Path("run").exists()


@pytest.mark.long
def test_wandb_asks_for_no_login_and_keeps_an_offline_run(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recipe = small_recipe("training.report_to=wandb", "training.max_steps=2")
    with pytest.raises(HubError, match="wandb is not logged in"):
        train(recipe)
    assert not Path("run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    notes = [update.text for update in train_events(recipe) if update.kind == "note"]
    assert not any("failed" in note for note in notes), notes
    run_id = read_json(Path("run/trackers.json"))["id"]
    (log,) = Path("run/wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    content = log.read_bytes()
    assert b"eval_rewards/accuracies" in content
    assert b"how is it?" not in content  # the prompts of the pairs
    Path("run/report.html").write_text("<p>what it answers")
    for is_sent in (False, True):
        recipe = recipe.override({"output.send_report": is_sent})
        train(recipe, resume=True)
        sent = [*Path("run/wandb").glob("**/media/html/report*.html")]
        assert [file.read_text() for file in sent] == ["<p>what it answers"] * is_sent
    assert read_json(Path("run/trackers.json"))["id"] == run_id
