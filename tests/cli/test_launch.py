"""`orpo-lite launch`: what it refuses, how it says that processes failed, and runs whose processes are killed."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer
from transformers import AutoConfig, BloomConfig, BloomForCausalLM, LlamaForCausalLM

from benchmarks.processes.trainings import finish, kill_figures, launch, losses, start, write_inputs
from orpo_lite import train
from orpo_lite.errors import FitError
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.text import read_bytes

Call = Callable[..., Answer]


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        ("--processes 2", "there is no command", "orpo-lite launch --processes 2 -- train --recipe demo"),
        ("--processes 2 -- merge run", "the command is merge", "-- train --recipe demo"),
        ("--machines 2 -- train --recipe demo", "--machines 2 without --main-address", "--main-address HOST"),
        ("--machines 2 --machine-rank 2 --main-address a -- train", "--machine-rank 2", "--machines 3"),
        ("--processes 2 -- train --recipe no-such", "no shipped recipe has this name", "recipes ls"),
        ("--processes 2 -- train --recipe demo lora.rr=3", "unknown key lora.rr", "lora.r"),
        ("--processes 2 -- train --recipe demo memory.shard=3", "memory.shard=3 with 2", "memory.shard=auto"),
        ("--processes 2 -- train --recipe demo memory.shard=3 --dry-run", "memory.shard=3 with 2", "memory.shard=auto"),
        ("--machine 2 -- train --recipe demo", "--machine is not", "launch --help"),
        ("--machines 2 --main-address no-such-host.invalid -- train --recipe demo", "no such host", "--main-address"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_a_process_starts(
    words: str, found: str, fix: str, call: Call
) -> None:
    code, printed, complaint = call("launch", *words.split())
    assert (code, printed) == (2, "")
    assert found in complaint
    assert fix in complaint.splitlines()[-1]


@pytest.mark.long
def test_processes_that_all_fail_give_one_error_with_a_fix(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    assert launch(tmp_path, 2, *start(2), "data.dataset_name=absent.jsonl").wait() == 3
    said = (tmp_path / "output.txt").read_text("utf-8")
    assert said.count("fix: ") == said.count("expected: ") == 1
    assert "absent.jsonl" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_killed_process_ends_all_and_the_printed_fix_continues(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    *_, found = kill_figures(tmp_path, kills=2, seed=0)
    assert found["kills_ok"] == found["kills_total"] == 2, found
    assert found["kill_seconds"] <= 30


SHORTAGE = """\
import os
if os.environ.get("RANK") == "1":
    import torch
    from orpo_lite.model.pair_model import PairModel
    honest = PairModel.forward
    def forward(self, batch):
        if torch.is_grad_enabled() and hasattr(batch, "segments") and len(batch.input_ids_T) > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(self, batch)
    PairModel.forward = forward
"""
MEMORY = """\
memory: {micro_batch_tokens: 512, activation_checkpointing: all, checkpoint_offload: false,
         embedding_on_cpu: false, head_chunk: 64, mlp_tile: null, budget: BUDGET}
"""


@pytest.mark.long
def test_a_base_that_does_not_fit_is_shared_and_a_shortage_of_one_process_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process runs short in its first step. Both end, and the printed fix trains to the end."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = AutoConfig.from_pretrained("base")
    base.hidden_size, base.intermediate_size, base.num_hidden_layers = 128, 512, 16
    LlamaForCausalLM(base).save_pretrained("base")
    text = Path("recipe.yaml").read_text("utf-8")
    recipe = text.replace("memory: {micro_batch_tokens: 128}\n", MEMORY)
    recipe = recipe.replace("num_train_epochs: 12", "max_steps: 3")
    Path("recipe.yaml").write_text(recipe.replace("BUDGET", "1MiB"), encoding="utf-8")
    with pytest.raises(FitError) as alone:
        train(load_recipe("./recipe.yaml", []))
    needed = read_bytes(re.findall("at least (.*) are needed", str(alone.value))[0])
    Path("recipe.yaml").write_text(recipe.replace("BUDGET", f"{needed - 2**19}B"), "utf-8")
    Path("sitecustomize.py").write_text(SHORTAGE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    assert launch(tmp_path, 2, "--recipe", "./recipe.yaml").wait() == 6
    said = Path("output.txt").read_text("utf-8")
    assert json.loads(Path("run/plan.json").read_text("utf-8"))["levers"]["shard"] == 2
    assert "Traceback" not in said
    (fix,) = re.findall("fix: orpo-lite launch --processes 2 -- train (.*), to resume", said)
    finish(tmp_path, 2, *shlex.split(fix))
    assert json.loads(Path("run/smaller_memory.json").read_text("utf-8"))
    # One process that holds the whole base takes the same steps.
    one = load_recipe(
        "./recipe.yaml", ["memory.budget=auto", "memory.shard=off", "training.output_dir=one"]
    )
    train(one)
    assert losses(Path("run")) == pytest.approx(losses(Path("one")), rel=1e-5)


@pytest.mark.long
def test_processes_refuse_to_share_a_base_through_which_sequences_go_alone(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    config = BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0)
    BloomForCausalLM(config).save_pretrained(tmp_path / "base")
    few = "training.max_steps=3"
    assert launch(tmp_path, 2, *start(2), few).wait() == 4
    said = (tmp_path / "output.txt").read_text("utf-8")
    assert said.count("would not run the same number of passes") == 1
    (fix,) = re.findall("fix: orpo-lite launch --processes 2 -- train (.*)", said)
    finish(tmp_path, 2, *shlex.split(fix))
