"""The data wing: every format, every bad input, the split by prompt, and tokens that are exact at both ends."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from orpo_lite.data import rows as data_rows
from orpo_lite.data.formats import PROMPTS_DIFFER, READERS, Pair, detect_format
from orpo_lite.data.pairs import (
    CUT,
    EMPTY_CHOSEN,
    EMPTY_REJECTED,
    EQUAL,
    EQUAL_CUT,
    LONG_PROMPT,
    NO_ROOM,
    REWRITTEN,
    SPECIAL,
    data_hash,
    end_token_id,
    hold_out,
    prompt_key,
    read_pairs,
    set_chat_template,
    tokenize_pairs,
)
from orpo_lite.errors import DataError, HubError, ModelError, OrpoLiteError, RecipeError
from orpo_lite.recipe import DataSection

EXPLICIT = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}


def section(**fields: Any) -> DataSection:
    return DataSection(**{"dataset_name": "pairs.jsonl", **fields})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def message(raised: pytest.ExceptionInfo[OrpoLiteError]) -> str:
    """The text of an error that says all three: the place, what was expected, and what to do."""
    text = str(raised.value)
    assert "expected: " in text
    assert "remedy: " in text
    return text


# --- formats

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant:"
TURNS = (user("Hi"), bot("Hello."), user("Name a colour."))

FORMS: dict[str, tuple[str, dict[str, Any], tuple[dict[str, str], ...]]] = {
    "explicit texts": ("explicit", EXPLICIT, TURNS[2:]),
    "explicit lists": (
        "explicit",
        {"prompt": [*TURNS], "chosen": [bot("Blue.")], "rejected": [bot("Seven.")]},
        TURNS,
    ),
    "explicit lists that repeat the prompt": (
        "explicit",
        {"prompt": [*TURNS], "chosen": [*TURNS, bot("Blue.")], "rejected": [*TURNS, bot("Seven.")]},
        TURNS,
    ),
    "implicit lists": ("implicit", {"chosen": [*TURNS, bot("Blue.")], "rejected": [*TURNS, bot("Seven.")]}, TURNS),
    "implicit lists with a system turn": (
        "implicit",
        {
            side: [{"role": "system", "content": "Be brief."}, TURNS[2], bot(EXPLICIT[side])]
            for side in ("chosen", "rejected")
        },
        ({"role": "system", "content": "Be brief."}, TURNS[2]),
    ),
    "ultrafeedback binarized": (
        "messages",
        {
            "prompt": "Name a colour.",
            "prompt_id": "1f",
            "chosen": [TURNS[2], bot("Blue.")],
            "rejected": [TURNS[2], bot("Seven.")],
            "messages": [TURNS[2], bot("Blue.")],
            "score_chosen": 8.5,
        },
        TURNS[2:],
    ),
    "ultrafeedback binarized with a system turn": (
        "messages",
        {
            "prompt": "Name a colour.",
            "chosen": [{"role": "system", "content": "Be brief."}, TURNS[2], bot("Blue.")],
            "rejected": [{"role": "system", "content": "Be brief."}, TURNS[2], bot("Seven.")],
        },
        ({"role": "system", "content": "Be brief."}, TURNS[2]),
    ),
    "a prompt text with replies alone in lists": (
        "messages",
        {"prompt": "Name a colour.", "chosen": [bot("Blue.")], "rejected": [bot("Seven.")]},
        TURNS[2:],
    ),
    "hh-rlhf": ("hh_rlhf", {"chosen": f"{HH} Blue.", "rejected": f"{HH} Seven."}, TURNS),
    "hh-rlhf without its first blank line": (
        "hh_rlhf",
        {"chosen": f"{HH[2:]} Blue.", "rejected": f"{HH[2:]} Seven."},
        TURNS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_format_is_detected_and_read(form: str) -> None:
    name, row, messages = FORMS[form]
    detected = detect_format([row] * 3)
    assert detected.name == name
    assert detected.sentence.startswith(f"detected {name} because ")
    pair = detected.read(row, "pairs.jsonl:1")
    assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (messages, "Blue.", "Seven.", None)
    assert pair == READERS[name](row, "pairs.jsonl:1")


def test_implicit_texts_share_whole_words() -> None:
    row = {"chosen": "The sky is blue and wide", "rejected": "The sky is black"}
    detected = detect_format([row])
    assert detected.name == "implicit"
    pair = detected.read(row, "x:1")
    assert (pair.prompt_text, pair.chosen, pair.rejected) == ("The sky is", " blue and wide", " black")
    assert READERS["implicit"]({"chosen": "one", "rejected": "two"}, "x:1").drop == PROMPTS_DIFFER


def test_hh_rlhf_traps() -> None:
    def read(chosen: str, rejected: str) -> Pair:
        return READERS["hh_rlhf"]({"chosen": chosen, "rejected": rejected}, "x:1")

    # The last marker counts; "Human:" within a turn is text; two turns of one role are joined.
    pair = read(
        "\n\nHuman: I said:\nHuman: no\n\nHuman: And?\n\nAssistant: a\n\nAssistant:  two spaces",
        "\n\nHuman: I said:\nHuman: no\n\nHuman: And?\n\nAssistant: a\n\nAssistant: b",
    )
    assert pair.messages == (user("I said:\nHuman: no\n\nAnd?"), bot("a"))
    assert (pair.chosen, pair.rejected) == (" two spaces", "b")
    assert pair.prompt_text is not None
    assert (
        pair.prompt_text + pair.chosen
        == "\n\nHuman: I said:\nHuman: no\n\nHuman: And?\n\nAssistant: a\n\nAssistant:  two spaces"
    )
    # A prompt that differs is counted, never an error.
    assert read(f"{HH} Blue.", f"{HH.replace('Hi', 'Ho')} Seven.").drop == PROMPTS_DIFFER
    # An empty reply is a single space, which belongs to the marker.
    assert read(f"{HH} ", f"{HH} Seven.").chosen == ""
    # Without that space on both sides, nothing is taken from the reply.
    assert read(f"{HH}Blue.", f"{HH} Seven.").rejected == " Seven."


def test_detection_follows_the_many_and_reports_the_odd_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [EXPLICIT, EXPLICIT | {"chosen": [user("?"), bot("a")]}, EXPLICIT])
    with pytest.raises(DataError, match=r"pairs.jsonl:2, field chosen: a list") as raised:
        read_pairs(section(dataset_name=str(path), test_split_size=0))
    message(raised)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "q", "good": "a", "bad": "b"}, "data.column_map=prompt=question,chosen=good,rejected=bad"),
        ({"text": "q", "label": 1}, "data.column_map=prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"),
        # Two readings: the texts begin alike by chance, and a column looks like the prompt.
        ({"question": "q", "chosen": "It is so", "rejected": "It is no"}, "data.column_map=prompt=question"),
        ({"chosen": "yes", "rejected": "no"}, "data.column_map=prompt=COLUMN"),
        ({"prompt": "q", "chosen": 3, "rejected": "no"}, "data.column_map=chosen=COLUMN"),
        ({"prompt": "q", "chosen": [{"from": "gpt", "value": "a"}], "rejected": []}, "data.column_map="),
    ],
)
def test_what_fits_nothing_is_refused_with_the_line_to_write(row: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError) as raised:
        detect_format([row, row])
    assert line in message(raised)
    assert all(repr(column) in str(raised.value) for column in row)


LISTS = {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}


@pytest.mark.parametrize(
    ("form", "row", "place"),
    [
        ("explicit", {"prompt": "q", "chosen": "a"}, "field rejected: missing; the columns are 'prompt', 'chosen'"),
        ("explicit", EXPLICIT | {"chosen": None}, "field chosen: null"),
        ("explicit", EXPLICIT | {"chosen": 3}, "field chosen: a number"),
        ("explicit", EXPLICIT | {"chosen": True}, "field chosen: true or false"),
        ("explicit", EXPLICIT | {"prompt": {"a": 1}}, "field prompt: an object"),
        ("explicit", EXPLICIT | {"prompt": "\ud800"}, "field prompt: a lone surrogate"),
        ("implicit", LISTS | {"chosen": [user("q")]}, "field chosen: the last turn is the user's"),
        ("implicit", LISTS | {"chosen": [bot("a")], "rejected": [bot("b")]}, "nothing stands before the reply"),
        ("implicit", LISTS | {"chosen": [{"role": "gpt", "content": ""}]}, "field chosen[0].role: 'gpt'"),
        ("implicit", LISTS | {"chosen": [user("q"), {"role": "assistant"}]}, "field chosen[1].content: missing"),
        (
            "implicit",
            LISTS | {"chosen": [user("q"), {"role": "assistant", "content": None}]},
            "chosen[1].content: null",
        ),
        ("implicit", LISTS | {"chosen": ["q"]}, "field chosen[0]: a text"),
        ("messages", LISTS | {"rejected": []}, "field rejected: an empty list"),
        ("messages", {"chosen": [bot("a")], "rejected": [bot("b")]}, "field prompt: missing"),
        ("hh_rlhf", {"chosen": HH, "rejected": "Hello."}, "field rejected: there is no assistant turn"),
        ("hh_rlhf", {"chosen": HH, "rejected": "Hi" + HH}, "field rejected: the text does not begin with a turn"),
        ("hh_rlhf", {"chosen": HH, "rejected": HH + "\n\nHuman: bye"}, "field rejected: the last turn is the human's"),
    ],
)
def test_a_faulty_row_is_named(form: str, row: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError) as raised:
        READERS[form](row, "pairs.jsonl:7")
    text = message(raised)
    assert text.startswith("pairs.jsonl:7, field ")
    assert place in text


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [EXPLICIT] * 3 + [EXPLICIT | {"chosen": None}] * 25)
    with pytest.raises(DataError) as raised:
        read_pairs(section(dataset_name=str(path), format="explicit"))
    text = message(raised)
    assert text.startswith("25 faults:")
    assert "pairs.jsonl:4," in text
    assert text.count("field chosen: null") == 20
    assert text.endswith("... and 5 more")


def test_what_fits_nothing_does_not_hide_broken_lines(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": null}\n{oops\n')
    with pytest.raises(DataError) as raised:
        read_pairs(section(dataset_name=str(tmp_path / "pairs.jsonl")))
    assert "pairs.jsonl:2: broken JSON at column 2" in message(raised)
    assert "rejected is null" in str(raised.value)


def test_a_prompt_column_of_nulls_is_no_prompt() -> None:
    assert detect_format([LISTS | {"prompt": None}]).name == "implicit"


# --- files


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"prompt": "q" "chosen": "a"}', "pairs.jsonl:2: broken JSON at column 16: Expecting ',' delimiter"),
        (b'{"prompt": "q", "chosen": "a', "pairs.jsonl:2: broken JSON at column 27: Unterminated string"),
        (b'{"prompt": "q", "chosen": NaN}', "pairs.jsonl:2: NaN is not JSON"),
        (b'{"prompt": "q", "prompt": "p"}', "pairs.jsonl:2: the key 'prompt' stands twice"),
        (b'"prompt"', "pairs.jsonl:2: not a JSON object"),
        (b"[1]", "pairs.jsonl:2: not a JSON object"),
        (b"[" * 200_000, "pairs.jsonl:2: "),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "pairs.jsonl:2: "),
        ('{"prompt": "ü'.encode() + b'\xfc"}', "pairs.jsonl:2: byte 0xfc at column 14 is not UTF-8"),
        (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "pairs.jsonl:2, field prompt: a lone surrogate"),
    ],
)
def test_a_broken_line_is_placed(tmp_path: Path, line: bytes, found: str) -> None:
    good = json.dumps(EXPLICIT).encode()
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join([good, line, good, b""]))
    with pytest.raises(DataError) as raised:
        read_pairs(section(dataset_name=str(tmp_path / "pairs.jsonl"), test_split_size=0))
    assert found in message(raised)


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_line_escapes_as_a_traceback(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(EXPLICIT).encode() + b"\n" + line)
    try:
        assert read_pairs(section(dataset_name=str(path), test_split_size=0)).train
    except DataError as error:
        assert "pairs.jsonl:" in str(error)  # noqa: PT017 - either outcome is right


def test_a_file_with_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(EXPLICIT).encode() + b"\r\n\n  \n" + json.dumps(EXPLICIT).encode())
    found = read_pairs(section(dataset_name=str(path), test_split_size=0))
    assert [pair.where for pair in found.train] == ["pairs.jsonl:1", "pairs.jsonl:4"]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("pairs.jsonl", "", "no rows"),
        ("pairs.jsonl", " \n\n", "no rows"),
        ("pairs.csv", "prompt,chosen,rejected\n", "no rows"),
        ("pairs.jsonl", "[\n{}]", "rename the file to pairs.json"),
        ("pairs.json", '[{"prompt": "q"},\n 3]', "pairs.json[1]: not a JSON object"),
        ("pairs.json", '[{"prompt": "q"},\n oops]', "broken JSON at line 2, column 2"),
        ("pairs.txt", "hello", "an unknown kind of file"),
        ("pairs.parquet", "hello", "broken parquet"),
        ("pairs.csv", "prompt,chosen,rejected\nq,a\n", "pairs.csv:2: 2 cells"),
        ("pairs.csv", 'prompt,chosen,rejected\nq,"a,b\n', "broken csv"),
        ("pairs.csv", "prompt,chosen,chosen\nq,a,b\n", "two columns of one name"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, name: str, content: str, found: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as raised:
        read_pairs(section(dataset_name=str(tmp_path / name)))
    assert found in message(raised)
    assert "pairs." in str(raised.value)


def test_a_missing_file_has_nearest_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "preferences.jsonl", [EXPLICIT])
    with pytest.raises(DataError, match=r"did you mean preferences.jsonl\?") as raised:
        read_pairs(section(dataset_name=str(tmp_path / "preference.jsonl")))
    message(raised)
    with pytest.raises(DataError, match="is not a folder"):
        read_pairs(section(dataset_name=str(tmp_path / "nowhere" / "pairs.jsonl")))


def test_a_line_over_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_rows, "MAX_ROW_BYTES", 1 << 20)
    (tmp_path / "pairs.jsonl").write_bytes(b'{"prompt": "' + b"a" * (1 << 20))
    with pytest.raises(DataError, match="at most 1 MiB a row"):
        read_pairs(section(dataset_name=str(tmp_path / "pairs.jsonl")))


def some_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {i}?", "chosen": f"{i}", "rejected": f'"no",\n{i}'} for i in range(count)]


def test_the_kinds_of_files_agree(tmp_path: Path) -> None:
    rows = some_rows(5)
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "b.parquet")
    write_jsonl(tmp_path / "c.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(tmp_path / "e.json", rows)  # lines, under the other common name
    found = {p.name: read_pairs(section(dataset_name=str(p), test_split_size=0)) for p in tmp_path.iterdir()}
    assert len(found) == 5
    assert len({pairs.sha256 for pairs in found.values()}) == 1
    assert found["a.csv"].train[4].chosen == "4"  # a number in a csv is text
    places = {name: pairs.train[3].where for name, pairs in found.items()}
    # Each csv row takes two lines here, for a cell holds a line break.
    assert places == {
        "a.csv": "a.csv:8",
        "b.parquet": "b.parquet[3]",
        "c.jsonl": "c.jsonl:4",
        "d.json": "d.json[3]",
        "e.json": "e.json:4",
    }


def test_a_folder_has_splits(tmp_path: Path) -> None:
    for name, rows in {"train-00000-of-00002": some_rows(4)[:2], "train-00001-of-00002": some_rows(4)[2:]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    write_jsonl(tmp_path / "training_notes.jsonl", [EXPLICIT])
    write_jsonl(tmp_path / "test.jsonl", [EXPLICIT])
    found = read_pairs(section(dataset_name=str(tmp_path), dataset_test_split="test"))
    assert (len(found.train), len(found.test), found.read) == (4, 1, 5)
    with pytest.raises(DataError, match=r"no file of split 'dev'; files: test.jsonl, train-0"):
        read_pairs(section(dataset_name=str(tmp_path), dataset_train_split="dev"))


def test_column_map_wins(tmp_path: Path) -> None:
    rows = [{"prompt": "not this", "question": "q", "chosen": "worse", "rejected": "better"}] * 2
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    swap = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    (pair, _) = read_pairs(section(dataset_name=str(path), column_map=swap, test_split_size=0)).train
    assert (pair.prompt_text, pair.chosen, pair.rejected) == ("q", "better", "worse")
    write_jsonl(path, [*rows, EXPLICIT])  # never another column in place of the one that is asked for
    with pytest.raises(DataError, match=r"pairs.jsonl:3, field prompt: missing"):
        read_pairs(section(dataset_name=str(path), column_map={"prompt": "question"}))
    for column_map, found in [({"promt": "question"}, "did you mean 'prompt'"), ({"prompt": "questoin"}, "'question'")]:
        with pytest.raises(DataError) as raised:
            read_pairs(section(dataset_name=str(path), column_map=column_map))
        assert found in message(raised)


# --- filters and the split


def test_the_papers_filters_are_counted(tmp_path: Path) -> None:
    rows = [
        EXPLICIT,
        EXPLICIT | {"rejected": "Blue."},
        EXPLICIT | {"chosen": " \n"},
        EXPLICIT | {"chosen": ""},
        EXPLICIT | {"rejected": "\t"},
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = read_pairs(section(dataset_name=str(path), test_split_size=0))
    assert found.drops == {EQUAL: 1, EMPTY_CHOSEN: 2, EMPTY_REJECTED: 1}
    assert (found.read, len(found.train)) == (5, 1)
    lists = [LISTS, LISTS | {"rejected": [user("other"), bot("b")]}]
    path = write_jsonl(tmp_path / "lists.jsonl", lists)
    assert read_pairs(section(dataset_name=str(path), test_split_size=0)).drops == {PROMPTS_DIFFER: 1}
    path = write_jsonl(tmp_path / "none.jsonl", rows[1:])
    with pytest.raises(DataError) as raised:
        read_pairs(section(dataset_name=str(path)))
    assert f"2  {EMPTY_CHOSEN}" in message(raised)


def test_max_samples_takes_the_first_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [EXPLICIT | {"chosen": ""}, *some_rows(9)])
    found = read_pairs(section(dataset_name=str(path), max_samples=4, test_split_size=0))
    assert [pair.chosen for pair in found.train] == ["0", "1", "2"]
    assert found.read == 4


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_with_other_separators_is_named(tmp_path: Path, mark: str) -> None:
    (tmp_path / "pairs.csv").write_text(mark.join(["prompt", "chosen", "rejected"]) + "\n" + mark.join("abc") + "\n")
    with pytest.raises(DataError, match=r"pairs\.csv:1: one column") as raised:
        read_pairs(section(dataset_name=str(tmp_path / "pairs.csv")))
    assert "cells separated by commas" in str(raised.value)


def test_a_row_without_a_field_is_mended_before_columns_are_renamed(tmp_path: Path) -> None:
    rows = [*some_rows(3), {"prompt": "a?", "chosen": "b"}]
    with pytest.raises(DataError) as raised:
        read_pairs(section(dataset_name=str(write_jsonl(tmp_path / "pairs.jsonl", rows))))
    assert "pairs.jsonl:4, field rejected" in str(raised.value)
    assert "remedy: mend or remove the row; if every row" in str(raised.value)


def split(data: DataSection, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The two sides that hold_out makes of a file's pairs."""
    pairs = read_pairs(data).train
    return hold_out(pairs, [prompt_key(pair) for pair in pairs], data.test_split_size, seed)


