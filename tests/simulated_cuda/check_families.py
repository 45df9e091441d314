"""Model families on the simulated device: compared at load, and one step through them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import first_and_long, ragged_pairs
from test_families import ALONE, GROUPED, LONG, SHARED, adapted, family, recipe

from orpo_lite.data.packing import make_batch
from orpo_lite.model.memory import apply_memory_settings
from orpo_lite.model.probe import probe
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss

MORE: dict[str, Callable[[], Any]] = {
    "starcoder2": family("Starcoder2", GROUPED, sliding_window=None),
    "olmo": family("Olmo", LONG),
    "glm": family("Glm", GROUPED, head_dim=16),
}
LACKING = ("lfm2: convolutions",)  # the gradient of a depthwise convolution is not simulated
FAMILIES = {
    name: make
    for name, make in {
        **SHARED,
        **MORE,
        **{name: make for name, (make, _) in ALONE.items()},
    }.items()
    if name not in LACKING
}
assert len(FAMILIES) >= 18


def on_device(name: str, dtype: torch.dtype, **memory: Any) -> Any:
    """The family's model as it trains: a base in half precision, an adapter in float32."""
    model = adapted(lambda: FAMILIES[name]().to(dtype), **memory)
    for parameter in model.model.parameters():
        parameter.data = (
            parameter.data.float() if parameter.requires_grad else parameter.data.to(dtype)
        )
    model.model.to("cuda")
    apply_memory_settings(model, recipe(**memory))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", first_and_long(FAMILIES))
def test_a_family_is_compared_and_takes_a_step(name: str, dtype: torch.dtype) -> None:
    memory = {"mlp_tile": 16, "checkpoint_offload": True}
    model = on_device(name, dtype, **memory)
    probe(model, 256)
    assert model.route == ("rows" if name in ALONE else "shared"), model.notes
    assert not [note for note in model.notes if "not used" in note or "its code" in note]
    pairs = ragged_pairs(4, vocab_size=98)
    batch = make_batch(pairs, model.batching(recipe(**memory), pad_id=0)).to(model.device)
    loss, _ = orpo_loss(model(batch), Divisors(4, 100), beta=0.5)
    loss.backward()
    grads = [parameter.grad for _, parameter in model.trained() if parameter.grad is not None]
    assert grads
    assert all(grad.is_cuda and bool(grad.isfinite().all()) for grad in grads)
    assert any(bool(grad.any()) for grad in grads)
