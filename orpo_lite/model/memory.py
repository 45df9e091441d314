"""Apply the recipe's ``memory`` settings to a model, without a change of loss or gradient."""

from peft.tuners.lora import LoraLayer
from torch import nn

from orpo_lite.model.pair_model import PairModel
from orpo_lite.ops.devices import is_on_host, transfer
from orpo_lite.ops.layers import checkpoint_layers, embed_on_host, tile_mlps, untile_mlps
from orpo_lite.ops.lora import fuse_lora
from orpo_lite.recipe.schema import Recipe


def apply_memory_settings(model: PairModel, recipe: Recipe) -> None:
    """Apply the recipe's ``memory`` settings to a newly built model."""
    memory = recipe.memory.unplanned()
    if memory.fused_lora:
        unfused = fuse_lora(model.model)
        if unfused:
            model.notes.append(
                "memory.fused_lora: number of adapted layers that still use peft's own operation: "
                f"{len(unfused)} ({unfused[0]} ...)"
            )
    _apply_layer_settings(model, recipe)


def _apply_layer_settings(model: PairModel, recipe: Recipe) -> None:
    memory = recipe.memory.unplanned()
    count = len(model.layers)
    if isinstance(memory.mlp_tile, int):
        tiled = tile_mlps(model.layers, memory.mlp_tile, has_dropout=has_dropout(model))
        if tiled < count or not tiled:
            which = f"{count - tiled} of {count} layers" if tiled else "this model"
            model.notes.append(
                f"memory.mlp_tile has no effect on {which}: "
                "it needs an MLP that can process its tokens in parts"
            )
    if not model.layers and memory.checkpointed(1):
        model.notes.append(
            "memory.activation_checkpointing has no effect: "
            "this model's layers cannot run again in the backward pass"
        )
    checkpoint_first_layers(model, recipe)
    if memory.embedding_on_cpu:
        embed_on_host(model.causal.get_input_embeddings())


NO_MEMORY_SETTINGS = {
    "mlp_tile": None,
    "activation_checkpointing": 0,
    "checkpoint_offload": False,
    "embedding_on_cpu": False,
}


def with_memory_settings(model: PairModel, recipe: Recipe) -> PairModel:
    """Return a model that has the recipe's memory settings and shares the modules of ``model``.

    ``model`` must be made with NO_MEMORY_SETTINGS. Each call changes the shared modules and undoes
    the settings of the previous call. So only the model that was returned last may be used.
    """
    untile_mlps(model.layers)
    for layer in model.layers:
        layer.gradient_checkpointing = False
    embedding = model.causal.get_input_embeddings()
    if is_on_host(embedding.weight):
        vars(embedding).pop("forward", None)
        embedding.weight.data = transfer(embedding.weight.data, model.device)
    model.config._attn_implementation = model.own_attention
    changed = PairModel(model.model, recipe.memory).train()
    changed.notes = [*model.notes]
    _apply_layer_settings(changed, recipe)
    return changed


def checkpoint_first_layers(model: PairModel, recipe: Recipe) -> None:
    """Checkpoint the first layers: each keeps only its input for the backward pass.

    ``memory.activation_checkpointing`` sets the number of these layers. A later call can checkpoint
    more layers.
    """
    memory = recipe.memory.unplanned()
    model.checkpointed = memory.checkpointed(len(model.layers))
    layers, offload = model.layers[: model.checkpointed], bool(memory.checkpoint_offload)
    checkpoint_layers(layers, model.use_layout, offload=offload, has_dropout=has_dropout(model))
    model.train(model.training)


def has_dropout(model: nn.Module) -> bool:
    """Return whether the adapter has dropout.

    With dropout, the second run of a checkpointed layer needs the random state of the first run.
    The base is always in evaluation mode, so it never has dropout.
    """
    adapters = (module for module in model.modules() if isinstance(module, LoraLayer))
    return any(
        getattr(dropout, "p", 0) > 0
        for layer in adapters
        for dropout in layer.lora_dropout.values()
    )
