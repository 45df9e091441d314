"""Everything that can be known, and can go wrong, before weights load: paths, adapter, data, base, template, tokens."""

import glob
import hashlib
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_lite import run
from orpo_lite.base import (
    Base,
    check_targets,
    find_adapter,
    find_base,
    find_texts,
    hub_host,
    load_tokenizer,
    pad_id,
    read_adapter_config,
    read_sizes,
)
from orpo_lite.data.cache import VARIABLE, TokenizedPairs, cache_folder, wanted_folder
from orpo_lite.data.mapped import refuse_unknown_columns
from orpo_lite.data.preview import COUNTED, figures
from orpo_lite.data.rows import Source, is_local, is_path, told_apart
from orpo_lite.data.sets import held_out_sources, hold_out, training_sources
from orpo_lite.data.sides import show_row, tokenized
from orpo_lite.data.templates import set_chat_template
from orpo_lite.errors import CheckpointError, ModelError, Overrides, RecipeError, raise_all
from orpo_lite.recipe import DataSection, Recipe
from orpo_lite.run import Update

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Ready:
    """All that is known before weights load."""

    base: Base
    tokenizer: Any
    train: TokenizedPairs
    test: TokenizedPairs
    figures: dict[str, Any]
    """What data.json holds."""

    @property
    def pad_id(self) -> int:
        """What rows are filled with."""
        return pad_id(self.tokenizer)

    @property
    def end_id(self) -> int:
        """The token that ends a reply."""
        return int(self.train.facts["end_token_id"])


def prepare(recipe: Recipe) -> Generator[Update, None, Ready]:
    """All that can go wrong before weights are fetched: base, template, targets, data, tokens."""
    yield from _asking(recipe.data.names)
    sources = find_sources(recipe.data)
    yield from _asking([recipe.model.model_name_or_path])
    base = find_base(recipe.model.model_name_or_path, recipe.model.model_revision)
    check_targets(recipe, base)
    check_embedding(recipe, base.config)
    train, test, found = yield from tokenized_sides(recipe, base.path, *sources)
    yield from _said(found)
    text_config = base.config.get_text_config()
    _check_ids(train, text_config.vocab_size)
    _check_ids(test, text_config.vocab_size)
    _check_positions(base.name, getattr(text_config, "max_position_embeddings", None), (train, test))
    tokenizer = load_tokenizer(base.path)
    set_chat_template(tokenizer, recipe.data)
    return Ready(base, tokenizer, train, test, found)


@dataclass(frozen=True)
class Preview:
    """What the model will see of a recipe's data."""

    figures: dict[str, Any]
    """What data.json holds."""
    samples: dict[str, Any]
    """Pairs as segments of text: the ``first`` one, and the first that is ``cut``, if one is."""
    warnings: list[str]


def preview(recipe: Recipe, place: str | None = None) -> Generator[Update, None, Preview]:
    """Look at the data as :func:`prepare` would; of the base only the tokenizer is needed.

    Args:
        recipe: which data, which base.
        place: of a row ("pairs.csv:3") to show in place of the first one, whether it is kept or left out.
    """
    yield from _asking(recipe.data.names)
    sources = find_sources(recipe.data)
    yield from _asking([recipe.model.model_name_or_path])
    folder, _ = find_texts(recipe.model.model_name_or_path, recipe.model.model_revision)
    train, test, found = yield from tokenized_sides(recipe, folder, *sources)
    warnings = []
    sizes = read_sizes(folder)
    try:
        _check_ids(train, sizes.get("vocab_size"))
        _check_ids(test, sizes.get("vocab_size"))
        _check_positions(str(folder), sizes.get("max_position_embeddings"), (train, test))
    except ModelError as error:
        warnings.append(f"training would stop: {error}")
    samples = train.facts["samples"]
    if place is not None:
        samples = {"first": show_row(recipe.data, [*sources[0], *sources[1]], partial(load_tokenizer, folder), place)}
    return Preview(found, samples, warnings)