@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda prompts: len(set(prompts)) > 2),
    size=st.sampled_from([0.02, 0.3, 0.5, 1, 3]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_split_is_by_prompt(tmp_path: Path, prompts: list[int], size: float, seed: int) -> None:
    # The same prompt in another case and spacing is the same prompt.
    rows = [
        {"prompt": f"What is{' ' * (1 + i % 2)}{'N' if i % 3 else 'n'}umber {p}?", "chosen": f"{i}", "rejected": "no"}
        for i, p in enumerate(prompts)
    ]
    data = section(dataset_name=str(write_jsonl(tmp_path / "pairs.jsonl", rows)), test_split_size=size)
    counts = [prompts.count(p) for p in set(prompts)]
    assume(size < 1 or size <= len(prompts) - max(counts))  # else it may well leave nothing to train on
    train, test = split(data, seed)
    sides = [{prompt_key(pair) for pair in side} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert len(train) + len(test) == len(rows)
    if size < 1:
        assert len(sides[1]) == max(1, round(size * len(set(prompts))))
    else:
        assert size <= len(test) < size + max(counts)
    # A pure function of seed and content: the order of the rows changes nothing.
    random.Random(seed).shuffle(rows)
    shuffled = data.model_copy(update={"dataset_name": str(write_jsonl(tmp_path / "again.jsonl", rows))})
    assert {prompt_key(pair) for pair in split(shuffled, seed)[1]} == sides[1]


def test_the_seed_chooses_the_held_out_prompts(tmp_path: Path) -> None:
    data = section(dataset_name=str(write_jsonl(tmp_path / "pairs.jsonl", some_rows(60))), test_split_size=6)
    chosen = [tuple(pair.chosen for pair in split(data, seed)[1]) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) == 3
    assert list(map(int, chosen[0])) == sorted(map(int, chosen[0]))  # both sides keep the order of the rows
    assert split(section(dataset_name=data.dataset_name, test_split_size=0), 0)[1] == []


@pytest.mark.parametrize(("rows", "size"), [(1, 0.02), (5, 5), (5, 0.95)])
def test_too_few_prompts_to_split(tmp_path: Path, rows: int, size: float) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", some_rows(rows))
    with pytest.raises(DataError, match="leaves none to train on") as raised:
        split(section(dataset_name=str(path), test_split_size=size), 0)
    message(raised)


def test_a_prompt_on_both_given_sides_is_an_error(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [*some_rows(6), some_rows(6)[3]])
    test = write_jsonl(tmp_path / "held.jsonl", [EXPLICIT, {"prompt": "question  3?", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError) as raised:
        read_pairs(section(dataset_name=str(train), dataset_test_split=str(test)))
    assert "held-out pair held.jsonl:2: the same prompt as in the training pair train.jsonl:4" in message(raised)
    write_jsonl(test, [EXPLICIT])
    found = read_pairs(section(dataset_name=str(train), dataset_test_split=str(test)))
    assert (len(found.train), len(found.test)) == (7, 1)
    with pytest.raises(DataError, match="a single file has no splits"):
        read_pairs(section(dataset_name=str(train), dataset_test_split="test"))


def test_the_hash_is_of_content_and_order() -> None:
    one, two = (Pair((user("q"),), chosen, "b", where) for chosen, where in (("a", "x:1"), ("c", "x:2")))
    assert data_hash([one, two]) == data_hash([Pair(one.messages, "a", "b", "elsewhere:9"), two])
    others = [[two, one]], [[one], [two]], [[one]], [[Pair((user("q"),), "ab", "", "x:1"), two]]
    assert len({data_hash([one, two]), *(data_hash(*sides) for sides in others)}) == 5


# --- the hub


def test_a_hub_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(some_rows(3) if kwargs["split"] == "train" else [EXPLICIT])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = section(dataset_name="someone/pairs", dataset_config="en", dataset_test_split="test")
    found = read_pairs(data)
    assert asked == [(("someone/pairs", "en"), {"split": split}) for split in ("train", "test")]
    assert [pair.where for pair in found.train + found.test] == ["train[0]", "train[1]", "train[2]", "test[0]"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ValueError("Unknown split \"train\". Should be one of ['train_prefs']."), "data.dataset_train_split=SPLIT"),
        (ValueError("Config name is missing."), "data.dataset_config=CONFIG"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/split' is a gated dataset on the Hub."), "hf auth login"),
        (ConnectionError("Couldn't reach 'o/split' on the Hub"), "hf download --repo-type dataset o/split"),
        (TimeoutError(), "hf download --repo-type dataset o/split"),
    ],
)
def test_a_hub_fault_names_the_set_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(HubError) as raised:
        read_pairs(section(dataset_name="o/split"))
    assert remedy in message(raised)
    assert "o/split" in raised.value.where


# --- tokenizers like those in the wild, trained on the spot

CORPUS = [
    "Name a colour. Blue. Seven. hello Hello  there the quick brown fox",
    "user assistant system 0 1 2 ab abab",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


ASKED = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama-3, Qwen: no BOS, any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama-2 and Mistral: BOS by default, a dummy space after the start and every special token, byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False)
    )
    # The trainer made the bytes special too; only the first three are.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: [CLS] before and [SEP] after by default, spaces and case lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [*CORPUS, "< | > \n . ?"],
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials, show_progress=False),
    )
    pieces = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pieces)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level, trimmed offsets": lambda: byte_level(True),
    "sentencepiece": sentencepiece_like,
    "word-piece": word_piece,
}


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MAKERS[request.param]()


