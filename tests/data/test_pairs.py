"""Sets to pairs: what is read, what is left out and where it stood, several sets in one, and the
split by prompt."""

import json
import random
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from orpo_lite.data import pairs as data_pairs
from orpo_lite.data.formats.column_map import DETECTION_ROWS, refuse_unknown_columns
from orpo_lite.data.pair import EMPTY_CHOSEN, EMPTY_REJECTED, PROMPTS_DIFFER, SYSTEMS_DIFFER, Pair
from orpo_lite.data.pairs import (
    BLANK,
    EMPTY_PROMPT,
    EQUAL,
    FAULTY,
    MAX_PLACES,
    REPEATED_TURN,
    PairReader,
)
from orpo_lite.data.sources import local as sources_local
from orpo_lite.data.sources.hub import HubSource
from orpo_lite.data.sources.source import Source
from orpo_lite.data.split import held_out_sources, hold_out, prompt_key, training_sources
from orpo_lite.errors import SHOWN, DataError, HubError, OrpoLiteError, Overrides
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import DataSection

EXPLICIT = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}
HH = {
    side: f"\n\nHuman: Name a colour.\n\nAssistant: {EXPLICIT[side]}"
    for side in ("chosen", "rejected")
}


def section(**fields: Any) -> DataSection:
    return DataSection(**{"dataset_name": "pairs.jsonl", **fields})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


LISTS = {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}


def some_rows(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {i}?", "chosen": f"{i}", "rejected": f'"no",\n{i}'}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read(path: Path | str, **fields: Any) -> tuple[list[Pair], PairReader]:
    """The training pairs, and the reader that has read them."""
    data = section(dataset_name=str(path), **fields)
    sources = training_sources(data)
    refuse_unknown_columns(data, sources)
    reader = PairReader(data, sources)
    return list(reader), reader


def held_out(data: DataSection) -> list[Pair]:
    return list(PairReader(data, held_out_sources(data)))


def message(raised: pytest.ExceptionInfo[OrpoLiteError]) -> str:
    """The text of an error that says all three: the place, what was expected, and what to do."""
    text = str(raised.value)
    assert "expected: " in text
    assert "fix: " in text
    return text


# --- one set


def test_what_was_found_stands_in_the_reader(tmp_path: Path) -> None:
    pairs, reader = read(write_jsonl(tmp_path / "pairs.jsonl", [EXPLICIT] * 3))
    assert [pair.where for pair in pairs] == ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:3"]
    assert {(pair.prompt_text, pair.chosen, pair.rejected) for pair in pairs} == {
        tuple(EXPLICIT.values())
    }
    assert all(pair.messages == (user("Name a colour."),) for pair in pairs)
    (sentence,) = reader.detected
    assert sentence.startswith("detected explicit because ")
    assert (reader.read, dict(reader.drops.counts), reader.drops.places) == (3, {}, {})


def test_rows_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_pairs, "DETECTION_ROWS", 2)
    data = section(
        dataset_name=str(write_jsonl(tmp_path / "pairs.jsonl", [*some_rows(9), {"chosen": 1}]))
    )
    reader = PairReader(data, training_sources(data))
    pairs = iter(reader)
    assert reader.read == 0
    next(pairs)
    assert reader.read == 1  # and the fault at the end is still ahead
    list(pairs)
    assert reader.read == 10
    assert [str(fault).splitlines()[0] for fault in reader.bad_rows] == [
        "pairs.jsonl:10, field chosen: a number"
    ]


