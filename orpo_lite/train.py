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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
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
from orpo_lite.gradient import ShortageError, accumulate, any_process
from orpo_lite.hub.account import check_target
from orpo_lite.licence import find_papers, read_licences, refuse_name
from orpo_lite.model import ITS_FAULTS, PairModel, checkpoint_first, choose_dtype, load_pair_model, skipped_modules
from orpo_lite.optimizer import lr_factor, make_optimizer, whole_steps
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
from orpo_lite.step.attention import device_kind
from orpo_lite.step.losses import named_parts

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

    Raises:
        OrpoLiteError: anything the person can mend, before weights load wherever it can be known by then.
    """
    return run.drain(training(recipe, resume=resume), lambda _: None)


def training(recipe: Recipe, *, resume: bool = False) -> Generator[Update, None, TrainResult]:
    """:func:`train` as a generator: yields an :class:`Update` for all that happens and returns the result."""
    accelerator = Accelerator(mixed_precision="no")  # dtypes are ours; autocast would copy outputs to float32
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        found = f"distributed by {accelerator.distributed_type.value}"
        raise RecipeError(
            where="accelerate's configuration",
            found=found,
            expected="one process, or plain data parallel",
            fix="accelerate config",
        )
    if not resume and accelerator.is_main_process:
        run.refuse_existing(recipe)
    if accelerator.is_main_process:
        yield from _may_push(recipe, resume=resume)
    recipe = with_absolute_paths(adopt_adapter(recipe))
    if accelerator.is_main_process:
        for done, total in demo.make_builtin(recipe):
            yield Update("stage", "training the built-in base", done, total)
    accelerator.wait_for_everyone()
    resolved = demo.resolve_builtin(recipe)
    ready = yield from prepare(resolved)
    path = Path(recipe.training.output_dir)
    licences = _licences(recipe, ready) if accelerator.is_main_process and not resume else {}
    resolved, planned = yield from _planned(resolved, ready, path, accelerator)
    ready = replace(ready, base=fetch_weights(ready.base))
    lock = make_lock(resolved, ready)
    lock["not_quantised"] = skipped_modules(resolved, ready.base.config, accelerator.device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and resume:
        check_lock(path, lock)
    elif accelerator.is_main_process:
        run.create(recipe, lock | {"licences": licences}, ready.figures)
    if accelerator.is_main_process and planned:
        run.write_text(path / PLAN, run.to_json(planned))
    accelerator.wait_for_everyone()
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(run.locked(path))
            stack.enter_context(run.logged(path))
        stop = stack.enter_context(_signals())
        if recipe.training.full_determinism:
            stack.enter_context(_deterministic(recipe))
        try:
            return (yield from _train(resolved, ready, path, accelerator, stop, resume=resume))
        except torch.OutOfMemoryError as error:
            found = f"the GPU is out of memory ({str(error).splitlines()[0]})"
            levers = {"memory.checkpoint_offload": True, "memory.mlp_tile": 512, "memory.embedding_on_cpu": True}
            advice = ", less memory.micro_batch_tokens; none of them changes the result; checkpoints are kept"
            fix = Overrides(levers, advice)
            raise FitError(where=f"run {path}", found=found, fix=fix) from error


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


def _licences(recipe: Recipe, ready: Ready) -> dict[str, Any]:
    """What lock.json says of licences; where the recipe asks for a push, the base's must allow it."""
    base = ready.base
    licences = read_licences(base.name, base.revision, base.path, recipe.data.names)
    if recipe.output.push_to_hub:
        refuse_name(str(recipe.output.hub_model_id), licences["base"], recipe.sources["output.hub_model_id"])
        find_papers(licences["base"], base.name, base.revision, base.path)
    return licences


PLAN = "plan.json"


