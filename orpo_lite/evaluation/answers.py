"""Answer a file of prompts, and write the answers in the format that a grader reads.

If a command was stopped, run the same command again. The finished answers are kept, and the other
prompts are answered. If the file of answers is finished, the same command does nothing.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from orpo_lite.data.formats.text import LONE_SURROGATE
from orpo_lite.data.pair import Message
from orpo_lite.errors import RecipeError
from orpo_lite.evaluation.graders import FORMATS, Question, read_questions
from orpo_lite.evaluation.open_run import FoundModel, find_model, load_model, refuse_reward_model
from orpo_lite.model.generate import Answerer, Decoding
from orpo_lite.runs.atomic import explain_write_errors, sha256, write_text
from orpo_lite.runs.folder import adapter_sha256
from orpo_lite.updates import Update

SEED = 42


@dataclass(frozen=True)
class Task:
    """Checked prompts, and the model that will answer. The model's weights are not loaded yet."""

    found: FoundModel
    grader: str
    questions: Sequence[Question]
    to: Path
    adapter: bool
    max_new_tokens: int
    temperature: float | None
    """The temperature of all answers. None: the temperature of the grader's format."""
    key: Mapping[str, Any]
    """What the answers depend on. Answers of a stopped command are kept if their key is equal."""

    @property
    def model_name(self) -> str:
        """The model's name in the answers. It ends with ``-base`` if the base of a run answers."""
        path = Path(self.found.name)
        name = path.resolve().name if path.is_dir() else self.found.name
        return name if self.adapter or not self.found.adapter else f"{name}-base"

    @property
    def progress(self) -> Path:
        """The path of the hidden file, which holds :attr:`key` and the answers so far.

        When the command is finished, all answers are in the file :attr:`to`. The hidden file then
        holds only :attr:`key`, the time of the first start, and the hash of the file :attr:`to`.
        """
        return self.to.with_name(f".{self.to.name}.progress")

    @property
    def is_finished(self) -> bool:
        """True if the answer file was written with an equal ``key`` and did not change later."""
        head = _read_progress(self.progress)[0]
        return head.get("key") == self.key and _is_result(self.to, head)

    def temperature_of(self, question: Question) -> float:
        """Return the temperature for the answers to a question."""
        if self.temperature is not None:
            return self.temperature
        return FORMATS[self.grader].temperature(question)


@dataclass(frozen=True)
class Answers:
    """The result of answering a file of prompts."""

    file: Path
    prompts: int
    tokens: int
    """Tokens of the answers of this call. Answers of an earlier call are not counted."""
    seconds: float
    """Time to answer, without the time to load the model."""


def prepare_answers(
    name: str | Path,
    prompts: str | Path,
    *,
    grader: str = "jsonl",
    to: str | Path | None = None,
    adapter: bool = True,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    base_path: str | Path | None = None,
) -> Task:
    """Read the prompts and find the model. No weights are loaded.

    Args:
        name: the model, as for :func:`orpo_lite.evaluation.open_run.find_model`.
        prompts: the file of prompts, in the format of the grader's own prompts. For
            ``grader="jsonl"``, each row has a ``prompt``.
        grader: a key of :data:`orpo_lite.evaluation.graders.FORMATS`.
        to: the file to write. None: a file in ``RUN/answers``.
        adapter: False: the base of the run answers, without the adapter.
        max_new_tokens: largest number of tokens in an answer. None: the limit of the grader's
            format.
        temperature: the temperature of sampling. 0: no sampling. None: the temperature of the
            grader's format.
        base_path: where the base of the run is now, if its folder was moved.

    Raises:
        RecipeError: ``grader`` is unknown; a value is out of range; ``adapter`` is False and the
            model has no adapter; ``to`` is None and the model is
            not a run; or the file ``to`` is not from a call with the same arguments.
        DataError: the prompts cannot be read, or a row does not have the grader's format.
        OrpoLiteError: the model cannot be found; see
            :func:`orpo_lite.evaluation.open_run.find_model`.
    """
    if grader not in FORMATS:
        raise RecipeError(
            where="--for",
            found=f"{grader!r}",
            expected=f"one of {', '.join(FORMATS)}",
            fix="--for jsonl",
        )
    check_decoding(max_new_tokens, temperature)
    kind, path = FORMATS[grader], Path(prompts).expanduser()
    questions = read_questions(path, grader)
    found = find_model(name, base_path=base_path, command="generate")
    refuse_reward_model(found, "orpo-lite generate")
    if to is None and found.run is None:
        raise RecipeError(
            where="--to",
            found=f"is not given, and {found.name} is not a run",
            expected="the name of the file to write",
            fix=f"--to answers{kind.suffix}",
        )
    if not adapter and found.adapter is None:
        in_run = found.run is not None
        raise RecipeError(
            where="--adapter off",
            found=f"{found.name} has no adapter to switch off",
            expected="the folder of a run",
            fix=f"give {found.run} instead" if in_run else "leave --adapter off out",
        )
    base = "" if adapter else "-base"
    target = (
        Path(to).expanduser()
        if to is not None
        else (found.run or Path()) / "answers" / f"{grader}{base}{kind.suffix}"
    )
    weights = adapter_sha256(found.adapter) if found.adapter else found.base.fingerprint
    limit = max_new_tokens or kind.max_new_tokens
    key = {
        "grader": grader,
        "prompts": sha256(path),
        "model": found.name,
        "weights": weights,
        "adapter": adapter,
        "max_new_tokens": limit,
        "temperature": temperature,
    }
    task = Task(found, grader, questions, target, adapter, limit, temperature, key)
    _refuse_other_answers(task)
    return task


