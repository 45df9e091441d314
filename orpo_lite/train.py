"""Train: from a recipe to a run folder with a LoRA adapter in it. The loop is ours, on accelerate."""

import copy
import json
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import enable_full_determinism

from orpo_lite import checkpoint, demo, run
from orpo_lite.base import check_disk, fetch_weights, load_tokenizer
from orpo_lite.card import write_card
from orpo_lite.data.packing import epoch_order, micro_batches, steps_per_epoch
from orpo_lite.data.sides import prompt_ids
from orpo_lite.data.tokens import TokenizedPair
from orpo_lite.errors import (
    CheckpointError,
    Command,
    DataError,
    DivergedError,
    FitError,
    HubError,
    ModelError,
    OrpoLiteError,
    Overrides,
    RecipeError,
)
from orpo_lite.evaluate import evaluate
from orpo_lite.generate import NEUTRAL, Prompt, Sample, answers
from orpo_lite.gradient import OutOfMemory, accumulate
from orpo_lite.hub.account import check_target
from orpo_lite.licence import find_papers, read_licences, refuse_name
from orpo_lite.model import ITS_FAULTS, PairModel, checkpoint_first, choose_dtype, load_pair_model, skipped_modules
from orpo_lite.objectives.objective import Objective
from orpo_lite.objectives.registry import find_objective
from orpo_lite.optimizer import lr_factor, make_optimizer, whole_steps
from orpo_lite.parallel import Processes
from orpo_lite.planner.cards import own_card, room
from orpo_lite.planner.search import fit, no_plan
from orpo_lite.prepare import (
    Ready,
    adopt_adapter,
    check_lock,
    make_lock,
    pair_lengths,
    prepare,
    with_absolute_paths,
)
from orpo_lite.proof import prove, prove_operations
from orpo_lite.recipe import Recipe, gib
from orpo_lite.run import Update
from orpo_lite.state import TrainState
from orpo_lite.step.attention import device_kind

BAD_STEPS = 3  # non-finite steps in a row that end a run


@dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    run: Path
    steps: int
    seconds: float
    before: Mapping[str, float]
    """Held-out metrics before the first step; {} without held-out pairs."""
    after: Mapping[str, float]
    """Held-out metrics of the adapter that was kept."""
    kept_step: int
    samples: tuple[Sample, ...]
    """What is answered before and after (``output.samples``)."""


class Interrupted(OrpoLiteError):  # noqa: N818 - not a fault
    """SIGINT or SIGTERM, after the step was finished and saved."""

    def __init__(self, number: int, path: Path) -> None:
        found = f"stopped by {signal.Signals(number).name} and saved"
        super().__init__(found=found, fix=Command(f"orpo-lite train --resume {run.quoted(path)}"))
        self.exit_code = 128 + number


def train(recipe: Recipe, *, resume: bool = False) -> TrainResult:
    """Train as ``recipe`` says; ``resume`` goes on with the run in ``training.output_dir``.

    Leaves the run folder: adapter, metrics, samples and model card. Merge and push are verbs of their own.

    Raises:
        OrpoLiteError: anything the person can fix, before weights load wherever it can be known by then.
    """
    return run.drain(training(recipe, resume=resume), lambda _: None)


def training(recipe: Recipe, *, resume: bool = False) -> Generator[Update, None, TrainResult]:
    """:func:`train` as a generator: yields an :class:`Update` for all that happens and returns the result."""
    processes = Processes()
    if not resume:
        processes.on_main(run.refuse_existing, recipe)
    if processes.is_main:
        yield from _may_push(recipe, resume=resume)
    recipe = with_absolute_paths(adopt_adapter(recipe))
    if processes.is_main:
        for done, total in demo.make_builtin(recipe):
            yield Update("stage", "training the built-in base", done, total)
    processes.wait()
    resolved = demo.resolve_builtin(recipe)
    inputs = yield from prepare(resolved)
    path = Path(recipe.training.output_dir)
    licences = _licences(recipe, inputs) if processes.is_main and not resume else {}
    resolved, plan = yield from _planned(resolved, inputs, path, processes)
    inputs = replace(inputs, base=fetch_weights(inputs.base))
    lock = make_lock(resolved, inputs)
    lock["not_quantised"] = skipped_modules(resolved, inputs.base.config, processes.device)
    processes.wait()
    if resume:
        processes.on_main(check_lock, path, lock)
    else:
        processes.on_main(run.create, recipe, lock | {"licences": licences}, inputs.figures)
    if plan:
        processes.on_main(run.write_text, path / PLAN, run.to_json(plan))
    processes.wait()
    with ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(run.locked(path))
            stack.enter_context(run.logged(path))
        stop = stack.enter_context(_signals())
        stack.enter_context(explain_faults(resolved, path))
        return (yield from _train(resolved, inputs, path, processes, stop, resume=resume))


