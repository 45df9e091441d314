"""Texts that look like JSON, and JSON that looks like texts."""

import json
from typing import Any

import pytest
from shapes import BLUE_SEVEN, Q, bot, detect, part, read, refused, user

from orpo_lite.data.formats.detect import detect_format
from orpo_lite.data.pair import RowError
from orpo_lite.errors import DataError

ABOUT_TEXT = {"instruction": "Sum up.", "input": "A long text."}


@pytest.mark.parametrize(
    "replies",
    [
        {"output_1": "a", "output_2": "b", "winner": "1"},
        {
            "completions": [
                {"response": "b", "overall_score": 2},
                {"response": "a", "overall_score": 8},
            ]
        },
        {"chosen": [bot("a")], "rejected": [bot("b")]},
        {"chosen": "a", "rejected": "b"},
    ],
)
def test_what_an_instruction_is_about_is_read_in_every_format(replies: dict[str, Any]) -> None:
    rows = [ABOUT_TEXT | replies, {"instruction": "Hi.", "input": ""} | replies]
    detected = detect_format(rows)
    assert detected.columns["input"] == "input"
    one, other = (detected.read(row, "x:1") for row in rows)
    assert (one.messages, one.chosen, one.rejected) == ((user("Sum up.\nA long text."),), "a", "b")
    assert other.messages == (user("Hi."),)


@pytest.mark.parametrize(
    "reply",
    [
        {"role": "user", "content": "Blue."},
        [{"text": "Blue."}],
        [bot("Blue.")],
        {"messages": ["Blue."]},
    ],
)
def test_replies_that_are_json_can_be_read_as_texts(reply: Any) -> None:
    rows = [
        {
            "prompt": "Write it as JSON.",
            "chosen": json.dumps(reply),
            "rejected": json.dumps([reply, reply]),
        }
    ] * 9
    assert {(pair.chosen, pair.rejected) for pair in read(rows, name="explicit")} == {
        (rows[0]["chosen"], rows[0]["rejected"])
    }


def test_replies_that_are_json_of_nothing_known_are_offered_as_texts() -> None:
    text = json.dumps([{"text": "Blue."}])
    refused([{"prompt": Q, "chosen": text, "rejected": text}] * 2, "data.format=explicit")


NO_MESSAGES = [
    {"role": "nurse", "shift": 3},
    {"from": "Berlin", "to": "Paris"},
    {"role": "assistant", "name": "Ada"},
    {"role": "assistant", "value": 3},
]


@pytest.mark.parametrize("reply", NO_MESSAGES)
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_json_that_only_looks_like_messages_can_be_read_as_texts(reply: Any, column: str) -> None:
    sides = {"chosen": json.dumps(reply), "rejected": json.dumps(reply) + " "}
    rows = [{column: f"Write {i} as JSON.", **sides} for i in range(4)]
    texts = [((user(row[column]),), row["chosen"]) for row in rows]
    if "value" in reply:
        with pytest.raises(RowError):
            read(rows)
    else:  # nothing is said in it
        assert [(pair.messages, pair.chosen) for pair in read(rows)] == texts
    assert [(pair.messages, pair.chosen) for pair in read(rows, name="explicit")] == texts


def test_a_message_in_a_text_is_read_and_the_other_reading_said() -> None:
    rows = [
        {"prompt": Q, "chosen": json.dumps(bot("Blue.")), "rejected": json.dumps(bot("Seven."))}
    ] * 3
    detected, _ = detect(rows)
    assert (
        "(JSON in texts; data.format=explicit would read the texts unchanged)" in detected.sentence
    )
    assert [pair.chosen for pair in read(rows)] == ["Blue."] * 3
    assert [pair.chosen for pair in read(rows, name="explicit")] == [rows[0]["chosen"]] * 3
    # Beside a prompt that is itself a list of messages, no setting reads them as texts.
    listed = [row | {"prompt": json.dumps([user(Q)])} for row in rows]
    assert "data.format" not in detect(listed)[0].sentence


