"""Plan a merge: find the stored tensors that change, or the reason why a merge is not possible.

Only configurations and the headers of weight files are read, with one exception. If the adapter
contains a copy of the base's embedding, the copy and the base's own embedding are compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from torch import nn

from orpo_lite.base.adapter import REWARD, SEQ_CLS, find_adapter, read_adapter_config
from orpo_lite.base.blocks import Rows, Stored, in_blocks, read_header, read_rows, stored_tensors
from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.base.find import Base
from orpo_lite.errors import ModelError, Overrides
from orpo_lite.merging.deltas import ConvertedDelta, ConvertedGroup, Delta, Layout, LoraDelta
from orpo_lite.merging.names import Origin, find_origins
from orpo_lite.model.adapter import BASE_LAYER, add_lora
from orpo_lite.model.load import bare_base
from orpo_lite.model.quantize import bypassed_layers, is_transposed, quantizable
from orpo_lite.model.score_head import SCORE, SCORE_TENSOR, output_head_names
from orpo_lite.recipe.schema import QuantizationSection, Recipe
from orpo_lite.runs.commands import Weights

PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
ADAPTER_NAME = "default"  # peft's name for an adapter that got no name


@dataclass(frozen=True)
class Plan:
    """The tensors of a merged model, and what the merge does with each of them."""

    stored: Mapping[str, Stored]
    """All tensors of the base, by name. A reward model has the adapter's score head in place of the
    base's output head."""
    deltas: Mapping[str, Delta]
    """Name of the stored tensor -> its delta."""
    targets: int
    """Number of adapted layers."""
    quantised: frozenset[str]
    """Stored tensors that are quantised to 4 bit and dequantised again before the merge."""
    transposed: frozenset[str]
    """Matrices that are stored as (inputs, outputs), as in GPT-2."""
    bypassed: tuple[str, ...]
    """Adapted layers whose weights the model's code reads directly, so the adapter is ignored."""
    settings: QuantizationSection


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer of the base, with its adapter. Layer and adapter are on the meta device."""

    name: str
    layer: Any
    parameter: str
    """The name of the parameter that the adapter changes."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Part of the adapter -> (name in the file without ".weight", shape)."""


def check_mergeable(recipe: Recipe, base: Base) -> None:
    """Raise ModelError before a training if an adapter does not fit the base.

    The adapters are the one to train, which must be mergeable later, and those of the reference
    model and of the reward model if there are any.
    """
    name = recipe.model.adapter_name_or_path
    fix = Overrides({"lora.target_modules": "all-linear"})
    if name:
        fix = Overrides({"model.adapter_name_or_path": None}, ", which trains a new adapter")
    _check_adapter(recipe, base, name, fix)
    if reference := recipe.loss.reference_adapter:
        fix = Overrides({"loss.reference_adapter_name_or_path": None}, ", or an adapter that fits")
        _check_adapter(recipe, base, reference, fix)
    if reward := recipe.loss.reward_adapter_name_or_path:
        folder = find_adapter(reward, REWARD)
        if read_adapter_config(folder).task_type != SEQ_CLS:
            raise ModelError(
                where=f"{REWARD}: {reward}",
                found="is not the adapter of a reward model",
                expected="an adapter that a training with loss.type=reward made",
            )
        fix = Overrides({REWARD: "RUN/adapter"}, ", where RUN trained a reward model on this base")
        _check_adapter(recipe.override({"loss.type": "reward"}), base, reward, fix)


