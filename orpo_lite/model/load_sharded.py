"""Load a base layer by layer, and divide each layer among processes before the next one is read.

No process ever holds the whole base. All processes read all files, and compare what they have read,
because processes with different bases would mix their layers without an error.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lite.base.blocks import Stored, read_tensor, stored_tensors
from orpo_lite.base.find import Base
from orpo_lite.errors import ModelError, Overrides
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes, empty_weights
from orpo_lite.model.quantize import (
    empty_linear4bit,
    quantizable,
    set_quantised,
    skipped_modules,
)
from orpo_lite.model.sharding import divide_layer, divide_root
from orpo_lite.recipe.schema import Recipe


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file belongs."""

    module: nn.Module
    attribute: str
    stored: Stored

    def read(self, device: torch.device, digest: Any) -> None:
        """Read the tensor, quantise it if its layer is in 4 bit, and set it in its module.

        ``digest``: a hash to which the bytes of the file are added.
        """
        values = read_tensor(self.stored)
        digest.update(values.flatten().view(torch.uint8).numpy())
        before: Any = getattr(self.module, self.attribute)
        if hasattr(self.module, "source_cls") and self.attribute == "weight":
            dtype = before.quant_state.dtype
            set_quantised(self.module, values.to(device=device, dtype=dtype))
            return
        values = values.to(device=device, dtype=before.dtype)
        if isinstance(before, nn.Parameter):
            setattr(self.module, self.attribute, nn.Parameter(values, requires_grad=False))
        else:
            setattr(self.module, self.attribute, values)


class LayerFiles:
    """The tensors of a base that are still in its files, by decoder layer."""

    def __init__(self, layers: Iterable[tuple[nn.Module, list[Place]]], base: Base) -> None:
        self._layers, self._base = [*layers], base

    def load(self, mesh: DeviceMesh, processes: Processes) -> None:
        """Read each decoder layer, compare it with that of the other processes, and divide it."""
        for layer, places in self._layers:
            read_places(places, self._base, processes)
            divide_layer(layer, mesh)


def read_places(places: Iterable[Place], base: Base, processes: Processes) -> None:
    """Read tensors into their modules. Raise ModelError if the processes read different bytes."""
    digest = hashlib.blake2b(digest_size=7)
    names = []
    for place in sorted(places, key=lambda place: (str(place.stored.file), place.stored.start)):
        place.read(processes.device, digest)
        names.append(place.stored.name)
    if not processes.all_equal(int.from_bytes(digest.digest())):
        raise ModelError(
            where=f"model {base.name}",
            found=f"the processes read different weights ({names[0]} ...)",
            expected="the same files on each machine",
            fix="copy the model from one machine to the others, or set model.model_revision to a "
            "commit",
        )


def load_outer(
    recipe: Recipe, base: Base, dtype: torch.dtype, processes: Processes
) -> tuple[nn.Module, LayerFiles]:
    """Return a base whose decoder layers are still empty, and the files of these layers.

    The tensors outside of the decoder layers are loaded. The weights of the decoder layers have
    their shapes and dtypes, but no memory.

    Raises:
        ModelError: the files lack a tensor, or the model cannot be loaded layer by layer.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    with empty_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(base.config), **options)
    model.generation_config = GenerationConfig()
    _refuse_converted(model, base)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(processes.device)
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.zeros((), dtype=parameter.dtype, device=processes.device)
            values = nn.Parameter(empty.expand(parameter.shape), requires_grad=False)
            setattr(module, name, values)
    model.tie_weights()
    if recipe.quantization.load_in_4bit:
        skipped = set(skipped_modules(recipe, base.config, processes.device))
        for name, layer in quantizable(model).items():
            if name not in skipped:
                model.set_submodule(name, empty_linear4bit(layer, recipe, dtype))
    places = _find_places(model, base)
    inner = []
    for layer in model.get_decoder().modules():
        if isinstance(layer, GradientCheckpointingLayer):
            modules = {*layer.modules()}
            own = [name for name, place in places.items() if place.module in modules]
            inner.append((layer, [places.pop(name) for name in own]))
    read_places(places.values(), base, processes)
    model.tie_weights()
    return model.eval(), LayerFiles(inner, base)


def _find_places(model: Any, base: Base) -> dict[str, Place]:
    """Return name -> :class:`Place` for each tensor that the model's files must hold."""
    stored = stored_tensors(base.path)
    tied = {*(getattr(model, "all_tied_weights_keys", None) or ())}
    places, wrong = {}, []
    for name, shape in _expected(model).items():
        if name in tied and name not in stored:
            continue
        if name not in stored or stored[name].shape != shape:
            wrong.append(name)
            continue
        path, _, attribute = name.rpartition(".")
        places[name] = Place(model.get_submodule(path), attribute, stored[name])
    if wrong:
        raise ModelError(
            where=f"model {base.name}",
            found="number of weights that are missing or have a wrong shape: "
            f"{len(wrong)} ({', '.join(sorted(wrong)[:3])} ...)",
            expected="all weights that the model needs",
        )
    return places


def _expected(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Return name -> shape of each parameter and persistent buffer, as the files have them."""
    found = {}
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            shape = tuple(tensor.shape)
            if hasattr(module, "source_cls") and name == "weight":
                shape = tuple(tensor.quant_state.shape)
                shape = shape if module.source_cls is nn.Linear else shape[::-1]
            found[f"{path}.{name}" if path else name] = shape
    return found


def converts_weights(model: Any) -> bool:
    """Return whether transformers changes the tensors of this family while it loads them.

    :func:`load_outer` cannot read such a family.
    """
    kept = getattr(model, "_keep_in_fp32_modules", None)
    return bool(get_model_conversion_mapping(model, add_legacy=False) or kept)


def _refuse_converted(model: Any, base: Base) -> None:
    if converts_weights(model):
        raise ModelError(
            where="memory.shard",
            found=f"transformers converts the weights of {base.config.model_type} while it loads "
            "them, so orpo-lite cannot read them layer by layer",
            expected="a family whose weights are stored as they are used, such as llama",
            fix=Overrides({"memory.shard": "off"}),
        )


def shard_base(model: PairModel, files: LayerFiles, mesh: DeviceMesh, processes: Processes) -> None:
    """Read and divide the decoder layers of a model whose base is from :func:`load_outer`."""
    files.load(mesh, processes)
    divide_root(model, mesh)
