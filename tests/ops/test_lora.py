"""Frozen weights are asked for at each use, so that others can take their place after the step is installed."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from orpo_lite.ops.head import Head, row_logps
from orpo_lite.ops.lora import FEW_ROWS, fuse_lora


def quantised(weight: torch.Tensor) -> bnb.nn.Params4bit:
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    return bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4"
    )


def layer(weight: torch.Tensor, *, four_bit: bool) -> Any:
    """A linear layer of that matrix with LoRA on it, the same adapter each time."""
    torch.manual_seed(0)
    if four_bit:
        linear: Any = bnb.nn.Linear4bit(64, 128, False, torch.float32, quant_type="nf4")
        linear.weight = quantised(weight)
    else:
        linear = nn.Linear(64, 128, bias=False)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model = get_peft_model(
        nn.ModuleDict({"linear": linear}), LoraConfig(r=4, target_modules=["linear"])
    )
    found = model.base_model.model["linear"]
    nn.init.normal_(found.lora_B["default"].weight)
    return model, found


@pytest.mark.parametrize("four_bit", [False, True], ids=["16 bit", "4 bit"])
def test_a_weight_that_is_replaced_is_the_one_that_computes(four_bit: bool) -> None:
    first, second = torch.randn(2, 128, 64)
    x = torch.randn(5, 64, requires_grad=True)
    model, fused = layer(first, four_bit=four_bit)
    assert fuse_lora(model) == []
    before = fused(x)
    fused.base_layer.weight = (
        quantised(second) if four_bit else nn.Parameter(second.clone(), requires_grad=False)
    )
    after = fused(x)
    (gradient,) = torch.autograd.grad(after.square().sum(), x)
    _, plain = layer(second, four_bit=four_bit)
    wanted = plain(x)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, wanted, atol=1e-5)
    assert torch.allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-3)


def test_a_weight_that_is_replaced_before_the_backward_pass_is_used_there() -> None:
    """As a weight that was sharded away meanwhile is: the operation keeps no tensor of it."""
    weight, x = torch.randn(128, 64), torch.randn(5, 64, requires_grad=True)
    model, fused = layer(weight, four_bit=True)
    fuse_lora(model)
    y = fused(x)
    fused.base_layer.weight = quantised(torch.zeros(128, 64))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    a, b = fused.lora_A["default"].weight, fused.lora_B["default"].weight
    assert torch.allclose(
        gradient, (torch.ones(5, 128) @ b @ a) * fused.scaling["default"], atol=1e-4
    )


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_few_rows_without_a_gradient_take_the_fused_kernel(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the same layer computes them for training; one row more is dequantised for."""
    weight, x = torch.randn(128, 64), torch.randn(rows, 64)
    model, fused = layer(weight, four_bit=True)
    fuse_lora(model)
    fused.base_layer.bias = nn.Parameter(torch.randn(128), requires_grad=False)
    expected = fused(x).detach()
    calls, honest = [], bnb.matmul_4bit
    monkeypatch.setattr(
        bnb, "matmul_4bit", lambda *args, **kwargs: calls.append(args) or honest(*args, **kwargs)
    )
    with torch.no_grad():
        found = fused(x)
    assert len(calls) == (rows <= FEW_ROWS)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_head_that_is_replaced_is_the_one_that_scores() -> None:
    module = nn.Linear(8, 32, bias=False).requires_grad_(False)
    head, hidden, rows, targets = Head(module), torch.randn(4, 8), torch.arange(4), torch.arange(4)
    before = row_logps(hidden, rows, targets, head, 2)
    module.weight = nn.Parameter(torch.randn(32, 8), requires_grad=False)
    wanted = torch.log_softmax(hidden @ module.weight.T, -1)[rows, targets]
    assert not torch.allclose(before, wanted)
    assert torch.allclose(row_logps(hidden, rows, targets, head, 2), wanted, atol=1e-5)
