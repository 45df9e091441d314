"""Any text and any rows at all."""

import json
import random
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import CHATML, HH, NAMES, Q, bot, detect, part, read, said, system, user

from orpo_lite.data.formats.detect import detect_format
from orpo_lite.data.formats.readers import READERS
from orpo_lite.data.formats.text import begins_with, text_after
from orpo_lite.data.pair import COLUMNS, Row
from orpo_lite.errors import DataError

WORDS = (
    st.text("abc  é🎨'\"[]{}:,\\", min_size=1, max_size=12)
    .filter(str.strip)
    .map(lambda text: f"x{text}")
)


@given(
    brief=st.none() | WORDS,
    turns=st.lists(st.tuples(WORDS, WORDS), max_size=2),
    question=WORDS,
    chosen=WORDS,
    rejected=WORDS,
)
@settings(max_examples=60, deadline=None)
def test_all_shapes_of_one_pair_read_alike(
    brief: str | None, turns: list[tuple[str, str]], question: str, chosen: str, rejected: str
) -> None:
    before = [message for one, other in turns for message in (user(one), bot(other))] + [
        user(question)
    ]
    dialogue = "".join(
        f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}"
        for turn in before
    )
    replies = {"chosen": chosen, "rejected": rejected}
    wholes = {side: [*before, bot(text)] for side, text in replies.items()}
    shapes: dict[str, dict[str, Any]] = {
        "explicit": {"prompt": before, "chosen": bot(chosen), "rejected": bot(rejected)},
        "implicit": wholes,
        "messages": {"prompt": question, **wholes},
        "hh_rlhf": {side: f"{dialogue}\n\nAssistant: {text}" for side, text in replies.items()},
        "sharegpt": {
            "conversations": [said(NAMES[turn["role"]], turn["content"]) for turn in before],
            **{side: said("gpt", text) for side, text in replies.items()},
        },
        "conversation": {"messages": before, **replies},
        "openai": {
            "input": {"messages": before},
            "preferred_output": [bot(chosen)],
            "non_preferred_output": [bot(rejected)],
        },
        "ranked": {
            "prompt": before,
            "answers": [{"answer": rejected, "rank": 2}, {"answer": chosen, "rank": 1}],
        },
        "judged": {
            "context": before,
            "response1": chosen,
            "response2": rejected,
            "overall_preference": -1,
        },
        "alpaca": {
            "instruction": question,
            "input": "",
            "history": [list(turn) for turn in turns],
            **replies,
        },
        "orca": {"question": question, **replies} if not turns else {},
    }
    stands_already = brief and any(
        begins_with(brief, turn["content"]) for turn in before if turn["role"] == "user"
    )
    for name, row in shapes.items():
        # The last case: history goes on to the prompt and the reply, so it is none.
        if not row or (name == "alpaca" and turns[-1:] == [(question, chosen)]):
            continue
        row = {"system": brief or " ", **row}
        expected = (
            tuple(before) if stands_already else ((system(brief),) if brief else ()) + tuple(before)
        )
        (pair,) = read([row], name=name)
        assert (pair.messages, pair.chosen, pair.rejected) == (expected, chosen, rejected), name
        if text_after(question, chosen) is text_after(question, rejected) is None:
            orca = name == "orca" and (not brief or stands_already)
            assert detect([row])[0].name == ("explicit" if orca else name)


@pytest.mark.parametrize("values", [(1, 2), (0, 1), (0, 2), (1, 3), (0, 1, 2)])
@pytest.mark.parametrize("column", ["overall_preference", "preference_strength"])
def test_a_strength_below_0_in_no_row_is_refused(column: str, values: tuple[int, ...]) -> None:
    rows = [
        {"prompt": Q, "response_1": "Blue.", "response_2": "Seven.", column: value}
        for value in values
    ]
    with pytest.raises(DataError, match="is never below 0"):
        detect_format(rows)
    assert detect_format([*rows, rows[0] | {column: -1}]).name == "judged"


