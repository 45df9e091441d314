"""Plan a merge from headers and configurations alone: which stored tensors an adapter changes, or why it cannot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from torch import nn

from orpo_lite.base.adapter import find_adapter
from orpo_lite.base.blocks import Rows, Stored, in_blocks, read_header, read_rows, stored_tensors
from orpo_lite.base.find import Base
from orpo_lite.errors import ModelError, Overrides
from orpo_lite.merging.deltas import Delta, Kind, Part, Product, Whole
from orpo_lite.merging.names import Origin, find_origins
from orpo_lite.model.adapter import BASE_LAYER, add_lora
from orpo_lite.model.load import bare_base
from orpo_lite.model.quantize import bypassed_layers, is_transposed, quantizable
from orpo_lite.recipe.schema import QuantizationSection, Recipe
from orpo_lite.runs.commands import Weights

PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
NAME = "default"  # peft's, of the only adapter


@dataclass(frozen=True)
class Plan:
    """What a merge does."""

    stored: Mapping[str, Stored]
    deltas: Mapping[str, Delta]
    """By the name of the stored tensor."""
    targets: int
    """Adapted layers."""
    quantised: frozenset[str]
    """Stored tensors that go through 4 bit first."""
    transposed: frozenset[str]
    """Matrices that are stored as (inputs, outputs), as GPT-2's are."""
    passed_over: tuple[str, ...]
    """Adapted layers whose adapter the model may pass over."""
    settings: QuantizationSection


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer of the base with an adapter, both without values."""

    name: str
    layer: Any
    parameter: str
    """The name of the parameter that the adapter changes."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name in the adapter's file, without ".weight", and shape of each of its parts."""


def check_mergeable(recipe: Recipe, base: Base) -> None:
    """Refuse, before weights load, an adapter that could not be merged in the end. Raises :class:`ModelError`."""
    name, fix = recipe.model.adapter_name_or_path, Overrides({"lora.target_modules": "all-linear"})
    if name:
        fix = Overrides({"model.adapter_name_or_path": None}, ", which trains a new adapter")
    try:
        plan = make_plan(
            base, find_adapter(name) if name else None, stored_tensors(base.path), recipe
        )
        if plan.passed_over:
            found = (
                f"{plan.passed_over[0]} is adapted, whose matrix the model's code reads by itself"
            )
            raise ModelError(
                where=f"model {base.name}",
                found=found,
                expected="an adapter of layers that the model calls",
            )
    except ModelError as error:
        error.fix = error.fix or fix
        raise


def make_plan(
    base: Base,
    adapter: Path | None,
    stored: Mapping[str, Stored],
    recipe: Recipe,
    weights: Weights = "original",
    left: Sequence[str] = (),
) -> Plan:
    """Which stored tensors of the base get what.

    Args:
        base: its configuration counts.
        adapter: its folder; None for the one that the recipe begins with, whose tensors are still to be made.
        stored: the base's tensors.
        recipe: of the training.
        weights: which ones the adapter is added to.
        left: layers that the training did not quantise.

    Raises:
        ModelError: an adapter that does not fit the base, or cannot be merged into its files.
    """
    plain = recipe.override({"quantization.load_in_4bit": False})
    model = bare_base(plain, base.config, torch.float32)
    origins, shapes = (
        find_origins(model, stored),
        {name: value.shape for name, value in model.state_dict().items()},
    )
    tied, quantised, read = _tied_parameters(model), quantizable(model), bypassed_layers(model)
    layers = list(_adapted_layers(add_lora(model, plain, adapter)))
    try:
        saved = _adapter_tensors(adapter, layers, origins, stored) if adapter else {}
        products = _products(layers, saved, tied)
        deltas = _deltas(products, origins, stored, shapes, model)
    except ModelError as error:
        error.where = error.where or (f"adapter {adapter}" if adapter else f"model {base.name}")
        raise
    transposed = {
        layer.parameter for layer in layers if is_transposed(layer.layer.get_base_layer())
    }
    through_4_bit = set[str]()
    if weights == "dequantized":
        through_4_bit = {f"{name}.weight" for name in quantised if name not in left}
        transposed |= {
            f"{name}.weight" for name, layer in quantised.items() if is_transposed(layer)
        }
    if converted := [
        name
        for name in sorted(through_4_bit | transposed)
        if name not in origins or not origins[name].same
    ]:
        raise ModelError(
            where=f"model {base.name}",
            found=f"{converted[0]} is stored with others in one tensor, and went through 4 bit by itself",
            expected="a merge onto the original weights",
        )
    return Plan(
        stored=stored,
        deltas=deltas,
        targets=len(layers),
        quantised=frozenset(str(origins[name].same) for name in through_4_bit),
        transposed=frozenset(str(origins[name].same) for name in transposed),
        passed_over=tuple(layer.name for layer in layers if layer.name in read),
        settings=recipe.quantization,
    )


