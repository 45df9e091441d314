"""Train, verify, generate and chat: the tasks that use several packages.

Notebooks and the command line call these functions.
"""

import math
import signal
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orpo_lite import demo
from orpo_lite.base.adapter import adopt_adapter
from orpo_lite.base.find import fetch_weights
from orpo_lite.base.weights import check_weights
from orpo_lite.evaluation.answers import Answers, prepare_answers, write_answers
from orpo_lite.evaluation.chat import Chat
from orpo_lite.evaluation.gain import Kept, kept_gain, pair_log_odds
from orpo_lite.evaluation.judge import judge_training
from orpo_lite.evaluation.open_run import find_model, load_model, refuse_reward_model
from orpo_lite.evaluation.report import report
from orpo_lite.evaluation.samples import SampleWriter, find_prompts
from orpo_lite.evaluation.verify import Verdict, compare_merged, pairs_to_compare, read_gains
from orpo_lite.exporting.llama_cpp import score_pairs
from orpo_lite.merging.plan import check_mergeable
from orpo_lite.model.generate import Decoding
from orpo_lite.model.load import choose_dtype
from orpo_lite.model.parallel import Processes, check_processes
from orpo_lite.model.quantize import skipped_modules
from orpo_lite.model.score_head import refuse_classifier
from orpo_lite.objectives.objective import Objective, find_objective
from orpo_lite.ops.devices import device_kind, dtype_name
from orpo_lite.planning.choose import PLAN, choose_memory
from orpo_lite.planning.device import describe_device, refuse_slow_device
from orpo_lite.publishing.model_card import make_card, write_card
from orpo_lite.publishing.push import check_push, find_licences
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.changes import (
    Change,
    find_changes,
    other_versions,
    record_changes,
    values_in_force,
)
from orpo_lite.runs.commands import Weights
from orpo_lite.runs.folder import (
    COPIES,
    create,
    find_read_adapters,
    locked,
    logged,
    refuse_existing,
)
from orpo_lite.runs.inputs import Inputs, prepare_inputs, with_absolute_paths
from orpo_lite.runs.interrupt import Interrupted, collect_signals
from orpo_lite.runs.lock import check_lock, make_lock, read_lock, with_pinned_base
from orpo_lite.runs.records import SAMPLES, Sample, read_samples
from orpo_lite.training.adapter_files import make_adapter_files, write_adapter_files
from orpo_lite.training.faults import explain_faults
from orpo_lite.training.loop import train_steps
from orpo_lite.training.reference import add_reference
from orpo_lite.training.result import TrainResult, keep_best, write_adapter_config
from orpo_lite.training.session import (
    Session,
    load_session,
    refuse_fewer_steps,
    refuse_other_pairs,
    refuse_other_recipes,
    restore_session,
)
from orpo_lite.training.state import TrainState
from orpo_lite.training.trackers import Trackers, check_trackers
from orpo_lite.updates import (
    Update,
    attempt,
    failure,
    run_to_end,
    staged,
    with_torch_defaults,
)

NO_CARD = "the model card (README.md) is not written"
NO_REPORT = "the report (report.html) is not written"
REPORT_SHARE = 0.02
"""Share of the training's time that reports may take. The next report is written if writing the
last one took less than this share of the time since then."""
FIRST_REPORT = 5.0
"""Assumed seconds for the first report, which also loads matplotlib."""


def train(recipe: Recipe, *, resume: bool = False) -> TrainResult:
    """Train with a recipe, and write the run folder: adapter, metrics, samples, model card.

    The adapter is not merged or pushed: see :func:`orpo_lite.merge` and :func:`orpo_lite.push`.

    Args:
        recipe: the recipe. ``training.output_dir`` is the run folder.
        resume: True: continue the run in ``training.output_dir``. A key that ``recipe`` does not
            set keeps the run's value. If ``recipe`` sets a new value, the change is recorded. For a
            key that must not change, a new value is an error.

    Raises:
        OrpoLiteError: an error that the person can fix. Most errors are found before the weights
            are loaded.
    """
    return run_to_end(train_events(recipe, resume=resume), lambda _: None)


