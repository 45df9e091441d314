"""What an adapter adds to which of the base's stored matrices; or why that cannot be said from the files alone."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orpo_lite.base.adapter import read_adapter_config
from orpo_lite.base.blocks import Stored, read_header, read_tensor
from orpo_lite.base.find import Base
from orpo_lite.errors import ModelError
from orpo_lite.model.load import bare_base
from orpo_lite.model.quantize import is_transposed, quantizable
from orpo_lite.recipe.schema import QuantizationSection, Recipe
from orpo_lite.runs.commands import Weights

KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|base_layer)(\.weight)?"
)
Added = Callable[[Tensor, int], Tensor]
"""Rows of a matrix, and the number of the first one, to the same rows with the adapter: float32, float64 as it is."""


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one matrix: ``scale * B @ A``; with a magnitude (DoRA) each row is rescaled to it."""

    a_RI: Stored
    b_OR: Stored
    magnitude_O: Stored | None
    scale: float
    transposed: bool
    """The matrix is stored as (I, O), as GPT-2's are."""

    def load(self) -> Added:
        """As peft merges: ``W + s B A`` (arXiv 2106.09685, Eq. 3), or ``m (W + s B A) / ||W + s B A||`` with the norm
        of each row (arXiv 2402.09353, Eq. 5). Raises :class:`ModelError` for an adapter with NaN or infinity."""
        a_RI, b_OR = _finite(self.a_RI), _finite(self.b_OR)
        magnitude_O = _finite(self.magnitude_O).flatten() if self.magnitude_O else None

        def added(block: Tensor, start: int) -> Tensor:
            sums = block.to(torch.float64 if block.dtype == torch.float64 else torch.float32, copy=True)
            rows = slice(start, start + len(block))
            left, right = (a_RI[:, rows].t(), b_OR.t()) if self.transposed else (b_OR[rows], a_RI)
            sums.addmm_(left.to(sums.dtype), right.to(sums.dtype), alpha=self.scale)
            if magnitude_O is not None:
                sums.mul_((magnitude_O[rows] / sums.norm(dim=1)).unsqueeze(1))
            return sums

        return added


def _finite(stored: Stored) -> Tensor:
    tensor = read_tensor(stored).float()
    if not tensor.isfinite().all():
        raise ModelError(
            where=str(stored.file), found=f"{stored.name} holds numbers that are none", expected="finite ones"
        )
    return tensor


@dataclass(frozen=True)
class Plan:
    """What a streamed merge does."""

    stored: Mapping[str, Stored]
    deltas: Mapping[str, Delta]
    """By the name of the stored tensor."""
    quantised: frozenset[str]
    """Stored tensors that go through 4 bit first."""
    settings: QuantizationSection


def make_plan(
    base: Base, adapter: Path, stored: Mapping[str, Stored], recipe: Recipe, weights: Weights, left: Sequence[str]
) -> Plan | str:
    """Which tensors get what; or why this base cannot be streamed.

    Raises:
        ModelError: keys of the adapter that match nothing, shapes that differ, a tied head.
    """
    config = read_adapter_config(adapter)
    plain = recipe.override({"quantization.load_in_4bit": False})
    if config.target_parameters:
        return "experts are adapted, which lie in one tensor in memory and not in the files"
    model = bare_base(plain, base.config, torch.float32)
    modules = dict(model.named_modules())
    parts = _adapter_parts(adapter, modules, config)
    prefix = _prefix(stored, [name for name, _ in model.named_parameters()])
    deltas: dict[str, Delta] = {}
    for name, part in parts.items():
        module = modules[name]
        transposed = is_transposed(module)
        if module is model.get_output_embeddings() and base.config.get_text_config().tie_word_embeddings:
            found = f"{name} is adapted and tied to the input embedding, which would change too"
            raise ModelError(where=f"adapter {adapter}", found=found, expected="an adapter of other layers")
        if not transposed and not isinstance(module, nn.Linear):
            return f"{name} is a {type(module).__name__}, and merged by peft"
        if prefix is None or (key := _moved(f"{name}.weight", prefix)) not in stored:
            return f"the base's files name their tensors otherwise ({name})"
        if transposed and "lora_magnitude_vector" in part:
            return f"{name} is stored transposed"
        shape = (part["lora_B"].shape[0], part["lora_A"].shape[1])
        rank = part["lora_A"].shape[0]
        if rank != (told := _of_layer(config.rank_pattern, name, config.r)):
            found = f"{name} has rank {rank}, its adapter_config.json says {told}"
            raise ModelError(
                where=f"adapter {adapter}", found=found, expected="the configuration that it was saved with"
            )
        ranks_differ = rank != part["lora_B"].shape[1]
        if stored[key].shape != (shape[::-1] if transposed else shape) or ranks_differ:
            found = f"{name} is {shape[0]}x{shape[1]}, the base's {stored[key].shape}"
            raise ModelError(
                where=f"adapter {adapter}", found=found, expected="the shapes of the base that it was trained on"
            )
        magnitude = part.get("lora_magnitude_vector")
        scale = _scale(config, name, rank)
        deltas[key] = Delta(part["lora_A"], part["lora_B"], magnitude, scale, transposed)
    quantised = frozenset[str]()
    if weights == "dequantized":
        layers = {name: layer for name, layer in quantizable(model).items() if name not in left}
        if stored_otherwise := next((name for name, layer in layers.items() if is_transposed(layer)), None):
            return f"{stored_otherwise} is stored transposed"
        quantised = frozenset(_moved(f"{name}.weight", prefix or ("", "")) for name in layers)
        if not quantised <= stored.keys():
            return "the base's files name their tensors otherwise"
    return Plan(stored, deltas, quantised, recipe.quantization)


