"""Send the metrics of a training to trackers, with accelerate's tracker classes.

A remote tracker gets numbers and the recipe, but no text of the data. report.html quotes texts
of the data, so the report is sent only if ``output.send_report`` is set.
"""

import math
import os
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from orpo_lite.errors import Command, FitError, HubError, first_line
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.records import REPORT, read_json, read_metrics
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update, failure

Result = TypeVar("Result")

IDS = "trackers.json"
PROJECT = "orpo-lite"
WANDB_TIMEOUT = 60.0  # seconds, for the start of a run and again for its end


def check_trackers(recipe: Recipe) -> None:
    """Check that each tracker in ``training.report_to`` can be used. Never wait for input.

    Raises:
        FitError: the package of a tracker is not installed.
        HubError: wandb is in online mode and cannot log in.
    """
    for name in recipe.training.report_to:
        try:
            metadata.version(name)  # an import would also find a folder of that name
        except metadata.PackageNotFoundError:
            raise FitError(
                where=f"training.report_to ({recipe.sources['training.report_to']})",
                found=f"{name} is not installed",
                expected=f"the package {name}",
                fix=Command(f"pip install {name}"),
            ) from None
    if "wandb" in recipe.training.report_to and (fault := _wandb_fault()):
        raise HubError(
            where=f"training.report_to ({recipe.sources['training.report_to']})",
            found=fault,
            expected="a login to wandb, or its offline mode, which keeps the metrics in the run "
            "folder",
            fix=Command("wandb login", "; or, for offline mode: export WANDB_MODE=offline"),
        )


def _wandb_fault() -> str:
    """Return why wandb cannot log in; "" if it can, or if it is not in online mode.

    ``wandb.init`` is not used, because it would ask for a missing API key and wait for input.
    """
    import wandb

    if _wandb_mode() != "online":
        return ""
    try:
        return "" if wandb.login(prompt=False) else "wandb is not logged in"
    except Exception as error:  # the server refuses the key, or does not answer
        return f"wandb cannot log in ({first_line(error)[:300]})"


def _wandb_mode() -> str:
    """Return wandb's mode. WANDB_MODE is read here, because wandb ignores later changes of it."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True, console="off")).settings
    return os.environ.get("WANDB_MODE") or str(settings.mode)


class Trackers:
    """The trackers of a run. If a tracker fails, the training continues without this tracker."""

    def __init__(self, recipe: Recipe, path: Path, *, is_main: bool) -> None:
        """Use the trackers in ``training.report_to``, but only in the main process."""
        self._recipe, self._path = recipe, path
        self._names = recipe.training.report_to if is_main else []
        self._active: dict[str, Any] = {}

    def start(self, state: TrainState, *, resumed: bool) -> Iterator[Update]:
        """Start the trackers. Yield a note for each tracker: how to open it, or why it failed.

        Args:
            state: the state of the training; ``state.step`` is the last finished step.
            resumed: True if the training is resumed. Then the trackers keep their old values.
                tensorboard deletes the values of steps after ``state.step``.
        """
        config = {
            key: value if isinstance(value, bool | int | float | str) else to_text(value)
            for key, value in self._recipe.items()
        }
        for name in self._names:
            try:
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                    tracker = self._make(name, state.step if resumed else None)
                    tracker.start()
                    self._active[name] = tracker
                    # In tensorboard, each resume would add another set of hyper-parameters.
                    if name != "tensorboard" or not resumed:
                        tracker.store_init_configuration(config)
                yield Update("note", f"{name}: {self._place(name)}")
            except Exception as error:
                yield self._drop(name, error)
        # tensorboard deleted the values of state.step too. The training does not repeat this step.
        if resumed and "tensorboard" in self._active:
            for row in read_metrics(self._path):
                if row["step"] == state.step:
                    yield from self._call_one("tensorboard", _log, row)

    def follow(self, updates: Generator[Update, None, Result]) -> Generator[Update, None, Result]:
        """Yield a training's updates and log their metrics. Return the training's result."""
        if not self._active:
            return (yield from updates)
        try:
            while True:
                try:
                    update = next(updates)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                if update.kind in ("step", "eval"):
                    yield from self._call(_log, {"step": update.step, **update.metrics})
                yield update
        finally:
            updates.close()

    def send_report(self) -> Iterator[Update]:
        """Send report.html to wandb and trackio if it exists and ``output.send_report`` is set."""
        file = self._path / REPORT
        if self._recipe.output.send_report and file.is_file():
            for name, send in (("wandb", _send_to_wandb), ("trackio", _send_to_trackio)):
                yield from self._call_one(name, send, file)

    def finish(self) -> None:
        """End the runs in the trackers. An error is logged but not raised."""
        for name in [*self._active]:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                for _ in self._call_one(name, lambda tracker: tracker.finish()):
                    pass
        self._active.clear()

    def _make(self, name: str, after_step: int | None) -> Any:
        """Return a tracker of accelerate that is not started yet."""
        create = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            return create("tensorboard", logging_dir=str(self._path), purge_step=after_step)
        project, run_id = _project(name), self._run_id()
        if name == "trackio":
            # trackio finds a run to continue by its name. A space on the hub is public by default.
            named = f"{self._path.name}-{run_id}"
            return create(project, name=named, resume="allow", private=True)
        import wandb

        # Without console="off", wandb would send printed samples of the data.
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            init_timeout=WANDB_TIMEOUT,
            finish_timeout=WANDB_TIMEOUT,
        )
        options = {"dir": str(self._path), "mode": _wandb_mode(), "settings": settings}
        return create(project, name=self._path.name, id=run_id, resume="allow", **options)

    def _run_id(self) -> str:
        """Return the id of the run in wandb and trackio. The run folder stores it."""
        file = self._path / IDS
        if not file.is_file():
            write_text(file, to_json({"id": secrets.token_hex(4)}))
        return str(read_json(file, {"id": str})["id"])

    def _place(self, name: str) -> str:
        """Return a text that gives the command or the URL that opens the tracker."""
        if name == "tensorboard":
            return f"to open it, run tensorboard --logdir {self._path / name}"
        if name == "trackio":
            return f"to open it, run trackio show --project {_project(name)}"
        url = self._active[name].tracker.url
        return str(url or f"offline, in {self._path / 'wandb'}; to send the run, use wandb sync")

    def _call(self, function: Callable[..., object], *args: Any) -> Iterator[Update]:
        """Call ``function`` with each tracker and the arguments."""
        for name in [*self._active]:
            yield from self._call_one(name, function, *args)

    def _call_one(self, name: str, function: Callable[..., object], *args: Any) -> Iterator[Update]:
        if name not in self._active:
            return
        try:
            function(self._active[name], *args)
        except Exception as error:
            yield self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> Update:
        self._active.pop(name, None)
        return failure(f"{name} failed and is not used any more; the training continues", error)


def _project(name: str) -> str:
    return os.environ.get(f"{name.upper()}_PROJECT") or PROJECT


def _log(tracker: Any, row: Mapping[str, Any]) -> None:
    """Log a row of metrics.jsonl, without its null, NaN and infinite values."""
    values = {
        key: value
        for key, value in row.items()
        if key != "step" and value is not None and math.isfinite(value)
    }
    tracker.log(values, step=row["step"])


def _send_to_wandb(tracker: Any, file: Path) -> None:
    import wandb

    tracker.log({"report": wandb.Html(file.read_text(encoding="utf-8"), inject=False)})


def _send_to_trackio(_tracker: Any, file: Path) -> None:
    import trackio

    trackio.save(file)
