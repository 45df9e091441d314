"""The row that deviates from its set; prompts that replies repeat."""

from typing import Any

import pytest
from shapes import (
    BLUE,
    BLUE_SEVEN,
    BRIEF,
    DOUBLED,
    EARLIER,
    HH,
    SHAPES,
    TALK,
    TEXTS,
    WHOLE,
    Q,
    Turns,
    bot,
    detect,
    follow,
    read,
    refused,
    said,
    system,
    user,
)

from orpo_lite.data.formats.column_map import apply_column_map
from orpo_lite.data.formats.readers import READERS
from orpo_lite.data.pair import EMPTY_CHOSEN, EMPTY_REJECTED, TOO_FEW, UNJUDGED
from orpo_lite.errors import DataError


@pytest.mark.parametrize(
    ("form", "row", "place"),
    [
        (
            "explicit",
            {"prompt": "q", "chosen": "a"},
            "field rejected: missing; the columns are 'prompt', 'chosen'",
        ),
        ("explicit", TEXTS | {"chosen": None}, "field chosen: null"),
        ("explicit", TEXTS | {"chosen": 3}, "field chosen: a number"),
        ("explicit", TEXTS | {"chosen": True}, "field chosen: true or false"),
        ("explicit", TEXTS | {"prompt": {"a": 1}}, "field prompt: an object"),
        ("explicit", TEXTS | {"prompt": "\ud800"}, "field prompt: a lone surrogate"),
        ("implicit", WHOLE | {"chosen": [user(Q)]}, "field chosen: the last turn is the user's"),
        (
            "implicit",
            {"chosen": [bot("a")], "rejected": [bot("b")]},
            "there is nothing before the reply",
        ),
        (
            "implicit",
            WHOLE | {"chosen": [user(Q), {"role": "assistant"}]},
            "field chosen[1].content: missing",
        ),
        (
            "implicit",
            WHOLE | {"chosen": [user(Q), {"role": "assistant", "content": None}]},
            "chosen[1].content: ",
        ),
        ("implicit", WHOLE | {"chosen": [Q]}, "field chosen[0]: a text"),
        (
            "implicit",
            WHOLE
            | {"chosen": [user(Q), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "field chosen[1]: a tool call",
        ),
        (
            "implicit",
            WHOLE
            | {
                "rejected": [
                    user(Q),
                    {**bot("I look it up."), "function_call": {"name": "f"}},
                    bot("b"),
                ]
            },
            "field rejected[1]: a tool call",
        ),
        (
            "implicit",
            WHOLE | {"chosen": [user(Q), {"role": "ipython", "content": "x"}, bot("b")]},
            "field chosen[1]: 'ipython', a tool's turn",
        ),
        ("messages", WHOLE | {"rejected": []}, "field rejected: an empty list"),
        ("messages", {"chosen": [bot("a")], "rejected": [bot("b")]}, "field prompt: missing"),
        (
            "hh_rlhf",
            {"chosen": HH, "rejected": "Hello."},
            "field rejected: there is no assistant turn",
        ),
        (
            "hh_rlhf",
            {"chosen": HH, "rejected": "Hi\n\nAssistant: a"},
            "field rejected: the text does not begin with a turn",
        ),
        (
            "hh_rlhf",
            {"chosen": HH, "rejected": HH + "\n\nHuman: bye"},
            "field rejected: the last turn is the human's",
        ),
    ],
)
def test_a_faulty_row_is_named(form: str, row: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError) as raised:
        READERS[form](apply_column_map(row, {}), "pairs.jsonl:7")
    text = str(raised.value)
    assert "expected: " in text
    assert "fix: " in text
    assert text.startswith("pairs.jsonl:7, field ")
    assert place in text


@pytest.mark.parametrize(
    ("shape", "change", "place"),
    [
        ("TRL explicit texts", {"chosen": [user("?"), bot("Blue.")]}, "field chosen: a list"),
        ("TRL implicit conversations", {"chosen": "[{"}, "field chosen: a text"),
        (
            "TRL implicit conversations",
            {"chosen": [user(Q), {"role": "tool", "content": "x"}]},
            "chosen[1]: 'tool'",
        ),
        (
            "TRL implicit conversations",
            {"chosen": [user(Q), {"role": "nurse", "content": "x"}]},
            "chosen[1].role: 'nurse'",
        ),
        (
            "TRL implicit conversations",
            {"chosen": [user(Q)]},
            "field chosen: the last turn is the user's",
        ),
        (
            "TRL implicit conversations",
            {"chosen": [{"role": "user", "content": [{"type": "image"}]}, bot("a")]},
            "chosen[0].content: a list of parts that are not all texts",
        ),
        (
            "LLaMA-Factory's dpo_en_demo",
            {"chosen": said("observation", "x")},
            "chosen[0]: 'observation'",
        ),
        ("LLaMA-Factory's dpo_en_demo", {"conversations": None}, "field conversations: null"),
        ("Intel/orca_dpo_pairs", {"system": 3}, "field system: a number"),
        (
            "LLaMA-Factory's older alpaca, with history",
            {"output": ["a", "b", "c"]},
            "field output: a list of 3",
        ),
        (
            "LLaMA-Factory's older alpaca, with history",
            {"history": ["Hi"]},
            "field history[0]: a text",
        ),
        ("openbmb/UltraFeedback", {"completions": ["a"]}, "field ranks: missing"),
        (
            "openbmb/UltraFeedback",
            {"completions": [{"response": "a", "overall_score": "good"}]},
            "overall_score: a text",
        ),
        ("texts with scores", {"scores": [1.0]}, "field scores: a list"),
        ("texts with ranks", {"ranks": None}, "field ranks: null"),
        ("OpenAI preference fine-tuning", {"input": None}, "field input: null"),
        ("lmsys/chatbot_arena_conversations", {"winner": "a third"}, "field winner: a text"),
        (
            "hh-rlhf with the dialogue in prompt",
            {"prompt": f"{HH} Blue."},
            "field prompt: the dialogue ends with a reply",
        ),
    ],
)
def test_the_odd_row_is_its_readers_to_report(
    shape: str, change: dict[str, Any], place: str
) -> None:
    rows = SHAPES[shape].rows * 20
    detected, _ = detect(rows)
    assert detected.name == SHAPES[shape].name
    with pytest.raises(DataError) as raised:
        detected.read(apply_column_map(SHAPES[shape].rows[0] | change, {}), "pairs.jsonl:7")
    assert raised.value.where.startswith("pairs.jsonl:7, field ")
    assert place in str(raised.value)
    assert raised.value.expected
    assert raised.value.fix


def test_scores_may_be_written_as_texts() -> None:
    texts = {"prompt": Q, "completions": ["Seven.", "12"], "scores": ["2.0", "10"]}
    rows = [texts, texts | {"completions": ["4", "5"]}] * 10
    assert [(pair.chosen, pair.rejected) for pair in read(rows)][:2] == [
        ("12", "Seven."),
        ("5", "4"),
    ]
    answers = [{"response": "Blue.", "rating": "10"}, {"response": "Seven.", "rating": "9"}]
    unscored = {"response": "Red.", "rating": "N/A"}
    rows = [
        {"prompt": Q, "completions": [unscored, *answers]},
        {"prompt": Q, "completions": [unscored, answers[0]]},
    ]
    first, second = read(rows)
    assert (first.chosen, first.rejected, first.drop) == ("Blue.", "Seven.", None)
    assert second.drop == TOO_FEW
    with pytest.raises(DataError, match=r"scores\[0\]: a text"):
        read([*[texts] * 20, texts | {"scores": ["good", "10"]}])


def test_answers_that_are_numbers_are_no_scores_of_their_own() -> None:
    row = {"prompt": Q, "answers": ["42", "43"], "score": [1.0, 0.0]}
    assert [(pair.chosen, pair.rejected) for pair in read([row] * 3)] == [("42", "43")] * 3


@pytest.mark.parametrize(
    ("shape", "change", "reason"),
    [
        ("TRL explicit texts", {"chosen": None}, EMPTY_CHOSEN),
        ("TRL implicit conversations", {"rejected": None}, EMPTY_REJECTED),
        ("OpenAI preference fine-tuning", {"preferred_output": None}, EMPTY_CHOSEN),
        ("stanfordnlp/SHP", {"labels": None}, UNJUDGED),
        ("stanfordnlp/SHP", {"labels": " "}, UNJUDGED),
        ("stanfordnlp/SHP", {"labels": "NaN"}, UNJUDGED),
        ("stanfordnlp/SHP", {"labels": float("nan")}, UNJUDGED),
        ("stanfordnlp/SHP", {"labels": 1, "human_ref_B": None}, EMPTY_REJECTED),
        ("stanfordnlp/SHP", {"labels": 0, "human_ref_B": None}, EMPTY_CHOSEN),
    ],
)
def test_null_is_as_empty_as_an_empty_cell(shape: str, change: dict[str, Any], reason: str) -> None:
    rows = SHAPES[shape].rows * 20
    detected, _ = detect(rows)
    assert detected.read(rows[0] | change, "pairs.jsonl:7").drop == reason


def test_never_another_column_in_place_of_the_one_that_was_taken() -> None:
    rows = [{"question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 9
    detected, _ = detect(rows)
    with pytest.raises(DataError, match="field question: missing"):
        detected.read({"query": Q, "chosen": "Blue.", "rejected": "Seven."}, "x:1")


@pytest.mark.parametrize("chosen", ["Blue.", f"{Q} Blue."])
@pytest.mark.parametrize("rejected", ["Seven.", f"{Q} Seven."])
def test_a_repetition_is_taken_off_where_it_is(chosen: str, rejected: str) -> None:
    rows = [{"prompt": Q, "chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."}] * 19
    pair = detect(rows)[0].read({"prompt": Q, "chosen": chosen, "rejected": rejected}, "x")
    assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (*BLUE, None)


@pytest.mark.parametrize(
    ("prompt", "again"),
    [
        ("Q 1?\n", "Q 1?"),
        ("Q 1?", " Q 1?"),
        ("Q\r\n1?", "Q\n1?"),
        (" Q\t 1?", "Q 1?\n"),
        ("Q 1?", "Q\u00a01?"),
    ],
)
def test_a_repetition_is_found_whatever_the_white_space(prompt: str, again: str) -> None:
    rows = [{"prompt": prompt, "chosen": f"{again} Blue.", "rejected": f"{again} Seven."}] * 3
    assert detect(rows)[0].name == "doubled"
    (pair, *_) = read(rows)
    assert (pair.messages, pair.chosen, pair.rejected) == (
        (user(prompt.rstrip()),),
        "Blue.",
        "Seven.",
    )
    assert pair.prompt_text is not None  # and with it the texts are those of the set
    assert pair.prompt_text + pair.chosen == rows[0]["chosen"]


@pytest.mark.parametrize(
    ("before", "again", "turns"),
    [
        ({"system": "Be  brief.", "question": Q}, f"Be brief.\n\n{Q}\n\n", BRIEF),
        ({"prompt": [*TALK]}, f"Hi\nHello.\n{Q}\n", TALK),
        ({"prompt": [*TALK]}, f"Hello.\n{Q}\n", TALK),
    ],
)
def test_a_repetition_may_be_of_several_turns(
    before: dict[str, Any], again: str, turns: Turns
) -> None:
    (pair,) = read([{**before, "chosen": f"{again}Blue.", "rejected": f"{again}Seven."}])
    assert (pair.messages, pair.chosen, pair.rejected) == (turns, "Blue.", "Seven.")


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("rejected", "chosen")])
def test_a_repetition_in_one_side_alone_is_refused(sides: tuple[str, str]) -> None:
    one, other = sides
    rows = [{"prompt": Q, one: f"{Q} Blue.", other: "Seven."}] * 6 + [DOUBLED[1]] * 4
    error = refused(rows, "data.format=doubled", "data.format=explicit")
    assert "60% of " + one in error
    assert "0% of " + other in error
    assert follow(rows, "data.format=doubled")[1][0].messages == (user(Q),)
    assert detect([rows[0]] * 4 + [DOUBLED[1]] * 6)[0].name == "explicit"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": Q, "input": "", "chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."},
        {"instruction": Q, "input": "", "output": [f"{Q} Blue.", f"{Q} Seven."]},
        {"messages": [user(Q)], "chosen": f"{Q}\nBlue.", "rejected": f"{Q}\nSeven."},
        {
            "prompt": [*EARLIER, user(Q)],
            "chosen": [bot(f"{Q} Blue.")],
            "rejected": [bot(f"{Q} Seven.")],
        },
        {"prompt": Q, "chosen": [bot(f"{Q} Blue.")], "rejected": [bot(f"{Q} Seven.")]},
        {"prompt": Q, "response_a": f"{Q} Blue.", "response_b": f"{Q} Seven.", "winner": "a"},
        {"prompt": Q, "responses": [f"{Q} Seven.", f"{Q} Blue."], "scores": [1, 2]},
    ],
    ids=lambda row: " ".join(row),
)
def test_a_repetition_is_taken_off_in_every_format(row: dict[str, Any]) -> None:
    detected, _ = detect([row] * 3)
    assert detected.because.endswith(
        ", and both replies begin with the prompt again, which is removed"
    )
    for pair in read([row] * 3):
        assert (pair.messages[-1], pair.chosen, pair.rejected, pair.drop) == (
            user(Q),
            "Blue.",
            "Seven.",
            None,
        )
    blank = {"chosen": None, "output": None, "winner": None, "responses": []}
    assert detected.read(row | {key: value for key, value in blank.items() if key in row}, "x").drop
    (pair, *_) = read([row] * 3, name=detected.name)
    assert (pair.chosen.split(), pair.rejected.split()) == (
        [*Q.split(), "Blue."],
        [*Q.split(), "Seven."],
    )


