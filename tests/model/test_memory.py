"""Every setting of ``memory`` alone and together: the same loss and the same gradient as separate plain sequences."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import in_float64, ragged_pairs, tiny_llama, tiny_opt
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import gradcheck

from orpo_lite.data.packing import (
    Batching,
    make_batch,
    micro_batches,
    nll_tokens,
    pack_pairs,
    packed_tokens,
)
from orpo_lite.data.pair import TokenizedPair, common_prefix
from orpo_lite.model.memory import apply_memory_settings
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.score_head import add_score_head
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.ops import blockwise_attention, layers
from orpo_lite.ops.attention import BACKENDS, choose_backend
from orpo_lite.ops.blockwise_attention import _blocks
from orpo_lite.ops.head import Head, packed_logps, pick, row_logps
from orpo_lite.ops.lora import frozen_weight, lora_linear
from orpo_lite.ops.segments import AttentionOptions, Segment
from orpo_lite.recipe.schema import Recipe

PLAIN = {
    "packing": False,
    "prompt_sharing": False,
    "head_chunk": "none",
    "fused_lora": False,
    "activation_checkpointing": "none",
}


def recipe(**memory: Any) -> Recipe:
    tree = {
        "model": {"model_name_or_path": "none"},
        "data": {"dataset_name": "none"},
        "memory": memory,
    }
    return Recipe.model_validate(tree)


def build(
    make: Callable[[], Any] = tiny_llama,
    dropout: float = 0.0,
    task: str = "CAUSAL_LM",
    **memory: Any,
) -> PairModel:
    """A float64 toy with a drawn adapter and these memory settings; the same weights at every call."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type=task, lora_dropout=dropout
    )
    base = make()
    if task == "SEQ_CLS":
        add_score_head(base, seed=0)
    torch.manual_seed(1)
    model = in_float64(get_peft_model(base, config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found = PairModel(model, recipe(**memory).memory).train()
    apply_memory_settings(found, recipe(**memory))
    return found


def step(
    model: PairModel,
    pairs: list[TokenizedPair],
    seed: int = 0,
    completion_only: bool = False,
    **memory: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-probabilities (2, P) in the order of ``pairs``, and the flat gradient of one optimizer step."""
    batching = Batching(
        packed=memory.get("packing", True),
        share=memory.get("packing", True) and memory.get("prompt_sharing", True),
        tokens=memory.get("micro_batch_tokens", 200),
        pairs=memory.get("micro_batch_size"),
        pad_id=0,
        completion_only_loss=completion_only,
    )
    divisors = Divisors(
        len(pairs), sum(nll_tokens(pair, completion_only_loss=completion_only) for pair in pairs)
    )
    model.zero_grad(set_to_none=True)
    total, logps = (
        torch.zeros((), dtype=torch.float64),
        torch.zeros(2, len(pairs), dtype=torch.float64),
    )
    torch.manual_seed(seed)
    for chunk in micro_batches(pairs, batching):
        found = model(make_batch([pairs[index] for index in chunk], batching))
        loss, _ = orpo_loss(found, divisors, beta=0.5)
        loss.backward()
        total += loss.detach()
        logps[:, chunk] = torch.stack([found.chosen_P, found.rejected_P]).detach().double()
    gradient = torch.cat([parameter.grad.flatten() for _, parameter in model.trained()])  # type: ignore[union-attr]
    return total, logps, gradient


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bound: float = 1e-12) -> bool:
    return all((a - b).norm() <= bound * b.norm() for a, b in zip(found, expected, strict=True))


MEMORY_SETTINGS: dict[str, dict[str, Any]] = {
    "head in chunks of one": {"packing": True, "head_chunk": 1},
    "head in chunks": {"packing": True, "head_chunk": 7},
    "packing": {"packing": True},
    "sharing": {"packing": True, "prompt_sharing": True},
    "fused LoRA": {"fused_lora": True},
    "one layer checkpointed": {"activation_checkpointing": 1},
    "checkpoints": {"activation_checkpointing": "all"},
    "checkpoints in host memory": {"activation_checkpointing": "all", "checkpoint_offload": True},
    "tiles": {"mlp_tile": 5},
    "tiles in checkpoints": {"mlp_tile": 5, "activation_checkpointing": "all"},
    "embedding in host memory": {"embedding_on_cpu": True},
    "all": {
        "packing": True,
        "prompt_sharing": True,
        "head_chunk": 7,
        "fused_lora": True,
        "activation_checkpointing": "all",
        "checkpoint_offload": True,
        "mlp_tile": 5,
        "embedding_on_cpu": True,
    },
}


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("setting", MEMORY_SETTINGS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_a_memory_setting_changes_neither_loss_nor_gradient(
    make: Callable[[], Any], setting: str, completion_only: bool
) -> None:
    pairs = ragged_pairs(8)
    expected = step(build(make, **PLAIN), pairs, completion_only=completion_only, **PLAIN)
    memory_settings = PLAIN | MEMORY_SETTINGS[setting]
    assert expected[2].norm() > 0.1
    assert same(
        step(
            build(make, **memory_settings),
            pairs,
            completion_only=completion_only,
            **memory_settings,
        ),
        expected,
    )


@pytest.mark.parametrize(
    "setting", ["checkpoints", "tiles", "tiles in checkpoints", "checkpoints in host memory"]
)
def test_dropout_is_rewound(setting: str) -> None:
    """The second run of a layer, or of a tile, draws the masks of its first."""
    memory_settings = PLAIN | MEMORY_SETTINGS[setting]
    model, pairs = build(dropout=0.3, **memory_settings), ragged_pairs(4)
    loss, _, gradient = step(model, pairs, seed=3, **memory_settings)
    name, parameter = model.trained()[1]  # a B: numerically, with the same seed
    index, change = (2, 1), 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            parameter[index] += sign * change
        moved = step(model, pairs, seed=3, **memory_settings)[0]
        with torch.no_grad():
            parameter[index] -= sign * change
        loss = moved if sign == 1 else loss - moved
    offset = sum(p.numel() for n, p in model.trained()[:1])
    place = offset + index[0] * parameter.shape[1] + index[1]
    assert name.endswith("lora_B.default.weight")
    assert (loss / (2 * change)).item() == pytest.approx(gradient[place].item(), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_step_gives_one_gradient(data: st.DataObject) -> None:
    """Whatever the order, the token budget, the pairs a pass, the chunk, the tile, the number of checkpoints."""
    pairs = ragged_pairs(6, seed=data.draw(st.integers(0, 5)))
    expected = step(build(**PLAIN), pairs, **PLAIN)
    order = data.draw(st.permutations(range(len(pairs))))
    memory_settings: dict[str, Any] = {
        "micro_batch_tokens": data.draw(st.integers(1, 300)),
        "micro_batch_size": data.draw(st.none() | st.integers(1, 6)),
        "prompt_sharing": data.draw(st.booleans()),
        "head_chunk": data.draw(st.integers(1, 100)),
        "mlp_tile": data.draw(st.none() | st.integers(1, 60)),
        "activation_checkpointing": data.draw(st.integers(0, 2)),
        "checkpoint_offload": data.draw(st.booleans()),
        "fused_lora": data.draw(st.booleans()),
    }
    loss, logps, gradient = step(
        build(**memory_settings), [pairs[index] for index in order], **memory_settings
    )
    assert same((loss, logps, gradient), (expected[0], expected[1][:, list(order)], expected[2]))


# --- packing


EDGES = {
    "one token each": ([1, 5, 6, 9], [1, 5, 6, 8], 3, 3),
    "a prompt of one token": ([1, 7, 8, 2], [1, 9, 2], 1, 1),
    "chosen begins rejected": ([1, 5, 6, 7], [1, 5, 6, 7, 8, 9], 2, 2),
    "rejected begins chosen": ([1, 5, 6, 7, 8, 9, 2], [1, 5, 6, 7], 2, 2),
    "identical openings": ([1, 5, 6, 7, 8, 3, 2], [1, 5, 6, 7, 8, 4, 4, 2], 2, 2),
    "nothing shared": ([4, 5, 6, 2], [3, 5, 7, 8, 2], 2, 2),
    "no prompt": ([5, 6, 2], [7, 6, 8, 2], 0, 0),
    "a token across the boundary": ([1, 5, 17, 8, 2], [1, 5, 18, 3, 2], 3, 3),
    "boundaries apart": ([1, 5, 6, 17, 8, 2], [1, 5, 6, 4, 18, 3, 2], 4, 3),
}


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str, share: bool, completion_only: bool) -> None:
    chosen, rejected, chosen_start, rejected_start = EDGES[edge]
    pair = TokenizedPair(chosen, rejected, chosen_start, rejected_start, edge)  # type: ignore[arg-type]
    neighbours = ragged_pairs(2, seed=9)
    pairs = [neighbours[0], pair, neighbours[1]]
    expected = step(build(**PLAIN), pairs, completion_only=completion_only, **PLAIN)
    assert same(
        step(build(), pairs, completion_only=completion_only, prompt_sharing=share), expected
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_packed_row_scores_what_separate_sequences_score(data: st.DataObject) -> None:
    """Each scored row sees, through its segment, exactly the tokens before its target in one of the sequences."""
    few = st.lists(
        st.integers(1, 3), min_size=1, max_size=8
    )  # few ids: prefixes and equal openings are frequent
    pairs = []
    for _ in range(data.draw(st.integers(1, 4))):
        chosen, rejected = (
            data.draw(few.filter(lambda x: len(x) > 1)),
            data.draw(few.filter(lambda x: len(x) > 1)),
        )
        starts = [data.draw(st.integers(0, len(ids) - 1)) for ids in (chosen, rejected)]
        pairs.append(TokenizedPair(chosen, rejected, *starts, ""))  # type: ignore[arg-type]
    share, only = data.draw(st.booleans()), data.draw(st.booleans())
    batch = pack_pairs(pairs, completion_only_loss=only, share=share)
    assert len(batch.input_ids_T) == sum(packed_tokens(pair, share=share) for pair in pairs)
    seen: dict[int, list[int]] = {}
    for start, stop, begin, end in batch.segments:
        for row in range(start, stop):
            seen[row] = [*range(begin, end), *range(start, row + 1)]
    assert all(batch.position_ids_T[row] == len(places) - 1 for row, places in seen.items())
    ids = batch.input_ids_T.tolist()
    # A model whose log-probability of a token is a number made of the whole context and that token.
    rows, targets = batch.rows_N.tolist(), batch.targets_N.tolist()
    scores = [
        score([*(ids[i] for i in seen[row]), target])
        for row, target in zip(rows, targets, strict=True)
    ]
    found = packed_logps(torch.tensor(scores, dtype=torch.float64), batch.spans)
    for number, pair in enumerate(pairs):
        for mean, sequence, start in (
            (found.chosen_P, list(pair.chosen_ids), pair.chosen_start),
            (found.rejected_P, list(pair.rejected_ids), pair.rejected_start),
        ):
            terms = [score(sequence[: end + 1]) for end in range(max(start, 1), len(sequence))]
            assert mean[number].item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)
        begin = max(pair.chosen_start, 1) if only else 1
        counted = [
            score(list(pair.chosen_ids)[: end + 1]) for end in range(begin, len(pair.chosen_ids))
        ]
        assert found.nll_P[number].item() == pytest.approx(-sum(counted), rel=1e-12)
        assert (
            found.nll_tokens_P[number].item()
            == len(counted)
            == nll_tokens(pair, completion_only_loss=only)
        )


def score(context: list[int]) -> float:
    return random.Random(repr(context)).random()


def test_first_fit_decreasing_fills_the_budget() -> None:
    pairs = ragged_pairs(40)
    batching = Batching(True, True, tokens=80, pairs=None, pad_id=0, completion_only_loss=False)
    bins = micro_batches(pairs, batching)
    assert bins == micro_batches(pairs, batching)
    assert sorted(index for chunk in bins for index in chunk) == list(range(40))
    sizes = [sum(packed_tokens(pairs[index], share=True) for index in chunk) for chunk in bins]
    assert all(size <= 80 for size in sizes)
    assert len(bins) <= -(-sum(sizes) // 80) + 1
    alone = micro_batches(pairs, Batching(True, True, 1, None, 0, False))
    assert sorted(alone) == [[index] for index in range(40)]  # a pair beyond the budget goes alone


# --- bits


def test_a_chosen_token_and_another_pair_leave_the_bits_of_a_log_probability() -> None:
    model = build()
    pairs = ragged_pairs(3, seed=6)

    def scored(batch: list[TokenizedPair]) -> Any:
        with model.evaluating():
            return model(pack_pairs(batch, completion_only_loss=False, share=True))

    before = scored(pairs)
    middle = pairs[1]
    other = [*middle.chosen_ids[:-2], (middle.chosen_ids[-2] + 1) % 90 + 3, middle.chosen_ids[-1]]
    changed = TokenizedPair(
        other, middle.rejected_ids, middle.chosen_start, middle.rejected_start, ""
    )  # type: ignore[arg-type]
    assert common_prefix(*map(torch.tensor, (other, middle.rejected_ids))) == packed_prefix(middle)  # type: ignore[arg-type]
    after = scored([pairs[0], changed, pairs[2]])
    assert torch.equal(before.rejected_P, after.rejected_P)
    assert torch.equal(before.chosen_P[[0, 2]], after.chosen_P[[0, 2]])
    assert before.chosen_P[1] != after.chosen_P[1]
    assert torch.equal(before.nll_P[[0, 2]], after.nll_P[[0, 2]])


def packed_prefix(pair: TokenizedPair) -> int:
    return len(pair.chosen_ids) + len(pair.rejected_ids) - packed_tokens(pair, share=True)


# --- the autograd functions


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_head_equals_log_softmax(
    softcap: float | None, scale: float, bias: bool, trained: bool
) -> None:
    module = nn.Linear(6, 11, bias=bias, dtype=torch.float64).requires_grad_(trained)
    head = Head(module, scale, softcap)
    assert head.is_plain == (not trained)
    hidden, rows, targets = drawn(5, 6), torch.tensor([0, 3, 3, 4]), torch.tensor([10, 0, 5, 2])
    expected = pick(head.logits(hidden[rows]), targets)
    for chunk in (1, 3, 100):
        assert gradcheck(lambda h, chunk=chunk: row_logps(h, rows, targets, head, chunk), (hidden,))
        assert torch.allclose(
            row_logps(hidden, rows, targets, head, chunk), expected, rtol=0, atol=1e-13
        )
    divided = pick(head.logits(hidden[rows]) / 2.5, targets)
    found = row_logps(hidden, rows, targets, head.at_temperature(2.5), 3)
    assert torch.allclose(found, divided, rtol=0, atol=1e-13)
    if trained:
        (grad,) = torch.autograd.grad(
            row_logps(hidden, rows, targets, head, 3).sum(), module.weight
        )
        (wanted,) = torch.autograd.grad(expected.sum(), module.weight)
        assert torch.allclose(grad, wanted, rtol=0, atol=1e-12)


SEGMENTS = (
    Segment(0, 9),
    Segment(9, 14, 0, 5),
    Segment(14, 16),
    Segment(16, 17, 14, 15),
    Segment(17, 24),
)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Softmax over a mask of the whole row, with the rule of segments written out cell by cell."""
    length = query.shape[2]
    visible = torch.zeros(length, length, dtype=torch.bool)
    for segment in SEGMENTS:
        places = [
            *range(segment.prefix_start, segment.prefix_stop),
            *range(segment.start, segment.stop),
        ]
        for row in range(segment.start, segment.stop):
            own = places.index(row)
            for position, place in enumerate(places[: own + 1]):
                visible[row, place] = options.window is None or own - position < options.window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize(
    ("backend", "softcap"), [("flash_cpu", None), ("sdpa", None), ("maths", None), ("maths", 2.0)]
)
def test_attention_back_ends_equal_the_written_out_mask(
    backend: str,
    softcap: float | None,
    window: int | None,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK", block)
    options = AttentionOptions(0.4, window, softcap)
    query, key, value = drawn(1, 4, 24, 8), drawn(1, 2, 24, 8, seed=1), drawn(1, 2, 24, 8, seed=2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return BACKENDS[backend](q, k, v, SEGMENTS, options)

    expected = plain_attention(query, key, value, options)
    found = run(query, key, value)
    assert (found - expected).abs().max() < 1e-13
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value))
    grads = torch.autograd.grad(found.square().sum(), (query, key, value))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(grads, wanted, strict=True))
    if (
        backend != "sdpa" and window != 6
    ):  # along a random direction; each number was compared above
        assert gradcheck(run, (query, key, value), fast_mode=True)


def test_values_may_be_narrower_than_keys() -> None:
    options = AttentionOptions(0.4, None, None)
    query, key, value = drawn(1, 2, 24, 8), drawn(1, 2, 24, 8, seed=1), drawn(1, 2, 24, 3, seed=2)
    assert choose_backend(query, value, None) == "maths"
    found = BACKENDS["maths"](query, key, value, SEGMENTS, options)
    assert (found - plain_attention(query, key, value, options)).abs().max() < 1e-13


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_fused_linear_equals_its_formula(bias: bool, dropout: bool) -> None:
    layer = nn.Linear(5, 7, bias=bias, dtype=torch.float64).requires_grad_(False)
    weight = frozen_weight(layer)
    assert weight is not None
    a, b, x = drawn(2, 5, seed=1), drawn(7, 2, seed=2), drawn(1, 4, 5)
    mask = (drawn(1, 4, 5, seed=3) > 0).double() * 2 if dropout else None

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, x if mask is None else x * mask, a, b, 0.5, weight, layer.bias)

    dropped = x if mask is None else x * mask
    expected = layer(x) + 0.5 * (dropped @ a.T) @ b.T
    assert (run(x, a, b) - expected).abs().max() < 1e-13
    assert gradcheck(run, (x, a, b))


def test_tiles_pass_gradcheck() -> None:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (
                nn.Linear(4, 6, dtype=torch.float64),
                nn.Linear(6, 4, dtype=torch.float64),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.nn.functional.silu(self.up(x)))

    layer = nn.Module()
    layer.mlp = MLP()
    plain, x = layer.mlp.forward, drawn(1, 7, 4)
    expected = plain(x)
    assert layers.tile_mlps([layer], 3, has_dropout=False) == 1
    assert (layer.mlp(x) - expected).abs().max() < 1e-14
    weights = (layer.mlp.up.weight, layer.mlp.down.weight)
    assert gradcheck(lambda x, *_: layer.mlp(x), (x, *weights))


def test_a_mixture_of_experts_and_a_layer_without_mlp_are_not_tiled() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    layer = nn.Module()
    layer.mlp = Router()
    assert layers.tile_mlps([layer, nn.Module()], 3, has_dropout=False) == 0


def test_the_tests_see_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that sharing could have: rejected tokens that see the chosen reply."""
    honest = _blocks

    def leaking(segments: Any, window: Any, whole: bool) -> Any:
        wrong = [s._replace(prefix_stop=s.start) if s.prefix_length else s for s in segments]
        return honest(wrong, window, whole)

    pairs = ragged_pairs(4)
    expected = step(build(**PLAIN), pairs, **PLAIN)
    monkeypatch.setattr(blockwise_attention, "_blocks", leaking)
    assert not same(step(build(), pairs), expected, bound=1e-3)
