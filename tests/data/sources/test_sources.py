"""Rows out of files, folders, patterns and hub sets: what is read, what is chosen, and where a
fault is said to be."""

import bz2
import csv
import gzip
import json
import logging
import lzma
import os
import random
import shlex
import shutil
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from orpo_lite.data.pair import RowError
from orpo_lite.data.sources import json_rows as sources_json_rows
from orpo_lite.data.sources import lines as sources_lines
from orpo_lite.data.sources.find import find_source
from orpo_lite.data.sources.hub import load_hub_dataset
from orpo_lite.data.sources.lines import PlacedRow
from orpo_lite.data.sources.source import (
    TEST_SPLIT,
    Source,
    choose_split,
    dataset_name_setting,
    is_local,
    is_path,
    split_of,
)
from orpo_lite.errors import Command, DataError, HubError, OrpoLiteError, raise_all
from orpo_lite.recipe.reader import load_recipe

ROW = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}
LINE = json.dumps(ROW).encode()
QUICK = settings(
    max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def some_rows(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {i}?", "chosen": f"{i}", "rejected": f'"no",\n{i}'}
        for i in range(count)
    ]


def to_jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_csv(rows: list[Any], delimiter: str = ",", **options: Any) -> str:
    text = StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(compressed(data, path.suffix))
    return path


def source(path: Path | str, split: str = "auto") -> Source:
    return find_source(str(path), split, None)


def places(path: Path | str, split: str = "auto") -> list[PlacedRow]:
    """Every row; the faults, if any, are raised."""
    faults: list[DataError] = []
    found = list(source(path, split).rows(faults))
    raise_all(faults)
    return found


def wheres(path: Path | str, split: str = "auto") -> list[str]:
    return [where for where, _ in places(path, split)]


def rows_of(path: Path | str, split: str = "auto") -> list[Any]:
    return [row for _, row in places(path, split)]


def fault(read: Callable[..., Any], *arguments: Any, kind: type[OrpoLiteError] = DataError) -> str:
    """The text of an error that says all three: the place, what was expected, and what to do."""
    with pytest.raises(kind) as raised:
        read(*arguments)
    text = str(raised.value)
    assert raised.value.where or "faults:" in text
    assert "expected: " in text
    assert "fix: " in text
    return text


# --- every kind holds the same rows

KINDS: dict[str, Callable[[list[Any]], str | bytes]] = {
    "a.jsonl": to_jsonl,
    "b.json": lambda rows: json.dumps(rows, indent=1),
    "c.json": to_jsonl,
    "d.json": lambda rows: json.dumps({"version": 1, "data": rows}),
    "e.json": lambda rows: json.dumps({"data": rows, "about": {"by": "us"}}, indent=1),
    "f.csv": to_csv,
    "g.csv": lambda rows: to_csv(rows, ";", lineterminator="\n", quoting=csv.QUOTE_ALL),
    "h.csv": lambda rows: to_csv(rows, "|"),
    "i.csv": lambda rows: to_csv(rows, "\t"),
    "k.tsv": lambda rows: to_csv(rows, "\t"),
    "l.jsonl": lambda rows: to_jsonl(rows).replace("\n", "\r\n"),
    "n.jsonl.gz": to_jsonl,
    "o.json.gz": lambda rows: json.dumps(rows),
    "p.csv.gz": to_csv,
    "q.csv": lambda rows: "\ufeff" + to_csv(rows),
    "r.JSONL": lambda rows: "\ufeff" + to_jsonl(rows),
    "s.json": lambda rows: "\ufeff\n " + json.dumps(rows, ensure_ascii=False),
    "t.parquet": lambda rows: to_parquet(rows),
    "u.arrow": lambda rows: to_arrow(rows, pyarrow.ipc.new_stream),
    "v.feather": lambda rows: to_arrow(rows, pyarrow.ipc.new_file),
    "w.ndjson.xz": to_jsonl,
    "x.txt.bz2": to_jsonl,
    "y.tsv.zst": lambda rows: to_csv(rows, "\t"),
    "z.jsonl": lambda rows: json.dumps(rows),
    "aa.json": lambda rows: json.dumps({name: [row[name] for row in rows] for name in rows[0]}),
    "ab.json": lambda rows: json.dumps(
        {
            "features": [{"name": name} for name in rows[0]],
            "rows": [viewer_row(row) for row in rows],
        }
    ),
}


def viewer_row(row: Any, cut: Sequence[str] = ()) -> dict[str, Any]:
    return {"row_idx": 0, "row": row, "truncated_cells": [*cut]}


def to_arrow(rows: list[Any], writer: Any) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    with writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=3)
    return bytes(sink.getvalue())


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as out:
            out.write(data)
        return bytes(sink.getvalue())
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": lambda data: gzip.compress(data, 1, mtime=0),
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    return packers.get(suffix, bytes)(data)


def to_parquet(rows: list[Any], group: int = 3) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=group)
    return bytes(sink.getvalue())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.lists(
    st.sampled_from(
        [
            "\n",
            "\r",
            "\r\n",
            '"',
            ",",
            ";",
            "\t",
            "|",
            "\u2028",
            "\ufeff",
            "🦜",
            "é",
            "a",
            " ",
            "\\",
        ]
    )
).map("".join)
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(ROW, TEXT)), min_size=1, max_size=6)


DELIMITERS = dict.fromkeys(("f.csv", "p.csv.gz", "q.csv"), ",") | {"g.csv": ";", "h.csv": "|"}
DELIMITERS |= dict.fromkeys(("i.csv", "k.tsv", "y.tsv.zst"), "\t")


def is_ambiguous(rows: list[Any], delimiter: str | None) -> bool:
    """Whether the lines of some text look like rows of the table: what is made of these is another
    test's."""
    texts = ["".join(row.values()) for row in rows]
    over_lines = [
        text.count(delimiter) == 2 * text.count("\n")
        for text in texts
        if delimiter and "\n" in text
    ]
    return any(over_lines)


@pytest.mark.parametrize("name", KINDS)
@given(rows=ROWS)
@example(rows=some_rows(7))
@example(rows=[{"prompt": "\r", "chosen": "a\n\ufeffb", "rejected": "\ufeff\u2028\x00"}])
@example(rows=[{"prompt": "", "chosen": ";\n\n;", "rejected": ""}])
@settings(parent=QUICK, max_examples=40)
def test_every_kind_reads_back_equal(tmp_path: Path, name: str, rows: list[Any]) -> None:
    assume(not is_ambiguous(rows, DELIMITERS.get(name)))
    assert rows_of(write(tmp_path / name, KINDS[name](rows))) == rows


def test_the_places(tmp_path: Path) -> None:
    rows = some_rows(7)
    found = {name: wheres(write(tmp_path / name, make(rows)))[4] for name, make in KINDS.items()}
    # A csv row takes two lines here, for a cell holds a line break.
    lines = {
        "a.jsonl": 5,
        "c.json": 5,
        "f.csv": 10,
        "g.csv": 10,
        "h.csv": 10,
        "i.csv": 10,
        "k.tsv": 10,
        "l.jsonl": 5,
    }
    lines |= {"n.jsonl.gz": 5, "p.csv.gz": 10, "q.csv": 10, "r.JSONL": 5}
    lines |= {"w.ndjson.xz": 5, "x.txt.bz2": 5, "y.tsv.zst": 10}
    assert found == {
        name: f"{name}:{lines[name]}" if name in lines else f"{name}[4]" for name in KINDS
    }


def test_what_parquet_holds(tmp_path: Path) -> None:
    rows = [
        {"chosen": [{"role": "user", "content": f"{i}"}], "score": None if i % 2 else 1.5}
        for i in range(3000)
    ]
    path = write(tmp_path / "table.parquet", to_parquet(rows, group=1000))
    assert places(path) == [(f"table.parquet[{i}]", row) for i, row in enumerate(rows)]


