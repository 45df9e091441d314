"""What stands before the reply: earlier turns, prompts, system texts; nothing twice and nothing
lost."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from shapes import (
    BLUE_SEVEN,
    BRIEF,
    EARLIER,
    NAMES,
    Q2,
    TALK,
    TEXTS,
    Q,
    Turns,
    bot,
    detect,
    read,
    said,
    system,
    user,
    wholes,
)

from orpo_lite.data.formats.column_map import apply_column_map
from orpo_lite.errors import DataError


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": [*BRIEF], **wholes(user(Q))}, BRIEF),
        ({"prompt": [*BRIEF], **wholes(*BRIEF)}, BRIEF),
        ({"prompt": [user(f"{Q} \n")], **wholes(user(Q))}, (user(Q),)),
        ({"messages": [user(f" {Q}")], **wholes(user(Q))}, (user(Q),)),
        ({"prompt": [user(Q)], **wholes(*TALK)}, TALK),
        ({"prompt": [*TALK], **wholes(user(Q))}, TALK),
        ({"prompt": [*TALK], **wholes()}, TALK),
        ({"prompt": [*EARLIER, user(Q)], "history": [["Hi", "Hello."]], **wholes()}, TALK),
        ({"prompt": Q, "history": [["Hi", "Hello."]], **BLUE_SEVEN}, TALK),
        ({"prompt": Q, "history": [*EARLIER], **BLUE_SEVEN}, TALK),
        ({"prompt": Q, "history": [*TALK], **BLUE_SEVEN}, TALK),
        (
            {"prompt": Q, "history": [*TALK, bot("Blue.")], **BLUE_SEVEN},
            (user(Q),),
        ),  # not the reply before the reply
        (
            {"prompt": f"Hi\nHello.\n{Q}", "history": [["Hi", "Hello."]], **BLUE_SEVEN},
            (user(f"Hi\nHello.\n{Q}"),),
        ),
        ({"prompt": Q, "history": [*EARLIER], **wholes(user(Q))}, TALK),
        ({"prompt": Q, "history": [*EARLIER], **wholes(*TALK)}, TALK),
        (
            {"system": "Be  brief.", "prompt": Q, "history": [*EARLIER], **BLUE_SEVEN},
            (BRIEF[0], *TALK),
        ),
        (
            {
                "prompt": Q,
                "history": [*EARLIER],
                "response_0": "Blue.",
                "response_1": "Seven.",
                "winner": 0,
            },
            TALK,
        ),
        (
            {"system": "Be  brief.", "prompt": f"Be brief.\n{Q}", **BLUE_SEVEN},
            (user(f"Be brief.\n{Q}"),),
        ),
        (
            {"system": "Be", "prompt": "Beware of it", **BLUE_SEVEN},
            (system("Be"), user("Beware of it")),
        ),
    ],
)
def test_nothing_stands_twice_and_nothing_is_lost(row: dict[str, Any], turns: Turns) -> None:
    for pair in read([row] * 3):
        assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (
            turns,
            "Blue.",
            "Seven.",
            None,
        )


@pytest.mark.parametrize("wrong", ["chosen", "rejected"])
@pytest.mark.parametrize("before", [(), EARLIER])
def test_a_reply_at_the_end_of_the_prompt_is_not_asked_again(wrong: str, before: Turns) -> None:
    asked = [*before, user(Q)]
    prompt = [*asked, bot(BLUE_SEVEN[wrong])]
    replies = {side: [bot(text)] for side, text in BLUE_SEVEN.items()}
    for row in (replies, wholes(user(Q)), wholes(*asked)):
        (pair,) = read([{"prompt": prompt} | row])
        assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (
            tuple(asked),
            "Blue.",
            "Seven.",
            None,
        )
    with pytest.raises(
        DataError, match="x:2, field prompt: it ends with an assistant turn that is neither of"
    ):
        read([{"prompt": asked} | replies, {"prompt": [*asked, bot("Red.")]} | replies])


def test_earlier_turns_may_end_with_the_words_of_the_reply() -> None:
    (pair,) = read([{"prompt": [user("Hi"), bot("Blue.")], **wholes(user(Q))}])
    assert pair.messages == (user("Hi"), bot("Blue."), user(Q))


@pytest.mark.parametrize("kind", [bot, lambda text: [bot(text)], str])
def test_a_conversation_that_holds_the_reply_is_read_up_to_it(kind: Callable[[str], Any]) -> None:
    row = {"conversations": [*EARLIER, user(Q), bot("Blue.")]} | {
        side: kind(text) for side, text in BLUE_SEVEN.items()
    }
    assert [(pair.messages, pair.chosen, pair.rejected) for pair in read([row] * 2)] == [
        (TALK, "Blue.", "Seven.")
    ] * 2


@pytest.mark.parametrize("listed", ["chosen", "rejected"])
@pytest.mark.parametrize("asked", [{"prompt": Q}, {"prompt": [user(Q)]}, {}])
def test_a_text_may_stand_beside_a_list(listed: str, asked: dict[str, Any]) -> None:
    row = BLUE_SEVEN | asked | {listed: [*([] if asked else [user(Q)]), bot(BLUE_SEVEN[listed])]}
    (pair,) = read([row])
    assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (
        (user(Q),),
        "Blue.",
        "Seven.",
        None,
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n", **wholes(user(Q))},
        {"prompt": f"User: Hi\nBot: Hello.\nUser: {Q}", **wholes(*TALK)},
        {"prompt": f"{Q}\n", **wholes(*TALK)},
        {"prompt": Q, "chosen": "Blue.", "rejected": [user(Q), bot("Seven.")]},
        {"prompt": Q, "chosen": [user(Q), bot("Blue.")], "rejected": "Seven."},
        {"prompt": "", "question": Q, "instruction": "Another text.", **wholes(user(Q))},
    ],
)
def test_a_prompt_that_the_conversations_hold_is_not_asked_for(row: dict[str, Any]) -> None:
    for pair in read([row] * 3):
        assert (pair.messages[-1], pair.chosen, pair.rejected) == (user(Q), "Blue.", "Seven.")


@pytest.mark.parametrize(
    "style", [lambda turn: turn, lambda turn: said(NAMES[turn["role"]], turn["content"])]
)
@pytest.mark.parametrize("begins", [Q, "Hello."])
def test_a_prompt_stands_in_front_of_turns_that_begin_with_a_reply(
    style: Callable[[Any], Any], begins: str
) -> None:
    turns = (bot("Hello."), user("More?"))
    row = {side: [*map(style, turns), style(bot(text))] for side, text in BLUE_SEVEN.items()}
    (pair, *_) = read([{"prompt": Q} | row] * 3)
    assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q), *turns), "Blue.", "Seven.")
    (pair, *_) = read([{"prompt": "More?"} | row] * 3)  # it is there already
    assert pair.messages == turns


@pytest.mark.parametrize(
    ("column", "held"),
    [
        *(
            ("system", held)
            for held in (system("Be kind."), [system("Be kind.")], ["Be", "kind."], {"en": "x"}, 3)
        ),
        ("system_prompt", ["You are", "kind."]),
        *(
            ("history", held)
            for held in (["Hi", "Hello."], [{"q": "Hi", "a": "Hello."}], {"Hi": "Hello."}, 3)
        ),
    ],
)
@pytest.mark.parametrize("line", [{}, {"prompt": "question"}, {"name": "explicit"}])
def test_a_known_column_that_cannot_be_read_is_not_left_out_unsaid(
    column: str, held: Any, line: Any
) -> None:
    rows = [{column: held, "question": Q, **BLUE_SEVEN}] * 3
    column_map = {key: value for key, value in line.items() if key != "name"}
    for table in (
        rows,
        [row | {column: json.dumps(held)} for row in rows] if isinstance(held, list) else rows,
    ):
        with pytest.raises(DataError) as raised:
            detect(
                table, column_map, **{key: value for key, value in line.items() if key == "name"}
            )
        assert f"{column} holds " in str(raised.value)
        assert (
            f"no setting helps: leave the column out, or write it as {raised.value.expected}"
            in str(raised.value)
        )


@pytest.mark.parametrize(
    ("row", "column_map", "found"),
    [
        (
            {**TEXTS, "about": bot("x")},
            {"system": "about"},
            "about is mapped to system, but holds message",
        ),
        ({**TEXTS, "n": 3}, {"history": "n"}, "n is mapped to history, but holds number"),
        (
            {"prompt": Q, "responses": ["Blue.", "Seven."], "scores": [9, 1]},
            {"completions": "scores", "scores": "responses"},
            "scores is mapped to completions, but holds numbers",
        ),
        (
            {"prompt": Q, "responses": ["a", "b"], "n": [True]},
            {"scores": "n"},
            "n is mapped to scores, but holds",
        ),
    ],
)
def test_a_mapped_column_that_cannot_be_that_is_refused(
    row: Any, column_map: dict[str, str], found: str
) -> None:
    for name in ("auto", "explicit", "ranked"):
        with pytest.raises(DataError) as raised:
            detect([row] * 3, column_map, name=name)
        assert found in raised.value.found
    if "completions" in column_map:
        assert raised.value.fix == "data.column_map=completions=responses"


def test_a_line_keeps_what_was_mapped_already() -> None:
    rows = [{"question": Q, "ask": Q2, "query": Q2, "good": "Blue.", "bad": "Seven."}] * 2
    with pytest.raises(DataError) as raised:
        detect(rows, {"chosen": "good", "rejected": "bad"})
    lines = [word for word in raised.value.fix.split() if word.startswith("data.")]
    assert lines == [
        f"data.column_map=chosen=good,rejected=bad,prompt={column}"
        for column in ("question", "query")
    ]


def test_the_first_rows_may_have_no_earlier_turns() -> None:
    row = {"prompt": Q, "history": [], **BLUE_SEVEN}
    detected, _ = detect([row] * 3)
    assert detected.columns["history"] == "history"
    assert (
        detected.read(apply_column_map(row | {"history": [["Hi", "Hello."]]}, {}), "x").messages
        == TALK
    )


def test_a_system_text_may_hold_a_dialogue() -> None:
    few_shot = "Answer so:\n\nHuman: Hi\n\nAssistant: Hello."
    rows = [{"system": few_shot, "prompt": Q, **BLUE_SEVEN}] * 3
    assert [pair.messages for pair in read(rows)] == [(system(few_shot), user(Q))] * 3


def test_a_system_text_that_the_prompt_begins_with_is_not_read() -> None:
    rows = [{"system": "Be brief.", "prompt": f"Be brief.\n{Q}", **BLUE_SEVEN}] * 3
    detected, _ = detect(rows)
    assert detected.name == "explicit"
    assert "system" not in detected.columns
    assert "system turn" not in detected.because
    rows = [{"system": "Not this.", **wholes(*BRIEF)}]
    assert "in front as a system turn if the conversation has none" in detect(rows)[0].because


def test_pairs_of_texts_in_another_column_are_earlier_turns_that_would_be_lost() -> None:
    rows = [
        {"prompt": Q, "past": [["Hi", "Hello."], [Q, text]], **BLUE_SEVEN}
        for text in ("1", "2", "3")
    ]
    with pytest.raises(
        DataError, match="past is not read, but holds turns that no other column has"
    ):
        detect(rows)
