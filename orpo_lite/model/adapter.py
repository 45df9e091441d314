"""Add a LoRA adapter to a model in memory. Initialise, read and set the adapter's tensors."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from orpo_lite.base.adapter import CAUSAL_LM, SEQ_CLS, read_adapter_config
from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.errors import ModelError, Overrides, RecipeError, first_line
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.quantize import bypassed_layers
from orpo_lite.model.score_head import SCORE, SCORE_TENSOR, add_score_head
from orpo_lite.ops.devices import META
from orpo_lite.recipe.schema import Recipe

# Endings of the names of base tensors, which peft saves together with an adapted embedding.
BASE_LAYER = (".base_layer.weight", ".base_layer.bias")


def add_lora(model: nn.Module, recipe: Recipe, folder: Path | None) -> nn.Module:
    """Return the model with a new adapter.

    The adapter's configuration is read from ``folder``. If ``folder`` is None, the configuration is
    made from the recipe's ``lora`` settings.
    """
    lora = recipe.lora
    if recipe.loss.trains_reward_model or recipe.loss.type == "ppo":
        add_score_head(model, recipe.training.seed)
    if folder:
        config = read_adapter_config(folder)
        _check_task(config, recipe, folder)
    else:
        is_orthogonal = lora.init_lora_weights == "orthogonal"
        config = LoraConfig(
            task_type=CAUSAL_LM,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            exclude_modules=_excluded_layers(model) or None,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init_lora_weights=True if is_orthogonal else lora.init_lora_weights,
        )
    if recipe.loss.trains_reward_model:
        # For this task, peft trains a copy of the head and saves it with the adapter. It adds the
        # names of heads to modules_to_save.
        config.task_type, config.modules_to_save = SEQ_CLS, None
    torch.manual_seed(recipe.training.seed)  # for the adapter's initialisation
    device = next(model.parameters()).device
    try:
        # For a model on meta, peft would otherwise allocate each matrix in memory first.
        with device if device == META else nullcontext():
            model = get_peft_model(model, config)
    except ValueError as error:
        if "ParamWrapper" in str(error):  # on experts, which are parameters and not layers
            fix = Overrides(
                {"lora.use_dora": False, "lora.lora_dropout": 0},
                ", or lora.target_modules=q_proj,k_proj,v_proj,o_proj",
            )
            raise ModelError(
                where="adapter",
                found="adapts the model's experts; peft supports neither DoRA nor dropout for "
                "experts",
                expected="no DoRA and no dropout if the adapter adapts experts",
                fix=fix,
            ) from error
        raise ModelError(
            where="adapter", found=first_line(error), expected="names of layers that the base has"
        ) from error
    targets = config.target_modules
    if recipe.loss.trains_reward_model and isinstance(targets, set):
        targets.discard(SCORE)  # peft lists it for "all-linear", but does not adapt it
    if lora.init_lora_weights == "orthogonal" and not folder:
        _init_orthogonal(model, recipe)
    return model


def _check_task(config: LoraConfig, recipe: Recipe, folder: Path) -> None:
    """Raise ModelError if the adapter of a reward model shall become a language model."""
    if config.task_type == SEQ_CLS and not recipe.loss.trains_reward_model:
        raise ModelError(
            where=str(folder / "adapter_config.json"),
            found="is the adapter of a reward model (task_type SEQ_CLS)",
            expected=f"the adapter of a language model for loss.type {recipe.loss.type}",
        )


def _excluded_layers(model: Any) -> list[str]:
    """Return the names of layers on which an adapter would have no effect or would fail.

    - Layers for images or sound, because pairs do not use them.
    - Routers that subclass a linear layer and return more than one tensor.
    - The layers of :func:`bypassed_layers`.
    """
    decoder_modules = set(model.get_decoder().modules())
    excluded = bypassed_layers(model)
    for name, module in model.named_modules():
        is_outside = (
            isinstance(module, nn.Linear)
            and module not in decoder_modules
            and module is not model.get_output_embeddings()
        )
        if is_outside or "router" in type(module).__name__.lower():
            excluded.append(name)
    return excluded


@torch.no_grad()
def _init_orthogonal(model: nn.Module, recipe: Recipe) -> None:
    """Initialise the adapter like peft's orthogonal_init.

    peft's function fails on a 4-bit base, because it uses the dtype of the base's weights.
    """
    rank = recipe.lora.r
    if rank % 2:
        raise RecipeError(
            where=recipe.sources["lora.r"],
            found=f"lora.r={rank}",
            expected="an even number, because lora.init_lora_weights is orthogonal",
            fix=f"lora.r={rank + 1}",
        )
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rows_RR = torch.linalg.qr(torch.randn(rank, rank)).Q
            a_RI.copy_(rows_RR[0::2].T @ torch.randn(rank // 2, a_RI.shape[1]) / 10)
            b_OR.copy_(torch.randn(b_OR.shape[0], rank // 2) @ rows_RR[1::2] / 10)


def adapter_tensors(model: PairModel, name: str = "default") -> dict[str, Tensor]:
    """Return a dict: peft's name of an adapter tensor -> the tensor on the CPU."""
    # By default peft would save an adapted embedding too, and would ask the hub about it.
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model.model, adapter_name=name, save_embedding_layers=False
    )
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}


def load_adapter(model: PairModel, folder: Path) -> None:
    """Copy the tensors of an adapter's folder into the model's adapter.

    A reward model may start from the adapter of a language model. Then its score head is kept.

    Raises:
        ModelError: the file is damaged, or does not fit the model's adapter.
    """
    tensors = read_adapter(folder)
    if model.returns_rewards and read_adapter_config(folder).task_type != SEQ_CLS:
        tensors[SCORE_TENSOR] = adapter_tensors(model)[SCORE_TENSOR]
    set_adapter(model, tensors)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's folder. Raise ModelError if the file is damaged."""
    file = folder / ADAPTER_WEIGHTS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            where=str(file),
            found=f"cannot be read: {error}",
            expected="a complete safetensors file",
        ) from error


def set_adapter(model: PairModel, tensors: dict[str, Tensor], name: str = "default") -> None:
    """Copy ``tensors`` into the model's adapter. Tensors of the base are ignored.

    The tensors are a result of :func:`adapter_tensors`, or they come from a file that peft saved.
    peft also saves tensors of the base, if the embedding is adapted.

    Raises:
        ModelError: the names or shapes differ from the model's adapter.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BASE_LAYER)}
    own = {name: tensor.shape for name, tensor in adapter_tensors(model, name).items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    differing = {name for name, _ in own.items() ^ given.items()}
    if differing:
        raise ModelError(
            where="adapter",
            found="has other tensor names or shapes than the model's adapter, for example "
            f"{min(differing)} (in all: {len(differing)})",
            expected="an adapter with the settings of this recipe",
        )
    set_peft_model_state_dict(model.model, tensors, adapter_name=name)