def _tied_parameters(model: nn.Module) -> dict[str, str]:
    """Another name of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    return {
        name: next(other for other in group if other != name) for group in groups for name in group
    }


def _adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Every layer that peft has given an adapter."""
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = path.removeprefix("base_model.model.")
        while name.endswith(".base_layer"):  # experts with two adapted parameters
            name = name.removesuffix(".base_layer")
        tensors = {}
        for part in PARTS:
            held = getattr(layer, part)
            if NAME in held:
                value = held[NAME] if isinstance(held[NAME], nn.Parameter) else held[NAME].weight
                tensors[part.replace("_embedding", "")] = (f"{path}.{part}", tuple(value.shape))
        yield AdaptedLayer(
            name, layer, f"{name}.{getattr(layer, 'parameter_name', 'weight')}", tensors
        )


def _adapter_tensors(
    adapter: Path,
    layers: Sequence[AdaptedLayer],
    origins: Mapping[str, Origin],
    stored: Mapping[str, Stored],
) -> dict[str, Stored]:
    """The adapter's tensors by name: all of these layers and no others. Raises :class:`ModelError`."""
    saved, wrong = {}, []
    wanted = {name for layer in layers for name, _ in layer.tensors.values()}
    for tensor in read_header(adapter / "adapter_model.safetensors"):
        name = tensor.name.removesuffix(".weight")
        if name in wanted:
            saved[name] = tensor
        elif not tensor.name.endswith(BASE_LAYER):
            wrong.append(tensor.name)
        else:  # peft saves an adapted embedding itself too
            parameter = tensor.name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            own = stored.get(_stored_as(origins, parameter) or "")
            if own and not _equal(tensor, own):
                found = f"holds other numbers of {parameter} than this base"
                raise ModelError(found=found, expected="an adapter that was trained on this base")
    if wrong:
        raise ModelError(
            found=f"{len(wrong)} of its keys match nothing in the base ({wrong[0]} ...)",
            expected="LoRA's A and B of layers of this base",
        )
    lacking = [
        layer.name
        for layer in layers
        if any(name not in saved for name, _ in layer.tensors.values())
    ]
    if lacking:
        raise ModelError(
            found=f"lacks {len(lacking)} of the layers that it is for ({lacking[0]} ...)",
            expected="A and B of each",
        )
    for layer in layers:
        for part, (name, shape) in layer.tensors.items():
            held = saved[name].shape
            if part == "lora_A" and held[:1] != shape[:1] and held[1:] == shape[1:]:
                found = f"{layer.name} has rank {held[0]}, its adapter_config.json says {shape[0]}"
                raise ModelError(found=found, expected="the configuration that it was saved with")
            if held != shape and part != "lora_magnitude_vector":
                found = f"{layer.name}: {part} is {_by(held)}, this base's {_by(shape)}"
                raise ModelError(
                    found=found, expected="the shapes of the base that it was trained on"
                )
    return saved


def _equal(tensor: Stored, own: Stored) -> bool:
    """Whether two tensors hold the same numbers, in the first one's dtype."""
    if tensor.shape != own.shape:
        return False
    pairs = (
        (read_rows(rows), read_rows(Rows(own, rows.start, rows.stop))) for rows in in_blocks(tensor)
    )
    return all(torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in pairs)


