"""What only a GPU shows: its attention kernels, streams to host memory, and that its memory settings change nothing."""

from typing import Any

import pytest
import torch
from conftest import ragged_pairs, tiny_llama
from test_memory import SEGMENTS, recipe
from torch import Tensor

from orpo_lite.data.packing import make_batch
from orpo_lite.model.load import bare_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.probe import probe
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.ops.attention import BACKENDS, choose_backend, flash_attn
from orpo_lite.ops.segments import AttentionOptions

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(CUDA)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["varlen", "flash_attn", "efficient", "sdpa"])
def test_a_kernel_equals_the_formula(backend: str, window: int | None) -> None:
    """bfloat16 against float32 maths on the same rounded inputs: forward and gradients, prefix and groups too."""
    if backend == "flash_attn" and flash_attn() is None:
        pytest.skip("flash-attn is not installed")
    query, key, value = (drawn(1, heads, 24, 64, seed=heads).bfloat16() for heads in (8, 2, 2))
    value = drawn(1, 2, 24, 64, seed=3).bfloat16()
    results = []
    for name, dtype in ((backend, torch.bfloat16), ("maths", torch.float32)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        out = BACKENDS[name](*inputs, SEGMENTS, AttentionOptions(0.125, window, None))  # type: ignore[call-arg,arg-type]
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
        results.append([out.float(), *(grad.float() for grad in grads)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


def built(dtype: torch.dtype = torch.bfloat16, **memory: Any) -> PairModel:
    torch.manual_seed(0)
    config = tiny_llama(98, num_hidden_layers=4).config
    model = bare_pair_model(recipe(**memory), config, dtype, CUDA)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(CUDA), alpha=0.05)
    return model


def step(model: PairModel, **memory: Any) -> tuple[Tensor, Tensor]:
    settings = recipe(**memory)
    batch = make_batch(ragged_pairs(8, vocab_size=98), model.batching(settings, pad_id=0)).to(CUDA)
    model.zero_grad(set_to_none=True)
    loss, _ = orpo_loss(model(batch), Divisors(8, 100), beta=0.5)
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for _, parameter in model.trained()])  # type: ignore[union-attr]


MEMORY_SETTINGS: dict[str, dict[str, Any]] = {
    "offload": {"checkpoint_offload": True},
    "tiles": {"mlp_tile": 64},
    "embedding": {"embedding_on_cpu": True},
    "no checkpoints": {"activation_checkpointing": "none"},
    "all": {"checkpoint_offload": True, "mlp_tile": 64, "embedding_on_cpu": True, "head_chunk": 16},
}


@pytest.mark.parametrize("setting", MEMORY_SETTINGS)
def test_a_memory_setting_changes_nothing_but_roundings(setting: str) -> None:
    loss, gradient = step(built())
    found = [
        step(built(**MEMORY_SETTINGS[setting]), **MEMORY_SETTINGS[setting]) for _ in range(2)
    ]  # twice: a race would differ
    for other, grads in found:
        assert abs(other - loss) < 0.01 * loss.abs()
        assert (grads - gradient).norm() < 0.05 * gradient.norm()
    assert (found[0][1] - found[1][1]).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_passes_on_a_gpu(dtype: torch.dtype) -> None:
    model = built(dtype)
    probe(model, 256)
    assert (model.route, model.notes) == ("shared", [])


def test_a_softcap_is_kept() -> None:
    """By flash-attn where it is installed, else by the formula."""
    query, key, value = (drawn(1, heads, 24, 64, seed=heads).bfloat16() for heads in (8, 2, 2))
    options = AttentionOptions(0.125, None, 5.0)
    name = choose_backend(query, value, 5.0)
    found = BACKENDS[name](query, key, value, SEGMENTS, options)  # type: ignore[arg-type]
    expected = BACKENDS["maths"](query.float(), key.float(), value.float(), SEGMENTS, options)  # type: ignore[arg-type]
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_an_evaluation_in_between_changes_no_bit() -> None:
    model = built()
    torch.use_deterministic_algorithms(True)
    try:
        loss, gradient = step(model)
        with model.evaluating():
            model(
                make_batch(ragged_pairs(4, vocab_size=98), model.batching(recipe(), pad_id=0)).to(
                    CUDA
                )
            )
        other, again = step(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, other)
    assert torch.equal(gradient, again)