def test_a_habit_of_the_set_is_no_matter_of_one_row() -> None:
    doubled, plain = DOUBLED
    assert detect([doubled] + [plain] * 19)[0].name == "explicit"
    assert detect([doubled] * 19 + [plain])[0].name == "doubled"
    refused([doubled] * 2 + [plain] * 18, "data.format=doubled", "data.format=explicit")
    refused([doubled] * 17 + [plain] * 3, "data.format=doubled", "data.format=explicit")


def test_a_table_writes_a_blank_list_as_a_text() -> None:
    """In a column that holds nothing else, and in one of lists; a reply that is this text stays
    one."""
    rows = [
        {"prompt": Q, "system": "[]", "history": "[]", "input": "[]", **BLUE_SEVEN}
        for _ in range(3)
    ]
    assert [(pair.messages, pair.chosen) for pair in read(rows)] == [((user(Q),), "Blue.")] * 3
    rows = [{"prompt": Q, "history": "[]", **BLUE_SEVEN}] * 3 + [
        {"prompt": Q, "history": '[["Hi", "Hello."]]', **BLUE_SEVEN}
    ]
    assert [pair.messages for pair in read(rows)] == [(user(Q),)] * 3 + [TALK]
    assert read([{"prompt": Q, "chosen": "[]", "rejected": "none"}, *[TEXTS] * 3])[0].chosen == "[]"