def test_json_and_maps_in_tables(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": 'a "b"'}, None]
    values = [[42, {"x": turn}], [{"a": [1]}, None], None]
    texts = [
        value and [json.dumps(item) if item is not None else None for item in value]
        for value in values
    ]
    stored = pyarrow.array(texts, pyarrow.list_(pyarrow.string()))
    inner = pyarrow.array(stored.values.to_pylist(), pyarrow.json_())
    lists = pyarrow.ListArray.from_arrays(stored.offsets, inner, mask=stored.is_null())
    roles = (pyarrow.array(["role"]), pyarrow.array(["1"], pyarrow.json_()))
    table = pyarrow.table(
        {
            "reply": pyarrow.array(['"It is \\"3\\""', "7", None], pyarrow.json_()),
            "lists": lists,
            "inside": pyarrow.StructArray.from_arrays(
                [lists, pyarrow.array(["1", "2", "3"])], ["json", "text"]
            ),
            "map": pyarrow.MapArray.from_arrays([0, 1, 1, 1], *roles),
            "plain": pyarrow.array(['"q"', "a", "a"], pyarrow.large_string()).dictionary_encode(),
            "view": pyarrow.array(['"q"', "a", None], pyarrow.string_view()),
        }
    )
    expected = [
        {
            "reply": reply,
            "lists": inner,
            "inside": {"json": inner, "text": str(i + 1)},
            "map": mapped,
            "plain": plain,
            "view": view,
        }
        for i, (reply, inner, mapped, plain, view) in enumerate(
            zip(
                ['It is "3"', 7, None],
                values,
                [{"role": 1}, {}, {}],
                ['"q"', "a", "a"],
                ['"q"', "a", None],
                strict=True,
            )
        )
    ]
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(
        table, tmp_path / "b.csv", store_schema=False
    )  # as DuckDB does, and by a wrong name
    with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as out:
        out.write_table(table)
    for name in ("a.parquet", "b.csv", "c.arrow"):
        assert rows_of(tmp_path / name) == expected


def test_json_is_read_as_datasets_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"chosen": reply, "turns": [{"a": 1}, {"b": "x"}]}
        for reply in ("text", 'with "quotes"', 42, [1, "b"], None)
    ]
    features = datasets.Features(
        {"chosen": datasets.Json(), "turns": datasets.List(datasets.Json())}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert rows_of(tmp_path / "a.parquet") == list(table) == rows


def test_a_broken_cell_of_json_is_a_fault_of_its_row(tmp_path: Path) -> None:
    cells = ["1", "{oops", '{"a": 1, "a": 2}', "[" * 200_000, "2"]
    pyarrow.parquet.write_table(
        pyarrow.table(
            {"q": pyarrow.array(["q"] * 5), "chosen": pyarrow.array(cells, pyarrow.json_())}
        ),
        tmp_path / "a.parquet",
    )
    faults: list[DataError] = []
    assert [where for where, _ in source(tmp_path / "a.parquet").rows(faults)] == [
        "a.parquet[0]",
        "a.parquet[4]",
    ]
    assert [(type(one), one.where) for one in faults] == [
        (RowError, f"a.parquet[{i}], field chosen") for i in (1, 2, 3)
    ]


def test_a_row_that_the_viewer_cut_is_left_out(tmp_path: Path) -> None:
    entries = [viewer_row(ROW), viewer_row(ROW, ["chosen"]), viewer_row(ROW)]
    faults: list[DataError] = []
    path = write(
        tmp_path / "a.json",
        json.dumps({"features": [{"name": "prompt"}], "rows": entries, "partial": False}),
    )
    assert [row for _, row in source(path).rows(faults)] == [ROW, ROW]
    assert [(type(one), one.where) for one in faults] == [(RowError, "a.json[1]")]


QUOTES = 'q\ta\tb\n1\t"good one\tbad\n2\tgood two"\tbad\n3\tx\ty\n'


def test_quotes_in_a_table_with_tabs(tmp_path: Path) -> None:
    """Plain characters where each line is a row by that, as the standard of .tsv has it; else the
    rules of csv."""
    plain = [{"q": "1", "a": '"good one', "b": "bad"}, {"q": "2", "a": 'good two"', "b": "bad"}]
    for name in ("a.tsv", "a.csv"):
        assert rows_of(write(tmp_path / name, QUOTES.replace("\n", "\r\n")))[:2] == plain
    for row in ({"q": "1", "a": '"good" one'}, {"q": "", "a": '""one'}, {"q": '"1', "a": '2"'}):
        assert rows_of(write(tmp_path / "b.tsv", f"q\ta\n{row['q']}\t{row['a']}\n")) == [row]
    header = write(tmp_path / "b.tsv", 'q\t"a\tb\n1\t2"\t3\n')
    assert rows_of(header) == [{"q": "1", '"a': '2"', "b": "3"}]
    quoted = [{"q": 'a "b"', "a": "two\nlines"}, {"q": "c\td", "a": "plain"}]
    assert rows_of(write(tmp_path / "a.tsv", to_csv(quoted, "\t"))) == quoted
    # Both are in one file, or a csv may be either: nobody can tell which rows there are.
    both = write(tmp_path / "a.tsv", QUOTES + '4\t"two\nlines"\tz\n')
    assert "a.tsv:2: broken csv" in fault(places, both)
    for ends in ("", "\n"):
        path = write(tmp_path / "c.csv", "sep=,\n" + QUOTES.replace("\t", ",") + ends)
        assert "c.csv:3: broken csv" in fault(places, path)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (
            "你好吗？我很好，谢谢。天空为什么是蓝色的？因为阳光被大气散射了，蓝光散射得最多。",
            "gb18030",
        ),
        ("Привет, как дела? Всё хорошо, спасибо, а у тебя как?", "cp1251"),
    ],
)
def test_the_likely_encodings_are_shown(tmp_path: Path, text: str, encoding: str) -> None:
    rows = "".join(f"{text}{i},{text},no\n" for i in range(50))
    said = fault(
        places, write(tmp_path / "a.csv", f"prompt,chosen,rejected\n{rows}".encode(encoding))
    )
    assert f"{encoding.upper()}: {text[:6]}" in said
    assert f"iconv -f {encoding.upper()} -t UTF-8 {tmp_path}/a.csv > {tmp_path}/a.utf8.csv" in said
    assert text not in said
    # One line among others in UTF-8: to convert all would spoil those.
    mixed = "q,a\nÜber,b\n".encode() + "Über,b\n".encode("cp1252")
    assert "iconv" not in fault(places, write(tmp_path / "b.csv", mixed))


def test_an_index_of_pandas_is_a_column_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(",prompt,chosen,rejected\n0,q,a,b\n")
    ((_, row),) = find_source(str(tmp_path / "pairs.csv"), "auto", None).rows([])
    assert row == {"Unnamed: 0": "0", "prompt": "q", "chosen": "a", "rejected": "b"}


def test_blank_lines_count(tmp_path: Path) -> None:
    marked = b"\xef\xbb\xbf" + LINE + b"\r\n\n  \n\xef\xbb\xbf" + LINE
    assert wheres(write(tmp_path / "a.jsonl", marked)) == ["a.jsonl:1", "a.jsonl:4"]
    assert wheres(write(tmp_path / "a.csv", "\n \nq,a\n\n1,2\n\n3,4\n")) == ["a.csv:5", "a.csv:7"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", " \n\n"),
        ("a.json", ""),
        ("a.json", "[ ]\n"),
        ("a.csv", ""),
        ("a.csv", "q,a\n"),
    ],
)
def test_a_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    assert places(write(tmp_path / name, content)) == []
    assert source(tmp_path / name).fingerprint()[1] in (0, 2)
    assert places(write(tmp_path / f"{name}.gz", content)) == []


def test_a_table_of_one_column_holds_texts_over_lines(tmp_path: Path) -> None:
    for name in ("a.csv", "a.tsv"):
        assert rows_of(write(tmp_path / name, 'q\n"a\nb"\n"c\nd"\n')) == [
            {"q": "a\nb"},
            {"q": "c\nd"},
        ]


@pytest.mark.parametrize("header", ['""', ",,", '"",""', '""\t""'])
def test_a_header_without_names_is_not_passed_over(tmp_path: Path, header: str) -> None:
    assert "column names in the first line" in fault(
        places, write(tmp_path / "a.csv", f"{header}\nq,a\n1,2\n")
    )


