"""Sets that fit no format: the columns, roles and kinds of values that are named."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import pytest
from shapes import (
    CHATML,
    HH,
    SHAPES,
    TEXTS,
    Q,
    bot,
    detect,
    follow,
    read,
    refused,
    said,
    system,
    user,
)

from orpo_lite.data.formats.detect import detect_format
from orpo_lite.data.pair import PROMPTS_DIFFER
from orpo_lite.errors import DataError
from orpo_lite.recipe.reader import load_recipe


@pytest.mark.parametrize(
    "names",
    [
        ("my question", "best, answer", "other, answer"),
        ("user_query", "good=1", "odd='0'"),
        ("the $question", '"best"', "{other}"),
        ("question\x07", "good\ttext", "odd\\text 🎨"),
        (" my question ", "good#", "odd: text"),
    ],
)
def test_the_line_can_be_pasted_whatever_the_columns_names(names: tuple[str, str, str]) -> None:
    rows = [dict(zip(names, (Q, "Blue.", "Seven."), strict=True))] * 2
    with pytest.raises(DataError) as raised:
        detect(rows)
    assert all(character.isprintable() or character == "\n" for character in str(raised.value))
    line, *_ = (word for word in shlex.split(raised.value.fix) if word.startswith("data."))
    column_map = load_recipe("demo", [line]).data.column_map
    assert column_map == dict(zip(("prompt", "chosen", "rejected"), names, strict=True))
    assert [pair.chosen for pair in read(rows, column_map)] == ["Blue."] * 2


def test_roles_that_nobody_has_here_are_named() -> None:
    with pytest.raises(DataError, match=r"field chosen\[1\]: 'observation', a tool's turn"):
        read(
            [
                {
                    side: [said("human", Q), said("observation", side)]
                    for side in ("chosen", "rejected")
                }
            ]
            * 3
        )
    with pytest.raises(DataError, match=r"field chosen\[1\].role: 'nurse'") as raised:
        read(
            [{side: [said("human", Q), said("nurse", side)] for side in ("chosen", "rejected")}] * 3
        )
    assert "one of system, developer, user, human" in raised.value.expected


def test_newer_names_of_the_roles_are_read() -> None:
    asked = [{"role": "developer", "content": "Be brief."}, user(Q)]
    row = {
        "prompt": asked,
        "chosen": [{"role": "model", "content": "Blue."}],
        "rejected": [bot("Seven.")],
    }
    (pair,) = read([row])
    assert (pair.messages, pair.chosen) == ((system("Be brief."), user(Q)), "Blue.")


@pytest.mark.parametrize(
    ("row", "lines"),
    [
        ({"text": "q", "label": 1}, []),
        ({"chosen": "yes", "rejected": "no"}, []),
        ({"prompt": {"a": 1, "b": 2}, "chosen": "yes", "rejected": "no"}, []),
        (
            {"question": "q", "correct_answer": "a", "incorrect_answer": "b"},
            [
                f"data.column_map=chosen={one}_answer,rejected={other}_answer"
                for one, other in (("correct", "incorrect"), ("incorrect", "correct"))
            ],
        ),
        ({"prompt": "q", "chosen": 3, "rejected": "no", "y": "Yes, so"}, []),
        ({"prompt": "q", "chosen": 3, "rejected": "no"}, []),
        ({"prompt": "q", "chosen": HH, "rejected": [bot("no")]}, []),
        (
            {
                "chosen": "It is so",
                "rejected": "It is no",
                "messages": [user("q"), bot("It was so")],
            },
            ["data.format=implicit"],
        ),
        *(
            ({"chosen": "It is so", "rejected": "It is no", name: held}, ["data.format=implicit"])
            for name in ("prompt", "question", "input", "instruction", "about")
            for held in (["Why?", "So?"], {"en": "Why?", "id": 3})
            if (name, held) != ("prompt", ["Why?", "So?"])
        ),
        (
            {"prompt": "q", "completion": "a", "rejected": "b"},
            ["data.column_map=chosen=completion,rejected=rejected"],
        ),
        (
            {
                "prompt": "q",
                "text_1": "Some text",
                "text_2": "Other text",
                "text_3": "A third text",
            },
            [],
        ),
    ],
)
def test_what_fits_nothing_is_refused_with_the_columns(
    row: dict[str, Any], lines: list[str]
) -> None:
    error = refused([row] * 2, *lines)
    assert all(repr(column) in error for column in row)


def test_two_replies_that_begin_alike_by_chance_are_no_implicit_prompt() -> None:
    rows = [{"chosen": "It is so", "rejected": "It is no"}, {"chosen": "Yes", "rejected": "No"}]
    refused(rows * 9, "data.format=implicit")
    assert follow(rows, "data.format=implicit")[1][1].drop == PROMPTS_DIFFER


def test_a_phrase_that_all_replies_begin_with_is_no_prompt() -> None:
    rows = [
        {"topic": f"t{i}", "chosen": f"I think yes {i}", "rejected": f"I think no {i}"}
        for i in range(9)
    ]
    refused(rows, "data.format=implicit")
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    assert detect(rows)[0].name == "implicit"


def test_a_line_can_be_pasted_whatever_the_columns_name() -> None:
    row = {
        "prompt": "Other text",
        "Query": Q,
        "chosen": "Blue.",
        "rejected": "Seven.",
        "the system": "x",
    }
    refused([row], "data.column_map=prompt=prompt", "data.column_map=prompt=Query")
    row = {"prompt": Q, "good answer": "Blue.", "odd answer": "Seven."}
    with pytest.raises(
        DataError, match=r"'data\.column_map=chosen=good answer,rejected=odd answer'"
    ):
        detect_format([row])


def test_columns_that_agree_are_no_ambiguity() -> None:
    rows = [{"prompt": Q, "question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 2
    assert read(rows) == read([{k: v for k, v in row.items() if k != "question"} for row in rows])
    assert detect([row | {"question": ""} for row in rows])[0].name == "explicit"
    assert detect([row | {"question": None} for row in rows])[0].name == "explicit"


def test_a_prompt_that_is_the_instruction_keeps_its_input() -> None:
    row = {
        "instruction": "Name it.",
        "input": "The sky",
        "prompt": CHATML,
        "chosen": "Blue.",
        "rejected": "Seven.",
    }
    refused([row] * 2, "data.column_map=prompt=instruction")
    name, (pair, _) = follow([row] * 2, "data.column_map=prompt=instruction")
    assert (name, pair.messages) == ("alpaca", (user("Name it.\nThe sky"),))


def test_lists_that_python_printed_are_read() -> None:
    for sides in (
        {"chosen": [user(Q), bot("Blue.")], "rejected": [user(Q), bot("Seven.")]},
        {"chosen": ["Blue."], "rejected": ["Seven."]},
    ):
        (pair,) = read([{"prompt": Q} | {side: repr(value) for side, value in sides.items()}])
        assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q),), "Blue.", "Seven.")
    assert (
        read([TEXTS | {"chosen": text} for text in ("['a', 'b']", "no list")])[0].chosen
        == "['a', 'b']"
    )
    several = [{"prompt": Q, "chosen": "['Blue.', 'Seven.']", "rejected": "['Seven.']"}] * 2
    refused(several, "data.format=explicit")
    assert follow(several, "data.format=explicit")[1][0].chosen == "['Blue.', 'Seven.']"


@pytest.mark.parametrize(
    "value",
    ["array([{'content': 'Blue.'}], dtype=object)", "[{'content': 'a'}\n {'content': 'b'}]"],
)
@pytest.mark.parametrize(
    "sides", [("chosen", "rejected"), ("response_a", "response_b"), ("answer_1", "answer_2")]
)
def test_lists_that_numpy_printed_are_refused(value: str, sides: tuple[str, str]) -> None:
    error = refused([{"prompt": Q, "winner": 1, **dict.fromkeys(sides, value)}] * 2)
    assert f"{' and '.join(sides)} hold lists as NumPy prints them" in error


@pytest.mark.parametrize("first", ["id", "name", "index", "weight"])
@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape.csv])
def test_json_in_a_table_is_read_whatever_its_first_key(shape: str, first: str) -> None:
    def packed(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            return json.dumps([{first: 1, **item} for item in value])
        return json.dumps({first: 1, **value}) if isinstance(value, Mapping) else value

    SHAPES[shape].check(
        [{key: packed(value) for key, value in row.items()} for row in SHAPES[shape].rows]
    )


@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if not shape.csv])
def test_lists_of_texts_and_of_numbers_are_read_from_a_table(shape: str) -> None:
    def cell(value: Any) -> Any:
        return json.dumps(value) if isinstance(value, list) else "" if value is None else value

    SHAPES[shape].check(
        [{key: cell(value) for key, value in row.items()} for row in SHAPES[shape].rows]
    )


@pytest.mark.parametrize(
    "turns", [[bot("Blue.")], [user(Q), bot("Blue.")], [said("human", Q), said("gpt", "Blue.")]]
)
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_messages_in_a_column_of_texts_are_a_fault(turns: list[Any], column: str) -> None:
    odd = TEXTS | {column: json.dumps(turns)}
    for rows in ([TEXTS] * 9, [odd, odd, *[TEXTS] * 4]):
        with pytest.raises(DataError) as raised:
            detect(rows)[0].read(odd, "x:10")
        assert f"x:10, field {column}: messages as JSON" in str(raised.value)
    if column != "prompt":
        (pair,) = read([odd], name="explicit")
        assert json.dumps(turns) in (pair.chosen, pair.rejected)


def test_a_reply_that_is_json_is_a_text() -> None:
    rows = [{"prompt": "As JSON!", "chosen": '{"role": "x", "content": "y"}', "rejected": "no"}]
    rows += [{"prompt": "As JSON!", "chosen": "[1, 2]", "rejected": '["a"]'}] * 2
    assert [pair.chosen for pair in read(rows)] == [
        '{"role": "x", "content": "y"}',
        "[1, 2]",
        "[1, 2]",
    ]


@pytest.mark.parametrize(
    "answers",
    [
        [{"message": bot("Seven."), "score": 1}, {"message": bot("Blue."), "score": 2}],
        [{"messages": [bot("Seven.")], "score": 1}, {"messages": [bot("Blue.")], "score": 2}],
        [{"content": "Seven.", "rating": 1}, {"content": "Blue.", "rating": 2}],
        [bot("Blue.") | {"rank": 1}, bot("Seven.") | {"rank": 2}],
    ],
)
def test_answers_that_are_messages_are_ranked(answers: list[Any]) -> None:
    assert [
        (pair.messages, pair.chosen, pair.rejected)
        for pair in read([{"prompt": Q, "completions": answers}])
    ] == [((user(Q),), "Blue.", "Seven.")]


def test_messages_may_name_their_speaker() -> None:
    turns = {
        side: [{"speaker": "User", "text": Q}, {"speaker": "AI", "text": text}]
        for side, text in (("chosen", "Blue."), ("rejected", "Seven."))
    }
    assert [(pair.messages, pair.chosen, pair.rejected) for pair in read([turns])] == [
        ((user(Q),), "Blue.", "Seven.")
    ]