def _train(
    recipe: Recipe, inputs: Ready, path: Path, processes: Processes, stop: list[int], *, resume: bool
) -> Generator[Update, None, TrainResult]:
    """Load, train, keep the best adapter; then answer prompts and write the model card."""
    began = time.monotonic()
    session = yield from load_session(recipe, inputs, path, processes, stop)
    state = TrainState()
    if resume:
        state = yield from restore(session)
    yield from train_steps(session, state, saved=resume)
    kept = yield from keep_best(session, state)
    samples: tuple[Sample, ...] = ()
    if processes.is_main:
        samples = yield from _answer(recipe, inputs, session.pair_model, path, stop)
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


def _may_push(recipe: Recipe, *, resume: bool) -> Generator[Update, None, None]:
    """Refuse to begin what could not be pushed in the end; a run that goes on is not held up for that."""
    if not recipe.output.push_to_hub:
        return
    yield Update("stage", f"asking the hub whether {recipe.output.hub_model_id} may be written to")
    try:
        yield from check_target(str(recipe.output.hub_model_id), is_private=recipe.output.hub_private_repo)
    except HubError as error:
        if not resume:
            error.fix += "; or output.push_to_hub=false, and `orpo-lite push` later"
            raise
        yield Update("note", f"the push at the end may fail: {error.where} {error.found}")


def _licences(recipe: Recipe, inputs: Ready) -> dict[str, Any]:
    """What lock.json says of licences; where the recipe asks for a push, the base's must allow it."""
    base = inputs.base
    licences = read_licences(base.name, base.revision, base.path, recipe.data.names)
    if recipe.output.push_to_hub:
        refuse_name(str(recipe.output.hub_model_id), licences["base"], recipe.sources["output.hub_model_id"])
        find_papers(licences["base"], base.name, base.revision, base.path)
    return licences


PLAN = "plan.json"


def _planned(
    recipe: Recipe, inputs: Ready, path: Path, processes: Processes
) -> Generator[Update, None, tuple[Recipe, dict[str, Any]]]:
    """Return the recipe with the memory settings of a plan, and what plan.json is to hold.

    Without a GPU and a budget no plan is made: the recipe as it is, and {}.

    A run that goes on keeps the settings that it began with, if they still fit: its bits depend on them.
    """
    device, wanted = processes.device, recipe.memory.budget_bytes
    own = own_card(device.index or 0) if device.type == "cuda" else None
    budget = room(wanted, own)
    if budget is None:
        return recipe, {}
    budget = processes.smallest(budget)  # one plan for all processes
    if own and wanted and wanted > own.free:
        yield Update("note", f"memory.budget={recipe.memory.budget}, and {gib(own.free)} are free on the card")
    card = own.card if own else None
    before = run.read_json(path / PLAN) if (path / PLAN).is_file() else {}
    if before and before["needed_bytes"] <= budget:
        return recipe.with_memory(before["levers"]), {}
    if before:
        yield Update("note", "the plan that the run began with does not fit any more: bits may differ from here on")
    yield Update("stage", "planning the memory of a step")
    lengths = pair_lengths(inputs.train)
    try:
        found = fit(recipe, inputs.base.config, lengths, device_kind(device), budget, card)
    except ITS_FAULTS as error:
        yield Update("note", f"{no_plan(inputs.base.name, error).found}: the levers of memory stay as they are")
        return recipe, {}
    for sentence in found.sentences(own.others if own else 0):
        yield Update("note", sentence)
    return recipe.with_memory(found.levers), found.to_json()


# --- session


