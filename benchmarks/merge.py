"""Measure the merge of a 3 GB model: memory, speed against a copy of the files, and random kills.

    python -m benchmarks.merge --json FILE

The model (a Llama of random bfloat16 numbers) and its adapter are made first. Each merge runs in a
process of its own. Copies and merges alternate; both read from the page cache and flush what they
write to the disk.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.data import processor
from orpo_lite.base.blocks import BLOCK, Stored, split_into_files, stored_tensors, write_model
from orpo_lite.base.find import fingerprint

GOALS = {
    "peak_rss_over_largest_tensor": "<= 1.5",
    "throughput_vs_copy": ">= 0.35",
    "kills_ok": "20 of 20",
}
SHAPE = {
    "hidden_size": 2_048,
    "intermediate_size": 5_632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
KILLS = 20


def make_run(folder: Path, layers: int, vocab: int = 32_000) -> Path:
    """Make a base with ``layers`` layers and a run as a training leaves it; return its folder."""
    base, path = folder / "base", folder / "run"
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=vocab, dtype="bfloat16")
    base.mkdir()
    config.save_pretrained(base)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    places = [
        Stored(name, base, p.dtype, tuple(p.shape), 0) for name, p in model.named_parameters()
    ]
    files = split_into_files(places, 2 * 10**9)
    for _ in write_model(base, files, _numbers(places)):
        pass
    adapter = path / "adapter"
    adapter.mkdir(parents=True)
    with torch.device("meta"):
        adapted = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        )
    adapted.peft_config["default"].save_pretrained(adapter)
    torch.manual_seed(0)
    tensors = {
        name.replace(".default", ""): torch.randn(parameter.shape) * 0.02
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(adapter)
    GenerationConfig().save_pretrained(adapter)
    recipe = f"model:\n  model_name_or_path: {base}\ndata:\n  dataset_name: none\n"
    (path / "recipe.yaml").write_text(recipe, "utf-8")
    known: dict[str, Any] = {
        "name": str(base),
        "revision": None,
        "path": str(base),
        "fingerprint": fingerprint(base),
    }
    other = {"name": "none", "sha256": ""}
    (path / "lock.json").write_text(
        json.dumps({"base": known, "data": other, "chat_template": other})
    )
    return path


def _numbers(places: list[Stored]) -> Iterator[Tensor]:
    """Yield random numbers; the same block of them is repeated."""
    torch.manual_seed(0)
    block = (torch.randn(BLOCK // 2) * 0.02).to(torch.bfloat16)
    for stored in places:
        left = stored.nbytes // 2
        while left > 0:
            yield block[:left]
            left -= min(left, len(block))


def time_copy(source: Path, target: Path) -> float:
    """Copy the weights and flush them to the disk; return the seconds."""
    target.mkdir()
    began = time.monotonic()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def time_merge(path: Path, weights: str = "original") -> dict[str, float]:
    """Return the seconds and memory of a merge in a process of its own."""
    done = subprocess.run(_command(path, weights), capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _command(path: Path, weights: str = "original") -> list[str]:
    return [sys.executable, "-m", "benchmarks.merge", "--one", str(path), weights]


def merge_in_process(path: Path, weights: Any) -> None:
    """Merge in this process, and print the seconds and memory of it, without the imports."""
    import bitsandbytes  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    from orpo_lite.merging.merge import merge

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = _status("VmRSS"), time.monotonic()
    merge(path, weights=weights)
    print(
        json.dumps(
            {"seconds": time.monotonic() - began, "before": before, "peak": _status("VmHWM")}
        )
    )


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def count_good_kills(path: Path, count: int, seed: int = 0) -> int:
    """Kill ``count`` merges at random times.

    Return how often there is then no merged folder or a complete one.
    """
    shutil.rmtree(path / "merged", ignore_errors=True)
    began = time.monotonic()
    subprocess.run(_command(path), capture_output=True, check=True)
    longest, whole = time.monotonic() - began, _digest(path / "merged")
    rng, good = random.Random(seed), 0
    for number in range(count):
        if number % 2:  # every other merge replaces a merged folder
            shutil.rmtree(path / "merged", ignore_errors=True)
        process = subprocess.Popen(
            _command(path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.5, 1.05) * longest)  # the imports come first
        process.send_signal(signal.SIGKILL)
        process.wait()
        good += not (path / "merged").exists() or _digest(path / "merged") == whole
    return good


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="layers of the base; 32 are 3 GB")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", nargs=2, metavar=("RUN", "WEIGHTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        merge_in_process(Path(options.one[0]), options.one[1])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_run(folder, options.layers)
        tensors = stored_tensors(folder / "base").values()
        size = sum(stored.nbytes for stored in tensors)
        largest = max(stored.nbytes for stored in tensors)
        time_copy(folder / "base", folder / "copy")  # reads the files into the page cache
        copies, merges = [], []
        for _ in range(3):
            copies.append(time_copy(folder / "base", folder / "copy"))
            merges.append(time_merge(path))
        other = time_merge(path, "dequantized")
    with tempfile.TemporaryDirectory() as name:
        path = make_run(Path(name), 4)
        good = count_good_kills(path, KILLS)
    copy = statistics.median(copies)
    seconds = statistics.median(found["seconds"] for found in merges)
    result = {
        "model_gb": round(size / 1e9, 2),
        "largest_tensor_mib": round(largest / 2**20, 1),
        "peak_rss_over_largest_tensor": round(
            max(found["peak"] - found["before"] for found in merges) / largest, 3
        ),
        "throughput_vs_copy": round(copy / seconds, 3),
        "copy_seconds": [round(one, 2) for one in copies],
        "merge_seconds": [round(found["seconds"], 2) for found in merges],
        "dequantized": {
            "seconds": round(other["seconds"], 2),
            "peak_rss_over_largest_tensor": round((other["peak"] - other["before"]) / largest, 3),
        },
        "kills_ok": good,
        "kills_total": KILLS,
        "goals": GOALS,
        "machine": f"{os.cpu_count()} cores, {processor()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            name: version(name)
            for name in ("orpo-lite", "torch", "transformers", "peft", "bitsandbytes")
        },
    }
    text = json.dumps(result, indent=2)
    if options.json:
        options.json.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
