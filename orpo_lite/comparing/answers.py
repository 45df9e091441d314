"""Sample answers of each run to the test prompts, and let the judge give each answer a reward.

A finished round of a run is a file. If a command was stopped, the next one samples only the rounds
that have no file.
"""

import gc
import json
import math
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orpo_lite.comparing.split import Question
from orpo_lite.comparing.task import Run, Task
from orpo_lite.data.dataset import PromptTokenizer
from orpo_lite.data.formats.text import LONE_SURROGATE
from orpo_lite.data.pair import Pair, TokenizedPair
from orpo_lite.evaluation.open_run import OpenRun, find_model, load_model
from orpo_lite.evaluation.rewards import reply_tokenizer
from orpo_lite.evaluation.score import score_pairs
from orpo_lite.model.generate import Answerer, Decoding
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update

TEMPERATURE = 1.0  # as in the paper
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """A sampled answer to a prompt."""

    prompt: int
    """Number of the prompt in the part ``test``, from 0."""
    text: str | None
    """None: the prompt cannot be answered, because it is too long or the template refuses it."""
    tokens: int
    cut: bool
    """True: the answer has the largest allowed number of tokens, and no end."""


Rounds = list[list[Answer]]
"""The answers of a run: for each round, one for each prompt."""


def sample_all(
    task: Task, runs: Sequence[Run], questions: Sequence[Question]
) -> Generator[Update, None, dict[str, Rounds]]:
    """Return the name of each run -> its answers. Sample those that have no file yet.

    In a round, all runs use the same random numbers for a prompt. So two equal models give equal
    answers, and the difference of two models is measured with less noise.
    """
    (task.folder / "answers").mkdir(exist_ok=True)
    total = len(runs) * task.rounds
    for number, run in enumerate(runs):
        files = [_file(task, run, round_) for round_ in range(task.rounds)]
        missing = [round_ for round_, file in enumerate(files) if not file.is_file()]
        if not missing:
            continue
        yield Update("stage", "sampling answers", number * task.rounds, total)
        opened = load_model(find_model(run.path))
        with opened.prompt_tokenizer() as tokenizer:
            answerer = opened.answerer(tokenizer.end_id)
            found = tokenizer.ids([question.messages for question in questions])
            prompts, reasons = _possible(found, answerer, opened.recipe.data.prompt_limit)
            if number == 0:
                if answerer.note:
                    yield Update("note", answerer.note)
                for reason, count in reasons.items():
                    yield Update("note", f"prompts without answers: {count} ({reason})")
            for round_ in missing:
                rows = [Answer(row, None, 0, False) for row in range(len(prompts))]
                decoding = Decoding(task.max_new_tokens, TEMPERATURE, task.seed + round_)
                for batch in answerer.answer(prompts, decoding):
                    for row, ids in batch.items():
                        text = tokenizer.template.special.sub("", opened.text(ids))
                        is_cut = len(ids) >= task.max_new_tokens
                        rows[row] = Answer(row, text, len(ids), is_cut)
                    yield Update("stage", "sampling answers", number * task.rounds + round_, total)
                lines = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
                write_text(files[round_], lines)
        del opened, answerer
        gc.collect()
    return {run.name: _read(task, run) for run in runs}


def _file(task: Task, run: Run, round_: int) -> Path:
    return task.folder / "answers" / f"{run.name}-round{round_ + 1}.jsonl"


def _read(task: Task, run: Run) -> Rounds:
    texts = [_file(task, run, round_).read_text("utf-8") for round_ in range(task.rounds)]
    return [[Answer(**json.loads(line)) for line in text.splitlines()] for text in texts]


def _possible(
    found: Sequence[list[int] | str], answerer: Answerer, limit: int
) -> tuple[list[list[int]], Counter[str]]:
    """Return the prompts, [] for one that cannot be answered, and the reasons with their counts."""
    prompts, reasons = [], Counter[str]()
    for ids in found:
        reason = ids if isinstance(ids, str) else ""
        if not reason and len(ids) > limit:
            reason = "longer than data.max_prompt_length"
        elif not reason and answerer.room(ids) < 1:  # type: ignore[arg-type]
            reason = "longer than the model's positions"
        if reason:
            reasons[reason] += 1
        prompts.append([] if reason else [*map(int, ids)])
    return prompts, reasons


@dataclass(frozen=True)
class Judged:
    """The rewards of the judge."""

    rewards: dict[str, Numbers]
    """Name of a run -> the rewards of its answers, shape (rounds, prompts). NaN: no reward."""
    pairs: Numbers
    """The rewards of the chosen and the rejected replies of pairs, shape (pairs, 2)."""