@pytest.mark.parametrize(
    ("late", "first", "before"),
    [
        ({"system": "Be brief."}, {}, [{"role": "system", "content": "Be brief."}]),
        ({"system": "Be brief."}, {"system": None}, [{"role": "system", "content": "Be brief."}]),
        ({"history": [["Hi", "Hello."]]}, {}, [user("Hi"), bot("Hello.")]),
        ({"history": [["Hi", "Hello."]]}, {"history": []}, [user("Hi"), bot("Hello.")]),
    ],
)
def test_a_column_may_turn_up_late(
    tmp_path: Path, late: dict[str, Any], first: dict[str, Any], before: list[dict[str, str]]
) -> None:
    rows = [*[EXPLICIT | first] * DETECTION_ROWS, EXPLICIT | late | {"id": 7}, EXPLICIT | first]
    pairs, reader = read(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert [pair.messages for pair in pairs] == [
        # Fmt: skip.
        *[(user("Name a colour."),)] * DETECTION_ROWS,
        (*before, user("Name a colour.")),
        (user("Name a colour."),),
    ]
    ((column, _),) = late.items()
    assert [set(columns["read"]) for columns in reader.columns] == [
        {"prompt", "chosen", "rejected", column}
    ]
    assert [columns["not_read"] for columns in reader.columns] == [["id"]]
    assert [columns["format"] for columns in reader.columns] == reader.detected


def test_what_an_instruction_is_about_may_turn_up_late(tmp_path: Path) -> None:
    row = {"instruction": "Name it.", "chosen": "Blue.", "rejected": "Seven."}
    pairs, reader = read(
        write_jsonl(
            tmp_path / "pairs.jsonl", [*[row] * DETECTION_ROWS, row | {"input": "A colour"}]
        )
    )
    assert pairs[-1].prompt_text == "Name it.\nA colour"
    assert reader.columns[0]["read"]["input"] == "input"


@pytest.mark.parametrize(
    ("row", "late", "line"),
    [
        (EXPLICIT, {"question": "Name a number."}, "data.column_map=prompt=prompt"),
        (
            EXPLICIT | {"question": None},
            {"question": "Name a number."},
            "data.column_map=prompt=prompt",
        ),
        (EXPLICIT, {"context": "A long text"}, "data.column_map=prompt=prompt"),
        (EXPLICIT, {"messages": [user("Another question")]}, "data.column_map=prompt=prompt"),
        (LISTS, {"prompt": [user("Another question")]}, "data.format=implicit"),
    ],
)
def test_a_column_that_would_change_the_reading_stops_it(
    tmp_path: Path, row: dict[str, Any], late: dict[str, Any], line: str
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [*[row] * DETECTION_ROWS, row | late])
    with pytest.raises(DataError) as raised:
        read(path)
    text = message(raised)
    assert re.search(
        rf"the first row with a value in .+ is pairs\.jsonl:{DETECTION_ROWS + 1}\b", text
    )
    assert line in text
    key, _, value = line.removeprefix("data.").partition("=")
    pairs, _ = read(path, **{key: value if key == "format" else dict([value.split("=")])})
    assert len(pairs) == DETECTION_ROWS + 1


def test_detection_follows_the_many_and_reports_the_odd_row(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "pairs.jsonl", [EXPLICIT, EXPLICIT | {"chosen": [user("?"), bot("a")]}, EXPLICIT]
    )
    pairs, reader = read(path)
    assert (len(pairs), dict(reader.drops.counts)) == (2, {FAULTY: 1})
    assert [fault.where for fault in reader.bad_rows] == ["pairs.jsonl:2, field chosen"]


@pytest.mark.parametrize(
    "odd",
    [
        {"chosen": 3},
        {"chosen": float("nan")},
        {"rejected": ["a", "b"]},
        {"prompt": {"a": 1}},
        {"chosen": [{"role": "nurse", "content": "x"}]},
        {"rejected": [user("x")]},
    ],
)
def test_faulty_rows_are_left_out_up_to_a_share_and_counted(
    tmp_path: Path, odd: dict[str, Any]
) -> None:
    faulty = [EXPLICIT | odd] * 4
    pairs, reader = read(write_jsonl(tmp_path / "pairs.jsonl", [*some_rows(397), *faulty[:3]]))
    assert (len(pairs), dict(reader.drops.counts)) == (397, {FAULTY: 3})
    assert [place.partition(", field ")[0] for place in reader.drops.places[FAULTY]] == [
        f"pairs.jsonl:{line}" for line in (398, 399, 400)
    ]
    assert (
        len(read(write_jsonl(tmp_path / "pairs.jsonl", [*some_rows(396), *faulty]))[0]) == 396
    )  # 1% of 400
    path = write_jsonl(tmp_path / "pairs.jsonl", [*some_rows(395), *faulty])
    with pytest.raises(DataError, match="4 of 399 rows cannot be read") as raised:
        read(path)
    assert f"first {tmp_path.name}" not in message(raised)
    assert "first pairs.jsonl:396" in message(raised)
    assert raised.value.fix.values == {"data.max_bad_rows": 0.011}  # type: ignore[attr-defined]
    assert len(read(path, max_bad_rows=0.011)[0]) == 395


def test_the_papers_filters_never_count_as_faults(tmp_path: Path) -> None:
    rows = [
        EXPLICIT | {"chosen": None},
        EXPLICIT | {"chosen": " "},
        EXPLICIT | {"chosen": EXPLICIT["rejected"]},
    ] * 50
    pairs, reader = read(write_jsonl(tmp_path / "pairs.jsonl", [*some_rows(3), *rows]))
    assert (len(pairs), reader.bad_rows) == (3, [])


def test_a_set_of_which_no_row_can_be_read_stops_however_small(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", some_rows(900))
    other = write_jsonl(
        tmp_path / "b.jsonl", [{**LISTS, "prompt": [{"role": "nurse", "content": "?"}]}]
    )
    with pytest.raises(
        DataError,
        match=r"b.jsonl: 1 of 1 rows cannot be read:\n +1  field prompt\[\].role: 'nurse'",
    ):
        read(f"{one},{other}")


def test_faults_of_a_file_stop_whatever_the_share(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [*some_rows(900), EXPLICIT | {"chosen": 3}])
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match=r"\Apairs.jsonl:902: broken JSON"):
        read(path, max_bad_rows=0.5)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_what_json_does_not_have_is_a_fault_only_where_it_is_read(
    tmp_path: Path, name: str
) -> None:
    ranked = {"prompt": "Name a colour.", "completions": ["Blue.", "Seven."], "scores": [2.0, 1.0]}
    rows = [ranked | {"margin": margin} for margin in (1.0, float("nan"), float("-inf"))]
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    assert len(read(path)[0]) == 3
    path.write_text(path.read_text().replace("2.0", "NaN", 1))
    (fault,) = read(path)[1].bad_rows
    assert "scores[0]: NaN or an infinity, which is not JSON" in str(fault)


def test_a_broken_line_is_named_beside_an_unknown_format(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text": "q"}\n{"text\n')
    with pytest.raises(DataError) as raised:
        read(path)
    assert "pairs.jsonl:2" in message(raised)
    assert "'text'" in str(raised.value)


def test_an_unknown_format_comes_before_the_faults_of_rows(tmp_path: Path) -> None:
    rows = [json.dumps({"ask": f"q {i}?", "good": f"a {i}", "bad": f"b {i}"}) for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows, *["{broken"] * 25]))
    with pytest.raises(DataError, match="26 faults") as raised:
        read(tmp_path / "pairs.jsonl")
    assert "data.column_map=prompt=ask" in message(raised)


@pytest.mark.parametrize(
    "text", ["", " \n\n", "{}", '{"data": []}', '{"prompt": null, "chosen": ""}\n{}']
)
def test_a_set_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(DataError, match="no rows") as raised:
        read(tmp_path / "pairs.jsonl")
    assert "pairs.jsonl" in message(raised)