@pytest.fixture
def bpe() -> PreTrainedTokenizerFast:
    return byte_level(False)


@pytest.fixture
def piece() -> PreTrainedTokenizerFast:
    return sentencepiece_like()


def colour(prompt: str = "Name a colour.", chosen: str = "Blue.", rejected: str = "Seven.") -> Pair:
    return Pair((user(prompt),), chosen, rejected, "x:1", prompt_text=prompt)


def split_text(tokenizer: PreTrainedTokenizerFast, pair: Pair, **fields: Any) -> tuple[str, str]:
    """(prompt, chosen response) as the tokens decode."""
    data = section(**fields)
    set_chat_template(tokenizer, data)
    ((tokens,), _) = tokenize_pairs([pair], tokenizer, data)
    start = tokens.chosen_start
    return tokenizer.decode(tokens.chosen_ids[:start]), tokenizer.decode(tokens.chosen_ids[start:])


# --- templates


def test_the_templates_and_what_is_said_of_them(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert "the tokenizer has none" in set_chat_template(bpe, section())
    assert "the tokenizer has none" in set_chat_template(bpe, section())  # also when ours was installed before
    turns = [{"role": "system", "content": "Be brief."}, user("Hi"), bot("Hello.")]
    text = bpe.apply_chat_template(turns, tokenize=False)
    end = "<|endoftext|>"
    assert text == f"<|system|>\nBe brief.{end}\n<|user|>\nHi{end}\n<|assistant|>\nHello.{end}"
    asked = bpe.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert asked == f"<|system|>\nBe brief.{end}\n<|user|>\nHi{end}\n<|assistant|>\n"
    bpe.chat_template = CHATML
    assert "the tokenizer's own" in set_chat_template(bpe, section())
    assert bpe.chat_template == CHATML
    (tmp_path / "mine.jinja").write_text(CHATML.replace("\n", "_"))
    assert "mine.jinja" in set_chat_template(bpe, section(chat_template=str(tmp_path / "mine.jinja")))
    assert bpe.chat_template == CHATML.replace("\n", "_")
    assert "data.chat_template" in set_chat_template(bpe, section(chat_template=CHATML))
    assert "joined as plain text" in set_chat_template(bpe, section(chat_template="none"))
    with pytest.raises(RecipeError, match=r"no-such\.jinja") as raised:
        set_chat_template(bpe, section(chat_template="no-such.jinja"))
    message(raised)


def test_the_end_token_is_the_templates_own(bpe: PreTrainedTokenizerFast) -> None:
    names = {CHATML: "<|im_end|>", "auto": "<|endoftext|>", "none": "<|endoftext|>"}
    for template, name in names.items():
        bpe.chat_template = None
        set_chat_template(bpe, section(chat_template=template))
        assert end_token_id(bpe, section(chat_template=template)) == bpe.convert_tokens_to_ids(name)


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        # What the template writes after its end token is cut.
        (CHATML, ASKED, "Blue.<|im_end|>"),
        # Of two special tokens after the reply the first ends it.
        (
            "{% for m in messages %}{{ m.content }} <|im_end|>{{ eos_token }}{% endfor %}",
            "Name a colour. <|im_end|><|endoftext|>",
            "Blue. <|im_end|>",
        ),
        # Without one eos does, and a header that the template never asks with is the model's to say.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}",
            "user: Name a colour.\n\n",
            "assistant: Blue.<|endoftext|>",
        ),
        # A thought that the template opens only when it asks, and one that it writes before every reply.
        (CHATML.replace("t\n{% endif", "t\n<think>\n{% endif"), ASKED, "Blue.<|im_end|>"),
        (
            CHATML.replace("{{ m.c", "{% if m.role == 'assistant' %}<think>{% endif %}{{ m.c"),
            ASKED,
            "<think>Blue.<|im_end|>",
        ),
        ("none", "Name a colour.", "Blue.<|endoftext|>"),
    ],
)
def test_where_prompt_and_response_part(
    bpe: PreTrainedTokenizerFast, template: str, prompt: str, response: str
) -> None:
    assert split_text(bpe, colour(), chat_template=template) == (prompt, response)