def test_names_in_a_csv_are_stripped_and_cells_are_not(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.csv", "q, a\n1, 2\n")) == [{"q": "1", "a": " 2"}]
    assert rows_of(write(tmp_path / "b.csv", "q\n1;2\n")) == [{"q": "1;2"}]
    assert rows_of(write(tmp_path / "c.csv", "q|x,a\n1|;2,3\n")) == [{"q|x": "1|;2", "a": "3"}]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        # Excel names the delimiter above the header.
        ("sep=;\r\nq;a\r\n1,5;2\r\n", {3: {"q": "1,5", "a": "2"}}),
        ("\n\ufeffq,a\nsep=;,2\n", {3: {"\ufeffq": "sep=;", "a": "2"}}),
        ("\ufeffSEP=|\nq,a|b\n\n1|2\n", {4: {"q,a": "1", "b": "2"}}),
        ("sep=\t\nq,a\tb\n1,\t2\n", {3: {"q,a": "1,", "b": "2"}}),
        # A delimiter ends each line.
        ("q,a,\n1,2,\n3,4\n", {2: {"q": "1", "a": "2"}, 3: {"q": "3", "a": "4"}}),
        ("q;a; ;\n1;2; ;\n", {2: {"q": "1", "a": "2"}}),
        (",q,a,\n0,1,2,\n", {2: {"Unnamed: 0": "0", "q": "1", "a": "2"}}),
        # The delimiter is the one that fits both the header and the first row.
        ('"q, text";a\n1;2\n', {2: {"q, text": "1", "a": "2"}}),
        ("q, text;a;b\n\n1;2;3\n", {3: {"q, text": "1", "a": "2", "b": "3"}}),
        ("q;text,a\n1,2\n", {2: {"q;text": "1", "a": "2"}}),
        ("q;text,a\n1;2,3\n", {2: {"q;text": "1;2", "a": "3"}}),
        ('q\ttext;a|b;c\n"1\n1";2;3\n', {2: {"q text": "1\n1", "a|b": "2", "c": "3"}}),
        ("q;text,a\n", {}),
        ("q, a\n1, 2\n", {2: {"q": "1", "a": " 2"}}),
        ('q,a\n"1, ""x""", 2\n', {2: {"q": '1, "x"', "a": " 2"}}),
        ('q,a\n"1, "," 2"\n', {2: {"q": "1, ", "a": " 2"}}),
        ('q,a\n"1, "," ""2"""\n', {2: {"q": "1, ", "a": ' "2"'}}),
        # Nothing in the name of a column can command a terminal.
        ('\x1b[31mq,a\x07b,"c\nd"\n1,\x1b2,3\n', {3: {"[31mq": "1", "a b": "\x1b2", "c d": "3"}}),
    ],
)
def test_a_csv_is_read_as_it_is_meant(tmp_path: Path, content: str, found: dict[int, Any]) -> None:
    assert places(write(tmp_path / "a.csv", content)) == [
        (f"a.csv:{line}", row) for line, row in found.items()
    ]
    assert rows_of(write(tmp_path / "a.csv.gz", content)) == list(found.values())


def test_a_cell_without_a_name_is_a_fault(tmp_path: Path) -> None:
    faults: list[DataError] = []
    found = source(write(tmp_path / "a.csv", "q,a,,\n1,2,,\n3,4,5,\n6,7,,,\n8\n9,10, ,\n")).rows(
        faults
    )
    assert [where for where, _ in found] == ["a.csv:2", "a.csv:6"]
    assert [(one.where, one.found) for one in faults] == [
        ("a.csv:3", "a cell in a column without a name"),
        ("a.csv:4", "5 cells"),
        ("a.csv:5", "1 cells"),
    ]


# --- a row that cannot be read is placed


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"prompt": "q" "chosen": "a"}', ":2: broken JSON at column 16: Expecting ',' delimiter"),
        (b'{"prompt": "q", "chosen": "a', ":2: broken JSON at column 27: Unterminated string"),
        (b'{"prompt": "q", "chosen": "a"', ":2: broken JSON at column 30: Expecting ',' delimiter"),
        (
            b'{"prompt": "a\rb", "chosen": "a"}',
            ":2: broken JSON at column 14: Invalid control character",
        ),
        (b'{"prompt": "q"},', ":2: broken JSON at column 16: a comma after the object"),
        (b'{"prompt": "q", "prompt": "p"}', ":2: the key 'prompt' appears twice"),
        (b'{"a": {"%b": 1, "%b": 2}}' % (b"k" * 200, b"k" * 200), ":2: a key appears twice"),
        (b'"prompt"', ":2: not a JSON object"),
        (b"[1]", ":2: not a JSON object"),
        (b"{", ":2: broken JSON at column 2"),
        (b"[" * 200_000, ":2: "),
        (b'{"a":' * 200_000, ":2: "),
        (b'{"prompt": ' + b"1" * 5000 + b"}", ":2: "),
        (b"\x00\x01", ":2: broken JSON at column 1"),
    ],
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.jsonl.gz"])
def test_a_broken_line_is_placed(tmp_path: Path, name: str, line: bytes, found: str) -> None:
    path = write(tmp_path / name, b"\n".join([LINE, line, LINE, b""]))
    faults: list[DataError] = []
    assert [where for where, _ in source(path).rows(faults)] == [f"{name}:1", f"{name}:3"]
    assert len(faults) == 1
    text = fault(raise_all, faults)
    assert text.startswith(name + found)
    assert "qqq" not in text


def test_a_broken_first_line_is_a_row_fault_too(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        faults: list[DataError] = []
        found = source(write(tmp_path / name, b'{"q" 1}\n' + LINE + b"\n{oops\n" + LINE)).rows(
            faults
        )
        assert [where for where, _ in found] == [f"{name}:2", f"{name}:4"]
        assert [one.where for one in faults] == [f"{name}:1", f"{name}:3"]


@given(
    st.binary(max_size=60) | st.text(max_size=30).map(str.encode),
    st.sampled_from(["first", "last", "alone"]),
)
@example(b"\x1f\x8b", "first")
@example(b"\x1f\x8b", "alone")
@example(b"\xff\xfe{", "first")
@example(b"{\r\r\n", "alone")
@example(b'{"data": [{}]}', "alone")
@example(b"{\n}x", "alone")
@example(b"[{},]", "alone")
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"]
)
@pytest.mark.parametrize("wrapped", [False, True])
@settings(parent=QUICK, max_examples=60)
def test_no_bytes_escape_as_a_traceback(
    tmp_path: Path, name: str, wrapped: bool, line: bytes, where: str
) -> None:
    content = {"first": line + b"\n" + LINE, "last": LINE + b"\n" + line, "alone": line}[where]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 1) if wrapped else content)
    for read in (lambda: places(path), lambda: source(path).fingerprint()):
        try:
            read()
        except DataError as error:
            assert name in str(error)  # noqa: PT017 - either outcome is right


FAULTS = [
    b"{oops}",
    b'{"a" 1}',
    b"[1]",
    b'{"a": nan}',
    b'{"a": 1, "a": 2}',
    b"{",
    b'{"a": "b',
    b"nothing",
]


@given(
    planted=st.dictionaries(st.integers(0, 19), st.sampled_from(FAULTS), max_size=6),
    ends=st.sampled_from([b"\n", b"\r\n"]),
)
@QUICK
def test_the_place_of_a_planted_fault_is_exact(
    tmp_path: Path, planted: dict[int, bytes], ends: bytes
) -> None:
    lines = [planted.get(i, LINE) for i in range(20)]
    if 0 in planted:
        lines.insert(0, LINE)  # what the first line is decides how the file is read
        planted = {i + 1: line for i, line in planted.items()}
    faults: list[DataError] = []
    found = list(source(write(tmp_path / "a.jsonl", ends.join(lines))).rows(faults))
    assert [one.where for one in faults] == [f"a.jsonl:{i + 1}" for i in sorted(planted)]
    assert [where for where, _ in found] == [
        f"a.jsonl:{i + 1}" for i in range(len(lines)) if i not in planted
    ]


