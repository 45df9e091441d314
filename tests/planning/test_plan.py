"""The planner: its bytes are the real step's, its memory settings fit and change no result, and a shortage is survived."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OUT_OF_MEMORY, Answer, first_and_long, tiny_llama, write_base
from test_families import ALONE, GROUPED, IDS, LINEAR, SHARED
from test_loop import adapter, rows_without_clock, same_bits, train_all
from test_memory import recipe
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    LlamaConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from benchmarks.recipes import gpu_size
from orpo_lite import plan
from orpo_lite.api import train_events
from orpo_lite.base.find import Base, find_config
from orpo_lite.data.packing import micro_batches, pack_pairs, packed_tokens
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.doctor.machine import check_device
from orpo_lite.errors import FitError, ModelError, RecipeError
from orpo_lite.model.load import bare_pair_model, choose_dtype, load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.ops.attention import choose_backend
from orpo_lite.ops.devices import device_kind
from orpo_lite.planning import gpus
from orpo_lite.planning.extrapolate import LayerExtrapolation
from orpo_lite.planning.fit import fit
from orpo_lite.planning.gpus import GPUS, Holder, allowances, local_gpu
from orpo_lite.planning.measure import heaviest_pairs, measure
from orpo_lite.planning.on_meta import META_ATTENTION, blank_pairs, held_tensors, worst_case
from orpo_lite.planning.plan import plan_events
from orpo_lite.planning.route import find_route, with_layers
from orpo_lite.planning.search import Planner
from orpo_lite.recipe.reader import gpu_sizes, load_recipe, shipped_recipes
from orpo_lite.recipe.schema import PLANNED_SETTINGS, Recipe
from orpo_lite.recipe.text import read_bytes
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import read_json
from orpo_lite.training import step as training_step

plan_bench = pytest.importorskip(
    "benchmarks.plan", reason="TRL, the peer, comes with the extra `bench`"
)
MIB, GIB = 2**20, 2**30
GPU = GPUS[3]
FEW = ("training.global_batch_size=2", "memory.micro_batch_tokens=512")  # fewer steps to count
Call = Callable[..., Answer]


pytestmark = pytest.mark.usefixtures("counted_once")


def small(layers: int = 6, **changes: Any) -> LlamaConfig:
    shape = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shape |= {"vocab_size": 4_000, "num_hidden_layers": layers, "max_position_embeddings": 4_096}
    return LlamaConfig(**shape | changes)


def settings(**memory: Any) -> Recipe:
    return recipe(**memory).override({"data.max_length": 512, "training.global_batch_size": 2})


def planner(layers: int = 6, **memory: Any) -> Planner:
    """Of steps of two pairs of 2 x 512 tokens, so that passes of more tokens need not be tried."""
    return Planner(settings(**memory), small(layers), worst_case(512, 2), "ampere")


# --- bytes


FEW_PAIRS = [("gemma2, softcap, tied", "default"), ("llama", "all")]
SINGLE_SETTINGS = [
    "tiles",
    *(name for name in plan_bench.MEMORY_SETTINGS if name not in ("default", "all", "tiles")),
]
ALL_PAIRS = itertools.product(plan_bench.FAMILIES, ("default", "no checkpoints", "all"))
ALSO = [pytest.param(*pair, marks=pytest.mark.long) for pair in ALL_PAIRS if pair not in FEW_PAIRS]


@pytest.mark.parametrize(("family", "setting"), [*FEW_PAIRS, *ALSO])
def test_predicted_bytes_are_those_of_the_step_on_this_cpu(family: str, setting: str) -> None:
    """NF4 and LoRA on the CPU, every storage followed, against the same step without weights."""
    error = plan_bench.error_of(
        plan_bench.FAMILIES[family](8_000), plan_bench.recipe(**plan_bench.MEMORY_SETTINGS[setting])
    )
    assert abs(error) <= 0.02


@pytest.mark.parametrize("setting", first_and_long(SINGLE_SETTINGS))
def test_each_memory_setting_is_predicted(setting: str) -> None:
    config = plan_bench.FAMILIES["llama"](8_000)
    assert (
        abs(plan_bench.error_of(config, plan_bench.recipe(**plan_bench.MEMORY_SETTINGS[setting])))
        <= 0.02
    )


BLOOM = {"hidden_size": 256, "n_layer": 4, "n_head": 4}
SPARSE = GROUPED | {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
OTHERS = {
    "bloom, no checkpoints": BloomConfig(**BLOOM | IDS),
    "lfm2, no checkpoints": Lfm2Config(
        **SPARSE | IDS, layer_types=["conv", "conv", "full_attention", "conv"]
    ),
    "qwen3-moe, all": Qwen3MoeConfig(**SPARSE | IDS, moe_intermediate_size=128, head_dim=64),
    "qwen3-next, default": Qwen3NextConfig(
        **SPARSE | IDS | LINEAR | {"num_hidden_layers": 2}, head_dim=64
    ),
}


@pytest.mark.parametrize("case", first_and_long([*OTHERS][::-1]))
def test_what_cannot_share_and_what_has_experts_is_predicted_too(case: str) -> None:
    """In bfloat16, for on meta torch multiplies experts in nothing else."""
    memory_settings = plan_bench.MEMORY_SETTINGS[case.split(", ")[1]]
    chosen = plan_bench.recipe(**memory_settings).override({"model.dtype": "bfloat16"})
    assert abs(plan_bench.error_of(OTHERS[case], chosen)) <= 0.02


@pytest.mark.parametrize(
    ("name", "route"), [*((name, "shared") for name in SHARED), *((name, "rows") for name in ALONE)]
)
def test_a_plan_uses_the_route_that_the_probe_will_choose(name: str, route: str) -> None:
    make = ALONE[name][0] if route == "rows" else SHARED[name]
    chosen = recipe().override({"model.dtype": "bfloat16"})
    planned = find_route(chosen, make().config, worst_case(256, 1), "ampere")
    assert (planned.route, bool(planned.reason)) == (route, route == "rows")


def test_a_plan_says_what_the_model_cannot_have(call: Call, workspace: Path) -> None:
    OTHERS["qwen3-moe, all"].save_pretrained(workspace / "base")
    keys = (
        "model.model_name_or_path=./base",
        "data.max_length=256",
        "data.max_prompt_length=64",
        *FEW,
    )
    _, said, _ = call("plan", "--recipe", "mistral-qlora", *keys)
    assert "note: quantization.load_in_4bit: " in said
    assert "of expert weights are not quantised" in said


def test_a_plan_and_a_dry_run_warn_of_an_adapter_that_is_not_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ("model.model_name_or_path=builtin:tiny-llama", "data.max_length=256")
    keys = (*base, "data.max_prompt_length=64")
    code, said, complained = call("plan", "--recipe", "paper-dpo", *keys, "--json")
    assert code == 0, complained
    (note,) = [text for text in json.loads(said)["notes"] if "adapter_name_or_path" in text]
    assert "runs/paper-sft/adapter: no such folder" in note
    assert "before training: orpo-lite train --recipe paper-sft" in note
    code, said, _ = call("train", "--recipe", "paper-dpo", "--dry-run")
    assert code == 0
    assert "warning: this recipe cannot be trained yet. model.adapter_name_or_path: runs/" in said
    assert "fix: orpo-lite train --recipe paper-sft" in said
    assert "warning" not in call("train", "--recipe", "paper-sft", "--dry-run")[1]


def test_attention_that_shows_its_flops_is_not_counted_twice() -> None:
    chosen, config = settings(), OTHERS["bloom, no checkpoints"]
    assert find_route(chosen, config, worst_case(256, 1), "ampere").uncounted == 0
    half = find_route(chosen, OTHERS["qwen3-next, default"], worst_case(256, 1), "ampere")
    assert (half.attention, half.uncounted) == (META_ATTENTION, 0.5)


@pytest.mark.parametrize(
    "memory_settings",
    first_and_long([{"checkpoint_offload": True}, {}, {"mlp_tile": 512}]),
    ids=str,
)
def test_a_few_layers_tell_of_all(memory_settings: dict[str, Any]) -> None:
    """Peak and work of eight layers, any number of them un-checkpointed, from steps of two to four."""
    chosen, config, triples = settings(**memory_settings), small(8), worst_case(512, 2)
    line = LayerExtrapolation(
        chosen, config, triples, "ampere", find_route(chosen, config, triples, "ampere")
    )
    for kept in (0, 1, 4, 7, 8):
        whole = chosen.override({"memory.activation_checkpointing": 8 - kept})
        found = measure(whole, config, triples, "ampere")
        assert line.peak(8, kept) == pytest.approx(found.peak, rel=0.01)
        flops = [
            sum(f * count for (f, _), count in work.items())
            for work in (line.work(8, kept), found.work)
        ]
        assert flops[0] == pytest.approx(flops[1], rel=0.01)


@pytest.mark.parametrize("layers", first_and_long([3, 6]))
def test_the_search_finds_what_trying_everything_finds(layers: int) -> None:
    """The fastest of all combinations of memory settings, each measured with all layers."""
    tokens = [1_024] if layers == 3 else [2_048, 1_024]
    plans = planner(layers, micro_batch_tokens=1_024 if layers == 3 else "auto")
    options: dict[str, list[Any]] = {
        "head_chunk": ["auto"],
        "mlp_tile": [None, 512],
        "checkpoint_offload": [False, True],
        "embedding_on_cpu": [False, True],
        "micro_batch_tokens": tokens,
    }
    choices = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]
    choices.append(choices[-1] | {"head_chunk": 128})
    tried = [
        plans.run(choice | {"activation_checkpointing": layers - kept}, None, GPU)
        for choice in choices
        for kept in range(layers, -1, -1)
    ]
    least, most = min(each.needed for each in tried), max(each.needed for each in tried)
    chosen = []
    for share in (0, 0.15, 0.3, 0.45, 0.6, 0.75, 1):
        budget = int(least + share * (most - least))
        fitting = [each for each in tried if each.needed <= budget]
        best = min(fitting, key=lambda each: each.seconds_per_pair or 0)
        found = plans.plan(budget, GPU)
        assert found.fits
        assert found.settings == best.settings, share
        chosen.append(found.settings)
    assert len({str(each) for each in chosen}) >= 4


def test_an_objective_needs_the_memory_of_orpo_and_sft_half_of_its_work() -> None:
    """A 7B with two layers. No second model is held for DPO; SFT has only the chosen sequences."""
    found = {}
    for kind in ("orpo", "dpo", "simpo", "sft", "reward"):
        chosen = load_recipe(
            "mistral-qlora", [f"loss.type={kind}", "memory.micro_batch_tokens=4096"]
        )
        config = with_layers(find_config("mistralai/Mistral-7B-v0.1", "main"), 2)
        found[kind] = measure(
            chosen, config, worst_case(2048, 32, has_rejected=kind != "sft"), "ampere"
        )
    head = 2 * 32_000 * 4_096  # bytes; a reward model does not need it
    ends = "embeddings, head, norms"
    assert found["reward"].held[ends] == found["orpo"].held[ends] - head
    for kind in ("dpo", "simpo", "sft"):
        assert found[kind].held == found["orpo"].held
    for kind in ("dpo", "simpo", "sft", "reward"):
        assert found[kind].peak <= 1.05 * found["orpo"].peak
    flops = {
        kind: sum(key[0] * count for key, count in step.work.items()) / step.pairs
        for kind, step in found.items()
    }
    assert flops["dpo"] == flops["orpo"]
    assert flops["sft"] == pytest.approx(flops["orpo"] / 2, rel=0.01)


def test_parts_add_up_to_the_peak() -> None:
    found = planner().plan(None, GPU)
    assert sum(found.parts.values()) == found.peak
    assert {"base", "adapter", "gradients", "optimizer", "kept by the layers"} <= found.parts.keys()
    assert found.needed == found.peak + sum(found.allowances.values())
    assert found.to_json()["parts"] == found.parts


def sizes(pairs: Sequence[TokenizedPair]) -> tuple[int, int, int]:
    """Tokens, segments and tokens of prefixes in one row."""
    row = pack_pairs(pairs, completion_only_loss=False, share=True)
    return (
        len(row.input_ids_T),
        len(row.segments),
        sum(stop - start for *_, start, stop in row.segments),
    )


@pytest.mark.parametrize("limit", [{}, {"micro_batch_size": 4}], ids=str)
@pytest.mark.parametrize("tokens", [300, 600])
def test_no_micro_batch_of_a_training_is_heavier_than_that_of_the_plan(
    tokens: int, limit: dict[str, int]
) -> None:
    """Many short pairs, a few long ones, prefixes of all sizes."""
    random = np.random.default_rng(0)
    triples = np.sort(random.integers(2, 60, (200, 3)), 1)
    triples[::20] += np.sort(random.integers(0, 120, (10, 3)), 1)
    chosen = settings(micro_batch_tokens=tokens, **limit).override(
        {"training.global_batch_size": 16}
    )
    model = SimpleNamespace(route="shared")
    batching = PairModel.batching(model, chosen, 0)  # type: ignore[arg-type]
    planned = sizes(heaviest_pairs(chosen, triples, batching, in_one_row=True))
    pairs, seen = blank_pairs(triples), np.zeros(3, int)
    lengths = triples[:, 1:].sum(1) - triples[:, 0]
    # Most segments; most tokens of prefixes, by two orders.
    worst = [np.argsort(lengths), np.argsort(-triples[:, 0] / lengths), np.argsort(-triples[:, 0])]
    for order in [*worst, *(random.permutation(200) for _ in range(40))]:
        step = [pairs[index] for index in order[:16]]
        for chunk in micro_batches(step, batching):
            seen = np.maximum(seen, sizes([step[index] for index in chunk]))
    assert all(seen <= planned)
    assert all(0.75 * np.array(planned) <= seen), (planned, seen)
    assert planned[0] == tokens


def test_the_longest_pairs_are_planned_where_each_sequence_goes_by_itself() -> None:
    triples = np.array([[5, 20, 30]] * 20 + [[10, 400, 100], [0, 50, 60]])
    chosen = settings(micro_batch_tokens=600).override({"training.global_batch_size": 8})
    model = SimpleNamespace(route="rows")
    batching = PairModel.batching(model, chosen, 0)  # type: ignore[arg-type]
    pairs = heaviest_pairs(chosen, triples, batching, in_one_row=False)
    lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    assert lengths[0] == (400, 100)
    assert (
        sum(packed_tokens(pair, share=False) for pair in pairs) == 600
    )  # filled up: other pairs may fit better
    for prefix, chosen, rejected in triples[-2:].tolist():
        (pair,) = blank_pairs(np.array([[prefix, chosen, rejected]]))
        same = np.asarray(pair.chosen_ids[:prefix]) == np.asarray(pair.rejected_ids[:prefix])
        assert (len(pair.chosen_ids), len(pair.rejected_ids), same.all()) == (
            chosen,
            rejected,
            True,
        )


def test_fewer_layers_keep_their_kinds() -> None:
    config = Gemma2Config(num_hidden_layers=6)
    assert with_layers(config, 3).layer_types == config.layer_types[:3]
    assert config.num_hidden_layers == 6


# --- the search


def test_a_plan_fits_its_budget_and_more_memory_makes_it_no_slower() -> None:
    plans, found = planner(), []
    least = plans.least_bytes(GPU)
    for extra in (0, 5, 20, 60, 150, 4_000):
        plan = plans.plan(least + extra * MIB, GPU)
        assert plan.fits
        assert plan.needed <= least + extra * MIB
        found.append(plan.seconds_per_pair or 0)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_nothing_that_fits_is_faster() -> None:
    """Every choice of memory settings, run in full, against the plan."""
    plans = planner(layers=3)
    others = [
        plans.run(choice | {"activation_checkpointing": 3 - kept}, None, GPU)
        for choice in plans.choices()
        for kept in range(4)
    ]
    for extra in (0, 10, 40):
        budget = plans.least_bytes(GPU) + extra * MIB
        best = plans.plan(budget, GPU).seconds_per_pair or 0
        assert all(
            (other.seconds_per_pair or 0) >= 0.99 * best
            for other in others
            if other.needed <= budget
        )


@pytest.mark.long
def test_a_plan_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = planner(mlp_tile=None).least_bytes(GPU) + 10 * MIB
    one = planner(mlp_tile=None).plan(budget, GPU)
    monkeypatch.undo()  # each step is counted anew
    other = planner(mlp_tile=None).plan(budget, GPU)
    assert one.to_json() == other.to_json()


def test_a_plan_sets_memory_settings_and_nothing_else() -> None:
    plans = planner()
    assert set(plans.plan(plans.least_bytes(GPU), GPU).settings) <= set(PLANNED_SETTINGS)


FIXED = [{"activation_checkpointing": 3}, {"mlp_tile": None}, {"embedding_on_cpu": True}, {"head_chunk": 64},
         {"mlp_tile": 256}, {"activation_checkpointing": "all"}, {"checkpoint_offload": False},
         {"micro_batch_tokens": 1_024}]  # fmt: skip


@pytest.mark.parametrize("fixed", first_and_long(FIXED), ids=str)
def test_a_memory_setting_that_the_person_has_set_stays(fixed: dict[str, Any]) -> None:
    plans = planner(**{"mlp_tile": None} | fixed)  # fewer steps to count
    memory_settings = plans.plan(plans.least_bytes(GPU) + 20 * MIB, GPU).settings
    ((key, value),) = fixed.items()
    assert memory_settings[key] == {"all": 6}.get(value, value)  # type: ignore[call-overload]


def test_a_tied_embedding_is_not_moved() -> None:
    plans = Planner(settings(), small(tie_word_embeddings=True), worst_case(512, 2), "ampere")
    assert plans.smallest_settings()["embedding_on_cpu"] is False


def test_what_does_not_fit_is_said_with_what_would() -> None:
    least = planner().least_bytes(GPU)
    with pytest.raises(FitError) as caught:
        fit(settings(), small(), worst_case(512, 2), "ampere", least - MIB, GPU)
    said = str(caught.value)
    assert caught.value.exit_code == 6
    assert said.startswith("memory.budget: at least ")
    assert "data.max_length=256: " in said  # the prompts' limit is half of it by itself
    assert "lora.r=8" in said
    assert "less), fits" in said


def test_loading_counts_where_it_takes_more_than_a_step() -> None:
    config = small(vocab_size=400_000)
    plan = Planner(settings(embedding_on_cpu=True), config, worst_case(16, 1), "ampere").plan(
        None, GPU
    )
    assert plan.measured.loading > plan.peak
    assert plan.needed == plan.measured.loading + 512 * MIB + int(18.25 * MIB) + 256 * MIB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("23.5 gib", int(23.5 * GIB)),
        ("24GB", 24 * 10**9),
        ("512MiB", 512 * MIB),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_bytes(text) == size
    assert load_recipe("demo", [f"memory.budget={text}"]).memory.budget_bytes == size


@pytest.mark.parametrize("text", ["24", "lots", "0GiB", "-3GiB", "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="auto, or a size such as 24GiB"):
        load_recipe("demo", [f"memory.budget={text}"])


# --- this machine's GPU


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch,
    *,
    free: int,
    others: int,
    name: str = "NVIDIA GeForce RTX 4090",
    capability: tuple[int, int] = (8, 9),
) -> None:
    """NVML and torch as they answer on a machine with one GPU."""
    import pynvml

    properties = SimpleNamespace(name=name, total_memory=24 * GIB, uuid="6f-a")
    running = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB // 2),
        SimpleNamespace(pid=1, usedGpuMemory=others),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for function in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, function, lambda: None)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: {"GPU-6f-a": "handle"}[uuid]
    )
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: running)
    monkeypatch.setattr(pynvml, "nvmlSystemGetProcessName", {1: "/usr/bin/python3"}.get)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.65")


def test_a_plan_for_a_t4_is_of_its_dtype_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 7.5: float16, and no FlashAttention, so segments cost it nothing."""
    pretend_gpu(monkeypatch, free=15 * GIB, others=0, name="Tesla T4", capability=(7, 5))
    own = local_gpu()
    assert own is not None
    assert (own.gpu.flops, own.gpu.capability) == (65e12, (7, 5))
    kind = device_kind(torch.device("cuda", 0))
    assert (kind, choose_dtype("auto", kind)) == ("cuda", torch.float16)
    query = torch.empty(1, 4, 8, 128, dtype=torch.float16, device="meta")
    assert choose_backend(query, query, None, kind) == "efficient"
    chosen = settings(micro_batch_tokens=1_024).override({"training.global_batch_size": 32})
    config = small(
        2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=64,
        vocab_size=99,
    )
    few, many = np.array([[0, 512, 512]] * 32), np.array([[0, 16, 16]] * 32)
    for meant, grows in (("cuda", False), ("ampere", True)):
        one, other = (measure(chosen, config, triples, meant) for triples in (few, many))
        assert one.tokens == other.tokens
        grown = (other.peak - one.peak) / (
            62 * 128 * 8 * 129 * 4
        )  # by 62 segments' rows, 8 heads of 128 numbers
        assert grown == pytest.approx(float(grows), abs=0.1)