def test_only_the_last_reply_is_the_response(bpe: PreTrainedTokenizerFast) -> None:
    pair = Pair(({"role": "system", "content": "S"}, *TURNS), "Blue.", "Seven.", "x:1")
    prompt, response = split_text(bpe, pair)
    assert "Hello." in prompt
    assert response == "Blue.<|endoftext|>"


def test_chat_template_kwargs_reach_the_template(bpe: PreTrainedTokenizerFast) -> None:
    template = "{{ mood }}" + CHATML
    kwargs = {"mood": "calm"}
    assert split_text(bpe, colour(), chat_template=template, chat_template_kwargs=kwargs)[0].startswith(
        "calm<|im_start|>"
    )


def test_a_template_that_strips_the_reply_is_followed_and_one_that_rewrites_it_refused(
    bpe: PreTrainedTokenizerFast,
) -> None:
    strips, lowers = (CHATML.replace("m.content", f"m.content | {verb}") for verb in ("trim", "lower"))
    pair = colour(chosen="  Blue. \n")
    assert split_text(bpe, pair, chat_template=strips)[1] == "Blue.<|im_end|>"
    assert split_text(bpe, pair, chat_template=CHATML)[1] == "  Blue. \n<|im_end|>"
    data = section(chat_template=lowers)
    set_chat_template(bpe, data)
    kept, counts = tokenize_pairs([pair, colour(chosen="blue", rejected="seven")], bpe, data)
    assert (len(kept), counts) == (1, {REWRITTEN: 1})