@given(rows=st.lists(ROWS.map(lambda rows: rows[0]), min_size=1, max_size=8), at=st.integers(0, 8))
@QUICK
def test_a_short_row_in_a_csv_is_placed_where_it_starts(
    tmp_path: Path, rows: list[Any], at: int
) -> None:
    at = min(at, len(rows))
    before, after = to_csv([ROW, *rows[:at]]), to_csv([ROW, *rows[at:]]).split("\r\n", 2)[2]
    faults: list[DataError] = []
    found = list(
        source(write(tmp_path / "a.csv", before + 'x,"two\nlines"\r\n' + after)).rows(faults)
    )
    assert [row for _, row in found] == [ROW, *rows]
    assert [(one.where, one.found) for one in faults] == [
        ("a.csv:" + str(before.count("\n") + 1), "2 cells")
    ]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[{"q": 1},\n {"q": 2, "q": 3}]', "a.json: the key 'q' appears twice"),
        ('[{"q": 1},\n 3]', "a.json[1]: not a JSON object"),
        ('[{"q": 1},\n oops]', "a.json: broken JSON at line 2, column 2"),
        (
            '[{"q": 1}\n {"q": 2}]',
            "a.json: broken JSON at line 2, column 2: Expecting ',' delimiter",
        ),
        ('[{"q": 1},]', "a.json: broken JSON at column 11"),
        ('[{"q": 1}] []', "a.json: broken JSON at column 12: Extra data"),
        ('[{"q": 1}', "a.json: broken JSON at column 10"),
        ("[" * 200_000, "a.json: "),
        ('[{"q": "ü"},\n {"é": "'.encode() + b'\xfc"}]', "a.json: byte 0xfc at line 2, column 9"),
        ('{"data": [{"q": 1},\n {"q": 2 "r": 3}]}', "a.json: broken JSON at line 2, column 10"),
        ('{"data": [\n{"q": 1, "q": 2}]}', "a.json: the key 'q' appears twice"),
    ],
)
def test_a_fault_in_a_json_array_is_placed(
    tmp_path: Path, content: str | bytes, where: str
) -> None:
    path = write(tmp_path / "a.json", content)
    assert fault(places, path).startswith(where)


def test_a_carriage_return_in_the_first_row_splits_no_lines(tmp_path: Path) -> None:
    faults: list[DataError] = []
    found = source(write(tmp_path / "a.jsonl", b'{"q": "a\rb"}\n' + LINE + b"\n" + LINE)).rows(
        faults
    )
    assert [where for where, _ in found] == ["a.jsonl:2", "a.jsonl:3"]
    assert [one.where for one in faults] == ["a.jsonl:1"]


def test_objects_over_several_lines_have_a_fix(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"chosen": [{"role": "user", "content": "q"}]}]
    for name in ("a.jsonl", "a.json"):
        path = write(tmp_path / name, "\n".join(json.dumps(row, indent=2) for row in rows))
        with pytest.raises(DataError) as raised:
            places(path)
        assert f"jq -c . {path} > {tmp_path}/a.lines.jsonl" in str(raised.value)
    for row in (ROW, {"data": []}, {"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}):
        assert rows_of(write(tmp_path / "c.json", json.dumps(row, indent=1))) == [row]


def run_fix(read: Callable[..., Any], *arguments: Any) -> str:
    """What the person gets who pastes the line of the fix: the new file."""
    with pytest.raises(DataError) as raised:
        read(*arguments)
    assert isinstance(raised.value.fix, Command)
    if not shutil.which(raised.value.fix.line.split()[0]):
        pytest.skip("this machine lacks the program")
    subprocess.run(["bash", "-c", raised.value.fix.line], check=True)
    return raised.value.fix.line.rpartition("> ")[2].strip("'")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a b.json", json.dumps({"train": [ROW], "it's": [ROW]}).encode(), [ROW]),
        (
            "a.jsonl",
            b'["A?", "b", "c"]\n["D?", "e", "f"]\n',
            [dict(zip(ROW, "A? b c".split(), strict=True))],
        ),
        (
            "a.json.gz",
            b'["A?", "b", "c"]\n["D?", "e", "f"]\n',
            [dict(zip(ROW, "A? b c".split(), strict=True))],
        ),
        (
            "a.csv",
            b'q, a\n1, "2, ""3"""\n"x, "," ""y"""\n',
            [{"q": "1", "a": '2, "3"'}, {"q": "x, ", "a": ' "y"'}],
        ),
        ("a.csv", b"q,a\r1,2\r", [{"q": "1", "a": "2"}]),
        ("a.jsonl", LINE + b"\r" + LINE, [ROW, ROW]),
        (
            "a b.csv",
            "prompt,chosen\nÜber,Ça va\n".encode("utf-16"),
            [{"prompt": "Über", "chosen": "Ça va"}],
        ),
        (
            "a.csv.gz",
            "prompt,chosen\nÜber,Ça va\n".encode("utf-16-le"),
            [{"prompt": "Über", "chosen": "Ça va"}],
        ),
        (
            "a.jsonl",
            '{"q": "你好吗？我很好，谢谢。"}\n'.encode("gbk"),
            [{"q": "你好吗？我很好，谢谢。"}],
        ),
    ],
)
def test_the_line_of_a_fix_works(
    tmp_path: Path, name: str, content: bytes, found: list[Any]
) -> None:
    rows = rows_of(run_fix(places, write(tmp_path / name, content)))
    assert rows[: len(found)] == found
    assert "OLD" not in fault(places, tmp_path / name)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(
    "cut",
    [
        b'{"prompt": "R", "chosen": "c", \nplain',
        b'{"prompt": "R", "chosen": "c"\n[1]',
        b'{"prompt": "R", "chosen": {"role":\nuser}',
        b'{"prompt": "R",\n"chosen"} "b"',
        b"{\nplain",
    ],
)
def test_a_row_cut_short_hides_no_later_fault(tmp_path: Path, cut: bytes, before: int) -> None:
    faults: list[DataError] = []
    lines = [*[LINE] * before, cut, LINE, b'"x"', LINE]
    found = list(source(write(tmp_path / "a.jsonl", b"\n".join(lines))).rows(faults))
    assert [one.where for one in faults] == [f"a.jsonl:{before + number}" for number in (1, 2, 4)]
    assert len(found) == before + 2


@pytest.mark.parametrize(
    "whole",
    [
        {"prompt": ["q", "r"], "chosen": ["a", "b"], "rejected": ["c", "d"]},
        {"chosen": [[{"role": "user"}]], "rejected": [[{"role": "user"}]]},
        {"prompt": ["q"], "chosen": [{"role": "a"}], "rejected": [{"role": "a"}]},
        {"prompt": {"0": "q", "1": "r"}, "chosen": {"0": "a", "1": "b"}},
        {"prompt": {"7": "q"}},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_columns_are_read_as_rows(tmp_path: Path, whole: Any, indent: int | None) -> None:
    path = write(tmp_path / "a.json", json.dumps(whole, indent=indent))
    columns = [value.values() if isinstance(value, dict) else value for value in whole.values()]
    assert rows_of(path) == [
        dict(zip(whole, cells, strict=True)) for cells in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": ["a"], "rejected": ["b"]},
        {"chosen": {"role": "a"}, "rejected": {"role": "a"}},
        {"a": {"0": "b"}, "c": {"1": "d"}},
        {"a": ["b"], "c": ["d", "e"]},
        {"a": {}},
        {"a": []},
        {},
    ],
)
def test_one_row_is_no_columns(tmp_path: Path, row: Any) -> None:
    assert rows_of(write(tmp_path / "a.json", json.dumps(row))) == [row]


def test_a_cell_that_never_ends_is_placed_where_its_row_starts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'q,a\n1,2\n"3,4\n' + "5,6\n" * 30)
    assert fault(places, path).startswith("a.csv:3: broken csv: ")


