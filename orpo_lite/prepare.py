"""Everything that can be known, and can go wrong, before weights load: paths, adapter, data, base, template, tokens."""

import hashlib
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orpo_lite import run
from orpo_lite.base import (
    Base,
    check_targets,
    fetch_weights,
    find_adapter,
    find_base,
    load_tokenizer,
    pad_id,
    read_adapter_config,
)
from orpo_lite.data.pairs import (
    PairSet,
    TokenizedPair,
    end_token_id,
    hold_out,
    read_pairs,
    set_chat_template,
    tokenize_pairs,
)
from orpo_lite.data.rows import is_path
from orpo_lite.errors import CheckpointError, ModelError, RecipeError, raise_all
from orpo_lite.recipe import Recipe
from orpo_lite.run import Update

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Ready:
    """All that is known before weights load."""

    base: Base
    tokenizer: Any
    end_id: int
    pairs: PairSet
    train: list[TokenizedPair]
    test: list[TokenizedPair]
    counts: dict[str, int]
    template: str

    @property
    def pad_id(self) -> int:
        """What rows are filled with."""
        return pad_id(self.tokenizer)

    def figures(self) -> dict[str, Any]:
        """What data.json holds."""
        return {
            "format": self.pairs.detected,
            "chat_template": self.template,
            "rows_read": self.pairs.read,
            "train_pairs": len(self.train),
            "held_out_pairs": len(self.test),
            "dropped_and_cut": self.counts,
            "sha256": self.pairs.sha256,
        }


def prepare(recipe: Recipe) -> Generator[Update, None, Ready]:
    """Everything that can go wrong before weights load: data, base, template, targets, tokens."""
    yield Update("stage", f"reading {recipe.data.dataset_name}")
    pairs = read_pairs(recipe.data)
    yield Update("note", pairs.detected)
    base = find_base(recipe.model.model_name_or_path, recipe.model.model_revision)
    check_targets(recipe, base)
    tokenizer = load_tokenizer(base.path)
    template = set_chat_template(tokenizer, recipe.data)
    yield Update("note", template)
    yield Update("stage", f"tokenizing {len(pairs.train) + len(pairs.test):,} pairs")
    vocab_size = base.config.get_text_config().vocab_size
    train_pairs, counts = tokenize_pairs(pairs.train, tokenizer, recipe.data, vocab_size)
    if pairs.test:
        test_pairs, test_counts = tokenize_pairs(pairs.test, tokenizer, recipe.data, vocab_size)
    else:
        prompts, test_counts = [pair.prompt for pair in train_pairs], {}
        train_pairs, test_pairs = hold_out(train_pairs, prompts, recipe.data.test_split_size, recipe.training.seed)
    _check_positions(base, [*train_pairs, *test_pairs])
    for reason, count in [*pairs.drops.items(), *test_counts.items()]:
        counts[reason] = counts.get(reason, 0) + count
    end_id = end_token_id(tokenizer, recipe.data)
    ready = Ready(fetch_weights(base), tokenizer, end_id, pairs, train_pairs, test_pairs, counts, template)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()) if count) or "none dropped"
    yield Update("note", f"{len(train_pairs):,} pairs to train on, {len(test_pairs):,} held out ({dropped})")
    return ready


def _check_positions(base: Base, pairs: Sequence[TokenizedPair]) -> None:
    """Refuse sequences longer than the base has positions for: learned ones fail, rotary ones turn to noise."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = max((max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs), default=0)
    if limit is not None and longest > limit:
        found = f"the longest pair has {longest:,} tokens, and {base.name} reads {limit:,}"
        raise ModelError("data.max_length", found, "", f"data.max_length={limit} data.max_prompt_length={limit // 2}")


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Local paths written out, so that the run can be resumed from any folder."""
    keys = ["model.model_name_or_path", "model.adapter_name_or_path", "data.dataset_name", "data.chat_template"]
    if is_path(recipe.data.dataset_test_split or ""):
        keys.append("data.dataset_test_split")
    # A template may stand in the recipe itself, and auto and none are no files.
    written = {key: value for key, value in recipe.items() if key in keys and value not in (None, "auto", "none")}
    values = {key: value for key, value in written.items() if "{" not in value}
    paths = {key: Path(value).expanduser() for key, value in values.items()}
    return recipe.override({key: str(path.resolve()) for key, path in paths.items() if path.exists()})


def adopt_adapter(recipe: Recipe) -> Recipe:
    """The recipe with the shape of the adapter that it trains on from; a key set to something else is refused."""
    if not recipe.model.adapter_name_or_path:
        return recipe
    config = read_adapter_config(find_adapter(recipe.model.adapter_name_or_path))
    shape = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    values = {f"lora.{key}": getattr(config, key) for key in shape}
    faults = []
    for key, wanted in recipe.items():
        if key in values and values[key] != wanted and recipe.sources[key] != "default":
            found, expected = f"{key}: {wanted} with model.adapter_name_or_path", f"its own {values[key]}, or nothing"
            faults.append(RecipeError(recipe.sources[key], found, expected, "leave the key out"))
    raise_all(faults)
    return recipe.override(values)


def make_lock(recipe: Recipe, ready: Ready) -> dict[str, Any]:
    """What the run was resolved to: enough to repeat it and to merge it."""
    return {
        "orpo_lite": version("orpo-lite"),
        "versions": {name: version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "base": {
            "name": ready.base.name,
            "revision": ready.base.revision,
            "path": str(ready.base.path),
            "fingerprint": ready.base.fingerprint,
        },
        "data": {"name": recipe.data.dataset_name, "sha256": ready.pairs.sha256},
        "chat_template": {"name": recipe.data.chat_template, "sha256": _sha256(str(ready.tokenizer.chat_template))},
        "end_token_id": ready.end_id,
        "seed": recipe.training.seed,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_lock(path: Path, lock: Mapping[str, Any]) -> None:
    """Refuse to go on with another base, template or data than the run began with."""
    before = run.read_lock(path)
    pairs = {"base": "fingerprint", "chat_template": "sha256", "data": "sha256"}
    differing = [f"{what} {lock[what]['name']}" for what, key in pairs.items() if before[what][key] != lock[what][key]]
    if differing:
        found = f"changed since the run began: {', '.join(differing)}"
        remedy = "start a new run: training.output_dir=OTHER"
        raise CheckpointError(f"run {path}", found, "the same base, template and data", remedy)
