"""True shapes: each format detected, read, and told by what it is read from."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from shapes import BLUE_SEVEN, HH, HH_TURNS, ORCA, SHAPES, TALK, Q, bot, detect, read, system, user

from orpo_lite.data.formats.readers import READERS
from orpo_lite.recipe.schema import DataSection


@pytest.mark.parametrize("shape", SHAPES)
def test_a_true_shape_is_detected_and_read(shape: str) -> None:
    SHAPES[shape].check(SHAPES[shape].rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_format_can_be_named(shape: str) -> None:
    SHAPES[shape].check(SHAPES[shape].rows, name=SHAPES[shape].name)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_survives_its_files(shape: str, tmp_path: Path) -> None:
    rows = SHAPES[shape].rows
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    SHAPES[shape].check([json.loads(line) for line in lines.splitlines()])
    # Parquet fills the fields of a struct that a row lacks with None.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    SHAPES[shape].check(pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist())
    if SHAPES[shape].csv:
        with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            for row in rows:
                cells = (
                    (key, value if isinstance(value, str) or value is None else json.dumps(value))
                    for key, value in row.items()
                )
                table.writerow(dict(cells))
        with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
            SHAPES[shape].check([*csv.DictReader(file)])


def test_every_format_has_a_shape_and_its_name_in_the_recipe() -> None:
    assert {shape.name for shape in SHAPES.values()} == set(READERS)
    assert set(get_args(DataSection.model_fields["format"].annotation)) == {"auto", *READERS}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_columns_that_are_read_are_all_that_is_read(shape: str) -> None:
    detected, rows = detect(SHAPES[shape].rows)
    assert set(detected.columns.values()) <= {column for row in rows for column in row}
    for row in rows:
        alone = {column: row[column] for column in detected.columns.values() if column in row}
        assert detected.read(alone, "x") == detected.read(row, "x")


def test_columns_are_named_by_what_they_are_read_as() -> None:
    assert detect(SHAPES["nvidia/HelpSteer3"].rows)[0].columns == {
        "conversation": "context",
        "response_a": "response1",
        "response_b": "response2",
        "better": "overall_preference",
    }
    assert detect([ORCA])[0].columns == {
        "system": "system",
        "prompt": "question",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    whole = SHAPES["HuggingFaceH4/ultrafeedback_binarized"].rows
    assert detect(whole)[0].columns == {"chosen": "chosen", "rejected": "rejected"}
    pairs = SHAPES["LLaMA-Factory's older alpaca, with history"].rows
    assert set(detect(pairs)[0].columns) == {
        "prompt",
        "input",
        "output",
        "history",
    }  # a blank input too


@pytest.mark.parametrize("spell", [str.capitalize, str.upper, " {} ".format])
@pytest.mark.parametrize("shape", SHAPES)
def test_case_and_spaces_of_a_column_make_no_difference(
    shape: str, spell: Callable[[str], str]
) -> None:
    ours = {
        "prompt",
        "chosen",
        "rejected",
        "system",
        "instruction",
        "input",
        "messages",
        "preferred_output",
    }
    rows = [
        {spell(key) if key in ours else key: value for key, value in row.items()}
        for row in SHAPES[shape].rows
    ]
    assert read(rows) == read(SHAPES[shape].rows)
    assert set(detect(rows)[0].columns.values()) <= set(rows[0])


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_dialogue_may_have_the_line_ends_of_windows(ends: str) -> None:
    row = {side: f"{HH} {text}".replace("\n", ends) for side, text in BLUE_SEVEN.items()}
    detected, _ = detect([row] * 2)
    assert detected.name == "hh_rlhf"
    pair = detected.read(row, "x")
    assert (pair.messages, pair.chosen, pair.rejected, pair.prompt_text) == (
        HH_TURNS,
        "Blue.",
        "Seven.",
        f"{HH} ",
    )


@pytest.mark.parametrize("settings", [{}, {"name": "hh_rlhf"}])
def test_the_replies_to_a_dialogue_may_bring_their_marker(settings: dict[str, Any]) -> None:
    row = {"prompt": HH, "chosen": "\n\nAssistant: Blue.", "rejected": "\n\nAssistant: Seven."}
    ((pair,), name) = read([row], **settings), detect([row], **settings)[0].name
    assert (name, pair.messages, pair.chosen, pair.rejected) == (
        "hh_rlhf",
        HH_TURNS,
        "Blue.",
        "Seven.",
    )
    (pair,) = read([row | {"prompt": HH.removesuffix("\n\nAssistant:")}], plain=True)
    assert (pair.messages, pair.chosen, pair.prompt_text) == (HH_TURNS, "Blue.", f"{HH} ")


@pytest.mark.parametrize(
    "name",
    [
        "System Prompt",
        "system-prompt",
        "systemPrompt",
        " SYSTEM_MESSAGE",
        "SystemMessage",
        "system_instruction",
    ],
)
def test_the_words_of_a_name_may_be_put_together_in_any_way(name: str) -> None:
    rows = [{name: "Be  brief.", "question": Q, **BLUE_SEVEN}] * 2
    assert [(pair.messages, pair.chosen) for pair in read(rows)] == [
        ((system("Be  brief."), user(Q)), "Blue.")
    ] * 2
    openai = {
        "input": {"messages": [*TALK]},
        "preferredOutput": [bot("Blue.")],
        "Non-Preferred Output": [bot("7")],
    }
    assert read([openai])[0].chosen == "Blue."
