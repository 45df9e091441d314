"""Compute a linear layer with LoRA as one operation (arXiv 2106.09685, Eq. 3).

``y = x W.T + b + s (x A.T) B.T``. The only activation kept for the backward pass is the adapter's
input, which is ``x`` after dropout. No float32 copy of ``x`` is made, because the float32
parameters A and B are cast to the dtype of ``x`` inside the operation. If the frozen W is in 4 bit,
it is dequantised at each use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Weight = Callable[[], Tensor]
"""A function that returns the frozen (O, I) matrix in the dtype of the hidden states.

It is called at each use, because the layer's weight may be replaced between two uses.
"""


def lora_linear(
    x: Tensor,
    dropped: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    weight: Weight,
    bias_O: Tensor | None,
) -> Tensor:
    """Return the frozen layer's output for ``x`` plus the adapter's output for ``dropped``.

    Args:
        x: shape (..., I).
        dropped: ``x`` after the adapter's dropout. Without dropout, ``x`` itself.
        a_RI: LoRA's A, in float32 or the dtype of the hidden states.
        b_OR: LoRA's B, in the dtype of ``a_RI``.
        scale: ``lora_alpha / r``, or rsLoRA's ``lora_alpha / sqrt(r)``.
        weight: a function that returns the frozen matrix.
        bias_O: the frozen layer's bias.

    Returns:
        Shape (..., O), in the dtype of ``x``.
    """
    y: Tensor = _LoraLinear.apply(x, dropped, a_RI, b_OR, scale, weight)
    # Fill y after autograd has recorded the operation. The second run of a checkpointed layer stops
    # at its last saved tensor, so it does not compute an output that only the next layer reads.
    with torch.no_grad():
        y_TO, x_TI = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        dropped_TI = dropped.reshape(-1, x.shape[-1])
        w_IO = weight().t()
        if bias_O is None:
            torch.mm(x_TI, w_IO, out=y_TO)
        else:
            torch.addmm(bias_O.to(x.dtype), x_TI, w_IO, out=y_TO)
        y_TO.addmm_(dropped_TI @ a_RI.to(x.dtype).t(), b_OR.to(x.dtype).t(), alpha=scale)
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        weight: Weight,
    ) -> Tensor:
        # x is not saved: only the frozen matrix, which needs no gradient, is multiplied by x.
        ctx.save_for_backward(dropped, a_RI, b_OR)
        ctx.scale, ctx.weight, ctx.same = scale, weight, dropped is x
        return x.new_empty(*x.shape[:-1], b_OR.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dropped, a_RI, b_OR = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        dropped_TI = dropped.reshape(-1, dropped.shape[-1])
        a, b = a_RI.to(grad.dtype), b_OR.to(grad.dtype)
        inner_TR = (grad_TO @ b).mul_(ctx.scale)
        grad_a = (inner_TR.t() @ dropped_TI).to(a_RI.dtype) if ctx.needs_input_grad[2] else None
        grad_b = None
        if ctx.needs_input_grad[3]:
            grad_b = (grad_TO.t() @ (dropped_TI @ a.t())).to(b_OR.dtype).mul_(ctx.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TO @ ctx.weight()
            if ctx.same:  # x is dropped: add both gradients here, and leave none for autograd
                grad_x.addmm_(inner_TR, a)
            grad_x = grad_x.view(dropped.shape)
        if ctx.needs_input_grad[1] and not ctx.same:
            grad_dropped = (inner_TR @ a).view(dropped.shape)
        return grad_x, grad_dropped, grad_a, grad_b, None, None


def fuse_lora(model: nn.Module) -> list[str]:
    """Make each LoRA layer of ``model`` use :func:`lora_linear` if the layer is supported.

    Returns:
        The names of the unsupported layers, which keep peft's own forward pass. These are layers
        with DoRA, layers that are not linear (GPT-2's Conv1D), and 4-bit layers
        whose compute dtype is not the dtype of the hidden states.
    """
    from peft.tuners.lora import LoraLayer

    unfused = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = frozen_weight(layer.base_layer)
        if weight is None or layer.lora_variant:
            unfused.append(name)
        else:
            layer.forward = _fused(layer, weight, layer.forward)
    return unfused


FEW_ROWS = 64
"""Maximum number of rows for :func:`decode_linear`. With more rows, the matrix is dequantised.

Dequantising costs the same for one row as for thousands. If a 7B model did it for each generated
token, it would read and write 30 GB of memory per token.
"""

GEMM_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def decode_linear(x: Tensor, layer: Any, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return the output of a 4-bit layer with its adapter, for few rows and without gradients.

    ``layer`` is the frozen 4-bit layer. The other arguments are those of :func:`lora_linear`.
    The GPU and the shape decide whether bitsandbytes dequantises the matrix.
    """
    import bitsandbytes as bnb

    bias_O = None if layer.bias is None else layer.bias.to(x.dtype)
    y: Tensor = bnb.matmul_4bit(x, layer.weight.data, quant_state(layer), bias=bias_O)
    return y.add_((x @ a_RI.to(x.dtype).t()) @ b_OR.to(x.dtype).t(), alpha=scale)


def frozen_weight(layer: nn.Module) -> Weight | None:
    """Return a function that returns the matrix of ``layer``; None if ``layer`` is not supported.

    The function dequantises a 4-bit matrix at each call.

    An nn.Linear is supported. A Linear4bit is supported if it replaces an nn.Linear, and if its
    compute dtype is not set or is the dtype of the dequantised matrix.
    """
    # source_cls is the type of the layer that transformers has replaced by a 4-bit layer.
    if getattr(layer, "source_cls", nn.Linear) is not nn.Linear:
        return None
    if type(layer) is nn.Linear:
        return lambda: layer.weight
    if type(layer).__name__ == "Linear4bit":
        import bitsandbytes as bnb

        def dequantised() -> Tensor:
            weight: Any = layer.weight
            matrix_OI: Tensor = bnb.functional.dequantize_4bit(weight.data, quant_state(layer))
            return matrix_OI

        return dequantised if layer.compute_dtype in (None, _used_dtype(layer)) else None
    return None


def _used_dtype(layer: Any) -> torch.dtype:
    """Return the dtype of a layer's dequantised matrix, usually the dtype of the hidden states."""
    state = quant_state(layer)
    dtype: torch.dtype = layer.weight.dtype if state is None else state.dtype
    return dtype


def quant_state(layer: Any) -> Any:
    """Return the quantisation state of a 4-bit layer; None if the layer is not in 4 bit.

    The weight that FSDP2 gathers has no state, but its layer has it.
    """
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _fused(layer: Any, weight: Weight, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    four_bit = type(layer.base_layer).__name__ == "Linear4bit"

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A model may have several adapters, of which one is active.
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        off = layer.disable_adapters or layer.merged or len(active) != 1
        if off or args or kwargs or x.dtype != _used_dtype(layer.base_layer):
            return plain(x, *args, **kwargs)
        (name,) = active
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        is_dropping = layer.training and not isinstance(dropout, nn.Identity)
        is_few = x.shape[:-1].numel() <= FEW_ROWS and x.dtype in GEMM_DTYPES
        if four_bit and is_few and not is_dropping and not torch.is_grad_enabled():
            return decode_linear(x, layer.base_layer, a.weight, b.weight, layer.scaling[name])
        dropped = dropout(x) if is_dropping else x
        return lora_linear(
            x, dropped, a.weight, b.weight, layer.scaling[name], weight, layer.base_layer.bias
        )

    # Deleting the layer's attribute ``forward`` restores the forward pass of its class.
    forward.equals_plain = True  # type: ignore[attr-defined]
    return forward