@dataclass
class Session:
    """A training in memory: everything that its steps share and do not change, but for ``recipe``."""

    recipe: Recipe
    """Its ``memory`` changes when a step runs out of memory."""
    inputs: Ready
    path: Path
    """The run folder."""
    processes: Processes
    stop: list[int]
    """Signals received."""
    objective: Objective
    pair_model: PairModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss when activations are float16; else does nothing."""
    trained: list[torch.nn.Parameter] = field(init=False)
    """The parameters of the adapter."""
    per_epoch: int = field(init=False)
    """Steps of one pass over the pairs."""
    steps: int = field(init=False)
    """Steps of the whole training."""
    eval_every: int = field(init=False)

    def __post_init__(self) -> None:
        settings = self.recipe.training
        self.trained = [parameter for _, parameter in self.pair_model.trained()]
        self.per_epoch = steps_per_epoch(len(self.inputs.train), settings.global_batch_size)
        epochs = math.ceil(settings.num_train_epochs * self.per_epoch)
        self.steps = settings.max_steps if settings.max_steps > 0 else epochs
        self.eval_every = whole_steps(settings.eval_steps, self.steps)
        self._factor = lr_factor(self.recipe, self.optimizer, self.steps)

    def batch(self, step: int) -> list[TokenizedPair]:
        """Return the pairs of a step: a function of the seed and the step's number alone."""
        settings, pairs = self.recipe.training, self.inputs.train
        epoch, place = divmod(step, self.per_epoch)
        order = epoch_order(len(pairs), seed=settings.seed, epoch=epoch)
        return [pairs[i] for i in order[place * settings.global_batch_size : (place + 1) * settings.global_batch_size]]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return float(self.recipe.training.learning_rate * self._factor(step))

    def set_memory(self, settings: dict[str, Any]) -> None:
        """Change keys of ``memory``, and the model as they say; loss and gradient stay as they are."""
        if settings:
            self.recipe = self.recipe.with_memory(settings)
            checkpoint_first(self.pair_model, self.recipe)


def load_session(
    recipe: Recipe, inputs: Ready, path: Path, processes: Processes, stop: list[int]
) -> Generator[Update, None, Session]:
    """Load base and adapter, probe the step on them, make the optimizer. Raises FitError, ModelError."""
    yield Update("stage", f"loading {inputs.base.name}")
    pair_model, objective = load_pair_model(recipe, inputs.base, processes.device), find_objective(recipe.loss)
    if lacking := objective.needs - pair_model.outputs:
        found = f"{recipe.loss.type} needs {', '.join(sorted(lacking))}"
        expected = f"what a model gives: {', '.join(pair_model.outputs)}"
        raise ModelError(where="loss.type", found=found, expected=expected)
    yield Update("stage", "proving the step on this model")
    if not recipe.memory.packing:
        prove_operations(pair_model)
    else:
        longest = max(int(pair_lengths(side)[:, 1:].max(initial=1)) for side in (inputs.train, inputs.test))
        prove(pair_model, longest, min(recipe.micro_batch_tokens, 2 * longest * recipe.training.global_batch_size))
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(processes.device)  # what is reported is the steps' own
    for note in pair_model.notes:
        yield Update("note", note)
    trained = [parameter for _, parameter in pair_model.trained()]
    # A checkpoint holds the adapter and two states of its size; those kept, one being written, and the result.
    adapter_bytes = 4 * sum(parameter.numel() for parameter in trained)
    check_disk(path, 3 * adapter_bytes * (checkpoint.KEPT + 3), f"saving the checkpoints of {path}")
    is_half = choose_dtype(recipe.model.dtype, device_kind(processes.device)) == torch.float16
    scaler = torch.amp.GradScaler(processes.device.type, enabled=is_half)
    optimizer = make_optimizer(recipe, trained)
    return Session(recipe, inputs, path, processes, stop, objective, pair_model, optimizer, scaler)


def restore(session: Session) -> Generator[Update, None, TrainState]:
    """Go back to the newest valid checkpoint; to the start when the run was stopped before its first one."""
    state = TrainState()
    if any((session.path / "checkpoints").glob("step-*")):
        folder, faults = checkpoint.newest(session.path)
        for fault in faults:
            yield Update("note", f"skipped {fault}")
        state = checkpoint.restore(folder, session.pair_model, session.optimizer)
        if session.scaler.is_enabled():
            session.scaler.load_state_dict(state.scaler)
    session.processes.on_main(run.cut_metrics, session.path, state.step, state.evaluated)
    yield Update("note", f"going on after step {state.step} of {session.steps}")
    session.set_memory(state.memory)
    return state


