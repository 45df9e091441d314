"""A LoRA adapter on disk: found, fetched, checked."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orpo_lite.base.download import ADAPTER, download, refuse_pointers, resolve
from orpo_lite.errors import ModelError, Overrides, RecipeError, raise_all
from orpo_lite.recipe.schema import LoraSection, Recipe
from orpo_lite.recipe.text import to_text


def find_adapter(name: str) -> Path:
    """The folder of a LoRA adapter in safetensors, local or fetched. Raises :class:`ModelError`, :class:`HubError`."""
    local = Path(name).expanduser()
    folder = local if local.is_dir() else download(name, resolve(name, "main", ADAPTER), ADAPTER)
    for file in ADAPTER:
        if not (folder / file).is_file():
            raise ModelError(
                where=f"model.adapter_name_or_path: {name}",
                found=f"has no {file}",
                expected="a peft LoRA adapter in safetensors",
            )
    refuse_pointers(folder, ADAPTER)
    return folder


def base_of_adapter(folder: Path) -> str | None:
    """The base that an adapter says it was trained on: a hub name or a folder; None where it does not say."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def same_base(one: str, other: str) -> bool:
    """Whether two names may be of one base: a folder is often named for the hub's repository, or was moved."""
    names, configs = set(), []
    for name in (one, other):
        path = Path(name).expanduser()
        cached = next(
            (part for part in path.parts if part.startswith("models--")), path.name
        )  # the hub's cache
        names.add(cached.rsplit("--", 1)[-1].lower())
        configs += [file.read_bytes() for file in [path / "config.json"] if file.is_file()]
    return configs[0] == configs[1] if len(configs) == 2 else len(names) == 1


# What an adapter may choose; any other option of LoraConfig must stand at its default.
ADAPTER_KEYS = (
    "r lora_alpha lora_dropout target_modules use_rslora use_dora rank_pattern alpha_pattern init_lora_weights "
    "exclude_modules target_parameters layers_to_transform layers_pattern fan_in_fan_out "
    "auto_mapping base_model_name_or_path inference_mode peft_version revision task_type"
).split()

EMBEDDINGS = ("embed", "lm_head", "wte", "wpe")  # in the names of input and output embeddings
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank


def not_in_vllm(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """What of an adapter vLLM does not serve; "" where it serves the adapter as it is.

    It has one scale, ``lora_alpha / r``, for all layers (its PEFTHelper). Of a base that wraps the model that was
    trained it builds the whole, in which the adapter's names match nothing.

    Args:
        config: the adapter's.
        base: what lock.json holds of it.
    """
    if base.get("wrapper"):  # which runs of an older version did not note
        return "an adapter of a part of the base, whose layers it names otherwise"
    if config.get("use_dora"):
        return "DoRA"
    if any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "target_parameters")):
        return "ranks and scales by layer, or adapted experts"
    targets = config.get("target_modules") or ()
    named = (
        targets if isinstance(targets, str) else " ".join(targets)
    )  # a text is a regular expression
    if any(name in named for name in EMBEDDINGS):
        return "an adapter with embeddings in it"  # peft saves these whole beside A and B
    return "" if config["r"] <= VLLM_RANKS[-1] else f"its rank of {config['r']}"


def vllm_rank(config: Mapping[str, Any], base: Mapping[str, Any]) -> int | None:
    """The ``--max-lora-rank`` that serves an adapter; None for one that vLLM does not serve as it is."""
    if not_in_vllm(config, base):
        return None
    return next(rank for rank in VLLM_RANKS if rank >= config["r"])


def read_adapter_config(folder: Path) -> Any:
    """The peft configuration of a LoRA that trains nothing else and fits the base as it is; or :class:`ModelError`."""
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        options = dict(raw)
    except (ValueError, TypeError) as error:
        raise ModelError(
            where=str(path), found=f"is no JSON object: {error}", expected="a peft configuration"
        ) from None
    if options.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(
            where=str(path),
            found=f"task_type: {options['task_type']!r}",
            expected="'CAUSAL_LM': an adapter of a model with another head is not one of this model",
            fix=Overrides({"model.adapter_name_or_path": None}, ", which trains a new adapter"),
        )
    # peft would take its own defaults for them, and with these the adapter is another one.
    saved = "as the adapter was saved with"
    for key in ("r", "lora_alpha"):
        value = options.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value % 1 or value <= 0:
            raise ModelError(
                where=str(path),
                found=f"{key}: {json.dumps(value)}",
                expected=f"a whole number, {saved}",
            )
    if not options.get("target_modules") and not options.get("target_parameters"):
        raise ModelError(
            where=str(path), found="names no target_modules", expected=f"those, {saved}"
        )
    default = LoraConfig().to_dict()
    for key, value in options.items():
        if value and key not in ADAPTER_KEYS and value != default.get(key):
            raise ModelError(
                where=str(path),
                found=f"{key}: {value!r}",
                expected="plain LoRA, and nothing else that trains",
            )
    init = options.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(
            where=str(path),
            found=f"init_lora_weights: {init!r}",
            expected="one that leaves the base as it is",
        )
    config = LoraConfig.from_pretrained(folder)
    config.r = int(config.r)  # some tools write 4.0
    config.inference_mode = False  # as saved, an adapter is for use; here it trains on
    config.init_lora_weights = True  # any will do: the adapter's own weights follow
    return config


def adopt_adapter(recipe: Recipe) -> Recipe:
    """The recipe with the shape of the adapter that it trains on from; a key set to something else is refused."""
    if not recipe.model.adapter_name_or_path:
        return recipe
    folder = find_adapter(recipe.model.adapter_name_or_path)
    config = read_adapter_config(folder)
    shape = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    values = {f"lora.{key}": getattr(config, key) for key in shape}
    values["lora.target_modules"] = adapted_modules(config, folder)
    values["lora.init_lora_weights"] = True  # which says nothing: the weights are the adapter's own
    defaults = LoraSection()
    differing = {
        key: wanted
        for key, wanted in recipe.items()
        if key in values
        and values[key] != (sorted(wanted) if isinstance(wanted, list) else wanted)
        and (
            recipe.sources[key] != "default"
            or wanted != getattr(defaults, key.removeprefix("lora."))
        )
    }
    own = {
        key: ",".join(values[key]) if isinstance(values[key], list) else values[key]
        for key in differing
    }
    raise_all(
        [
            RecipeError(
                where=recipe.sources[key],
                found=f"{key}: {to_text(wanted)} with model.adapter_name_or_path",
                expected=f"its own {to_text(values[key])}, or nothing",
                fix=Overrides(own, ", or leave the key out"),
            )
            for key, wanted in differing.items()
        ]
    )
    return recipe.override(values)


def adapted_modules(config: Any, folder: Path) -> str | list[str]:
    """The names of what an adapter adapts, sorted; those of its tensors where its configuration has an expression."""
    targets = config.target_modules or []
    if targets == "all-linear":
        return "all-linear"
    if isinstance(targets, str):
        file = folder / "adapter_model.safetensors"
        try:
            with safe_open(file, "np") as tensors:
                found = [MODULE.fullmatch(name) for name in tensors.keys()]  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(
                where=str(file),
                found=f"cannot be read ({error})",
                expected="whole safetensors",
                fix="fetch it again",
            ) from error
        targets = {match["module"] for match in found if match}
    return sorted({*targets, *(config.target_parameters or [])})


# A tensor of an adapter, as peft names it.
MODULE = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)*\.lora_\w+(\.weight)?")