def test_cublas_has_more_on_hopper_and_for_deterministic_kernels() -> None:
    ours = {
        name: allowances(GIB, replace(GPU, capability=c))
        for name, c in (("ada", (8, 9)), ("hopper", (9, 0)))
    }
    sizes = {name: found["kernels' workspaces"] for name, found in ours.items()}
    assert sizes == {"ada": 2 * (8 * MIB + 128 * 1024 + MIB), "hopper": 2 * (32 * MIB + MIB)}
    assert allowances(GIB, GPU, deterministic=True)["kernels' workspaces"] == sizes["hopper"]
    assert [allowances(size, GPU)["fragmentation"] for size in (GIB, 10 * GIB)] == [
        256 * MIB,
        512 * MIB,
    ]


def test_a_plan_says_first_whether_it_fits(workspace: Path) -> None:
    keys = [
        "model.model_name_or_path=./base",
        "data.max_length=128",
        "data.max_prompt_length=64",
        *FEW,
    ]
    for budget, verdict in (
        ("8GiB", "yes, it fits: "),
        ("900MiB", "yes, it fits: "),
        ("100MiB", "no, it does not fit: "),
    ):
        updates = plan_events(load_recipe("mistral-qlora", [*keys, f"memory.budget={budget}"]))
        assert next(update.text for update in updates if update.kind == "note").startswith(verdict)
        updates.close()