def _asking(names: Sequence[str]) -> Iterator[Update]:
    """What the network is waited for; it may take a while, and nothing else would be seen."""
    remote = [name for name in names if not is_local(name)]
    if remote and (host := hub_host()):
        yield Update("stage", f"asking {host} for {', '.join(remote)}")


Sources = tuple[list[Source], list[Source]]  # to train on, held out


def find_sources(data: DataSection) -> Sources:
    """The sets that a recipe names, found but not read. Raises DataError and HubError."""
    train, test = training_sources(data), held_out_sources(data)
    both = told_apart([*train, *test])
    refuse_unknown_columns(data, both)
    return both[: len(train)], both[len(train) :]


def tokenized_sides(
    recipe: Recipe, tokenizer_folder: Path, train_sources: Sequence[Source], test_sources: Sequence[Source]
) -> Generator[Update, None, tuple[TokenizedPairs, TokenizedPairs, dict[str, Any]]]:
    """Both sides as tokens, and their figures. Without a held-out set one is split off, by prompt, after all filters.

    What was tokenised before, with the same rows, template, limits and tokenizer, is read from the cache.
    """
    if (folder := cache_folder()) != wanted_folder():
        said = f"{wanted_folder()} cannot be written to: the tokens are in {folder} while this lasts ({VARIABLE})"
        yield Update("note", said)
    for source in (*train_sources, *test_sources):
        # That the set has a held-out split is news only to who has none.
        news = [said for said in source.said.split("; ") if not (test_sources and said.startswith("data.dataset_test"))]
        if any(news):
            yield Update("note", f"{source.name}: {'; '.join(news)}")
    train = yield from _tokenized(recipe.data, tokenizer_folder, train_sources)
    if test_sources:
        test = yield from _tokenized(recipe.data, tokenizer_folder, test_sources)
    else:
        size, seed = recipe.data.test_split_size, recipe.training.seed
        kept, held = hold_out(range(len(train)), train.prompts(), size, seed)
        train, test = train.select(kept), train.select(held)
    return train, test, figures(train, test)


def _tokenized(data: DataSection, folder: Path, sources: Sequence[Source]) -> Generator[Update, None, TokenizedPairs]:
    yield Update("stage", f"reading {', '.join(source.name for source in sources)}")
    rows = tokenized(data, sources, folder, partial(load_tokenizer, folder))
    return (yield from run.staged("tokenizing", rows))


def _said(found: Mapping[str, Any]) -> Iterator[Update]:
    """The figures that nobody should train without having seen."""
    yield from (Update("note", sentence) for sentence in (*found["format"], found["chat_template"]))
    dropped = ", ".join(f"{drop['pairs']:,} {reason}" for reason, drop in found["dropped"].items()) or "none"
    kept = f"{found['train_pairs']:,} pairs to train on, {found['held_out_pairs']:,} held out"
    yield Update("note", f"{kept}; left out: {dropped}")
    if count := found["cut"]["responses_without_end"]:
        yield Update("note", f"{count:,} responses are cut by data.max_length and lose their end")
    for name, said in COUNTED.items():
        if count := found[name]:
            yield Update("note", f"warning: {said}: {count:,}")
    if count := found["prompts"]["shared"]:
        said = f"{count:,} of {found['prompts']['held_out']:,} held-out prompts stand in the training set too"
        yield Update("note", f"warning: {said}: the evaluation will flatter")


def check_embedding(recipe: Recipe, config: Any) -> None:
    """Refuse to move an embedding to host memory that is the output head as well. Raises :class:`RecipeError`."""
    if recipe.memory.embedding_on_cpu is True and config.get_text_config().tie_word_embeddings:
        where = recipe.sources["memory.embedding_on_cpu"]
        expected = "a base whose input embedding is not its output head as well"
        raise RecipeError(where=where, found="memory.embedding_on_cpu: true", expected=expected, fix="leave it out")


