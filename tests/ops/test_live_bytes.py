"""Bytes: what a step holds, on meta as on the CPU; the one way to host memory; half precision against TRL's."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ragged_pairs, tiny_llama, write_base
from test_memory import recipe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.step import storages
from orpo_lite.base.find import fetch_weights, find_base
from orpo_lite.data.packing import Batching, make_batch, micro_batches, pack_pairs, pad_pairs
from orpo_lite.model.load import bare_pair_model, load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.probe import probe
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.ops.attention import BACKENDS
from orpo_lite.ops.devices import HOST, is_on_host, transfer
from orpo_lite.ops.head import Head, row_logps
from orpo_lite.ops.layers import HostStore
from orpo_lite.ops.segments import AttentionOptions, Segment
from orpo_lite.planning.meter import LiveBytes
from orpo_lite.recipe.schema import Recipe

CPU, META = torch.device("cpu"), torch.device("meta")


def on_base(folder: Path, **memory: Any) -> Recipe:
    return recipe(**memory).override({"model.model_name_or_path": str(folder)})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", tiny_llama(98, num_hidden_layers=4))


def load(folder: Path, **memory: Any) -> PairModel:
    return load_pair_model(
        on_base(folder, **memory), fetch_weights(find_base(str(folder), "main")), CPU
    )


# --- counting


def test_live_bytes_follow_storages_not_tensors() -> None:
    weight = torch.zeros(256, 256)
    with LiveBytes([weight]) as tracker:
        doubled = weight * 2
        view = doubled[3:]  # no storage of its own
        weight.t()
        assert tracker.live == 256 * 256 * 4
        small = torch.ones(3)  # 12 bytes, one block of the allocator
        assert tracker.live == 256 * 256 * 4 + 512
        del doubled
        assert tracker.live == 256 * 256 * 4 + 512  # the view keeps it
        del view, small
        assert tracker.live == 0
    assert tracker.peak == 256 * 256 * 4 + 512


def test_what_would_be_in_host_memory_is_counted_apart_on_meta() -> None:
    tensor = torch.empty(1024, device=META)
    with LiveBytes([tensor]) as tracker:
        host = transfer(tensor, HOST)
        assert (tracker.live, tracker.host) == (0, 4096)
        assert is_on_host(host)
        assert not is_on_host(tensor)
        back = transfer(host, META)
        assert (tracker.live, tracker.host) == (4096, 4096)
        assert not is_on_host(back)
        assert transfer(back, META) is back
        del host
        assert tracker.host == 0
        assert tracker.host_peak == 4096


def backward_bytes(backend: str, lengths: list[int], heads: int, shared: int, width: int) -> int:
    """The most that attention's backward pass holds besides what was there before."""
    ends = [0, *itertools.accumulate(lengths)]
    segments = [Segment(*place) for place in itertools.pairwise(ends)]
    sizes = ((number, ends[-1], width) for number in (heads, shared, shared))
    qkv = [
        torch.empty(1, *size, dtype=torch.bfloat16, device=META, requires_grad=True)
        for size in sizes
    ]
    out = BACKENDS[backend](*qkv, segments, AttentionOptions(1.0, None, None))
    grad = torch.empty_like(out)
    with LiveBytes([*qkv, out, grad]) as tracker:
        torch.autograd.grad(out, qkv, grad)
    return tracker.peak


@pytest.mark.parametrize(
    ("heads", "shared", "width", "wide"), [(32, 8, 128, 128), (8, 8, 72, 96), (16, 2, 160, 192)]
)
def test_flash_attentions_workspace_is_that_of_its_source(
    heads: int, shared: int, width: int, wide: int
) -> None:
    """By mha_varlen_bwd: dq, dk, dv; softmax_d; dq_accum; dk_expanded and dv_expanded where heads are shared."""
    lengths = [128, 640, 128, 256]
    tokens = sum(lengths)
    rows = tokens + 128 * len(lengths)
    returned = 2 * tokens * width * (heads + 2 * shared)
    expanded = 2 * 2 * tokens * heads * width * (heads != shared)
    expected = returned + 4 * heads * rows + 4 * rows * heads * wide + expanded
    for backend in ("varlen", "flash_attn"):
        assert backward_bytes(backend, lengths, heads, shared, width) == expected
    # The memory-efficient kernel pads its sums alone, and to no more than twice their rows.
    one, eight = (
        backward_bytes("efficient", segments, heads, shared, width)
        for segments in ([1024], [128] * 8)
    )
    sums = 4 * 1024 * heads * width * (3 if width > 64 else 1)
    assert eight - one == sums


