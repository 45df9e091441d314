"""Divide the frozen weights of a base among processes with torch's FSDP2.

Only the matrices of the decoder layers are divided, because they are nearly all of a base. Before a
layer runs, its matrices are gathered from all processes, and they are freed after it. The adapter,
the embeddings, the head and the norms stay whole in each process, so checkpoints, clipping and the
optimizer are those of plain data parallelism.

accelerate's FSDP plugin is not used: it does not divide uint8 weights, so a 4-bit base would stay
whole.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from orpo_lite.model.pair_model import PairModel


def divide_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the frozen matrices of a decoder layer among the processes of a mesh."""
    fully_shard(layer, mesh=mesh, ignored_params={*layer.parameters()} - {*divisible(layer)})


def divisible(layer: nn.Module) -> list[nn.Parameter]:
    """Return the frozen matrices of a decoder layer."""
    return [p for p in layer.parameters() if not p.requires_grad and p.ndim > 1]


def divide_root(model: PairModel, mesh: DeviceMesh) -> None:
    """Make the backbone the root of FSDP2, after its layers are divided.

    From now on, each pass needs all processes of the mesh, so all must run the same number of
    passes. The root must be the module that every pass calls, with the head or without it.
    """
    fully_shard(model.backbone, mesh=mesh, ignored_params={*model.backbone.parameters()})


def is_sharded(model: PairModel) -> bool:
    """Return whether the weights of a model are divided among processes."""
    return isinstance(model.backbone, FSDPModule)


def local_bytes(model: PairModel) -> int:
    """Return the bytes of the divided matrices that this process holds between two passes."""
    return sum(
        p.to_local().untyped_storage().nbytes()
        for p in model.parameters()
        if isinstance(p, DTensor)
    )


def from_first(values: Tensor) -> Tensor:
    """Return, in every process, the values of the first one. All processes must call this."""
    torch.distributed.broadcast(values, src=0)
    return values