def pair_lengths(pairs: TokenizedPairs) -> NDArray[np.int64]:
    """Tokens of each pair's common prefix, chosen and rejected sequence, shape (pairs, 3): all that a plan needs."""
    columns = (pairs.column(name) for name in ("prefix", "chosen_tokens", "rejected_tokens"))
    return np.stack([column.astype(np.int64) for column in columns], 1)


def _check_ids(pairs: TokenizedPairs, vocab_size: int | None) -> None:
    """Refuse tokens that the base has no embedding for."""
    largest, where = pairs.facts["largest_id"]
    if vocab_size is not None and largest >= vocab_size:
        found = f"token id {largest}, and the model's embedding has {vocab_size} rows"
        raise ModelError(
            where=where,
            found=found,
            expected="a tokenizer that belongs to the model",
            fix="use the base's own tokenizer",
        )


def _check_positions(name: str, limit: int | None, sides: Sequence[TokenizedPairs]) -> None:
    """Refuse sequences longer than the base has positions for: learned ones fail, rotary ones turn to noise."""
    lengths = (side.column(column) for side in sides for column in ("chosen_tokens", "rejected_tokens"))
    longest = max(int(column.max(initial=0)) for column in lengths)
    if limit is not None and longest > limit:
        found = f"the longest pair has {longest:,} tokens, and {name} reads {limit:,}"
        raise ModelError(
            where="data.max_length",
            found=found,
            fix=Overrides({"data.max_length": limit, "data.max_prompt_length": limit // 2}),
        )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Local paths written out, so that the run can be resumed from any folder."""
    keys = ["model.model_name_or_path", "model.adapter_name_or_path", "data.chat_template"]
    if is_path(recipe.data.dataset_test_split or ""):
        keys.append("data.dataset_test_split")
    # A template may stand in the recipe itself, and auto and none are no files.
    written = {key: value for key, value in recipe.items() if key in keys and value not in (None, "auto", "none")}
    values = {key: _absolute(value) for key, value in written.items() if "{" not in value}
    names = [_absolute(name) for name in recipe.data.names]
    return recipe.override(values | {"data.dataset_name": names if len(names) > 1 else names[0]})


def _absolute(name: str) -> str:
    """A local path, or pattern of such, written out; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() or glob.has_magic(name) else name


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
            faults.append(
                RecipeError(where=recipe.sources[key], found=found, expected=expected, fix="leave the key out")
            )
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
        "data": {"name": ", ".join(recipe.data.names), "sha256": ready.figures["sha256"]},
        "tokens": {"name": "as tokens", "sha256": _sha256(f"{ready.train.sha256} {ready.test.sha256}")},
        "chat_template": {"name": recipe.data.chat_template, "sha256": _sha256(str(ready.tokenizer.chat_template))},
        "lora": run.adapter_shape(recipe),
        "end_token_id": ready.end_id,
        "seed": recipe.training.seed,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_lock(path: Path, lock: Mapping[str, Any]) -> None:
    """Refuse to go on with another base, template, data or tokens than the run began with.

    Tokens may change though nothing else did: with a library, or with the date that a template writes.
    """
    before = run.read_lock(path)
    run.refuse_other_shape(path, before, lock["lora"])
    pairs = {"base": "fingerprint", "chat_template": "sha256", "data": "sha256", "tokens": "sha256"}
    pairs = {what: key for what, key in pairs.items() if what in before}  # runs of an older version noted no tokens
    differing = [f"{what} {lock[what]['name']}" for what, key in pairs.items() if before[what][key] != lock[what][key]]
    if differing:
        found = f"changed since the run began: {', '.join(differing)}"
        fix = "start a new run: training.output_dir=OTHER"
        raise CheckpointError(where=f"run {path}", found=found, expected="the same base, template and data", fix=fix)
