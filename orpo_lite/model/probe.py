"""Probe a model before the training: compare this package's step with the model's own code."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from orpo_lite.data.packing import pack_pairs
from orpo_lite.errors import ModelError, Overrides
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, ROUTES, PairModel, Route
from orpo_lite.model.probe_gradients import (
    Gradient,
    check_reruns,
    drop_wrong_operations,
    gradient_difference,
    own_gradient,
    own_layers,
)
from orpo_lite.model.probe_values import (
    ValueComparison,
    describe_error,
    logit_rounding,
    random_pairs,
)
from orpo_lite.ops.attention import flash_attn
from orpo_lite.ops.devices import dtype_name


def probe(model: PairModel, max_length: int, tokens: int = 0) -> None:
    """Set the model's route: the fastest correct way to send pairs through the model.

    Example of a route: several pairs are packed into one row. A route is correct if it gives the
    same results as the model's own code. On random pairs, the log-probabilities and the gradient of
    each route are compared with those of the model's own code. If the model must use a simpler
    route, ``model.notes`` gives the reason.

    A route can give wrong results if the model has position biases (ALiBi), linear or sparse
    attention, attention sinks or positions that are counted along the row. A route can also give
    wrong results if the model changes its logits in a way that ``pair_model.find_head`` does not
    know.

    Args:
        model: the model with the settings of the training. If it has no trained parameters, only
            log-probabilities are compared and not gradients.
        max_length: number of tokens of the longest sequence.
        tokens: number of tokens of the longest packed row; 0 if a row has only one pair.

    Raises:
        ModelError: the model's own forward pass fails, gives numbers that are not finite, changes
            weights or lets tokens see later tokens. Or checkpointing changes the gradient.
    """
    reasons: dict[Route, str] = {}
    with _random_adapter(model):
        own = _compare_operations(model)
        comparison = ValueComparison(model, max_length, tokens)
        for route in ROUTES[ROUTES.index(model.route) :]:
            if route == "logits":
                break
            with model.evaluating():
                reason = comparison.difference(route)
            if not reason and own:
                with model.without_dropout():
                    reason = gradient_difference(model, route, own)
            if not reason:
                break
            reasons[route] = reason
    if route != model.route:
        model.fall_back(route, reasons[model.route])
    has_softcap = (
        getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    )
    is_packed_on_gpu = route in ("shared", "packed") and model.device.type == "cuda"
    if has_softcap and is_packed_on_gpu and flash_attn() is None:
        model.notes.append(
            "this model's attention has a softcap and is slow without the flash-attn package, "
            "which has a fast kernel for it"
        )


def probe_operations(model: PairModel) -> None:
    """Compare this package's layers with the model's own layers.

    Use this function for a recipe without packing. For a recipe with packing, use :func:`probe`: it
    makes the same comparison, and then chooses a route for packed pairs.
    """
    with _random_adapter(model):
        _compare_operations(model)


def _compare_operations(model: PairModel) -> Gradient | None:
    """Compare this package's layers with the model's own. Return the model's own gradient.

    If this package's layers give another gradient, the model's own layers are used from now on.
    Without trained parameters there is nothing to compare, and the result is None.
    """
    with model.evaluating(), own_layers(model):
        _check_own_forward(model)
    if not model.trained():
        return None
    with model.without_dropout():
        with own_layers(model):
            check_reruns(model)
        own = own_gradient(model)
        drop_wrong_operations(model, own)
    return own


@contextmanager
def _random_adapter(model: PairModel) -> Iterator[None]:
    """Fill the matrices B of a new adapter with random numbers inside the ``with`` block.

    In a new adapter these matrices are zero. The adapter's outputs and the gradient of A would then
    be zero too, and nothing could be compared.
    """
    zeros = [
        parameter for name, parameter in model.trained() if "lora_B" in name and not parameter.any()
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeros:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _check_own_forward(model: PairModel) -> None:
    """Check the model's own forward pass.

    Raises:
        ModelError: it fails, gives logits that are not finite, changes weights or is not causal.
    """
    where = f"model {model.config.model_type}"
    numbers_before = _first_numbers(model)
    logits, changed_logits = _logits_before_last_token(model, where)
    if not bool(logits.isfinite().all() and changed_logits.isfinite().all()):
        dtype = dtype_name(model.causal.dtype)
        raise ModelError(
            where=where,
            found=f"its logits are not finite in {dtype}",
            expected="finite logits",
            fix=Overrides(
                {"model.dtype": "float32"},
                " if the logits overflow; otherwise the model's weights are damaged",
            ),
        )
    changed_weights = [
        name
        for name, numbers in _first_numbers(model).items()
        if not torch.equal(numbers, numbers_before.get(name, numbers))
    ]
    if changed_weights:
        has_rescaling = hasattr(model.config, "rescale_every")
        raise ModelError(
            where=where,
            found=f"its forward pass changes its weights ({changed_weights[0]} ...), "
            "so the adapter does not fit the changed weights",
            fix="set rescale_every to 0 in the model's config.json"
            if has_rescaling
            else "use another base",
        )
    norm = logits.double().norm().clamp_min(1e-300)
    difference = float((logits.double() - changed_logits.double()).norm() / norm)
    if not difference <= logit_rounding(model):
        raise ModelError(
            where=where,
            found="its logits at a token depend on later tokens, as in a model that fills gaps in "
            "a text",
            expected="a causal language model",
        )


def _logits_before_last_token(model: PairModel, where: str) -> tuple[Tensor, Tensor]:
    """Return the logits of a sequence, and of the same sequence with another last token.

    Both results leave out the logits at the last token.
    """
    (pair,) = random_pairs(model.config.get_text_config(), [(24, 9, 13)])
    batch = pack_pairs([pair], completion_only_loss=False, share=False).to(model.device)
    ids = batch.input_ids_T[: batch.segments[0][1]]
    changed_ids = ids.clone()
    changed_ids[-1] = ids[0]
    try:
        logits, changed_logits = (
            model.causal(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1]
            for row in (ids, changed_ids)
        )
    except MODEL_CODE_ERRORS as error:
        raise ModelError(
            where=where,
            found=f"its own forward pass fails with this adapter ({describe_error(error)})",
            fix="set other lora.target_modules, another model.adapter_name_or_path, "
            "or quantization.load_in_4bit=false",
        ) from error
    return logits, changed_logits


def _first_numbers(model: PairModel) -> dict[str, Tensor]:
    """Return the first numbers, at most 8, of each parameter."""
    numbers = {}
    for name, parameter in model.causal.named_parameters():
        row = parameter.detach()
        while row.dim() > 1:
            row = row[0]
        numbers[name] = row[:8].clone() if row.dim() else row.clone()
    return numbers
