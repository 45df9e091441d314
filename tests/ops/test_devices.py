"""Errors of a device, told from faults of the code; the embedding between host and device."""

import pytest
import torch
from conftest import OUT_OF_MEMORY, tiny_llama
from torch import nn

from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.probe import probe
from orpo_lite.ops.devices import is_device_error, is_out_of_memory
from orpo_lite.ops.layers import embed_on_device, embed_on_host


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_memory_that_runs_out_has_several_names(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError(str(error)))


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape '[2, 3]' is invalid for input of size 4"))
    assert not is_device_error(RuntimeError("shape '[2, 3]' is invalid for input of size 4"))
    asserted = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert is_device_error(asserted)
    assert not is_out_of_memory(asserted)


@pytest.mark.parametrize(
    "error",
    [
        *OUT_OF_MEMORY,
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
    ],
    ids=str,
)
def test_an_error_of_the_device_or_of_another_process_is_not_taken_for_a_fault_of_the_model(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison at load would go on by a slower route, and say that the model's code fails."""
    model, honest = PairModel(tiny_llama()), PairModel.score

    def score(self: PairModel, batch: object, route: str) -> object:
        if route == "shared":
            raise error
        return honest(self, batch, route)  # type: ignore[arg-type]

    monkeypatch.setattr(PairModel, "score", score)
    with pytest.raises(type(error)):
        probe(model, 64)


def test_an_embedding_comes_back_from_the_host() -> None:
    """Before prompts are answered: generate() looks for its device at the first parameter."""
    embedding = nn.Embedding(5, 3)
    expected = embedding(torch.tensor([4, 1]))
    embed_on_host(embedding)
    assert "forward" in vars(embedding)
    embed_on_device(embedding, torch.device("cpu"))
    assert "forward" not in vars(embedding)
    assert torch.equal(embedding(torch.tensor([4, 1])), expected)
