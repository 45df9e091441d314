"""Read a file of prompts in the form that a grader publishes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_lite.data.pair import Message
from orpo_lite.data.sources.files import read_file
from orpo_lite.data.sources.lines import File
from orpo_lite.errors import DataError, raise_all, reworded

# FastChat, fastchat/llm_judge/common.py, temperature_config; other categories are greedy.
MT_BENCH_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


@dataclass(frozen=True)
class Question:
    """One row of the prompts file: the user turns to answer, and the earlier messages."""

    row: Mapping[str, Any]
    before: tuple[Message, ...]
    turns: tuple[str, ...]
    """The model sees its answer to the first turn when it answers the second turn."""


@dataclass(frozen=True)
class GraderFormat:
    """The format of a grader, such as MT-Bench: how to read questions, and defaults for answers."""

    read: Callable[[Mapping[str, Any]], Question | None]
    """Return the question of a row, or None if the row has another form."""
    expected: str
    """The form of a row, for error messages."""
    suffix: str
    """The suffix of the file of answers."""
    max_new_tokens: int
    temperature: Callable[[Question], float]


def _text_at(key: str) -> Callable[[Mapping[str, Any]], Question | None]:
    def read(row: Mapping[str, Any]) -> Question | None:
        text = row.get(key)
        return Question(row, (), (text,)) if isinstance(text, str) else None

    return read


def _read_turns(row: Mapping[str, Any]) -> Question | None:
    turns = row.get("turns")
    is_right = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
    return Question(row, (), tuple(turns)) if is_right and "question_id" in row and turns else None


def _read_prompt(row: Mapping[str, Any]) -> Question | None:
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return _text_at("prompt")(row)
    is_right = all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        for turn in prompt
    )
    if not prompt or not is_right or prompt[-1]["role"] != "user":
        return None
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    return Question(row, tuple(turns[:-1]), (turns[-1]["content"],))


FORMATS = {
    "alpaca_eval": GraderFormat(
        _text_at("instruction"), '"instruction": a text', ".json", 2048, lambda _: 0.7
    ),
    "mt_bench": GraderFormat(
        _read_turns,
        '"question_id", and "turns": a list of texts',
        ".jsonl",
        1024,
        lambda question: MT_BENCH_TEMPERATURES.get(str(question.row.get("category")), 0.0),
    ),
    "ifeval": GraderFormat(_text_at("prompt"), '"prompt": a text', ".jsonl", 1280, lambda _: 0.0),
    "jsonl": GraderFormat(
        _read_prompt,
        '"prompt": a text, or a list of messages that ends with a user message',
        ".jsonl",
        512,
        lambda _: 0.0,
    ),
}
"""The formats of AlpacaEval, of FastChat's MT-Bench, of IFEval, and of plain prompts.

The token limits and temperatures are those that the authors of the graders use. AlpacaEval leaves
both to the author of the model."""


def read_questions(path: Path, grader: str) -> list[Question]:
    """Return the questions in a file. Raise a single :class:`DataError` for all wrong rows."""
    if not path.is_file():
        raise DataError(
            where=f"--prompts {path}", found="no such file", expected="a file of prompts"
        )
    faults: list[DataError] = []
    questions = []
    for where, row in _rows(path, faults):
        question = FORMATS[grader].read(row)
        if question is None:
            keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            faults.append(
                DataError(
                    where=where,
                    found=f"a row with {keys}"[:200],
                    expected=FORMATS[grader].expected,
                    fix=f"--for {_likely(row)}" if _likely(row) else "",
                )
            )
        else:
            questions.append(question)
    raise_all(faults)
    _refuse_equal_ids(path, questions)
    if not questions:
        raise DataError(
            where=f"--prompts {path}", found="has no rows", expected="at least one prompt"
        )
    return questions


def _refuse_equal_ids(path: Path, questions: Sequence[Question]) -> None:
    """Raise :class:`DataError` if two questions have the same ``question_id``."""
    ids = Counter(str(question.row.get("question_id")) for question in questions)
    equal = [name for name, number in ids.items() if number > 1 and name != "None"]
    if equal:
        raise DataError(
            where=f"--prompts {path}",
            found=f"{len(equal)} values of question_id occur twice, such as {equal[0]}",
            expected="another question_id in each row",
        )


def _rows(path: Path, faults: list[DataError]) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a file of prompts. The fixes of errors name ``--prompts``."""
    try:
        yield from read_file(File(path, path.name), faults)
    except DataError as error:
        fix = reworded(error.fix, error.fix.replace("data.dataset_name=", "--prompts "))
        raise DataError(
            where=error.where, found=error.found, expected=error.expected, fix=fix
        ) from error


def _likely(row: Mapping[str, Any]) -> str:
    return next((name for name, kind in FORMATS.items() if kind.read(row)), "")