def _stored_as(origins: Mapping[str, Origin], parameter: str) -> str | None:
    return origins[parameter].same if parameter in origins else None


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _products(
    layers: Sequence[AdaptedLayer], saved: Mapping[str, Stored], tied: Mapping[str, str]
) -> dict[str, Product]:
    """What is added to each parameter. Raises :class:`ModelError` for one that no merge can change by itself."""
    products: dict[str, Product] = {}
    for adapted in layers:
        if adapted.parameter in tied:
            other = tied[adapted.parameter].removesuffix(".weight")
            found = f"{adapted.name} is adapted and tied to {other}, which a merge would change too"
            raise ModelError(found=found, expected="an adapter of layers with weights of their own")
        layer, base_layer = adapted.layer, adapted.layer.get_base_layer()
        shape = tuple(
            layer.get_param().shape if isinstance(layer, ParamWrapper) else base_layer.weight.shape
        )
        magnitude = "lora_magnitude_vector" in adapted.tensors
        kind: Kind
        if isinstance(layer, ParamWrapper) and len(shape) == 3:
            kind = "experts" if layer._did_swap_in_out_features else "experts transposed"
        elif isinstance(layer, Embedding) and not magnitude:
            kind = "embedding"
        elif isinstance(layer, Linear | ParamWrapper) and len(shape) == 2:
            kind, shape = "matrix", shape[::-1] if is_transposed(base_layer) else shape
        else:
            what = f"{type(base_layer).__name__}{' with DoRA' if magnitude else ''}"
            found = f"{adapted.name} is adapted, of type {what}, which cannot be merged"
            raise ModelError(
                found=found, expected="an adapter of linear layers, embeddings or experts"
            )
        # Before there is an adapter on disk, a part is its name and shape.
        parts = {
            part: saved.get(name, Stored(name, Path(), torch.float32, size, 0))
            for part, (name, size) in adapted.tensors.items()
        }
        products[adapted.parameter] = Product(
            parameters=(adapted.parameter,),
            kind=kind,
            shape=shape,
            a=parts["lora_A"],
            b=parts["lora_B"],
            magnitude=parts.get("lora_magnitude_vector"),
            scale=float(layer.scaling[NAME]),
        )
    return products


def _deltas(
    products: Mapping[str, Product],
    origins: Mapping[str, Origin],
    stored: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    model: Any,
) -> dict[str, Delta]:
    """The deltas by stored tensor. Raises :class:`ModelError` for parameters that are not in the base's files."""
    if lost := [parameter for parameter in products if parameter not in origins]:
        found = f"{len(lost)} adapted parameters are not in the base's files ({', '.join(lost[:3])} ...)"
        expected = f"files that hold each of them; theirs begin with {min(stored)}"
        raise ModelError(
            found=found,
            expected=expected,
            fix="a config.json that describes them, or all of it again",
        )
    deltas: dict[str, Delta] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for parameter, product in products.items():
        origin = origins[parameter]
        if origin.same:
            deltas[origin.same], wanted[origin.same] = product, shapes[parameter]
            continue
        if product.magnitude:
            found = f"{parameter} is adapted with DoRA, and stored with others in one tensor"
            raise ModelError(
                found=found, expected="plain LoRA there", fix=Overrides({"lora.use_dora": False})
            )
        if any(name in deltas for names in origin.stored.values() for name in names):
            continue  # with another parameter of the same origin
        of_origin = {name: products[name] for name in origin.parameters if name in products}
        whole = Whole(origin, of_origin, {name: shapes[name] for name in origin.parameters}, model)
        empty = {name: torch.empty(shape, device="meta") for name, shape in whole.shapes.items()}
        for name, value in origin.to_stored(empty, model).items():
            deltas[name], wanted[name] = Part(name, whole), value.shape
    if other := next((name for name in deltas if stored[name].shape != tuple(wanted[name])), None):
        found = f"the base's {other} is {_by(stored[other].shape)}, by its config.json {_by(wanted[other])}"
        raise ModelError(
            found=found, expected="the shapes of its configuration", fix="download it again"
        )
    return deltas
