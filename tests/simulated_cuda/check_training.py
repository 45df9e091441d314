"""Whole trainings on the simulated device: with each setting of memory, as on a T4, killed and resumed, merged."""

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import simulated_cuda
import torch
from accelerate import PartialState
from conftest import Answer, first_and_long, tiny_llama, write_base
from test_loop import train_all
from test_resume import go_on, same_bits, stop_at
from torch.nn.attention.varlen import varlen_attn

from orpo_lite.api import verify
from orpo_lite.merging.merge import merge
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update

Build = Callable[..., Recipe]
EVERYTHING = "mlp_tile=64 checkpoint_offload=true embedding_on_cpu=true head_chunk=16 activation_checkpointing=all"
SETTINGS = {
    "everything": EVERYTHING,
    "offload": "checkpoint_offload=true activation_checkpointing=all",
    "tiles": "mlp_tile=64",
    "embedding on the host": "embedding_on_cpu=true",
    "no checkpoints": "activation_checkpointing=none",
    "some checkpoints": "activation_checkpointing=1",
    "padded rows": "packing=false micro_batch_size=2",
    "nothing shared": "prompt_sharing=false",
    "logits of all tokens": "head_chunk=none",
    "plain LoRA": "fused_lora=false",
}
FAST = "training.learning_rate=1e-2"


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bfloat16, no FlashAttention."""
    monkeypatch.setattr(simulated_cuda, "capability", (7, 5))


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of memory are those that are given: planning takes longer than all the rest."""

    def choose(recipe: Recipe, *_: Any) -> Iterator[Update]:
        return recipe.with_memory({"micro_batch_tokens": 200}), {}
        yield

    monkeypatch.setattr("orpo_lite.api.choose_memory", choose)