# --- a file that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("pairs.txt", "hello", "pairs.txt: a text that is not JSON"),
        (
            "pairs.parquet.gz",
            "hello",
            "an unknown type of file|.arrow, or a text file compressed as .gz, .bz2, .xz or .zst",
        ),
        ("pairs.arrow", "hello", "pairs.arrow: broken arrow"),
        ("pairs.arrow", to_arrow([ROW], pyarrow.ipc.new_stream)[:-20], "pairs.arrow: broken arrow"),
        (
            "pairs.feather",
            to_arrow([ROW], pyarrow.ipc.new_file)[:-20],
            "pairs.feather: broken arrow",
        ),
        ("pairs.xlsx", b"PK\x03\x04", "pairs.xlsx: a spreadsheet|save it as csv"),
        ("pairs.XLS", b"", "a spreadsheet"),
        ("pairs.ods", b"", "a spreadsheet"),
        (
            "pairs.csv",
            b"PK\x03\x04 sheet",
            "pairs.csv:1: a zip file or a spreadsheet|save it as csv",
        ),
        (
            "pairs.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a git-lfs pointer|git lfs pull",
        ),
        ("pairs.jsonl", '{"q": "ü"}'.encode("utf-16"), ":1: UTF-16 text|iconv -f UTF-16 -t UTF-8"),
        ("pairs.json.gz", "[]".encode("utf-16"), ":1: UTF-16 text|iconv -f UTF-16 -t UTF-8"),
        (
            "pairs.csv",
            b"\xfe\xff" + "q,a".encode("utf-16-be"),
            ":1: UTF-16 text|iconv -f UTF-16 -t UTF-8",
        ),
        (
            "pairs.csv",
            "prompt,a\nü,b\n".encode("utf-16-le"),
            ":1: UTF-16LE text|iconv -f UTF-16LE -t UTF-8",
        ),
        (
            "pairs.jsonl.gz",
            '{"q": "ü"}'.encode("utf-16-be"),
            ":1: UTF-16BE text|iconv -f UTF-16BE -t UTF-8",
        ),
        (
            "pairs.csv",
            "q,a\nÜber das schöne Österreich,b\n".encode("cp1252"),
            "pairs.csv:2: byte 0xdc at column 1|CP1252: Über|iconv -f",
        ),
        ("pairs.parquet", "hello", "pairs.parquet: broken parquet"),
        ("pairs.parquet", to_parquet([ROW])[:-20], "pairs.parquet: broken parquet"),
        ("pairs.csv", "prompt,chosen,rejected\nq,a\n", "pairs.csv:2: 2 cells"),
        (
            "pairs.csv",
            "prompt;chosen;rejected\nq;a\n",
            "pairs.csv:2: 2 cells|around a cell with semicolons",
        ),
        ("pairs.csv", 'prompt,chosen,rejected\nq,"a,b\n', "pairs.csv:2: broken csv"),
        ("pairs.csv", 'prompt,chosen\nq,"a"b\n', "pairs.csv:2: broken csv"),
        (
            "pairs.csv",
            "prompt,chosen,chosen\nq,a,b\n",
            "pairs.csv:1: two columns have the same name",
        ),
        ("pairs.csv", "prompt,,chosen\nq,,a\n", "column names in the first line"),
        (
            "pairs.csv",
            f"q,{'a' * 101}\n1,2\n",
            "pairs.csv:1: |column names in the first line",
        ),
        ("pairs.tsv", "q\t\na\tb\n", "column names in the first line"),
    ],
)
def test_a_faulty_file_is_named(
    tmp_path: Path, name: str, content: str | bytes, found: str
) -> None:
    path = write(tmp_path / name, content)
    text = fault(places, path)
    assert all(part in text for part in found.split("|"))


def test_parquet_with_spoilt_pages(tmp_path: Path) -> None:
    whole = to_parquet(some_rows(1000), group=500)
    path = write(tmp_path / "a.parquet", whole[:1000] + bytes(3000) + whole[4000:])
    assert fault(places, path).startswith("a.parquet: broken parquet")


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["chosen", "chosen"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "two columns have the same name" in fault(places, tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz"])
def test_a_line_over_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sources_lines, "MAX_ROW_BYTES", 1 << 20)
    if "csv" in name:  # it may hold parts of other rows, so it stops
        path = write(tmp_path / name, b"a,b\n1," + b"2" * (3 << 20) + b"\n3,4\n")
        assert f"{name}:2: a line of more than 1 MiB" in fault(places, path)
        return
    for at in (0, 1, 2):
        lines = [LINE, LINE]
        lines.insert(at, b'{"prompt": "' + b"a" * (3 << 20) + b'"}')
        faults: list[DataError] = []
        found = [
            where for where, _ in source(write(tmp_path / name, b"\n".join(lines))).rows(faults)
        ]
        assert found == [f"{name}:{number + 1}" for number in range(3) if number != at]
        assert [(type(one), one.where) for one in faults] == [(RowError, f"{name}:{at + 1}")]


def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", 1) as bomb:
        for _ in range(48):
            bomb.write(b"a" * (1 << 20))
    tracemalloc.start()
    try:
        assert "a line of more than 16 MiB" in fault(places, tmp_path / "bomb.jsonl.gz")
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()


def test_a_json_array_over_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_json_rows, "MAX_JSON_BYTES", 1 << 20)
    for name in ("a.json", "a.json.gz"):
        path = write(tmp_path / name, json.dumps([ROW] * 20_000))
        assert "jq -c '.[]'" in fault(places, path)
    assert len(places(write(tmp_path / "lines.json", to_jsonl([ROW] * 20_000)))) == 20_000


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": random.Random(i).randbytes(400).hex()} for i in range(400)]
    whole = compressed(to_jsonl(rows).encode(), suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole + whole)  # parts that were packed by themselves and joined
    assert rows_of(path) == rows * 2
    plain_name = tmp_path / "plain.jsonl"  # and a name that does not say it
    plain_name.write_bytes(whole)
    assert rows_of(plain_name) == rows
    for broken in (
        whole[: len(whole) // 2],
        whole[:-4],
        whole[:15],
        whole[:5000] + bytes(9) + whole[5009:],
    ):
        path.write_bytes(broken)
        assert "broken" in fault(places, path)
        assert "differ" not in source(path).note
    path.write_bytes(LINE)
    assert rows_of(path) == [ROW]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "a.parquet"):
        found = source(write(tmp_path / name, LINE))
        (
            tmp_path / name
        ).unlink()  # the superuser of a container may read everything, so: it is gone
        assert "check its owner" in fault(list, found.rows([]))
        assert "check its owner" in fault(found.fingerprint)


def test_no_message_holds_the_datas_text(tmp_path: Path) -> None:
    canary = "canary7"
    contents = {
        "a.jsonl": f'{{"q": "{canary}" "a"}}\n"{canary}"\n{{"q": {canary}}}\n{{"q": "{canary}\n',
        "a.json": f'[{{"q": "{canary}"}}, {{"q": "{canary}" 3}}]',
        "b.json": f'{{"data": [{{"q": "{canary}"}},\n {{"q": "{canary}" 3}}]}}',
        "a.csv": f'q,a\n{canary}\n"{canary}"{canary},3\n',
        "b.csv": f"{canary * 20},{canary}\n{canary}\n",
        "a.parquet": canary,
        "a.jsonl.gz": canary,
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        text = fault(places, tmp_path / name)
        assert canary not in text


# --- which files


def test_the_name_of_a_file() -> None:
    files = "a.jsonl a.json a.CSV a.tsv a.parquet a.jsonl.gz a.csv.gz a.xlsx".split()
    local = [*files, *"./a /a ~/a .. pairs/* org/pairs-??".split()]
    assert all(is_path(name) for name in local)
    assert not any(
        is_path(name) for name in ["org/pairs", "pairs", "Anthropic/hh-rlhf", "a.parquet.gz"]
    )


def test_a_name_that_stands_here_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("org/pairs")
    write(tmp_path / "org" / "pairs" / "train.jsonl", LINE)
    assert is_local("org/pairs")
    assert not is_local("org/" + "x" * 5000)
    assert not is_local("org/\0")
    assert wheres("org/pairs") == ["train.jsonl:1"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wheres("~/org/pairs/train.jsonl") == ["train.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train.jsonl.gz", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("train-00000-of-00002-3a4a2b5f01c9bd1e.parquet", "train"),
        ("train_0.jsonl", "train"),
        ("train_01.json", "train"),
        ("train-1.csv", "train"),
        ("train.part1.csv", "train"),
        ("train-part-00001.csv.gz", "train"),
        ("train_sft-00000-of-00001.parquet", "train_sft"),
        ("train_prefs-00000-of-00001.parquet", "train_prefs"),
        ("training_notes.csv", "training_notes"),
        ("trainer.csv", "trainer"),
        ("train2.csv", "train2"),
        ("test.TSV", "test"),
    ],
)
def test_the_split_in_a_file_name(tmp_path: Path, name: str, split: str) -> None:
    assert split_of(Path(name)) == split
    write(tmp_path / name, b"")
    write(tmp_path / "validation.jsonl", b"")
    if split == "train":
        source(tmp_path, "train")
    else:
        assert "no file of split 'train'" in fault(source, tmp_path, "train")
    source(tmp_path, split)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train"], "train"),
        (["test", "train"], "train"),
        (["train", "test", "train_prefs"], "train_prefs"),
        (["train_sft", "test_sft", "train_prefs", "test_prefs", "train_gen"], "train_prefs"),
        (["train", "train_preferences"], "train_preferences"),
        (["train_all_prefs", "train_prefs"], "train_prefs"),
        (["test_prefs", "train"], "train"),
        (["default"], "default"),
        (["test"], "test"),
        (["train_sft", "test_sft"], None),
        ([], None),
    ],
)
def test_the_split_that_is_chosen(names: list[str], chosen: str | None) -> None:
    assert choose_split(names) == chosen


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        path = tmp_path / name
        write(
            path,
            KINDS["t.parquet"]([ROW])
            if path.suffix == ".parquet"
            else "q,a\n1,2\n"
            if "csv" in name
            else LINE,
        )
    return tmp_path