ODD: list[Any] = [
    *(
        None,
        "",
        " ",
        [],
        {},
        0,
        -1,
        1.5,
        True,
        float("nan"),
        10**400,
        "1",
        "a",
        "tie",
        "[{",
        '[{"role": "user"',
        "[]",
    ),
    *(
        [None],
        [[]],
        [{}],
        ["a"],
        [["a", "b"]],
        [["a"]],
        [1, 2],
        [2, None],
        {"messages": []},
        {"messages": [user("q")]},
    ),
    *(
        {"role": "user"},
        [{"role": None}],
        [{"role": "user", "content": None}],
        [{"role": ["x"], "content": "c"}],
    ),
    *(
        [bot("a"), "a"],
        [{"role": "assistant", "content": [part("a")]}],
        [{"role": "assistant", "content": []}],
    ),
    *(
        [{**user("q"), "tool_calls": "x"}],
        [said("human", "q")],
        [{"from": "gpt", "value": ["a"]}],
        [user("q")],
    ),
    *(
        [{"input": "q", "output": "a"}],
        [{"input": "q"}],
        [{"answer": "a", "score": 1}, {"answer": "b", "score": None}],
    ),
    [user("q"), bot("a")],
    *(
        [{"response": None, "rank": 1}, {"answer": "a", "rank": "x"}],
        [{"text": "a"}],
        {"role": "user", "content": {}},
    ),
    *(
        "\ud800",
        "{'role': 'user'}",
        "['a']",
        "array([{'role': 'user'}])",
        HH,
        f"{HH} a\n\nHuman: b",
        CHATML,
        "text",
        Q,
    ),
]


LIKELY = ("prompt", "chosen", "rejected")


NAMED = sorted(
    {
        *COLUMNS,
        "instruction",
        "question",
        "messages",
        "answers",
        "responses",
        "ranking",
        "output",
        "winner",
        "preferred_output",
        "non_preferred_output",
        "context",
        " Chosen",
        "response_0",
        "response_1",
        "labels",
        "better_response_id",
        "human_ref_A",
        "human_ref_B",
        "overall_preference",
        "dialog",
    }
    - {*LIKELY}
)


def anything(chance: random.Random) -> tuple[list[Row], dict[str, str], str, bool]:
    """Rows whose columns mostly hold one kind of value each, and what a person may have set."""
    columns = [
        *(name for name in LIKELY if chance.random() < 0.7),
        *chance.sample(NAMED, chance.randint(0, 5)),
    ]
    usual = {column: chance.choice(ODD) for column in columns}
    rows = [
        {
            column: value
            if chance.random() < 0.8
            else json.dumps(value)
            if chance.random() < 0.5
            else chance.choice(ODD)
            for column, value in usual.items()
            if chance.random() < 0.95
        }
        for _ in range(chance.randint(1, 4))
    ]
    column_map = {
        chance.choice(COLUMNS): chance.choice(columns)
        for _ in range(chance.randint(0, 2))
        if columns
    }
    return rows, column_map, chance.choice(["auto", "auto", *READERS]), chance.random() < 0.2


def test_no_rows_escape_as_a_traceback() -> None:
    chance = random.Random(0)
    read_rows = refused_sets = 0
    for _ in range(8000):
        rows, column_map, name, plain = anything(chance)
        column_map = {
            ours: theirs
            for ours, theirs in column_map.items()
            if any(theirs in row for row in rows)
        }
        try:
            detected, mapped = detect(rows, column_map, name=name, plain=plain)
        except DataError as error:
            assert error.fix  # noqa: PT017 - either outcome is right
            refused_sets += 1
            continue
        for row in mapped:
            with suppress(DataError):
                detected.read(row, "x:1")
                read_rows += 1
    assert read_rows > 100
    assert refused_sets > 100