def test_memory_of_other_processes_is_seen_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, free=20 * GIB - GIB // 2, others=3 * GIB)
    own = local_gpu()
    assert own is not None
    assert (own.free, own.others, own.gpu.flops) == (20 * GIB, 3 * GIB, 165e12)
    assert (own.holders, own.driver) == ((Holder(1, "python3", 3 * GIB),), "580.65")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    _, gpu, memory = check_device()
    assert (gpu.state, memory.state) == ("ok", "warning")
    assert "driver 580.65, compute capability 8.9, bfloat16" in gpu.found
    assert memory.found.endswith("free; python3 (pid 1) uses 3.00 GiB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_90"])
    assert [check.state for check in check_device()] == ["ok", "fault", "warning"]


def test_a_driver_that_does_not_answer_is_asked_through_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pynvml

    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    pretend_gpu(monkeypatch, free=0, others=0, name="Some Future GPU")
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (9 * GIB, 24 * GIB))
    own = local_gpu()
    assert own is not None
    assert (own.free, own.others) == (9 * GIB, 0)
    assert own.gpu.flops == GPU.flops  # of the known GPU that is nearest in memory


def test_no_gpu_is_no_fault() -> None:
    if not torch.cuda.is_available():
        assert local_gpu() is None
    assert gpus.SPEEDS.keys()


