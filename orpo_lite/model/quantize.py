"""Choose the layers that go into 4 bit, and quantise them.

transformers quantises a base while it loads it. This module does the same for bases without
weights.
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
    """Return transformers' ``llm_int8_skip_modules``: layers that cannot be in 4 bit, and heads.

    The layers are those of :func:`bypassed_layers`, and on a CPU those of :func:`wrong_widths`.
    Without any of them the list is empty.
    """
    if not recipe.quantization.load_in_4bit:
        return []
    with META:
        model = AutoModelForCausalLM.from_config(config)
    widths = {name: layer_shape(layer)[0] for name, layer in quantizable(model).items()}
    wrong = wrong_widths(set(widths.values())) if device.type == "cpu" else set()
    names = [*bypassed_layers(model), *(name for name, width in widths.items() if width in wrong)]
    if not names:
        return []
    return [*names, *(name for name in get_keys_to_not_convert(model) if name not in names)]


def quantizable(model: Any) -> dict[str, Any]:
    """Return the layers that transformers puts into 4 bit, by name.

    These are plain linear layers and GPT-2's Conv1D, without the head and without those of
    :func:`bypassed_layers`, which transformers is told to skip.
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
    """Return the names of linear layers whose weight the model's own code reads directly.

    Gemma 3n clamps such a weight in place, and Mamba's kernels multiply by it. A weight in 4 bit
    holds other numbers, and an adapter on the layer has no effect.
    """
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear) and child in _read_weights(module.__class__)
    ]


# Reads of its dtype or shape do not count, nor Bloom's slices of it, which are for checkpoints
# split over processes.
WEIGHT_READ = r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)|\[)"


@cache
def _read_weights(kind: type) -> frozenset[str]:
    """Return the layers whose weight the methods of a class read, including its base classes."""
    return frozenset(re.findall(WEIGHT_READ, "".join(map(_source, kind.__mro__))))


def _source(kind: type) -> str:
    """Return the source of a model class's own methods; "" for classes of torch."""
    if not kind.__module__.startswith("transformers.models."):
        return ""
    methods = [
        inspect.unwrap(method) for method in vars(kind).values() if inspect.isfunction(method)
    ]
    return "".join(inspect.getsource(method) for method in methods)


def is_transposed(layer: Any) -> bool:
    """Return whether a layer's matrix is (inputs, outputs), as in GPT-2."""
    return type(layer).__name__ == "Conv1D"


def layer_shape(layer: Any) -> tuple[int, int]:
    """Return (inputs, outputs)."""
    rows, columns = layer.weight.shape
    return (rows, columns) if is_transposed(layer) else (columns, rows)


def wrong_widths(widths: set[int]) -> set[int]:
    """Return the widths for which bitsandbytes' CPU kernel gives wrong numbers.

    These are odd multiples of 32 elements (bitsandbytes 0.50).
    """
    return {width for width in widths if _is_wrong(width)}


def _is_wrong(width: int) -> bool:
    """Return whether rows of this width come back from 4 bit with other numbers than one row."""
    matrix = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    quantised = (
        bnb.functional.quantize_4bit(part, quant_type="nf4")
        for part in (matrix, matrix.view(1, -1))
    )
    rows, row = (bnb.functional.dequantize_4bit(*pair) for pair in quantised)
    return not torch.equal(rows.flatten(), row.flatten())


def compute_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which 4-bit layers compute; ``auto`` is ``dtype``."""
    name = recipe.quantization.bnb_4bit_compute_dtype
    compute: torch.dtype = dtype if name == "auto" else getattr(torch, name)
    return compute


def quantize(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """Replace every linear layer except the head by a Linear4bit, as BitsAndBytesConfig does."""
    settings = recipe.quantization
    # bitsandbytes keeps this table from its first use on, on any device. One made on meta would
    # break a later loading.
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
    """Return the weights of 4-bit layers that do not have the layer's shape.

    transformers checks the shapes of other layers only.
    """
    names = []
    for name, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        state = getattr(layer.weight, "quant_state", None)
        if state is None:  # a missing weight
            continue
        # In either orientation: GPT-2 stores its matrices transposed.
        if sorted(state.shape) != sorted((layer.in_features, layer.out_features)):
            names.append(f"{name}.weight")
    return names