def _planned(
    recipe: Recipe, ready: Ready, path: Path, accelerator: Accelerator
) -> Generator[Update, None, tuple[Recipe, dict[str, Any]]]:
    """The recipe with the levers of a plan, and what plan.json is to hold; as it is, and {}, where none is made.

    A run that goes on keeps the levers that it began with, if they still fit: its bits depend on them.
    """
    device, wanted = accelerator.device, recipe.memory.budget_bytes
    own = own_card(device.index or 0) if device.type == "cuda" else None
    budget = room(wanted, own)
    if budget is None:
        return recipe, {}
    budget = int(accelerator.gather(torch.tensor([budget], device=device)).min())  # one plan for all processes
    if own and wanted and wanted > own.free:
        yield Update("note", f"memory.budget={recipe.memory.budget}, and {gib(own.free)} are free on the card")
    card = own.card if own else None
    before = run.read_json(path / PLAN) if (path / PLAN).is_file() else {}
    if before and before["needed_bytes"] <= budget:
        return recipe.with_memory(before["levers"]), {}
    if before:
        yield Update("note", "the plan that the run began with does not fit any more: bits may differ from here on")
    yield Update("stage", "planning the memory of a step")
    lengths = pair_lengths(ready.train)
    try:
        found = fit(recipe, ready.base.config, lengths, device_kind(device), budget, card)
    except ITS_FAULTS as error:
        yield Update("note", f"{no_plan(ready.base.name, error).found}: the levers of memory stay as they are")
        return recipe, {}
    for sentence in found.sentences(own.others if own else 0):
        yield Update("note", sentence)
    return recipe.with_memory(found.levers), found.to_json()