def test_tools_in_json_are_tools_and_no_texts() -> None:
    asked = [user(Q), {"role": "tool", "content": "x"}]
    sides = {side: json.dumps([*asked, bot(side)]) for side in ("chosen", "rejected")}
    detected, (row, *_) = detect([{"prompt": Q, **sides}] * 3)
    with pytest.raises(DataError, match="a tool's turn"):
        detected.read(row, "x:1")


def test_a_first_row_in_place_of_the_names_is_suspected() -> None:
    row = {"Name a colour.": "Name a number.", "It is blue.": "Seven.", "It is seven.": "Blue."}
    with pytest.raises(DataError) as raised:
        detect([row] * 3)
    assert "if the first line is a row, write a line with column names above it" in raised.value.fix


@pytest.mark.parametrize(
    "listed", [["prompt"], ["chosen", "rejected"], ["prompt", "chosen", "rejected"]]
)
def test_lists_of_one_text_are_read_and_of_several_refused(listed: list[str]) -> None:
    row = {"prompt": Q, **BLUE_SEVEN}
    (pair, _) = read([row | {column: [row[column]] for column in listed}] * 2)
    assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q),), "Blue.", "Seven.")
    (pair, _) = read(
        [row | {column: [part(row[column][:2]), part(row[column][2:])] for column in listed}] * 2
    )
    assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q),), "Blue.", "Seven.")
    error = refused([row | {column: [row[column], "Red?"] for column in listed}] * 2)
    assert f"{listed[-1]} hold{'s' if len(listed) == 1 else ''} lists of texts" in error


def test_what_a_question_is_about_can_be_named() -> None:
    rows = [{"passage": "A long text", "question": Q, **BLUE_SEVEN}] * 2
    assert {pair.prompt_text for pair in read(rows, {"input": "passage"})} == {f"{Q}\nA long text"}


@pytest.mark.parametrize("blank", ["", None, " "])
@pytest.mark.parametrize("name", ["system", "System"])
def test_a_system_column_may_be_blank_at_first(blank: str | None, name: str) -> None:
    row = {"question": "Q?", "chosen": "a", "rejected": "b"}
    detected = detect_format([{name: blank} | row] * 100)
    assert detected.name == "explicit"
    assert "system" not in detected.because
    assert detected.read({name: blank} | row, "x:1").messages == (user("Q?"),)
    assert detected.read({name: "Be brief."} | row, "x:101").messages == (
        {"role": "system", "content": "Be brief."},
        user("Q?"),
    )


def test_a_verdict_is_never_offered_as_a_reply() -> None:
    for row in (
        {"winner": "model_a", "x": [user("q"), bot("a")], "y": [user("q"), bot("b")]},
        {"prompt": "Q?", "best": "gpt", "gpt": "a", "other": "b"},
    ):
        with pytest.raises(DataError) as raised:
            detect_format([row] * 3)
        assert "chosen=winner" not in str(raised.value)
        assert "chosen=best" not in str(raised.value)


def test_a_conversation_under_an_unknown_name_is_offered() -> None:
    rows = [
        {"task": "Math", "trajectory": [user(f"Q{i}")], "good": f"a{i}", "bad": f"b{i}"}
        for i in range(12)
    ]
    refused(rows, "data.column_map=prompt=trajectory")


def test_whole_conversations_under_other_names_need_no_prompt() -> None:
    rows = [
        {"chosen_conversations": [user(Q), bot("a")], "rejected_conversations": [user(Q), bot("b")]}
    ] * 3
    assert [(pair.messages, pair.chosen, pair.rejected) for pair in read(rows)] == [
        ((user(Q),), "a", "b")
    ] * 3


def test_turns_within_a_text_are_a_template_too() -> None:
    text = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nQ?"
    with pytest.raises(DataError, match="already has a chat template applied"):
        detect_format(
            [{"prompt": text, "response_1": "a", "response_2": "b", "preference_strength": -2}] * 3
        )