def test_the_kinds_of_files_agree(tmp_path: Path) -> None:
    rows = some_rows(5)
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "b.parquet")
    write_jsonl(tmp_path / "c.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(tmp_path / "e.json", rows)  # lines, under the other common name
    found = {path.name: read(path) for path in tmp_path.iterdir()}
    assert len(found) == 5
    assert len({reader.sha256 for _, reader in found.values()}) == 1
    assert found["a.csv"][0][4].chosen == "4"  # a number in a csv is text
    # Each csv row takes two lines here, for a cell holds a line break.
    assert {name: pairs[3].where for name, (pairs, _) in found.items()} == {
        "a.csv": "a.csv:8",
        "b.parquet": "b.parquet[3]",
        "c.jsonl": "c.jsonl:4",
        "d.json": "d.json[3]",
        "e.json": "e.json:4",
    }


def test_column_map_wins(tmp_path: Path) -> None:
    rows = [{"prompt": "not this", "question": "q", "chosen": "worse", "rejected": "better"}] * 2
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    swap = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    ((pair, _), _) = read(path, column_map=swap)
    assert (pair.prompt_text, pair.chosen, pair.rejected) == ("q", "better", "worse")
    write_jsonl(
        path, [*rows, EXPLICIT]
    )  # never another column in place of the one that is asked for
    (fault,) = read(path, column_map={"prompt": "question"})[1].bad_rows
    assert str(fault).startswith("pairs.jsonl:3, field question: missing")


@pytest.mark.parametrize(
    ("column_map", "found"),
    [
        (
            {"question": "prompt"},
            [
                "question is not a standard name",
                "swap the two names: data.column_map=prompt=question",
            ],
        ),
        (
            {"good": "chosen", "bad": "rejected"},
            [
                "good and bad are not",
                "swap the two names: data.column_map=chosen=good,rejected=bad",
            ],
        ),
        ({"promt": "question"}, ["'promt'", "did you mean data.column_map=prompt=question"]),
        ({"prompt": "questoin"}, ["'questoin'", "did you mean data.column_map=prompt=question"]),
        (
            {"prompt": "question", "chosen": "zzz", "rejected": "yyy"},
            ["unknown names: 'yyy', 'zzz'", "=prompt=question?"],
        ),
    ],
)
def test_an_unknown_column_is_refused(
    tmp_path: Path, column_map: dict[str, str], found: list[str]
) -> None:
    path = write_jsonl(
        tmp_path / "pairs.jsonl", [{"question": "q", "chosen": "a", "rejected": "b"}]
    )
    with pytest.raises(DataError, match=r"data\.column_map") as raised:
        read(path, column_map=column_map)
    assert [text for text in found if text not in message(raised)] == []


def test_a_format_can_be_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": "one two", "rejected": "one three"}])
    ((pair,), reader) = read(path, format="implicit")
    assert reader.detected == ["detected implicit because data.format says so"]
    assert (pair.prompt_text, pair.chosen) == ("one", " two")


# --- filters


def test_the_papers_filters_are_counted(tmp_path: Path) -> None:
    rows = [
        EXPLICIT,
        EXPLICIT | {"rejected": "Blue."},
        EXPLICIT | {"chosen": " \n"},
        EXPLICIT | {"chosen": ""},
        EXPLICIT | {"rejected": "\t"},
        EXPLICIT | {"chosen": "", "rejected": ""},
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs, reader = read(path)
    assert reader.drops.counts == {EQUAL: 1, EMPTY_CHOSEN: 3, EMPTY_REJECTED: 1}
    assert reader.drops.places == {
        EQUAL: ["pairs.jsonl:2"],
        EMPTY_CHOSEN: ["pairs.jsonl:3", "pairs.jsonl:4", "pairs.jsonl:6"],
        EMPTY_REJECTED: ["pairs.jsonl:5"],
    }
    assert (reader.read, len(pairs)) == (6, 1)
    path = write_jsonl(
        tmp_path / "lists.jsonl", [LISTS, LISTS | {"rejected": [user("other"), bot("b")]}]
    )
    _, reader = read(path)
    assert (reader.drops.counts, reader.drops.places) == (
        {PROMPTS_DIFFER: 1},
        {PROMPTS_DIFFER: ["lists.jsonl:2"]},
    )
    path = write_jsonl(tmp_path / "none.jsonl", rows[1:])
    with pytest.raises(DataError, match="every pair was left out") as raised:
        read(path)
    assert f"3  {EMPTY_CHOSEN}" in message(raised)


def test_prompts_that_ask_nothing_and_turns_that_stand_twice_are_left_out(tmp_path: Path) -> None:
    blank = {"chosen": [user("  "), bot("a")], "rejected": [user("  "), bot("b")]}
    twice = {
        "chosen": [user("q"), user("q"), bot("a")],
        "rejected": [user("q"), user("q"), bot("b")],
    }
    system = {"role": "system", "content": "Be brief."}
    silent = {"chosen": [system, user(""), bot("a")], "rejected": [system, user(""), bot("b")]}
    pairs, reader = read(write_jsonl(tmp_path / "pairs.jsonl", [LISTS, blank, twice, silent]))
    assert len(pairs) == 1
    assert reader.drops.counts == {EMPTY_PROMPT: 2, REPEATED_TURN: 1}
    later = {side: [user("q"), bot("a"), user(" "), bot(side)] for side in ("chosen", "rejected")}
    within = {
        side: [system | {"content": ""}, user("q"), bot(" "), user("q"), bot(side)]
        for side in later
    }
    pairs, reader = read(write_jsonl(tmp_path / "later.jsonl", [LISTS, later, within]))
    assert (len(pairs), reader.drops.counts, reader.remarks["empty_turns"]) == (
        2,
        {EMPTY_PROMPT: 1},
        1,
    )


LISTED = {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]}
JUDGED = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"}


@pytest.mark.parametrize("row", [EXPLICIT, LISTED, EXPLICIT | {"system": "s"}, JUDGED])
def test_a_prompt_that_is_null_is_left_out_as_an_empty_one_is(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    rows = [row, row | {"prompt": None}, row]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    for path in (write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "pairs.parquet"):
        pairs, reader = read(path)
        assert (len(pairs), reader.drops.counts) == (2, {EMPTY_PROMPT: 1})
    write_jsonl(
        tmp_path / "pairs.jsonl",
        [row, {key: value for key, value in row.items() if key != "prompt"}, row],
    )
    (fault,) = read(tmp_path / "pairs.jsonl")[1].bad_rows
    assert str(fault).startswith("pairs.jsonl:2, field prompt: missing")


def test_a_null_prompt_beside_whole_conversations_is_none(tmp_path: Path) -> None:
    row = LISTED | {side: [user("q"), bot(side)] for side in ("chosen", "rejected")}
    pairs, _ = read(write_jsonl(tmp_path / "pairs.jsonl", [row, row | {"prompt": None}, row]))
    assert [pair.messages for pair in pairs] == [(user("q"),)] * 3


def test_words_for_nothing_are_counted(tmp_path: Path) -> None:
    words = ("NULL", "NaN", "None", "nan", "N/A", " null ")
    rows = [EXPLICIT | {side: word} for word in words for side in ("chosen", "rejected")]
    systems = [EXPLICIT | {"system": text} for text in ("None", "Be none.", "")]
    pairs, reader = read(
        write_jsonl(
            tmp_path / "pairs.jsonl", [*rows, *systems, EXPLICIT | {"chosen": "None at all."}]
        )
    )
    assert (len(pairs), reader.remarks["absent_texts"]) == (2 * len(words) + 4, 2 * len(words) + 1)


def test_replies_that_begin_with_the_prompt_again_are_counted(tmp_path: Path) -> None:
    plain = [
        {"prompt": f"Name  colour {i}.", "chosen": f"{i}", "rejected": "no"} for i in range(150)
    ]
    again = [
        {"prompt": "Name a\ncolour.", "chosen": "Name a colour. Blue.", "rejected": "no"},
        {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "\n Name  a\r\ncolour.\tNo."},
        {"prompt": "Name", "chosen": "Names are short.", "rejected": "no"},
        {
            "system": "Be brief.",
            "prompt": "Name one.",
            "chosen": "Be  brief.\nName one. Blue.",
            "rejected": "no",
        },
    ]
    _, reader = read(write_jsonl(tmp_path / "pairs.jsonl", plain + again))
    assert reader.remarks["repeated_prompts"] == 3


def test_what_was_read_and_what_was_not_is_said(tmp_path: Path) -> None:
    rows = [
        {"question": f"{i}?", "good": f"{i}", "rejected": "no", "model": "m", "id": i}
        for i in range(3)
    ]
    _, reader = read(write_jsonl(tmp_path / "pairs.jsonl", rows), column_map={"chosen": "good"})
    (columns,) = reader.columns
    assert columns["format"] == reader.detected[0]
    assert columns["read"] == {"prompt": "question", "chosen": "good", "rejected": "rejected"}
    assert columns["not_read"] == ["model", "id"]


def test_the_first_places_of_a_reason_are_kept(tmp_path: Path) -> None:
    rows = [EXPLICIT | {"chosen": "" if i % 2 else "a"} for i in range(2 * MAX_PLACES + 5)]
    _, reader = read(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert reader.drops.counts[EMPTY_CHOSEN] == MAX_PLACES + 2
    assert reader.drops.places == {
        EMPTY_CHOSEN: [f"pairs.jsonl:{2 * i + 2}" for i in range(MAX_PLACES)]
    }


def test_max_samples_takes_the_first_rows(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "pairs.jsonl", [EXPLICIT | {"chosen": ""}, *some_rows(9), {"not": "read"}]
    )
    pairs, reader = read(path, max_samples=4)
    assert [pair.chosen for pair in pairs] == ["0", "1", "2"]
    assert reader.read == 4
    assert len(read(path, max_samples=10)[0]) == 9


# --- several sets


def test_sets_of_different_formats_are_read_as_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*some_rows(3), EXPLICIT | {"chosen": ""}])
    write_jsonl(
        tmp_path / "b.jsonl", [HH, HH | {"chosen": "\n\nHuman: Name a colour.\n\nAssistant: "}]
    )
    write_jsonl(tmp_path / "c.jsonl", [LISTS])
    names = ",".join(str(tmp_path / f"{name}.jsonl") for name in "abc")
    pairs, reader = read(names)
    assert [pair.where for pair in pairs] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:1",
        "c.jsonl:1",
    ]
    assert [sentence.split()[1] for sentence in reader.detected] == [
        "explicit",
        "hh_rlhf",
        "implicit",
    ]
    assert [sentence.partition(", in ")[2] for sentence in reader.detected] == [
        s.name for s in reader.sources
    ]
    assert (reader.read, reader.drops.counts) == (7, {EMPTY_CHOSEN: 2})
    assert reader.drops.places == {EMPTY_CHOSEN: ["a.jsonl:4", "b.jsonl:2"]}
    assert pairs[3].messages == (user("Name a colour."),)
    # The first rows of each set, not of all together; the order is that of the names.
    assert [pair.where for pair in read(names, max_samples=1)[0]] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "c.jsonl:1",
    ]
    backwards = ",".join(reversed(names.split(",")))
    assert [pair.where[0] for pair in read(backwards)[0]] == ["c", "b", "a", "a", "a"]
    assert read(backwards)[1].sha256 != reader.sha256
    assert [pair.where for pair in read(names.replace(",", " , "))[0]] == [
        pair.where for pair in pairs
    ]