# --- the loop -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """What a step needs, in memory."""

    pair_model: PairModel
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss when activations are float16; else does nothing."""


def _train(
    recipe: Recipe, ready: Ready, path: Path, accelerator: Accelerator, stop: list[int], *, resume: bool
) -> Generator[Update, None, TrainResult]:
    """Load, train, evaluate, save. A step depends on the recipe, the data and its number, on no hidden state."""
    settings, pairs, began = recipe.training, ready.train, time.monotonic()
    per_epoch = steps_per_epoch(len(pairs), settings.global_batch_size)
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * per_epoch)
    eval_every = whole_steps(settings.eval_steps, steps)
    loaded = yield from _load(recipe, ready, accelerator, path)
    factor = lr_factor(recipe, loaded.optimizer, steps)
    state: dict[str, Any] = {"step": 0, "evaluated": None, "best_step": None, "best_loss": None, "worse": 0}
    state |= {"before": {}, "after": {}, "latest": {}, "bad": 0, "num_tokens": 0, "levers": {}}
    if resume:
        state |= yield from _restore(path, loaded, accelerator)
        yield Update("note", f"going on after step {state['step']} of {steps}")
        recipe = _with_levers(recipe, loaded, state["levers"])

    saved = (state["step"], state["evaluated"]) if resume else None
    while True:
        stopping = any_process(accelerator, bool(stop))
        due = state["step"] % eval_every == 0 or state["step"] == steps
        if due and not stopping and state["evaluated"] != state["step"]:
            yield from _evaluate(recipe, ready, loaded, path, accelerator, state, steps)
            stopping = any_process(accelerator, bool(stop))
        if (due or stopping) and saved != (state["step"], state["evaluated"]):
            if accelerator.is_main_process:
                scaler = {"scaler": loaded.scaler.state_dict()}
                checkpoint.save(path, loaded.pair_model, loaded.optimizer, state | scaler)
            accelerator.wait_for_everyone()
            saved = (state["step"], state["evaluated"])
        if stopping:
            raise Interrupted(stop[0] if stop else signal.SIGTERM, path)
        if state["step"] == steps or _exhausted(state, recipe):
            break
        epoch, place = divmod(state["step"], per_epoch)
        order = epoch_order(len(pairs), seed=settings.seed, epoch=epoch)
        indices = order[place * settings.global_batch_size : (place + 1) * settings.global_batch_size]
        batch = [pairs[index] for index in indices]
        learning_rate = settings.learning_rate * factor(state["step"])
        try:
            metrics, finite = _step(recipe, ready, loaded, accelerator, batch, state, learning_rate)
        except ShortageError:
            state["levers"] = _smaller(recipe, ready, loaded, batch, path)
            recipe = _with_levers(recipe, loaded, state["levers"])
            said = " ".join(f"memory.{key}={value}" for key, value in state["levers"].items())
            yield Update("note", f"out of memory at step {state['step'] + 1}: done again, and gone on, with {said}")
            continue
        metrics["epoch"] = state["step"] / per_epoch
        if accelerator.is_main_process:
            run.append_metrics(path, {"step": state["step"], **metrics})
        yield Update("step", "", state["step"], steps, metrics)
        if not finite:
            yield _not_finite(batch, state, path)

    kept = yield from _keep(recipe, ready, loaded, path, accelerator, state)
    samples: tuple[Sample, ...] = ()
    if accelerator.is_main_process:
        samples = yield from _answer(recipe, ready, loaded.pair_model, path, stop)
        write_card(path)
    accelerator.wait_for_everyone()
    return TrainResult(
        run=path,
        steps=state["step"],
        seconds=time.monotonic() - began,
        before=state["before"],
        after=state["after"],
        kept_step=kept,
        samples=samples,
    )


def _step(
    recipe: Recipe,
    ready: Ready,
    loaded: _Loaded,
    accelerator: Accelerator,
    batch: Sequence[TokenizedPair],
    state: dict[str, Any],
    learning_rate: float,
) -> tuple[dict[str, float], bool]:
    """One optimizer step on the pairs of ``batch``: its metrics, and whether loss and gradients were finite."""
    began = time.monotonic()
    for group in loaded.optimizer.param_groups:
        group["lr"] = learning_rate
    batching = loaded.pair_model.batching(recipe, ready.pad_id)
    parts = accumulate(loaded.pair_model, batch, recipe, state["step"], batching, accelerator, loaded.scaler)
    named = named_parts(parts, beta=recipe.loss.beta)
    norm, finite = _update(loaded, named["loss"], recipe.training.max_grad_norm)
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)
    state["step"] += 1
    state["bad"] = 0 if finite else state["bad"] + 1
    state["num_tokens"] += tokens
    figures = {
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "num_tokens": state["num_tokens"],
        "tokens_per_second": tokens / (time.monotonic() - began),
        "memory_gib": memory_gib(accelerator.device),
    }
    return named | figures, finite


def _smaller(
    recipe: Recipe, ready: Ready, loaded: _Loaded, batch: Sequence[TokenizedPair], path: Path
) -> dict[str, Any]:
    """Levers for smaller micro-batches; where each is one pair already, for all layers checkpointed; or FitError."""
    memory, model = recipe.memory, loaded.pair_model
    pairs = max(map(len, micro_batches(batch, model.batching(recipe, ready.pad_id))))
    levers: dict[str, Any] = {"activation_checkpointing": memory.activation_checkpointing}
    if pairs > 1:
        return levers | {"micro_batch_tokens": max(1, recipe.micro_batch_tokens // 2), "micro_batch_size": pairs // 2}
    if model.checkpointed < len(model.layers):
        sizes = {"micro_batch_tokens": memory.micro_batch_tokens, "micro_batch_size": 1}
        return sizes | {"activation_checkpointing": "all"}
    plain = {"checkpoint_offload": True, "mlp_tile": 512, "embedding_on_cpu": True}
    unused = {f"memory.{key}": plain[key] for key in plain if getattr(memory, key) in (None, False, "auto")}
    fix = Overrides(unused, f"{'' if unused else 'a shorter data.max_length'} in a new run; checkpoints are kept")
    raise FitError(
        where=f"run {path}", found="one pair at a time is out of memory, with all layers checkpointed", fix=fix
    )


def _with_levers(recipe: Recipe, loaded: _Loaded, levers: Mapping[str, Any]) -> Recipe:
    """The recipe with those of a step that had run out of memory, and the model as they say."""
    if levers:
        recipe = recipe.with_memory(levers)
        checkpoint_first(loaded.pair_model, recipe)
    return recipe


def _not_finite(batch: Sequence[TokenizedPair], state: Mapping[str, Any], path: Path) -> Update:
    """What to say of a step that was skipped; raises :class:`DivergedError` at the third in a row."""
    found = f"loss or gradient not finite at step {state['step']}"
    if state["bad"] == BAD_STEPS:
        fix = f"lower training.learning_rate; the last checkpoint is kept in {path}"
        raise DivergedError(where=f"run {path}", found=f"{found}, the {BAD_STEPS}rd in a row", fix=fix)
    rows = ", ".join(pair.where for pair in batch[:8])
    return Update("note", f"{found}; no update (pairs {rows}{' ...' if len(batch) > 8 else ''})")


def _update(loaded: _Loaded, loss: float, max_grad_norm: float) -> tuple[float, bool]:
    """Clip and take the optimizer's step, unless loss or gradients are not finite; the norm, and whether they were."""
    loaded.scaler.unscale_(loaded.optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(loaded.trained, max_grad_norm or math.inf))
    # An overflow of the scaled float16 loss shows in the gradients alone: the scaler skips the step, lowers its scale.
    overflow = loaded.scaler.is_enabled() and loaded.scaler.get_scale() > 1
    finite = math.isfinite(loss) and (math.isfinite(norm) or overflow)
    if finite:
        loaded.scaler.step(loaded.optimizer)
    loaded.scaler.update()  # also after a step that was not taken: unscale_ refuses to run twice
    loaded.optimizer.zero_grad(set_to_none=True)
    return norm, finite


