"""The training loop: evaluate, save, take a step, repeat."""

import signal
from collections.abc import Generator, Sequence

from torch import Tensor

from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.held_out import evaluate
from orpo_lite.model.sharding import is_sharded
from orpo_lite.ops.devices import is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import append_metrics, append_scores
from orpo_lite.training.faults import keep_smaller_settings, report_not_finite, shrink_memory
from orpo_lite.training.ppo import evaluate_ppo, take_ppo_step
from orpo_lite.training.session import Session, save_checkpoint
from orpo_lite.training.state import TrainState
from orpo_lite.training.step import OutOfMemory, take_step
from orpo_lite.updates import Update, staged


def train_steps(
    session: Session, state: TrainState, *, saved: bool = False
) -> Generator[Update, None, None]:
    """Train from ``state`` until the last step, an early stop or a signal. Yield updates.

    The result of a step depends only on the recipe, the data, the step's number and the state that
    a checkpoint stores.

    Args:
        session: the objects that all steps share.
        state: the state to start from; changed in place.
        saved: whether ``state`` was read from a checkpoint.

    Raises:
        Interrupted: a signal was received. A checkpoint has been written.
        DivergedError: loss or gradients were not finite in several steps in a row.
        FitError: a step is out of memory even with one pair at a time.
    """
    processes = session.processes
    last_save = (state.step, state.evaluated_step) if saved else (None, None)
    while True:
        stopping = processes.any(bool(session.signals))
        due = state.step % session.eval_every == 0 or state.step == session.steps
        if due and not stopping and state.evaluated_step != state.step:
            try:
                yield from evaluate_step(session, state)
            except RuntimeError as error:
                if is_out_of_memory(error) and (last_save[0] or 0) != state.step:
                    processes.on_main(save_checkpoint, session, state)  # keep the finished steps
                raise
            stopping = processes.any(bool(session.signals))
        if (due or stopping) and last_save != (state.step, state.evaluated_step):
            processes.on_main(save_checkpoint, session, state)
            processes.wait()
            last_save = (state.step, state.evaluated_step)
        if stopping:
            raise Interrupted(
                session.signals[0] if session.signals else signal.SIGTERM, session.path
            )
        if state.step == session.steps:
            return
        if is_exhausted(session.recipe, state):
            yield Update(
                "note",
                "stopped early by training.early_stopping_patience. Evaluations in a row without a "
                f"new lowest held-out loss: {state.worse_in_a_row}",
            )
            return
        batch = session.batch(state.step)
        try:
            metrics, finite = _take(session, batch, state)
        except OutOfMemory:
            state.memory = shrink_memory(session, batch)
            session.set_memory(state.memory)
            settings = " ".join(f"memory.{key}={value}" for key, value in state.memory.items())
            yield Update(
                "note",
                f"out of memory at step {state.step + 1}: the step is repeated with {settings}; "
                "the steps that follow use these settings too",
            )
            continue
        processes.on_main(append_metrics, session.path, {"step": state.step, **metrics})
        yield Update("step", session.objective.line(metrics), state.step, session.steps, metrics)
        if not finite:
            yield report_not_finite(session, batch, state)


def _take(
    session: Session, batch: Sequence[TokenizedPair], state: TrainState
) -> tuple[dict[str, float], bool]:
    """Take a step. Return what :func:`take_step` returns."""
    take = take_ppo_step if session.recipe.loss.type == "ppo" else take_step
    try:
        return take(session, batch, state)
    except RuntimeError as error:
        if is_out_of_memory(error) and is_sharded(session.pair_model):
            raise keep_smaller_settings(session, batch, state) from error
        raise


def evaluate_step(session: Session, state: TrainState) -> Generator[Update, None, None]:
    """Evaluate on the held-out pairs, if there are any, and record the results. Yield updates.

    The metrics are written to metrics.jsonl and to ``state``. If this step is the best so far,
    ``state`` records this too. The scores of each pair are written to pair_scores.jsonl.
    """
    metrics, scores = yield from _evaluate(session)
    is_best = state.note_evaluation(metrics)
    if not metrics:
        return
    session.processes.on_main(append_metrics, session.path, {"step": state.step, **metrics})
    session.processes.on_main(append_scores, session.path, state.step, *map(Tensor.tolist, scores))
    remark = ""
    if state.step == 0:
        remark = "before training"
    elif is_best:
        remark = "best so far"
    line = f"{session.objective.line(metrics, 'eval_')}  {remark}".rstrip()
    yield Update("eval", line, state.step, session.steps, metrics)


def _evaluate(
    session: Session,
) -> Generator[Update, None, tuple[dict[str, float], Sequence[Tensor]]]:
    """Return the metrics of held-out pairs, and the scores of each pair. Yield updates."""
    if session.recipe.loss.type == "ppo":
        return (yield from evaluate_ppo(session))
    inputs = session.inputs
    batches = evaluate(
        session.pair_model,
        session.objective,
        inputs.test,
        session.recipe,
        pad_id=inputs.pad_id,
        processes=session.processes,
    )
    return (yield from staged(f"evaluating {len(inputs.test):,} held-out pairs", batches))


def is_exhausted(recipe: Recipe, state: TrainState) -> bool:
    """Return whether the training must stop early.

    The training must stop early if the held-out loss has not become lower in
    ``training.early_stopping_patience`` evaluations in a row.
    """
    patience = recipe.training.early_stopping_patience
    return patience is not None and state.worse_in_a_row >= patience
