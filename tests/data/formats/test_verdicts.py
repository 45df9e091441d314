"""One reply, two answers and a verdict: what says which is the better."""

from typing import Any

import pytest
from shapes import Q, bot, detect, follow, read, refused, said, user

from orpo_lite.data.pair import TIED
from orpo_lite.errors import DataError


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"prompt": Q, "completion": "Blue.", "label": True},
            "prompt, completion and label hold single replies with a label",
        ),
        (
            {"prompt": [user(Q)], "completion": [bot("Blue.")], "label": False},
            "hold single replies with a label",
        ),
        ({"messages": [user(Q), bot("Blue.")]}, "messages holds one conversation per row"),
        (
            {"conversations": [said("human", Q), said("gpt", "Blue.")]},
            "conversations holds one conversation per row",
        ),
        (
            {"messages": [user(Q), bot("Blue.")], "label": True},
            "messages and label hold single replies with a label",
        ),
        (
            {"prompt": Q, "completion": "Blue."},
            "prompt and completion hold one reply per prompt",
        ),
        (
            {"instruction": Q, "input": "", "output": "Blue."},
            "instruction and output hold one reply per prompt",
        ),
        ({"question": Q, "answer": "Blue."}, "question and answer hold one reply per prompt"),
    ],
)
def test_one_reply_is_no_pair(row: dict[str, Any], sentence: str) -> None:
    error = refused([row] * 3)
    assert sentence in error
    assert "two replies to one prompt, a better and a worse one" in error
    assert "no setting helps: write each pair as prompt, chosen and rejected" in error


JUDGED = {"question": Q, "gpt": "Blue.", "claude_2": "Seven."}


JUDGED_MAP = {
    "prompt": "question",
    "response_a": "gpt",
    "response_b": "claude_2",
    "better": "Winner",
}


@pytest.mark.parametrize(
    ("verdicts", "chosen"),
    [
        (["gpt", "Claude_2", "tie"], ["Blue.", "Seven.", None]),
        (["A", "claude_2", "b"], ["Blue.", "Seven.", "Seven."]),
        ([1, 2, 1.0], ["Blue.", "Seven.", "Blue."]),
        ([" a ", "b.", "B"], ["Blue.", "Seven.", "Seven."]),
        (["model_a", "response_b", "both", "neither"], ["Blue.", "Seven.", None, None]),
    ],
)
def test_a_verdict_may_name_the_columns(verdicts: list[Any], chosen: list[str | None]) -> None:
    pairs = read([JUDGED | {"Winner": verdict} for verdict in verdicts], JUDGED_MAP)
    assert [None if pair.drop == TIED else pair.chosen for pair in pairs] == chosen


@pytest.mark.parametrize("verdicts", [["x", "y"], [0, 1], [1, 1], ["x", "y", "gpt"], [True, False]])
def test_a_verdict_that_is_not_understood_is_shown(verdicts: list[Any]) -> None:
    with pytest.raises(DataError) as raised:
        detect([JUDGED | {"Winner": verdict} for verdict in verdicts], JUDGED_MAP)
    held = "true or false" if verdicts[0] is True else repr(str(verdicts[0]))
    assert raised.value.found.startswith(
        f"Winner should say which of gpt and claude_2 is better, but holds {held}"
    )
    assert raised.value.expected == (
        "a or gpt if gpt is better; b or claude_2 if claude_2 is better; or tie"
    )


def test_a_verdict_that_is_a_text_is_not_shown() -> None:
    row = {
        "prompt": Q,
        "answer_a": "Blue.",
        "answer_b": "Seven.",
        "winner": "The first one, by a wide margin.",
    }
    refused([row] * 3)


def test_a_verdict_that_names_the_one_and_the_other_says_nothing() -> None:
    rows = [{"prompt": Q, "text_a": "Blue.", "text_b": "Seven.", "winner": end} for end in "ab"]
    with pytest.raises(DataError, match="winner should say which of text_b and text_a is better"):
        detect(rows, {"response_a": "text_b", "response_b": "text_a"})


def test_the_odd_verdict_is_named_with_its_row() -> None:
    rows = [JUDGED | {"Winner": verdict} for verdict in [*["gpt"] * 5, "x"]]
    with pytest.raises(DataError, match="x:6, field better: a text"):
        read(rows, JUDGED_MAP)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "answer_a": "Blue.", "answer_b": "Seven."},
        {
            "prompt": Q,
            "answer_a": "Blue.",
            "answer_b": "Seven.",
            "label": 1,
        },  # of which? Nobody wrote it down
        {"prompt": Q, "response_a": "Blue.", "response_b": "Seven.", "preference_strength": 2},
        {
            "prompt": Q,
            "completions": [
                {"response": "Blue.", "helpfulness": 3},
                {"response": "7", "helpfulness": 1},
            ],
        },
        {"prompt": Q, "completions": [{"response": "Blue.", "score": 3, "rank": 3}] * 2},
    ],
)
def test_the_polarity_is_never_guessed(row: dict[str, Any]) -> None:
    assert "no setting helps" in refused([row] * 3)


ANSWERS = {"prompt": Q, "answer_0": "Blue.", "answer_1": "Seven."}


@pytest.mark.parametrize(
    "column", ["vote", "best", "Preferred", "chosen_answer", "verdict", "human_choice", "label"]
)
def test_a_column_that_names_the_better_answer_is_offered(column: str) -> None:
    rows = [ANSWERS | {column: i % 2, "loser": 1 - i % 2} for i in range(4)]
    refused(rows, f"data.column_map=better={column}")
    pairs = follow(rows, f"data.column_map=better={column}")[1]
    assert [pair.chosen for pair in pairs] == ["Blue.", "Seven."] * 2


