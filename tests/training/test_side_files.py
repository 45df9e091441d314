"""What goes with an adapter, what is printed and what is logged: broken in turn, no training is lost for it."""

import errno
import fcntl
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, byte_tokenizer, tiny_llama
from safetensors.torch import load_file
from test_loop import adapter, same_bits, train_all
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lite import train
from orpo_lite.api import train_events
from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.base.generation import read_generation_config
from orpo_lite.errors import FitError, ModelError
from orpo_lite.merging.merge import merge
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.training.adapter_files import make_adapter_files
from orpo_lite.training.checkpoint import find_step
from orpo_lite.updates import run_to_end

Build = Callable[..., Recipe]
Call = Callable[..., Answer]
AS_TRAINED = "training.learning_rate=1e-2"
LAST = 4  # step


def garble(file: Path) -> None:
    file.write_bytes(b"\xff{")


def block(file: Path) -> None:
    """Nothing can be written or read there."""
    file.unlink(missing_ok=True)
    file.mkdir()


def fill(file: Path) -> None:
    """Its disk is full."""
    file.unlink()
    file.symlink_to("/dev/full")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "adapter/tokenizer.json": (garble, ""),
    "adapter/tokenizer_config.json": (garble, ""),
    "adapter/chat_template.jinja": (block, ""),
    "adapter/generation_config.json": (garble, ""),
    "README.md": (block, "the model card (README.md) is not written"),
    "data.json": (garble, "the model card (README.md) is not written"),
    "samples.jsonl": (block, "samples.jsonl is not written"),
    "result.json": (block, "result.json is not written"),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("README.md", "result.json") else pytest.param(name, marks=pytest.mark.long)
        for name in BROKEN
    ],
)
def test_no_broken_side_file_costs_a_finished_training(
    name: str, one_training: tuple[Path, list[Any], Any], small_recipe: Build
) -> None:
    """Broken at the last step, when everything was tried and found well."""
    harm, said = BROKEN[name]
    notes = []
    for update in train_events(small_recipe(AS_TRAINED)):
        if update.kind == "step" and update.step == LAST:
            harm(Path("run") / name)
        if update.kind == "note":
            notes.append(update.text)
    assert same_bits(adapter(one_training[0] / "run"), adapter(Path("run")))
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["r"] == 16
    assert any(said in note for note in notes)


def test_a_run_whose_tokenizer_is_gone_is_merged_after_its_resume(
    trained: Any, call: Call, small_recipe: Build
) -> None:
    garble(Path("run/adapter/tokenizer.json"))
    code, _, error = call("merge", "run")
    assert code == 4
    assert "fix: orpo-lite train --resume run" in error
    train(small_recipe(AS_TRAINED), resume=True)
    assert merge("run").changed


@pytest.mark.parametrize("at", ["open", "write"])
@pytest.mark.long
def test_a_log_that_cannot_be_written_costs_no_training(
    at: str, small_recipe: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(AS_TRAINED)
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # the tests may run under nohup, where it stays ignored
    try:
        with pytest.raises(Interrupted):
            for update in train_events(recipe):
                if update.kind == "step" and update.step == 2:
                    os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    (block if at == "open" else fill)(Path("run/train.log"))
    capfd.readouterr()
    notes = []
    for update in train_events(recipe, resume=True):
        notes += [update.text] if update.kind == "note" else []
        logging.getLogger("some.library").warning("said while it trains")
    assert same_bits(
        adapter(Path("run")), load_file(find_step(Path("run"), LAST) / ADAPTER_WEIGHTS)
    )
    assert any("continues without a log" in note for note in notes) == (at == "open")
    assert "Logging error" not in capfd.readouterr().err


def test_a_full_disk_for_the_metrics_is_said_and_gone_on_from(small_recipe: Build) -> None:
    recipe, file = small_recipe(AS_TRAINED), Path("run/metrics.jsonl")
    with pytest.raises(FitError, match="the disk is full"):
        for update in train_events(recipe):
            if update.kind == "step" and update.step == 2:
                rows = file.read_text()
                fill(file)
    file.unlink()
    file.write_text(rows)
    assert train(recipe, resume=True).steps == LAST


@pytest.mark.long
def test_a_training_outlives_its_terminal(small_recipe: Build) -> None:
    """As under nohup: SIGHUP is ignored, and to write to the terminal is an error (EIO)."""
    small_recipe()
    options = [
        "training.num_train_epochs=3",
        "training.eval_steps=1",
        "output.samples=0",
        "output.merge=false",
    ]
    ours, its = pty.openpty()

    def begin() -> None:
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = [sys.executable, "-m", "orpo_lite", "train", "--recipe", "./small.yaml", *options]
    child = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, preexec_fn=begin)
    os.close(its)
    shown = b""
    while b"held-out at step 1/" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    assert child.wait(timeout=120) == 0
    assert Path("run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("recipes show mistral-qlora >/dev/full", 0),
        ("train --recipe nothing 2>/dev/full", 2),
        ("recipes show mistral-qlora | true", 0),
    ],
)
def test_output_that_goes_nowhere_is_no_fault(command: str, code: int) -> None:
    """A full disk, and a reader that has gone away."""
    line = f"{sys.executable} -m orpo_lite {command}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")


