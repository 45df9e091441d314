"""Compare a step of orpo-lite with one of TRL's ORPOTrainer on the same pairs.

    python -m benchmarks.step --quick --json FILE     figures of under eight minutes on two cores
    python -m benchmarks.step --json FILE             all figures, and the table of docs/memory.md
    python -m benchmarks.step --data PAIRS --tokenizer FOLDER     with the lengths of your own texts

The figures are tokens, FLOPs, live bytes, pairs per second and the peaks of 7B models. The lengths
of the pairs are real; their tokens are random, which does not change the costs. Tokens, FLOPs and
bytes are counted, so they are the same on every machine. For times both run in one process, and
their steps alternate.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks import lengths, peers
from benchmarks.data import processor
from benchmarks.ours import ALL_SETTINGS, BATCH, SETS, SHAPES, our_step, recipe
from orpo_lite.data.packing import pack_pairs
from orpo_lite.model.load import bare_base, bare_pair_model, load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.ops.devices import META
from orpo_lite.ops.head import Head, chunk_rows, row_logps
from orpo_lite.planning.measure import measure as counted
from orpo_lite.planning.measure import resident_bytes, track_phases
from orpo_lite.planning.meter import LiveBytes
from orpo_lite.planning.on_meta import META_ATTENTION, blank_pairs, held_tensors, worst_case
from orpo_lite.recipe.schema import Recipe

LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
GOALS = {
    "head_bytes_per_logit": "<= 0.5",
    "tokens_ratio_hh_b8": ">= 3.75",
    "tokens_ratio_hh_b1": ">= 1.7",
    "tokens_ratio_alpaca_b8": ">= 2.3",
    "tokens_ratio_hh_grouped": "reported",
    "tokens_ratio_alpaca_grouped": "reported",
    "flops_ratio_hh": "<= 0.28",
    "flops_ratio_alpaca": "<= 0.45",
    "live_bytes_ratio_152k": "<= 0.03",
    "peak_gib_mistral_7b": "<= 4.7",
    "peak_gib_llama3_8b": "<= 5.45",
    "peak_gib_qwen25_7b": "<= 5.25",
    "pairs_per_second_ratio_hh": ">= 4.5",
    "pairs_per_second_ratio_alpaca": ">= 3",
    "pairs_per_second_ratio_hh_grouped": ">= 2.5",
    "pairs_per_second_ratio_alpaca_grouped": ">= 1.8",
}


# --- counted: tokens, bytes, FLOPs


def head_bytes_per_logit(
    vocab_size: int = 152_064, rows: int = 4_096, hidden_size: int = 3_584
) -> float:
    """Return the peak bytes of the head's forward and backward pass, over rows x vocabulary."""
    module = torch.nn.Linear(hidden_size, vocab_size, bias=False, dtype=torch.bfloat16, device=META)
    module.requires_grad_(False)
    hidden = torch.empty(rows, hidden_size, dtype=torch.bfloat16, device=META, requires_grad=True)
    index = torch.empty(rows, dtype=torch.long, device=META)
    with LiveBytes([module.weight, hidden, index]) as tracker:
        row_logps(hidden, index, index, Head(module), chunk_rows(vocab_size)).sum().backward()
    return tracker.peak / (rows * vocab_size)