def _check_adapter(recipe: Recipe, base: Base, name: str | None, fix: Overrides) -> None:
    try:
        plan = make_plan(
            base, find_adapter(name) if name else None, stored_tensors(base.path), recipe
        )
        if plan.bypassed:
            raise ModelError(
                where=f"model {base.name}",
                found=f"{plan.bypassed[0]} is adapted, but the model's code reads the weight of "
                "this layer directly, so the adapter has no effect",
                expected="an adapter only on layers that the model's code calls",
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
    not_quantised: Sequence[str] = (),
) -> Plan:
    """Return a plan: the stored tensors of the base that a merge changes, each with its delta.

    Args:
        base: the base; only its configuration is used.
        adapter: the adapter's folder. None: the adapter does not exist yet, and the layers that it
            will adapt are read from the recipe.
        stored: the stored tensors of the base, by name.
        recipe: the recipe of the training.
        weights: the weights that the adapter is added to: see Weights in runs/commands.py.
        not_quantised: names of linear layers that the training left unquantised.

    Raises:
        ModelError: the adapter does not fit the base, or cannot be merged into its files.
    """
    plain = recipe.override({"quantization.load_in_4bit": False})
    model = bare_base(plain, base.config, torch.float32)
    head = output_head_names(model)
    origins = find_origins(model, stored)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tied, quantised, bypassed = _tied_parameters(model), quantizable(model), bypassed_layers(model)
    layers = list(_adapted_layers(add_lora(model, plain, adapter)))
    try:
        saved = _adapter_tensors(adapter, layers, origins, stored) if adapter else {}
        if recipe.loss.trains_reward_model:
            _refuse_adapted_head(layers, head)
            if adapter and read_adapter_config(adapter).task_type == SEQ_CLS:
                stored = _with_score_head(stored, saved, head, origins)
        by_parameter = _parameter_deltas(layers, saved, tied)
        deltas = _stored_deltas(by_parameter, origins, stored, shapes, model)
    except ModelError as error:
        error.where = error.where or (f"adapter {adapter}" if adapter else f"model {base.name}")
        raise
    transposed = {
        layer.parameter for layer in layers if is_transposed(layer.layer.get_base_layer())
    }
    through_4_bit = set[str]()
    if weights == "dequantized":
        through_4_bit = {f"{name}.weight" for name in quantised if name not in not_quantised}
        transposed |= {
            f"{name}.weight" for name, layer in quantised.items() if is_transposed(layer)
        }
    unchanged = {name: origin.unchanged for name, origin in origins.items()}
    for name in sorted(through_4_bit | transposed):
        if unchanged.get(name) is None:
            raise ModelError(
                where=f"model {base.name}",
                found=f"{name} was quantised separately, but the base's files store it in one "
                "tensor with other weights",
                expected="a merge onto the original weights (--base original)",
            )
    return Plan(
        stored=stored,
        deltas=deltas,
        targets=len(layers),
        quantised=frozenset(str(unchanged[name]) for name in through_4_bit),
        transposed=frozenset(str(unchanged[name]) for name in transposed),
        bypassed=tuple(layer.name for layer in layers if layer.name in bypassed),
        settings=recipe.quantization,
    )


def _refuse_adapted_head(layers: Sequence[AdaptedLayer], head: Sequence[str]) -> None:
    """Raise ModelError if the adapter of a reward model changes the output head."""
    for layer in layers:
        if layer.parameter in head:
            raise ModelError(
                found=f"{layer.name} is adapted, but a reward model does not use its output head",
                expected="an adapter on other layers",
            )


def _with_score_head(
    stored: Mapping[str, Stored],
    saved: Mapping[str, Stored],
    head: Sequence[str],
    origins: Mapping[str, Origin],
) -> dict[str, Stored]:
    """Return the stored tensors with the adapter's score head in place of the output head."""
    score = saved.get(SCORE_TENSOR.removesuffix(".weight"))
    if score is None:
        raise ModelError(
            found=f"has no {SCORE_TENSOR}, which is its score head",
            expected="the score head that the training saved with it",
        )
    unused = {origins[name].unchanged for name in head if name in origins}
    kept = {name: tensor for name, tensor in stored.items() if name not in unused}
    name = f"{SCORE}.weight"
    return kept | {name: replace(score, name=name)}


def _tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return name -> another name of the same parameter, for each parameter with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    for first, *others in names.values():
        if others:
            tied |= {first: others[0], **dict.fromkeys(others, first)}
    return tied