def test_a_deterministic_workspace_is_enough_for_any_gpu_and_number_of_segments() -> None:
    heads, width, tokens = 4, 64, 1024
    torch.use_deterministic_algorithms(True)
    try:
        counted = backward_bytes("varlen", [128] * 8, heads, heads, width)
    finally:
        torch.use_deterministic_algorithms(False)
    most = 0
    for segments, multiprocessors in itertools.product(range(1, 9), (40, 108, 132, 188)):
        splits = -(-multiprocessors // (segments * heads))
        most = max(most, 4 * splits * (tokens + 128 * segments) * heads * width)
    returned = 3 * 2 * tokens * heads * width + 4 * heads * (tokens + 128 * 8)
    assert most + returned <= counted <= 1.1 * (most + returned)


def test_on_a_cpu_nothing_needs_to_be_moved() -> None:
    tensor = torch.ones(3)
    assert transfer(tensor, HOST) is tensor
    store = HostStore()
    x = torch.ones(4, requires_grad=True)
    with store.saving():
        y = (x * 3).square()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((4,), 18.0))


MEMORY_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpoints": {"activation_checkpointing": "none"},
    "some checkpoints": {"activation_checkpointing": 2},
    "tiles": {"mlp_tile": 64},
    "plain LoRA": {"fused_lora": False},
    "one chunk": {"head_chunk": 16},
    "no sharing": {"prompt_sharing": False},
}


@pytest.mark.parametrize("backend", ["varlen", "flash_attn", "efficient", "sdpa"])
def test_a_back_end_of_a_gpu_declares_on_meta_what_it_keeps(backend: str) -> None:
    """Queries, keys (each prefix once more), values, output, one number a query and head; never the scores."""
    heads, length, size = 8, 1_000, 16
    segments = (Segment(0, 600), Segment(600, 1_000, 0, 200))
    q, k, v = (
        torch.empty(1, heads, length, size, device=META, requires_grad=True) for _ in range(3)
    )
    with LiveBytes([q, k, v]) as tracker:
        out = BACKENDS[backend](q, k, v, segments, AttentionOptions(0.25, None, None))
        kept = tracker.live
        out.sum().backward()
    tensor = heads * length * size * 4
    assert out.shape == q.shape
    assert 2.4 * tensor < kept < 5 * tensor  # two with the prefix again, and the output
    assert tracker.peak < 12 * tensor < heads * length * length * 4
    assert q.grad is not None


@pytest.mark.parametrize("memory_settings", MEMORY_SETTINGS.values(), ids=MEMORY_SETTINGS)
def test_the_meta_device_counts_what_a_cpu_holds(
    base: Path, memory_settings: dict[str, Any]
) -> None:
    """The same step on weights and without: equal peaks within 2%, for a planner that needs no weights."""
    settings = on_base(base, **memory_settings)
    pairs = ragged_pairs(12, vocab_size=98)
    peaks = []
    for model in (
        load(base, **memory_settings),
        bare_pair_model(settings, find_base(str(base), "main").config, torch.float32),
    ):
        for _, parameter in model.trained():
            parameter.grad = torch.zeros_like(parameter)
        batching = model.batching(settings, pad_id=0)
        batch = make_batch(pairs, batching).to(model.device)
        with LiveBytes(
            [
                *storages(model),
                batch.input_ids_T,
                batch.position_ids_T,
                batch.rows_N,
                batch.targets_N,
            ]
        ) as on:
            loss, _ = orpo_loss(model(batch), Divisors(12, 100), beta=0.1)
            loss.backward()
        peaks.append(on.peak)
    assert peaks[0] > 1e5
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)


def test_each_memory_setting_saves_what_it_is_for(base: Path) -> None:
    config = find_base(str(base), "main").config
    pairs = ragged_pairs(12, vocab_size=98)

    def tracked(**memory_settings: Any) -> LiveBytes:
        settings = on_base(base, **memory_settings)
        model = bare_pair_model(settings, config, torch.float32)
        batch = make_batch(pairs, model.batching(settings, pad_id=0)).to(META)
        with LiveBytes(storages(model)) as on:
            orpo_loss(model(batch), Divisors(12, 100), beta=0.1)[0].backward()
        return on

    peaks = [tracked(activation_checkpointing=amount).peak for amount in ("none", 1, 2, 3, "all")]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.5 * peaks[0]
    default = tracked()
    assert tracked(prompt_sharing=False).peak > 1.1 * default.peak
    assert tracked(fused_lora=False).peak > 1.05 * default.peak
    assert tracked(mlp_tile=32).peak < default.peak
    offloaded = tracked(checkpoint_offload=True)
    assert offloaded.peak < default.peak
    assert offloaded.host_peak >= 4 * sum(len(p.chosen_ids) for p in pairs) * 64 * 4
    assert default.host_peak == 0