@pytest.mark.parametrize(
    "history", ["[['Hi', 'Hello.']]", "[('Hi', 'Hello.')]", '[["Hi", "Hello."]]']
)
def test_pairs_of_earlier_turns_in_a_table(history: str) -> None:
    assert read([{"prompt": Q, "history": history, **BLUE_SEVEN}] * 3)[0].messages == TALK


@pytest.mark.parametrize("text", ["Be brief.", "简洁。", "Be\nbrief."])
def test_a_system_text_beside_messages_in_an_object_is_read(text: str) -> None:
    rows = [{"prompt": {"system": text, "messages": [user(Q)]}, **BLUE_SEVEN}] * 3
    assert [pair.messages for pair in read(rows)] == [(system(text), user(Q))] * 3


def test_what_an_object_says_beside_its_messages_is_counted_or_refused() -> None:
    for beside in ({"tools": [{"name": "search"}]}, {"documents": ["d"]}, {"images": ["i"]}):
        (pair,) = read([{"prompt": {"messages": [user(Q)], **beside}, **BLUE_SEVEN}])
        assert (pair.messages, pair.has_unread) == ((user(Q),), True)
    for side in (
        {"content": "Blue.", "tool_calls": [{"name": "x"}]},
        {"content": "Blue.", "note": "因为蓝色。"},
    ):
        with pytest.raises(DataError):
            detect([{"prompt": Q, "chosen": side, "rejected": side}] * 3)