def test_a_template_that_fails_is_placed(bpe: PreTrainedTokenizerFast) -> None:
    alternate = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    data = section(chat_template=alternate)
    set_chat_template(bpe, data)
    bad = Pair(({"role": "system", "content": "S"}, user("q")), "a", "b", "x:2")
    with pytest.raises(ModelError, match="x:2: the chat template raises TemplateError: no system turns") as raised:
        tokenize_pairs([colour(), bad], bpe, data)
    message(raised)
    for template, found in [("{% for", "TemplateSyntaxError"), ("{{ messages[0].content }}", "leaves out the reply")]:
        with pytest.raises(ModelError, match=found) as raised:
            set_chat_template(bpe, section(chat_template=template))
        message(raised)


# --- both ends of the tokens


def test_a_token_across_the_boundary_belongs_to_the_response(bpe: PreTrainedTokenizerFast) -> None:
    assert bpe.tokenize("2 ab") == ["2", "Ġab"]
    assert split_text(bpe, colour("1 2 a", "b", "0"), chat_template="none") == ("1 2", " ab<|endoftext|>")
    # The other side has no such token, so its response starts later.
    ((tokens,), _) = tokenize_pairs([colour("1 2 a", "b", "0")], bpe, section(chat_template="none"))
    assert tokens.rejected_start == tokens.chosen_start + 1


