"""Load a base and add LoRA to it, or build the same model without loading weights."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from orpo_lite.base.adapter import INITIAL, find_adapter, note_on_base, reference_name
from orpo_lite.base.find import Base
from orpo_lite.errors import FitError, ModelError, Overrides, first_line
from orpo_lite.model.adapter import add_lora, load_adapter
from orpo_lite.model.load_sharded import LayerFiles, load_outer, shard_base
from orpo_lite.model.memory import apply_memory_settings
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.model.ppo_adapters import add_ppo_adapters
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
    """Return the torch dtype that ``name`` means: ``float16`` -> ``torch.float16``.

    ``auto`` is bfloat16 on GPUs that support it, float16 on older GPUs (such as T4), and float32 on
    CPUs. ``kind`` is the result of :func:`orpo_lite.ops.devices.device_kind`.
    """
    by_kind = {"ampere": torch.bfloat16, "cuda": torch.float16, "cpu": torch.float32}
    dtype: torch.dtype = by_kind[kind] if name == "auto" else getattr(torch, name)
    return dtype


def load_pair_model(
    recipe: Recipe, base: Base, device: torch.device, processes: Processes | None = None
) -> PairModel:
    """Load the frozen base and add a LoRA adapter in float32.

    The base is quantised if ``quantization.load_in_4bit`` is set.
    ``peft.prepare_model_for_kbit_training`` is not used, because it copies embeddings, head and
    norms to float32.

    ``processes``: the processes of a training. If ``memory.shard`` is a number, they divide the
    base among them. None: the whole base is loaded.
    """
    mesh = processes.mesh(recipe) if processes else None
    files: LayerFiles | None = None
    if mesh and processes:
        dtype = choose_dtype(recipe.model.dtype, device_kind(device))
        model, files = load_outer(recipe, base, dtype, processes)
    else:
        model = load_base(recipe, base, device)
    name = recipe.model.adapter_name_or_path
    folder = find_adapter(name) if name else None
    # Layers that should be in 4 bit, but are not after loading.
    unquantized = [*quantizable(model)] if recipe.quantization.load_in_4bit else []
    pair_model = _as_pair_model(model, recipe, folder)
    if unquantized:
        pair_model.notes.append(
            f"quantization.load_in_4bit: {unquantized[0]} and similar layers are not quantised, "
            "because bitsandbytes' CPU kernel gives wrong numbers for rows of their width"
        )
    if mesh and processes and files:
        shard_base(pair_model, files, mesh, processes)
    if folder:
        pair_model.notes += note_on_base(folder, base.name, INITIAL)
        load_adapter(pair_model, folder)
    return pair_model


def bare_pair_model(
    recipe: Recipe, config: Any, dtype: torch.dtype, device: torch.device = META
) -> PairModel:
    """Build the model of :func:`load_pair_model` from its configuration, without loading weights.

    On the meta device, the model's tensors have no values. On other devices, the weights are
    random.

    ``config`` may have fewer layers than the base. If the recipe continues an adapter,
    ``lora.target_modules`` may name a layer that the built model lacks: ``layers.9.q_proj``. If
    such a recipe has a name with a dot, the adapter is on all linear layers of the built model.
    """
    names = recipe.lora.target_modules
    if recipe.model.adapter_name_or_path and any("." in name for name in names):
        recipe = recipe.override({"lora.target_modules": "all-linear"})
    pair_model = _as_pair_model(bare_base(recipe, config, dtype, device), recipe, None)
    if recipe.loss.type == "ppo":
        has_reference = reference_name(recipe) is not None
        add_ppo_adapters(pair_model, None, None, has_reference=has_reference)
    if device == META:  # a plan is about the steps, and the probe is over before them
        pair_model.drop_output_head()
    return pair_model


def bare_base(recipe: Recipe, config: Any, dtype: torch.dtype, device: torch.device = META) -> Any:
    """Build the base of :func:`bare_pair_model`: the model before an adapter is added.

    The base is quantised if ``quantization.load_in_4bit`` is set.
    """
    with device:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    if device == META:
        # Some models search the tokens for the pad token, but on meta tokens have no values.
        model.config.pad_token_id = None
    if recipe.quantization.load_in_4bit:
        quantize(model, recipe, dtype)
    return model


def _as_pair_model(model: nn.Module, recipe: Recipe, folder: Path | None) -> PairModel:
    """Freeze the model, add an adapter, apply the settings of ``memory``, return a PairModel."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bypassed = sorted({name.rsplit(".", 1)[-1] for name in bypassed_layers(model)})
    # All experts of a layer are one parameter.
    experts = sum(p.nbytes for n, p in model.named_parameters() if "expert" in n and p.ndim == 3)
    pair_model = PairModel(add_lora(model, recipe, folder), recipe.memory).train()
    if recipe.quantization.load_in_4bit and experts:
        pair_model.notes.append(
            f"quantization.load_in_4bit: {gib(experts)} of expert weights are not quantised: "
            "bitsandbytes quantises linear layers only"
        )
    if bypassed:
        pair_model.notes.append(
            "layers that are not in 4 bit and not adapted, because the model's own code reads "
            "their weights: " + ", ".join(bypassed)
        )
    apply_memory_settings(pair_model, recipe)
    return pair_model