def test_a_set_of_which_nothing_is_left_does_not_stop_the_others(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [EXPLICIT])
    other = write_jsonl(tmp_path / "b.jsonl", [EXPLICIT | {"rejected": "Blue."}])
    pairs, reader = read(f"{one},{other}")
    assert (len(pairs), reader.drops.counts) == (1, {EQUAL: 1})
    with pytest.raises(DataError, match=r"no rows"):
        read(f"{one},{write_jsonl(tmp_path / 'c.jsonl', [])}")


def test_a_mapped_column_has_to_stand_in_one_of_the_sets(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "chosen": "a", "rejected": "b"}])
    other = write_jsonl(tmp_path / "b.jsonl", [EXPLICIT])
    for names in (f"{one},{other}", f"{other},{one}"):
        pairs, _ = read(names, column_map={"prompt": "instruction"})
        assert {pair.where: pair.prompt_text for pair in pairs} == {
            "a.jsonl:1": "q",
            "b.jsonl:1": "Name a colour.",
        }
        with pytest.raises(DataError, match=r"data\.column_map: unknown names: 'instructoin'"):
            read(names, column_map={"prompt": "instructoin"})


def test_sets_of_different_names_share_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fix can be pasted, keeps what is well already, and in the end all is read, held-out
    files included."""
    monkeypatch.chdir(tmp_path)
    texts = [
        (f"{name} is what?", f"Good {i}.", f"Bad {i}.")
        for i, name in enumerate(["Red", "Blue", "Green", "Grey"])
    ]
    for file, names in (
        ("a", "topic,good,bad"),
        ("b", "asked,win,lose"),
        ("c", "prompt,chosen,rejected"),
    ):
        write_jsonl(
            tmp_path / f"{file}.jsonl",
            [dict(zip(names.split(","), row, strict=True)) for row in texts],
        )
    for train, test in (("a,b,c", None), ("c,b,a", None), ("a", "b"), ("c", "a")):
        names = ",".join(f"{file}.jsonl" for file in train.split(","))
        settings: list[str] = [f"data.dataset_name={names}"]
        settings += [f"data.dataset_test_split=./{test}.jsonl"] if test else []
        said: list[str] = []
        for _ in range(3):
            data = load_recipe("demo", [*settings, *said[-1:]]).data
            sources = [*training_sources(data), *held_out_sources(data)]
            try:
                refuse_unknown_columns(data, sources)
                pairs = list(PairReader(data, sources))
                break
            except DataError as error:
                place = (
                    error.where.removeprefix("data.format of ")
                    .removeprefix("./")
                    .removesuffix(".jsonl")
                )
                assert place in ("a", "b")
                (line,) = re.findall(r"data\.column_map=\S+", error.fix)
                said.append(line)
        assert len(said) == len({*train, *(test or "")} & {"a", "b"})
        assert [(pair.prompt_text, pair.chosen, pair.rejected) for pair in pairs] == texts * len(
            sources
        )


def test_a_map_of_another_set_does_not_take_half_a_pair(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [{"topic": "What?", "good": "a", "bad": "b"}])
    other = write_jsonl(tmp_path / "b.jsonl", [EXPLICIT | {"bad": "left over"}])
    with pytest.raises(
        DataError, match=r"data\.column_map of .*b\.jsonl: the map reads rejected from bad"
    ) as raised:
        read(f"{one},{other}", column_map={"prompt": "topic", "chosen": "good", "rejected": "bad"})
    assert "this dataset has no column for chosen and prompt" in message(raised)
    line = raised.value.fix.split()[-1]
    pairs, _ = read(f"{one},{other}", column_map=load_recipe("demo", [line]).data.column_map)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("Blue.", "Seven.")]
    # What such a set lacks may be what it need not have.
    third = write_jsonl(
        tmp_path / "c.jsonl", [{"topic": "What?", "good": "a", "bad": "b", "persona": "Be kind."}]
    )
    column_map = {"prompt": "topic", "chosen": "good", "rejected": "bad", "system": "persona"}
    assert [len(pair.messages) for pair in read(f"{one},{third}", column_map=column_map)[0]] == [
        1,
        2,
    ]


def test_a_table_is_not_read_for_a_column_that_its_head_does_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def read_file(file: Any, faults: list[DataError]) -> Any:
        opened.append(file.label)
        return read_rows(file, faults)

    read_rows = sources_local.read_file
    monkeypatch.setattr(sources_local, "read_file", read_file)
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n" + "q,a,b\n" * 150)
    table = datasets.Dataset.from_list(some_rows(150))
    table.to_parquet(tmp_path / "b.parquet")
    rare = write_jsonl(
        tmp_path / "c.jsonl", [*some_rows(149), EXPLICIT | {"persona": "You are kind."}]
    )
    names = f"{tmp_path / 'a.csv'},{tmp_path / 'b.parquet'},{rare}"
    pairs, _ = read(names, column_map={"system": "persona"})
    assert opened == ["c.jsonl"] * 2 + ["a.csv", "b.parquet", "c.jsonl", "c.jsonl"]
    assert pairs[-1].messages[0] == {"role": "system", "content": "You are kind."}
    # Of several tables in one set any may have the column.
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected,persona\nq,a,b,You are kind.\n")
    pairs, _ = read(f"{tmp_path}/*.csv", column_map={"system": "persona"})
    assert pairs[-1].messages[0]["role"] == "system"
    assert HubSource("a/b", "", "train", table).columns() == {"prompt", "chosen", "rejected"}


def test_a_map_does_not_take_the_place_of_a_pair_that_one_set_alone_has(tmp_path: Path) -> None:
    named = [{"prompt": f"{i}?", "good": "Blue.", "bad": "Seven."} for i in range(3)]
    one, other = write_jsonl(tmp_path / "a.jsonl", named), tmp_path / "b.jsonl"
    write_jsonl(other, [row | {"chosen": "Red.", "rejected": "Eight."} for row in named])
    column_map = {"chosen": "good", "rejected": "bad"}
    with pytest.raises(
        DataError, match=r"b\.jsonl: the map reads chosen and rejected from good and bad, but only"
    ) as raised:
        read(f"{one},{other}", column_map=column_map)
    (line,) = re.findall(r"data\.column_map=[^\s;]+", raised.value.fix)
    pairs, reader = read(f"{one},{other}", column_map=load_recipe("demo", [line]).data.column_map)
    assert [pair.chosen for pair in pairs] == ["Blue."] * 3 + ["Red."] * 3
    assert [columns["read"]["chosen"] for columns in reader.columns] == ["good", "chosen"]
    assert {pair.chosen for pair in read(other, column_map=column_map)[0]} == {
        "Blue."
    }  # alone it is what was said
    write_jsonl(
        one, [row | {"chosen": "Red.", "rejected": "Eight."} for row in named]
    )  # and so it is where both have it
    assert {pair.chosen for pair in read(f"{one},{other}", column_map=column_map)[0]} == {"Blue."}


def test_files_of_different_names_in_one_folder_share_a_map(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl",
        [{"user_query": f"{i}?", "good": "Blue.", "bad": "Seven."} for i in range(3)],
    )
    write_jsonl(
        tmp_path / "b.jsonl",
        [{"task": f"{i}?", "win": "Blue.", "lose": "Seven."} for i in range(3)],
    )
    name, column_map = tmp_path / "*.jsonl", {}
    for _ in range(3):
        with pytest.raises(DataError) as raised:
            read(name, column_map=column_map)
        lines = re.findall(r"data\.\w+=\S+", message(raised))
        data = load_recipe("demo", [f"data.dataset_name={name}", *lines]).data
        name, column_map = ",".join(data.names), data.column_map
    assert [pair.chosen for pair in read(name, column_map=column_map)[0]] == ["Blue."] * 6
    column_map |= {"chosen": ["good", "win"], "rejected": ["bad", "lose"]}
    pairs, reader = read(tmp_path, column_map=column_map)
    assert [pair.chosen for pair in pairs] == ["Blue."] * 6
    columns = reader.columns[0]
    assert columns["read"] == {
        "prompt": "user_query or task",
        "chosen": "good or win",
        "rejected": "bad or lose",
    }
    assert columns["not_read"] == []


@pytest.mark.parametrize("format_", ["auto", "ranked", "hh_rlhf"])
def test_files_of_different_formats_in_one_folder_are_named_one_by_one(
    tmp_path: Path, format_: str
) -> None:
    (tmp_path / "my set").mkdir()
    other = write_jsonl(tmp_path / "other.jsonl", [EXPLICIT])
    ranked = {
        "prompt": "Name a number.",
        "completions": [{"response": "7", "score": 1}, {"response": "a", "score": 0}],
    }
    write_jsonl(
        tmp_path / "my set" / "a.jsonl",
        [HH if format_ == "hh_rlhf" else ranked] * (DETECTION_ROWS + 20),
    )
    write_jsonl(tmp_path / "my set" / "b.jsonl", [EXPLICIT] * (SHOWN + 5))
    with pytest.raises(DataError, match="reads each file in its own format") as raised:
        read(f"{tmp_path / 'my set'},{other}", format=format_)
    (line,) = shlex.split(
        *re.findall(r"fix: (\S.*) reads each file in its own format", str(raised.value))
    )
    pairs, reader = read(",".join(load_recipe("demo", [line]).data.names))
    assert (len(pairs), len(reader.detected)) == (DETECTION_ROWS + 20 + SHOWN + 6, 3)
    write_jsonl(tmp_path / "my set" / "a.jsonl", [{"question": "q", "one": "a", "two": "b"}] * 3)
    write_jsonl(tmp_path / "my set" / "b.jsonl", [{"question": "q", "one": "a", "two": "b"}] * 3)
    with pytest.raises(DataError) as raised:  # of one kind
        read(tmp_path / "my set", format=format_)
    assert "dataset_name=" not in raised.value.fix


def test_a_format_that_fits_no_row_is_one_fault(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [EXPLICIT] * 900)
    with pytest.raises(
        DataError, match=r"900 of 900 rows cannot be read:\n +900  field completions: missing"
    ) as raised:
        read(path, format="ranked")
    assert "data.format=auto" in message(raised)


def test_faults_of_all_sets_come_together(tmp_path: Path) -> None:
    one = write_jsonl(
        tmp_path / "a.jsonl", [EXPLICIT, *[EXPLICIT | {"chosen": 3}] * 4, *[EXPLICIT] * 5]
    )
    other = write_jsonl(tmp_path / "b.jsonl", [*[HH] * 9, *[{"chosen": HH["chosen"]}] * 4])
    with pytest.raises(DataError) as raised:
        read(f"{one},{other}")
    assert "field chosen: a number, first a.jsonl:2" in str(raised.value)
    assert "field rejected: missing" in str(raised.value)
    assert "first b.jsonl:10" in str(raised.value)


def test_what_stands_beside_the_texts_is_counted(tmp_path: Path) -> None:
    def reply(text: str, **more: Any) -> list[dict[str, Any]]:
        return [user("Name a colour."), {"role": "assistant", "content": text, **more}]

    rows = [
        {
            "chosen": reply("Blue.", reasoning_content="A colour?"),
            "rejected": reply("Seven."),
            "tools": [],
        },
        {
            "chosen": reply("Blue."),
            "rejected": reply("Seven.", thinking="A number?"),
            "tools": "[]",
        },
        {
            "chosen": reply("Blue.", reasoning_content=""),
            "rejected": reply("Seven."),
            "tools": None,
        },
        {"chosen": reply("Blue."), "rejected": reply("Seven."), "tools": [{"name": "paint"}]},
        {"chosen": reply("Blue."), "rejected": reply("Seven."), "images": ["a.png"]},
    ]
    pairs, reader = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [pair.has_unread for pair in pairs] == [True, True, False, True, True]
    assert reader.remarks["beside_pairs"] == 4


def test_a_reason_says_what_is_lacking(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,by\nWhat?,a,b,ann\n ,, ,\nWhy?,,,bob\n")
    assert dict(read(path)[1].drops.counts) == {BLANK: 1, EMPTY_CHOSEN: 1}
    chosen = [user("Name a colour."), {"role": "assistant", "content": "Blue."}]
    system = {"role": "system", "content": "Be kind."}
    rows = [{"chosen": chosen, "rejected": [*chosen[:1], {**chosen[1], "content": "Seven."}]}] * 2
    rows.append({"chosen": [system, *rows[0]["chosen"]], "rejected": rows[0]["rejected"]})
    assert dict(read(write_jsonl(tmp_path / "b.jsonl", rows))[1].drops.counts) == {
        SYSTEMS_DIFFER: 1
    }
    nested = write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "data": EXPLICIT}] * 2)
    assert [pair.chosen for pair in read(nested)[0]] == ["Blue."] * 2


# --- one row


def test_a_row_is_found_by_its_place(tmp_path: Path) -> None:
    rows = [*some_rows(12), EXPLICIT | {"chosen": ""}, LISTS]
    one = write_jsonl(tmp_path / "a.jsonl", rows)
    other = write_jsonl(
        tmp_path / "b.jsonl", [HH, HH | {"rejected": HH["rejected"].replace("Name", "Say")}]
    )
    data = section(dataset_name=f"{one},{other}")

    def find(place: str) -> tuple[Pair, str | None]:
        return PairReader(data, training_sources(data)).find(place)

    pair, reason = find("a.jsonl:11")
    assert (pair.where, pair.chosen, reason) == ("a.jsonl:11", "10", None)
    assert find("a.jsonl:13")[1] == EMPTY_CHOSEN
    pair, reason = find("b.jsonl:2")
    assert (pair.where, pair.rejected, reason) == ("b.jsonl:2", "Seven.", PROMPTS_DIFFER)
    with pytest.raises(DataError, match=r"a.jsonl:14, field chosen: a list") as raised:
        find("a.jsonl:14")
    message(raised)
    for nowhere in ("a.jsonl:15", "a.jsonl", "c.jsonl:1", "a.jsonl:1, field chosen", ""):
        with pytest.raises(DataError, match="no such row in ") as raised:
            find(nowhere)
        assert "b.jsonl" in message(raised)


def test_another_rows_fault_is_not_taken_for_that_of_the_place(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        "",
        *(json.dumps(row) for row in [*some_rows(10), {"prompt": "q"}]),
    ]  # line 1 is blank, line 12 faulty
    path.write_text("\n".join(lines))
    data = section(dataset_name=str(path))
    with pytest.raises(DataError, match="no such row"):
        PairReader(data, training_sources(data)).find("pairs.jsonl:1")
    with pytest.raises(DataError, match=r"pairs\.jsonl:12, field"):
        PairReader(data, training_sources(data)).find("pairs.jsonl:12")


# --- the hash


class Given(Source):
    """Rows that are there."""

    def __init__(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__(name, "")
        vars(self)["given"] = rows

    def rows(self, _faults: list[DataError]) -> Any:
        return ((f"{self.name}[{i}]", row) for i, row in enumerate(vars(self)["given"]))

    def with_labels(self, _labels: Mapping[str, str]) -> Source:
        return self

    def fingerprint(self) -> tuple[str, int]:
        raise NotImplementedError

    def columns(self) -> None:
        return None


def sha256(*sets: list[dict[str, Any]], name: str = "given") -> str:
    reader = PairReader(section(), [Given(name, rows) for rows in sets])
    list(reader)
    return reader.sha256


def test_the_hash_is_of_content_and_order() -> None:
    one, two, left_out = EXPLICIT, EXPLICIT | {"chosen": "Red."}, EXPLICIT | {"chosen": ""}
    assert sha256([one, two]) == sha256([one, two], name="elsewhere")
    assert sha256([one, two]) == sha256([one], [two])  # in whichever files
    assert sha256([one, two]) == sha256([one, left_out, two])  # what is left out does not count
    shifted = EXPLICIT | {"chosen": "Blue.S", "rejected": "even."}
    others = [
        [two, one],
        [one],
        [one, two, two],
        [shifted, two],
        [one | {"prompt": "Name a color."}, two],
    ]
    assert len({sha256([one, two]), *map(sha256, others)}) == len(others) + 1


# --- the split by prompt


def split(path: Path, size: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The two sides that hold_out makes of a file's pairs."""
    pairs, _ = read(path)
    return hold_out(pairs, [prompt_key(pair) for pair in pairs], size, seed)


