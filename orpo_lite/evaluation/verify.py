"""Verify: whether a merged model is what base and adapter are; both are asked about the same held-out pairs."""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orpo_lite import demo
from orpo_lite.base.blocks import stored_tensors
from orpo_lite.base.config import read_config
from orpo_lite.base.find import Base
from orpo_lite.data.packing import make_batch, micro_batches
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import CheckpointError, Command, FitError, first_line
from orpo_lite.model.load import load_base, load_pair_model
from orpo_lite.model.pair_model import PairModel, Route
from orpo_lite.model.probe import probe
from orpo_lite.ops.devices import is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.changes import trained_recipe
from orpo_lite.runs.commands import Weights, merge_command
from orpo_lite.runs.folder import find_finished_adapter, find_merged, find_trained_base
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.lock import read_lock, with_pinned_base
from orpo_lite.updates import Update, with_torch_defaults

PAIRS = 200  # as many are compared
EXACT = 1e-4  # what sums in another order do to a mean log-probability in float32
LOST = 0.25  # of what the adapter changes, that rounding the sum to 16 bit may cost


@dataclass(frozen=True)
class Row:
    """What one model says of the pairs."""

    model: str
    accuracy: float
    """Share of pairs whose chosen reply it finds likelier."""
    margin: float
    """Mean difference of the mean log-probabilities of chosen and rejected."""
    chosen: float
    """Mean log-probability of the chosen replies."""


@dataclass(frozen=True)
class Verdict:
    """How a merged model compares."""

    rows: tuple[Row, ...]
    """As trained, base and adapter in 16 bit, merged."""
    pairs: int
    held_out: bool
    """False where the run held none out, and pairs that it was trained on had to do."""
    difference: float
    """The largest difference of a mean log-probability between merged and its own base with the adapter beside it."""
    effect: float
    """The largest difference that the adapter makes, to that base."""
    bound: float
    """What the first of the two may be: :data:`EXACT`, or in 16 bit :data:`LOST` of the second."""
    missing: tuple[str, ...] = ()
    """Tensors of the base's files that the merged model does not have in their shape."""

    @property
    def passed(self) -> bool:
        """All tensors there, and within the bound; NaN is not."""
        return not self.missing and self.difference <= self.bound

    @property
    def said(self) -> str:
        """Why, in words."""
        moved = (
            f"log-probabilities differ by {self.difference:.2g} at most (bound {self.bound:.2g})"
        )
        if self.missing:
            moved = f"{len(self.missing)} of the base's tensors are missing ({self.missing[0]} ...); {moved}"
        return f"{moved}; the adapter changes them by up to {self.effect:.2g}"

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "passed": self.passed}


@with_torch_defaults
def compare_merged(
    run_folder: str | Path, *, weights: Weights = "original", base_path: str | Path | None = None
) -> Generator[Update, None, Verdict]:
    """Compare the merged model of a run with its base and adapter, on pairs that the run held out.

    Writes ``verify.json`` beside the merged weights. Loads the models, one after the other, on the GPU if there is
    one.

    Args:
        run_folder: of a run that is merged.
        weights: which of its merged models; it is compared on the weights that it stands on.
        base_path: where the base lies now, if it is a folder that was moved.

    Raises:
        CheckpointError: nothing is merged there.
        FitError: a model in 16 bit does not fit the GPU.
        OrpoLiteError: base or data cannot be read any more.
    """
    path = Path(run_folder).expanduser()
    try:
        return (yield from _compare(path, weights, base_path))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        line = f"CUDA_VISIBLE_DEVICES= {merge_command(path, weights).line} --verify"
        raise FitError(
            where=f"verifying {path}",
            found=f"the GPU is out of memory ({first_line(error)})",
            expected="room for the model in 16 bit; what is merged stays as it is",
            fix=Command(line, " compares on the CPU, which takes long"),
        ) from error