@with_torch_defaults
def train_events(recipe: Recipe, *, resume: bool = False) -> Generator[Update, None, TrainResult]:
    """Train as :func:`train` does. Yield the training's progress. Return the training's result."""
    objective = find_objective(recipe.loss)
    path = Path(recipe.training.output_dir)
    changed: dict[str, Any] = {}
    if resume:
        recipe, changed = find_changes(path, recipe)
    processes = Processes(cpu=recipe.model.device == "cpu")
    check_processes(recipe, processes.count)
    if processes.is_main:
        yield Update("note", describe_device(processes.device))
    refuse_other_recipes(recipe, processes)
    recipe = yield from _prepare_recipe(recipe, processes, resume=resume)
    adapters = find_read_adapters(recipe, path)
    resolved = demo.resolve_builtin(recipe).override(
        {COPIES[copy]: str(folder) for copy, folder in adapters.items()}
    )
    if resume:
        resolved = with_pinned_base(resolved, read_lock(path))
    inputs = yield from prepare_inputs(resolved)
    refuse_classifier(inputs.base)
    refuse_slow_device(processes.device, recipe.model.device, inputs.base.name, inputs.base.config)
    refuse_other_pairs(resolved, inputs, processes)
    if resume:
        refuse_fewer_steps(resolved, inputs, path)
    licences = find_licences(recipe, inputs) if processes.is_main and not resume else {}
    adapter_files: dict[str, bytes] = {}
    if processes.is_main:
        adapter_files, note = make_adapter_files(
            inputs, is_reward_model=recipe.loss.trains_reward_model
        )
        if note:
            yield Update("note", note)
    inputs = _only_needed(objective, inputs)
    resolved, plan = yield from choose_memory(resolved, inputs, path, processes, changed)
    inputs = replace(inputs, base=fetch_weights(inputs.base))
    check_weights(inputs.base)
    if not resume:
        check_mergeable(resolved, inputs.base)
    lock = make_lock(resolved, inputs)
    lock["objective"] = objective.to_json()
    dtype = choose_dtype(resolved.model.dtype, device_kind(processes.device))
    lock["dtype"] = dtype_name(dtype)
    lock["not_quantised"] = skipped_modules(resolved, inputs.base.config, processes.device)
    processes.wait()
    if resume:
        processes.on_main(check_lock, path, lock)
    else:
        given = {key: source for key, source in recipe.sources.items() if source != "default"}
        lock |= {"licences": licences, "recipe": dict(recipe.items()), "sources": given}
        processes.on_main(create, recipe, lock, inputs.figures, adapters)
    if plan:
        processes.on_main(write_text, path / PLAN, to_json(plan))
    processes.wait()
    with ExitStack() as stack:
        if processes.is_main:
            for note in (*stack.enter_context(locked(path)), *stack.enter_context(logged(path))):
                yield Update("note", note)
            write_adapter_files(path / "adapter", adapter_files)
        stop = stack.enter_context(collect_signals())
        stack.enter_context(explain_faults(resolved, inputs.base.config, path, processes.device))
        resumed = _ResumedRun(recipe, changed, lock) if resume else None
        return (yield from _train(resolved, inputs, path, processes, stop, resumed))


def _only_needed(objective: Objective, inputs: Inputs) -> Inputs:
    """Return the inputs without rejected responses to train on if the objective needs none."""
    if "rejected" in objective.needs:
        return inputs
    return replace(inputs, train=inputs.train.without_rejected())


def _prepare_recipe(
    recipe: Recipe, processes: Processes, *, resume: bool
) -> Generator[Update, None, Recipe]:
    """Check the recipe, train the built-in base, and return the recipe with absolute paths.

    The base is trained only if the recipe names it and it does not exist yet.
    """
    if not resume:
        processes.on_main(refuse_existing, recipe)
    check_trackers(recipe)
    if processes.is_main:
        yield from check_push(recipe, resume=resume)
    if not resume:
        recipe = with_absolute_paths(adopt_adapter(recipe))
    if processes.is_main:
        for done, total in demo.make_builtin(recipe):
            yield Update("stage", "training the built-in base", done, total)
    processes.wait()
    return recipe