def _refuse_other_answers(task: Task) -> None:
    """Raise :class:`RecipeError` if ``task.to`` or its answers so far are of another command."""
    head, lines = _read_progress(task.progress)
    known, exists = head.get("key", {}), task.to.exists()
    differing = [key for key, value in task.key.items() if known.get(key) != value]
    is_same = not differing and (lines or not exists or _is_result(task.to, head))
    is_new = not exists and not lines
    if is_same or is_new:
        return
    found = "is a folder" if task.to.is_dir() else "exists already"
    if not exists:
        found = "a stopped command has begun this file"
    changed = f", with other {' and '.join(differing)}" if known and differing else ""
    raise RecipeError(
        where=f"--to {task.to}",
        found=f"{found}{changed}",
        expected="a new file, or the same command as before",
        # Without a hidden file, the file was not written by this command: it may be anything.
        fix=f"--to {_free_name(task.to)}"
        + (f", or remove {task.to if exists else task.progress}" if known else ""),
    )


def _free_name(file: Path) -> Path:
    """Return the first free name of ``x-2.jsonl``, ``x-3.jsonl`` and so on for ``x.jsonl``."""
    names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in count(2))
    return next(name for name in names if not name.exists())


def _read_progress(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the head of a hidden file as JSON, and its other whole lines; ({}, []) without it."""
    lines = file.read_text("utf-8").split("\n") if file.is_file() else []
    whole = lines[:-1]  # a process that was killed may have written only part of the last line
    return (json.loads(whole[0]), whole[1:]) if whole else ({}, [])


def _is_result(file: Path, head: Mapping[str, Any]) -> bool:
    """Return True if a file of answers is the one whose hash the head of its hidden file has."""
    return "sha256" in head and file.is_file() and sha256(file) == head["sha256"]


def check_decoding(max_new_tokens: int | None, temperature: float | None) -> None:
    """Raise :class:`RecipeError` if ``max_new_tokens`` or ``temperature`` is out of range."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise RecipeError(
            where="--max-new-tokens",
            found=f"{max_new_tokens}",
            expected="1 or more",
            fix="--max-new-tokens 512",
        )
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise RecipeError(
            where="--temperature",
            found=f"{temperature}",
            expected="0 or more (0: no sampling)",
            fix="--temperature 0.7",
        )


def write_answers(task: Task) -> Generator[Update, None, Answers]:
    """Answer the prompts of a task, and at the end write the file of answers atomically.

    During the task, the finished answers are in a hidden file in the same folder. If the command is
    stopped, run the command again. The second command continues after the finished answers. It
    writes the same file as a command that was not stopped.

    A sampled answer depends on :data:`SEED` and on its own prompt. The answer is empty if the
    template cannot render the prompt, or if the prompt is too long for the model. Empty answers are
    written too, because a grader expects an answer to each prompt. A note tells their number.
    """
    if task.is_finished:
        yield Update("note", f"{task.to} has all answers already")
        return Answers(task.to, len(task.questions), 0, 0.0)
    progress = _Progress(task)
    total = sum(len(question.turns) for question in task.questions)
    tokens, began = 0, time.monotonic()
    if len(progress.texts) < total:
        yield Update("stage", f"loading {task.found.name}")
        opened = load_model(task.found)
        with opened.prompt_tokenizer() as tokenizer:
            answerer = opened.answerer(tokenizer.end_id)
            if answerer.note:
                yield Update("note", answerer.note)
            began = time.monotonic()
            for turn, temperature, rows in _groups(task):
                found = tokenizer.ids([progress.conversation(row, turn) for row in rows])
                prompts, reasons = _with_room(found, answerer)
                for reason, empty_count in reasons.items():
                    yield Update("note", f"empty answers: {empty_count} ({reason})")
                decoding = Decoding(task.max_new_tokens, temperature, SEED)
                done = [index for index, row in enumerate(rows) if (row, turn) in progress.texts]
                empty = [row for row, ids in zip(rows, prompts, strict=True) if not ids]
                progress.add(turn, dict.fromkeys(empty, ""))
                for batch in answerer.answer(prompts, decoding, adapter=task.adapter, done=done):
                    tokens += sum(map(len, batch.values()))
                    texts = {rows[index]: opened.text(ids) for index, ids in batch.items()}
                    progress.add(turn, texts)
                    yield Update("stage", "answering", len(progress.texts), total)
    seconds = time.monotonic() - began
    task.to.parent.mkdir(parents=True, exist_ok=True)
    write_text(task.to, _formatted(task, progress))
    progress.finish()
    return Answers(task.to, len(task.questions), tokens, seconds)