def test_spaces_and_bytes_at_the_boundary(piece: PreTrainedTokenizerFast) -> None:
    trimmed = byte_level(trim_offsets=True)
    for tokenizer, start in ((trimmed, ""), (piece, "<s> ")):
        prompt, response = split_text(tokenizer, colour("A:  ", "🦜", "🙂"), chat_template="none")
        assert (prompt, response) == (start + "A:  ", "🦜" + tokenizer.eos_token)
        prompt, response = split_text(tokenizer, colour("A🦜", "  Blue.", "🙂"), chat_template="none")
        assert prompt == start + "A🦜"
        assert response.lstrip() == "Blue." + tokenizer.eos_token
    # The space that sentencepiece adds after a special token is the response's when the reply follows the token.
    after_special = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    ids = tokenize_pairs([colour("Hi", "Hello")], piece, section(chat_template="none"))
    assert ids[1] == {}
    piece.chat_template = after_special
    ((tokens,), _) = tokenize_pairs([colour("Hi", "Hello")], piece, section())
    assert tokens.chosen_ids[tokens.chosen_start - 1] == piece.eos_token_id
    assert tokens.chosen_ids[-1] == piece.eos_token_id
    assert tokens.chosen_start < len(tokens.chosen_ids) - 1


@pytest.mark.parametrize("template", ["auto", "{{ bos_token }}", "none"])
def test_bos_once(piece: PreTrainedTokenizerFast, template: str) -> None:
    if template.startswith("{"):
        template += CHATML.replace("<|im_end|>", "</s>")
    data = section(chat_template=template)
    set_chat_template(piece, data)
    ((tokens,), _) = tokenize_pairs([colour()], piece, data)
    for ids in (tokens.chosen_ids, tokens.rejected_ids):
        assert ids[0] == piece.bos_token_id
        assert list(ids).count(piece.bos_token_id) == 1


