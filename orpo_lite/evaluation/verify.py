"""Verify a merged model: score the same held-out pairs with it and with base and adapter."""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orpo_lite.base.blocks import stored_tensors
from orpo_lite.base.config import read_config
from orpo_lite.base.find import Base
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import Command, FitError, first_line
from orpo_lite.evaluation.open_run import find_model
from orpo_lite.evaluation.score import score_pairs
from orpo_lite.model.load import choose_dtype, load_base, load_pair_model
from orpo_lite.model.pair_model import PairModel, Route
from orpo_lite.model.probe_values import rounded_input
from orpo_lite.ops.devices import device_kind, dtype_name, is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.commands import Weights, merge_command
from orpo_lite.runs.folder import find_finished_adapter, find_merged
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.lock import refuse_other_pairs
from orpo_lite.updates import Update, with_torch_defaults

PAIRS = 200  # at most so many are compared
EXACT = 1e-4  # effect of another order of sums on a mean log-probability in float32
ROUNDINGS = 4  # so many times one more rounding of the first layer's input, as the probe allows
LOST = 0.25  # share of the adapter's effect that rounding the sum to 16 bit may cost


@dataclass(frozen=True)
class Row:
    """The scores of one model on the pairs."""

    model: str
    accuracy: float
    """Share of pairs whose chosen reply has the higher mean log-probability."""
    margin: float
    """Mean difference of the mean log-probabilities of chosen and rejected."""
    chosen: float
    """Mean log-probability of the chosen replies."""


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a merged model."""

    rows: tuple[Row, ...]
    """As trained; base and adapter in 16 bit; merged."""
    pairs: int
    held_out: bool
    """False if the run held out no pairs, so that pairs of its training were compared."""
    difference: float
    """Largest difference of a mean log-probability between merged and its base with the adapter."""
    effect: float
    """Largest difference of a mean log-probability that the adapter makes to that base."""
    bound: float
    """Limit of ``difference``: :data:`EXACT`, or in 16 bit :data:`LOST` of ``effect``."""
    rounding: float = 0.0
    """What rounding explains of ``difference`` where the models compute in half precision."""
    missing: tuple[str, ...] = ()
    """Tensors of the base's files that the merged model does not have in the same shape."""

    @property
    def outcome(self) -> str:
        """passed, FAILED, or cannot tell.

        The last one is for an adapter that changes less than rounding does: a lost adapter would
        not show. NaN fails.
        """
        if self.missing or not self.difference <= max(self.bound, self.rounding):
            return "FAILED"
        return "passed" if self.effect > self.rounding else "cannot tell"

    @property
    def passed(self) -> bool:
        """Whether all tensors exist and the difference is within what is allowed."""
        return self.outcome == "passed"

    @property
    def explanation(self) -> str:
        """The reason of the verdict, in words."""
        allowed = max(self.bound, self.rounding)
        text = f"log-probabilities differ by {self.difference:.2g} at most (bound {allowed:.2g})"
        if self.missing:
            count, first = len(self.missing), self.missing[0]
            text = f"{count} of the base's tensors are missing ({first} ...); {text}"
        text = f"{text}; the adapter changes them by up to {self.effect:.2g}"
        if self.outcome == "cannot tell":
            text += ", which is less than rounding in half precision does"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return all fields, ``passed`` and ``outcome``."""
        return {**asdict(self), "passed": self.passed, "outcome": self.outcome}


@with_torch_defaults
def compare_merged(
    run_folder: str | Path, *, weights: Weights = "original", base_path: str | Path | None = None
) -> Generator[Update, None, Verdict]:
    """Compare the merged model of a run with its base and adapter, on pairs that the run held out.

    Writes ``verify.json`` next to the merged weights. Loads the models one after the other, on the
    GPU if there is one.

    Args:
        run_folder: folder of a run that is merged.
        weights: which of its merged models; it is compared on the weights that it was merged onto.
        base_path: where the base is now, if it is a folder that was moved.

    Raises:
        CheckpointError: the run has no merged model.
        FitError: a model in 16 bit does not fit the GPU.
        OrpoLiteError: base or data can no longer be read.
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
            expected="enough memory for the model in 16 bit; the merged model is not changed",
            fix=Command(line, " compares on the CPU, which is slow"),
        ) from error