@dataclass(frozen=True)
class _ResumedRun:
    """The changes of a run that is resumed."""

    recipe: Recipe
    """The recipe as in recipe.yaml: its names and paths are not resolved."""
    changed: Mapping[str, Any]
    """``section.key`` -> the new value of a setting that is changed."""
    lock: Mapping[str, Any]
    """The new content of lock.json."""

    def record(self, session: Session, step: int) -> Generator[Update, None, None]:
        """Record in the run folder that the settings changed after ``step``; yield notes."""
        path, before = session.path, read_lock(session.path)
        in_force, versions = values_in_force(path, before), other_versions(path, before, self.lock)
        session.processes.wait()
        session.processes.on_main(record_changes, path, self.recipe, self.changed, self.lock, step)
        for key, value in self.changed.items():
            yield Update(
                "note", f"changed after step {step}: {Change(key, in_force[key], value, step)}"
            )
        if self.changed and step < session.steps:
            rate = session.learning_rate(step)
            yield Update(
                "note", f"the learning rate of step {step + 1} of {session.steps} is {rate:.3g}"
            )
        for key, (old, new) in versions.items():
            name = key.removeprefix("versions.")
            yield Update(
                "note",
                f"the version of {name} changed from {old} to {new}: "
                "results may differ in the last bits",
            )
        dtype = before.get("dtype", self.lock["dtype"])
        if dtype != self.lock["dtype"]:
            now = f"the base is now loaded in {self.lock['dtype']}, and was in {dtype} before"
            yield Update("note", f"{now}; if the base is in 4 bit, its weights are now different")


def _train(
    recipe: Recipe,
    inputs: Inputs,
    path: Path,
    processes: Processes,
    stop: list[int],
    resumed: _ResumedRun | None,
) -> Generator[Update, None, TrainResult]:
    """Load the model, train, keep the best adapter, answer prompts, and write the model card.

    Before the training, the prompts are prepared and the model card is made without writing it, so
    that errors are reported early. Such an error does not end the training.
    """
    began = time.monotonic()
    # Processes that share the base must all run the passes of an answer.
    is_answering = processes.is_main or recipe.memory.shards > 1
    is_answering = is_answering and not recipe.loss.trains_reward_model
    prompts = (yield from find_prompts(recipe, inputs)) if is_answering else []
    if recipe.memory.shards > 1:
        prompts = processes.from_main(prompts)
    session = yield from load_session(recipe, inputs, path, processes, stop)
    if "reference" in session.objective.needs:
        yield from add_reference(session)
    if processes.is_main:
        write_adapter_config(path / "adapter", session.pair_model, inputs.base.name)
    state = TrainState()
    if resumed:
        # This also cuts metrics.jsonl, which the model card below reads.
        state = yield from restore_session(session, resumed.changed)
        yield from resumed.record(session, state.step)
    if processes.is_main:
        yield from attempt(NO_CARD, make_card, path)
    writes_report = recipe.output.report and processes.is_main
    trackers = Trackers(recipe, path, is_main=processes.is_main)
    answers = SampleWriter(recipe, prompts, session.pair_model, path, stop, processes)
    samples: list[Sample] = []
    verdict: dict[str, Any] | None = None
    try:
        yield from trackers.start(state, resumed=resumed is not None)
        yield from answers.answer(0)
        if state.step and state.step == state.evaluated_step:
            # The run may have been interrupted while the prompts of this step were answered.
            yield from answers.answer(state.step)
        updates = answers.follow(train_steps(session, state, saved=resumed is not None))
        updates = trackers.follow(updates)
        yield from _with_reports(updates, path) if writes_report else updates
        kept = yield from keep_best(session, state)
        is_complete = yield from answers.answer(kept)
        if not is_complete:
            raise Interrupted(stop[0] if stop else signal.SIGTERM, path)
        if processes.is_main:
            unread = f"{path / SAMPLES} is not read"
            yield from attempt(unread, lambda: samples.extend(read_samples(path)))
            verdict = yield from _judge(recipe, inputs, path, kept)
            yield from attempt(NO_CARD, write_card, path)
        if writes_report:
            yield from attempt(NO_REPORT, report, path)
        yield from trackers.send_report()
    finally:
        trackers.finish()
    processes.wait()
    return TrainResult(
        run=path,
        steps=state.step,
        seconds=time.monotonic() - began,
        before=state.before,
        after=state.after,
        kept_step=kept,
        samples=tuple(samples),
        verdict=verdict,
    )


def _judge(
    recipe: Recipe, inputs: Inputs, path: Path, kept: int
) -> Generator[Update, None, dict[str, Any] | None]:
    """Judge the training, and return the content of verdict.json.

    Return None if there are no held-out pairs. After an error, yield a note and return None.
    """
    if not inputs.test:
        return None
    try:
        return judge_training(recipe, inputs.test, path, kept).to_json()
    except Exception as error:  # the training must finish, because the adapter is good
        yield failure("the training is not judged", error)
        return None