def _load(recipe: Recipe, ready: Ready, accelerator: Accelerator, path: Path) -> Generator[Update, None, _Loaded]:
    yield Update("stage", f"loading {ready.base.name}")
    pair_model = load_pair_model(recipe, ready.base, accelerator.device)
    yield Update("stage", "proving the step on this model")
    if not recipe.memory.packing:
        prove_operations(pair_model)
    else:
        longest = max(int(pair_lengths(side)[:, 1:].max(initial=1)) for side in (ready.train, ready.test))
        prove(pair_model, longest, min(recipe.micro_batch_tokens, 2 * longest * recipe.training.global_batch_size))
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(accelerator.device)  # what is reported is the steps' own
    for note in pair_model.notes:
        yield Update("note", note)
    trained = [parameter for _, parameter in pair_model.trained()]
    # A checkpoint holds the adapter and two states of its size; those kept, one being written, and the result.
    adapter_bytes = 4 * sum(parameter.numel() for parameter in trained)
    check_disk(path, 3 * adapter_bytes * (checkpoint.KEPT + 3), f"saving the checkpoints of {path}")
    is_half = choose_dtype(recipe.model.dtype, device_kind(accelerator.device)) == torch.float16
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=is_half)
    return _Loaded(pair_model, trained, make_optimizer(recipe, trained), scaler)


@contextmanager
def _deterministic(recipe: Recipe) -> Iterator[None]:
    """Kernels that give the same bits each time, while this lasts; an operation that has none ends the run.

    Only warned of it, FlashAttention's backward pass would stay as it is (torch, Context.h).
    """
    enable_full_determinism(recipe.training.seed)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        found = f"an operation of this model has no deterministic kernel ({str(error).split('.')[0]})"
        where = f"training.full_determinism ({recipe.sources['training.full_determinism']})"
        raise RecipeError(where=where, found=found, fix=Overrides({"training.full_determinism": False})) from error
    finally:
        torch.use_deterministic_algorithms(False)


def _restore(path: Path, loaded: _Loaded, accelerator: Accelerator) -> Generator[Update, None, dict[str, Any]]:
    """The state of the newest valid checkpoint, loaded; {} when the run was stopped before its first one."""
    state: dict[str, Any] = {}
    if any((path / "checkpoints").glob("step-*")):
        folder, faults = checkpoint.newest(path)
        for fault in faults:
            yield Update("note", f"skipped {fault}")
        state = checkpoint.restore(folder, loaded.pair_model, loaded.optimizer)
        scale = state.pop("scaler")
        if loaded.scaler.is_enabled():
            loaded.scaler.load_state_dict(scale)
    if accelerator.is_main_process:
        run.cut_metrics(path, step=state.get("step", 0), evaluated=state.get("evaluated"))
    return state


