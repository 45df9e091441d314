"""Apply the fix of every error that the data package raises.

A fix that is data is applied as a person would paste it, and so is each other setting that it
prints: the next run succeeds, goes further, or reports another error. A fix that is only words
names no setting and has no placeholder.
"""

import ast
import ctypes
import gzip
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import transformers
from conftest import byte_tokenizer

import orpo_lite.data
from orpo_lite.data import cache
from orpo_lite.data import dataset as data_dataset
from orpo_lite.data.render_process import Renderer
from orpo_lite.data.sources import hub, json_rows, lines
from orpo_lite.data.split import training_sources
from orpo_lite.errors import Command, DataError, OrpoLiteError, Overrides
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import DataSection
from orpo_lite.recipe.text import to_text

PACKAGE = Path(orpo_lite.data.__file__).parent
PLACEHOLDER = re.compile(r"\b(?:OLD|NEW|FILE|SPLIT|COLUMN|DIR|FOLDER|NAME|CONFIG)\b")
SETTING = re.compile(r"'?\bdata\.\w+=")


def json_column(text: str) -> bytes:
    """A table whose chosen column is of type JSON."""
    rows = [pair(i) for i in range(6)]
    chosen = pyarrow.array([text] * 6, pyarrow.string()).cast(pyarrow.json_())
    sink = pyarrow.BufferOutputStream()
    columns = {
        "prompt": [row["prompt"] for row in rows],
        "chosen": chosen,
        "rejected": [row["rejected"] for row in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


def places() -> dict[str, range]:
    """The calls that make an error with a fix, by module, function and number in it, with their
    lines."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and is_error(node)]
        numbers: dict[str, Iterator[int]] = {}
        for call in sorted(calls, key=lambda node: node.lineno):
            inside = [
                node for node in functions if node.lineno <= call.lineno <= (node.end_lineno or 0)
            ]
            name = (
                f"{file.relative_to(PACKAGE).with_suffix('')}:{inside[-1].name if inside else ''}"
            )
            number = next(numbers.setdefault(name, itertools.count(1)))
            found[f"{name}#{number}"] = range(call.lineno, (call.end_lineno or 0) + 1)
    return found


def is_error(call: ast.Call) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name.endswith("Error") and any(keyword.arg == "fix" for keyword in call.keywords)


# --- the sets, each with a fault of its own

PAIR = {"prompt": "Name a colour.", "chosen": "It is blue.", "rejected": "Seven, of course."}
PLAIN = "data.chat_template=none"


def pair(i: int, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": f"Name a colour, {i}.",
        "chosen": f"It is blue {i}.",
        "rejected": f"Seven, {i}.",
    } | fields


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def many(count: int = 6, **fields: Any) -> str:
    return jsonl(*(pair(i) | fields for i in range(count)))


def under(**fields: Callable[[int], Any] | Any) -> str:
    """Rows of these columns alone."""
    return jsonl(*({k: v(i) if callable(v) else v for k, v in fields.items()} for i in range(6)))


BLUE = {"chosen": lambda i: f"It is blue {i}.", "rejected": lambda i: f"Seven, {i}."}
ANSWERS = {
    "prompt": lambda i: f"Why {i}?",
    "answer_1": lambda i: f"It is blue {i}.",
    "answer_2": lambda i: f"No, {i}.",
}
CSV = "prompt,chosen,rejected\n" + "".join(f"Why {i}?,It is so {i}.,No {i}.\n" for i in range(6))
LONG = {"prompt": "why " * 60}

TEMPLATE, FILE = "only the person can write another template", "only the person has another file"
ROW, COLUMN = (
    "only the person knows what the row should say",
    "what the column holds has to be written otherwise",
)
ELSEWHERE = ("git lfs ", "hf ")  # commands that need a network

Files = Mapping[str, str | bytes]
CASES: dict[str, tuple[Files, list[str]]] = {
    # sources
    "array a line": ({"a.jsonl": '["A?","b","c"]\n["D?","e","f"]\n["G?","h","i"]\n'}, []),
    "a text file": ({"a.txt": CSV}, ["data.dataset_name=a.txt"]),
    "a broken line": ({"a.jsonl": many() + '{"prompt": \n'}, []),
    "an object over lines": (
        {"a.jsonl": "".join(json.dumps(pair(i), indent=1) + "\n" for i in range(6))},
        [],
    ),
    "a key twice": ({"a.jsonl": many() + '{"prompt": "a", "prompt": "b"}\n'}, []),
    "no object": ({"a.jsonl": many() + "3\n"}, []),
    "over the cap": (
        {"a.json": json.dumps([pair(i) for i in range(40)])},
        ["data.dataset_name=a.json"],
    ),
    "cut cells": (
        {
            "a.json": json.dumps(
                {
                    "features": [],
                    "rows": [
                        {"row_idx": i, "row": pair(i), "truncated_cells": ["chosen"]}
                        for i in range(6)
                    ],
                }
            )
        },
        ["data.dataset_name=a.json"],
    ),
    "several lists": (
        {"a.json": json.dumps({"good": [pair(0)] * 4, "more": [pair(1)] * 4})},
        ["data.dataset_name=a.json"],
    ),
    "a quote in a csv": ({"a.csv": CSV + 'q,"a"b,c\n'}, ["data.dataset_name=a.csv"]),
    "cells without a header": ({"a.csv": "prompt,,rejected\n" + CSV}, ["data.dataset_name=a.csv"]),
    "two columns of a name": (
        {"a.csv": CSV.replace("chosen", "prompt", 1)},
        ["data.dataset_name=a.csv"],
    ),
    "spaced quotes": ({"a.csv": CSV + 'q, "a,b", c\n'}, ["data.dataset_name=a.csv"]),
    "too few cells": ({"a.csv": CSV + "q,a\n"}, ["data.dataset_name=a.csv"]),
    "a cell without a name": (
        {"a.csv": CSV.replace("\n", ",\n") + "q,a,b,c\n"},
        ["data.dataset_name=a.csv"],
    ),
    "another encoding": (
        {"a.csv": CSV.replace("so", "söß").encode("cp1252")},
        ["data.dataset_name=a.csv"],
    ),
    "UTF-16": ({"a.csv": CSV.encode("utf-16")}, ["data.dataset_name=a.csv"]),
    "a pointer": ({"a.jsonl": "version https://git-lfs.github.com/spec/v1\noid"}, []),
    "a zip": ({"a.csv": b"PK\x03\x04" + bytes(40)}, ["data.dataset_name=a.csv"]),
    "half a gzip": (
        {"a.csv.gz": gzip.compress(CSV.encode())[:-20]},
        ["data.dataset_name=a.csv.gz"],
    ),
    "ends of a Mac": ({"a.csv": CSV.replace("\n", "\r")}, ["data.dataset_name=a.csv"]),
    "a long line": ({"a.jsonl": many(2) + 4 * ('{"a": "' + "x" * 5000 + '"}\n')}, []),
    "half a table": ({"a.parquet": b"PAR1" + bytes(20)}, ["data.dataset_name=a.parquet"]),
    "broken JSON in a table": ({"a.parquet": json_column("{")}, ["data.dataset_name=a.parquet"]),
    "several splits of the hub": ({}, ["data.dataset_name=org/several"]),
    "no such split of the hub": (
        {},
        ["data.dataset_name=org/several", "data.dataset_train_split=three"],
    ),
    "no such set of the hub": ({}, ["data.dataset_name=org/none"]),
    "a spreadsheet": ({"a.xlsx": b"PK\x03\x04"}, ["data.dataset_name=a.xlsx"]),
    "no such file": ({"a.jsonl": many()}, ["data.dataset_name=./b.jsonl"]),
    "one of two files": ({"b.jsonl": many()}, ["data.dataset_name=./a.json,./b.jsonl"]),
    "no such file to hold out": (
        {"a.jsonl": many(), "held.jsonl": many(2)},
        ["data.dataset_test_split=./helt.jsonl"],
    ),
    "an empty folder": ({"f/README.md": ""}, ["data.dataset_name=f"]),
    "half a saved set": (
        {"f/state.json": '{"_data_files": [{"filename": "x.arrow"}]}'},
        ["data.dataset_name=f"],
    ),
    "a pattern of nothing": ({"a.jsonl": many()}, ["data.dataset_name=*.csv"]),
    "no such split": (
        {"f/train.jsonl": many(), "f/test.jsonl": many(2)},
        ["data.dataset_name=f", "data.dataset_train_split=valid"],
    ),
    "one name in two kinds": ({"f/a.jsonl": many(), "f/a.csv": CSV}, ["data.dataset_name=f"]),
    "a file twice": ({"a.jsonl": many()}, ["data.dataset_name=a.jsonl,./a.jsonl"]),
    # splits
    "a split of a file": ({"a.jsonl": many()}, ["data.dataset_train_split=valid"]),
    "held out as well": (
        {"a.jsonl": many(), "b.jsonl": many(2)},
        ["data.dataset_name=*.jsonl", "data.dataset_test_split=./b.jsonl"],
    ),
    "a held-out split of a file": ({"a.jsonl": many()}, ["data.dataset_test_split=test"]),
    "a prompt alone": ({"a.jsonl": jsonl(PAIR, PAIR | {"chosen": "Red."})}, []),
    "few after drops": ({"a.jsonl": jsonl(PAIR, PAIR | {"chosen": ""})}, []),
    # formats
    "a map turned round": (
        {"a.jsonl": under(ask=lambda i: f"Why {i}?", **BLUE)},
        ["data.column_map=ask=prompt"],
    ),
    "an unknown column": (
        {"a.jsonl": under(ask=lambda i: f"Why {i}?", **BLUE)},
        ["data.column_map=prompt=aks"],
    ),
    "a column like none": ({"a.jsonl": many()}, ["data.column_map=prompt=zzz"]),
    "a templated prompt": (
        {"a.jsonl": under(prompt=lambda i: f"[INST] Why {i}? [/INST]", **BLUE)},
        [],
    ),
    "two prompts": ({"a.jsonl": many(question="Which number?")}, []),
    "earlier turns as text": ({"a.jsonl": many(history="<|user|>\nHi")}, []),
    "the prompt again": (
        {
            "a.jsonl": many(3)
            + jsonl(
                *(
                    pair(
                        i, chosen=f"Name a colour, {i}. Blue.", rejected=f"Name a colour, {i}. Red."
                    )
                    for i in range(3)
                )
            )
        },
        [],
    ),
    "a conversation and a prompt": (
        {"a.jsonl": many(messages=[user("Hi"), bot("Hello."), user("Another?")])},
        [],
    ),
    "a tool call": (
        {
            "a.jsonl": under(
                **{
                    side: [
                        user("q"),
                        {"role": "assistant", "content": "", "tool_calls": [1]},
                        bot(side),
                    ]
                    for side in ("chosen", "rejected")
                }
            )
        },
        [],
    ),
    "a tool's turn": (
        {
            "a.jsonl": under(
                **{
                    side: [user("q"), {"role": "tool", "content": "x"}, bot(side)]
                    for side in ("chosen", "rejected")
                }
            )
        },
        [],
    ),
    "no scores": (
        {
            "a.jsonl": under(
                prompt=lambda i: f"Why {i}?", responses=["Blue one.", "Red one."], numbers=[2, 1]
            )
        },
        [],
    ),
    "no sides": (
        {
            "a.jsonl": under(
                prompt=lambda i: f"Why {i}?",
                best=lambda i: f"It is {i}.",
                other=lambda i: f"No {i}.",
            )
        },
        [],
    ),
    "no prompt": ({"a.jsonl": under(ask=lambda i: f"Why {i}?", **BLUE)}, []),
    "lists in texts": (
        {
            "a.jsonl": under(
                prompt=lambda i: f"Why {i}?", chosen='["a b", "c"]', rejected='["d", "e"]'
            )
        },
        [],
    ),
    "NumPy's lists": (
        {
            "a.jsonl": under(
                prompt=lambda i: f"Why {i}?", chosen="array(['a'])", rejected="array(['b'])"
            )
        },
        [],
    ),
    "ranks from 0": (
        {
            "a.jsonl": under(
                prompt=lambda i: f"Why {i}?", responses=["Blue one.", "Red one."], ranking=[0, 1]
            )
        },
        [],
    ),
    "a map of another kind": ({"a.jsonl": many(n=3)}, ["data.column_map=history=n"]),
    "a number for a text": (
        {"a.jsonl": many(3) + jsonl(*(pair(i, chosen=3) for i in range(4)), *map(pair, range(9)))},
        [],
    ),
    "JSON for messages": (
        {
            "a.jsonl": under(
                prompt=lambda i: f"Why {i}?",
                chosen='{"role": "nurse", "content": 1}',
                rejected='{"role": "nurse", "content": 2}',
            )
        },
        [],
    ),
    "a system that is a list": ({"a.jsonl": many(system=["Be", "brief."])}, []),
    "a prompt that is not there": (
        {
            "a.jsonl": under(
                prompt="Be brief.",
                **{side: [user("Why?"), bot(side)] for side in ("chosen", "rejected")},
            )
        },
        [],
    ),
    "earlier turns beside": ({"a.jsonl": many(conversation=[user("Hi"), bot("Hello.")])}, []),
    "labels for replies": (
        {"a.jsonl": under(**ANSWERS, chosen="answer_1", rejected="answer_2")},
        [],
    ),
    "unclear verdicts": ({"a.jsonl": under(**ANSWERS, winner="x")}, []),
    "no verdict": ({"a.jsonl": under(**ANSWERS, vote=lambda i: str(i % 2 + 1))}, []),
    "two pairs of answers": (
        {"a.jsonl": under(**ANSWERS, reply_1="Blue one.", reply_2="Red one.", winner="1")},
        [],
    ),
    "strengths": ({"a.jsonl": under(**ANSWERS, preference_strength=lambda i: i % 2 + 1)}, []),
    # pairs
    "all left out": ({"a.jsonl": many(chosen="")}, []),
    "all too long": (
        {"a.jsonl": many(**LONG)},
        ["data.max_length=64", "data.max_prompt_length=32"],
    ),
    "special tokens": ({"a.jsonl": many(chosen="a </s> b")}, []),
    "no such row": ({"a.jsonl": many()}, ["--row", "b.jsonl:3"]),
    "rows that end alike": (
        {"f/a/x.jsonl": many(), "f/b/x.jsonl": many()},
        ["data.dataset_name=f", "--row", "x.jsonl:1"],
    ),
    "no rows": ({"a.jsonl": ""}, []),
    "another format": ({"a.jsonl": many()}, ["data.format=ranked"]),
    "files of two kinds": (
        {
            "f/a.jsonl": many(),
            "f/b.jsonl": under(
                prompt="Why?",
                completions=[{"response": "Blue.", "score": 2}, {"response": "Red.", "score": 1}],
            ),
        },
        ["data.dataset_name=f"],
    ),
    "a column comes late": ({"a.jsonl": many(120) + jsonl(pair(0, context="A long text"))}, []),
    "a format changes late": (
        {
            "a.jsonl": jsonl(
                *(
                    {side: [user(f"q {i}"), bot(side)] for side in ("chosen", "rejected")}
                    for i in range(120)
                ),
                {
                    "prompt": [user("Hi"), bot("Hello."), user("q")],
                    **{side: [bot(side)] for side in ("chosen", "rejected")},
                },
            )
        },
        [],
    ),
    "a map of another set": (
        {
            "a.jsonl": under(
                prompt=lambda i: f"Why {i}?", good=lambda i: f"It is {i}.", bad=lambda i: f"No {i}."
            ),
            "b.jsonl": many(good="Other text."),
        },
        ["data.dataset_name=a.jsonl,b.jsonl", "data.column_map=chosen=good,rejected=bad"],
    ),
    # templates and tokens
    "a setting of ours": ({"a.jsonl": many()}, ['data.chat_template_kwargs={"messages": 1}']),
    "no template file": ({"a.jsonl": many()}, ["data.chat_template=t.jinja"]),
    "a template without replies": (
        {"a.jsonl": many(), "t.jinja": "{{ messages[0].content }}"},
        ["data.chat_template=t.jinja"],
    ),
    "a template that raises": (
        {"a.jsonl": many(), "t.jinja": "{{ raise_exception('no') }}"},
        ["data.chat_template=t.jinja"],
    ),
    "a template that loses turns": (
        {
            "a.jsonl": jsonl(
                *(
                    {
                        side: [user("Why?"), *[bot("Because."), user("So?")] * (i % 2), bot(side)]
                        for side in ("chosen", "rejected")
                    }
                    for i in range(12)
                )
            ),
            "t.jinja": "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ "
            "m.content }}{% endif %}"
            "{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}",
        },
        ["data.chat_template=t.jinja"],
    ),
    "templates late": (
        {
            "a.jsonl": many(120)
            + jsonl(*(pair(i, prompt=f"[INST] Why {i}? [/INST]") for i in range(30)))
        },
        [],
    ),
    "conversations without a template": (
        {"a.jsonl": under(**{side: [user("q"), bot(side)] for side in ("chosen", "rejected")})},
        [PLAIN],
    ),
}


# Places that have no setting or command to name, and why.
WORDS = {
    "chat_template:pair_texts#1": TEMPLATE,
    "chat_template:render#1": TEMPLATE,
    "formats/readers:_messages#1": ROW,
    "formats/refuse:refuse_mapped#1": COLUMN,
    "formats/refuse:refuse_python#1": COLUMN,
    "formats/text:row_error#1": ROW,
    "formats/verdicts:_refuse_values#1": COLUMN,
    "dataset:_templated#1": COLUMN,
    "formats/unused_columns:_refuse_wrong_types#1": COLUMN,
    "pairs:_pairs#1": FILE,
    "pairs:find#1": "an option of the command, with a real place",
    "pairs:_no_row#1": "an option of the command, with a real place",
    "sources/arrow_rows:arrow_rows#1": ROW,
    "sources/arrow_rows:arrow_table#1": FILE,
    "sources/csv_rows:_records#1": ROW,
    "sources/csv_rows:_header#1": COLUMN,
    "sources/csv_rows:csv_rows#1": ROW,
    "sources/csv_rows:csv_rows#2": ROW,
    "sources/csv_rows:refuse_same_names#1": COLUMN,
    "sources/files:read_file#1": FILE,
    "sources/json_rows:_json_error#1": ROW,
    "sources/json_rows:_objects#1": ROW,
    "sources/json_rows:_without_viewer_wrapper#1": FILE,
    "sources/lines:lines#1": ROW,
    "sources/local:_find_data_files#1": FILE,
    "sources/local:_match_pattern#1": FILE,
    "sources/local:_saved_files#1": FILE,
    "sources/local:_unknown_suffix#1": FILE,
}

Raised = list[tuple[str, OrpoLiteError]]  # with the place
Run = Callable[..., tuple[int, Raised]]
Words = Generator[list[str], None, None]


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Raised:
    """The errors that the data package makes, in order, suppressed ones among them."""
    errors: Raised = []
    known, made = places(), OrpoLiteError.__init__

    def record(error: OrpoLiteError, **parts: str) -> None:
        made(error, **parts)
        frame = sys._getframe(1)
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents:
            module = file.relative_to(PACKAGE).with_suffix("").as_posix()
            names = (
                name
                for name, at in known.items()
                if name.startswith(f"{module}:") and frame.f_lineno in at
            )
            errors.extend((name, error) for name in names)

    monkeypatch.setattr(OrpoLiteError, "__init__", record)
    monkeypatch.setattr(
        data_dataset, "LimitedRenderer", Renderer
    )  # in this process, to see who raises
    return errors


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of the hub with two splits, neither of which is train."""

    def load(name: str, _config: str | None, split: str) -> datasets.Dataset:
        if split not in ("one", "two"):
            raise ValueError(f"Unknown split {split!r}. Should be one of ['one', 'two'].")
        if name == "org/none":
            raise ConnectionError("Couldn't reach it")
        return datasets.Dataset.from_list([pair(i) for i in range(6)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _name, _config: ["one", "two"])
    monkeypatch.setattr(hub, "_unreachable", lambda _name: "")


@pytest.fixture
def run_data(call: Callable[..., Any], raised: Raised) -> Run:
    """Runs ``orpo-lite data``: its exit code, and the errors that it ends with, by what they say
    and by their fix."""

    def run(*words: str) -> tuple[int, Raised]:
        raised.clear()
        code, _, said = call(
            "data", "--recipe", "./small.yaml", "data.dataset_name=a.jsonl", *words
        )
        assert code in (0, 2, 3, 4, 6, 8), said
        return code, [
            (place, error)
            for place, error in raised
            if code and error.found in said and error.fix in said
        ]

    return run


@pytest.mark.usefixtures("a_hub")
def test_every_fix_is_applied(
    small_recipe: Callable[..., Any],
    workspace: Path,
    run_data: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 4096)
    monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 2048)
    small_recipe()
    kept, reached, with_data = {*workspace.iterdir()}, set(), set()
    for case, (files, words) in CASES.items():
        for name, content in files.items():
            (workspace / name).parent.mkdir(exist_ok=True, parents=True)
            (workspace / name).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        _, found = run_data(*words)
        assert found, f"{case}: nothing is wrong"
        reached |= {place for place, _ in found}
        with_data |= {place for place, error in found if isinstance(error.fix, Overrides | Command)}
        for place, error in {str(error.fix): (place, error) for place, error in found}.values():
            for more in settings(error.fix, workspace):
                again = [(name, other.found) for name, other in run_data(*words, *more)[1]]
                assert (place, error.found) not in again, (
                    f"{case}: the fix leads back to it: {more}"
                )
        for path in {*workspace.iterdir()} - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert reached | BY_HAND.keys() == places().keys()
    assert reached - with_data == WORDS.keys()
    assert not reached & BY_HAND.keys()


# --- faults of the tokenizer, of the disk and of permissions: the fix is words, and the case does
# what they say


def changed_tokenizer(workspace: Path, **values: Any) -> None:
    file = workspace / "base" / "tokenizer_config.json"
    kept = {
        name: value
        for name, value in json.loads(file.read_text("utf-8")).items()
        if name not in values
    }
    file.write_text(
        json.dumps(kept | {name: value for name, value in values.items() if value}),
        encoding="utf-8",
    )


def no_eos(workspace: Path, _patch: pytest.MonkeyPatch) -> Words:
    changed_tokenizer(workspace, eos_token=None)
    yield []
    changed_tokenizer(workspace, eos_token="</s>")
    yield []


def no_default_template(workspace: Path, _patch: pytest.MonkeyPatch) -> Words:
    changed_tokenizer(workspace, chat_template=[{"name": "rag", "template": "{{ messages }}"}])
    yield []
    (workspace / "own.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    yield ["data.chat_template=own.jinja"]


def slow_tokenizer(workspace: Path, _patch: pytest.MonkeyPatch) -> Words:
    for file in (workspace / "base").glob("tokenizer*"):
        file.unlink()
    transformers.ByT5Tokenizer().save_pretrained(workspace / "base")
    yield []
    byte_tokenizer().backend_tokenizer.save(str(workspace / "base" / "tokenizer.json"))
    yield []


def full_disk(_workspace: Path, _patch: pytest.MonkeyPatch) -> Words:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # no file can be longer
    try:
        yield []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    yield []


def broken_disk(_workspace: Path, patch: pytest.MonkeyPatch) -> Words:
    """A disk that loses what was written cannot be had: the file of the tokens is cut behind the
    back of the writer."""
    close = cache.Writer.close

    def close_and_cut(writer: cache.Writer, facts: Any) -> None:
        close(writer, facts)
        for file in writer.folder.glob("ids*"):
            os.truncate(file, file.stat().st_size - 1)

    with patch.context() as broken:
        broken.setattr(cache.Writer, "close", close_and_cut)
        yield []
    yield []


def unreadable_file(workspace: Path, _patch: pytest.MonkeyPatch) -> Words:
    (workspace / "a.jsonl").chmod(0)
    with permissions_obeyed():
        yield []
        (workspace / "a.jsonl").chmod(0o600)
        yield []


@contextmanager
def permissions_obeyed() -> Iterator[None]:
    """Take from the superuser, while this lasts, the right to read what permissions refuse."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(
        before[0] & ~0b110, *before[1:]
    )  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


BY_HAND: dict[str, tuple[str, Callable[[Path, pytest.MonkeyPatch], Words]]] = {
    "chat_template:eos_id#1": ("set eos_token in tokenizer_config.json", no_eos),
    "chat_template:_own_template#1": (
        "set data.chat_template to a file",
        no_default_template,
    ),
    "dataset:tokenized#1": ("free some space", full_disk),
    "dataset:tokenized#2": ("try again", broken_disk),
    "sources/source:report_unreadable#1": ("check its owner and permissions", unreadable_file),
    "tokenize:tokenize_pairs#1": ("add a tokenizer.json", slow_tokenizer),
}
"""The place, how its fix begins, and what makes the fault and then, when it is asked again, does
what the fix says."""


@pytest.mark.parametrize("place", BY_HAND)
@pytest.mark.usefixtures("token_cache")
def test_a_fix_by_hand_is_applied(
    small_recipe: Callable[..., Any],
    workspace: Path,
    run_data: Run,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    small_recipe()
    (workspace / "a.jsonl").write_text(many())
    fix, steps = BY_HAND[place]
    with closing(steps(workspace, monkeypatch)) as words:
        _, found = run_data(*next(words))
        assert [name for name, error in found if error.fix.startswith(fix)] == [place]
        assert run_data(*next(words)) == (0, [])


def settings(fix: str, workspace: Path) -> list[list[str]]:
    """What to add to the command, for each way that a fix names: its data first; a line for the
    shell is run."""
    assert fix
    assert not PLACEHOLDER.search(fix), fix
    pasted = [first_word(fix[match.start() :]) for match in SETTING.finditer(fix)]
    if isinstance(fix, Command):
        if fix.line.startswith(ELSEWHERE):
            return []
        subprocess.run(["bash", "-c", fix.line], cwd=workspace, check=True)
        return [[word] for word in pasted]
    if not isinstance(fix, Overrides):
        assert not pasted, f"a setting in words: {fix}"
        return []
    together = pasted[: len(fix.values)]
    told = load_recipe("demo", [f"{key}={to_text(value)}" for key, value in fix.values.items()])
    assert load_recipe("demo", together).data == told.data, (
        f"what is printed is not what is meant: {fix}"
    )
    return [together, *([word] for word in pasted[len(together) :])]


def first_word(text: str) -> str:
    """The first word as a shell reads it, without the marks of the sentence behind it."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.commenters = True, ""
    return (words.get_token() or "").rstrip(",;?")


def test_a_fix_for_one_of_several_names_keeps_the_others(workspace: Path) -> None:
    (workspace / "more.jsonl").write_text(many())
    with pytest.raises(DataError, match="no such file") as error:
        training_sources(DataSection(dataset_name=["pair.jsonl", "more.jsonl"]))
    assert isinstance(error.value.fix, Overrides)
    assert error.value.fix.values == {"data.dataset_name": ["pairs.jsonl", "more.jsonl"]}
