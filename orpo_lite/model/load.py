"""The base loaded in 4 bit with LoRA on top, as a PairModel; or built from its configuration alone."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from orpo_lite.base.adapter import base_of_adapter, find_adapter, same_base
from orpo_lite.base.find import Base
from orpo_lite.errors import FitError, ModelError, Overrides, first_line
from orpo_lite.model.adapter import add_lora, set_adapter
from orpo_lite.model.memory import apply_memory_settings
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.quantize import (
    bypassed_layers,
    compute_dtype,
    misshapen,
    quantizable,
    quantize,
    skipped_modules,
)
from orpo_lite.ops.devices import META, device_kind, is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import gib


def choose_dtype(name: str, kind: str) -> torch.dtype:
    """``auto``: bfloat16 where the card has it, else float16 (T4), else float32 (CPU).

    ``kind`` of a device is what :func:`orpo_lite.ops.attention.device_kind` says.
    """
    by_kind = {"ampere": torch.bfloat16, "cuda": torch.float16, "cpu": torch.float32}
    dtype: torch.dtype = by_kind[kind] if name == "auto" else getattr(torch, name)
    return dtype


def load_pair_model(recipe: Recipe, base: Base, device: torch.device) -> PairModel:
    """Load the base, quantised as the recipe says and frozen, with a LoRA adapter whose parameters are float32.

    ``peft.prepare_model_for_kbit_training`` is not used: it copies embeddings, head and norms to float32.
    """
    model = load_base(recipe, base, device)
    name = recipe.model.adapter_name_or_path
    folder = find_adapter(name) if name else None
    left = (
        [*quantizable(model)] if recipe.quantization.load_in_4bit else []
    )  # those that are not in 4 bit
    pair_model = _as_pair_model(model, recipe, folder)
    if left:
        said = f"{left[0]} and such stay as they are: on this CPU bitsandbytes' kernel errs on rows of their width"
        pair_model.notes.append(f"quantization.load_in_4bit: {said}")
    if folder:
        if (own := base_of_adapter(folder)) and not same_base(own, base.name):
            said = f"it says that it was trained on {own}, and the base is {base.name}: on other weights it is noise"
            pair_model.notes.append(f"model.adapter_name_or_path: {said}")
        file = folder / "adapter_model.safetensors"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            said = f"cannot be read: {error}"
            raise ModelError(where=str(file), found=said, expected="whole safetensors") from error
        set_adapter(pair_model, tensors)
    return pair_model


def bare_pair_model(
    recipe: Recipe, config: Any, dtype: torch.dtype, device: torch.device = META
) -> PairModel:
    """The same model from its configuration alone: on meta shapes and storages only, elsewhere random weights.

    An adapter of which single layers, or experts, are named may have none of them in a model of two layers: it counts
    as one on all linear layers.
    """
    names = recipe.lora.target_modules
    if recipe.model.adapter_name_or_path and any("." in name for name in names):
        recipe = recipe.override({"lora.target_modules": "all-linear"})
    return _as_pair_model(bare_base(recipe, config, dtype, device), recipe, None)


def bare_base(recipe: Recipe, config: Any, dtype: torch.dtype, device: torch.device = META) -> Any:
    """The base of :func:`bare_pair_model`, quantised as the recipe says."""
    with device:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    if device == META:
        model.config.pad_token_id = (
            None  # some models look for it among the tokens, which have no values here
        )
    if recipe.quantization.load_in_4bit:
        quantize(model, recipe, dtype)
    return model


def _as_pair_model(model: nn.Module, recipe: Recipe, folder: Path | None) -> PairModel:
    """Return the model frozen, with its adapter and the settings of ``memory``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bypassed = sorted({name.rsplit(".", 1)[-1] for name in bypassed_layers(model)})
    experts = sum(
        p.nbytes for n, p in model.named_parameters() if "expert" in n and p.ndim == 3
    )  # a layer's in one
    pair_model = PairModel(add_lora(model, recipe, folder), recipe.memory).train()
    if recipe.quantization.load_in_4bit and experts:
        said = f"{gib(experts)} of its experts stay as they are: bitsandbytes quantises linear layers only"
        pair_model.notes.append(f"quantization.load_in_4bit: {said}")
    if bypassed:
        said = f"not in 4 bit and not adapted, because the model's own code takes their weights: {', '.join(bypassed)}"
        pair_model.notes.append(said)
    apply_memory_settings(pair_model, recipe)
    return pair_model


def load_base(recipe: Recipe, base: Base, device: torch.device) -> nn.Module:
    """The base alone, loaded as the recipe says. Raises FitError, ModelError."""
    dtype = choose_dtype(recipe.model.dtype, device_kind(device))
    options: dict[str, Any] = {
        "config": copy.deepcopy(base.config),
        "dtype": dtype,
        "device_map": {"": str(device)},
        "use_safetensors": True,
        "generation_config": GenerationConfig(),  # else a generation_config.json that it refuses would end the loading
        "ignore_mismatched_sizes": True,  # else it raises, and names none of them
    }
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.quantization.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped_modules(recipe, base.config, device)
            or None,  # its name for 4 bit too
            bnb_4bit_quant_type=recipe.quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=recipe.quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute_dtype(recipe, dtype),
        )
    report = _Report()
    try:
        with report.kept():
            model, loading = AutoModelForCausalLM.from_pretrained(
                base.path, output_loading_info=True, **options
            )
    except ImportError as error:
        found = first_line(error)
        raise FitError(
            where=f"model {base.name}",
            found=found,
            fix=Overrides({"quantization.load_in_4bit": False}),
        ) from error
    except RuntimeError as error:
        line = next((line for line in report.lines if is_out_of_memory(RuntimeError(line))), None)
        if line is None:
            raise
        raise torch.OutOfMemoryError(line) from error
    except (OSError, SafetensorError) as error:
        found = f"its weights cannot be read: {first_line(error)}"
        raise ModelError(
            where=f"model {base.path}",
            found=found,
            expected="whole safetensors",
            fix="download it again",
        ) from error
    # transformers would leave these random
    lacking = [
        *loading["missing_keys"],
        *(str(name) for name, *_ in loading["mismatched_keys"]),
        *misshapen(model),
    ]
    if lacking:
        found = f"lacks {len(lacking)} weights of the right shape ({', '.join(sorted(lacking)[:3])} ...)"
        raise ModelError(where=f"model {base.name}", found=found, expected="all of them")
    loaded: nn.Module = model
    return loaded


class _Report(logging.Handler):
    """What transformers logs of a loading: of a tensor that it cannot quantise it raises only that there was one."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is logged while this lasts."""
        logger = logging.getLogger("transformers.modeling_utils")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
