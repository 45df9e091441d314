"""E8: answers to the prompts of AlpacaEval, MT-Bench and IFEval, read as the graders read them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paper.check import Check
from benchmarks.paper.study import MAIN, Study, read_lines
from orpo_lite import generate
from orpo_lite.errors import DataError

PROMPTS = 4
Rows = list[dict[str, Any]]


def read_alpaca(answers: Path, prompts: Rows, published: Rows) -> list[bool]:
    """Return whether each answer is read back: a JSON list in the order of the instructions."""
    rows = json.loads(answers.read_text("utf-8"))
    needed = {"instruction", "output", "generator"}
    return [
        needed <= row.keys() <= published[0].keys()
        and row["instruction"] == prompt["instruction"]
        and all(isinstance(row[key], str) for key in needed)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def read_mt_bench(answers: Path, prompts: Rows, published: Rows) -> list[bool]:
    """Return whether each answer is read back: one line for each question, with all its turns."""
    known = {row["question_id"]: row for row in read_lines(answers)}
    right = []
    for prompt in prompts:
        row, like = known[prompt["question_id"]], published[0]
        (choice,) = row["choices"]
        right.append(
            row.keys() == like.keys()
            and choice.keys() == like["choices"][0].keys()
            and len(choice["turns"]) == len(prompt["turns"])
            and all(isinstance(turn, str) for turn in choice["turns"])
            and isinstance(row["tstamp"], type(like["tstamp"]))
        )
    return right


def read_ifeval(answers: Path, prompts: Rows, _: Rows) -> list[bool]:
    """Return whether each answer is found by the exact text of its prompt."""
    known = {row["prompt"]: row["response"] for row in read_lines(answers)}
    return [isinstance(known.get(prompt["prompt"]), str) for prompt in prompts]


PUBLISHED = "orpo-paper-outputs"
FORMATS: dict[str, tuple[str, str, str, Callable[[Path, Rows, Rows], list[bool]]]] = {
    "alpaca_eval": (
        "AlpacaEval",
        f"{PUBLISHED}/alpacaeval-Mistral-ORPO-beta.json",
        f"{PUBLISHED}/alpacaeval-Mistral-ORPO-beta.json",
        read_alpaca,
    ),
    "mt_bench": (
        "MT-Bench",
        "mt-bench-question.jsonl",
        f"{PUBLISHED}/mtbench-Mistral-ORPO-beta.jsonl",
        read_mt_bench,
    ),
    "ifeval": ("IFEval", "ifeval-input.jsonl", "ifeval-input.jsonl", read_ifeval),
}
"""Grader -> its title, its prompts, answers that the authors published, and how they are read.

The instructions of AlpacaEval are taken from published answers, which repeat them. No answers for
IFEval are published; its prompts are named instead."""


def check(study: Study) -> list[Check]:
    """Return a check for each grader: the share of answers that are read back."""
    study.run("orpo-1", study.seeds[0])
    run = study.path(MAIN, "orpo-1", study.seeds[0])
    checks = []
    for grader, (title, file, published, read) in FORMATS.items():
        rows = _read(study.data / file)
        prompts = [
            {"instruction": row["instruction"]} if grader == "alpaca_eval" else row
            for row in rows[:: len(rows) // PROMPTS][:PROMPTS]
        ]
        asked = study.folder / "prompts" / f"{grader}.jsonl"
        asked.parent.mkdir(parents=True, exist_ok=True)
        asked.write_text("".join(json.dumps(row) + "\n" for row in prompts), "utf-8")
        answers = generate(run, asked, grader=grader, max_new_tokens=16).file
        right = read(answers, prompts, _read(study.data / published))
        checks.append(
            Check(
                f"{title}: share of {len(right)} answers that are read back",
                "answers",
                sum(right) / len(right),
                minimum=1.0,
                maximum=1.0,
            )
        )
    return checks


def _read(file: Path) -> Rows:
    if not file.is_file():
        raise DataError(
            where=f"--data {file.parent}",
            found=f"has no file {file.name}",
            expected="the prompts of the graders",
            fix="--data FOLDER",
        )
    rows: Rows = json.loads(file.read_text("utf-8")) if file.suffix == ".json" else read_lines(file)
    return rows
