"""Answer a few prompts before and after a training, for people to read."""

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from orpo_lite.base.find import load_tokenizer
from orpo_lite.data.dataset import prompt_ids
from orpo_lite.model.generate import NEUTRAL, Prompt, Sample, answers
from orpo_lite.model.pair_model import PairModel
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import write_text
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.runs.records import SAMPLES
from orpo_lite.updates import Update, attempt, failure

UNANSWERED = "prompts are not answered"


def find_prompts(recipe: Recipe, inputs: Inputs) -> Generator[Update, None, list[Prompt]]:
    """Return the neutral prompts and those of held-out pairs.

    This runs before the training, so that an error shows early. An error is reported as a note, and
    no prompts are returned then.
    """
    neutral = NEUTRAL[: recipe.output.samples]
    neutral_ids: list[list[int]] = []
    try:
        if neutral:
            load = partial(load_tokenizer, inputs.base.path)
            neutral_ids = prompt_ids(recipe.data, neutral, load)
    except Exception as error:  # samples are not worth a failed training
        yield failure(UNANSWERED, error)
        return []
    prompts = [
        Prompt("neutral", text, ids) for text, ids in zip(neutral, neutral_ids, strict=True) if ids
    ]
    held_out = dict.fromkeys(
        tuple(map(int, pair.chosen_ids[: pair.chosen_start])) for pair in inputs.test
    )
    return prompts + [Prompt("held-out", "", ids) for ids in [*held_out][: recipe.output.samples]]


def answer_prompts(
    recipe: Recipe, prompts: Sequence[Prompt], model: PairModel, path: Path, stop: Sequence[int]
) -> Generator[Update, None, tuple[Sample, ...]]:
    """Answer the prompts before and after the training, and write the answers to the run.

    An error is reported as a note and does not end the command. A signal raises
    :class:`Interrupted`.
    """
    settings, samples = recipe.output, list[Sample]()
    try:
        found = answers(
            model,
            prompts,
            path / "adapter",
            max_new_tokens=settings.max_new_tokens,
            seed=recipe.training.seed,
        )
        for sample in found:
            samples.append(sample)
            yield Update("stage", "answering prompts", len(samples), len(prompts))
            if stop:
                raise Interrupted(stop[0], path)
    except Interrupted:
        raise
    except Exception as error:
        yield failure(UNANSWERED, error)
    lines = (json.dumps(asdict(sample), ensure_ascii=False) for sample in samples)
    text = "".join(f"{line}\n" for line in lines)
    yield from attempt(f"{path / SAMPLES} is not written", write_text, path / SAMPLES, text)
    return tuple(samples)
