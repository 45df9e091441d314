"""Compare the planner with the real step, measure its cost, and plan the shipped recipes.

    python -m benchmarks.plan --json FILE                      all figures
    python -m benchmarks.plan --readme README.md --svg FILE    also the README's table and picture

Bytes are those of tensors. They are predicted without weights, and tracked in the same step with
NF4 weights on this CPU.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from benchmarks import step
from orpo_lite.base.find import find_config
from orpo_lite.data.packing import make_batch
from orpo_lite.model.load import bare_pair_model, choose_dtype
from orpo_lite.model.probe import probe
from orpo_lite.objectives.objective import Divisors
from orpo_lite.objectives.orpo import orpo_loss
from orpo_lite.planning.measure import heaviest_pairs, measure
from orpo_lite.planning.meter import LiveBytes
from orpo_lite.planning.on_meta import held_tensors, worst_case
from orpo_lite.planning.search import Planner
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe

GOALS = {
    "worst_error_live_bytes": "<= 0.02",
    "seconds_7b": "<= 25",
    "seconds_70b": "<= 60",
    "peak_rss_gib": "<= 1",
    "peak_gib_32b": "<= 19.5",
    "peak_gib_70b": "<= 39.5",
}
CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2_048, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda vocab: LlamaConfig(vocab_size=vocab, **SMALL),
    "mistral, a window": lambda vocab: MistralConfig(vocab_size=vocab, sliding_window=128, **SMALL),
    "qwen2, biases": lambda vocab: Qwen2Config(vocab_size=vocab, **SMALL),
    "gemma2, softcap, tied": lambda vocab: Gemma2Config(
        vocab_size=vocab, head_dim=64, query_pre_attn_scalar=64, sliding_window=128, **SMALL
    ),
}
MEMORY_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpoints": {"activation_checkpointing": "none"},
    "some checkpoints": {"activation_checkpointing": 2},
    "tiles": {"mlp_tile": 64},
    "small chunk": {"head_chunk": 32},
    "all logits": {"head_chunk": "none"},
    "no sharing": {"prompt_sharing": False},
    "plain LoRA": {"fused_lora": False},
    "all": {"mlp_tile": 64, "head_chunk": 32, "checkpoint_offload": True},
}
LENGTHS = np.array([[90, 160, 140], [40, 260, 60], [0, 30, 50], [120, 121, 180]])
RECIPES = (
    "mistral-qlora",
    "llama3-8b-qlora",
    "qwen2.5-7b-qlora",
    "phi2-qlora",
    "qwen2.5-32b-qlora",
    "llama3-70b-qlora",
)


def recipe(**memory: Any) -> Recipe:
    """Return the default recipe with these settings of ``memory``; a step holds all of LENGTHS."""
    keys = {
        "model.dtype": "float32",
        "training.global_batch_size": len(LENGTHS),
        "memory.micro_batch_tokens": 4_096,
    }
    return step.recipe(**memory).override(keys)


def error_of(config: Any, settings: Recipe) -> float:
    """Return the relative error of the predicted peak of live bytes, without the weights.

    The prediction is made on the meta device; the same step runs and is tracked on this CPU.
    """
    predicted = measure(settings, config, LENGTHS, "cpu")
    torch.manual_seed(0)
    model = bare_pair_model(settings, config, choose_dtype(settings.model.dtype, "cpu"), CPU)
    if settings.memory.packing:
        probe(model, int(LENGTHS.max()))
    gradients = []
    for _, parameter in model.trained():
        parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    known = [tensor for tensors in held_tensors(model).values() for tensor in tensors] + gradients
    batching = model.batching(settings, pad_id=0)
    pairs = heaviest_pairs(
        settings, LENGTHS, batching, in_one_row=model.route in ("shared", "packed")
    )
    with LiveBytes(known) as tracker:
        loss, _ = orpo_loss(
            model(make_batch(pairs, batching)), Divisors(len(pairs), 1_000), beta=0.1
        )
        loss.backward()
    return predicted.peak / tracker.peak - 1


def errors(
    say: Callable[[str], None], vocabularies: tuple[int, ...] = (32_000, 152_064)
) -> dict[str, float]:
    """:func:`error_of` of each family, vocabulary and memory setting."""
    found = {}
    for (family, make), vocab, (setting, memory_settings) in itertools.product(
        FAMILIES.items(), vocabularies, MEMORY_SETTINGS.items()
    ):
        name = f"{family}, {vocab:,}, {setting}"
        found[name] = round(error_of(make(vocab), recipe(**memory_settings)), 5)
        say(f"{name}: {found[name]:+.3%}")
    return found


def timed_plan(name: str, *keys: str) -> tuple[float, float, dict[str, Any]]:
    """Run `orpo-lite plan`; return its seconds, its peak of resident memory in GiB and its JSON."""
    command = [sys.executable, "-m", "orpo_lite", "plan", "--recipe", name, "--json", *keys]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 6):
        raise SystemExit(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return time.monotonic() - began, peak, json.loads(done.stdout)


def least_peak(name: str, tokens: int = 2_048) -> float:
    """Return the least GiB of tensors in a step, with all memory settings that save memory.

    The step is on one pair of two sequences of ``tokens`` tokens that share nothing.
    """
    chosen = load_recipe(name, [f"data.max_length={tokens}"])
    config = find_config(chosen.model.model_name_or_path, "main")
    planner = Planner(
        chosen, config, worst_case(tokens, chosen.training.global_batch_size), "ampere"
    )
    memory_settings = planner.smallest_settings() | {"activation_checkpointing": planner.layers}
    return planner.run(memory_settings, None, None).peak / 2**30


def main() -> None:
    """Run the benchmark, print its figures and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--readme", type=Path, help="a README whose table to write")
    parser.add_argument("--svg", type=Path, help="where to draw the memory of a 7B step")
    options = parser.parse_args()
    plans = {name: timed_plan(name) for name in RECIPES}
    result: dict[str, Any] = {
        "seconds_7b": round(plans["mistral-qlora"][0], 1),
        "seconds_70b": round(plans["llama3-70b-qlora"][0], 1),
        "peak_rss_gib": round(max(peak for _, peak, _ in plans.values()), 2),
        "peak_gib_32b": round(least_peak("qwen2.5-32b-qlora"), 2),
        "peak_gib_70b": round(least_peak("llama3-70b-qlora"), 2),
    }
    found = errors(lambda text: print(text, flush=True))
    result |= {"worst_error_live_bytes": max(map(abs, found.values())), "errors_live_bytes": found}
    result["cards"] = {name: said["cards"] for name, (_, _, said) in plans.items()}
    result["parts_7b"] = {label: parts_of(*SHOWN[label]) for label in SHOWN}
    result |= step.about()
    for key, goal in GOALS.items():
        print(f"{key} = {result[key]} (goal {goal})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.readme:
        step.write_between(options.readme, STARTS, table(result))
    if options.svg:
        options.svg.write_text(picture(result["parts_7b"]), encoding="utf-8")


# --- the README's table and picture

STARTS = "<!-- written by: python -m benchmarks.plan --readme README.md -->\n"
SHOWN: dict[str, tuple[str, dict[str, Any] | None]] = {
    "Mistral-7B, TRL's recipe": ("peak_gib_mistral_7b", None),
    "Mistral-7B, ours, unplanned": ("peak_gib_mistral_7b", {}),
    "Mistral-7B, ours, least": ("peak_gib_mistral_7b", step.ALL_SETTINGS),
    "Qwen2.5-7B, TRL's recipe": ("peak_gib_qwen25_7b", None),
    "Qwen2.5-7B, ours, unplanned": ("peak_gib_qwen25_7b", {}),
    "Qwen2.5-7B, ours, least": ("peak_gib_qwen25_7b", step.ALL_SETTINGS),
}
PARTS = (
    "weights",
    "adapter, gradients, optimizer",
    "kept by the layers",
    "head and loss",
    "backward pass",
)
COLORS = ("#4e79a7", "#76b7b2", "#f28e2b", "#e15759", "#b07aa1")


def parts_of(
    shape: str, memory_settings: dict[str, Any] | None, tokens: int = 2_048
) -> dict[str, float]:
    """Return the GiB of a step by part, on one pair of 2 x ``tokens`` that shares nothing.

    ``memory_settings`` None: TRL's step.
    """
    config = step.SHAPES[shape][1]
    if memory_settings is not None:
        found = measure(step.recipe(**memory_settings), config, worst_case(tokens, 1), "ampere")
        sizes, phases = found.held, found.parts
    else:
        fixed, tracker = step.counted_trl(config, worst_case(tokens, 1))
        sizes, phases = fixed, tracker.peak_by_phase
    parts = (
        sizes["base"] + sizes["embeddings, head, norms"],
        sizes["adapter"] + sizes["gradients"] + sizes["optimizer"],
        phases.get("kept by the layers", 0) + phases.get("batch", 0),
        phases.get("head", 0),
        phases.get("backward pass", 0),
    )
    return dict(zip(PARTS, (round(size / 2**30, 3) for size in parts), strict=True))


def table(result: dict[str, Any]) -> str:
    """Return the README's table: what each recipe needs on each GPU, and seconds a pair."""
    memory = {
        row["card"]: row["memory_bytes"] for rows in result["cards"].values() for row in rows[1:]
    }
    gpus = sorted(memory, key=lambda name: memory[name])
    lines = [
        f"| recipe, pairs of 2 x max_length | {' | '.join(gpus)} |",
        "|---" * (len(gpus) + 1) + "|",
    ]
    for name, rows in result["cards"].items():
        by_gpu = {row["card"]: row for row in rows}
        cells = []
        for gpu in gpus:
            row = by_gpu.get(gpu)
            if row is None or not row["fits"]:
                cells.append("no")
                continue
            cells.append(f"{row['needed_bytes'] / 2**30:.1f} GiB, {row['seconds_per_pair']:.2g} s")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(parts: dict[str, dict[str, float]]) -> str:
    """Return the parts as stacked bars, in SVG."""
    left, wide, high, gap = 230, 560, 26, 12
    largest = max(sum(bar.values()) for bar in parts.values())
    height = 40 + len(parts) * (high + gap) + 50
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 70} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="22" font-weight="bold">'
        "GiB at the peak of a step on one pair of 2 x 2,048 tokens</text>",
    ]
    for row, (name, bar) in enumerate(parts.items()):
        y, x = 40 + row * (high + gap), float(left)
        out.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{name}</text>')
        for color, (part, size) in zip(COLORS, bar.items(), strict=True):
            width = wide * size / largest
            title = f"<title>{part}: {size:.2f} GiB</title>"
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{high}" fill="{color}">'
                f"{title}</rect>"
            )
            x += width
        out.append(f'<text x="{x + 6:.1f}" y="{y + 18}">{sum(bar.values()):.1f}</text>')
    x, y = 10.0, height - 18
    for color, part in zip(COLORS, PARTS, strict=True):
        out.append(f'<rect x="{x}" y="{y - 11}" width="13" height="13" fill="{color}"/>')
        out.append(f'<text x="{x + 18}" y="{y}">{part}</text>')
        x += 40 + 7.2 * len(part)
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
