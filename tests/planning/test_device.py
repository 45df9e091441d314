"""What a training runs on is said, and a large base is not trained on a CPU next to a GPU without being asked to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from orpo_lite.api import train_events
from orpo_lite.errors import FitError
from orpo_lite.planning.device import describe_device, refuse_slow_device

CPU = torch.device("cpu")
# 1.1 billion parameters, most of them in the embeddings: nothing of it is ever made.
LARGE = LlamaConfig(
    vocab_size=262_144, hidden_size=2_048, num_hidden_layers=1, intermediate_size=2_048
)
SMALL = LlamaConfig(vocab_size=98, hidden_size=64, num_hidden_layers=1)


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose driver is older than this torch's CUDA."""
    import pynvml

    for function in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, function, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda _: "handle")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "550.54.14")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("old_driver")
def test_a_large_base_is_not_trained_on_a_cpu_next_to_a_gpu() -> None:
    with pytest.raises(FitError) as refusal:
        refuse_slow_device(CPU, "auto", "some/base", LARGE)
    said = str(refusal.value)
    for part in (
        "RTX 4090",
        "driver 550.54.14",
        "CUDA 13.0, which needs driver 580 or newer",
        "update the driver",
        "1.1 billion",
    ):
        assert part in said
    assert refusal.value.fix.values == {"model.device": "cpu"}  # type: ignore[attr-defined]
    refuse_slow_device(CPU, "cpu", "some/base", LARGE)
    refuse_slow_device(CPU, "auto", "some/base", SMALL)
    assert describe_device(CPU).endswith("needs driver 580 or newer; update the driver")


@pytest.mark.usefixtures("old_driver")
def test_a_gpu_that_is_hidden_on_purpose_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert describe_device(CPU) == f"training on the CPU ({torch.get_num_threads()} threads)"
    refuse_slow_device(CPU, "auto", "some/base", LARGE)


@pytest.mark.usefixtures("old_driver")
def test_train_refuses_before_weights_load(
    small_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orpo_lite.planning.device.CPU_LIMIT", 1_000)
    with pytest.raises(FitError, match="would be trained on the CPU"):
        list(train_events(small_recipe()))
    updates = train_events(small_recipe("model.device=cpu", "training.max_steps=1"))
    assert next(updates).text.startswith("training on the CPU")
    assert "loading" in [update.text.split()[0] for update in updates]
