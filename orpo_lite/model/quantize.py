"""Choose the layers to quantise to 4 bit, and quantise them.

transformers quantises a base while it loads the weights. This module also quantises a base that is
built from its configuration alone.
"""

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import get_keys_to_not_convert

from orpo_lite.ops.devices import META
from orpo_lite.recipe.schema import Recipe


def skipped_modules(recipe: Recipe, config: Any, device: torch.device) -> list[str]:
    """Return the names of layers that transformers must not quantise (``llm_int8_skip_modules``).

    - The layers of :func:`bypassed_layers`.
    - On a CPU: the layers whose width is in :func:`wrong_widths`.
    - The output head, but only if the two rules above give at least one layer.

    If the two rules give no layer, the result is []. Then transformers skips the head by default.
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
    """Return name -> layer for the layers that transformers quantises to 4 bit.

    These are the plain linear layers and GPT-2's Conv1D layers, except the head and the layers of
    :func:`bypassed_layers`.
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

    For instance, Gemma 3n clamps such a weight in place, and Mamba's kernels multiply by such a
    weight. This code would read wrong numbers from a 4-bit weight. An adapter on such a layer has
    no effect.
    """
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear) and child in _read_weights(module.__class__)
    ]


# Code that reads only the dtype, device or shape of a weight is not matched. Slices of a weight are
# not matched either: Bloom uses them only for checkpoints that are split over processes.
WEIGHT_READ = r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)|\[)"


@cache
def _read_weights(kind: type) -> frozenset[str]:
    """Return the names of layers whose weight is read by methods of a class or its base classes."""
    return frozenset(re.findall(WEIGHT_READ, "".join(map(_source, kind.__mro__))))


def _source(kind: type) -> str:
    """Return the source code of a class's methods; "" for a class outside transformers' models."""
    if not kind.__module__.startswith("transformers.models."):
        return ""
    methods = [
        inspect.unwrap(method) for method in vars(kind).values() if inspect.isfunction(method)
    ]
    return "".join(inspect.getsource(method) for method in methods)


def is_transposed(layer: Any) -> bool:
    """Return whether the shape of a layer's matrix is (inputs, outputs), as in GPT-2."""
    return type(layer).__name__ == "Conv1D"


def layer_shape(layer: Any) -> tuple[int, int]:
    """Return (number of inputs, number of outputs) of a linear or Conv1D layer."""
    rows, columns = layer.weight.shape
    return (rows, columns) if is_transposed(layer) else (columns, rows)


def wrong_widths(widths: set[int]) -> set[int]:
    """Return the row widths for which bitsandbytes' CPU kernel gives wrong numbers.

    In bitsandbytes 0.50 these are the odd multiples of 32 elements.
    """
    return {width for width in widths if _is_wrong(width)}


def _is_wrong(width: int) -> bool:
    """Return whether 4-bit rows of this width dequantise to other numbers than one long row."""
    matrix = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    quantised = (
        bnb.functional.quantize_4bit(part, quant_type="nf4")
        for part in (matrix, matrix.view(1, -1))
    )
    rows, row = (bnb.functional.dequantize_4bit(*pair) for pair in quantised)
    return not torch.equal(rows.flatten(), row.flatten())


def compute_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which 4-bit layers compute.

    This is ``quantization.bnb_4bit_compute_dtype``, or ``dtype`` if the setting is ``auto``.
    """
    name = recipe.quantization.bnb_4bit_compute_dtype
    compute: torch.dtype = dtype if name == "auto" else getattr(torch, name)
    return compute


def quantize(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """Replace the layers of :func:`quantizable` by Linear4bit layers, as transformers does."""
    # bitsandbytes creates this table at its first use and keeps it. If it were created on meta, a
    # model could not be loaded later.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    for name, layer in quantizable(model).items():
        linear = empty_linear4bit(layer, recipe, dtype)
        set_quantised(linear, layer.weight.data)
        model.set_submodule(name, linear)


def empty_linear4bit(layer: Any, recipe: Recipe, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """Return a Linear4bit for a linear or Conv1D layer, with its bias and without its weight.

    The weight has the shape of the packed weight, but only one byte of memory.
    """
    settings = recipe.quantization
    inputs, outputs = layer_shape(layer)
    options = {
        "compress_statistics": settings.bnb_4bit_use_double_quant,
        "quant_type": settings.bnb_4bit_quant_type,
    }
    linear = bnb.nn.Linear4bit(
        inputs,
        outputs,
        layer.bias is not None,
        compute_dtype(recipe, dtype),
        **options,
        device=META,
    )
    linear.source_cls = type(layer)  # transformers sets this attribute too
    if layer.bias is not None:
        linear.bias = layer.bias
    byte = torch.zeros((), dtype=torch.uint8, device=layer.weight.device)
    state = bnb.functional.QuantState(byte, torch.Size((outputs, inputs)), dtype=dtype)
    _set_packed(linear, byte.expand(-(-inputs * outputs // 2), 1), state, options)
    return linear


def set_quantised(linear: bnb.nn.Linear4bit, weight: Tensor) -> None:
    """Quantise a matrix and set it as the weight of a layer of :func:`empty_linear4bit`.

    ``weight`` is the matrix as the layer that ``linear`` replaces holds it.
    """
    before = linear.weight
    options = {"compress_statistics": before.compress_statistics, "quant_type": before.quant_type}
    matrix = weight if linear.source_cls is nn.Linear else weight.t().contiguous()
    packed, state = bnb.functional.quantize_4bit(matrix, **options)
    _set_packed(linear, packed, state, options)


def _set_packed(
    linear: bnb.nn.Linear4bit, packed: Tensor, state: Any, options: Mapping[str, Any]
) -> None:
    linear.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        bnb_quantized=True,
        module=linear,
        **options,
    )
    linear.quant_state = state


def misshapen(model: nn.Module) -> list[str]:
    """Return the names of 4-bit weights whose shape does not fit their layer.

    transformers checks only the shapes of weights that are not 4-bit.
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
