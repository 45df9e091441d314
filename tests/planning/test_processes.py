"""The plan for several processes: its figures by hand, and its bytes against FSDP2 of 8 and 64 processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama, write_base
from test_families import ALONE, SHARED
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.processes.memory import peaks
from orpo_lite import plan
from orpo_lite.base.find import fetch_weights, find_base
from orpo_lite.errors import FitError, ModelError
from orpo_lite.model.load import load_pair_model
from orpo_lite.model.load_sharded import load_outer
from orpo_lite.model.parallel import Processes
from orpo_lite.model.sharding import divide_layer, divide_root, local_bytes
from orpo_lite.planning.fit import fit
from orpo_lite.planning.gathers import part_sizes
from orpo_lite.planning.on_meta import worst_case
from orpo_lite.planning.processes import GATHERS_PER_PASS
from orpo_lite.planning.search import Planner
from orpo_lite.recipe.reader import load_recipe

Build = Callable[..., Any]
LAYERS = 12
# A layer of tiny_llama: q, k, v and o of 64 x 64 and 64 x 32, and three matrices of 64 x 128; two weights a byte.
LAYER_BYTES = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) // 2

# One choice of memory settings, so that a plan is quick.
FIXED = [
    f"memory.{setting}"
    for setting in "activation_checkpointing=all checkpoint_offload=false embedding_on_cpu=false "
    "head_chunk=64 mlp_tile=null micro_batch_tokens=256".split()
]


@pytest.fixture
def deep_recipe(workspace: Path, small_recipe: Build) -> Build:
    """Builds a recipe on a base of 12 tiny layers."""
    write_base(workspace / "base", tiny_llama(99, num_hidden_layers=LAYERS))
    return lambda *keys: small_recipe("quantization.load_in_4bit=true", *keys)


def test_the_figures_of_a_plan_follow_from_its_formulas(deep_recipe: Build) -> None:
    report = plan(deep_recipe(*FIXED, "memory.shard=4", "memory.micro_batch_size=1"), processes=8)
    whole, shared = report.processes
    assert (whole.shards, shared.shards) == (1, 4)
    assert shared.pairs == shared.passes == 1  # a step of 8 pairs
    adapter = shared.memory.measured.held["gradients"]
    for form in (whole, shared):
        assert form.gradient_bytes == 2 * 7 * adapter // 8
    assert whole.weight_bytes == 0
    assert shared.weight_bytes == 2 * 3 * LAYERS * LAYER_BYTES // 4
    saved = whole.memory.parts["base"] - shared.memory.parts["base"]
    # A quarter of a matrix of 64 x 32 has 256 bytes, and an allocation has 512 at least.
    assert saved == LAYERS * (LAYER_BYTES - LAYER_BYTES // 4 - 2 * 256)
    assert shared.memory.parts["gathered layers"] == 2 * LAYER_BYTES
    rate = report.plan.gpu and shared.link[1]
    assert shared.sending_seconds == (shared.gradient_bytes + shared.weight_bytes) / rate
    assert shared.computing_seconds == shared.memory.seconds_per_pair
    assert f"= {shared.weight_bytes:,} B" in "\n".join(shared.formulas())
    assert [form["fits"] for form in report.to_json()["processes"]] == [True, True]


def test_a_base_that_does_not_fit_whole_is_shared_by_as_few_as_fit(deep_recipe: Build) -> None:
    recipe = deep_recipe(*FIXED)
    config = find_base("base", "main").config
    triples = worst_case(128, 8, has_rejected=True)
    planner = Planner(recipe, config, triples, "ampere")
    needed = {n: planner.sharing(n).plan(0, None).needed for n in (1, 2, 4)}
    assert sorted(needed.values(), reverse=True) == [*needed.values()]
    for budget, shares, shard in (
        (needed[1], [2, 4], None),
        (needed[1] - 1, [2, 4], 2),
        (needed[2] - 1, [2, 4], 4),
    ):
        found = fit(recipe, config, triples, "ampere", budget, None, shares)
        assert found.settings.get("shard") == shard
        assert recipe.with_memory(found.settings).memory.shards == (shard or 1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (SHARED["mixtral"], "transformers converts the weights of mixtral"),
        (
            ALONE["bloom: ALiBi"][0],
            "each sequence goes through bloom alone, unless memory.packing=false is set",
        ),
    ],
)
def test_auto_leaves_a_base_whole_that_loading_could_not_share(
    make: Build, reason: str, workspace: Path, small_recipe: Build
) -> None:
    write_base(workspace / "base", make())
    recipe, base = small_recipe(*FIXED, "model.dtype=bfloat16"), find_base("base", "main")
    with pytest.raises(FitError, match=reason):
        fit(recipe, base.config, worst_case(32, 1, has_rejected=True), "cpu", 9, None, [2])
    if "converts" in reason:
        report = plan(recipe, processes=2)
        assert len(report.processes) == 1
        assert any(reason in note for note in report.notes)
        with pytest.raises(ModelError, match=reason):
            load_outer(recipe, fetch_weights(base), torch.float32, Processes(cpu=True))


def test_a_process_that_shares_the_base_has_the_planned_bytes(tmp_path: Path) -> None:
    """Under torch's fake process group, whose other processes are not there."""
    sizes = {"hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 3}
    write_base(tmp_path / "base", tiny_llama(**sizes))  # the rows of no matrix divide by 64
    name = str(tmp_path / "base")
    recipe = load_recipe("mistral-qlora", [f"model.model_name_or_path={name}"])
    base = fetch_weights(find_base(name, "main"))
    model = load_pair_model(recipe, base, torch.device("cpu"))
    before = [planned - live for planned, live in peaks(model, recipe)]
    for world in (8, 64):
        model = load_pair_model(recipe, base, torch.device("cpu"))
        planned_share = sum(sum(part_sizes(layer, world)) for layer in model.layers)
        init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            mesh = init_device_mesh("cpu", (world,))
            for layer in model.layers:
                divide_layer(layer, mesh)
            divide_root(model, mesh)
            with CommDebugMode() as collectives:
                model.causal(torch.arange(3, 40)[None]).logits.sum().backward()
            shared = [*peaks(model, recipe.with_memory({"shard": world}))]
        finally:
            destroy_process_group()
        assert local_bytes(model) == planned_share
        gathers = [n for kind, n in collectives.get_comm_counts().items() if "gather" in str(kind)]
        assert sum(gathers) == GATHERS_PER_PASS * len(model.layers)
        # Sharing adds nothing to the small error of the plan for a whole base.
        assert [planned - live for planned, live in shared] == before
        assert all(planned == pytest.approx(live, rel=0.001) for planned, live in shared)