def bad(updates: list[Update]) -> list[str]:
    """The notes of what is given up: a slower route, answers, the card."""
    said = [update.text for update in updates if update.kind == "note"]
    return [
        text
        for text in said
        if re.search("because|not |out of memory", text) and "detected" not in text
    ]


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("name", first_and_long(SETTINGS))
def test_a_training_learns_and_answers_with_each_setting_of_memory(
    name: str, small_recipe: Build
) -> None:
    updates, result = train_all(
        small_recipe(FAST, *(f"memory.{word}" for word in SETTINGS[name].split()))
    )
    device = "training on NVIDIA GeForce RTX 4090 (cuda:0, 24.0 GiB, compute capability 9.0)"
    assert [update.text for update in updates if update.text.startswith("training on")] == [device]
    assert bad(updates) == []
    assert result.after["eval_loss"] < 0.98 * result.before["eval_loss"]
    assert len(result.samples) == 2
    assert read_lock(result.run)["dtype"] == "bfloat16"


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("name", first_and_long(["offload", "everything", "padded rows"]))
def test_a_t4_trains_in_float16_with_a_scaled_loss(
    name: str, t4: None, small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first scales are too large for float16: such a step is left out, and the scale falls."""
    scales = []
    update = torch.amp.GradScaler.update

    def noted(scaler: Any, *given: Any) -> None:
        update(scaler, *given)
        scales.append(scaler.get_scale())

    monkeypatch.setattr(torch.amp.GradScaler, "update", noted)
    updates, result = train_all(
        small_recipe(FAST, *(f"memory.{word}" for word in SETTINGS[name].split()))
    )
    assert "compute capability 7.5" in updates[0].text
    assert bad(updates) == []
    assert scales
    assert min(scales) > 1
    assert read_lock(result.run)["dtype"] == "float16"
    assert result.after["eval_loss"] < 0.98 * result.before["eval_loss"]
    assert len(result.samples) == 2


PAGED = (
    "lora.r=1024",
    "lora.target_modules=up_proj,down_proj",
    "output.samples=0",
)  # as large as states are paged


@pytest.mark.long
@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(
    capability: tuple[int, int], small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states are paged; with a scaled loss it goes on at the same scale."""
    monkeypatch.setattr(simulated_cuda, "capability", capability)
    paged = []
    get_paged = bitsandbytes.functional.get_paged

    def noted(*shape: int, **options: Any) -> torch.Tensor:
        paged.append(shape)
        return get_paged(*shape, **options)

    monkeypatch.setattr(bitsandbytes.functional, "get_paged", noted)
    whole = train_all(small_recipe(*PAGED, "training.output_dir=whole"))[1].run
    assert paged
    stopped = stop_at(2, small_recipe(*PAGED))
    assert same_bits(whole, go_on(stopped)[1].run)


@pytest.mark.long
@pytest.mark.usefixtures("unplanned")
def test_the_second_of_two_devices_is_chosen(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is there: the first one has no byte of it at any time."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
    PartialState._reset_state()
    gc.collect()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    try:
        updates, result = train_all(
            small_recipe(FAST, "memory.checkpoint_offload=true", "memory.embedding_on_cpu=true")
        )
    finally:
        PartialState._reset_state()
    assert "(cuda:1," in updates[0].text
    assert bad(updates) == []
    assert result.after["eval_loss"] < result.before["eval_loss"]
    assert len(result.samples) == 2
    assert torch.cuda.max_memory_allocated(0) == before
    assert torch.cuda.max_memory_allocated(1) > 0


@pytest.mark.long
@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_merged_is_what_was_trained(
    dtype: torch.dtype, small_recipe: Build, workspace: Path
) -> None:
    """On both bases; and merging takes no memory of the device."""
    write_base(workspace / "base", tiny_llama(99).to(dtype))
    _, result = train_all(small_recipe(FAST))
    for weights in ("original", "dequantized"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        merge(result.run, weights=weights)
        assert torch.cuda.max_memory_allocated() == before
        verdict = verify(result.run, weights=weights)
        assert verdict.passed, verdict.explanation
        assert torch.cuda.max_memory_allocated() > before


@pytest.mark.long
@pytest.mark.parametrize("budget", ["auto", "1GiB"])
def test_a_training_is_planned_by_the_gpu(
    budget: str, small_recipe: Build, call: Callable[..., Answer]
) -> None:
    """What it takes at its peak is no more than the plan says; a tenth of a GPU is refused before weights load."""
    recipe = small_recipe(f"memory.budget={budget}", "output.samples=0", "training.max_steps=2")
    updates, result = train_all(recipe)
    assert bad(updates) == []
    plan = read_json(result.run / "plan.json")
    assert 0 < torch.cuda.max_memory_allocated() < plan["needed_bytes"]
    code, said, complaint = call("plan", "--recipe", "./small.yaml")
    assert code == 0, complaint
    assert "4090" in said


@pytest.mark.long
def test_kernels_of_attention_are_the_formula(t4: None) -> None:
    """Efficient attention over sequences one after another, causal from the lower right: values and gradients."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, 4, 16, generator=generator).to("cuda", torch.float16) for n in (9, 13, 13)
    )
    starts_q, starts_k = (
        torch.tensor(starts, dtype=torch.int32, device="cuda") for starts in ([0, 4, 9], [0, 4, 13])
    )
    run, back = (
        torch.ops.aten._efficient_attention_forward,
        torch.ops.aten._efficient_attention_backward,
    )
    rows = (starts_q, starts_k, 5, 9)
    out, sums, *state, _, _ = run(query, key, value, None, *rows, 0.0, 2, True, scale=0.25)
    grad = torch.ones_like(out)
    found = back(
        grad, query, key, value, None, out, *rows, sums, 0.0, *state, 2, False, scale=0.25
    )[:3]
    inputs = [tensor.cpu().float().requires_grad_() for tensor in (query, key, value)]
    expected = []
    for of_queries, of_keys in ((slice(0, 4), slice(0, 4)), (slice(4, 9), slice(4, 13))):
        q, k, v = (
            t[:, rows].transpose(1, 2)
            for t, rows in zip(inputs, (of_queries, of_keys, of_keys), strict=True)
        )
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(
            k.shape[2] - q.shape[2] + 1
        )
        scores = (q @ k.transpose(2, 3) * 0.25).masked_fill(hidden, -torch.inf)
        assert torch.allclose(
            sums[len(expected), :, : q.shape[2]].cpu(), scores.logsumexp(-1)[0], atol=1e-2
        )
        expected.append((scores.softmax(-1) @ v).transpose(1, 2))
    whole = torch.cat(expected, 1)
    assert torch.allclose(out.cpu().float(), whole, atol=1e-2)
    for one, other in zip(found, torch.autograd.grad(whole.sum(), inputs), strict=True):
        assert torch.allclose(one.cpu().float(), other, atol=1e-2)
    with pytest.raises(AssertionError, match="int32"):
        run(query, key, value, None, starts_q.long(), *rows[1:], 0.0, 2, True, scale=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_4_bit_product_is_that_of_the_dequantised_weights(dtype: torch.dtype) -> None:
    """Few rows without a gradient: bitsandbytes' own way for decoding."""
    functional = bitsandbytes.functional
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    expected = x @ functional.dequantize_4bit(packed, state).t()
    bound = 0.01 * expected.norm()
    out = torch.empty_like(expected)
    functional.gemv_4bit(x, packed.t(), out=out, state=state)
    for found in (
        out,
        functional.gemv_4bit(x, packed.t(), state=state),
        bitsandbytes.matmul_4bit(x, packed.t(), state),
    ):
        assert found.is_cuda
        assert (found - expected).norm() < bound


def test_what_cuda_refuses_is_refused() -> None:
    """Else none of these checks would mean anything."""
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="on the same device"):
        here + there
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.nn.functional.linear(torch.ones(2, 3, device="cuda"), torch.ones(4, 3))
    with pytest.raises(NotImplementedError, match="record_stream"):
        here.record_stream(torch.cuda.current_stream())
    query = torch.ones(4, 2, 16, device="cuda")
    starts = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        varlen_attn(query, query, query, starts, starts, 4, 4)
    assert torch.empty(3, pin_memory=True).is_pinned()
    size = 1 << 20
    before = torch.cuda.memory_allocated()
    held = torch.empty(size, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4 * size
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
    del held
    assert torch.cuda.memory_allocated() == before
