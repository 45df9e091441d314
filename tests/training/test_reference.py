"""The reference pass: computed once, kept, resumed with equal bits, by the base or an adapter."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from safetensors.torch import load_file, save_file
from test_resume import go_on, same_bits, stop_at

from orpo_lite.api import train, train_events
from orpo_lite.data import cache
from orpo_lite.data.reference_cache import RECORD
from orpo_lite.errors import ModelError
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import read_metrics
from orpo_lite.training import reference

Build = Callable[..., Recipe]
DPO = ("loss.type=dpo", "output.samples=0", "training.max_steps=2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of tokens that no other test has filled."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    cache.cache_folder.cache_clear()
    yield folder
    cache.cache_folder.cache_clear()


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of each block that a reference pass scores; blocks are small."""
    counts: list[int] = []
    plain = reference.score
    monkeypatch.setattr(reference, "BLOCK", 4)
    monkeypatch.setattr(
        reference,
        "score",
        lambda model, pairs, *a, **k: counts.append(len(pairs)) or plain(model, pairs, *a, **k),
    )
    return counts


def first_row(run: Path) -> dict[str, Any]:
    return read_metrics(run)[0]


def test_a_reference_is_computed_once_and_a_stopped_pass_goes_on(
    small_recipe: Build,
    scored: list[int],
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    done = 0
    stopped = small_recipe(*DPO, "training.output_dir=stopped")
    with pytest.raises(Interrupted):
        for update in train_events(stopped):
            if update.text == reference.STAGE and not done and update.step >= 6:
                done = update.step
                os.kill(os.getpid(), signal.SIGTERM)
    assert sum(scored) == done < 16  # of the pairs of two steps
    (file,) = own_cache.glob("*/reference-*.bin")
    with file.open("ab") as stream:
        stream.write(b"half a record")
    _, resumed = go_on(Path("stopped"))
    assert sum(scored) == 24  # and 8 held-out pairs
    assert file.stat().st_size == 24 * RECORD.itemsize
    assert first_row(resumed.run)["eval_loss"] == pytest.approx(0.693147, abs=1e-6)

    again = train(small_recipe(*DPO, "training.output_dir=again"))
    assert sum(scored) == 24  # no reference pass
    assert same_bits(again.run, resumed.run)
    killed = stop_at(1, small_recipe(*DPO, "training.output_dir=killed"))
    assert same_bits(go_on(killed)[1].run, again.run)

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "empty"))
    cache.cache_folder.cache_clear()
    whole = train(small_recipe(*DPO, "training.output_dir=whole"))
    assert sum(scored) == 48
    assert same_bits(whole.run, resumed.run)

    (file,) = (tmp_path / "empty").glob("*/reference-*.bin")
    content = bytearray(file.read_bytes())
    content[3 * RECORD.itemsize + 9] ^= 1
    file.write_bytes(content)
    train(small_recipe(*DPO, "training.output_dir=damaged"))
    assert sum(scored) == 49


@pytest.mark.long
def test_the_reference_is_the_start_of_the_training_or_a_named_adapter(
    small_recipe: Build, scored: list[int], call: Callable[..., Answer]
) -> None:
    one_step = (*DPO, "training.max_steps=1")
    sft = train(
        small_recipe(
            "loss.type=sft",
            "output.samples=0",
            "training.output_dir=sft",
            "training.learning_rate=1e-2",
        )
    )
    start = f"model.adapter_name_or_path={sft.run / 'adapter'}"
    log2 = pytest.approx(0.693147, abs=1e-6)
    tuned = train(small_recipe(*one_step, start, "training.output_dir=a"))
    assert first_row(tuned.run)["eval_loss"] == log2
    named = train(
        small_recipe(
            *one_step,
            f"loss.reference_adapter_name_or_path={sft.run / 'adapter'}",
            "lora.r=4",
            "training.output_dir=b",
        )
    )
    assert first_row(named.run)["eval_loss"] != log2
    scored.clear()
    base = train(
        small_recipe(
            *one_step, start, "loss.reference_adapter_name_or_path=base", "training.output_dir=c"
        )
    )
    assert first_row(base.run)["eval_loss"] != log2
    assert sum(scored) == 16
    code, _, complaint = call(
        "train",
        "--recipe",
        "./small.yaml",
        *DPO,
        "loss.reference_adapter_name_or_path=./nowhere",
        "training.output_dir=d",
    )
    assert code == 4, complaint
    assert "loss.reference_adapter_name_or_path: ./nowhere: no such folder" in complaint
    assert not Path("d").exists()


def test_a_resumed_run_has_the_reference_that_it_began_with(small_recipe: Build) -> None:
    first = train(small_recipe("loss.type=sft", "output.samples=0", "training.max_steps=1"))
    shutil.copytree(first.run / "adapter", "named")
    named = ("loss.reference_adapter_name_or_path=named", "data.test_split_size=0")
    stop_at(1, small_recipe(*DPO, *named, "training.output_dir=dpo"))
    kept = (Path("dpo") / "reference_adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree("named")
    go_on(Path("dpo"))
    assert (Path("dpo") / "reference_adapter" / "adapter_model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("fault", ["renamed", "partial", "shapes"])
def test_a_reference_that_does_not_fit_is_refused(
    trained: Any, small_recipe: Build, fault: str
) -> None:
    shutil.copytree(Path("run") / "adapter", "other")
    file = Path("other") / "adapter_model.safetensors"
    tensors = load_file(file)
    if fault == "renamed":
        tensors = {name.replace("self_attn", "attention"): t for name, t in tensors.items()}
    elif fault == "partial":
        tensors = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    else:
        tensors = {name: torch.cat([tensor, tensor], 1) for name, tensor in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(ModelError):
        train(
            small_recipe(
                *DPO, "loss.reference_adapter_name_or_path=other", "training.output_dir=dpo"
            )
        )


@pytest.mark.long
def test_a_cache_that_cannot_be_written_is_a_note(small_recipe: Build, own_cache: Path) -> None:
    train(small_recipe(*DPO, "training.output_dir=one"))
    (file,) = own_cache.glob("*/reference-*.bin")
    file.unlink()
    file.mkdir()
    said = [update.text for update in train_events(small_recipe(*DPO, "training.output_dir=two"))]
    assert sum("not kept on disk" in text for text in said) == 2  # of the two splits
    assert same_bits(Path("one"), Path("two"))


def test_sft_trains_on_chosen_replies_only(small_recipe: Build) -> None:
    result = train(small_recipe("loss.type=sft", "output.samples=0", "training.learning_rate=1e-2"))
    rows = read_metrics(result.run)
    steps = [row for row in rows if "loss" in row]
    orpo = train(small_recipe("output.samples=0", "training.output_dir=orpo"))
    tokens = next(row for row in read_metrics(orpo.run) if "loss" in row)["num_tokens"]
    assert 0.3 < steps[0]["num_tokens"] / tokens < 0.7
    assert result.after["eval_loss"] < result.before["eval_loss"]
    assert result.verdict is not None
    assert np.isfinite(result.verdict["models"][0]["accuracy"]["value"])
    assert torch.isfinite(torch.tensor([row["loss"] for row in steps])).all()