@pytest.mark.parametrize(
    "column",
    [
        "loser",
        "worse",
        "worst_answer",
        "reject",
        "rejected_label",
        "less_preferred",
        "non_preferred",
        "not_chosen",
        "second_best",
        "best_score",
        "label_rank",
        "correct",
        "grade",
        "score_0",
        "best_0",
        "rating",
        "reward",
        "x",
    ],
)
def test_no_other_column_is_offered_as_the_verdict(column: str) -> None:
    rows = [ANSWERS | {column: i % 2} for i in range(4)]
    assert "no setting helps: write each pair as prompt, chosen and rejected" in refused(rows)


@pytest.mark.parametrize(
    ("one", "other", "lines"),
    [
        ("less_preferred_answer", "more_preferred_answer", ["ba"]),
        ("least_preferred_answer", "most_preferred_answer", ["ba"]),
        ("worse_than_best", "best", ["ba"]),
        ("second_best", "best", ["ba"]),
        ("non_rejected", "rejected_text", ["ab"]),
        ("good_answer", "better_answer", ["ab", "ba"]),
        ("best_of_the_worst", "text_b", ["ab", "ba"]),
        ("response_j", "response_k", ["ab", "ba"]),
    ],
)
def test_a_guess_never_takes_the_wrong_side(one: str, other: str, lines: list[str]) -> None:
    rows = [{"question": Q, one: "Seven.", other: "Blue."}] * 2
    said = {
        "ab": f"data.column_map=chosen={one},rejected={other}",
        "ba": f"data.column_map=chosen={other},rejected={one}",
    }
    refused(rows, *(said[line] for line in lines))
    for line in lines:
        (pair, _) = follow(rows, said[line])[1]
        assert pair.chosen == {"ab": "Seven.", "ba": "Blue."}[line]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("chosen_response", "rejected_response"),
        ("response_chosen", "response_rejected"),
        ("accepted", "rejected"),
        ("winner", "loser"),
        ("BestResponse", "WorstResponse"),
        ("chosen", "rejected_response"),
        ("preferred", "dispreferred"),
        ("chosen_text", "not_chosen_text"),
        ("output_preferred", "output_non_preferred"),
        ("y_w", "y_l"),
    ],
)
@pytest.mark.parametrize(
    "style", [str, bot, lambda text: [bot(text)], lambda text: [user(Q), bot(text)]]
)
def test_names_that_say_which_is_the_better_are_read(
    chosen: str, rejected: str, style: Any
) -> None:
    extra = {"chosen_score": 3, "better_model": "m", "label": "Blue."}
    rows = [{rejected: style("Seven."), "prompt": Q, chosen: style("Blue."), **extra}] * 3
    for pair in read(rows):
        assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q),), "Blue.", "Seven.")
    assert detect(rows)[0].columns["chosen"] == chosen


CRITIQUES = {"chosen_critique": "It is right.", "rejected_critique": "It is wrong."}
NAMES = {"winner": "GPT-4 Turbo", "loser": "Llama 2 70b"}


@pytest.mark.parametrize(
    "row",
    [
        {"answer_1": "Blue.", "answer_2": "Seven.", "winner": "gpt", "loser": "claude"},
        {"response_a": "It is blue.", "response_b": "Seven, I say.", **NAMES},
        {"a": "It is blue.", "b": "Seven, I say.", **NAMES},
        {"output": "It is blue.", **NAMES},
        {
            "output_1": "Blue.",
            "output_2": "Seven.",
            "winner": "The first output",
            "loser": "The second output",
        },
        {
            "response_a": "Blue.",
            "response_b": "Seven.",
            "chosen_explanation": "So it is.",
            "rejected_explanation": "No.",
        },
        {"chosen": "Blue.", "rejected_explanation": "It is wrong."},
        {"answer_1": "Blue.", "answer_2": "Seven.", "best_url": "a b", "worst_url": "c d"},
        {"accepted_at": "on Monday", "rejected_at": "on Friday", "response": "It is blue."},
        {
            "text_1": "Blue.",
            "text_2": "Seven.",
            "chosen_by": "Annotator 3",
            "rejected_by": "Annotator 4",
        },
        {"messages": [user(Q), bot("Blue.")], "bad_words": "some words"},
        {"messages": [user(Q), bot("Blue.")], "loser": "gpt 4"},
        {"positive": "It is blue.", "negative": "Seven, I say."},
        {"preferred_over": "Seven, I say.", "rejected": "It is blue."},
        {"previously_chosen": "Seven, I say.", "rejected": "It is blue."},
        {
            "chosen": "Response A",
            "rejected": "Response B",
            "response_a": "Blue.",
            "response_b": "Seven.",
        },
    ],
)
def test_what_is_said_of_a_reply_is_no_reply(row: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        detect([{"prompt": f"{Q} {i}", **row} for i in range(6)])


@pytest.mark.parametrize(
    "verdict", [{"better": 1}, {"better_response_id": 1}, {"winner": "Answer 1"}]
)
@pytest.mark.parametrize("beside", [CRITIQUES, {"better_text": "x y", "worse_text": "z w"}])
def test_a_verdict_comes_before_names(verdict: dict[str, Any], beside: dict[str, str]) -> None:
    rows = [
        {"prompt": f"{Q} {i}", "answer_1": "Blue.", "answer_2": "Seven.", **verdict, **beside}
        for i in range(6)
    ]
    assert {(pair.chosen, pair.rejected) for pair in read(rows)} == {("Blue.", "Seven.")}