def _with_reports(updates: Iterable[Update], path: Path) -> Iterator[Update]:
    """Yield the updates of a training, and write its report after some of the evaluations.

    The next report is written if writing the last one took less than :data:`REPORT_SHARE` of the
    time since then.
    """
    last, took = time.monotonic(), FIRST_REPORT
    for update in updates:
        yield update
        if update.kind == "eval" and took < REPORT_SHARE * (time.monotonic() - last):
            began = time.monotonic()
            failures = [*attempt(NO_REPORT, report, path)]
            yield from failures
            last = time.monotonic()
            # After a failure, the report is tried again only at the end.
            took = math.inf if failures else last - began


def verify(
    run_folder: str | Path, *, weights: Weights = "original", base_path: str | Path | None = None
) -> Verdict:
    """Compare a merged model with the base plus the adapter, and update the model card.

    For arguments and errors see :func:`orpo_lite.evaluation.verify.compare_merged`.
    """
    return run_to_end(
        verify_events(run_folder, weights=weights, base_path=base_path), lambda _: None
    )


def verify_events(
    run_folder: str | Path, *, weights: Weights = "original", base_path: str | Path | None = None
) -> Generator[Update, None, Verdict]:
    """Verify as :func:`verify` does. Yield the progress and return the verdict."""
    verdict = yield from compare_merged(run_folder, weights=weights, base_path=base_path)
    yield from attempt(NO_CARD, write_card, Path(run_folder).expanduser())
    return verdict


@with_torch_defaults
def verify_export_events(
    run_folder: str | Path,
    folder: Path,
    *,
    weights: Weights = "original",
    base_path: str | Path | None = None,
) -> Generator[Update, None, tuple[Kept, int]]:
    """Compute the share of the trained adapter's gain that an exported GGUF file keeps.

    The gain is what the adapter adds to the log odds ratio of chosen to rejected replies. It is
    measured on held-out pairs of the run, or on training pairs if no pairs were held out. llama.cpp
    scores the GGUF file. The base and the trained adapter are scored as in :func:`verify`.
    ``kept.json`` is written next to the GGUF file.

    Yields progress. Finally returns the share and the number of pairs.

    Args:
        run_folder: the folder of a finished run.
        folder: the folder of the export, with one GGUF file.
        weights: the base weights of the exported model, ``original`` or ``dequantized``. The
            adapter was merged into these weights.
        base_path: where the base is now, if its folder was moved.

    Raises:
        FitError: llama-cpp-python is not installed.
        OrpoLiteError: the base, the merged model or the data can no longer be read.
    """
    path = Path(run_folder).expanduser()
    base_P, trained_gain_P = yield from read_gains(path, weights, base_path)
    found = find_model(path, base_path=base_path, command="export")
    pairs, _ = yield from pairs_to_compare(found, path)
    (file,) = folder.glob("*.gguf")
    scores_2P = yield from staged("scoring pairs by llama.cpp", score_pairs(file, pairs))
    gain_P = pair_log_odds(scores_2P) - base_P
    kept = kept_gain(file.stem, gain_P, trained_gain_P, [pair.prompt for pair in pairs])
    write_text(folder / "kept.json", to_json(asdict(kept) | {"pairs": len(pairs)}))
    return kept, len(pairs)


def generate(run_folder: str | Path, prompts: str | Path, **options: Any) -> Answers:
    """Answer the prompts in a file. The model is a run, a merged folder or a hub model.

    For ``options`` and errors see :func:`orpo_lite.evaluation.answers.prepare_answers`.

    If a call is interrupted, repeat it with the same arguments. The finished answers are kept.
    """
    return run_to_end(generate_events(run_folder, prompts, **options), lambda _: None)


@with_torch_defaults
def generate_events(
    run_folder: str | Path, prompts: str | Path, **options: Any
) -> Generator[Update, None, Answers]:
    """Answer prompts like :func:`generate`. Yield updates on the progress. Return the result."""
    task = prepare_answers(run_folder, prompts, **options)
    yield Update("note", describe_device(task.found.device, "answering"))
    return (yield from write_answers(task))


@with_torch_defaults
def chat_events(
    run_folder: str | Path,
    decoding: Decoding,
    *,
    compare: bool = False,
    system: str = "",
    base_path: str | Path | None = None,
) -> Generator[Update, None, Chat]:
    """Load a run, a merged folder or a hub model, and return a conversation with it.

    For ``decoding``, ``compare`` and ``system`` see :class:`orpo_lite.evaluation.chat.Chat`.
    """
    found = find_model(run_folder, base_path=base_path, command="chat")
    refuse_reward_model(found, "orpo-lite chat")
    yield Update("note", describe_device(found.device, "answering"))
    yield Update("stage", f"loading {found.name}")
    return Chat(load_model(found), decoding, compare=compare, system=system)
