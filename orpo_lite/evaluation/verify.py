"""Verify a merged model: compare its scores with the scores of the base plus the adapter."""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo_lite.base.blocks import stored_tensors
from orpo_lite.base.config import read_config
from orpo_lite.base.find import Base
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import Command
from orpo_lite.evaluation.gain import Kept, kept_gain, pair_log_odds
from orpo_lite.evaluation.intervals import Numbers
from orpo_lite.evaluation.open_run import (
    FoundModel,
    explain_out_of_memory,
    find_model,
    load_merged,
)
from orpo_lite.evaluation.score import score_pairs
from orpo_lite.model.load import choose_dtype, load_pair_model
from orpo_lite.model.pair_model import PairModel, Route
from orpo_lite.model.probe_values import rounded_input
from orpo_lite.model.score_head import output_head_names
from orpo_lite.ops.devices import device_kind, dtype_name
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.commands import Weights, merge_command
from orpo_lite.runs.folder import find_finished_adapter, find_merged
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.lock import refuse_other_pairs
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update, with_torch_defaults

LOGPS, REWARDS = "log-probabilities", "rewards"
PAIRS = 200  # most pairs to compare
EXACT = 1e-4  # a float32 mean log-probability changes by up to this if sums have another order
# In 16 bit, a difference is allowed up to this many times the effect of rounding the first layer's
# input once more. The probe uses the same factor.
ROUNDINGS = 4
LOST = 0.25  # rounding the merged weights to 16 bit may cost this share of the adapter's effect


