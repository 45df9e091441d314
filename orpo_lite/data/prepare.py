"""Tokenize the training and held-out pairs of a recipe, and compute the figures of data.json."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_lite.base.find import load_tokenizer
from orpo_lite.data.cache import VARIABLE, TokenizedPairs, cache_folder, configured_folder
from orpo_lite.data.dataset import tokenized
from orpo_lite.data.formats.column_map import refuse_unknown_columns
from orpo_lite.data.sources.find import with_unique_labels
from orpo_lite.data.sources.source import Source
from orpo_lite.data.split import held_out_sources, hold_out, training_sources
from orpo_lite.data.statistics import figures, warning_lines
from orpo_lite.errors import DataError, reworded
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.updates import Update, staged

Sources = tuple[list[Source], list[Source]]
"""(training datasets, held-out datasets)."""


def find_sources(data: DataSection) -> Sources:
    """Return the training and the held-out datasets of a recipe. Raises DataError and HubError.

    Rows are read only to check the column names in data.column_map.
    """
    train, test = training_sources(data), held_out_sources(data)
    both = with_unique_labels([*train, *test])
    refuse_unknown_columns(data, both)
    return both[: len(train)], both[len(train) :]


def tokenized_splits(
    recipe: Recipe,
    tokenizer_folder: Path,
    train_sources: Sequence[Source],
    test_sources: Sequence[Source],
) -> Generator[Update, None, tuple[TokenizedPairs, TokenizedPairs, dict[str, Any]]]:
    """Yield progress; finally return the tokenized training and held-out pairs, and their figures.

    The figures are the content of data.json: see :func:`orpo_lite.data.statistics.figures`.

    If there is no held-out dataset, some prompts of the training dataset are held out, each with
    all its pairs. These prompts are selected after all filters. If the same rows were tokenized
    before with the same template, limits and tokenizer, the tokens are read from the cache.
    """
    folder = cache_folder()
    if folder != configured_folder():
        text = f"cannot write to {configured_folder()}: this command stores its tokens in {folder}"
        yield Update("note", f"{text} ({VARIABLE} sets another folder)")
    for source in (*train_sources, *test_sources):
        notes = source.note.split("; ")
        if test_sources:  # a hint at a held-out split is not needed if there is one
            notes = [note for note in notes if not note.startswith("data.dataset_test")]
        if any(notes):
            yield Update("note", f"{source.name}: {'; '.join(notes)}")
    train = yield from _tokenize_split(recipe.data, tokenizer_folder, train_sources)
    if test_sources:
        test = yield from _tokenize_split(recipe.data, tokenizer_folder, test_sources)
    else:
        size, seed = recipe.data.test_split_size, recipe.training.seed
        try:
            kept, held = hold_out(range(len(train)), train.prompts(), size, seed)
        except DataError as fault:
            raise _with_dropped(fault, train.facts) from None
        train, test = train.select(kept), train.select(held)
    return train, test, figures(train, test)


def _with_dropped(fault: DataError, facts: Mapping[str, Any]) -> DataError:
    """Return the error with a list of the pairs that were left out, which may be its cause."""
    dropped = facts["dropped"]
    if not dropped:
        return fault
    reasons = [
        f"{count:,} {reason} (first {facts['places'][reason][0]})"
        for reason, count in dropped.items()
    ]
    rows = f"{sum(dropped.values()):,} of {facts['rows_read']:,} rows were left out"
    return DataError(
        where="data",
        found=f"{rows}: {'; '.join(reasons)}. For the other rows: {fault.found}",
        expected=fault.expected,
        fix=reworded(fault.fix, f"correct these rows; or {fault.fix}"),
    )


def _tokenize_split(
    data: DataSection, folder: Path, sources: Sequence[Source]
) -> Generator[Update, None, TokenizedPairs]:
    yield Update("stage", f"reading {', '.join(source.name for source in sources)}")
    rows = tokenized(data, sources, folder, partial(load_tokenizer, folder))
    return (yield from staged("tokenizing", rows))


def figure_updates(found: Mapping[str, Any]) -> Iterator[Update]:
    """Yield notes with those figures that a person must see before the training.

    ``found``: all figures, see :func:`orpo_lite.data.statistics.figures`.
    """
    for sentence in (*found["format"], found["chat_template"], found["tokenizer"]):
        if sentence:
            yield Update("note", sentence)
    drops = [
        f"{drop['pairs']:,} {reason} (first {drop['first'][0]})"
        for reason, drop in found["dropped"].items()
    ]
    kept = f"{found['train_pairs']:,} pairs to train on, {found['held_out_pairs']:,} held out"
    yield Update("note", f"{kept}; left out: {', '.join(drops) or 'none'}")
    if count := found["cut"]["responses_without_end"]:
        yield Update("note", f"data.max_length cuts the end of {count:,} responses")
    for line in warning_lines(found):
        yield Update("note", f"warning: {line}")
    if count := found["prompts"]["shared"]:
        held_out = found["prompts"]["held_out"]
        text = f"{count:,} of {held_out:,} held-out prompts are also in the training set"
        yield Update("note", f"warning: {text}, so the evaluation will look too good")


def pair_lengths(pairs: TokenizedPairs) -> NDArray[np.int64]:
    """Return token counts of shape (pairs, 3): common prefix, chosen and rejected sequence."""
    columns = (pairs.column(name) for name in ("prefix", "chosen_tokens", "rejected_tokens"))
    return np.stack([column.astype(np.int64) for column in columns], 1)


def step_lengths(recipe: Recipe, pairs: TokenizedPairs) -> NDArray[np.int64]:
    """Return the token counts of the longest sequences that a step may have for each pair.

    They are those of :func:`pair_lengths`, except for PPO: a sequence has a prompt and a sampled
    answer, and there is no rejected sequence.
    """
    if recipe.loss.type != "ppo":
        return pair_lengths(pairs)
    prompts = pairs.column("chosen_start").astype(np.int64)
    zeros = np.zeros_like(prompts)
    return np.stack([zeros, prompts + recipe.loss.response_length, zeros], 1)