def _compare(
    path: Path, weights: Weights, base_path: str | Path | None
) -> Generator[Update, None, Verdict]:
    find_finished_adapter(path)
    merged, base = find_merged(path, weights), find_trained_base(path, base_path)
    recipe = with_pinned_base(demo.resolve_builtin(trained_recipe(path)), read_lock(path))
    if base_path is not None:
        recipe = recipe.override({"model.model_name_or_path": str(base.path)})
    inputs = yield from prepare_inputs(recipe)
    _refuse_other_pairs(path, inputs.figures["sha256"])
    held_out = len(inputs.test) > 0
    pairs = [
        pair
        for pair, _ in zip(inputs.test if held_out else inputs.train, range(PAIRS), strict=False)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapted = recipe.override({"model.adapter_name_or_path": str((path / "adapter").resolve())})
    whole = {"quantization.load_in_4bit": False}
    scores: dict[str, Tensor] = {}
    if recipe.quantization.load_in_4bit:
        yield Update("stage", "scoring pairs by the 4-bit base with the adapter")
        model = load_pair_model(adapted, base, device)
        scores["4-bit base + adapter, as trained"], route = _score(model, pairs, recipe)
        if weights == "original":
            del model  # before the next one is loaded
    if weights == "original":
        yield Update("stage", "scoring pairs by the base with the adapter")
        model = load_pair_model(adapted.override(whole), base, device)
        scores["base + adapter"], route = _score(model, pairs, recipe)
    *_, expected = scores.values()
    adapter: Any = model.model
    with adapter.disable_adapter():
        plain, _ = _score(model, pairs, recipe, route)
    del model, adapter
    yield Update("stage", "scoring pairs by the merged model")
    own = Base(str(merged), merged, None, "", read_config(merged, str(merged)))
    model = PairModel(load_base(recipe.override(whole), own, device), recipe.memory)
    scores["merged"], _ = _score(model, pairs, recipe, route)
    found = scores["merged"]
    stored = stored_tensors(merged)
    halves = any(tensor.dtype.itemsize < 4 for tensor in stored.values())
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    missing = [
        name
        for name, tensor in stored_tensors(base.path).items()
        if shapes.get(name) != tensor.shape
    ]
    effect = float((expected - plain).abs().max())
    verdict = Verdict(
        rows=tuple(_row(name, values) for name, values in scores.items()),
        pairs=len(pairs),
        held_out=held_out,
        difference=float((found - expected).abs().max()),
        effect=effect,
        bound=max(EXACT, LOST * effect) if halves or device.type == "cuda" else EXACT,
        missing=tuple(missing),
    )
    write_text(merged / "verify.json", to_json(verdict.to_json()))
    return verdict


def _refuse_other_pairs(path: Path, sha256: str) -> None:
    """Which pairs are held out depends on all of them: of others some may have been trained on."""
    known = read_lock(path)["data"]
    if known["sha256"] and known["sha256"] != sha256:
        raise CheckpointError(
            where=f"run {path}",
            found=f"changed since the run began: {known['name']}",
            expected="the pairs of the training",
            fix="put them back; what is merged stays as it is",
        )


def _row(name: str, values_2P: Tensor) -> Row:
    chosen_P, rejected_P = values_2P
    right_P = (chosen_P > rejected_P).double()
    return Row(
        name, float(right_P.mean()), float((chosen_P - rejected_P).mean()), float(chosen_P.mean())
    )


def _score(
    model: PairModel, pairs: Sequence[TokenizedPair], recipe: Recipe, route: Route | None = None
) -> tuple[Tensor, Route]:
    """Mean log-probabilities of chosen and rejected replies, shape (2, P), float64; and the route of the pairs.

    Without a ``route`` it is the fastest one that the probe finds equal for the model.
    """
    if route:
        model.route = route
    elif recipe.memory.packing:
        probe(
            model, max(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
        )
    scores_2P = torch.empty(2, len(pairs), dtype=torch.float64)
    batching = model.batching(recipe, pad_id=0)
    for chunk in micro_batches(pairs, batching):
        batch = make_batch([pairs[index] for index in chunk], batching).to(model.device)
        with model.evaluating():
            logps = model(batch)
        scores_2P[:, chunk] = torch.stack([logps.chosen_P, logps.rejected_P]).double().cpu()
    return scores_2P, model.route
