"""Answer a few prompts at several steps of a training, so that people can read the answers."""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from orpo_lite.base.find import load_tokenizer
from orpo_lite.base.generation import read_generation_config
from orpo_lite.data.dataset import PromptTokenizer
from orpo_lite.errors import FitError, first_line
from orpo_lite.model.generate import Answerer, Decoding
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.parallel import Processes
from orpo_lite.model.sharding import is_sharded
from orpo_lite.ops.devices import is_lost, is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.commands import resume_command
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.records import SAMPLES, append_samples, read_samples
from orpo_lite.updates import Update, attempt, failure

NEUTRAL = (
    "Name three things worth checking before a long bicycle ride.",
    "Explain in two sentences why the sea is salty.",
    "Write one polite sentence that moves a meeting from Monday to Tuesday.",
    "What is 17 plus 25? Say how you got there.",
    "Turn this into a question: The train leaves at nine.",
)
"""Prompts that are not from a dataset, so a model card can show the answers to them."""
TEMPERATURE = 0.7
UNANSWERED = "prompts are not answered"


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered."""

    source: Literal["neutral", "held-out"]
    text: str
    """The prompt's text; "" if only the tokens are known."""
    ids: Sequence[int]
    """The prompt's tokens, in the form that a training uses."""


def find_prompts(recipe: Recipe, inputs: Inputs) -> Generator[Update, None, list[Prompt]]:
    """Return prompts from NEUTRAL and prompts of held-out pairs: up to ``output.samples`` of each.

    On an error, yield a note and return no prompts.
    """
    neutral = NEUTRAL[: recipe.output.samples]
    found: list[list[int] | str] = []
    try:
        if neutral:
            with PromptTokenizer(recipe.data, load_tokenizer(inputs.base.path)) as tokenizer:
                found = tokenizer.ids([[{"role": "user", "content": text}] for text in neutral])
    except Exception as error:  # samples are not worth a failed training
        yield failure(UNANSWERED, error)
        return []
    prompts = [
        Prompt("neutral", text, ids)
        for text, ids in zip(neutral, found, strict=True)
        if not isinstance(ids, str)
    ]
    held_out = dict.fromkeys(
        tuple(map(int, pair.chosen_ids[: pair.chosen_start])) for pair in inputs.test
    )
    return prompts + [Prompt("held-out", "", ids) for ids in [*held_out][: recipe.output.samples]]


class SampleWriter:
    """Answers prompts at several steps of a training, and appends the answers to samples.jsonl.

    The trained weights are bit for bit the same with and without answers, because
    :class:`Answerer` restores the weights, the mode and the random generators. An answer depends
    only on the seed, the prompt and the weights. So a prompt that has an answer at a step is not
    answered again at this step.

    Args:
        recipe: the recipe of the run.
        prompts: the prompts from :func:`find_prompts`.
        model: the model in training.
        path: the run folder, with the tokenizer and the generation config in ``adapter/``.
        stop: the signals received so far. After a signal no further batch is answered.
        processes: the processes of the training. If they share the base, all of them must answer,
            and the main process writes the answers. Else only the main process has prompts.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: Sequence[Prompt],
        model: PairModel,
        path: Path,
        stop: Sequence[int],
        processes: Processes,
    ) -> None:
        self.recipe, self.prompts, self.model, self.path = recipe, prompts, model, path
        self.stop, self.processes, self.is_failing = stop, processes, False

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.path / "adapter")

    @cached_property
    def _answerer(self) -> Answerer:
        generation, _ = read_generation_config(self.path / "adapter")
        # A batch with as many tokens as a pass of the training fits into memory.
        return Answerer(self.model, generation, tokens=self.recipe.micro_batch_tokens)

    def follow(self, updates: Iterable[Update]) -> Generator[Update, None, None]:
        """Yield the updates of a training, and answer the prompts after each evaluation.

        After an error, no more prompts are answered during the training.

        Raises FitError as :meth:`answer` does.
        """
        for update in updates:
            yield update
            if update.kind == "eval" and not self.is_failing:
                yield from self.answer(update.step)

    def answer(self, step: int) -> Generator[Update, None, bool]:
        """Answer the prompts that have no answer at ``step`` yet, and write samples.jsonl.

        At step 0 the adapter is switched off, so the base answers. On an error, yield a note: the
        training continues without these answers. Finally return False if a signal stopped the
        answers, else True.

        Raises:
            FitError: one of the processes that share the base is out of memory.
        """
        rows = []
        if not self.prompts:
            return True
        try:
            missing = self._missing(step)
            if missing and self._answerer.note:
                yield Update("note", self._answerer.note)
            decoding = Decoding(
                self.recipe.output.max_new_tokens, TEMPERATURE, self.recipe.training.seed
            )
            prompts = [prompt.ids for prompt, _ in missing]
            answers: dict[int, str] = {}
            batches = self._answerer.answer(prompts, decoding, adapter=step > 0) if missing else ()
            for batch in batches:
                for index, ids in batch.items():
                    answers[index] = self._text(ids)
                yield Update("stage", "answering prompts", len(answers), len(missing))
                if self._is_stopping():
                    return False
            rows = [
                {
                    "step": step,
                    "source": missing[index][0].source,
                    "prompt": missing[index][1],
                    "answer": answer,
                    "temperature": TEMPERATURE,
                }
                for index, answer in sorted(answers.items())
            ]
        except Exception as error:
            if is_lost(error):
                raise
            if is_sharded(self.model) and is_out_of_memory(error):
                # The other processes wait for this one inside a pass.
                raise FitError(
                    where=f"run {self.path}",
                    found="out of memory while prompts are answered; processes that share the "
                    f"base cannot retry ({first_line(error)})",
                    fix=resume_command(self.path, {"output.samples": 0}),
                ) from error
            self.is_failing = True
            yield failure(UNANSWERED, error)
        if rows and self.processes.is_main:
            notes = [
                *attempt(f"{self.path / SAMPLES} is not written", append_samples, self.path, rows)
            ]
            self.is_failing = bool(notes)
            yield from notes
        if is_sharded(self.model):  # all processes must answer the next time, or none
            self.is_failing = self.processes.any(self.is_failing)
        return True

    def _is_stopping(self) -> bool:
        if is_sharded(self.model):
            return self.processes.any(bool(self.stop))
        return bool(self.stop)

    def _missing(self, step: int) -> list[tuple[Prompt, str]]:
        """Return the prompts that have no answer at ``step`` yet, with their texts."""
        known = {
            (sample.source, sample.prompt)
            for sample in read_samples(self.path)
            if step in sample.by_step
        }
        shown = [(prompt, prompt.text or self._text(prompt.ids)) for prompt in self.prompts]
        places = [
            place
            for place, (prompt, text) in enumerate(shown)
            if (prompt.source, text) not in known
        ]
        if is_sharded(self.model):  # the others may read the file before it is written
            places = self.processes.from_main(places)
        return [shown[place] for place in places]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