def test_bos_of_others() -> None:
    bert = word_piece()
    ((tokens,), _) = tokenize_pairs([colour("hello", "blue")], bert, section(chat_template="none"))
    assert list(tokens.chosen_ids).count(bert.sep_token_id) == 1  # the [SEP] it adds by default is not doubled
    assert list(tokens.chosen_ids).index(bert.cls_token_id) == 0
    bpe = byte_level(False)
    ((tokens,), _) = tokenize_pairs([colour("hello", "Blue")], bpe, section(chat_template="none"))
    assert bpe.decode(tokens.chosen_ids) == "helloBlue<|endoftext|>"  # none where the tokenizer adds none


def test_lengths(bpe: PreTrainedTokenizerFast) -> None:
    def run(pair: Pair, **fields: Any) -> tuple[list[Any], dict[str, int]]:
        return tokenize_pairs([pair, colour()], bpe, section(chat_template="none", **fields))

    long = colour("1 " * 15, "2 " * 15, "0 " * 5)
    (tokens, _), _ = run(long)
    prompt, whole = tokens.chosen_start, len(tokens.chosen_ids)
    # Exactly at its limit a prompt stays, and a response keeps its end.
    assert run(long, max_prompt_length=prompt)[1] == {}
    assert run(long, max_prompt_length=prompt - 1)[1] == {LONG_PROMPT: 1}
    assert run(long, max_length=whole)[1] == {}
    (cut, _), counts = run(long, max_length=whole - 1)
    assert counts == {CUT: 1}
    assert list(cut.chosen_ids) == list(tokens.chosen_ids)[:-1]
    # One token of the response is enough, none is not.
    (cut, _), counts = run(long, max_length=prompt + 1)
    assert counts == {CUT: 2}
    assert len(cut.chosen_ids) == cut.chosen_start + 1
    assert run(long, max_length=prompt)[1] == {NO_ROOM: 1}
    # On either side alone: here a token across the boundary starts one response earlier.
    for replies in (("0", "b"), ("b", "0")):
        ((tokens, _), _) = run(colour("1 " * 9 + "a", *replies))
        starts = {tokens.chosen_start, tokens.rejected_start}
        assert len(starts) == 2
        assert run(colour("1 " * 9 + "a", *replies), max_length=max(starts))[1] == {NO_ROOM: 1}
    alike = colour("1 " * 15, "2 " * 15 + "a", "2 " * 15 + "b")
    assert run(alike, max_length=prompt + 4)[1] == {EQUAL_CUT: 1}
    with pytest.raises(DataError) as raised:
        tokenize_pairs([long] * 3, bpe, section(chat_template="none", max_length=prompt))
    assert f"3  {NO_ROOM}" in message(raised)
    assert tokenize_pairs([], bpe, section(chat_template="none")) == ([], {})


@pytest.mark.parametrize(
    "pair", [colour("a<|im_start|>b"), colour(chosen="a<|endoftext|>"), colour(rejected="<|im_end|>")]
)
def test_a_special_token_in_the_text_is_no_end(bpe: PreTrainedTokenizerFast, pair: Pair) -> None:
    assert tokenize_pairs([pair, colour()], bpe, section(chat_template="none"))[1] == {SPECIAL: 1}