HELD_OUT = "data.dataset_test_split=%s would use the dataset's own held-out pairs"


@pytest.mark.parametrize(
    ("names", "read", "said"),
    [
        ("train.jsonl", "train.jsonl:1", ""),
        ("pairs.jsonl", "pairs.jsonl:1", ""),
        (
            "train.jsonl test.jsonl README.md .train.jsonl dataset_info.json",
            "train.jsonl:1",
            HELD_OUT % "test",
        ),
        (
            "data/train-00000-of-00001.parquet data/validation-00000-of-00001.parquet",
            "train-00000-of-00001.parquet[0]",
            HELD_OUT % "validation",
        ),
        ("train.jsonl test_sft.jsonl pretest.jsonl", "train.jsonl:1", "not read: pretest.jsonl"),
        (
            "train_0.jsonl train_1.csv",
            "train_0.jsonl:1 train_1.csv:2",
            "2 files: train_0.jsonl, train_1.csv",
        ),
        (
            "train.jsonl data/train.jsonl",
            "data/train.jsonl:1 train.jsonl:1",
            "2 files: data/train.jsonl, train.jsonl",
        ),
        ("b.jsonl a.csv c.json", "a.csv:2 b.jsonl:1 c.json[0]", "3 files: a.csv, b.jsonl, c.json"),
        ("train.jsonl more.jsonl", "train.jsonl:1", "not read: more.jsonl"),
        ("only_test.jsonl", "only_test.jsonl:1", "split only_test (of only_test)"),
        (
            "train_prefs.jsonl test_prefs.jsonl train_sft.jsonl test_sft.jsonl",
            "train_prefs.jsonl:1",
            "split train_prefs (of test_prefs, test_sft, train_prefs, train_sft); "
            f"{HELD_OUT % 'test_prefs'}; not read: train_sft.jsonl",
        ),
    ],
)
def test_what_a_folder_holds(tmp_path: Path, names: str, read: str, said: str) -> None:
    where = folder(tmp_path, *names.split())
    assert " ".join(wheres(where)) == read
    assert source(where).note == said
    assert source(where).name == str(where)


def test_an_explicit_split_is_taken_as_it_is(tmp_path: Path) -> None:
    where = folder(
        tmp_path, "train.jsonl", "train_prefs.jsonl", "test.jsonl", "helpful-00000-of-00001.jsonl"
    )
    for split, name in [
        ("train", "train"),
        ("test", "test"),
        ("helpful", "helpful-00000-of-00001"),
    ]:
        assert wheres(where, split) == [f"{name}.jsonl:1"]
        assert source(where, split).note == ""
    text = fault(source, where, "dev")
    assert "no file of split 'dev'; splits: helpful, test, train, train_prefs" in text
    assert text.endswith("fix: data.dataset_train_split=train_prefs")
    with pytest.raises(DataError) as raised:
        find_source(str(where), "dev", None, TEST_SPLIT)
    assert raised.value.fix == "data.dataset_test_split=test"


@pytest.mark.parametrize(
    ("names", "read", "said"),
    [
        ("pairs.jsonl test.jsonl", "pairs.jsonl", HELD_OUT % "test"),
        ("dpo.jsonl dpo_test.jsonl", "dpo.jsonl", ""),
        ("data.jsonl val.jsonl", "data.jsonl", HELD_OUT % "val"),
        (
            "training/a.jsonl evaluation/b.jsonl",
            "training/a.jsonl",
            f"split training (of evaluation, training); {HELD_OUT % 'evaluation'}",
        ),
        ("train.jsonl train_extra.jsonl", "train.jsonl", "not read: train_extra.jsonl"),
    ],
)
def test_what_is_held_out_is_never_chosen_to_train_on(
    tmp_path: Path, names: str, read: str, said: str
) -> None:
    found = source(folder(tmp_path, *names.split()))
    assert [str(file.path.relative_to(tmp_path)) for file in found.files] == [read]  # type: ignore[attr-defined]
    assert found.note == said


def test_a_folder_where_nothing_can_be_chosen(tmp_path: Path) -> None:
    text = fault(source, folder(tmp_path / "a", "train_sft.jsonl", "test_sft.jsonl"))
    assert "no file of split train;" in text
    assert "splits: test_sft, train_sft" in text
    assert text.endswith("fix: data.dataset_train_split=train_sft")
    assert "no file of split 'test'" in fault(
        source, folder(tmp_path / "b", "x.jsonl", "y.jsonl"), "test"
    )
    many = folder(tmp_path / "c", *(f"shard_{i}.jsonl" for i in range(40)))
    assert source(many).note.startswith("40 files: shard_0.jsonl, ")
    assert source(many).note.endswith(" and 30 more")


def test_one_name_in_two_kinds_is_not_read_twice(tmp_path: Path) -> None:
    both = folder(tmp_path / "set", "train.csv", "train.jsonl", "test.jsonl")
    text = fault(source, both)
    assert "train.csv and train.jsonl probably hold the same rows" in text
    assert wheres(both / "train.jsonl") == ["train.jsonl:1"]
    assert (
        f"fix: data.dataset_name={both / 'train.jsonl'} or data.dataset_name={both / 'train.csv'}"
        in text
    )


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no data files" in fault(source, tmp_path / "empty")


def saved(rows: list[Any], path: Path, shards: int = 1) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=shards)


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows, held = some_rows(25), some_rows(3)
    saved(rows, tmp_path / "one", shards=12)
    write(tmp_path / "one" / "cache-1f2e.arrow", to_arrow(held, pyarrow.ipc.new_stream))
    assert rows_of(tmp_path / "one") == rows_of(tmp_path) == rows
    sets = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(held)}
    datasets.DatasetDict(sets).save_to_disk(str(tmp_path / "two"))
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "two", "train") == rows
    assert rows_of(tmp_path / "two", "test") == held
    assert source(tmp_path / "two").note == HELD_OUT % "test"
    assert source(tmp_path / "two").columns() == frozenset(ROW)
    before = source(tmp_path / "two").fingerprint()[0]
    saved([*rows[:-1], ROW], tmp_path / "other")
    shutil.copy(tmp_path / "other" / "data-00000-of-00001.arrow", tmp_path / "two" / "train")
    assert source(tmp_path / "two").fingerprint()[0] != before
    datasets.DatasetDict({"harmless": sets["train"], "helpful": sets["test"]}).save_to_disk(
        str(tmp_path / "three")
    )
    assert "splits: harmless, helpful" in fault(source, tmp_path / "three")
    assert rows_of(tmp_path / "three", "helpful") == held
    (tmp_path / "one" / "data-00007-of-00012.arrow").unlink()
    text = fault(source, tmp_path / "one")
    assert "missing or broken: " in text
    assert "data-00007-of-00012.arrow" in text
    for state in (
        "{",
        "[]",
        '{"_data_files": [{"filename": "../two/train/data-00000-of-00001.arrow"}]}',
    ):
        write(tmp_path / "one" / "state.json", state)
        assert "missing or broken" in fault(source, tmp_path / "one")


@pytest.mark.parametrize(
    ("names", "read", "said"),
    [
        ("train/a.jsonl test/a.jsonl", "a.jsonl:1", HELD_OUT % "test"),
        ("split=train/a.csv split=test/a.csv", "a.csv:2", HELD_OUT % "test"),
        (
            "en/train/0.parquet en/test/0.parquet de/train/0.parquet",
            "de/train/0.parquet[0] en/train/0.parquet[0]",
            None,
        ),
        (
            "part=0/x.jsonl part=1/x.jsonl",
            "part=0/x.jsonl:1 part=1/x.jsonl:1",
            "2 files: part=0/x.jsonl, part=1/x.jsonl",
        ),
        ("a/train.jsonl a/test.jsonl b/train.jsonl", "a/train.jsonl:1 b/train.jsonl:1", None),
        (
            "a/x.jsonl b/y.jsonl .git/z.jsonl _old/z.jsonl",
            "a/x.jsonl:1 b/y.jsonl:1",
            "2 files: a/x.jsonl, b/y.jsonl",
        ),
        ("train.jsonl old/a.jsonl notes.txt", "train.jsonl:1", "not read: the folder old"),
        ("train.txt test.txt", "train.txt:1", None),
    ],
)
def test_sub_folders(tmp_path: Path, names: str, read: str, said: str | None) -> None:
    where = folder(tmp_path, *names.split())
    assert " ".join(wheres(where)) == read
    assert said is None or source(where).note == said