# --- loop


def train_steps(session: Session, state: TrainState, *, saved: bool = False) -> Generator[Update, None, None]:
    """Train from ``state`` to the last step, to an early stop or to a signal: evaluate, save, take a step, repeat.

    A step depends on the recipe, the data and its number, on no hidden state.

    Args:
        session: what the steps share.
        state: changed in place.
        saved: ``state`` is that of a checkpoint.

    Raises:
        Interrupted: after the checkpoint was written.
        DivergedError: loss or gradients were not finite several times in a row.
        FitError: one pair at a time is out of memory.
    """
    processes = session.processes
    last_save = (state.step, state.evaluated) if saved else None
    while True:
        stopping = processes.any(bool(session.stop))
        due = state.step % session.eval_every == 0 or state.step == session.steps
        if due and not stopping and state.evaluated != state.step:
            yield from evaluate_step(session, state)
            stopping = processes.any(bool(session.stop))
        if (due or stopping) and last_save != (state.step, state.evaluated):
            processes.on_main(save_checkpoint, session, state)
            processes.wait()
            last_save = (state.step, state.evaluated)
        if stopping:
            raise Interrupted(session.stop[0] if session.stop else signal.SIGTERM, session.path)
        if state.step == session.steps or is_exhausted(session.recipe, state):
            return
        batch = session.batch(state.step)
        try:
            metrics, finite = take_step(session, batch, state)
        except OutOfMemory:
            state.memory = smaller_pieces(session, batch)
            session.set_memory(state.memory)
            said = " ".join(f"memory.{key}={value}" for key, value in state.memory.items())
            yield Update("note", f"out of memory at step {state.step + 1}: done again, and gone on, with {said}")
            continue
        processes.on_main(run.append_metrics, session.path, {"step": state.step, **metrics})
        yield Update("step", session.objective.line(metrics), state.step, session.steps, metrics)
        if not finite:
            yield skipped_step(session, batch, state)


def evaluate_step(session: Session, state: TrainState) -> Generator[Update, None, None]:
    """Write the held-out metrics down and note in ``state`` whether they are the best; nothing without such pairs."""
    inputs = session.inputs
    batches = evaluate(
        session.pair_model,
        session.objective,
        inputs.test,
        session.recipe,
        pad_id=inputs.pad_id,
        processes=session.processes,
    )
    metrics = yield from run.staged(f"evaluating {len(inputs.test):,} held-out pairs", batches)
    is_best = state.take_evaluation(metrics)
    if not metrics:
        return
    session.processes.on_main(run.append_metrics, session.path, {"step": state.step, **metrics})
    remark = "before training" if state.step == 0 else "best so far" if is_best else ""
    line = f"{session.objective.line(metrics, 'eval_')}  {remark}".rstrip()
    yield Update("eval", line, state.step, session.steps, metrics)


def save_checkpoint(session: Session, state: TrainState) -> None:
    """Write a checkpoint of what the next steps depend on."""
    scaled = replace(state, scaler=session.scaler.state_dict())
    checkpoint.save(session.path, session.pair_model, session.optimizer, scaled)


def is_exhausted(recipe: Recipe, state: TrainState) -> bool:
    """Whether so many evaluations in a row were no better that the training is to stop."""
    patience = recipe.training.early_stopping_patience
    return patience is not None and state.worse >= patience


# --- step


def take_step(session: Session, batch: Sequence[TokenizedPair], state: TrainState) -> tuple[dict[str, float], bool]:
    """Take one optimizer step on the pairs of ``batch``.

    Returns:
        Its metrics, and whether loss and gradients were finite.

    Raises:
        OutOfMemory: no gradient is left, so that the step can be done again in smaller pieces.
    """
    began = time.monotonic()
    learning_rate = session.learning_rate(state.step)
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate
    parts = accumulate(
        session.pair_model,
        session.objective,
        batch,
        session.pair_model.batching(session.recipe, session.inputs.pad_id),
        step=state.step,
        seed=session.recipe.training.seed,
        processes=session.processes,
        scaler=session.scaler,
    )
    named = session.objective.metrics(parts)
    norm, finite = update(
        session.trained, session.optimizer, session.scaler, named["loss"], session.recipe.training.max_grad_norm
    )
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)
    state.take_step(tokens, finite=finite)
    figures = {
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "num_tokens": state.num_tokens,
        "tokens_per_second": tokens / (time.monotonic() - began),
        "memory_gib": memory_gib(session.processes.device),
        "epoch": state.step / session.per_epoch,
    }
    return named | figures, finite


