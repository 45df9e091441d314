"""Merge: the adapter's product added to the base's 16-bit weights, as a plain transformers folder."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from orpo_lite import run
from orpo_lite.base import Base, check_disk, fetch_weights, find_base, load_tokenizer, weight_files
from orpo_lite.errors import CheckpointError, ModelError


@dataclass(frozen=True)
class MergeResult:
    """A merged model on disk."""

    folder: Path
    base: Base
    bytes: int


def merge(run_folder: str | Path) -> MergeResult:
    """Merge the adapter of a run into the base it was trained on; writes ``RUN/merged``, whole or not at all.

    The base is loaded in the precision it is stored in, never in 4 bit: rounding the sum to NF4 loses the adapter.

    Raises:
        CheckpointError: no finished run there.
        ModelError: the base is not the one that was trained on.
        FitError: not enough disk space.
        HubError: the base cannot be fetched.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    path = Path(run_folder)
    lock = run.read_lock(path)
    adapter = path / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        resume = f"orpo-lite train --resume {shlex.quote(str(path))}"
        raise CheckpointError(f"run {path}", "has no adapter/", "a training that has ended", resume)
    base = fetch_weights(find_base(lock["base"]["name"], lock["base"]["revision"] or "main"))
    trained_on = lock["base"]["fingerprint"]
    if base.fingerprint != trained_on:
        found = f"is not the base of this run (fingerprint {base.fingerprint[:12]}, was {trained_on[:12]})"
        raise ModelError(f"model {base.name}", found, "the weights that the adapter was trained on")
    check_disk(path, sum(file.stat().st_size for file in weight_files(base.path)), f"merging {path}")
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype="auto", use_safetensors=True)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    folder = path / "merged"
    with run.locked(path), run.new_folder(folder) as temporary:
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
        merged.save_pretrained(temporary)
        load_tokenizer(adapter).save_pretrained(temporary)
    return MergeResult(folder, base, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
