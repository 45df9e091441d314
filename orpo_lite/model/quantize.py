"""Which layers go into 4 bit, and how.

transformers quantizes a base as it is loaded; here the same is done for bases without weights.
"""

import inspect
import re
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import get_keys_to_not_convert

from orpo_lite.ops.devices import META
from orpo_lite.recipe.schema import Recipe


def skipped_modules(recipe: Recipe, config: Any, device: torch.device) -> list[str]:
    """transformers' ``llm_int8_skip_modules``: layers that cannot be in 4 bit, and heads; [] where there are none.

    Those of :func:`bypassed_layers`; and on a CPU those of :func:`wrong_widths`.
    """
    if not recipe.quantization.load_in_4bit:
        return []
    with META:
        model = AutoModelForCausalLM.from_config(config)
    widths = {name: layer_shape(layer)[0] for name, layer in quantizable(model).items()}
    wrong = wrong_widths(set(widths.values())) if device.type == "cpu" else set()
    names = [*bypassed_layers(model), *(name for name, width in widths.items() if width in wrong)]
    return (
        [*names, *(name for name in get_keys_to_not_convert(model) if name not in names)]
        if names
        else []
    )


def quantizable(model: Any) -> dict[str, Any]:
    """The layers that transformers puts into 4 bit, by name: plain linear ones, GPT-2's Conv1D too, but no head.

    Nor those of :func:`bypassed_layers`, which it is told to leave.
    """
    head, bypassed = model.get_output_embeddings(), bypassed_layers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or is_transposed(module))
        and module is not head
        and name not in bypassed
    }


def bypassed_layers(model: nn.Module) -> list[str]:
    """Linear layers whose weight the model's own code takes itself, by name.

    Gemma 3n clamps such a weight in place, and Mamba's kernels multiply by it: a weight in 4 bit is of other numbers,
    and an adapter on the layer has no effect.
    """
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear) and child in _taken_weights(module.__class__)
    ]


# Not where its dtype or shape is asked for, nor Bloom's slices of it, which are for checkpoints split over processes.
WEIGHT_TAKEN = r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)|\[)"


@cache
def _taken_weights(kind: type) -> frozenset[str]:
    """The layers whose weight the methods of a model's class take, those of its bases included."""
    return frozenset(re.findall(WEIGHT_TAKEN, "".join(map(_source, kind.__mro__))))


def _source(kind: type) -> str:
    """The source of a model class's own methods; "" for the classes of torch."""
    if not kind.__module__.startswith("transformers.models."):
        return ""
    methods = [
        inspect.unwrap(method) for method in vars(kind).values() if inspect.isfunction(method)
    ]
    return "".join(inspect.getsource(method) for method in methods)


def is_transposed(layer: Any) -> bool:
    """Whether a layer's matrix is (inputs, outputs), as GPT-2's are."""
    return type(layer).__name__ == "Conv1D"


def layer_shape(layer: Any) -> tuple[int, int]:
    """(inputs, outputs)."""
    rows, columns = layer.weight.shape
    return (rows, columns) if is_transposed(layer) else (columns, rows)


def wrong_widths(widths: set[int]) -> set[int]:
    """Those for which bitsandbytes' kernel for CPUs errs: rows of an odd multiple of 32 elements (0.50)."""
    return {width for width in widths if _is_wrong(width)}


def _is_wrong(width: int) -> bool:
    """Whether rows of so many elements come back from 4 bit otherwise than the same elements as one row do."""
    matrix = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    quantised = (
        bnb.functional.quantize_4bit(part, quant_type="nf4")
        for part in (matrix, matrix.view(1, -1))
    )
    rows, row = (bnb.functional.dequantize_4bit(*pair) for pair in quantised)
    return not torch.equal(rows.flatten(), row.flatten())


def compute_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    name = recipe.quantization.bnb_4bit_compute_dtype
    compute: torch.dtype = dtype if name == "auto" else getattr(torch, name)
    return compute


def quantize(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """What loading with a BitsAndBytesConfig does: every linear layer but the head as a Linear4bit."""
    settings = recipe.quantization
    # bitsandbytes keeps this table from its first use on, wherever it was made; on meta it would spoil a later loading.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    options = {
        "compress_statistics": settings.bnb_4bit_use_double_quant,
        "quant_type": settings.bnb_4bit_quant_type,
    }
    for name, layer in quantizable(model).items():
        weight = layer.weight.data.t().contiguous() if is_transposed(layer) else layer.weight.data
        packed, state = bnb.functional.quantize_4bit(weight, **options)
        compute, bias = compute_dtype(recipe, dtype), layer.bias
        linear = bnb.nn.Linear4bit(
            *layer_shape(layer), bias is not None, compute, **options, device=weight.device
        )
        linear.source_cls = type(layer)  # as transformers notes it
        linear.weight = bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            bnb_quantized=True,
            module=linear,
            **options,
        )
        if bias is not None:
            linear.bias = bias
        model.set_submodule(name, linear)


def misshapen(model: nn.Module) -> list[str]:
    """4-bit layers whose weights are not of the layer's shape, which transformers looks at in other layers only."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    return [
        f"{name}.weight"
        for name, layer in layers.items()  # in either orientation, for GPT-2 stores its matrices transposed
        if (state := getattr(layer.weight, "quant_state", None))
        is not None  # a missing weight has none
        and sorted(state.shape) != sorted((layer.in_features, layer.out_features))
    ]