def judge_all(
    task: Task,
    answers: dict[str, Rounds],
    questions: Sequence[Question],
    pairs: Sequence[Pair],
) -> Generator[Update, None, Judged]:
    """Return the judge's rewards of all answers, and of pairs that test the judge.

    The rewards of a run are kept in a file, and read from it the next time.
    """
    folder = task.folder / "rewards"
    folder.mkdir(exist_ok=True)
    wanted: dict[str, list[list[Pair | None]]] = {
        name: [[_pair(questions[row.prompt], row.text) for row in rows] for rows in rounds]
        for name, rounds in answers.items()
    }
    wanted[task.judge.name] = [
        [Pair(pair.messages, text, "", pair.where, pair.prompt_text) for text in replies]
        for pair in pairs
        for replies in [(pair.chosen, pair.rejected)]
    ]
    missing = [name for name in wanted if not (folder / f"{name}.json").is_file()]
    if missing:
        yield Update("stage", "judging answers", 0, len(missing))
        opened = load_model(find_model(task.judge.path, command="score"))
        with reply_tokenizer(opened) as tokenizer:
            for number, name in enumerate(missing):
                rows = wanted[name]
                flat = [pair for pairs in rows for pair in pairs if pair is not None]
                tokens = reply_tokens(tokenizer, flat)
                by_reply = iter((yield from _rewards(opened, tokens)))
                table = [[None if pair is None else next(by_reply) for pair in row] for row in rows]
                write_text(folder / f"{name}.json", to_json({"rewards": table}))
                yield Update("stage", "judging answers", number + 1, len(missing))
    read = {name: _numbers(read_json(folder / f"{name}.json")["rewards"]) for name in wanted}
    return Judged({name: read[name] for name in answers}, read[task.judge.name])


def _rewards(
    opened: OpenRun, tokens: Sequence[TokenizedPair | None]
) -> Generator[Update, None, list[float | None]]:
    """Return the reward of each reply of :func:`reply_tokens`; None for None.

    Two replies to the same prompt are scored as a pair, so that the prompt is computed once.
    """
    waiting: dict[bytes, int] = {}
    pairs: list[TokenizedPair] = []
    places: list[list[int]] = []
    for place, reply in enumerate(tokens):
        if reply is None:
            continue
        prompt = np.asarray(reply.chosen_ids[: reply.chosen_start]).tobytes()
        if (pair := waiting.pop(prompt, None)) is None:
            waiting[prompt] = len(pairs)
            pairs.append(reply)
            places.append([place])
        else:
            ids, start = reply.chosen_ids, reply.chosen_start
            pairs[pair] = replace(pairs[pair], rejected_ids=ids, rejected_start=start)
            places[pair].append(place)
    found: list[float | None] = [None] * len(tokens)
    if pairs:
        scores = yield from score_pairs(opened.model, pairs, opened.recipe, "judging answers")
        both = zip(scores.chosen_P.tolist(), scores.rejected_P.tolist(), strict=True)
        for pair_places, rewards in zip(places, both, strict=True):
            for place, reward in zip(pair_places, rewards, strict=False):
                found[place] = reward
    return found


def _pair(question: Question, text: str | None) -> Pair | None:
    if text is None:
        return None
    return Pair(question.messages, text, "", "answer", question.prompt_text)


def reply_tokens(tokenizer: PromptTokenizer, pairs: Sequence[Pair]) -> list[TokenizedPair | None]:
    """Return the tokens of the chosen reply of each pair, without a rejected sequence.

    None: the reply cannot be tokenized. An empty reply is tokenized as the rejected one, because
    two equal replies are refused.
    """
    found: list[TokenizedPair | None] = [None] * len(pairs)
    texts = [(pair.chosen, *(turn["content"] for turn in pair.messages)) for pair in pairs]
    whole = [
        (place, pair)
        for place, pair in enumerate(pairs)
        if not LONE_SURROGATE.search("".join(texts[place]))
    ]
    given = [replace(pair, chosen=pair.chosen or ".") for _, pair in whole]
    for (place, pair), (_, tokens) in zip(whole, tokenizer.pairs(given), strict=True):
        if isinstance(tokens, str):
            continue
        if not pair.chosen:
            ids, start = tokens.rejected_ids, tokens.rejected_start
            tokens = replace(tokens, chosen_ids=ids, chosen_start=start)
        found[place] = replace(tokens, rejected_ids=[], rejected_start=0)
    return found


def _numbers(rows: Sequence[Sequence[float | None]]) -> Numbers:
    return np.array([[math.nan if v is None else v for v in row] for row in rows], np.float64)