@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(
        lambda prompts: len(set(prompts)) > 2
    ),
    size=st.sampled_from([0.02, 0.3, 0.5, 1, 3]),
    seed=st.integers(0, 5),
)
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_the_split_is_by_prompt(tmp_path: Path, prompts: list[int], size: float, seed: int) -> None:
    # The same prompt in another case and spacing is the same prompt.
    rows = [
        {
            "prompt": f"What is{' ' * (1 + i % 2)}{'N' if i % 3 else 'n'}umber {p}?",
            "chosen": f"{i}",
            "rejected": "no",
        }
        for i, p in enumerate(prompts)
    ]
    counts = [prompts.count(p) for p in set(prompts)]
    assume(
        size < 1 or size <= len(prompts) - max(counts)
    )  # else it may well leave nothing to train on
    train, test = split(write_jsonl(tmp_path / "pairs.jsonl", rows), size, seed)
    sides = [{prompt_key(pair) for pair in side} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert sorted(pair.chosen for pair in train + test) == sorted(row["chosen"] for row in rows)
    if size < 1:
        assert len(sides[1]) == max(1, round(size * len(set(prompts))))
    else:
        assert size <= len(test) < size + max(counts)
    # A pure function of seed and content: the order of the rows changes nothing.
    random.Random(seed).shuffle(rows)
    assert {
        prompt_key(pair)
        for pair in split(write_jsonl(tmp_path / "again.jsonl", rows), size, seed)[1]
    } == sides[1]


def test_the_seed_chooses_the_held_out_prompts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", some_rows(60))
    chosen = [tuple(pair.chosen for pair in split(path, 6, seed)[1]) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) == 3
    for side in split(path, 6, 0):
        places = [int(pair.chosen) for pair in side]
        assert places == sorted(places)  # both sides keep the order of the rows
    assert split(path, 0, 0)[1] == []
    assert len(split(path, 0, 0)[0]) == 60


@pytest.mark.parametrize(("rows", "size"), [(1, 0.02), (5, 5), (5, 0.95)])
def test_too_few_prompts_to_split(tmp_path: Path, rows: int, size: float) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", some_rows(rows))
    with pytest.raises(DataError, match="and leaves none to train on") as raised:
        split(path, size, 0)
    message(raised)


def test_the_key_of_a_prompt() -> None:
    def key(*turns: dict[str, str]) -> bytes:
        return prompt_key(Pair(turns, "a", "b", "x:1"))

    assert key(user("Name a colour.")) == key(user("  name\nA   Colour. "))
    different = [
        key(user("Name a colour.")),
        key(user("Name a colour")),
        key(bot("Name a colour.")),
        key(user("Name"), user("a colour.")),
        key({"role": "system", "content": "S"}, user("Name a colour.")),
    ]
    assert len(set(different)) == len(different)
    assert {len(each) for each in different} == {16}
    # Replies, places and the text form say nothing about it.
    assert prompt_key(Pair((user("q"),), "a", "b", "x:1")) == prompt_key(
        Pair((user("q"),), "c", "d", "y:2", "q")
    )


# --- a held-out set of its own


def test_the_held_out_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", some_rows(4))
    write_jsonl(tmp_path / "held.jsonl", [EXPLICIT])
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", some_rows(3))
    write_jsonl(folder / "test.jsonl", some_rows(2))
    assert held_out_sources(section(dataset_name="train.jsonl")) == []
    # A file, another folder, and a split of the training set by its name.
    assert [
        pair.where
        for pair in held_out(section(dataset_name="train.jsonl", dataset_test_split="held.jsonl"))
    ] == ["held.jsonl:1"]
    assert (
        len(held_out(section(dataset_name="train.jsonl", dataset_test_split="./set/test.jsonl")))
        == 2
    )
    assert len(held_out(section(dataset_name="set", dataset_test_split="test"))) == 2
    # A bare word is a split, even when a folder of that name stands near by.
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test" / "train.jsonl", some_rows(9))
    assert len(held_out(section(dataset_name="set", dataset_test_split="test"))) == 2


def test_a_held_out_set_may_have_our_names_already(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "held.jsonl", some_rows(2))
    data = section(
        dataset_name="train.jsonl",
        dataset_test_split=str(path),
        column_map={"prompt": "question", "chosen": "good"},
    )
    assert [pair.chosen for pair in held_out(data)] == ["0", "1"]


def test_the_held_out_split_of_several_sets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", some_rows(2))
        write_jsonl(tmp_path / name / "dev.jsonl", [EXPLICIT])
    data = section(dataset_name=f"{tmp_path / 'a'},{tmp_path / 'b'}", dataset_test_split="dev")
    assert len(held_out(data)) == 2
    (tmp_path / "b" / "dev.jsonl").unlink()
    with pytest.raises(DataError, match="no file of split 'dev'") as raised:
        held_out(data)
    message(raised)


def test_the_same_rows_are_not_read_twice(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [EXPLICIT])
    (tmp_path / "link.jsonl").symlink_to(path)
    for other in (path, tmp_path / "link.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=r"jsonl: named twice") as raised:
            training_sources(section(dataset_name=f"{path},{other}"))
        assert isinstance(raised.value.fix, Overrides)
        once = raised.value.fix.values["data.dataset_name"]
        assert len(training_sources(section(dataset_name=once))) == 1


def test_a_split_of_a_single_file_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", some_rows(3))
    for split in ("auto", "train"):
        assert (
            len(training_sources(section(dataset_name=str(path), dataset_train_split=split))) == 1
        )
    with pytest.raises(DataError, match=r"data.dataset_train_split: 'foo'") as raised:
        training_sources(section(dataset_name=str(path), dataset_train_split="foo"))
    assert "single files have no splits" in message(raised)


def test_a_single_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "test.jsonl", [EXPLICIT])
    path = write_jsonl(tmp_path / "train.jsonl", some_rows(3))
    for names in (path, f"{tmp_path / 'set'},{path}"):
        with pytest.raises(DataError, match="'test'") as raised:
            held_out_sources(section(dataset_name=str(names), dataset_test_split="test"))
        assert "train.jsonl has no splits" in message(raised)
    split = raised.value.fix.removeprefix("data.dataset_test_split=")  # that of the set beside it
    assert len(held_out_sources(section(dataset_name=str(names), dataset_test_split=split))) == 1


@pytest.mark.parametrize("split", ["test", "{}/test.jsonl"])
def test_what_a_pattern_takes_is_not_held_out_as_well(tmp_path: Path, split: str) -> None:
    for name in ("train", "more", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", some_rows(3))
    with pytest.raises(
        DataError, match=r"test\.jsonl: used for training, but also held out"
    ) as raised:
        training_sources(
            section(dataset_name=f"{tmp_path}/*.jsonl", dataset_test_split=split.format(tmp_path))
        )
    data = load_recipe("demo", shlex.split(message(raised).partition("fix: ")[2])).data
    assert data.names == [f"{tmp_path}/more.jsonl", f"{tmp_path}/train.jsonl"]
    assert len(training_sources(data)) == 2
    assert [pair.where for pair in held_out(data)] == [f"test.jsonl:{line}" for line in (1, 2, 3)]


# --- the hub


def test_a_hub_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(
            some_rows(3) if kwargs["split"] == "train" else [EXPLICIT]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = section(
        dataset_name="someone/pairs",
        dataset_config="en",
        dataset_train_split="train",
        dataset_test_split="test",
    )
    pairs = [*PairReader(data, training_sources(data)), *held_out(data)]
    assert asked == [(("someone/pairs", "en"), {"split": split}) for split in ("train", "test")]
    assert [pair.where for pair in pairs] == ["train[0]", "train[1]", "train[2]", "test[0]"]
    assert PairReader(data, training_sources(data)).find("train[1]")[0].chosen == "1"


def test_a_hub_fault_names_the_set_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Unknown split \"train\". Should be one of ['train_prefs'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(HubError) as raised:
        read("o/split", dataset_train_split="train")
    assert "data.dataset_train_split=train_prefs" in message(raised)
    assert "o/split" in raised.value.where


def test_rows_with_tools_are_one_fault_with_their_count(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}],
    }
    asked = [user("q"), call, {"role": "tool", "content": "21"}]
    rows = [LISTS] * 2 + [{"chosen": [*asked, bot("a")], "rejected": [*asked, bot("b")]}] * 30
    rows += [
        {
            "chosen": [user("q"), {"role": "tool", "content": "21"}, bot("a")],
            "rejected": LISTS["rejected"],
        }
    ]
    with pytest.raises(DataError) as raised:
        read(write_jsonl(tmp_path / "tools.jsonl", rows))
    text = message(raised)
    assert "31 of 33 rows cannot be read" in text
    assert "30  field chosen[]: a tool call, first tools.jsonl:3" in text
    assert "1  field chosen[]: 'tool', a tool's turn, first tools.jsonl:33" in text
    assert "remove the rows with tools, or write each call and its result as text" in text


def test_a_call_of_no_tool_is_none(tmp_path: Path) -> None:
    plain = [user("q"), {**bot("a"), "tool_calls": [], "function_call": None}]
    pairs, _ = read(write_jsonl(tmp_path / "plain.jsonl", [LISTS | {"chosen": plain}] * 2))
    assert [pair.chosen for pair in pairs] == ["a", "a"]


@pytest.mark.parametrize("column", ["chat_history", "messages", "dialog"])
def test_turns_that_come_late_are_not_left_out_unsaid(tmp_path: Path, column: str) -> None:
    turns = [user("Hi"), bot("Hello.")]
    path = write_jsonl(
        tmp_path / "pairs.jsonl", [*some_rows(DETECTION_ROWS + 5), EXPLICIT | {column: turns}]
    )
    with pytest.raises(
        DataError,
        match=rf"{column} is not read, but holds turns that no other column has; the first row ",
    ) as raised:
        read(path)
    assert f"data.column_map=history={column} to put them in front" in message(raised)
    pairs, _ = read(path, column_map={"history": column})
    assert [len(pair.messages) for pair in pairs[-2:]] == [1, 3]
    assert len(read(path, column_map={"prompt": "prompt"})[0]) == DETECTION_ROWS + 6


def test_a_conversation_that_comes_late_is_not_left_out_by_the_name_of_the_format(
    tmp_path: Path,
) -> None:
    rows = [
        *some_rows(DETECTION_ROWS + 20),
        EXPLICIT | {"messages": [user("Hi"), bot("Hello."), user(EXPLICIT["prompt"])]},
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError, match=r"fix: data\.format=explicit"):
        read(path)
    with pytest.raises(
        DataError, match=r"fix: data\.column_map=conversation=messages to put them in front"
    ):
        read(path, format="explicit")
    pairs, _ = read(path, column_map={"history": "messages"})
    assert [len(pair.messages) for pair in pairs[-2:]] == [1, 3]


def test_the_lines_for_a_rival_that_comes_late_work_when_pasted(tmp_path: Path) -> None:
    late = [
        row | {"context": "Some background."} if i >= 100 else row
        for i, row in enumerate(some_rows(150))
    ]
    file = write_jsonl(tmp_path / "late.jsonl", late)
    with pytest.raises(DataError, match=r"the first row with a value in context is late.jsonl:101"):
        read(file)
    pairs, _ = read(file, column_map={"prompt": "prompt", "input": "context"})
    assert pairs[120].messages[-1]["content"].endswith("\nSome background.")
    pairs, reader = read(file, column_map={"prompt": "prompt"})
    assert "background" not in pairs[120].messages[-1]["content"]
    assert reader.columns[0]["not_read"] == ["context"]
