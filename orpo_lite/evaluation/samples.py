"""Prompts answered before and after a training, for people to look at."""

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from orpo_lite.base.find import load_tokenizer
from orpo_lite.data.dataset import prompt_ids
from orpo_lite.errors import DataError, ModelError
from orpo_lite.model.generate import NEUTRAL, Prompt, Sample, answers
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, PairModel
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import write_text
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import SAMPLES
from orpo_lite.updates import Update


def answer_prompts(
    recipe: Recipe, inputs: Inputs, model: PairModel, path: Path, stop: Sequence[int]
) -> Generator[Update, None, tuple[Sample, ...]]:
    """Prompts of ours and of the held-out pairs, answered before and after; what goes wrong costs the answers only."""
    count, settings, samples = recipe.output.samples, recipe.output, list[Sample]()
    try:
        neutral = NEUTRAL[:count]
        ids = prompt_ids(recipe.data, neutral, partial(load_tokenizer, inputs.base.path)) if neutral else []
        prompts = [Prompt("neutral", *both) for both in zip(neutral, ids, strict=True) if both[1]]
        held_out = dict.fromkeys(tuple(map(int, pair.chosen_ids[: pair.chosen_start])) for pair in inputs.test)
        prompts += [Prompt("held-out", "", ids) for ids in [*held_out][:count]]
        found = answers(
            model, prompts, path / "adapter", max_new_tokens=settings.max_new_tokens, seed=recipe.training.seed
        )
        for sample in found:
            samples.append(sample)
            yield Update("stage", "answering prompts", len(samples), len(prompts))
            if stop:
                raise Interrupted(stop[0], path)
    except (*MODEL_CODE_ERRORS, ModelError, DataError) as error:
        yield Update("note", f"prompts are not answered: {' '.join(str(error).split())[:200] or type(error).__name__}")
    lines = (json.dumps(asdict(sample), ensure_ascii=False) for sample in samples)
    write_text(path / SAMPLES, "".join(f"{line}\n" for line in lines))
    return tuple(samples)
