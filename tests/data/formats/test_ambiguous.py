"""Two readings of one set are refused, with the setting that leads to each."""

from collections.abc import Callable
from typing import Any

import pytest
from shapes import (
    BLUE,
    BLUE_SEVEN,
    BRIEF,
    CHATML,
    DOUBLED,
    EARLIER,
    HH,
    ORCA,
    SEVEN,
    TALK,
    Q,
    bot,
    detect,
    follow,
    read,
    refused,
    said,
    system,
    user,
    wholes,
)

from orpo_lite.errors import DataError

SAFE = [
    {
        "prompt": Q,
        "response_0": "Blue.",
        "response_1": "Seven.",
        "prompt_source": "s",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca-7B",
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "better_response_id": better,
        "safer_response_id": safer,
        "response_0_sha256": "ab",
        "response_1_sha256": "cd",
    }
    for better, safer in ((0, 1), (0, 0))
]


OTHER = ((user("Other text"),), "Blue.", "Seven.")


WORDS_ALONE = ("Sky", "Ice")


TWO_READINGS: dict[str, tuple[list[dict[str, Any]], dict[str, tuple[str, list[Any]]]]] = {
    "prompt and question differ": (
        [{"prompt": "Other text", "question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 2,
        {
            "data.column_map=prompt=prompt": ("explicit", [OTHER] * 2),
            "data.column_map=prompt=question": ("explicit", [BLUE] * 2),
        },
    ),
    "a strength without a sign": (
        [
            {"prompt": Q, "response_1": "Seven.", "response_2": "Blue.", "overall_preference": n}
            for n in (1, 2)
        ],
        {
            "data.column_map=preference_strength=overall_preference": ("judged", [BLUE] * 2),
            "data.column_map=better=overall_preference": ("judged", [SEVEN, BLUE]),
        },
    ),
    "a strength of that name without a sign": (
        [
            {"prompt": Q, "response_1": "Seven.", "response_2": "Blue.", "preference_strength": n}
            for n in ("1", 2.0)
        ],
        {
            "data.column_map=preference_strength=preference_strength": ("judged", [BLUE] * 2),
            "data.column_map=better=preference_strength": ("judged", [SEVEN, BLUE]),
        },
    ),
    "a context beside the question": (
        [{"context": "A long text", "question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 2,
        {
            "data.column_map=prompt=question": ("explicit", [BLUE] * 2),
            "data.column_map=prompt=context": (
                "explicit",
                [((user("A long text"),), "Blue.", "Seven.")] * 2,
            ),
            "data.column_map=prompt=question,input=context": (
                "explicit",
                [((user(f"{Q}\nA long text"),), "Blue.", "Seven.")] * 2,
            ),
        },
    ),
    "two names for the prompt": (
        [{"query": "Other text", "question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 2,
        {
            "data.column_map=prompt=question": ("explicit", [BLUE] * 2),
            "data.column_map=prompt=query": ("explicit", [OTHER] * 2),
        },
    ),
    "two system columns": (
        [ORCA | {"system_prompt": "Other text"}] * 2,
        {
            "data.column_map=system=system": ("orca", [(BRIEF, "Blue.", "Seven.")] * 2),
            "data.column_map=system=system_prompt": (
                "orca",
                [((system("Other text"), user(Q)), *BLUE[1:])] * 2,
            ),
        },
    ),
    "a conversation and a prompt that it does not hold": (
        [{"messages": [*TALK], "prompt": "Other text", "chosen": "Blue.", "rejected": "Seven."}]
        * 2,
        {
            "data.column_map=conversation=messages": (
                "conversation",
                [(TALK, "Blue.", "Seven.")] * 2,
            ),
            "data.column_map=prompt=prompt": ("explicit", [OTHER] * 2),
        },
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        SAFE,
        {
            "data.column_map=better=better_response_id": ("judged", [BLUE, BLUE]),
            "data.column_map=better=safer_response_id": ("judged", [SEVEN, BLUE]),
        },
    ),
    "a verdict under a name that says nothing": (
        [
            {"prompt": Q, "answer_a": "Blue.", "answer_b": "Seven.", "vote": "A"},
            {"prompt": Q, "answer_a": "Seven.", "answer_b": "Blue.", "vote": "B"},
        ],
        {"data.column_map=better=vote": ("judged", [BLUE, BLUE])},
    ),
    "replies that name the two answers": (
        [
            {
                "prompt": Q,
                "answer_a": "Seven.",
                "answer_b": "Blue.",
                "chosen": "answer_b",
                "rejected": "answer_a",
            },
            {
                "prompt": Q,
                "answer_a": "Blue.",
                "answer_b": "Seven.",
                "chosen": "Answer_a",
                "rejected": "Answer_b",
            },
        ],
        {"data.column_map=better=chosen": ("judged", [BLUE, BLUE])},
    ),
    "replies that are letters of the two answers": (
        [
            {
                "prompt": Q,
                "response_a": "Seven.",
                "response_b": "Blue.",
                "chosen": "B",
                "rejected": "A",
            }
        ]
        * 2,
        {"data.column_map=better=chosen": ("judged", [BLUE, BLUE])},
    ),
    "replies that name two columns": (
        [{"prompt": Q, "small": "Seven.", "large": "Blue.", "chosen": "large", "rejected": "small"}]
        * 2,
        {
            "data.column_map=response_a=small,response_b=large,better=chosen": (
                "judged",
                [BLUE, BLUE],
            )
        },
    ),
    "two pairs of answers": (
        [
            {
                "prompt": Q,
                "winner": "a",
                "answer_a": "Blue.",
                "answer_b": "Seven.",
                "reply_a": "Seven.",
                "reply_b": "Blue.",
            }
        ]
        * 2,
        {
            "data.column_map=response_a=answer_a,response_b=answer_b": ("judged", [BLUE] * 2),
            "data.column_map=response_a=reply_a,response_b=reply_b": ("judged", [SEVEN] * 2),
        },
    ),
    "texts with numbers of unknown meaning": (
        [{"prompt": Q, "responses": ["Blue.", "Seven."], "numbers": [2, 1]}] * 2,
        {
            "data.column_map=scores=numbers": ("ranked", [BLUE] * 2),
            "data.column_map=ranks=numbers": ("ranked", [SEVEN] * 2),
        },
    ),
    "texts with scores and ranks": (
        [{"prompt": Q, "responses": ["Blue.", "Seven."], "scores": [1, 2], "ranks": [1, 2]}] * 2,
        {
            "data.column_map=scores=scores": ("ranked", [SEVEN] * 2),
            "data.column_map=ranks=ranks": ("ranked", [BLUE] * 2),
        },
    ),
    "a prompt that a part of the texts repeats": (
        DOUBLED,
        {
            "data.format=doubled": ("doubled", [BLUE, BLUE]),
            "data.format=explicit": ("explicit", [((user(Q),), f"{Q} Blue.", f"{Q} Seven."), BLUE]),
        },
    ),
    "a raw column beside a templated prompt": (
        [{"prompt": CHATML, "question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 2,
        {"data.column_map=prompt=question": ("explicit", [BLUE] * 2)},
    ),
    "a raw column beside a templated prompt and a system": (
        [{"prompt": CHATML, **ORCA}] * 2,
        {"data.column_map=prompt=question": ("orca", [(BRIEF, "Blue.", "Seven.")] * 2)},
    ),
    "a templated prompt": (
        [
            {
                "prompt": CHATML,
                "chosen": "Blue.<|im_end|>",
                "rejected": "Seven.<|im_end|>",
                "system": "Be  brief.",
            }
        ]
        * 2,
        {
            "data.chat_template=none": (
                "explicit",
                [((user(CHATML),), "Blue.<|im_end|>", "Seven.<|im_end|>")] * 2,
            )
        },
    ),
    "replies that end with an end-of-turn marker": (
        [{"prompt": Q, "chosen": "Blue.</s>", "rejected": "Seven.</s>\n"}] * 2,
        {"data.chat_template=none": ("explicit", [((user(Q),), "Blue.</s>", "Seven.</s>\n")] * 2)},
    ),
    "earlier turns in a conversation of their own": (
        [{"prompt": Q, "conversation": [*EARLIER], **BLUE_SEVEN}] * 2,
        {
            "data.column_map=history=conversation": ("explicit", [(TALK, "Blue.", "Seven.")] * 2),
            "data.column_map=prompt=prompt": ("explicit", [BLUE] * 2),
        },
    ),
    "earlier turns beside whole conversations": (
        [{"prompt": Q, "messages": [*EARLIER], **wholes(user(Q))}] * 2,
        {
            "data.column_map=history=messages": ("messages", [(TALK, "Blue.", "Seven.")] * 2),
            "data.column_map=prompt=prompt": ("messages", [BLUE] * 2),
        },
    ),
    "earlier turns beside whole conversations and no prompt": (
        [{"messages": [*EARLIER], **wholes(user(Q))}] * 2,
        {
            "data.column_map=history=messages": ("implicit", [(TALK, "Blue.", "Seven.")] * 2),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "earlier turns and the question beside whole conversations": (
        [{"messages": [*TALK], **wholes(user(Q))}] * 2,
        {
            "data.column_map=conversation=messages": (
                "conversation",
                [(TALK, "Blue.", "Seven.")] * 2,
            ),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "a system turn in ShareGPT's conversations beside whole ones": (
        [{"conversations": [said("system", "Be  brief."), said("human", Q)], **wholes(user(Q))}]
        * 2,
        {
            "data.column_map=conversation=conversations": (
                "conversation",
                [(BRIEF, "Blue.", "Seven.")] * 2,
            ),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "a system turn in messages that end with the better reply": (
        [{"prompt": Q, "messages": [*BRIEF, bot("Blue.")], **wholes(user(Q))}] * 2,
        {
            "data.column_map=conversation=messages": (
                "conversation",
                [(BRIEF, "Blue.", "Seven.")] * 2,
            ),
            "data.column_map=prompt=prompt": ("messages", [BLUE] * 2),
        },
    ),
    "a system turn under another name, in messages that end with the better reply": (
        [{"prompt": Q, "turns": [*BRIEF, bot("Blue.")], **BLUE_SEVEN}] * 2,
        {
            "data.column_map=conversation=turns": (
                "conversation",
                [(BRIEF, "Blue.", "Seven.")] * 2,
            ),
            "data.column_map=prompt=prompt": ("explicit", [BLUE] * 2),
        },
    ),
    "earlier turns in messages that end with a third reply": (
        [{"prompt": Q, "messages": [*TALK, bot("Red?")], **BLUE_SEVEN}] * 2,
        {"data.column_map=prompt=prompt": ("explicit", [BLUE] * 2)},
    ),
    "a system turn in messages beside two whole answers": (
        [
            {
                "messages": [*BRIEF],
                "response_a": [user(Q), bot("Blue.")],
                "response_b": [user(Q), bot("Seven.")],
                "winner": "a",
            }
        ]
        * 2,
        {"data.column_map=conversation=messages": ("judged", [(BRIEF, "Blue.", "Seven.")] * 2)},
    ),
    "texts that begin alike beside what they reply to": (
        [
            {"task": f"{Q} {i}", "chosen": f"It is blue {i}", "rejected": f"It is seven {i}"}
            for i in range(2)
        ],
        {
            "data.column_map=prompt=task": (
                "explicit",
                [((user(f"{Q} {i}"),), f"It is blue {i}", f"It is seven {i}") for i in range(2)],
            ),
            "data.format=implicit": (
                "implicit",
                [((user("It is"),), f" blue {i}", f" seven {i}") for i in range(2)],
            ),
        },
    ),
    "texts that begin alike beside the turns that they reply to": (
        [
            {
                "id": f"a{i}",
                "task": "Code",
                "trajectory": [said("human", f"{Q} {i}")],
                "chosen": f"It is blue {i}",
                "rejected": f"It is seven {i}",
            }
            for i in range(2)
        ],
        {
            "data.column_map=prompt=trajectory": (
                "explicit",
                [((user(f"{Q} {i}"),), f"It is blue {i}", f"It is seven {i}") for i in range(2)],
            ),
            "data.format=implicit": (
                "implicit",
                [((user("It is"),), f" blue {i}", f" seven {i}") for i in range(2)],
            ),
        },
    ),
    "texts that begin alike beside a word": (
        [
            {"word": word, "chosen": f"It is blue, {word}", "rejected": f"It is seven, {word}"}
            for word in WORDS_ALONE
        ],
        {
            "data.column_map=prompt=word": (
                "explicit",
                [((user(w),), f"It is blue, {w}", f"It is seven, {w}") for w in WORDS_ALONE],
            ),
            "data.format=implicit": (
                "implicit",
                [((user("It is"),), f" blue, {w}", f" seven, {w}") for w in WORDS_ALONE],
            ),
        },
    ),
    "a prompt that is not in the conversations": (
        [{"prompt": "Be  brief.", **wholes(user(Q))}] * 2,
        {
            "data.column_map=system=prompt": ("messages", [(BRIEF, "Blue.", "Seven.")] * 2),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "a prompt that is not in two whole answers": (
        [
            {
                "prompt": "Be  brief.",
                "response_a": [user(Q), bot("Blue.")],
                "response_b": [user(Q), bot("Seven.")],
                "winner": "a",
            }
        ]
        * 2,
        {"data.column_map=system=prompt": ("judged", [(BRIEF, "Blue.", "Seven.")] * 2)},
    ),
    "earlier turns in a text": (
        [{"prompt": Q, "history": "User: Hi\nBot: Hello.", **BLUE_SEVEN}] * 2,
        {"data.column_map=prompt=prompt": ("explicit", [BLUE] * 2)},
    ),
    "a context beside conversations that hold the question alone": (
        [{"context": "Be  brief.", "question": Q, **wholes(user(Q))}] * 2,
        {
            "data.column_map=system=context": ("implicit", [(BRIEF, "Blue.", "Seven.")] * 2),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "a context that is in the question as well, beside conversations": (
        [{"prompt": f"Be  brief. {Q}", "system": "Be  brief.", **wholes(user(Q))}] * 2,
        {"data.format=implicit": ("implicit", [(BRIEF, "Blue.", "Seven.")] * 2)},
    ),
    "a context beside a prompt that is a list of messages": (
        [{"context": "Be  brief.", "prompt": [*TALK], **BLUE_SEVEN}] * 2,
        {
            "data.column_map=system=context": (
                "explicit",
                [((BRIEF[0], *TALK), "Blue.", "Seven.")] * 2,
            ),
            "data.column_map=prompt=prompt": ("explicit", [(TALK, "Blue.", "Seven.")] * 2),
        },
    ),
    "a list of texts beside the question": (
        [{"context": ["One.", "Two."], "question": Q, **BLUE_SEVEN}] * 2,
        {"data.column_map=prompt=question": ("explicit", [BLUE] * 2)},
    ),
    "earlier turns under another name": (
        [{"prompt": Q, "chat_history": [*EARLIER], **BLUE_SEVEN}] * 2,
        {
            "data.column_map=history=chat_history": ("explicit", [(TALK, "Blue.", "Seven.")] * 2),
            "data.column_map=prompt=prompt": ("explicit", [BLUE] * 2),
        },
    ),
    "earlier turns as pairs under another name": (
        [{"messages": [user(Q)], "previous": [["Hi", "Hello."]], **BLUE_SEVEN}] * 2,
        {
            "data.column_map=history=previous": ("conversation", [(TALK, "Blue.", "Seven.")] * 2),
            "data.column_map=conversation=messages": ("conversation", [BLUE] * 2),
        },
    ),
    "a conversation under another name, up to the prompt": (
        [{"prompt": Q, "dialog": [*TALK], **BLUE_SEVEN}] * 2,
        {
            "data.column_map=conversation=dialog": (
                "conversation",
                [(TALK, "Blue.", "Seven.")] * 2,
            ),
            "data.column_map=prompt=prompt": ("explicit", [BLUE] * 2),
        },
    ),
    "ranks that count from 0": (
        [{"prompt": Q, "responses": ["Seven.", "Red?", "Blue."], "ranking": [2, 1, 0]}] * 2,
        {"data.column_map=ranks=ranking": ("ranked", [BLUE] * 2)},
    ),
    "replies that are lists of texts as JSON": (
        [{"prompt": Q, "chosen": '["Blue."]', "rejected": '["Seven."]'}] * 2,
        {"data.format=explicit": ("explicit", [((user(Q),), '["Blue."]', '["Seven."]')] * 2)},
    ),
    "replies of which one is JSON": (
        [{"prompt": Q, "chosen": '[{"text": "Blue."}]', "rejected": "Seven."}] * 2,
        {"data.format=explicit": ("explicit", [((user(Q),), '[{"text": "Blue."}]', "Seven.")] * 2)},
    ),
    "a conversation in which the prompt repeats": (
        [
            {"messages": [user(Q)], **row}
            for row in ({"chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."}, BLUE_SEVEN)
        ],
        {
            "data.format=conversation": (
                "conversation",
                [((user(Q),), f"{Q} Blue.", f"{Q} Seven."), BLUE],
            )
        },
    ),
    "implicit texts with a template": (
        [{"chosen": "[INST] Hi [/INST] Blue.", "rejected": "[INST] Hi [/INST] Seven."}] * 2,
        {
            "data.chat_template=none": (
                "implicit",
                [((user("[INST] Hi [/INST]"),), " Blue.", " Seven.")] * 2,
            )
        },
    ),
}


@pytest.mark.parametrize("case", TWO_READINGS)
def test_two_readings_are_refused_and_each_line_leads_to_one(case: str) -> None:
    rows, lines = TWO_READINGS[case]
    listed = list(lines)
    refused(rows, *listed)
    for line, (name, pairs) in lines.items():
        found, read_pairs = follow(rows, line)
        assert found == name
        assert [(pair.messages, pair.chosen, pair.rejected) for pair in read_pairs] == pairs
        assert not any(pair.drop for pair in read_pairs)


@pytest.mark.parametrize("value", [int, float, str])
@pytest.mark.parametrize(("ends", "numbers"), [("12", (1, 0)), ("12", (0, 0)), ("01", (1, 2))])
def test_numbers_that_count_otherwise_than_the_answers_are_refused(
    ends: str, numbers: tuple[int, int], value: Callable[[int], Any]
) -> None:
    answers = {f"answer_{ends[0]}": "Blue.", f"answer_{ends[1]}": "Seven."}
    rows = [{"prompt": Q, **answers, "winner": value(numbers[i == 9])} for i in range(10)]
    assert "write the expected values into winner" in refused(rows)


def test_a_number_of_neither_answer_puts_all_numbers_in_doubt() -> None:
    rows = [{"prompt": Q, "answer_1": "Blue.", "answer_2": "Seven.", "winner": 1}] * 2
    detected, _ = detect(rows)
    with pytest.raises(
        DataError, match="fix: replace the numbers in winner by a or b in every row"
    ):
        detected.read(rows[0] | {"winner": 0}, "x:3")
    with pytest.raises(DataError, match="fix: correct or remove the row"):
        detected.read(rows[0] | {"winner": "third"}, "x:3")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "messages": [user(Q), bot("Red?")], **BLUE_SEVEN},
        {"prompt": f"Hi > Hello. > {Q}", "messages": [*TALK, bot("Blue.")], **BLUE_SEVEN},
        {"messages": [*TALK, bot("Blue.")], "chosen": f"{HH} Blue.", "rejected": f"{HH} Seven."},
        {"turns": [bot("Red?"), bot("Blue.")], "prompt": Q, **BLUE_SEVEN},
    ],
)
def test_a_conversation_of_which_all_is_read_may_stand_beside_it(row: dict[str, Any]) -> None:
    (pair,) = read([row])
    assert (pair.chosen, pair.rejected, pair.drop) == ("Blue.", "Seven.", None)