def _adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Yield every layer that has an adapter."""
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = path.removeprefix("base_model.model.")
        while name.endswith(".base_layer"):  # experts with two adapted parameters have two
            name = name.removesuffix(".base_layer")
        tensors = {}
        for part in PARTS:
            adapters = getattr(layer, part)
            if ADAPTER_NAME in adapters:
                module = adapters[ADAPTER_NAME]
                value = module if isinstance(module, nn.Parameter) else module.weight
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
    """Return name -> tensor of the adapter. Exactly the tensors that ``layers`` need must exist.

    Raises:
        ModelError: a tensor is missing, unknown, has a wrong shape, or comes from another base.
    """
    saved, wrong = {}, []
    wanted = {name for layer in layers for name, _ in layer.tensors.values()}
    for tensor in read_header(adapter / ADAPTER_WEIGHTS):
        name = tensor.name.removesuffix(".weight")
        if name in wanted or tensor.name == SCORE_TENSOR:
            saved[name] = tensor
        elif not tensor.name.endswith(BASE_LAYER):
            wrong.append(tensor.name)
        else:  # of an adapted embedding, peft also saves the base's own weights
            parameter = tensor.name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            name_of_own = origins[parameter].unchanged if parameter in origins else None
            own = stored.get(name_of_own or "")
            if own and not _equal(tensor, own):
                found = f"its copy of {parameter} differs from this base"
                raise ModelError(found=found, expected="an adapter that was trained on this base")
    if wrong:
        raise ModelError(
            found=f"{len(wrong)} of its tensors match nothing in the base ({wrong[0]} ...)",
            expected="only LoRA matrices A and B of layers that this base has",
        )
    lacking = [
        layer.name
        for layer in layers
        if any(name not in saved for name, _ in layer.tensors.values())
    ]
    if lacking:
        raise ModelError(
            found=f"lacks {len(lacking)} of the layers that its configuration selects "
            f"({lacking[0]} ...)",
            expected="LoRA matrices A and B for each selected layer",
        )
    for layer in layers:
        for part, (name, shape) in layer.tensors.items():
            found_shape = saved[name].shape
            has_other_rank = found_shape[:1] != shape[:1] and found_shape[1:] == shape[1:]
            if part == "lora_A" and has_other_rank:
                found = f"{layer.name} has rank {found_shape[0]}, "
                found += f"but its adapter_config.json says {shape[0]}"
                raise ModelError(
                    found=found, expected="the configuration that the adapter was saved with"
                )
            if found_shape != shape and part != "lora_magnitude_vector":
                found = f"{part} of {layer.name} has the shape {_by(found_shape)}, "
                found += f"but this base needs {_by(shape)}"
                raise ModelError(found=found, expected="an adapter that was trained on this base")
    return saved


def _equal(tensor: Stored, own: Stored) -> bool:
    """Return whether ``own`` has the same numbers once it has the dtype of ``tensor``."""
    if tensor.shape != own.shape:
        return False
    for rows in in_blocks(tensor):
        block, own_block = read_rows(rows), read_rows(Rows(own, rows.start, rows.stop))
        if not torch.equal(block, own_block.to(block.dtype)):
            return False
    return True


def _by(shape: Sequence[int]) -> str:
    """Return a shape as text: (2, 3) -> 2x3."""
    return "x".join(map(str, shape))


def _parameter_deltas(
    layers: Sequence[AdaptedLayer], saved: Mapping[str, Stored], tied: Mapping[str, str]
) -> dict[str, LoraDelta]:
    """Return parameter name -> delta, for each adapted parameter.

    Raises:
        ModelError: a parameter cannot be merged, or it is tied to another parameter.
    """
    deltas: dict[str, LoraDelta] = {}
    for adapted in layers:
        if adapted.parameter in tied:
            other = tied[adapted.parameter].removesuffix(".weight")
            found = f"{adapted.name} is adapted and tied to {other}: a merge would change both"
            raise ModelError(
                found=found, expected="an adapter only on layers whose weights are not tied"
            )
        layer, base_layer = adapted.layer, adapted.layer.get_base_layer()
        shape = tuple(
            layer.get_param().shape if isinstance(layer, ParamWrapper) else base_layer.weight.shape
        )
        magnitude = "lora_magnitude_vector" in adapted.tensors
        layout: Layout
        if isinstance(layer, ParamWrapper) and len(shape) == 3:
            layout = "experts" if layer._did_swap_in_out_features else "experts transposed"
        elif isinstance(layer, Embedding) and not magnitude:
            layout = "embedding"
        elif isinstance(layer, Linear | ParamWrapper) and len(shape) == 2:
            layout = "matrix"
            if is_transposed(base_layer):
                shape = shape[::-1]
        else:
            type_name = f"{type(base_layer).__name__}{' with DoRA' if magnitude else ''}"
            found = f"{adapted.name} is adapted, but its type, {type_name}, cannot be merged"
            raise ModelError(
                found=found, expected="an adapter only on linear layers, embeddings or experts"
            )
        # Before the training, a part of the adapter has only a name and a shape.
        parts = {
            part: saved.get(name, Stored(name, Path(), torch.float32, size, 0))
            for part, (name, size) in adapted.tensors.items()
        }
        deltas[adapted.parameter] = LoraDelta(
            parameters=(adapted.parameter,),
            layout=layout,
            shape=shape,
            a=parts["lora_A"],
            b=parts["lora_B"],
            magnitude=parts.get("lora_magnitude_vector"),
            scale=float(layer.scaling[ADAPTER_NAME]),
        )
    return deltas


def _stored_deltas(
    by_parameter: Mapping[str, LoraDelta],
    origins: Mapping[str, Origin],
    stored: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    model: Any,
) -> dict[str, Delta]:
    """Return name of stored tensor -> delta, for each stored tensor that changes.

    Raises:
        ModelError: an adapted parameter is not in the base's files, or its shape in them is wrong.
    """
    if lost := [parameter for parameter in by_parameter if parameter not in origins]:
        raise ModelError(
            found=f"the base's files lack {len(lost)} of the adapted parameters "
            f"({', '.join(lost[:3])} ...)",
            expected=f"all adapted parameters; the files hold names such as {min(stored)}",
            fix="correct config.json so that it describes these files, or download the base again",
        )
    deltas: dict[str, Delta] = {}
    expected_shapes: dict[str, tuple[int, ...]] = {}
    for parameter, delta in by_parameter.items():
        origin = origins[parameter]
        if origin.unchanged:
            deltas[origin.unchanged] = delta
            expected_shapes[origin.unchanged] = shapes[parameter]
            continue
        if delta.magnitude:
            found = f"{parameter} has DoRA, but shares a stored tensor with other parameters"
            raise ModelError(
                found=found,
                expected="LoRA without DoRA on this parameter",
                fix=Overrides({"lora.use_dora": False}),
            )
        if any(name in deltas for names in origin.stored.values() for name in names):
            continue  # already added for another parameter of the same origin
        group = ConvertedGroup(
            origin=origin,
            deltas={name: by_parameter[name] for name in origin.parameters if name in by_parameter},
            shapes={name: shapes[name] for name in origin.parameters},
            model=model,
        )
        empty = {name: torch.empty(shape, device="meta") for name, shape in group.shapes.items()}
        for name, value in origin.to_stored(empty, model).items():
            deltas[name] = ConvertedDelta(name, group)
            expected_shapes[name] = value.shape
    for name in deltas:
        if stored[name].shape != tuple(expected_shapes[name]):
            raise ModelError(
                found=f"the base's {name} has the shape {_by(stored[name].shape)}, "
                f"but config.json requires {_by(expected_shapes[name])}",
                expected="weight files that match config.json",
                fix="download the base again",
            )
    return deltas