def _evaluate(
    recipe: Recipe,
    ready: Ready,
    loaded: _Loaded,
    path: Path,
    accelerator: Accelerator,
    state: dict[str, Any],
    steps: int,
) -> Generator[Update, None, None]:
    """Write the held-out metrics down and note in ``state`` whether they are the best; nothing without such pairs."""
    batches = evaluate(loaded.pair_model, ready.test, recipe, pad_id=ready.pad_id, accelerator=accelerator)
    while True:
        try:
            done, total = next(batches)
        except StopIteration as end:
            metrics: dict[str, float] = end.value
            break
        yield Update("stage", f"evaluating {len(ready.test):,} held-out pairs", done, total)
    state["evaluated"] = state["step"]
    if not metrics:
        return
    if accelerator.is_main_process:
        run.append_metrics(path, {"step": state["step"], **metrics})
    state["latest"] = metrics
    best = math.inf if state["best_loss"] is None else state["best_loss"]
    if is_best := metrics["eval_loss"] < best:  # which no NaN is
        state.update(best_loss=metrics["eval_loss"], best_step=state["step"], worse=0, after=metrics)
    else:
        state["worse"] += 1
    text = "best so far" if is_best else ""
    if state["step"] == 0:
        state["before"], text = metrics, "before training"
    yield Update("eval", text, state["step"], steps, metrics)


def _keep(
    recipe: Recipe, ready: Ready, loaded: _Loaded, path: Path, accelerator: Accelerator, state: dict[str, Any]
) -> Generator[Update, None, int]:
    """Write ``adapter/`` from the best checkpoint, else from the last step; returns the step it is of."""
    kept: int = state["step"]
    if recipe.training.load_best_model_at_end and state["best_step"] is not None:
        try:
            checkpoint.load_adapter(checkpoint.at_step(path, state["best_step"]), loaded.pair_model)
            kept = state["best_step"]
        except CheckpointError as error:  # the training is not lost for that
            yield Update("note", f"the best checkpoint cannot be used, the last step is kept ({error.found})")
    if kept != state["best_step"]:
        state["after"] = state["latest"]
    elif kept == 0:
        yield Update("note", "no step was better than the start: lower training.learning_rate, or train longer")
    if accelerator.is_main_process:
        save_adapter(path / "adapter", loaded.pair_model, ready)
        run.write_text(path / run.RESULT, run.to_json({"steps": state["step"], "kept_step": kept}))
    accelerator.wait_for_everyone()
    return kept


def _answer(
    recipe: Recipe, ready: Ready, model: PairModel, path: Path, stop: Sequence[int]
) -> Generator[Update, None, tuple[Sample, ...]]:
    """Prompts of ours and of the held-out pairs, answered before and after; what goes wrong costs the answers only."""
    count, settings, samples = recipe.output.samples, recipe.output, list[Sample]()
    try:
        neutral = NEUTRAL[:count]
        ids = prompt_ids(recipe.data, neutral, partial(load_tokenizer, ready.base.path)) if neutral else []
        prompts = [Prompt("neutral", *both) for both in zip(neutral, ids, strict=True) if both[1]]
        held_out = dict.fromkeys(tuple(map(int, pair.chosen_ids[: pair.chosen_start])) for pair in ready.test)
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


def _exhausted(state: Mapping[str, Any], recipe: Recipe) -> bool:
    patience = recipe.training.early_stopping_patience
    return patience is not None and state["worse"] >= patience


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def save_adapter(folder: Path, model: PairModel, ready: Ready) -> None:
    """The result: adapter, tokenizer with its template, generation config; complete or not there."""
    from transformers import GenerationConfig

    with run.new_folder(folder) as temporary:
        model.model.peft_config["default"].base_model_name_or_path = ready.base.name  # type: ignore[index,union-attr]
        model.model.save_pretrained(temporary)  # type: ignore[operator]
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
        _with_bos(ready.tokenizer).save_pretrained(temporary)
        has_own = (ready.base.path / "generation_config.json").is_file()
        config = GenerationConfig.from_pretrained(ready.base.path) if has_own else GenerationConfig()
        known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        # The reply ends with the template's own end token, which a base's config often does not know.
        config.eos_token_id = list(dict.fromkeys([ready.end_id, *(i for i in known if i is not None)]))
        config.pad_token_id = ready.pad_id
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