def _compare(
    path: Path, weights: Weights, base_path: str | Path | None
) -> Generator[Update, None, Verdict]:
    find_finished_adapter(path)
    merged = find_merged(path, weights)
    trained = find_model(path, base_path=base_path, verb="merge")
    recipe, base, device = trained.recipe, trained.base, trained.device
    inputs = yield from prepare_inputs(recipe)
    refuse_other_pairs(path, inputs, "restore them; the merged model is not changed")
    held_out = len(inputs.test) > 0
    pairs = list(itertools.islice(inputs.test if held_out else inputs.train, PAIRS))
    dtype = dtype_name(choose_dtype(recipe.model.dtype, device_kind(device)))
    if recipe.quantization.load_in_4bit and weights == "dequantized":
        dtype = trained.dtype
    in_16bit = {"quantization.load_in_4bit": False, "model.dtype": dtype}
    scores: dict[str, Tensor] = {}
    if recipe.quantization.load_in_4bit:
        yield Update("stage", "loading the 4-bit base with the adapter")
        model = load_pair_model(trained.loading, base, device)
        found, route = yield from _score(model, pairs, recipe, "the 4-bit base with the adapter")
        scores["4-bit base + adapter, as trained"] = found
        if weights == "original":
            del model  # before the next one is loaded
    if weights == "original":
        yield Update("stage", "loading the base with the adapter")
        model = load_pair_model(trained.loading.override(in_16bit), base, device)
        found, route = yield from _score(model, pairs, recipe, "the base with the adapter")
        scores["base + adapter"] = found
    expected = [*scores.values()][-1]
    with model.without_adapter():
        plain, _ = yield from _score(model, pairs, recipe, "the base", route)
    rounding = 0.0
    if dtype in ("float16", "bfloat16"):
        with rounded_input(model):
            rounded, _ = yield from _score(model, pairs, recipe, "the base, rounded", route)
        rounding = ROUNDINGS * float((rounded - expected).abs().max())
    del model
    yield Update("stage", "loading the merged model")
    merged_base = Base(str(merged), merged, None, "", read_config(merged, str(merged)))
    model = PairModel(load_base(recipe.override(in_16bit), merged_base, device), recipe.memory)
    found, _ = yield from _score(model, pairs, recipe, "the merged model", route)
    scores["merged"] = found
    stored = stored_tensors(merged)
    is_16bit = any(tensor.dtype.itemsize < 4 for tensor in stored.values())
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
        bound=max(EXACT, LOST * effect) if is_16bit or device.type == "cuda" else EXACT,
        rounding=rounding,
        missing=tuple(missing),
    )
    write_text(merged / "verify.json", to_json(verdict.to_json()))
    return verdict


def _row(name: str, values_2P: Tensor) -> Row:
    chosen_P, rejected_P = values_2P
    is_right_P = (chosen_P > rejected_P).double()
    margin_P = chosen_P - rejected_P
    return Row(name, float(is_right_P.mean()), float(margin_P.mean()), float(chosen_P.mean()))


def _score(
    model: PairModel,
    pairs: Sequence[TokenizedPair],
    recipe: Recipe,
    by: str,
    route: Route | None = None,
) -> Generator[Update, None, tuple[Tensor, Route]]:
    """Return mean log-probabilities of chosen and rejected replies, and the route of the pairs.

    The shape is (2, P), in float64. ``by`` names the model in updates.
    """
    scores = yield from score_pairs(model, pairs, recipe, f"scoring pairs by {by}", route)
    return torch.stack([scores.chosen_P, scores.rejected_P]), model.route
