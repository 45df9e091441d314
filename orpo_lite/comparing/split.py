"""Divide the pairs of a recipe by prompt: for the arms, the judge, the evaluations and the answers.

The files are in the format explicit, so a training reads the same pairs from them as from the
recipe's datasets.
"""

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_lite.base.find import find_text_files, load_tokenizer
from orpo_lite.data.dataset import TOO_LONG, PromptTokenizer
from orpo_lite.data.pair import Message, Pair
from orpo_lite.data.pairs import PairReader
from orpo_lite.data.prepare import find_sources
from orpo_lite.data.sources.source import Source
from orpo_lite.data.split import prompt_key
from orpo_lite.errors import DataError
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.runs.atomic import new_folder
from orpo_lite.runs.inputs import request_updates
from orpo_lite.updates import Update

ARMS, JUDGE, VALIDATION, TEST = "arms", "judge", "validation", "test"
PARTS = (ARMS, JUDGE, VALIDATION, TEST)
PROMPTS = 64
"""Number of prompts to answer, if a person gives no number and the data have enough prompts."""
JUDGED = 500
"""Largest number of pairs that test the judge."""
FEWEST = 8
"""Smallest number of prompts with which a comparison can be made."""


@dataclass(frozen=True)
class Question:
    """A prompt of the test part, and its pairs."""

    messages: tuple[Message, ...]
    prompt_text: str | None
    pairs: tuple[Pair, ...]


def read_parts(
    recipe: Recipe, prompts: int | None
) -> Generator[Update, None, dict[str, list[Pair]]]:
    """Read the pairs of a recipe. Return the name of each of :data:`PARTS` -> its pairs.

    No prompt is in two parts. ``test`` and ``validation`` come from the recipe's held-out dataset.
    Without one, they are prompts of the training dataset. The other prompts are divided into halves
    for ``arms`` and ``judge``. The division depends on the prompts and on ``training.seed``, not on
    the order of the rows.

    Args:
        recipe: the recipe. Its built-in names are resolved.
        prompts: number of prompts in ``test``. None: :data:`PROMPTS`, or fewer if the data have few
            prompts.

    Raises:
        DataError: the pairs cannot be read, or they have too few prompts.
    """
    yield from request_updates(recipe.data.names)
    train_sources, test_sources = find_sources(recipe.data)
    folder, _ = find_text_files(recipe.model.model_name_or_path, recipe.model.model_revision)
    with PromptTokenizer(recipe.data, load_tokenizer(folder)) as tokenizer:
        train = yield from _read(tokenizer, train_sources)
        held_out = (yield from _read(tokenizer, test_sources)) if test_sources else []
    return divide(train, held_out, prompts, recipe.training.seed)