GENERATION: dict[
    str, str
] = {  # those that transformers loads and refuses to save, once a token is added to them
    "top_k": '{"top_k": 20}',
    "min_p": '{"min_p": 0.1}',
    "greedy": '{"do_sample": false, "temperature": 0.0}',
    "llama_2": '{"temperature": 0.6, "top_p": 0.9}',
    "beams": '{"early_stopping": true}',
    "outputs": '{"output_scores": true}',
}
UNLOADABLE = {
    "value": '{"early_stopping": 7}',
    "argument": '{"streamer": 1}',
    "list": "[1]",
    "cut": '{"top_k": 20,',
    "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 111\n",
}


@pytest.mark.parametrize("name", [*GENERATION, *UNLOADABLE])
def test_a_generation_config_keeps_its_meaning(name: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text((GENERATION | UNLOADABLE)[name])
    config, note = read_generation_config(tmp_path)
    if name in GENERATION:
        assert config == json.loads(GENERATION[name])
    else:
        assert "not used: transformers cannot load it" in note
        assert config["eos_token_id"] == 2  # that of config.json


@pytest.mark.parametrize("given", [GENERATION["greedy"], '{"num_return_sequences": 3, "top_k": 5}'])
def test_a_generation_config_goes_through_training_and_merge(
    given: str, small_recipe: Build
) -> None:
    """The second kind transformers refuses to load at all, with the base as well."""
    Path("base/generation_config.json").write_text(given)
    updates, result = train_all(small_recipe(AS_TRAINED, "training.max_steps=2"))
    assert result.samples
    assert any("generation_config.json is not used" in u.text for u in updates) == (
        "num_return" in given
    )
    merged = merge("run").folder
    kept = json.loads((merged / "generation_config.json").read_text())
    if given == GENERATION["greedy"]:
        assert kept == {
            "do_sample": False,
            "temperature": 0.0,
            "eos_token_id": [2],
            "pad_token_id": 0,
        }
    model = AutoModelForCausalLM.from_pretrained(merged)
    inputs = AutoTokenizer.from_pretrained(merged)("Item 1", return_tensors="pt").input_ids
    assert model.generate(inputs, max_new_tokens=2).shape[1] == inputs.shape[1] + 2


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_training(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(ModelError, match="cannot be saved and loaded"):
        train(small_recipe())
    assert not Path("run").exists()


TURNS = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}"
NAMED = {
    "default": TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}",
    "tool_use": "{{ tools[0].name }}" + TURNS,
    "rag": "{{ bos_token }}{{ documents[0].text }}" + TURNS,
}


@pytest.mark.parametrize("as_files", [False, True], ids=["in the configuration", "as files"])
def test_named_templates_stay_with_the_model(as_files: bool, small_recipe: Build) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = dict(NAMED)
    tokenizer.save_pretrained("base", save_jinja_files=as_files)
    recipe = small_recipe(AS_TRAINED, "training.max_steps=2", "output.samples=0")
    # As in training, which has a bos before each text.
    expected = {
        name: text if name == "rag" else "{{ bos_token }}" + text for name, text in NAMED.items()
    }
    if not as_files:
        texts, _ = make_adapter_files(
            run_to_end(prepare_inputs(recipe), lambda _: None), is_reward_model=False
        )
        assert texts["additional_chat_templates/tool_use.jinja"].decode() == expected["tool_use"]
        return
    train(recipe)
    for path in (Path("run/adapter"), merge("run").folder):
        assert AutoTokenizer.from_pretrained(path).chat_template == expected


def test_what_a_file_system_lacks_is_noted(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No locks, as on NFS and Lustre; no fsync of folders, as on some FUSE."""
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    monkeypatch.setattr(fcntl, "flock", refuse)
    updates, result = train_all(small_recipe("training.max_steps=1", "output.samples=0"))
    notes = [update.text for update in updates if "the file system" in update.text]
    assert [note.split("; ")[0].split(": ")[1] for note in notes] == [
        "the file system cannot flush a folder to the disk",
        "the file system has no locks (No locks available)",
    ]
    assert adapter(result.run)