def storages(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return all tensors of a model: parameters, buffers, gradients, quantisation states."""
    found = [tensor for tensors in held_tensors(model).values() for tensor in tensors]
    return found + [
        parameter.grad for parameter in model.parameters() if parameter.grad is not None
    ]


def trl_on_meta(config: Any) -> Any:
    """Return TRL's 4-bit model with adapter and checkpointing on meta; no scores are kept."""
    model = bare_base(recipe(), config, torch.bfloat16)
    model.config._attn_implementation = META_ATTENTION
    return peers.meta_model(model, LORA)


def counted_trl(config: Any, triples: lengths.Triples) -> tuple[dict[str, int], LiveBytes]:
    """Count a step of TRL as the planner counts orpo-lite's.

    Returns:
        The bytes that are always held, by part, and the tracker after one pass.
    """
    model = trl_on_meta(config)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    with LiveBytes(storages(model)) as tracker, track_phases(model.get_base_model().model, tracker):
        loss = peers.meta_loss(model, blank_pairs(triples))
        tracker.phase = "backward pass"
        loss.backward()
    return resident_bytes(model, recipe())[0], tracker


def live_bytes_ratio(triples: lengths.Triples) -> dict[str, float]:
    """Return the live bytes of orpo-lite over TRL's, for 8 pairs and a vocabulary of 152k.

    They are counted with all memory settings that save memory, and with the default ones.
    """
    config = SHAPES["peak_gib_qwen25_7b"][1]
    batch = lengths.near_mean(triples, BATCH, 1)[0]
    theirs = counted_trl(config, batch)[1].peak
    ours = [
        counted(recipe(**memory_settings), config, batch, "ampere").peak
        for memory_settings in (ALL_SETTINGS, {})
    ]
    return {
        "live_bytes_ratio_152k": ours[0] / theirs,
        "live_bytes_ratio_152k_default_levers": ours[1] / theirs,
        "live_gib_152k_trl": theirs / 2**30,
    }


def peak_of_7b(config: Any, memory_settings: dict[str, Any] | None, tokens: int = 2_048) -> float:
    """Return the GiB of tensors on the device in a step on one pair that shares nothing.

    They are weights, adapter, gradients, 8-bit optimizer states and activations, without the CUDA
    context and fragmentation. ``memory_settings`` None: TRL's step.
    """
    pair = worst_case(tokens, 1)
    if memory_settings is not None:
        return counted(recipe(**memory_settings), config, pair, "ampere").total / 2**30
    fixed, tracker = counted_trl(config, pair)
    return (sum(fixed.values()) + tracker.peak) / 2**30


# --- FLOPs, per pair of a whole file


def _products(run: Callable[[], torch.Tensor]) -> int:
    """Return the FLOPs of all matrix products but attention's, in all passes of a step."""
    gemm = {
        torch.ops.bitsandbytes.gemm_4bit: lambda a, _b, shape, *_, **__: (
            2 * int(np.prod(a)) * shape[0]
        )
    }
    counter = FlopCounterMode(display=False, custom_mapping=gemm)
    with counter:
        run().backward()
    counted = counter.get_flop_counts()["Global"]
    return sum(
        flops
        for op, flops in counted.items()
        if "attention" not in str(op) and "bmm" not in str(op)
    )


def flops_ratio(triples: lengths.Triples, config: Any) -> float:
    """Return the FLOPs of orpo-lite over TRL's on all pairs, as the mean of 20 shuffles.

    Batches have 8 pairs, and both use checkpointing. Matrix products are counted on the meta device
    for one batch of each; they are proportional to tokens and scored rows. Attention is added by a
    formula: 4 FLOPs per causal cell and head dimension in the forward pass, as many in the second
    forward pass, 2.5 times as many in the backward pass.
    """
    settings = recipe()
    sample = triples[:BATCH]
    pairs = lengths.random_pairs(sample, config.vocab_size)

    def of_ours() -> torch.Tensor:
        batch = pack_pairs(pairs, completion_only_loss=False, share=True).to(META)
        return orpo_loss(model(batch), Divisors(BATCH, 1), beta=0.1)[0]

    model = bare_pair_model(settings, config, torch.bfloat16)
    model.backend = "varlen"
    head = 4 * config.hidden_size * config.vocab_size  # two products per scored row, in both
    scored = _scored(sample)
    ours_a_token = (_products(of_ours) - head * scored) / lengths.packed(sample)
    theirs = trl_on_meta(config)
    theirs_a_token = _products(lambda: peers.meta_loss(theirs, pairs)) / lengths.padded(sample)
    cell = 4 * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    cell *= config.num_hidden_layers * (1 + 1 + 2.5)
    prefix, chosen, rejected = triples.T.astype(float)
    cells = (chosen * (chosen + 1) + (rejected - prefix) * (rejected + prefix + 1)).sum() / 2
    ours = ours_a_token * lengths.packed(triples) + head * _scored(triples) + cell * cells
    epochs = []
    for seed in range(lengths.SHUFFLES):
        flops = 0.0
        for batch in lengths.batches(triples, BATCH, seed):
            width = float(batch[:, 1:].max())
            flops += (
                theirs_a_token * lengths.padded(batch)
                + cell * 2 * len(batch) * width * (width + 1) / 2
            )
        epochs.append(flops)
    return float(ours / np.mean(epochs))


def _scored(triples: lengths.Triples) -> int:
    """Return the number of rows whose logits orpo-lite computes.

    They are all tokens of both sequences but the first one; the common prefix counts once.
    """
    prefix, chosen, rejected = triples.T
    fork = np.maximum(prefix - 1, 0)
    return int((fork + (chosen - 1 - fork) + (rejected - 1 - fork)).sum())


# --- timed: both in one process


def small_llama(vocab_size: int = 32_000) -> LlamaConfig:
    """Return a Llama of 58 million parameters, 25 million of them in linear layers."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=512, intermediate_size=1_376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2_048,
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a small tokenizer for TRL, which requires one; its batches are tokens already."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip


@contextmanager
def both_models(folder: str) -> Iterator[tuple[PairModel, Any, Recipe]]:
    """Yield orpo-lite's model and TRL's trainer on one small NF4 base, with equal adapters."""
    from orpo_lite.base.find import fetch_weights, find_base

    torch.manual_seed(0)
    LlamaForCausalLM(small_llama()).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    settings = recipe().override({"model.dtype": "bfloat16", "model.model_name_or_path": folder})
    base = fetch_weights(find_base(folder, "main"))
    ours = load_pair_model(settings, base, torch.device("cpu"))
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantised
    )
    trainer = peers.make_trainer(model, tokenizer(), LORA, f"{folder}/trl")
    adapter = dict(ours.trained())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter[name])
    yield ours, trainer, settings


def pairs_per_second(
    triples: lengths.Triples, batches: int, *, grouped: bool = False
) -> dict[str, float]:
    """Time both on the same batches, one after the other; the first batch of each is not timed."""
    import bitsandbytes as bnb

    chosen = lengths.near_mean(triples, BATCH, batches, grouped=grouped)
    with tempfile.TemporaryDirectory() as folder, both_models(folder) as (model, trainer, settings):
        optimizer = bnb.optim.PagedAdamW8bit(
            [parameter for _, parameter in model.trained()], lr=1e-4
        )
        seconds, losses = {"ours": 0.0, "trl": 0.0}, {"ours": 0.0, "trl": 0.0}
        rounds = [chosen[0], *chosen]
        for number, lengths_of_batch in enumerate(rounds):
            pairs = lengths.random_pairs(lengths_of_batch, 32_000, seed=number)
            steps: dict[str, Callable[[], float]] = {
                "ours": lambda pairs=pairs: our_step(model, optimizer, pairs, settings),  # type: ignore[misc]
                "trl": lambda pairs=pairs: peers.train_step(trainer, pairs),  # type: ignore[misc]
            }
            for tool, take_step in steps.items():
                gc.collect()
                began = time.perf_counter()
                losses[tool] = take_step()
                if number > 0:
                    seconds[tool] += time.perf_counter() - began
    count = BATCH * len(chosen)
    padded, packed = sum(map(lengths.padded, chosen)), sum(map(lengths.packed, chosen))
    return {
        "ratio": seconds["trl"] / seconds["ours"],
        "pairs_per_second_ours": count / seconds["ours"],
        "pairs_per_second_trl": count / seconds["trl"],
        "tokens_per_pair_ours": packed / count,
        "tokens_per_pair_trl": padded / count,
        "final_loss_ours": losses["ours"],
        "final_loss_trl": losses["trl"],
    }


def peak_rss(tool: str, triples: lengths.Triples) -> float:
    """Return the GiB of resident memory that a step adds at its peak, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--rss", tool]
    done = subprocess.run(
        command, input=json.dumps(triples.tolist()), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def _measure_rss(tool: str) -> None:
    """Load both models, take a step with one of them, and print what it adds at its peak."""
    import bitsandbytes as bnb

    pairs = lengths.random_pairs(json.loads(sys.stdin.read()), 32_000)
    with tempfile.TemporaryDirectory() as folder, both_models(folder) as (model, trainer, settings):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        before = _status("VmRSS")
        if tool == "ours":
            optimizer = bnb.optim.PagedAdamW8bit(
                [parameter for _, parameter in model.trained()], lr=1e-4
            )
            our_step(model, optimizer, pairs, settings)
        else:
            peers.train_step(trainer, pairs)
        print((_status("VmHWM") - before) / 2**30)


def _status(name: str) -> int:
    """Return the bytes of a line of /proc/self/status: VmRSS (now) or VmHWM (at the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


# --- the whole


def measure(
    sets: dict[str, lengths.Triples], *, quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return all figures of the table; ``quick`` leaves out alpaca's times and resident memory."""
    result: dict[str, Any] = {}

    def note(key: str, value: float) -> None:
        result[key] = round(value, 4)
        say(f"{key} = {value:.4g} (goal {GOALS.get(key, 'reported')})")

    note("head_bytes_per_logit", head_bytes_per_logit())
    for name, triples in sets.items():
        note(f"tokens_ratio_{name}_b8", lengths.tokens_ratio(triples, BATCH))
        note(f"tokens_ratio_{name}_b1", lengths.tokens_ratio(triples, 1))
        note(f"tokens_ratio_{name}_grouped", lengths.tokens_ratio(triples, BATCH, grouped=True))
        note(f"flops_ratio_{name}", flops_ratio(triples, SHAPES["peak_gib_mistral_7b"][1]))
    first = next(iter(sets.values()))
    for key, value in live_bytes_ratio(first).items():
        note(key, value)
    for key, (_, config) in SHAPES.items():
        note(key, peak_of_7b(config, ALL_SETTINGS))
        note(f"{key}_default_levers", peak_of_7b(config, {}))
        note(f"{key}_trl", peak_of_7b(config, None))
    for name, triples in sets.items():
        if quick and name != next(iter(sets)):
            continue
        for grouped in (False, True):
            suffix = f"{name}_grouped" if grouped else name
            found = pairs_per_second(triples, 3, grouped=grouped)
            note(f"pairs_per_second_ratio_{suffix}", found.pop("ratio"))
            for key, value in found.items():
                note(f"{key}_{suffix}", value)
        if not quick:
            batch = lengths.near_mean(triples, BATCH, 1)[0]
            for tool in ("ours", "trl"):
                note(f"peak_rss_gib_{name}_{tool}", peak_rss(tool, batch))
    return result


def about() -> dict[str, Any]:
    """Return the machine, the versions and the date."""
    names = ("orpo-lite", "torch", "transformers", "peft", "bitsandbytes", "trl")
    return {
        "machine": f"{os.cpu_count()} cores, {processor()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Run the benchmark, print its figures and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="without the alpaca times and resident memory"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--data", help="your own pairs instead of the lengths of the project")
    parser.add_argument("--tokenizer", type=Path, help="a model folder, for --data")
    parser.add_argument("--readme", type=Path, help="the page whose table to write")
    parser.add_argument("--rss", choices=["ours", "trl"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if options.rss:
        _measure_rss(options.rss)
        return
    if options.data and not options.tokenizer:
        parser.error("--data needs --tokenizer FOLDER")
    if options.data:
        sets = {"data": lengths.of_texts(options.data, options.tokenizer)}
    else:
        sets = {name: lengths.shipped(file) for name, file in SETS.items()}
    began = time.monotonic()
    result = measure(sets, quick=options.quick, say=lambda text: print(text, flush=True))
    result |= {"seconds": round(time.monotonic() - began)} | about()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.readme:
        write_tables(options.readme, result)


# --- the tables of docs/memory.md


STARTS = "<!-- written by: python -m benchmarks.step --readme docs/memory.md -->\n"
ENDS = "<!-- end -->"
RATIOS = (  # title, key, key with TRL's batches grouped by length, form
    (
        "tokens through the model",
        "tokens_ratio_{}_b8",
        "tokens_ratio_{}_grouped",
        "{:.2f} times fewer",
    ),
    ("FLOPs a pair", "flops_ratio_{}", "", "{:.0%} of theirs"),
    (
        "pairs a second, 58M Llama",
        "pairs_per_second_ratio_{}",
        "pairs_per_second_ratio_{}_grouped",
        "{:.1f} times",
    ),
)


def tables(result: dict[str, Any]) -> str:
    """Return two tables: ratios to TRL on real lengths, and peaks of 7B models."""
    grouped = "TRL grouped by length"
    lines = [
        f"| ours, TRL's being 1 | HH-RLHF | {grouped} | alpaca-prefs | {grouped} |",
        "|---|---|---|---|---|",
    ]
    for title, *keys, form in RATIOS:
        values = [result.get(key.format(name)) for name in SETS for key in keys]
        cells = ["" if value is None else form.format(value) for value in values]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "| GiB at its peak, one pair of 2 x 2,048 tokens | TRL | ours, default "
        "| ours, all memory settings |",
        "|---|---|---|---|",
    ]
    for key, (name, _) in SHAPES.items():
        cells = [f"{result[key + suffix]:.1f}" for suffix in ("_trl", "_default_levers", "")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_tables(readme: Path, result: dict[str, Any]) -> None:
    """Write the tables between their two marks in a page."""
    write_between(readme, STARTS, tables(result))


def write_between(readme: Path, starts: str, text: str) -> None:
    """Write a text between the mark ``starts`` and the next end mark."""
    before, _, rest = readme.read_text("utf-8").partition(starts)
    readme.write_text(
        f"{before}{starts}\n{text}\n{ENDS}{rest.partition(ENDS)[2]}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