def update(
    trained: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss: float,
    max_grad_norm: float,
) -> tuple[float, bool]:
    """Clip and take the optimizer's step, unless loss or gradients are not finite; the norm, and whether they were."""
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf))
    # An overflow of the scaled float16 loss shows in the gradients alone: the scaler skips the step, lowers its scale.
    overflow = scaler.is_enabled() and scaler.get_scale() > 1
    finite = math.isfinite(loss) and (math.isfinite(norm) or overflow)
    if finite:
        scaler.step(optimizer)
    scaler.update()  # also after a step that was not taken: unscale_ refuses to run twice
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- faults


def smaller_pieces(session: Session, batch: Sequence[TokenizedPair]) -> dict[str, Any]:
    """Return settings of ``memory`` by which the step takes less: smaller micro-batches, then all layers checkpointed.

    Raises:
        FitError: each micro-batch is one pair, and all layers are checkpointed.
    """
    recipe, model = session.recipe, session.pair_model
    memory = recipe.memory
    pairs = max(map(len, micro_batches(batch, model.batching(recipe, session.inputs.pad_id))))
    settings: dict[str, Any] = {"activation_checkpointing": memory.activation_checkpointing}
    if pairs > 1:
        return settings | {"micro_batch_tokens": max(1, recipe.micro_batch_tokens // 2), "micro_batch_size": pairs // 2}
    if model.checkpointed < len(model.layers):
        sizes = {"micro_batch_tokens": memory.micro_batch_tokens, "micro_batch_size": 1}
        return sizes | {"activation_checkpointing": "all"}
    plain = {"checkpoint_offload": True, "mlp_tile": 512, "embedding_on_cpu": True}
    unused = {f"memory.{key}": plain[key] for key in plain if getattr(memory, key) in (None, False, "auto")}
    fix = Overrides(unused, f"{'' if unused else 'a shorter data.max_length'} in a new run; checkpoints are kept")
    found = "one pair at a time is out of memory, with all layers checkpointed"
    raise FitError(where=f"run {session.path}", found=found, fix=fix)


def skipped_step(session: Session, batch: Sequence[TokenizedPair], state: TrainState) -> Update:
    """Return what to say of a step that was skipped. Raises :class:`DivergedError` at the third in a row."""
    found = f"loss or gradient not finite at step {state.step}"
    if state.bad == BAD_STEPS:
        fix = f"lower training.learning_rate; the last checkpoint is kept in {session.path}"
        raise DivergedError(where=f"run {session.path}", found=f"{found}, the {BAD_STEPS}rd in a row", fix=fix)
    rows = ", ".join(pair.where for pair in batch[:8])
    return Update("note", f"{found}; no update (pairs {rows}{' ...' if len(batch) > 8 else ''})")


@contextmanager
def explain_faults(recipe: Recipe, path: Path) -> Iterator[None]:
    """Deterministic kernels where the recipe asks for them; what torch raises in a step, as an error with its fix.

    Only warned of an operation that is not deterministic, FlashAttention's backward pass would stay as it is (torch,
    Context.h).
    """
    deterministic = recipe.training.full_determinism
    if deterministic:
        enable_full_determinism(recipe.training.seed)
    try:
        yield
    except torch.OutOfMemoryError as error:
        found = f"the GPU is out of memory ({str(error).splitlines()[0]})"
        settings = {"memory.checkpoint_offload": True, "memory.mlp_tile": 512, "memory.embedding_on_cpu": True}
        advice = ", less memory.micro_batch_tokens; none of them changes the result; checkpoints are kept"
        raise FitError(where=f"run {path}", found=found, fix=Overrides(settings, advice)) from error
    except RuntimeError as error:
        if not deterministic or "deterministic" not in str(error):
            raise
        found = f"an operation of this model has no deterministic kernel ({str(error).split('.')[0]})"
        where = f"training.full_determinism ({recipe.sources['training.full_determinism']})"
        raise RecipeError(where=where, found=found, fix=Overrides({"training.full_determinism": False})) from error
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(False)


# --- result


def keep_best(session: Session, state: TrainState) -> Generator[Update, None, int]:
    """Write ``adapter/`` from the best checkpoint, else from the last step; returns the step it is of."""
    kept, path = state.step, session.path
    if session.recipe.training.load_best_model_at_end and state.best_step is not None:
        try:
            checkpoint.load_adapter(checkpoint.at_step(path, state.best_step), session.pair_model)
            kept = state.best_step
        except CheckpointError as error:  # the training is not lost for that
            yield Update("note", f"the best checkpoint cannot be used, the last step is kept ({error.found})")
    if kept != state.best_step:
        state.after = state.latest
    elif kept == 0:
        yield Update("note", "no step was better than the start: lower training.learning_rate, or train longer")
    session.processes.on_main(save_adapter, path / "adapter", session.pair_model, session.inputs)
    record = run.to_json({"steps": state.step, "kept_step": kept})
    session.processes.on_main(run.write_text, path / run.RESULT, record)
    session.processes.wait()
    return kept


def save_adapter(folder: Path, model: PairModel, inputs: Ready) -> None:
    """The result: adapter, tokenizer with its template, generation config; complete or not there."""
    from transformers import GenerationConfig

    with run.new_folder(folder) as temporary:
        model.model.peft_config["default"].base_model_name_or_path = inputs.base.name  # type: ignore[index,union-attr]
        model.model.save_pretrained(temporary)  # type: ignore[operator]
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
        _with_bos(inputs.tokenizer).save_pretrained(temporary)
        has_own = (inputs.base.path / "generation_config.json").is_file()
        config = GenerationConfig.from_pretrained(inputs.base.path) if has_own else GenerationConfig()
        known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        # The reply ends with the template's own end token, which a base's config often does not know.
        config.eos_token_id = list(dict.fromkeys([inputs.end_id, *(i for i in known if i is not None)]))
        config.pad_token_id = inputs.pad_id
        if config.temperature is not None or config.top_p is not None:
            config.do_sample = True  # Llama 2 ships them without it, and transformers refuses to save that
        config.save_pretrained(temporary)


def _with_bos(tokenizer: Any) -> Any:
    """The tokenizer, its template writing the bos where training had one before the text and the template has none.

    Whoever serves the model renders the template and adds nothing: the model would miss the token that it began with.
    """
    template, bos = tokenizer.chat_template, tokenizer.bos_token
    leads = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not leads or not isinstance(template, str):
        return tokenizer
    turns = [{"role": "user", "content": "a"}]
    if str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)).startswith(bos):
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + template
    return tokenizer


