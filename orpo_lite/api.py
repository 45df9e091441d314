"""Train and verify: what chains several verbs, for notebooks and for the command line."""

import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from orpo_lite import demo
from orpo_lite.base.adapter import adopt_adapter
from orpo_lite.base.find import fetch_weights
from orpo_lite.base.weights import check_weights
from orpo_lite.evaluation.samples import answer_prompts
from orpo_lite.evaluation.verify import Verdict, compare_merged
from orpo_lite.model.generate import Sample
from orpo_lite.model.parallel import Processes
from orpo_lite.model.quantize import skipped_modules
from orpo_lite.objectives.objective import find_objective
from orpo_lite.planning.choose import PLAN, choose_memory
from orpo_lite.publishing.model_card import write_card
from orpo_lite.publishing.push import check_push, find_licences
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.commands import Weights
from orpo_lite.runs.folder import create, locked, logged, refuse_existing
from orpo_lite.runs.inputs import Inputs, prepare_inputs, with_absolute_paths
from orpo_lite.runs.interrupt import collect_signals
from orpo_lite.runs.lock import check_lock, make_lock
from orpo_lite.training.faults import explain_faults
from orpo_lite.training.loop import train_steps
from orpo_lite.training.result import TrainResult, keep_best
from orpo_lite.training.session import load_session, restore_session
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update, run_to_end, with_torch_defaults


def train(recipe: Recipe, *, resume: bool = False) -> TrainResult:
    """Train as ``recipe`` says; ``resume`` goes on with the run in ``training.output_dir``.

    Leaves the run folder: adapter, metrics, samples and model card. Merge and push are verbs of their own.

    Raises:
        OrpoLiteError: anything the person can fix, before weights load wherever it can be known by then.
    """
    return run_to_end(train_events(recipe, resume=resume), lambda _: None)


@with_torch_defaults
def train_events(recipe: Recipe, *, resume: bool = False) -> Generator[Update, None, TrainResult]:
    """:func:`train` as a generator: yields an :class:`Update` for all that happens and returns the result."""
    objective = find_objective(recipe.loss)
    processes = Processes()
    if not resume:
        processes.on_main(refuse_existing, recipe)
    if processes.is_main:
        yield from check_push(recipe, resume=resume)
    recipe = with_absolute_paths(adopt_adapter(recipe))
    if processes.is_main:
        for done, total in demo.make_builtin(recipe):
            yield Update("stage", "training the built-in base", done, total)
    processes.wait()
    resolved = demo.resolve_builtin(recipe)
    inputs = yield from prepare_inputs(resolved)
    path = Path(recipe.training.output_dir)
    licences = find_licences(recipe, inputs) if processes.is_main and not resume else {}
    resolved, plan = yield from choose_memory(resolved, inputs, path, processes)
    inputs = replace(inputs, base=fetch_weights(inputs.base))
    check_weights(inputs.base)
    lock = make_lock(resolved, inputs)
    lock["objective"] = objective.to_json()
    lock["not_quantised"] = skipped_modules(resolved, inputs.base.config, processes.device)
    processes.wait()
    if resume:
        processes.on_main(check_lock, path, lock)
    else:
        processes.on_main(create, recipe, lock | {"licences": licences}, inputs.figures)
    if plan:
        processes.on_main(write_text, path / PLAN, to_json(plan))
    processes.wait()
    with ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(locked(path))
            stack.enter_context(logged(path))
        stop = stack.enter_context(collect_signals())
        stack.enter_context(explain_faults(resolved, path))
        return (yield from _train(resolved, inputs, path, processes, stop, resume=resume))


def _train(
    recipe: Recipe, inputs: Inputs, path: Path, processes: Processes, stop: list[int], *, resume: bool
) -> Generator[Update, None, TrainResult]:
    """Load, train, keep the best adapter; then answer prompts and write the model card."""
    began = time.monotonic()
    session = yield from load_session(recipe, inputs, path, processes, stop)
    state = TrainState()
    if resume:
        state = yield from restore_session(session)
    yield from train_steps(session, state, saved=resume)
    kept = yield from keep_best(session, state)
    samples: tuple[Sample, ...] = ()
    if processes.is_main:
        samples = yield from answer_prompts(recipe, inputs, session.pair_model, path, stop)
        write_card(path)
    processes.wait()
    return TrainResult(
        run=path,
        steps=state.step,
        seconds=time.monotonic() - began,
        before=state.before,
        after=state.after,
        kept_step=kept,
        samples=samples,
    )


def verify(run_folder: str | Path, *, weights: Weights = "original", base_path: str | Path | None = None) -> Verdict:
    """Compare a merged model with its base and adapter, and write the model card again; see :func:`compare_merged`."""
    return run_to_end(verify_events(run_folder, weights=weights, base_path=base_path), lambda _: None)


def verify_events(
    run_folder: str | Path, *, weights: Weights = "original", base_path: str | Path | None = None
) -> Generator[Update, None, Verdict]:
    """:func:`verify` as a generator of updates."""
    verdict = yield from compare_merged(run_folder, weights=weights, base_path=base_path)
    write_card(Path(run_folder))
    return verdict