def load_base(
    recipe: Recipe, base: Base, device: torch.device, kind: Any = AutoModelForCausalLM
) -> nn.Module:
    """Load the base without an adapter, with the recipe's dtype, attention and quantization.

    ``kind``: transformers' class that loads it. AutoModelForSequenceClassification loads a merged
    reward model.

    Raises:
        FitError: a package that 4-bit quantization needs is missing.
        ModelError: weights are missing, unreadable or of a wrong shape.
        torch.OutOfMemoryError: the device is out of memory.
    """
    dtype = choose_dtype(recipe.model.dtype, device_kind(device))
    options: dict[str, Any] = {
        "config": copy.deepcopy(base.config),
        "dtype": dtype,
        "device_map": {"": str(device)},
        "use_safetensors": True,
        "generation_config": GenerationConfig(),  # an invalid generation_config.json would raise
        "ignore_mismatched_sizes": True,  # otherwise transformers' error names none of them
    }
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.quantization.load_in_4bit:
        skipped = skipped_modules(recipe, base.config, device)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped or None,  # it is also used for 4 bit
            bnb_4bit_quant_type=recipe.quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=recipe.quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute_dtype(recipe, dtype),
        )
    log = _LoadingLog()
    try:
        with log.recording():
            model, loading = kind.from_pretrained(base.path, output_loading_info=True, **options)
    except ImportError as error:
        raise FitError(
            where=f"model {base.name}",
            found=first_line(error),
            fix=Overrides({"quantization.load_in_4bit": False}),
        ) from error
    except RuntimeError as error:
        lines = [line for line in log.lines if is_out_of_memory(RuntimeError(line))]
        if not lines:
            raise
        raise torch.OutOfMemoryError(lines[0]) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            where=f"model {base.path}",
            found=f"its weights cannot be read: {first_line(error)}",
            expected="complete safetensors files",
            fix="download the model again",
        ) from error
    # transformers initialises these weights with random numbers.
    missing = [
        *loading["missing_keys"],
        *(str(name) for name, *_ in loading["mismatched_keys"]),
        *misshapen(model),
    ]
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise ModelError(
            where=f"model {base.name}",
            found="number of weights that are missing or have a wrong shape: "
            f"{len(missing)} ({names} ...)",
            expected="all weights that the model needs",
        )
    loaded: nn.Module = model
    return loaded


class _LoadingLog(logging.Handler):
    """A log handler that records the messages of transformers while it loads a model.

    If a tensor cannot be quantised, the reason is only in these messages and not in the exception.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record log messages inside the ``with`` block."""
        logger = logging.getLogger("transformers.modeling_utils")
        level, is_disabled = logger.level, logger.disabled
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)  # the caller may have set another level
        logger.disabled = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.disabled = is_disabled
