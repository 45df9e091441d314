"""The base in 4 bit with LoRA on top, loaded and wrapped as a :class:`PairModel`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from orpo_lite.base import Base, find_adapter, read_adapter_config
from orpo_lite.data.packing import PairBatch
from orpo_lite.errors import FitError, ModelError, RecipeError
from orpo_lite.recipe import Recipe
from orpo_lite.step.head import pair_logps
from orpo_lite.step.losses import PairLogps


class PairModel(nn.Module):
    """A causal language model that takes pairs and answers with their log-probabilities."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch) -> PairLogps:
        """One forward pass over all 2P rows; the plain step, which keeps all logits."""
        output = self.model(input_ids=batch.input_ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        return pair_logps(output.logits, batch.input_ids_RT, batch.response_RT, batch.counted_RT)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's parameters, by name."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and gradients, and without touching the 4-bit weights.

        A Linear4bit in eval mode repacks its weights on CPUs with AVX512-BF16 at the first forward without
        gradients, and its input loses its gradient from then on (bitsandbytes 0.50, Linear4bit.forward).
        """
        import bitsandbytes as bnb

        was_training = self.training
        self.eval()
        for module in self.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.training = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the card has it, else float16 (T4, V100), else float32 (CPU)."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_pair_model(recipe: Recipe, base: Base, device: torch.device) -> PairModel:
    """Load the base, quantised as the recipe says and frozen, with a LoRA adapter whose parameters are float32.

    ``peft.prepare_model_for_kbit_training`` is not used: it copies embeddings, head and norms to float32.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = choose_dtype(recipe.model.dtype, device)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": str(device)}, "use_safetensors": True}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.quantization.load_in_4bit:
        compute = recipe.quantization.bnb_4bit_compute_dtype
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=recipe.quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype if compute == "auto" else getattr(torch, compute),
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(base.path, output_loading_info=True, **options)
    except ImportError as error:
        found = str(error).splitlines()[0]
        raise FitError(f"model {base.name}", found, "", "quantization.load_in_4bit=false") from error
    except (OSError, SafetensorError) as error:
        found = f"its weights cannot be read: {str(error).splitlines()[0]}"
        raise ModelError(f"model {base.path}", found, "whole safetensors", "download it again") from error
    # transformers would leave these random
    lacking = [*loading["missing_keys"], *(str(name) for name, *_ in loading["mismatched_keys"]), *_misshapen(model)]
    if lacking:
        found = f"lacks {len(lacking)} weights of the right shape ({', '.join(sorted(lacking)[:3])} ...)"
        raise ModelError(f"model {base.name}", found, "all of them")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    name = recipe.model.adapter_name_or_path
    folder = find_adapter(name) if name else None
    model = _add_lora(model, recipe, folder)
    _checkpoint_activations(model, recipe.memory.activation_checkpointing)
    pair_model = PairModel(model).train()
    if folder:
        set_adapter(pair_model, load_file(folder / "adapter_model.safetensors"))
    return pair_model


def _misshapen(model: nn.Module) -> list[str]:
    """4-bit layers whose weights are not of the layer's shape, which transformers looks at in other layers only."""
    import bitsandbytes as bnb

    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    return [
        f"{name}.weight"
        for name, layer in layers.items()  # in either orientation, for GPT-2 stores its matrices transposed
        if (state := getattr(layer.weight, "quant_state", None)) is not None  # a missing weight has none
        and sorted(state.shape) != sorted((layer.in_features, layer.out_features))
    ]


def _add_lora(model: nn.Module, recipe: Recipe, folder: Path | None) -> nn.Module:
    """The model with a new adapter, of the recipe's shape or of that of the adapter in ``folder``."""
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    if folder:
        config = read_adapter_config(folder)
    else:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init_lora_weights=True if lora.init_lora_weights == "orthogonal" else lora.init_lora_weights,
        )
    torch.manual_seed(recipe.training.seed)  # of the adapter's initialisation
    try:
        model = get_peft_model(model, config)
    except ValueError as error:  # no such layers
        raise ModelError("adapter", str(error).splitlines()[0], "layers of this base") from error
    if lora.init_lora_weights == "orthogonal" and not folder:
        _init_orthogonal(model, recipe)
    return model


@torch.no_grad()
def _init_orthogonal(model: nn.Module, recipe: Recipe) -> None:
    """peft's orthogonal_init, which takes the dtype of the base's weights and so fails on a 4-bit one."""
    from peft.tuners.lora import LoraLayer

    rank = recipe.lora.r
    if rank % 2:
        where = recipe.sources["lora.r"]
        raise RecipeError(
            where, f"lora.r={rank}", "an even number for lora.init_lora_weights=orthogonal", f"{rank + 1}"
        )
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rows_RR = torch.linalg.qr(torch.randn(rank, rank)).Q
            a_RI.copy_(rows_RR[0::2].T @ torch.randn(rank // 2, a_RI.shape[1]) / 10)
            b_OR.copy_(torch.randn(b_OR.shape[0], rank // 2) @ rows_RR[1::2] / 10)


def _checkpoint_activations(model: nn.Module, amount: str | int) -> None:
    """Recompute the activations of all, none, or the first ``amount`` decoder layers in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if amount == "none":
        return
    base = model.get_base_model()  # type: ignore[operator]
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # only re-entrant checkpointing needs them
    if isinstance(amount, int):
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[amount:]:
            layer.gradient_checkpointing = False


def adapter_tensors(model: PairModel) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, on the CPU."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model.model)
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}


def set_adapter(model: PairModel, tensors: dict[str, Tensor]) -> None:
    """Load :func:`adapter_tensors` back. Raises :class:`ModelError` when names or shapes differ."""
    from peft import set_peft_model_state_dict

    own = {name: tensor.shape for name, tensor in adapter_tensors(model).items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if differing := {name for name, _ in own.items() ^ given.items()}:
        found = f"{len(differing)} tensors have no counterpart of their shape ({min(differing)} ...)"
        raise ModelError("adapter", found, "the adapter of this recipe")
    set_peft_model_state_dict(model.model, tensors)