@dataclass(frozen=True)
class Row:
    """The scores of one model on the pairs."""

    model: str
    accuracy: float
    """Share of pairs whose chosen reply has the higher mean log-probability or reward."""
    margin: float
    """Difference of the scores of the chosen and the rejected reply, averaged over the pairs."""
    chosen: float
    """Score of the chosen replies, averaged over the pairs."""


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a merged model with its base plus the adapter."""

    quantity: str
    """What is compared: :data:`LOGPS`, or :data:`REWARDS` for a reward model."""
    rows: tuple[Row, ...]
    """One row for each model: first the base with the adapter, in 4 bit, in 16 bit or both; then
    the merged model."""
    pairs: int
    held_out: bool
    """False if the run held out no pairs. Then pairs of its training were compared."""
    difference: float
    """Largest difference of a score between the merged model and the base with the adapter."""
    effect: float
    """Largest difference of a score between the base with and without the adapter. Without the
    adapter, the score head of a reward model has random weights."""
    bound: float
    """Limit of ``difference``: :data:`EXACT`. If the merged weights are in 16 bit or were compared
    on a GPU, the limit is :data:`LOST` times ``effect`` if this is larger."""
    rounding: float = 0.0
    """The difference that rounding alone can make if the models compute in 16 bit, else 0. A
    ``difference`` of up to this value passes, even if it is above ``bound``."""
    missing: tuple[str, ...] = ()
    """Names of the base's tensors that the merged model does not have in the same shape."""
    kept: Kept | None = None
    """The share of the adapter's gain that the merged model keeps, measured on these pairs. None:
    the model is a reward model, which has no log odds."""
    base_log_odds: tuple[float, ...] = ()
    """Log odds ratio of each pair, computed with the base that the adapter was merged onto."""
    trained_gain: tuple[float, ...] = ()
    """What the adapter adds to the log odds ratio of each pair, on the base of the training."""

    @property
    def outcome(self) -> str:
        """``passed``, ``FAILED`` or ``cannot tell``.

        It is ``cannot tell`` if the adapter changes the model less than rounding does, because then
        the comparison cannot show whether the adapter was lost. A difference of NaN is ``FAILED``.
        """
        if self.missing or not self.difference <= max(self.bound, self.rounding):
            return "FAILED"
        return "passed" if self.effect > self.rounding else "cannot tell"

    @property
    def passed(self) -> bool:
        """True if :attr:`outcome` is ``passed``."""
        return self.outcome == "passed"

    @property
    def explanation(self) -> str:
        """The reason for the outcome, in words."""
        allowed = max(self.bound, self.rounding)
        text = f"{self.quantity} differ by at most {self.difference:.2g} (limit {allowed:.2g})"
        if self.missing:
            count, first = len(self.missing), self.missing[0]
            text = f"{count} of the base's tensors are missing ({first} ...); {text}"
        text = f"{text}; the adapter changes them by up to {self.effect:.2g}"
        if self.outcome == "cannot tell":
            text += ", which is less than rounding to 16 bit changes them"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return all fields and the properties ``passed`` and ``outcome``, as values for JSON."""
        return {**asdict(self), "passed": self.passed, "outcome": self.outcome}


@with_torch_defaults
def compare_merged(
    run_folder: str | Path, *, weights: Weights = "original", base_path: str | Path | None = None
) -> Generator[Update, None, Verdict]:
    """Compare the merged model of a run with the base plus the adapter, on held-out pairs.

    Writes ``verify.json`` next to the merged weights. Loads one model after the other, on the GPU
    if there is one.

    Args:
        run_folder: the folder of a run that was merged.
        weights: which merged model to compare. ``original``: the model merged onto the original
            base is compared with the original base plus the adapter. ``dequantized``: the model
            merged onto the dequantised 4-bit base is compared with the 4-bit base plus the adapter.
        base_path: where the base is now, if its folder was moved.

    Raises:
        CheckpointError: the run has no such merged model, or the data changed since the training.
        FitError: the GPU has too little memory for a model in 16 bit.
        OrpoLiteError: the base or the data can no longer be read.
    """
    path = Path(run_folder).expanduser()
    line = f"CUDA_VISIBLE_DEVICES= {merge_command(path, weights).line} --verify"
    with explain_out_of_memory(
        f"verifying {path}",
        "enough memory for the model in 16 bit (the merged model is not changed)",
        Command(line, " compares on the CPU, which is slow"),
    ):
        return (yield from _compare(path, weights, base_path))


def _compare(
    path: Path, weights: Weights, base_path: str | Path | None
) -> Generator[Update, None, Verdict]:
    find_finished_adapter(path)
    merged = find_merged(path, weights)
    trained = find_model(path, base_path=base_path, command="merge")
    recipe, base, device = trained.recipe, trained.base, trained.device
    is_reward = recipe.loss.trains_reward_model
    pairs, held_out = yield from pairs_to_compare(trained, path)
    dtype = dtype_name(choose_dtype(recipe.model.dtype, device_kind(device)))
    if recipe.quantization.load_in_4bit and weights == "dequantized":
        dtype = trained.dtype
    in_16bit = {"quantization.load_in_4bit": False, "model.dtype": dtype}
    scores: dict[str, Tensor] = {}
    trained_gain_P: Numbers | None = None
    if recipe.quantization.load_in_4bit:
        yield Update("stage", "loading the 4-bit base with the adapter")
        model = load_pair_model(trained.loading, base, device)
        found, route = yield from _score(model, pairs, recipe, "the 4-bit base with the adapter")
        scores["4-bit base + adapter, as trained"] = found
        if weights == "original":
            with model.without_adapter():
                plain, _ = yield from _score(model, pairs, recipe, "the 4-bit base", route)
            trained_gain_P = pair_log_odds(found) - pair_log_odds(plain)
            del model  # free the memory before the next model is loaded
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
    unused = output_head_names(model.causal) if is_reward else []
    if trained_gain_P is None:
        trained_gain_P = pair_log_odds(expected) - pair_log_odds(plain)
    del model
    yield Update("stage", "loading the merged model")
    merged_base = Base(str(merged), merged, None, "", read_config(merged, str(merged)))
    model = load_merged(recipe.override(in_16bit), merged_base, device)
    found, _ = yield from _score(model, pairs, recipe, "the merged model", route)
    scores["merged"] = found
    stored = stored_tensors(merged)
    is_16bit = any(tensor.dtype.itemsize < 4 for tensor in stored.values())
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    missing = [
        name
        for name, tensor in stored_tensors(base.path).items()
        if shapes.get(name) != tensor.shape and name not in unused
    ]
    base_P = pair_log_odds(plain)
    gain_P = pair_log_odds(found) - base_P
    effect = float((expected - plain).abs().max())
    # A reward may be far from 0, and rounding is relative.
    exact = EXACT * max(1.0, float(expected.abs().max())) if is_reward else EXACT
    kept = kept_gain("merged", gain_P, trained_gain_P, [pair.prompt for pair in pairs])
    verdict = Verdict(
        quantity=REWARDS if is_reward else LOGPS,
        rows=tuple(_row(name, values) for name, values in scores.items()),
        pairs=len(pairs),
        held_out=held_out,
        difference=float((found - expected).abs().max()),
        effect=effect,
        bound=max(exact, LOST * effect) if is_16bit or device.type == "cuda" else exact,
        rounding=rounding,
        missing=tuple(missing),
        kept=None if is_reward else kept,
        base_log_odds=tuple(base_P.tolist()),
        trained_gain=tuple(trained_gain_P.tolist()),
    )
    write_text(merged / "verify.json", to_json(verdict.to_json()))
    return verdict


def read_gains(
    path: Path, weights: Weights, base_path: str | Path | None
) -> Generator[Update, None, tuple[Numbers, Numbers]]:
    """Return two arrays of shape (P,): the base's log odds ratios and the trained adapter's gains.

    The gain is what the adapter adds to the log odds ratio of a pair. The arrays are read from
    verify.json. If verify.json lacks the arrays, :func:`compare_merged` computes them.

    Raises:
        OrpoLiteError: the merged model cannot be compared; see :func:`compare_merged`.
    """
    file = find_merged(path, weights) / "verify.json"
    record = read_json(file) if file.is_file() else {}
    base, gain = record.get("base_log_odds"), record.get("trained_gain")
    if not base or not gain:
        verdict = yield from compare_merged(path, weights=weights, base_path=base_path)
        base, gain = verdict.base_log_odds, verdict.trained_gain
    return np.array(base, dtype=np.float64), np.array(gain, dtype=np.float64)


def pairs_to_compare(
    trained: FoundModel, path: Path
) -> Generator[Update, None, tuple[list[TokenizedPair], bool]]:
    """Return at most :data:`PAIRS` pairs of a run, and whether the pairs are held out.

    The first held-out pairs are returned. If there are none, the first training pairs are
    returned.

    Raises:
        CheckpointError: the data changed since the training.
    """
    inputs = yield from prepare_inputs(trained.recipe)
    refuse_other_pairs(path, inputs, "restore the data; the merged model is not changed")
    held_out = len(inputs.test) > 0
    return list(itertools.islice(inputs.test if held_out else inputs.train, PAIRS)), held_out


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
    """Return the scores of the replies, and the route that the pairs took.

    The scores have shape (2, P): chosen, rejected, in float64. ``by`` names the model in
    updates.
    """
    scores = yield from score_pairs(model, pairs, recipe, f"scoring pairs by {by}", route)
    return torch.stack([scores.chosen_P, scores.rejected_P]), model.route
