"""Check that ways to save time or memory change the gradient only by rounding.

Three ways are checked: the route of pairs through the model
(:data:`orpo_lite.model.pair_model.Route`), this package's layers (fused LoRA, tiled MLPs), and
checkpointing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orpo_lite.errors import ModelError, Overrides
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, PairModel, Route
from orpo_lite.model.probe_values import (
    SHORT_PAIRS,
    PairLengths,
    coarsest_dtype,
    error_reason,
    mean_logps,
    random_pairs,
    rounded_input,
)
from orpo_lite.ops.devices import dtype_name

GRADIENT_PAIRS = [SHORT_PAIRS[0], SHORT_PAIRS[4]]
TINY_PAIRS = [(5, 3, 4)]  # for a gradient without checkpointing, which needs much memory
PROBE_TILE = 16  # tokens in a tile, so that each sequence of GRADIENT_PAIRS has several tiles


class Gradient(NamedTuple):
    """The gradient without this package's layers. Other gradients are compared with this gradient.

    The layers of the model's code and of peft are used instead.
    """

    parts: list[Tensor]
    """One tensor per trained parameter."""
    bound: float
    """Largest relative difference that rounding can cause."""


def own_gradient(model: PairModel) -> Gradient:
    """Return the gradient without this package's layers, and a bound for its rounding errors.

    The gradient is computed with the layers of the model's code and of peft. All logits are in
    memory. The bound is the largest relative difference that rounding can cause.

    In float64 and float32, the bound is fixed. In half precision, the bound is measured:

    - Noise of the size of a rounding error is added to the embeddings.
    - The relative change of the gradient is measured: about 1% (Llama) to 10% (Gemma).
    - The bound is three times this change, but at least 0.01 and at most 0.3.
    """
    with own_layers(model):
        parts = _gradient(model, "logits")
        _note_unused_adapters(model, parts)
        dtype = coarsest_dtype(model)
        if dtype in (torch.float64, torch.float32):
            return Gradient(parts, 1e-8 if dtype == torch.float64 else 1e-3)
        with rounded_input(model):
            effect = _distance(_gradient(model, "logits"), parts)
    return Gradient(parts, min(max(3 * effect, 0.01), 0.3))


def gradient_difference(model: PairModel, route: Route, own: Gradient) -> str:
    """Describe how the gradient on ``route`` differs from ``own``, the model's own gradient.

    The result is "" if rounding can cause the difference. If the model's code fails on the route,
    the result is the reason of the failure.
    """
    try:
        difference = _distance(_gradient(model, route), own.parts)
    except MODEL_CODE_ERRORS as error:
        return error_reason(error, route)
    if difference <= own.bound:
        return ""
    return f"gradients would differ by {difference:.2%} (bound {own.bound:.2%})"


def check_reruns(model: PairModel) -> None:
    """Check that the gradient is right if layers run again in the backward pass.

    The gradient is computed twice: with the checkpointing and the offload that the model uses, and
    without them. The two gradients must be equal except for rounding.

    Raises:
        ModelError: the two gradients differ, or the gradient without checkpointing is not finite.
    """
    found = _gradient(model, "logits", TINY_PAIRS)
    checkpointed: list[Any] = [layer for layer in model.layers if layer.gradient_checkpointing]
    for layer in checkpointed:
        layer.gradient_checkpointing = layer.training = False
    try:
        expected = _gradient(model, "logits", TINY_PAIRS)
    finally:
        for layer in checkpointed:
            layer.gradient_checkpointing = layer.training = True
    where = f"model {model.config.model_type}"
    if not all(bool(part.isfinite().all()) for part in expected):
        dtype = dtype_name(model.causal.dtype)
        raise ModelError(
            where=where,
            found=f"its gradient is not finite in {dtype}",
            expected="a finite gradient",
            fix=Overrides({"model.dtype": "float32"}),
        )
    bound = {torch.float64: 1e-8, torch.float32: 1e-3}.get(coarsest_dtype(model), 0.01)
    difference = _distance(found, expected)
    if not difference <= bound:
        settings = {"memory.activation_checkpointing": "none", "memory.checkpoint_offload": False}
        raise ModelError(
            where=where,
            found=f"its gradient with activation checkpointing differs by {difference:.2%} from "
            f"its gradient without it ({bound:.2%} is allowed)",
            fix=Overrides(settings),
        )


def drop_wrong_operations(model: PairModel, own: Gradient) -> None:
    """Remove orpo-lite's layers (fused LoRA, tiled MLPs) if they give a wrong gradient.

    ``own`` is the right gradient, computed with the layers of peft and of the model's code. If
    orpo-lite's layers are removed, the model uses the layers of peft and of the model's code, and
    ``model.notes`` gives the reason.
    """
    replaced = replaced_modules(model)
    tiled = [module.forward for module in replaced if hasattr(module.forward, "tokens")]
    sizes = [forward.tokens for forward in tiled]
    for forward in tiled:
        forward.tokens = min(forward.tokens, PROBE_TILE)
    reason = gradient_difference(model, "logits", own) if replaced else ""
    for forward, size in zip(tiled, sizes, strict=True):
        forward.tokens = size
    if not reason:
        return
    settings = []
    if len(replaced) > len(tiled):
        settings.append("memory.fused_lora")
    if tiled:
        settings.append("memory.mlp_tile")
    for module in replaced:
        del module.forward
    model.notes.append(f"not used: {' and '.join(settings)}, because {reason}")


def replaced_modules(model: PairModel) -> list[nn.Module]:
    """Return the modules whose forward pass this package has replaced: fused LoRA, tiled MLPs."""
    return [m for m in model.modules() if getattr(m.__dict__.get("forward"), "equals_plain", False)]


@contextmanager
def own_layers(model: PairModel) -> Iterator[None]:
    """Turn off this package's layers inside the ``with`` block.

    The layers of the model's code and of peft are used instead. Settings that keep the embedding or
    the layers' inputs in host memory still have an effect.
    """
    modules = replaced_modules(model)
    forwards = [module.__dict__.pop("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


def _note_unused_adapters(model: PairModel, gradient: list[Tensor]) -> None:
    """Add a note on adapters without a gradient. They use memory, but learn nothing."""
    names = [name for name, _ in model.trained() if "lora_A" in name]
    unused = [
        name
        for (name, _), part in zip(model.trained(), gradient, strict=True)
        if "lora_A" in name and not part.any()
    ]
    if unused:
        layer = unused[0].split(".lora_A")[0].split("base_model.model.")[-1]
        model.notes.append(
            f"{len(unused)} of {len(names)} adapted layers get no gradient ({layer} ...): "
            "they learn nothing"
        )


def _gradient(
    model: PairModel, route: Route, lengths: list[PairLengths] = GRADIENT_PAIRS
) -> list[Tensor]:
    """Return the gradient of a weighted sum of :func:`mean_logps`, one tensor per parameter."""
    pairs = random_pairs(model.config.get_text_config(), lengths)
    logps_3P = mean_logps(model, pairs, route)
    weights_3 = logps_3P.new_tensor([1.0, -2.0, 0.5])
    parameters = [parameter for _, parameter in model.trained()]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        # torch.autograd.grad would leave out the nodes with which FSDP2 frees gathered weights.
        (weights_3 @ logps_3P).sum().backward()  # type: ignore[no-untyped-call]
        return [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the norm of ``found - expected`` divided by the norm of ``expected``."""
    difference = sum(_square_sum(a - b) for a, b in zip(found, expected, strict=True))
    return math.sqrt(difference / max(sum(map(_square_sum, expected)), 1e-300))


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