# --- orpo-lite plan


def test_the_plan_of_a_shipped_recipe_needs_no_network(call: Call) -> None:
    keys = ("data.max_length=256", "data.max_prompt_length=128", "memory.micro_batch_tokens=512")
    code, said, complained = call("plan", "--recipe", "opt-125m", *keys, "--json")
    assert (code, complained) == (0, "")
    plan = json.loads(said)
    assert {
        "peak_bytes",
        "parts",
        "flops_per_pair",
        "fits",
        "levers",
        "cards",
        "disk_bytes",
    } <= plan.keys()
    assert plan["fits"]
    assert plan["peak_bytes"] == sum(plan["parts"].values())
    assert [row["card"] for row in plan["cards"]][1:] == [gpu.name for gpu in GPUS if gpu != GPU]
    assert plan["cards"][0]["card"] == GPU.name


SIZED = ["smollm2-135m", *(name for name in shipped_recipes() if name != "smollm2-135m")]


@pytest.mark.parametrize("name", first_and_long(SIZED))
def test_the_gpu_that_a_recipe_needs_is_its_plans(name: str, workspace: Path) -> None:
    """`recipes ls` shows what ``python -m benchmarks.recipes`` wrote."""
    assert gpu_sizes().keys() == shipped_recipes().keys()
    assert gpu_size(name) == gpu_sizes()[name]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipes_base_is_known_offline(name: str) -> None:
    from orpo_lite.base.find import find_config

    base = load_recipe(name).model.model_name_or_path
    if not base.startswith("builtin:"):
        assert find_config(base, "main").get_text_config().num_hidden_layers > 0