def test_an_object_about_a_person_is_no_message() -> None:
    for about in ({"role": "expert", "id": 1}, {"from": "reddit", "text": "r/all"}):
        assert [
            pair.messages for pair in read([{"prompt": Q, "source": about, **BLUE_SEVEN}] * 3)
        ] == [(user(Q),)] * 3


def test_a_message_may_have_the_keys_of_several_sets() -> None:
    turn = {"content": None, "value": Q, "role": None, "from": "human"}
    assert read([{"conversations": [turn], **BLUE_SEVEN}])[0].messages == (user(Q),)


def test_replies_as_texts_and_as_messages_may_be_mixed() -> None:
    rows = [
        {"prompt": Q, **BLUE_SEVEN},
        {"prompt": Q, "chosen": bot("Blue."), "rejected": [bot("Seven.")]},
    ]
    for mixed in (rows, rows[::-1], [*rows, *rows[:1]], [*rows, *rows[1:]]):
        for pair in read(mixed):
            assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q),), "Blue.", "Seven.")


def test_a_column_map_wins_over_the_columns_of_openai() -> None:
    row = {
        "input": [user(Q)],
        "preferred_output": [bot("Blue.")],
        "non_preferred_output": [bot("Seven.")],
    }
    (pair,) = read([row], {"chosen": "non_preferred_output", "rejected": "preferred_output"})
    assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q),), "Seven.", "Blue.")
