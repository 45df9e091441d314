"""Prepare and check the inputs of a run before any weights are loaded.

The inputs are the base, the chat template, the data and the tokens.
"""

import glob
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orpo_lite.base.config import read_sizes
from orpo_lite.base.download import hub_host
from orpo_lite.base.find import (
    Base,
    check_embedding,
    check_targets,
    find_base,
    find_text_files,
    load_tokenizer,
    pad_id,
)
from orpo_lite.data.cache import TokenizedPairs
from orpo_lite.data.chat_template import set_chat_template
from orpo_lite.data.dataset import show_row
from orpo_lite.data.prepare import figure_updates, find_sources, tokenized_splits
from orpo_lite.data.sources.source import is_local, is_path
from orpo_lite.errors import ModelError, Overrides
from orpo_lite.recipe.schema import Recipe
from orpo_lite.updates import Update


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run after all checks: base, tokenizer and pairs. Weights are not loaded."""

    base: Base
    tokenizer: Any
    train: TokenizedPairs
    test: TokenizedPairs
    figures: dict[str, Any]
    """The statistics of the data, which train writes to data.json."""

    @property
    def pad_id(self) -> int:
        """Return the id of the token that pads rows."""
        return pad_id(self.tokenizer)

    @property
    def end_id(self) -> int:
        """Return the id of the token that ends an answer."""
        return int(self.train.facts["end_token_id"])


def prepare_inputs(recipe: Recipe) -> Generator[Update, None, Inputs]:
    """Find and check the base, chat template, target modules, data and tokenized pairs.

    Yield progress, and finally return the inputs. The weights of the base are not downloaded yet.
    """
    yield from request_updates(recipe.data.names)
    sources = find_sources(recipe.data)
    yield from request_updates([recipe.model.model_name_or_path])
    base = find_base(recipe.model.model_name_or_path, recipe.model.model_revision)
    check_targets(recipe, base)
    check_embedding(recipe, base.config)
    train, test, found = yield from tokenized_splits(recipe, base.path, *sources)
    yield from figure_updates(found)
    text_config = base.config.get_text_config()
    _check_ids(train, text_config.vocab_size)
    _check_ids(test, text_config.vocab_size)
    _check_positions(
        base.name, getattr(text_config, "max_position_embeddings", None), (train, test)
    )
    tokenizer = load_tokenizer(base.path)
    set_chat_template(tokenizer, recipe.data)
    return Inputs(base, tokenizer, train, test, found)


@dataclass(frozen=True)
class Preview:
    """The result of `orpo-lite data`: figures, sample pairs and warnings."""

    figures: dict[str, Any]
    """The statistics of the data, which train writes to data.json."""
    samples: dict[str, Any]
    """Pairs as text segments. ``first`` is the first pair. ``cut`` is the first pair whose response
    was cut, if there is one."""
    warnings: list[str]


def preview(recipe: Recipe, place: str | None = None) -> Generator[Update, None, Preview]:
    """Read and tokenize the data as :func:`prepare_inputs` does. Return what to show of the data.

    Yield progress first. Only the text files of the base (config, tokenizer) are downloaded.

    Args:
        recipe: the recipe with the data and the base.
        place: the place of a row to show instead of the first pair, such as "pairs.csv:3". The row
            is shown even if training would leave it out.
    """
    yield from request_updates(recipe.data.names)
    sources = find_sources(recipe.data)
    yield from request_updates([recipe.model.model_name_or_path])
    folder, _ = find_text_files(recipe.model.model_name_or_path, recipe.model.model_revision)
    train, test, found = yield from tokenized_splits(recipe, folder, *sources)
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
        samples = {
            "first": show_row(
                recipe.data, [*sources[0], *sources[1]], partial(load_tokenizer, folder), place
            )
        }
    return Preview(found, samples, warnings)


def request_updates(names: Sequence[str]) -> Iterator[Update]:
    """Yield an update before a request to the hub, because the request may take long.

    ``names`` are names of bases or datasets. If none of them is on the hub, yield nothing. In
    offline mode, yield nothing either.
    """
    remote = [name for name in names if not is_local(name)]
    if remote and (host := hub_host()):
        yield Update("stage", f"asking {host} for {', '.join(remote)}")


def _check_ids(pairs: TokenizedPairs, vocab_size: int | None) -> None:
    """Raise :class:`ModelError` if the base has no embedding for a token id."""
    largest, where = pairs.facts["largest_id"]
    if vocab_size is not None and largest >= vocab_size:
        raise ModelError(
            where=where,
            found=f"token id {largest}, but the model's embedding has {vocab_size} rows",
            expected="a tokenizer that belongs to the model",
            fix="use the base's own tokenizer, or set vocab_size in config.json to the number of "
            "rows of the embedding in the weight files",
        )


def _check_positions(name: str, limit: int | None, splits: Sequence[TokenizedPairs]) -> None:
    """Raise :class:`ModelError` if a sequence has more tokens than the base has positions.

    If positions are learned, training would fail. If they are rotary, the outputs would be noise.
    """
    lengths = (
        split.column(column) for split in splits for column in ("chosen_tokens", "rejected_tokens")
    )
    longest = max(int(column.max(initial=0)) for column in lengths)
    if limit is not None and longest > limit:
        raise ModelError(
            where="data.max_length",
            found=f"the longest pair has {longest:,} tokens, but {name} allows at most {limit:,} "
            "(max_position_embeddings)",
            fix=Overrides({"data.max_length": limit, "data.max_prompt_length": "auto"}),
        )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with each local path made absolute.

    So the run can be resumed from any working directory.
    """
    keys = ["model.model_name_or_path", "model.adapter_name_or_path", "data.chat_template"]
    if recipe.loss.reward_adapter_name_or_path:
        keys.append("loss.reward_adapter_name_or_path")
    if recipe.loss.reference_adapter:
        keys.append("loss.reference_adapter_name_or_path")
    if is_path(recipe.data.dataset_test_split or ""):
        keys.append("data.dataset_test_split")
    # auto and none are not files, and the recipe may hold the text of a template.
    written = {
        key: value
        for key, value in recipe.items()
        if key in keys and value not in (None, "auto", "none")
    }
    values = {key: _absolute(value) for key, value in written.items() if "{" not in value}
    names = [_absolute(name) for name in recipe.data.names]
    return recipe.override(values | {"data.dataset_name": names if len(names) > 1 else names[0]})


def _absolute(name: str) -> str:
    """Return a local path or glob pattern as an absolute path. Return other names unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() or glob.has_magic(name) else name