def test_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(
        tmp_path,
        "pairs/b.jsonl",
        "pairs/a.csv",
        "pairs/README.md",
        "pairs/state.json",
        "pairs/more/c.jsonl",
    )
    assert wheres(tmp_path / "pairs" / "*.jsonl") == ["b.jsonl:1"]
    assert wheres(tmp_path / "pairs" / "*") == ["a.csv:2", "b.jsonl:1"]
    assert wheres(tmp_path / "**" / "*.jsonl") == ["b.jsonl:1", "more/c.jsonl:1"]
    assert source(tmp_path / "**" / "*.jsonl").note == "2 files: b.jsonl, more/c.jsonl"
    monkeypatch.chdir(tmp_path)
    assert wheres("pairs/*.[jc]s*", "train") == ["a.csv:2", "b.jsonl:1"]
    assert "no data file matches" in fault(source, "pairs/*.tsv")
    assert "no file of split 'test'" in fault(source, "pairs/*", "test")
    write(tmp_path / "odd [1].jsonl", LINE)  # a file of that very name
    assert wheres("odd [1].jsonl") == ["odd [1].jsonl:1"]


@pytest.mark.parametrize(
    "names",
    [
        ["my set/a.csv", "b.csv"],
        ["p,q/a.csv", 'c"d.csv'],
        ["p,q/a.csv"],
        ["it's.csv", "[b].csv"],
        ["ü b.csv"],
    ],
)
def test_a_line_that_names_files_can_be_pasted(names: list[str]) -> None:
    assert load_recipe("demo", shlex.split(dataset_name_setting(names))).data.names == names


def test_two_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folder(tmp_path, "en/train.jsonl", "de/train.jsonl", "de/test.jsonl")
    assert len(wheres(tmp_path / "*" / "*.jsonl")) == 3  # a pattern says which files
    assert wheres(tmp_path / "*" / "*.jsonl", "test") == ["test.jsonl:1"]
    assert wheres(tmp_path / "*" / "train.jsonl") == ["de/train.jsonl:1", "en/train.jsonl:1"]
    write(tmp_path / "en" / "train.jsonl", LINE + b"\n{oops\n")
    assert fault(places, tmp_path / "*" / "train.jsonl").startswith("en/train.jsonl:2: broken JSON")


def test_links_are_followed(tmp_path: Path) -> None:
    folder(tmp_path, "store/1f2e.jsonl")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").symlink_to(tmp_path / "store" / "1f2e.jsonl")
    (tmp_path / "set" / "train_1.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert (
        wheres(tmp_path / "link") == wheres(tmp_path / "link" / "train.jsonl") == ["train.jsonl:1"]
    )