def test_tokenizers_that_cannot_be_used(bpe: PreTrainedTokenizerFast) -> None:
    plain = section(chat_template="none")
    ((tokens,), _) = tokenize_pairs([colour()], bpe, plain)
    largest = max(*tokens.chosen_ids, *tokens.rejected_ids)
    assert tokenize_pairs([colour()], bpe, plain, vocab_size=largest + 1) == ([tokens], {})
    with pytest.raises(ModelError, match=f"token id {largest}, and the model's embedding has {largest} rows") as raised:
        tokenize_pairs([colour()], bpe, plain, vocab_size=largest)
    message(raised)
    with pytest.raises(DataError, match=r"a conversation, and data\.chat_template: none") as raised_data:
        tokenize_pairs([Pair((user("q"),), "a", "b", "x:1")], bpe, plain)
    message(raised_data)
    bpe.eos_token = None
    for data in (plain, section()):
        with pytest.raises(ModelError, match="nothing ends a reply") as raised:
            set_chat_template(bpe, data)
        message(raised)
    set_chat_template(bpe, section(chat_template=CHATML))  # the template's own end will do


def test_a_slow_tokenizer_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match="ByT5Tokenizer is a slow one") as raised:
        tokenize_pairs([colour()], ByT5Tokenizer(), section(chat_template="none"))
    message(raised)


# --- properties

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=24)
REPLY = (
    TEXT | st.sampled_from(["a  b ", " Hello", "\ue0fe", "\n", "🦜🦜", "é\u0301", "x</s>", "[SEP]", "<|endoftext|>"])
).filter(str.strip)
TEMPLATES = st.sampled_from(["auto", "none", CHATML, "{{ bos_token }}" + CHATML])


@given(prompt=TEXT, replies=st.tuples(REPLY, REPLY), template=TEMPLATES, max_length=st.integers(8, 80))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_end_is_supervised_exactly_once_or_cut(
    any_tokenizer: PreTrainedTokenizerFast, prompt: str, replies: tuple[str, str], template: str, max_length: int
) -> None:
    any_tokenizer.chat_template = None
    data = section(chat_template=template, max_length=max_length)
    set_chat_template(any_tokenizer, data)
    end = end_token_id(any_tokenizer, data)
    try:
        kept, counts = tokenize_pairs([colour(prompt, *replies)], any_tokenizer, data)
    except DataError as error:
        assert "every pair was left out" in str(error)  # noqa: PT017 - either outcome is right
        return
    cut = 0
    for pair in kept:
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            response = list(ids[start:])
            assert 0 < len(ids) <= max_length
            assert response
            assert end not in response[:-1]
            assert response[-1] == end or len(ids) == max_length
            cut += response[-1] != end
    assert counts.get(CUT, 0) == cut


@given(prompt=TEXT, replies=st.tuples(REPLY, REPLY), template=TEMPLATES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_tokens_decode_to_the_rendered_text(
    any_tokenizer: PreTrainedTokenizerFast, prompt: str, replies: tuple[str, str], template: str
) -> None:
    any_tokenizer.chat_template = None
    data = section(chat_template=template)
    set_chat_template(any_tokenizer, data)
    try:
        kept, _ = tokenize_pairs([colour(prompt, *replies)], any_tokenizer, data)
    except DataError:
        assume(False)
    asked = prompt
    if template != "none":
        asked = any_tokenizer.apply_chat_template([user(prompt)], tokenize=False, add_generation_prompt=True)
    end = any_tokenizer.decode([end_token_id(any_tokenizer, data)])
    for pair in kept:
        for ids, start, reply in zip(
            (pair.chosen_ids, pair.rejected_ids), (pair.chosen_start, pair.rejected_start), replies, strict=True
        ):
            if any_tokenizer.cls_token:  # BERT's text loses case and spaces, so compare its tokens
                bare = any_tokenizer(asked + reply + end, add_special_tokens=False).input_ids
                assert list(ids) == [any_tokenizer.cls_token_id, *bare]
                assert template == "none" or list(ids[:start]) == any_tokenizer(asked).input_ids[:-1]
                continue
            whole, inside, beyond = (plain(any_tokenizer.decode(ids[:n])) for n in (len(ids), start, start + 1))
            assert whole == plain(asked + reply + end)
            # The prompt's tokens lie within what is asked with, and the next token does not.
            assert plain(asked).startswith(inside)
            assert len(beyond) > len(plain(asked)) or not asked


def plain(text: str) -> str:
    """The text less the BOS and the spaces that a sentencepiece tokenizer adds after special tokens."""
    text = text.removeprefix("<s> ") if text.startswith("<s> ") else text.removeprefix("<s>")
    return text.replace("</s> ", "</s>")


def test_batches_keep_the_order(bpe: PreTrainedTokenizerFast) -> None:
    pairs = [Pair((user(f"{i}"),), f"{i} a", "b" if i % 7 else "<|im_end|>", f"x:{i}") for i in range(300)]
    set_chat_template(bpe, section())
    kept, counts = tokenize_pairs(pairs, bpe, section())
    assert counts == {SPECIAL: 43}
    places = [int(pair.where[2:]) for pair in kept]
    assert all(one < other for one, other in pairwise(places))
    for place, tokens in zip(places, kept, strict=True):
        assert bpe.decode(tokens.chosen_ids[tokens.chosen_start :]) == f"{place} a<|endoftext|>"
