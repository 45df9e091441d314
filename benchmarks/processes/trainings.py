"""Whole trainings by ``orpo-lite launch``: killed, resumed, and resumed by fewer processes."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "calm wide small warm quick plain round quiet light sharp clean simple".split()
RECIPE = """\
model: {model_name_or_path: FOLDER/base}
data:
  dataset_name: FOLDER/pairs.jsonl
  test_split_size: 0.2
  max_length: 128
  max_prompt_length: 96
lora: {r: 4}
training:
  output_dir: FOLDER/run
  num_train_epochs: 12
  global_batch_size: 8
  learning_rate: 1e-3
  eval_steps: 0.5
memory: {micro_batch_tokens: 128}
output: {samples: 1, max_new_tokens: 8, report: false, merge: false}
"""
LIMIT = 30.0
"""Seconds in which all processes must have ended after one was killed."""


def write_inputs(folder: Path) -> None:
    """Write a small base, pairs and a recipe into a folder."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    letters = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rng, rows = random.Random(0), []
    for number in range(40):
        chosen, rejected = (" ".join(rng.sample(WORDS, rng.randrange(2, 6))) for _ in range(2))
        prompt = f"Item {number}: how is it?"
        rows.append(
            {"prompt": prompt, "chosen": f"It is {chosen}.", "rejected": f"No, {rejected}!"}
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(folder)), "utf-8")