def test_a_missing_file_has_nearest_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, "preferences.jsonl")
    assert f"fix: data.dataset_name={tmp_path}/preferences.jsonl" in fault(
        source, tmp_path / "preference.jsonl"
    )
    assert "is not a folder" in fault(source, tmp_path / "nowhere" / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    assert "fix: data.dataset_name=preferences.jsonl" in fault(source, "preferences.json")
    assert "no such file" in fault(source, "sheet.xlsx")


def test_a_name_meant_for_a_file_here_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(
        tmp_path,
        "mydata.csv",
        "mydata.jsonl.gz",
        "mydata.txt",
        "Other/train.jsonl",
        "data/pairs.jsonl",
    )
    monkeypatch.chdir(tmp_path)
    names = ("mydata.csv", "mydata.jsonl.gz", "mydata.txt")
    assert fault(source, "mydata").endswith(
        " or ".join(f"data.dataset_name={name}" for name in names)
    )
    assert "fix: data.dataset_name=Other" in fault(source, "other")
    assert "fix: data.dataset_name=data/pairs.jsonl" in fault(source, "data/pears")
    text = fault(source, "data/nothing-like-it", "train")
    assert "in the local folder data, or a dataset of the hub" in text
    assert "check the path" in text
    assert "a/b is not a folder" in fault(source, "a/b/c")
    assert fault(source, "mydat/").startswith("mydat: no such file\n  expected: a file or folder\n")


def test_a_bare_name_that_is_not_on_the_hub_may_have_been_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise errors.pop()

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    monkeypatch.chdir(folder(tmp_path, "mydata.csv"))
    for name, near in (("mydat", " (similar: data.dataset_name=mydata.csv)"), ("zzz", "")):
        for error, fix in (
            (ConnectionError("offline"), "network"),
            (ValueError(f"'{name}' doesn't exist"), "open"),
        ):
            errors = [error, error]
            text = fault(source, name, kind=HubError)
            assert (
                f"there is no local file or folder {name}{near}; for a dataset of the hub, " in text
            )
            assert fix in text
    errors = [ConnectionError("offline")] * 2
    assert "no file" not in fault(source, "org/mydat", kind=HubError)


# --- the fingerprint


def test_the_fingerprint_is_of_content_order_and_labels(tmp_path: Path) -> None:
    one, two = (
        folder(tmp_path / "one", "a.jsonl", "b.jsonl"),
        folder(tmp_path / "two", "a.jsonl", "b.jsonl"),
    )
    write(one / "b.jsonl", LINE + b"\n" + LINE)
    write(two / "b.jsonl", LINE + b"\n" + LINE)
    assert source(one).fingerprint() == source(two).fingerprint()
    assert source(one).fingerprint()[1] == 3
    seen = {source(one).fingerprint()[0], source(one / "a.jsonl").fingerprint()[0]}
    write(two / "a.jsonl", LINE + b" ")
    seen.add(source(two).fingerprint()[0])
    (one / "b.jsonl").rename(one / "c.jsonl")
    seen.add(source(one).fingerprint()[0])
    (one / "c.jsonl").rename(one / "0.jsonl")
    seen.add(source(one).fingerprint()[0])
    assert len(seen) == 5


def test_the_number_of_rows_is_estimated(tmp_path: Path) -> None:
    rows = [ROW] * 7
    counts = {
        name: source(write(tmp_path / name, make(rows))).fingerprint()[1]
        for name, make in KINDS.items()
    }
    unknown = {
        "b.json",
        "d.json",
        "e.json",
        "s.json",
        "n.jsonl.gz",
        "o.json.gz",
        "p.csv.gz",
        "u.arrow",
        "v.feather",
    }
    unknown |= {"w.ndjson.xz", "x.txt.bz2", "y.tsv.zst", "aa.json", "ab.json", "z.jsonl"}
    assert counts == {name: 0 if name in unknown else 7 for name in KINDS}
    folder(tmp_path / "both", "a.jsonl", "b.jsonl.gz")
    assert source(tmp_path / "both").fingerprint()[1] == 0


# --- much data


def test_streaming_takes_little_memory(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a" * 50_000, "rejected": "b" * 50_000}
    line, count = json.dumps(row).encode() + b"\n", 600
    for name, content in {
        "a.jsonl": line,
        "a.csv": to_csv([row]).encode().partition(b"\n")[2],
    }.items():
        with (tmp_path / name).open("wb") as out:
            out.write(b"prompt,chosen,rejected\n" if name == "a.csv" else b"")
            out.writelines(content for _ in range(count))
    for name in ("a.jsonl", "a.csv"):
        tracemalloc.start()
        try:
            assert sum(1 for _ in source(tmp_path / name).rows([])) == count  # 60 MB
            assert source(tmp_path / name).fingerprint()[1] == count
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINE + b"\n{oops\n")
    faults: list[DataError] = []
    assert next(source(path).rows(faults)) == ("a.jsonl:1", ROW)
    assert faults == []
    (tmp_path / "big.jsonl").write_bytes((LINE + b"\n") * 300_000)
    start = time.perf_counter()
    next(source(tmp_path / "big.jsonl").rows(faults))
    assert time.perf_counter() - start < 0.5


# --- the hub


class Hub:
    """Stands in for datasets: what it was asked for, and what it holds."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        splits: dict[str, int],
        names: Exception | None = None,
    ) -> None:
        self.splits, self.names, self.asked = splits, names, list[Any]()
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(datasets, "get_dataset_split_names", self.split_names)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((args, kwargs))
        made = {
            split: datasets.Dataset.from_list(some_rows(count))
            for split, count in self.splits.items()
        }
        return made[kwargs["split"]] if "split" in kwargs else datasets.DatasetDict(made)

    def split_names(self, name: str, config: str | None) -> list[str]:
        assert name.count("/") == 1
        assert config is None
        if self.names:
            raise self.names
        return list(self.splits)


ULTRAFEEDBACK = {"train_prefs": 3, "train_sft": 1, "test_prefs": 2, "test_sft": 1}


def test_a_hub_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(
        monkeypatch,
        {"train": 3, "test": 1},
        names=AssertionError("an explicit split asks for no names"),
    )
    found = find_source("someone/pairs", "train", "en")
    assert hub.asked == [(("someone/pairs", "en"), {"split": "train"})]
    assert (found.name, found.note) == ("someone/pairs", "")
    assert list(found.rows([])) == [(f"train[{i}]", row) for i, row in enumerate(some_rows(3))]
    assert [where for where, _ in find_source("someone/pairs", "test", None).rows([])] == [
        "test[0]"
    ]


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_sets_split_is_chosen(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    hub = Hub(monkeypatch, ULTRAFEEDBACK, names=ConnectionError("offline") if offline else None)
    found = find_source("h4/ultra", "auto", None)
    assert hub.asked == [
        *([(("h4/ultra", None), {})] if offline else []),
        (("h4/ultra", None), {"split": "train_prefs"}),
    ]
    assert found.note.startswith(
        "split train_prefs (of train_prefs, train_sft, test_prefs, test_sft); "
    )
    assert "data.dataset_test_split=test_prefs" in found.note
    assert [where for where, _ in found.rows([])] == [
        "train_prefs[0]",
        "train_prefs[1]",
        "train_prefs[2]",
    ]
    Hub(monkeypatch, {"train": 1})
    assert find_source("a/b", "auto", None).note == ""
    Hub(monkeypatch, {"train": 1, "test": 1})
    assert find_source("a/b", "auto", None).note == HELD_OUT % "test"
    assert find_source("a/b", "train", None).note == ""
    Hub(monkeypatch, {"default": 1})
    assert find_source("a/b", "auto", None).note == "split default (of default)"
    Hub(monkeypatch, {"train_sft": 1, "test_sft": 1})
    text = fault(find_source, "a/b", "auto", None, kind=HubError)
    assert "several splits: train_sft, test_sft" in text
    assert "data.dataset_train_split=train_sft" in text


CONFIGS = (
    "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\n"
    "Example of usage:\n\t`x`"
)


@pytest.mark.parametrize("split", ["auto", "train"])
@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (
            ValueError("Unknown split \"train\". Should be one of ['train_prefs']."),
            "data.dataset_train_split=train_prefs",
        ),
        (
            ValueError("Config name is missing."),
            "name a configuration of the dataset in data.dataset_config",
        ),
        (ValueError(CONFIGS), "['en', 'de']|fix: data.dataset_config=en,"),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['en', 'de']"),
            "['en', 'de']|data.dataset_config=en,",
        ),
        (
            ValueError(
                "There are multiple 'o/split' configurations in the cache: en, de\nPlease "
                "specify which"
            ),
            "the cache: en, de|data.dataset_config=en,",
        ),
        (
            ValueError(
                "Couldn't find cache for o/split for config 'x'\nAvailable configs in the cache: "
                "['en']"
            ),
            "data.dataset_config=en,",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found split.py"),
            "o/split --local-dir split --revision refs/convert/parquet, then "
            "data.dataset_name=split",
        ),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'o/split' is a gated dataset on the Hub."
            ),
            "hf auth login",
        ),
        (
            ConnectionError("Couldn't reach 'o/split' on the Hub"),
            "hf download --repo-type dataset o/split",
        ),
        (TimeoutError(), "TimeoutError|hf download --repo-type dataset o/split"),
    ],
)
def test_a_hub_fault_names_the_set_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fix: str, split: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    text = fault(find_source, "o/split", split, None, kind=HubError)
    assert all(part in text for part in fix.split("|"))
    assert text.startswith("data.dataset_name o/split: ")
    assert "Example of usage" not in text


def test_the_fingerprint_of_a_set_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, ULTRAFEEDBACK)
    prints = [find_source("a/b", split, None).fingerprint() for split in ULTRAFEEDBACK]
    assert [count for _, count in prints] == [3, 1, 2, 1]
    assert len({sha for sha, _ in prints}) == 4
    Hub(monkeypatch, {"train": 3, "dev": 3})
    one, again, dev = (
        find_source("a/b", split, None).fingerprint()[0] for split in ("train", "train", "dev")
    )
    Hub(monkeypatch, {"train": 4})
    assert one == again
    assert len({one, dev, find_source("a/b", "train", None).fingerprint()[0]}) == 3


def test_the_hubs_own_reader_on_a_real_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets itself, on disk: the splits, the cached arrow files, and the messages that are
    parsed here."""
    for name, at in (("HF_DATASETS_CACHE", "cache"), ("HF_CACHE_HOME", "home")):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / at))
    logging.getLogger("datasets").setLevel(logging.ERROR)
    where = tmp_path / "set"
    for split, count in ULTRAFEEDBACK.items():
        write(where / f"{split}.jsonl", to_jsonl(some_rows(count)))
    names = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ULTRAFEEDBACK)
    write(where / "README.md", f"---\nconfigs:\n- config_name: en\n  data_files:\n{names}---\n")
    found = load_hub_dataset(str(where), "auto", None)
    assert found.note.startswith(
        "split train_prefs (of train_prefs, train_sft, test_prefs, test_sft); "
    )
    assert [row for _, row in found.rows([])] == some_rows(3)
    assert found.table.cache_files
    sha, count = found.fingerprint()
    assert (sha, count) == (load_hub_dataset(str(where), "train_prefs", "en").fingerprint()[0], 3)
    assert sha != load_hub_dataset(str(where), "test_prefs", None).fingerprint()[0]
    # A set of the hub that is in the cache, when the hub cannot be reached.
    shutil.copytree(tmp_path / "cache" / "set" / "en", tmp_path / "cache" / "org___set" / "en")
    cached = find_source("org/set", "auto", None)
    assert (cached.note, cached.fingerprint()[1]) == (found.note, 3)
    assert list(cached.rows([])) == list(found.rows([]))
    assert "configs in the cache: ['en']" in fault(
        find_source, "org/set", "auto", "fr", kind=HubError
    )
    text = fault(load_hub_dataset, str(where), "dev", None, TEST_SPLIT, kind=HubError)
    assert "train_prefs" in text
    assert "data.dataset_test_split=test_prefs" in text
    assert "data.dataset_config=en," in fault(
        load_hub_dataset, str(where), "auto", "fr", kind=HubError
    )
    more = f"- config_name: de\n  data_files:\n{names}"
    write(
        where / "README.md", f"---\nconfigs:\n- config_name: en\n  data_files:\n{names}{more}---\n"
    )
    for split in ("auto", "train_prefs"):
        text = fault(load_hub_dataset, str(where), split, None, kind=HubError)
        assert "['en', 'de']" in text
        assert "data.dataset_config=en," in text


def test_the_columns_of_a_table_by_pandas_may_be_in_any_order(tmp_path: Path) -> None:
    columns = '{"prompt": {"0": "p0", "1": "p1"}, "chosen": {"1": "g1", "0": "g0"}}'
    assert rows_of(write(tmp_path / "a.json", columns)) == [
        {"prompt": f"p{i}", "chosen": f"g{i}"} for i in (0, 1)
    ]


def test_the_name_of_a_file_may_be_of_another_encoding(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es.jsonl")
    with open(path, "w") as stream:
        stream.write('{"q": "1"}\n')
    for name in (path, str(tmp_path)):
        found = source(name)
        assert [place for place, _ in found.rows([])] == ["donn\ufffdes.jsonl:1"]
        assert found.fingerprint()