def _groups(task: Task) -> Iterator[tuple[int, float, list[int]]]:
    """Yield (turn, temperature, rows): questions to answer together, always in the same order."""
    for turn in range(max(len(question.turns) for question in task.questions)):
        by_temperature: dict[float, list[int]] = {}
        for row, question in enumerate(task.questions):
            if turn < len(question.turns):
                by_temperature.setdefault(task.temperature_of(question), []).append(row)
        for temperature, rows in sorted(by_temperature.items()):
            yield turn, temperature, rows


def _with_room(
    found: Sequence[list[int] | str], answerer: Answerer
) -> tuple[list[list[int]], Counter[str]]:
    """Return the prompts, and the number of unanswerable prompts by reason.

    An item of ``found`` is a prompt's tokens, or the reason why it cannot be answered. A prompt
    that cannot be answered is returned as [].
    """
    reasons = Counter(item for item in found if isinstance(item, str))
    prompts = [[] if isinstance(item, str) else item for item in found]
    for index, ids in enumerate(prompts):
        if ids and answerer.room(ids) < 1:
            reasons[f"the prompt is longer than the model's {answerer.positions:,} positions"] += 1
            prompts[index] = []
    return prompts, reasons


class _Progress:
    """The answers so far, in memory and in the task's hidden file."""

    def __init__(self, task: Task) -> None:
        self.task, self.file = task, task.progress
        self.began = time.time()
        self.texts: dict[tuple[int, int], str] = {}
        """(row, turn) -> answer."""
        head, lines = _read_progress(self.file)
        if head.get("key") == task.key:
            self.began = head["began"]
            for line in lines:
                turn, texts = json.loads(line)
                self.texts |= {(int(row), turn): text for row, text in texts.items()}
        self.is_written = False

    def conversation(self, row: int, turn: int) -> list[Message]:
        """Return the messages of a question up to ``turn``, with the answers to earlier turns."""
        question = self.task.questions[row]
        messages = [*question.before]
        for number, text in enumerate(question.turns[: turn + 1]):
            messages.append({"role": "user", "content": text})
            if number < turn:
                messages.append({"role": "assistant", "content": self.texts[row, number]})
        return messages

    def add(self, turn: int, texts: Mapping[int, str]) -> None:
        """Add the answers of one batch, and write them to the hidden file as one line."""
        self.texts |= {(row, turn): text for row, text in texts.items()}
        with explain_write_errors(self.file, self.file):
            if not self.is_written:  # write the file again, without an incomplete last line
                self.file.parent.mkdir(parents=True, exist_ok=True)
                head = {"key": self.task.key, "began": self.began}
                write_text(self.file, json.dumps(head) + "\n" + self._lines())
                self.is_written = True
            elif texts:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([turn, texts]) + "\n")

    def finish(self) -> None:
        """Replace the answers in the hidden file by the hash of the file of answers."""
        head = {"key": self.task.key, "began": self.began, "sha256": sha256(self.task.to)}
        write_text(self.file, json.dumps(head) + "\n")

    def _lines(self) -> str:
        turns = sorted({turn for _, turn in self.texts})
        rows = [[n, {row: text for (row, t), text in self.texts.items() if t == n}] for n in turns]
        return "".join(json.dumps(row) + "\n" for row in rows)


def _formatted(task: Task, progress: _Progress) -> str:
    """Return the content of the file of answers."""
    rows = []
    for number, question in enumerate(task.questions):
        texts = [progress.texts[number, turn] for turn in range(len(question.turns))]
        rows.append(_answer_row(task, question, texts, progress.began))
    if task.grader == "alpaca_eval":
        return _to_json(rows, indent=2)
    return "".join(map(_to_json, rows))


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON and a line end. Only what has no UTF-8 form is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _answer_row(
    task: Task, question: Question, texts: Sequence[str], began: float
) -> dict[str, Any]:
    if task.grader == "alpaca_eval":
        kept = {key: question.row[key] for key in ("dataset",) if key in question.row}
        instruction = question.row["instruction"]
        return {
            "instruction": instruction,
            "output": texts[0],
            "generator": task.model_name,
            **kept,
        }
    if task.grader == "mt_bench":
        name = f"{task.model_name} {question.row['question_id']} {began}"
        return {
            "question_id": question.row["question_id"],
            "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
            "model_id": task.model_name,
            "choices": [{"index": 0, "turns": [*texts]}],
            "tstamp": began,
        }
    return {"prompt": question.row["prompt"], "response": texts[0]}