def launch(folder: Path, processes: int, *words: str) -> subprocess.Popen[str]:
    """Start ``orpo-lite launch`` with the command ``train`` and ``words``."""
    command = [sys.executable, "-m", "orpo_lite", "launch", "--processes", str(processes), "--"]
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        return subprocess.Popen(
            [*command, "train", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CI": "true"},
            text=True,
            cwd=folder,
        )


def finish(folder: Path, processes: int, *words: str) -> None:
    """Run :func:`launch` to its end. Raises RuntimeError if it fails."""
    if launch(folder, processes, *words).wait():
        raise RuntimeError((folder / "output.txt").read_text("utf-8")[-3000:])


def times(folder: Path, processes: int, *words: str) -> tuple[float, float]:
    """Run a new training. Return the seconds until its first step was logged, and to its end."""
    began, first = time.monotonic(), 0.0
    process = launch(folder, processes, *words)
    while process.poll() is None:
        first = first or (time.monotonic() - began if losses_so_far(folder / "run") else 0.0)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError((folder / "output.txt").read_text("utf-8")[-3000:])
    return first, time.monotonic() - began


def start(shard: int | str) -> Sequence[str]:
    """Return the words after ``train`` for a new run whose base is shared by ``shard``."""
    return "--recipe", "./recipe.yaml", f"memory.shard={shard}"


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a finished run's adapter."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> dict[int, float]:
    """Return step -> the logged loss."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def resume_figures(folder: Path, world: int) -> Iterator[dict[str, Any]]:
    """Yield how far a run of ``world`` processes is from one that fewer processes continued.

    Errors are relative: of each logged loss, and of the norm of the adapter.
    """
    run, saved = folder / "run", folder / "saved"
    rmtree(run, ignore_errors=True)
    process = launch(folder, world, *start(world))
    while process.poll() is None and len(losses_so_far(run)) < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the step is finished and saved
    process.wait()
    copytree(run, saved)
    steps = max(losses(run))
    finish(folder, world, "--resume", "run")
    expected, logged = adapter(run), losses(run)
    largest = {"resume_other_world_loss_error": 0.0, "resume_other_world_error": 0.0}
    for fewer in [count for count in (2, 1) if count < world]:
        rmtree(run)
        copytree(saved, run)
        shard = fewer if fewer > 1 else "off"
        finish(folder, fewer, "--resume", "run", f"memory.shard={shard}")
        found = adapter(run)
        wrong = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
        size = sum(float(expected[name].square().sum()) for name in expected)
        rest = {step: loss for step, loss in losses(run).items() if step > steps}
        errors = (
            max(abs(loss / logged[step] - 1) for step, loss in rest.items()),
            (wrong / size) ** 0.5,
        )
        yield {f"saved_on_{world}_resumed_on_{fewer}": {"steps": len(rest), "errors": errors}}
        largest = {
            key: max(value, e) for (key, value), e in zip(largest.items(), errors, strict=True)
        }
    yield largest


def losses_so_far(run: Path) -> dict[int, float]:
    """Return :func:`losses` of a run that may not have begun, or whose last line is not whole."""
    try:
        return losses(run)
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def kill_figures(folder: Path, *, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Kill a random process of two at a random time, resume, and compare the adapters' bits.

    Yield, after each kill, the number of kills after which all was right: the others ended in LIMIT
    seconds, one message was printed, and the resumed run ended with the adapter of a run without a
    kill.
    """
    run, rng = folder / "run", random.Random(seed)
    right, slowest, when, faults = 0, 0.0, [], []
    for shard in ("off", 2):
        rmtree(run, ignore_errors=True)
        first, whole = times(folder, 2, *start(shard))
        expected = adapter(run)
        for _ in range(kills // 2):
            step = -1
            while step < 0:  # the process had ended before
                rmtree(run, ignore_errors=True)
                rank, wait = rng.randrange(2), rng.uniform(0.8 * first, whole)
                fault, seconds, step, fix = kill(folder, shard, rank, wait)
            slowest = max(slowest, seconds)
            when.append(step)
            if not fault:
                finish(folder, 2, *fix)
                found = adapter(run)
                if not all(torch.equal(found[name], expected[name]) for name in expected):
                    fault = "another adapter"
            right += not fault
            faults += [f"{fault} (shard {shard}, rank {rank}, after {wait:.1f} s)"] * bool(fault)
            yield {
                "kills_ok": right,
                "kills_total": len(when),
                "kill_seconds": round(slowest, 1),
                "killed_at_steps": [*when],
                "kill_faults": [*faults],
            }


def kill(
    folder: Path, shard: int | str, rank: int, wait: float
) -> tuple[str, float, int, Sequence[str]]:
    """Start a run, and kill one of its processes after ``wait`` seconds.

    Return what is wrong, or ""; the seconds until all processes had ended; the last step that was
    logged; and the words after ``train`` of the command that the message gives. If the process had
    ended before, the step is -1.
    """
    again: Sequence[str] = start(shard)
    process = launch(folder, 2, *again)
    time.sleep(wait)
    try:
        launcher = psutil.Process(process.pid)
        family = launcher.children(recursive=True)
        step = max(losses_so_far(folder / "run"), default=0)
        (chosen,) = [
            child for child in launcher.children() if child.environ().get("RANK") == str(rank)
        ]
        chosen.send_signal(signal.SIGKILL)
    except (ValueError, psutil.NoSuchProcess):  # also a zombie
        if process.wait():
            raise RuntimeError((folder / "output.txt").read_text("utf-8")[-3000:]) from None
        return "", 0.0, -1, again
    began = time.monotonic()
    code = process.wait()
    psutil.wait_procs(family, timeout=max(0.0, LIMIT - (time.monotonic() - began)))
    seconds = time.monotonic() - began
    text = (folder / "output.txt").read_text("utf-8")
    command = "  fix: orpo-lite launch --processes 2 -- train "
    said = re.findall(rf"process {rank} was ended by SIGKILL.*\n{re.escape(command)}(.*)\n", text)
    fault = ""
    if any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family):
        fault = "a process did not end"
    elif code != 128 + signal.SIGKILL:
        fault = f"exit code {code}"
    elif len(said) != 1 or text.count("fix: ") > 1 or "Traceback" in text:
        fault = f"not one message: {text[-2000:]}"
    else:
        again = shlex.split(said[0])
    return fault, seconds, step, again