def test_the_screen_has_a_bar_a_part_and_a_row_a_gpu(call: Call, workspace: Path) -> None:
    keys = [
        "model.model_name_or_path=./base",
        "data.dataset_name=./pairs.jsonl",
        "data.max_length=128",
    ]
    code, said, _ = call(
        "plan", "--recipe", "mistral-qlora", *keys, "data.max_prompt_length=64", "--with-data"
    )
    assert code == 0
    assert "./base: fits," in said
    assert ": the longest pairs of the data" in said
    assert "CUDA context (allowance)" in said
    assert "█" in said
    assert "memory.activation_checkpointing=0" in said
    assert [gpu.name for gpu in GPUS if gpu.name not in said] == []


@pytest.mark.long
def test_a_plan_that_does_not_fit_ends_with_6(call: Call, workspace: Path) -> None:
    keys = ["model.model_name_or_path=./base", "memory.budget=100MiB", "data.max_length=256", *FEW]
    code, said, complained = call(
        "plan", "--recipe", "mistral-qlora", *keys, "data.max_prompt_length=64"
    )
    assert code == 6
    assert "does not fit" in said
    assert complained.startswith("memory.budget: at least ")
    assert "Traceback" not in complained


def test_the_local_gpu_comes_first(
    call: Call, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, free=20 * GIB - GIB // 2, others=3 * GIB)
    keys = (
        "model.model_name_or_path=./base",
        "data.max_length=256",
        "data.max_prompt_length=64",
        *FEW,
    )
    code, said, _ = call("plan", "--recipe", "mistral-qlora", *keys)
    assert code == 0
    assert "20.00 GiB free on this machine's NVIDIA GeForce RTX 4090" in said
    assert "other processes use 3.00 GiB of the GPU; the plan does not use that memory" in said


# --- training to a budget


def notes(updates: Any) -> list[str]:
    return [update.text for update in updates if update.kind == "note"]


def stop_after_two_steps(recipe: Recipe) -> None:
    with pytest.raises(Interrupted):
        for update in train_events(recipe):
            if update.kind == "step" and update.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_keeps_to_its_budget_and_learns_the_same(small_recipe: Callable[..., Recipe]) -> None:
    """Memory settings are chosen before anything is loaded, said in three lines, kept in the run, and change no figure."""
    _, free = train_all(small_recipe("training.output_dir=free", "training.optim=adamw_torch"))
    least = Planner(
        small_recipe(), tiny_llama(98).config, np.array([[20, 60, 60]]), "cpu"
    ).least_bytes(None)
    budget = f"memory.budget={least // MIB + 2}MiB"
    updates, planned = train_all(
        small_recipe("training.output_dir=planned", "training.optim=adamw_torch", budget)
    )
    said = [(update.kind, update.text) for update in updates]
    loading = next(i for i, (_, text) in enumerate(said) if text.startswith("loading"))
    lines = [text for kind, text in said[:loading] if kind == "note"][-3:]
    assert [line.split(":")[0] for line in lines] == [
        "memory",
        "memory settings",
        "the largest pass",
    ]
    kept = read_json(planned.run / "plan.json")
    assert kept["needed_bytes"] <= kept["budget_bytes"]
    assert set(kept["levers"]) <= set(PLANNED_SETTINGS)
    for row, other in zip(
        rows_without_clock(free.run), rows_without_clock(planned.run), strict=True
    ):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
    assert not (free.run / "plan.json").exists()


def test_a_run_that_goes_on_keeps_its_plan_and_its_bits(
    small_recipe: Callable[..., Recipe],
) -> None:
    keys = ("memory.budget=3MiB", "lora.lora_dropout=0.2")
    _, whole = train_all(small_recipe(*keys, "training.output_dir=whole"))
    stopped = small_recipe(*keys, "training.output_dir=stopped")
    stop_after_two_steps(stopped)
    before = (Path("stopped") / "plan.json").read_bytes()
    updates, resumed = train_all(stopped, resume=True)
    assert (Path("stopped") / "plan.json").read_bytes() == before
    assert not [note for note in notes(updates) if note.startswith("memory settings")]
    assert same_bits(adapter(whole.run), adapter(resumed.run))


@pytest.mark.long
def test_a_plan_that_fits_no_more_is_made_anew_and_said(
    small_recipe: Callable[..., Recipe],
) -> None:
    stopped = small_recipe("memory.budget=40MiB")
    stop_after_two_steps(stopped)
    before = read_json(Path("run") / "plan.json")
    smaller = before["needed_bytes"] - 1
    updates, _ = train_all(small_recipe(f"memory.budget={smaller}B"), resume=True)
    assert [
        note
        for note in notes(updates)
        if note.startswith("the earlier plan of this run exceeds the budget")
    ]
    after = read_json(Path("run") / "plan.json")
    assert after["needed_bytes"] <= smaller
    asked = ("memory.budget=40MiB", "memory.micro_batch_size=1")
    updates, _ = train_all(small_recipe(*asked), resume=True)
    assert [
        note
        for note in notes(updates)
        if note.startswith("the earlier plan of this run has other memory settings than the recipe")
    ]
    assert read_json(Path("run") / "plan.json")["budget_bytes"] == 40 * 2**20


def test_a_base_that_cannot_be_counted_trains_with_its_memory_settings_as_they_are(
    small_recipe: Callable[..., Recipe], workspace: Path
) -> None:
    """Experts in float32, which torch multiplies on this CPU and not on meta."""
    shape = (
        GROUPED
        | IDS
        | {
            "vocab_size": 99,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        }
    )
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    write_base(workspace / "sinks", GptOssForCausalLM(GptOssConfig(**shape, rope_parameters=rope)))
    keys = (
        "model.model_name_or_path=./sinks",
        "lora.target_modules=q_proj,v_proj",
        "quantization.load_in_4bit=false",
    )
    updates, result = train_all(small_recipe(*keys, "memory.budget=1GiB", "training.max_steps=1"))
    assert [
        note
        for note in notes(updates)
        if "a training step cannot be measured without weights" in note
    ]
    assert result.steps == 1
    assert not (result.run / "plan.json").exists()
    with pytest.raises(ModelError, match=r"set the memory\.\* keys in the recipe"):
        plan(small_recipe(*keys, "model.dtype=float32"))


def test_padded_rows_are_planned_too() -> None:
    plans = planner(packing=False, micro_batch_size=2)
    found = plans.plan(None, GPU)
    assert found.measured.tokens == 2 * 2 * 512
    assert found.peak > planner().plan(None, GPU).peak  # all logits


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA L40", None),
        ("NVIDIA L4", 300e9),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", 320e9),
        ("NVIDIA GeForce RTX 4080 Laptop GPU", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(
    monkeypatch: pytest.MonkeyPatch, name: str, bandwidth: float | None
) -> None:
    pretend_gpu(monkeypatch, free=GIB, others=0, name=name)
    own = local_gpu()
    assert own is not None
    assert own.gpu.bandwidth == (bandwidth or GPU.bandwidth)  # of the known GPU nearest in memory


def test_a_budget_that_nothing_fits_leaves_no_run(small_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(FitError, match=r"at least .* are needed, and the budget is"):
        train_all(small_recipe("memory.budget=100KiB"))
    assert not Path("run").exists()


# --- out of memory all the same


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Training passes of more tokens than so many run out of memory; gives a list that fills with their sizes."""

    def install(limit: int) -> list[int]:
        sizes: list[int] = []
        honest = PairModel.forward

        def forward(self: PairModel, batch: Any) -> Any:
            if torch.is_grad_enabled() and hasattr(batch, "segments"):
                sizes.append(len(batch.input_ids_T))
                if sizes[-1] > limit:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return honest(self, batch)

        monkeypatch.setattr(PairModel, "forward", forward)
        return sizes

    return install


PLAIN = ("training.optim=adamw_torch", "training.max_steps=4")


def test_a_shortage_is_survived_with_the_same_gradients(
    small_recipe: Callable[..., Recipe], scarce: Callable[[int], list[int]]
) -> None:
    _, whole = train_all(small_recipe(*PLAIN, "training.output_dir=whole"))
    sizes = scarce(200)
    updates, short = train_all(small_recipe(*PLAIN, "training.output_dir=short"))
    said = [note for note in notes(updates) if note.startswith("out of memory")]
    assert 1 <= len(said) <= 3  # halved until it fits, in the first step
    assert all("at step 1: the step is repeated with" in note for note in said)
    assert max(sizes[len(said) :]) <= 256
    for row, other in zip(
        rows_without_clock(whole.run), rows_without_clock(short.run), strict=True
    ):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)


@pytest.mark.long
def test_a_shortage_is_remembered_by_a_run_that_goes_on(
    small_recipe: Callable[..., Recipe], scarce: Callable[[int], list[int]]
) -> None:
    scarce(200)
    keys = (*PLAIN, "lora.lora_dropout=0.2")
    _, whole = train_all(small_recipe(*keys, "training.output_dir=whole"))
    stopped = small_recipe(*keys, "training.output_dir=stopped")
    stop_after_two_steps(stopped)
    updates, resumed = train_all(stopped, resume=True)
    assert not [note for note in notes(updates) if note.startswith("out of memory")]
    assert same_bits(adapter(whole.run), adapter(resumed.run))


def test_a_shortage_with_single_pairs_checkpoints_all_layers_then_ends(
    small_recipe: Callable[..., Recipe], scarce: Callable[[int], list[int]]
) -> None:
    scarce(10)
    said = []
    with pytest.raises(FitError, match="out of memory with one pair at a time") as caught:
        for update in train_events(small_recipe("memory.activation_checkpointing=none")):
            said += [update.text] if update.kind == "note" else []
    assert "memory.activation_checkpointing=all" in said[-1].replace(
        "activation_checkpointing=all", "activation_checkpointing=all"
    )
    assert "memory.checkpoint_offload=true" in str(caught.value)
    assert caught.value.exit_code == 6
    assert list((Path("run") / "checkpoints").iterdir())


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_no_gradient_of_a_step_that_ran_short_is_left(
    error: RuntimeError, small_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first micro-batch had gone through; its gradient must not count twice."""
    from conftest import ragged_pairs
    from test_step import gradients, lora_model

    model, pairs = lora_model(tiny_llama()), ragged_pairs(6)
    chosen = recipe(micro_batch_tokens=60)
    honest, calls = PairModel.forward, []

    def forward(self: PairModel, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return honest(self, batch)

    monkeypatch.setattr(PairModel, "forward", forward)
    with pytest.raises(training_step.OutOfMemory):
        gradients(model, pairs, chosen)
    assert len(calls) == 2
    assert all(parameter.grad is None for _, parameter in model.trained())


def test_an_embedding_set_to_the_host_is_counted_away_once() -> None:
    moved, least = planner(embedding_on_cpu=True), planner()
    assert least.smallest_settings()["embedding_on_cpu"] is True
    assert moved.least_bytes(GPU) == least.least_bytes(GPU)


def test_a_step_of_few_tokens_passes_at_once_where_memory_allows() -> None:
    """Nothing is gained by passes of one pair; a step may have fewer tokens than the sizes that are tried."""
    chosen = settings()
    assert (
        Planner(chosen, small(), worst_case(512, 2), "ampere")
        .plan(None, GPU)
        .settings["micro_batch_tokens"]
        == 2_048
    )
    short = worst_case(100, 2)
    assert (
        Planner(chosen, small(), short, "ampere").plan(None, GPU).settings["micro_batch_tokens"]
        == 400
    )


def test_gpt2_is_planned_in_4_bit_as_it_is_loaded(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, **IDS)
    base = write_base(tmp_path / "base", GPT2LMHeadModel(config))
    model = load_pair_model(recipe(), Base(str(base), base, None, "", config), torch.device("cpu"))
    planned = bare_pair_model(recipe(), config, torch.float32)
    for part, tensors in held_tensors(model).items():
        assert sum(t.nbytes for t in tensors) == sum(
            t.nbytes for t in held_tensors(planned)[part]
        ), part
    assert {type(module).__name__ for module in planned.modules()} == {
        type(m).__name__ for m in model.modules()
    }


@pytest.mark.long
def test_what_fits_no_gpu_ends_with_6_and_says_what_would(call: Call, workspace: Path) -> None:
    wide = small(
        12,
        hidden_size=16_384,
        intermediate_size=65_536,
        num_attention_heads=64,
        num_key_value_heads=64,
    )
    wide.save_pretrained(workspace / "base")
    keys = (
        "model.model_name_or_path=./base",
        "data.max_length=256",
        "data.max_prompt_length=64",
        *FEW,
    )
    keys = ("quantization.load_in_4bit=false", "lora.r=8", *keys)
    code, said, complaint = call("plan", "--recipe", "mistral-qlora", *keys)
    assert code == 6, (said, complaint)
    assert "quantization.load_in_4bit=true" in complaint
    assert "download" not in said


@pytest.mark.long
def test_memory_settings_are_proposed_before_anything_is_trained_otherwise() -> None:
    plans = planner(packing=False, micro_batch_size=2, prompt_sharing=False)
    (first, *_) = plans.changes(10 * GIB, GPU)
    assert first.keys == {
        "memory.packing": True,
        "memory.prompt_sharing": True,
        "memory.micro_batch_size": 1,
    }
    assert first.fits
    short = Planner(settings(), small(), worst_case(60, 2), "ampere")
    assert all(change.keys.get("data.max_length", 0) <= 30 for change in short.changes(MIB, GPU))


def test_a_limit_beyond_the_base_s_is_said(call: Call, workspace: Path) -> None:
    keys = (
        "model.model_name_or_path=./base",
        "data.max_length=512",
        "data.max_prompt_length=64",
        *FEW,
    )
    _, said, _ = call("plan", "--recipe", "mistral-qlora", *keys)
    assert (
        "note: the base reads at most 256 tokens, so training refuses a sequence of 512: "
        "set data.max_length=256" in said
    )
