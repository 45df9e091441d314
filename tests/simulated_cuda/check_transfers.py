"""How often the host waits for the simulated device, and what is sent between them: by layer and by micro-batch."""

from collections import Counter
from typing import Any

import pytest
import simulated_cuda
import torch
from conftest import ragged_pairs, tiny_llama
from test_memory import recipe

from orpo_lite.model.load import bare_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.objectives.objective import find_objective
from orpo_lite.ops import lora
from orpo_lite.training.step import accumulate

CUDA = torch.device("cuda", 0)
PAIRS = ragged_pairs(6, vocab_size=98)
Told = Counter[tuple[str, str, str]]


def step(layers: int, micro_batches: int, dtype: torch.dtype, **memory: Any) -> Told:
    """What the gradient of one step waits for and sends."""
    settings = recipe(
        micro_batch_size=len(PAIRS) // micro_batches, micro_batch_tokens=10_000, **memory
    )
    model: PairModel = bare_pair_model(
        settings, tiny_llama(98, num_hidden_layers=layers).config, dtype, CUDA
    )
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    for _ in range(2):  # the second one: the first makes what is kept
        with simulated_cuda.told() as found:
            accumulate(
                model,
                find_objective(settings.loss),
                PAIRS,
                model.batching(settings, 0),
                step=0,
                seed=0,
                processes=Processes(),
                scaler=scaler,
            )
    return found


def waits(told: Told) -> Told:
    """Those of them that the host waits for."""
    return Counter(
        {
            key: count
            for key, count in told.items()
            if key[0] == "sync" or key[0].endswith("waiting")
        }
    )


def by_layer(dtype: torch.dtype, **memory: Any) -> Told:
    """What each further layer adds."""
    more = step(4, 1, dtype, **memory)
    more.subtract(step(2, 1, dtype, **memory))
    return +more


def by_micro_batch(dtype: torch.dtype, **memory: Any) -> Told:
    """What two further micro-batches add."""
    more = step(2, 3, dtype, **memory)
    more.subtract(step(2, 1, dtype, **memory))
    return +more


ALL = {
    "checkpoint_offload": True,
    "mlp_tile": 64,
    "embedding_on_cpu": True,
    "activation_checkpointing": "all",
}


@pytest.mark.parametrize("memory", [{}, ALL], ids=["plain", "all"])
def test_nothing_waits_in_a_layer(memory: dict[str, Any]) -> None:
    found = by_layer(torch.bfloat16, **memory)
    assert waits(found) == {}
    sent = Counter(kind for kind, *_ in found.elements() if kind.startswith("to "))
    assert sent == ({"to host": 2, "to device": 2} if memory else {}), (
        found
    )  # the inputs of two more layers


@pytest.mark.parametrize("memory", [{}, ALL], ids=["plain", "all"])
def test_a_micro_batch_waits_a_few_times(memory: dict[str, Any]) -> None:
    found = by_micro_batch(torch.bfloat16, **memory)
    assert sum(waits(found).values()) <= 2 * 4, waits(found)


def test_a_layer_that_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a number that is read for a check."""
    honest = lora.lora_linear

    def waiting(x: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        assert x.sum().isfinite().item()
        return honest(x, *given, **options)

    monkeypatch.setattr(lora, "lora_linear", waiting)
    assert sum(waits(by_layer(torch.bfloat16)).values()) >= 2 * 7  # once in each linear layer