def test_a_model_on_meta_leaves_no_meta_table_in_bitsandbytes(base: Path) -> None:
    bare_pair_model(on_base(base), find_base(str(base), "main").config, torch.bfloat16)
    assert load(base).device == CPU  # it quantises with the table that bitsandbytes keeps


def test_the_head_never_holds_a_tensor_of_tokens_by_vocabulary() -> None:
    module = nn.Linear(16, 5_000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(2_000, 16, dtype=torch.bfloat16, requires_grad=True)
    index = torch.arange(2_000)
    for trained in (False, True):  # the fallback of a trained head too
        module.requires_grad_(trained)
        with LiveBytes([module.weight, hidden, index]) as tracker:
            row_logps(hidden, index, index, Head(module), 64).sum().backward()
        assert tracker.peak < 2_000 * 5_000 * 2 / 2


# --- half precision


def figures(model: PairModel, batching: Batching, pairs: Any) -> Tensor:
    with model.evaluating():
        rows = []
        for chunk in micro_batches(pairs, batching):
            found = model(make_batch([pairs[i] for i in chunk], batching))
            nll = found.nll_P / found.nll_tokens_P
            rows += zip(
                chunk, torch.stack([found.chosen_P, found.rejected_P, nll], 1).tolist(), strict=True
            )
    return torch.tensor([values for _, values in sorted(rows)], dtype=torch.float64)


def test_bfloat16_is_as_exact_as_trl(base: Path) -> None:
    """Error of log-probabilities against float32, over 256 pairs: ours no larger than TRL's own code on the model."""
    trl = pytest.importorskip(
        "trl.experimental.orpo", reason="TRL, the oracle, comes with the extra `bench`"
    )
    pairs = ragged_pairs(256, vocab_size=98, seed=4)
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    padded = Batching(False, False, 0, 256, 0, False)
    expected = figures(PairModel(exact), padded, pairs)
    ours = figures(PairModel(rounded), Batching(True, True, 400, None, 0, False), pairs)
    batch = pad_pairs(pairs, pad_id=0, completion_only_loss=False)
    with torch.no_grad():
        logits = rounded(input_ids=batch.input_ids_RT, attention_mask=batch.attention_RT).logits
    labels = batch.input_ids_RT.masked_fill(~batch.response_RT, -100)
    means = trl.ORPOTrainer.get_batch_logps(logits.float(), labels, average_log_prob=True)
    theirs = torch.stack([means[:256], means[256:]], 1).double()
    error, bound = (
        (found - expected[:, :2]).square().mean().sqrt() for found in (ours[:, :2], theirs)
    )
    assert 1e-4 < bound < 0.1
    assert (
        error <= 1.05 * bound
    )  # 0.97 to 1.02 over sets of pairs: the same roundings in another order


def test_the_proof_accepts_bfloat16_on_a_4_bit_base(base: Path) -> None:
    settings = on_base(base).override({"model.dtype": "bfloat16"})
    model = load_pair_model(settings, fetch_weights(find_base(str(base), "main")), CPU)
    probe(model, 256)
    assert (model.route, model.notes) == ("shared", [])


def test_the_proof_knows_that_4_bit_products_may_be_coarser_than_the_stream(base: Path) -> None:
    settings = on_base(base).override(
        {"model.dtype": "float32", "quantization.bnb_4bit_compute_dtype": "bfloat16"}
    )
    model = load_pair_model(settings, fetch_weights(find_base(str(base), "main")), CPU)
    probe(model, 256)
    assert model.route == "shared", model.notes


def test_a_packed_evaluation_changes_no_bit_of_training(base: Path) -> None:
    """NF4, all memory settings, dropout: a step, an evaluation, the step again."""
    memory_settings = {"mlp_tile": 32, "checkpoint_offload": True, "head_chunk": 16}
    settings = on_base(base, **memory_settings).override({"lora.lora_dropout": 0.3})
    model = load_pair_model(settings, fetch_weights(find_base(str(base), "main")), CPU)
    batch = pack_pairs(ragged_pairs(5, vocab_size=98), completion_only_loss=False, share=True)

    def step() -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        loss, _ = orpo_loss(model(batch), Divisors(5, 100), beta=0.1)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for _, p in model.trained() if p.grad is not None)]

    before = step()
    with model.evaluating():
        first, second = model(batch), model(batch)
    assert torch.equal(first.chosen_P, second.chosen_P)
    assert all(torch.equal(a, b) for a, b in zip(before, step(), strict=True))
    assert all(math.isfinite(value) for value in first.nll_P.tolist())