def write_parts(parts: Mapping[str, Sequence[Pair]], folder: Path, data: DataSection) -> None:
    """Write a jsonl file for each part. The folder appears only when all files are complete."""
    is_plain = data.chat_template == "none"
    with new_folder(folder) as temporary:
        for name, pairs in parts.items():
            lines = "".join(json.dumps(_row(pair, is_plain)) + "\n" for pair in pairs)
            (temporary / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _read(
    tokenizer: PromptTokenizer, sources: Sequence[Source]
) -> Generator[Update, None, list[Pair]]:
    """Return the pairs on which a training with these settings would train."""
    stage = f"reading {', '.join(source.name for source in sources)}"
    yield Update("stage", stage)
    kept: list[Pair] = []
    reader = PairReader(tokenizer.data, sources)
    for number, (pair, tokens) in enumerate(tokenizer.pairs(reader)):
        if isinstance(tokens, str):
            reader.drops.add(tokens, pair.where)
        else:
            kept.append(pair)
        if number % 1000 == 0:
            yield Update("stage", stage, reader.read)
    drops = reader.drops
    if not kept:
        fix = "raise data.max_length and data.max_prompt_length"
        drops.raise_nothing_left("data", dict.fromkeys(TOO_LONG, fix))
    for reason, count in drops.counts.items():
        yield Update("note", f"left out: {count:,} {reason} (first {drops.places[reason][0]})")
    return kept


def divide(
    train: Sequence[Pair], held_out: Sequence[Pair], prompts: int | None, seed: int
) -> dict[str, list[Pair]]:
    """Return the name of each part -> its pairs. See :func:`read_parts`.

    Raises:
        DataError: there are too few prompts.
    """
    outside_keys = [*map(prompt_key, held_out)]
    # A prompt of the held-out dataset may be in the training dataset too.
    known = {*outside_keys}
    inside = [pair for pair in train if prompt_key(pair) not in known]
    keys = [*map(prompt_key, inside), *outside_keys]
    rest, outside = _ranked(keys[: len(inside)], seed), _ranked(outside_keys, seed)
    if held_out:
        count = min(PROMPTS, max(1, len(outside) // 2)) if prompts is None else prompts
        if len(outside) < count + 1:
            place, possible = "data.dataset_test_split", len(outside) // 2
            raise _too_few(place, len(outside), count + 1, prompts, possible)
        if len(rest) < FEWEST:
            raise _too_few("data.dataset_name", len(rest), FEWEST, None, 0)
    else:
        count = min(PROMPTS, max(1, len(rest) // 8)) if prompts is None else prompts
        needed = max(4 * count, 2 * count + FEWEST)
        if len(rest) < needed:
            possible = len(rest) // 8 if len(rest) >= 2 + FEWEST else 0
            raise _too_few("data.dataset_name", len(rest), needed, prompts, possible)
        outside, rest = rest[: 2 * count], rest[2 * count :]
    half = len(rest) // 2
    part_of = dict.fromkeys(rest[:half], JUDGE) | dict.fromkeys(rest[half:], ARMS)
    part_of |= dict.fromkeys(outside[:count], TEST) | dict.fromkeys(outside[count:], VALIDATION)
    found: dict[str, list[Pair]] = {name: [] for name in PARTS}
    for pair, key in zip((*inside, *held_out), keys, strict=True):
        found[part_of[key]].append(pair)
    return found


def _ranked(keys: Iterable[bytes], seed: int) -> list[bytes]:
    """Return each key once, in an order that depends only on the keys and the seed."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(b"compare %d\n" % seed + key).digest())


def _too_few(where: str, found: int, needed: int, prompts: int | None, possible: int) -> DataError:
    """Return the error for too few different prompts.

    Args:
        where: the key of the dataset.
        found: number of different prompts in it.
        needed: number of different prompts that are needed.
        prompts: number of prompts to answer, if a person chose it and fewer may be enough.
        possible: number of prompts that could be answered; 0 if the data are too few for any.
    """
    purpose = "a comparison" if prompts is None else f"{prompts:,} prompts to answer"
    return DataError(
        where=where,
        found=f"{found:,} different prompts, too few for {purpose}",
        expected=f"{needed:,} or more different prompts",
        fix=f"--prompts {possible}" if possible > 0 else "use more pairs",
    )


def _row(pair: Pair, is_plain: bool) -> dict[str, Any]:
    """Return a row in the format explicit. ``is_plain``: the template is none."""
    prompt: Any = [*pair.messages]
    if is_plain and pair.prompt_text is not None:
        prompt = pair.prompt_text
    chosen, rejected = (
        [{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected)
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def part_settings(folder: Path, part: str) -> dict[str, Any]:
    """Return the settings ``data.KEY`` of a training on a part, evaluated on ``validation``."""
    return {
        "data.dataset_name": str(folder / f"{part}.jsonl"),
        "data.dataset_test_split": str(folder / f"{VALIDATION}.jsonl"),
        "data.dataset_config": None,
        "data.dataset_train_split": "auto",
        "data.format": "explicit",
        "data.column_map": {},
        "data.max_samples": None,
    }


def read_part(recipe: Recipe, folder: Path, part: str) -> list[Pair]:
    """Return the pairs of a part, as a training reads them."""
    settings: Mapping[str, Any] = {**part_settings(folder, part), "data.dataset_test_split": None}
    data = recipe.override(settings).data
    return [*PairReader(data, find_sources(data)[0])]


def read_questions(recipe: Recipe, folder: Path) -> list[Question]:
    """Return the prompts of the part ``test`` in the order of the file, each with its pairs."""
    grouped: dict[bytes, list[Pair]] = {}
    for pair in read_part(recipe, folder, TEST):
        grouped.setdefault(prompt_key(pair), []).append(pair)
    return [
        Question(pairs[0].messages, pairs[0].prompt_text, tuple(pairs))
        for pairs in grouped.values()
    ]


def read_judge_pairs(recipe: Recipe, folder: Path) -> list[Pair]:
    """Return the pairs that test the judge: those of ``test``, then of ``arms``.

    The judge is trained on neither of them, nor is its adapter chosen on them.
    """
    pairs = [pair for part in (TEST, ARMS) for pair in read_part(recipe, folder, part)]
    return pairs[:JUDGED]


def part_sizes(folder: Path) -> dict[str, int]:
    """Return the number of pairs of each part."""
    return {name: (folder / f"{name}.jsonl").read_bytes().count(b"\n") for name in PARTS}
