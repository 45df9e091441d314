"""From a recipe to tokenized training and held-out pairs, with their figures."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_lite.base.find import load_tokenizer
from orpo_lite.data.cache import VARIABLE, TokenizedPairs, cache_folder, wanted_folder
from orpo_lite.data.dataset import tokenized
from orpo_lite.data.formats.column_map import refuse_unknown_columns
from orpo_lite.data.sources.find import with_unique_labels
from orpo_lite.data.sources.source import Source
from orpo_lite.data.split import held_out_sources, hold_out, training_sources
from orpo_lite.data.statistics import counted, figures
from orpo_lite.errors import DataError, reworded
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.updates import Update, staged

Sources = tuple[list[Source], list[Source]]  # to train on, held out


def find_sources(data: DataSection) -> Sources:
    """The sets that a recipe names, found but not read. Raises DataError and HubError."""
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
    """Both sides as tokens, and their figures. Without a held-out set one is split off, by prompt, after all filters.

    What was tokenised before, with the same rows, template, limits and tokenizer, is read from the cache.
    """
    if (folder := cache_folder()) != wanted_folder():
        said = f"{wanted_folder()} cannot be written to: the tokens are in {folder} while this lasts ({VARIABLE})"
        yield Update("note", said)
    for source in (*train_sources, *test_sources):
        # That the set has a held-out split is news only to who has none.
        news = [
            said
            for said in source.note.split("; ")
            if not (test_sources and said.startswith("data.dataset_test"))
        ]
        if any(news):
            yield Update("note", f"{source.name}: {'; '.join(news)}")
    train = yield from _tokenize_split(recipe.data, tokenizer_folder, train_sources)
    if test_sources:
        test = yield from _tokenize_split(recipe.data, tokenizer_folder, test_sources)
    else:
        size, seed = recipe.data.test_split_size, recipe.training.seed
        try:
            kept, held = hold_out(range(len(train)), train.prompts(), size, seed)
        except DataError as fault:
            raise _after_drops(fault, train.facts) from None
        train, test = train.select(kept), train.select(held)
    return train, test, figures(train, test)


def _after_drops(fault: DataError, facts: Mapping[str, Any]) -> DataError:
    """The same; where few pairs are left because others were left out, that comes first."""
    if not facts["dropped"]:
        return fault
    reasons = (
        f"{count:,} {reason} (first {facts['places'][reason][0]})"
        for reason, count in facts["dropped"].items()
    )
    found = f"{sum(facts['dropped'].values()):,} of {facts['rows_read']:,} rows were left out: {'; '.join(reasons)}"
    fix = reworded(fault.fix, f"mend these rows; or {fault.fix}")
    return DataError(
        where="data", found=f"{found}. Of the rest, {fault.found}", expected=fault.expected, fix=fix
    )


def _tokenize_split(
    data: DataSection, folder: Path, sources: Sequence[Source]
) -> Generator[Update, None, TokenizedPairs]:
    yield Update("stage", f"reading {', '.join(source.name for source in sources)}")
    rows = tokenized(data, sources, folder, partial(load_tokenizer, folder))
    return (yield from staged("tokenizing", rows))


def figures_said(found: Mapping[str, Any]) -> Iterator[Update]:
    """The figures that nobody should train without having seen."""
    sentences = (*found["format"], found["chat_template"], found["tokenizer"])
    yield from (Update("note", sentence) for sentence in sentences if sentence)
    drops = (
        f"{drop['pairs']:,} {why} (first {drop['first'][0]})"
        for why, drop in found["dropped"].items()
    )
    dropped = ", ".join(drops) or "none"
    kept = f"{found['train_pairs']:,} pairs to train on, {found['held_out_pairs']:,} held out"
    yield Update("note", f"{kept}; left out: {dropped}")
    if count := found["cut"]["responses_without_end"]:
        yield Update("note", f"{count:,} responses are cut by data.max_length and lose their end")
    yield from (Update("note", f"warning: {line}") for line in counted(found))
    if count := found["prompts"]["shared"]:
        said = f"{count:,} of {found['prompts']['held_out']:,} held-out prompts stand in the training set too"
        yield Update("note", f"warning: {said}: the evaluation will flatter")


def pair_lengths(pairs: TokenizedPairs) -> NDArray[np.int64]:
    """Tokens of each pair's common prefix, chosen and rejected sequence, shape (pairs, 3): all that a plan needs."""
    columns = (pairs.column(name) for name in ("prefix", "chosen_tokens", "rejected_tokens"))
    return np.stack([column.astype(np.int64) for column in columns], 1)