def _adapter_parts(adapter: Path, modules: Mapping[str, nn.Module], config: Any) -> dict[str, dict[str, Stored]]:
    """The adapter's tensors by module and part. Raises :class:`ModelError` for keys that match nothing."""
    parts: dict[str, dict[str, Stored]] = {}
    wrong = []
    file = adapter / "adapter_model.safetensors"
    for stored in read_header(file):
        key = stored.name
        match = KEY.fullmatch(key)
        if match and match["module"] in modules:
            parts.setdefault(match["module"], {})[match["part"]] = stored
        else:
            wrong.append(key)
    wrong += [name for name, part in parts.items() if not {"lora_A", "lora_B"} <= part.keys()]
    if lacking := sorted(_targets(config, modules) - parts.keys()):
        raise ModelError(
            where=f"adapter {adapter}",
            found=f"lacks {len(lacking)} of the layers that it is for ({lacking[0]} ...)",
            expected="A and B of each",
        )
    if wrong:
        raise matches_nothing(adapter, wrong)
    return parts


def _targets(config: Any, modules: Mapping[str, nn.Module]) -> set[str]:
    """The linear layers that a configuration names, as peft finds them; none where it is for a part of them only."""
    named = config.target_modules
    if not isinstance(named, set | list) or config.layers_to_transform is not None:
        return set()

    def is_of(name: str, words: Iterable[str]) -> bool:
        return any(name == word or name.endswith(f".{word}") for word in words)

    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    return {name for name in linear if is_of(name, named) and not is_of(name, config.exclude_modules or ())}


def matches_nothing(adapter: Path, keys: Sequence[str]) -> ModelError:
    return ModelError(
        where=f"adapter {adapter}",
        found=f"{len(keys)} of its keys match nothing in the base ({keys[0]} ...)",
        expected="LoRA's A and B of layers of this base",
    )


def _prefix(stored: Mapping[str, Stored], names: list[str]) -> tuple[str, str] | None:
    """(what parameters' names begin with, what stored names have in its place); None where they differ otherwise.

    Some hub files leave the base model's prefix out, as GPT-2's "transformer." and OPT's "model.".
    """
    known = [name for name in names if name in stored]
    if known:
        return "", ""
    first = {name.split(".")[0] for name in names if "lm_head" not in name}
    if len(first) == 1:
        prefix = f"{first.pop()}."
        if all(name.removeprefix(prefix) in stored for name in names if name.startswith(prefix)):
            return prefix, ""
    return None


def _moved(name: str, prefix: tuple[str, str]) -> str:
    return prefix[1] + name.removeprefix(prefix[0]) if name.startswith(prefix[0]) else name


def _scale(config: Any, module: str, rank: int) -> float:
    """peft's factor of a layer: lora_alpha over r, or over its root (rsLoRA, arXiv 2312.03732), with its patterns."""
    alpha = float(_of_layer(config.alpha_pattern, module, config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _of_layer(pattern: Mapping[str, Any], module: str, usual: Any) -> Any:
    """What a pattern of peft's gives a layer."""
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(pattern.keys(), module), usual)