# --- samples


def _answer(
    recipe: Recipe, inputs: Ready, model: PairModel, path: Path, stop: Sequence[int]
) -> Generator[Update, None, tuple[Sample, ...]]:
    """Prompts of ours and of the held-out pairs, answered before and after; what goes wrong costs the answers only."""
    count, settings, samples = recipe.output.samples, recipe.output, list[Sample]()
    try:
        neutral = NEUTRAL[:count]
        ids = prompt_ids(recipe.data, neutral, partial(load_tokenizer, inputs.base.path)) if neutral else []
        prompts = [Prompt("neutral", *both) for both in zip(neutral, ids, strict=True) if both[1]]
        held_out = dict.fromkeys(tuple(map(int, pair.chosen_ids[: pair.chosen_start])) for pair in inputs.test)
        prompts += [Prompt("held-out", "", ids) for ids in [*held_out][:count]]
        found = answers(
            model, prompts, path / "adapter", max_new_tokens=settings.max_new_tokens, seed=recipe.training.seed
        )
        for sample in found:
            samples.append(sample)
            yield Update("stage", "answering prompts", len(samples), len(prompts))
            if stop:
                raise Interrupted(stop[0], path)
    except (*ITS_FAULTS, ModelError, DataError) as error:
        yield Update("note", f"prompts are not answered: {' '.join(str(error).split())[:200] or type(error).__name__}")
    lines = (json.dumps(asdict(sample), ensure_ascii=False) for sample in samples)
    run.write_text(path / run.SAMPLES, "".join(f"{line}\n" for line in lines))
    return tuple(samples)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM so that the step under way can finish; a second SIGINT ends at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
