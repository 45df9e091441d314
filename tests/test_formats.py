"""Every preference format in its true shape is read right, and what is not clear is refused with the line that helps.

The shapes are those of the sets' cards and of the loaders that read them; what they say here is our own.
"""

import csv
import json
import random
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_lite.data.formats.detect import Detected, detect_format
from orpo_lite.data.formats.readers import READERS
from orpo_lite.data.formats.text import begins_with, behind
from orpo_lite.data.pair import (
    COLUMNS,
    EMPTY_CHOSEN,
    EMPTY_REJECTED,
    PROMPTS_DIFFER,
    TIED,
    TOO_FEW,
    UNJUDGED,
    Pair,
    Row,
)
from orpo_lite.errors import DataError
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import DataSection

Turns = tuple[dict[str, str], ...]


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def detect(rows: list[Any], column_map: Mapping[str, str] = {}, **settings: Any) -> tuple[Detected, list[Row]]:
    """As pairs.py asks: the rows as data.column_map leaves them."""
    mapped = []
    for row in rows:
        taken = {ours: row[theirs] for ours, theirs in column_map.items() if theirs in row}
        mapped.append({key: value for key, value in row.items() if key not in column_map} | taken)
    return detect_format(mapped, mapped=column_map, **settings), mapped


def read(rows: list[Any], column_map: Mapping[str, str] = {}, **settings: Any) -> list[Pair]:
    detected, mapped = detect(rows, column_map, **settings)
    return [detected.read(row, f"x:{i}") for i, row in enumerate(mapped, start=1)]


def refused(rows: list[Any], *lines: str, **settings: Any) -> str:
    """The refusal of these rows, which holds all three parts, each line, and nothing of what the rows say."""
    with pytest.raises(DataError) as raised:
        detect(rows, **settings)
    error = raised.value
    assert error.where
    assert error.found
    assert error.expected
    assert error.fix
    found = re.findall(r"data\.\w+=[\w=,\[\]-]+", error.fix)
    assert found == list(lines), error.fix
    for text in (text for row in rows for text in texts(row) if len(text) > 8):
        assert text not in str(error)
    return str(error)


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in parts for text in texts(part)]


def follow(rows: list[Any], line: str) -> tuple[str, list[Pair]]:
    """What detection says and reads once the line stands in the recipe."""
    key, _, value = line.removeprefix("data.").partition("=")
    column_map, settings = {}, {}
    if key == "column_map":
        column_map = dict(part.split("=") for part in value.split(","))
        assert set(column_map) <= set(COLUMNS)
    elif key == "format":
        settings = {"name": value}
    else:
        assert line == "data.chat_template=none"
        settings = {"plain": True}
    return detect(rows, column_map, **settings)[0].name, read(rows, column_map, **settings)


@dataclass
class Shape:
    """A set: its rows, what is detected, the columns that are named, and each row's pair."""

    name: str
    rows: list[dict[str, Any]]
    columns: str  # named in `because`
    pairs: list[tuple[Turns, str, str] | str]  # a text: the reason to drop it
    csv: bool = True
    prompt_texts: list[str | None] = field(default_factory=list)

    def check(self, rows: list[Any], **settings: Any) -> None:
        detected, _ = detect(rows, **settings)
        assert detected.name == self.name
        if not settings:
            assert detected.sentence.startswith(f"detected {self.name} because ")
            assert all(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", detected.because) for name in self.columns.split())
        pairs = read(rows, **settings)
        for pair, expected in zip(pairs, self.pairs, strict=True):
            if isinstance(expected, str):
                assert pair.drop == expected
            else:
                assert pair.drop is None
                assert (pair.messages, pair.chosen, pair.rejected) == expected
        for pair, text in zip(pairs, self.prompt_texts, strict=False):
            assert pair.prompt_text == text


Q, Q2 = "Name a  colour 🎨.", "And a number?"
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a  colour 🎨.\n\nAssistant:"
HH_TURNS = (user("Hi"), bot("Hello."), user(Q))
BLUE_SEVEN = {"chosen": "Blue.", "rejected": "Seven."}
TALK = (user("Hi"), bot("Hello."), user(Q))
WHOLE = {"chosen": [user(Q), bot("a")], "rejected": [user(Q), bot("b")]}
TEXTS = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}
NAMES = {"user": "human", "assistant": "gpt"}
ORCA = {"system": "Be  brief.", "question": Q, "chosen": "Blue.", "rejected": "Seven."}
ONE: list[tuple[Turns, str, str] | str] = [((user(Q),), "Blue.", "Seven."), ((user(Q2),), "7", "Blue")]
BRIEF = (system("Be  brief."), user(Q))
PLAIN = [Q, Q2]

SHAPES: dict[str, Shape] = {
    "TRL explicit texts": Shape(
        "explicit",
        [
            {"prompt": Q, "chosen": "Blue.", "rejected": "Seven.", "score": 8.5},
            {"prompt": Q2, "chosen": "7", "rejected": "Blue", "score": 2},
        ],
        "prompt chosen rejected",
        ONE,
        prompt_texts=PLAIN,
    ),
    "TRL explicit conversations": Shape(
        "explicit",
        [
            {"prompt": [*TALK], "chosen": [bot("Blue.")], "rejected": [bot("Seven.")], "question": "other"},
            {"prompt": [user(Q2)], "chosen": [bot("7")], "rejected": [bot("Blue")], "question": "another"},
        ],
        "prompt chosen rejected",
        [(TALK, "Blue.", "Seven."), ((user(Q2),), "7", "Blue")],
        prompt_texts=[None],
    ),
    "explicit conversations with single messages": Shape(
        "explicit",
        [{"prompt": [system("Be  brief."), user(Q)], "chosen": bot("Blue."), "rejected": bot("Seven.")}] * 2,
        "prompt chosen rejected",
        [(BRIEF, "Blue.", "Seven.")] * 2,
    ),
    "explicit conversations that repeat the prompt behind a system turn": Shape(
        "explicit",
        [{"prompt": [user(Q)], "chosen": [*BRIEF, bot("Blue.")], "rejected": [*BRIEF, bot("Seven.")]}] * 2,
        "prompt chosen rejected",
        [(BRIEF, "Blue.", "Seven.")] * 2,
    ),
    "TRL implicit texts": Shape(
        "implicit",
        [
            {"chosen": "The sky is blue and wide", "rejected": "The sky is black"},
            {"chosen": "Grass is  green 🌱", "rejected": "Grass is  grey"},
        ],
        "chosen rejected",
        [((user("The sky is"),), " blue and wide", " black"), ((user("Grass is"),), "  green 🌱", "  grey")],
        prompt_texts=["The sky is"],
    ),
    "TRL implicit conversations": Shape(
        "implicit",
        [
            {"chosen": [*TALK, bot("Blue.")], "rejected": [*TALK, bot("Seven.")], "prompt": None},
            {"chosen": [user(Q2), bot("7")], "rejected": [user("Other?"), bot("Blue")], "prompt": None},
        ],
        "chosen rejected",
        [(TALK, "Blue.", "Seven."), PROMPTS_DIFFER],
    ),
    "Anthropic/hh-rlhf": Shape(
        "hh_rlhf",
        [
            {"chosen": f"{HH} Blue.", "rejected": f"{HH} Seven."},
            # "Human:" within a turn is text, the same role twice is joined, the last marker counts.
            {
                "chosen": "\n\nHuman: I said:\nHuman: no\n\nHuman: And?\n\nAssistant: a\n\nAssistant:  two spaces",
                "rejected": "\n\nHuman: I said:\nHuman: no\n\nHuman: And?\n\nAssistant: a\n\nAssistant: b",
            },
            {"chosen": f"{HH} Blue.", "rejected": f"{HH.replace('Hi', 'Ho')} Seven."},
        ],
        "chosen rejected",
        [
            (HH_TURNS, "Blue.", "Seven."),
            ((user("I said:\nHuman: no\n\nAnd?"), bot("a")), " two spaces", "b"),
            PROMPTS_DIFFER,
        ],
        prompt_texts=[f"{HH} "],
    ),
    "hh-rlhf with the dialogue in prompt": Shape(
        "hh_rlhf",
        [{"prompt": HH, "chosen": " Blue.", "rejected": " Seven."}] * 2,
        "prompt chosen rejected",
        [(HH_TURNS, "Blue.", "Seven.")] * 2,
        prompt_texts=[f"{HH} "],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": Shape(
        "messages",
        [
            {
                "prompt": text,
                "prompt_id": "1f" * 32,
                "chosen": [*turns, bot("Blue.")],
                "rejected": [*turns, bot("Seven.")],
                "messages": [*turns, bot("Blue.")],
                "score_chosen": 8.5,
                "score_rejected": 7.5,
            }
            for text, turns in ((Q, (user(Q),)), ("not the user's  turn", (user(Q),)), (Q, BRIEF))
        ],
        "chosen rejected prompt",
        [((user(Q),), "Blue.", "Seven."), ((user(Q),), "Blue.", "Seven."), (BRIEF, "Blue.", "Seven.")],
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": Shape(
        "messages",
        [
            {
                "source": "evol_instruct",
                "prompt": Q,
                "chosen": [user(Q), bot("Blue.")],
                "chosen-rating": 4.75,
                "chosen-model": "a-model",
                "rejected": [user(Q), bot("Seven.")],
                "rejected-rating": 2.0,
                "rejected-model": "b-model",
            }
        ]
        * 2,
        "chosen rejected prompt",
        [((user(Q),), "Blue.", "Seven.")] * 2,
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": Shape(
        "messages",
        [
            {
                "source": "Dove",
                "conversation": [{"input": "Hi", "output": "Hello."}, {"input": Q, "output": "Blue."}],
                "original_response": "Blue.",
                "generation_prompt": ["<s>[INST] Hi [/INST]", "<|im_start|>user\nHi<|im_end|>"],
                "raw_generation_responses": ["Seven.", "Red."],
                "new_generations": ["Seven.", "Red."],
                "prompt": "Hi\nHello.\n" + Q,
                "chosen": [*TALK, bot("Blue.")],
                "rejected": [*TALK, bot("Seven.")],
                "rating_chosen": 5,
                "rating_rejected": 4,
                "chosen_model": "original",
                "rejected_model": "a-model",
                "turns": 2,
            }
        ]
        * 2,
        "chosen rejected prompt",
        [(TALK, "Blue.", "Seven.")] * 2,
        csv=False,
    ),
    "mlabonne/orpo-dpo-mix-40k": Shape(
        "messages",
        [
            {
                "source": "Argilla-Capybara",
                "chosen": [*TALK, bot("Blue.")],
                "rejected": [*TALK, bot("Seven.")],
                "prompt": Q,
                "question": "",
            },
            {
                "source": "orca",
                "chosen": [*BRIEF, bot("Blue.")],
                "rejected": [*BRIEF, bot("Seven.")],
                "prompt": "Another text",
                "question": "A question that differs",
            },
        ],
        "chosen rejected prompt",
        [(TALK, "Blue.", "Seven."), (BRIEF, "Blue.", "Seven.")],
    ),
    "argilla/dpo-mix-7k": Shape(
        "implicit",
        [
            {
                "dataset": "argilla/capybara",
                "chosen": [*turns, bot("Blue.")],
                "rejected": [*turns, bot("Seven.")],
                "chosen_rating": 5.0,
                "rejected_rating": 4.0,
            }
            for turns in (TALK, BRIEF)
        ],
        "chosen rejected",
        [(TALK, "Blue.", "Seven."), (BRIEF, "Blue.", "Seven.")],
    ),
    "Intel/orca_dpo_pairs": Shape(
        "orca",
        [ORCA, ORCA | {"system": ""}],
        "system question chosen rejected",
        [(BRIEF, "Blue.", "Seven."), ((user(Q),), "Blue.", "Seven.")],
        prompt_texts=[None, Q],
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": Shape(
        "orca",
        [
            {
                "system": "Be  brief.",
                "input": Q,
                "chosen": "Blue.",
                "rejected": "Seven.",
                "generations": ["Seven.", "Blue."],
                "order": ["rejected", "chosen"],
                "labelling_model": "a-model",
                "labelling_prompt": [system("Judge."), user("Which?")],
                "raw_labelling_response": "2 8",
                "rating": [2.0, 8.0],
                "rationale": "The second.",
                "status": "swapped",
                "original_chosen": "Seven.",
                "original_rejected": "Blue.",
                "chosen_score": 8.0,
                "in_gsm8k_train": False,
            }
        ]
        * 2,
        "system input chosen rejected",
        [(BRIEF, "Blue.", "Seven.")] * 2,
    ),
    "jondurbin/truthy-dpo-v0.1": Shape(
        "orca",
        [
            {"id": "1", "source": "t", "system": "Be  brief.", "prompt": Q, "chosen": "Blue.", "rejected": "Seven."},
            {"id": "2", "source": "t", "system": "  ", "prompt": Q2, "chosen": "7", "rejected": "Blue"},
        ],
        "system prompt chosen rejected",
        [(BRIEF, "Blue.", "Seven."), ONE[1]],
    ),
    "alpaca-like": Shape(
        "alpaca",
        [
            {"instruction": "Name it.", "input": "The sky's colour", "chosen": "Blue.", "rejected": "Seven."},
            {"instruction": Q2, "input": "", "chosen": "7", "rejected": "Blue"},
        ],
        "instruction input chosen rejected",
        [((user("Name it.\nThe sky's colour"),), "Blue.", "Seven."), ONE[1]],
        prompt_texts=["Name it.\nThe sky's colour", Q2],
    ),
    "LLaMA-Factory's older alpaca, with history": Shape(
        "alpaca",
        [
            {"instruction": Q, "input": "", "output": ["Blue.", "Seven."], "history": [["Hi", "Hello."]]},
            {"instruction": Q2, "input": None, "output": ["7", "Blue"], "history": []},
        ],
        "instruction output",
        [(TALK, "Blue.", "Seven."), ONE[1]],
        csv=False,
    ),
    "LLaMA-Factory's dpo_en_demo": Shape(
        "sharegpt",
        [
            {
                "conversations": [said("human", "Hi"), said("gpt", "Hello."), said("human", Q)],
                "chosen": said("gpt", "Blue."),
                "rejected": said("gpt", "Seven."),
            },
            {"conversations": [said("human", Q2)], "chosen": said("gpt", "7"), "rejected": said("gpt", "Blue")},
        ],
        "conversations chosen rejected",
        [(TALK, "Blue.", "Seven."), ONE[1]],
    ),
    "ShareGPT with whole conversations and a system column": Shape(
        "sharegpt",
        [
            {
                "system": text,
                "chosen": [*before, said("human", Q), said("gpt", "Blue.")],
                "rejected": [*before, said("human", Q), said("gpt", "Seven.")],
            }
            for text, before in (("Be  brief.", []), ("", []), ("Not this.", [said("system", "Be  brief.")]))
        ],
        "chosen rejected system",
        [(BRIEF, "Blue.", "Seven."), ((user(Q),), "Blue.", "Seven."), (BRIEF, "Blue.", "Seven.")],
    ),
    "Axolotl's chat_template.default": Shape(
        "conversation",
        [
            {"messages": [*TALK], "chosen": bot("Blue."), "rejected": bot("Seven.")},
            {"messages": [*BRIEF], "chosen": bot("Blue."), "rejected": bot("Seven.")},
        ],
        "messages chosen rejected",
        [(TALK, "Blue.", "Seven."), (BRIEF, "Blue.", "Seven.")],
    ),
    "messages and two texts": Shape(
        "conversation",
        [{"messages": [*TALK], "chosen": "Blue.", "rejected": "Seven.", "prompt": Q}] * 2,
        "messages chosen rejected",
        [(TALK, "Blue.", "Seven.")] * 2,
    ),
    "openbmb/UltraFeedback": Shape(
        "ranked",
        [
            {
                "source": "sharegpt",
                "instruction": Q,
                "models": ["a", "b", "c"],
                "completions": [
                    {
                        "model": letter,
                        "principle": "honesty",
                        "custom_system_prompt": "As an AI ...",
                        "response": text,
                        "annotations": {"honesty": {"Rating": "4", "Rationale": "r"}},
                        "critique": "Fine.",
                        "fine-grained_score": 4.5,
                        "overall_score": score,
                    }
                    for letter, text, score in answers
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
            for answers in (
                [("a", "Seven.", 3.0), ("b", "Blue.", 8.0), ("c", "Red?", 6.5)],
                [("a", "Red", 5.0), ("b", "Blue", 5.0)],
                [("a", "Red", 5.0), ("b", "Blue", None)],  # fine-grained_score is no overall_score
            )
        ],
        "completions overall_score",
        [((user(Q),), "Blue.", "Seven."), TIED, TOO_FEW],
        prompt_texts=[Q],
    ),
    "berkeley-nest/Nectar": Shape(
        "ranked",
        [
            {
                "prompt": f"{HH} ",
                "answers": [
                    {"answer": "Seven.", "model": "a", "rank": 7.0},
                    {"answer": "Blue.", "model": "b", "rank": 1.0},
                    {"answer": "Red?", "model": "c", "rank": 3.0},
                ],
                "turns": 2,
                "num_responses": 3,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            }
        ]
        * 2,
        "answers rank",
        [(HH_TURNS, "Blue.", "Seven.")] * 2,
        prompt_texts=[f"{HH} "],
    ),
    "texts with scores": Shape(
        "ranked",
        [
            {"prompt": Q, "responses": ["Red?", "Seven.", "Blue."], "scores": [2.0, 1.0, 3.0]},
            {"prompt": Q, "responses": ["Red?", "Blue.", "Seven."], "scores": [None, 0.5, -1.0]},
        ],
        "responses scores",
        [((user(Q),), "Blue.", "Seven.")] * 2,
        csv=False,
    ),
    "texts with ranks": Shape(
        "ranked",
        [{"prompt": Q, "completions": ["Red?", "Seven.", "Blue."], "ranks": [2, 3, 1]}] * 2,
        "completions ranks",
        [((user(Q),), "Blue.", "Seven.")] * 2,
        csv=False,
    ),
    "OpenAI preference fine-tuning": Shape(
        "openai",
        [
            {
                "input": {"messages": [*TALK], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [bot("Blue.")],
                "non_preferred_output": [bot("Seven.")],
            },
            {
                "input": {"messages": [user(Q2)], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [bot("7")],
                "non_preferred_output": [bot("Blue")],
            },
        ],
        "input preferred_output non_preferred_output",
        [(TALK, "Blue.", "Seven."), ONE[1]],
    ),
    "lmsys/chatbot_arena_conversations": Shape(
        "judged",
        [
            {
                "question_id": str(i),
                "model_a": "a-model",
                "model_b": "b-model",
                "winner": winner,
                "judge": "arena_user_1",
                "conversation_a": [user(Q), bot(one)],
                "conversation_b": [user(Q), bot(other)],
                "turn": 1,
                "anony": True,
                "language": "English",
                "tstamp": 1682351591.1,
            }
            for i, (winner, one, other) in enumerate(
                [
                    ("model_a", "Blue.", "Seven."),
                    ("model_b", "Seven.", "Blue."),
                    ("tie", "Red", "Blue"),
                    ("tie (bothbad)", "6", "7"),
                ]
            )
        ],
        "conversation_a conversation_b winner",
        [((user(Q),), "Blue.", "Seven."), ((user(Q),), "Blue.", "Seven."), TIED, TIED],
    ),
    "stanfordnlp/SHP": Shape(
        "judged",
        [
            {
                "post_id": "qt3nxl",
                "domain": "askculinary_test",
                "upvote_ratio": 0.98,
                "history": Q,
                "c_root_id_A": "hkh25sc",
                "c_root_id_B": "hkh25lp",
                "created_at_utc_A": 1636822112,
                "created_at_utc_B": 1636822110,
                "score_A": 340,
                "score_B": 166,
                "human_ref_A": one,
                "human_ref_B": other,
                "labels": label,
                "seconds_difference": 2.0,
                "score_ratio": 2.0,
            }
            for label, one, other in ((1, "Blue.", "Seven."), (0, "Seven.", "Blue."))
        ],
        "human_ref_A human_ref_B labels",
        [((user(Q),), "Blue.", "Seven.")] * 2,
        prompt_texts=[Q],
    ),
    "nvidia/HelpSteer2 preference": Shape(
        "judged",
        [
            {
                "split": "train",
                "prompt": Q,
                "response_1": one,
                "response_2": other,
                "preference_strength": strength,
                "preference_statement": "The first is better.",
                "preference_elaboration": "It says more.",
                "three_most_similar_preferences": None,
                "all_preferences_unprocessed": None,
            }
            for strength, one, other in ((-3, "Blue.", "Seven."), (1, "Seven.", "Blue."), (0, "Red", "Blue"))
        ],
        "response_1 response_2 preference_strength",
        [((user(Q),), "Blue.", "Seven."), ((user(Q),), "Blue.", "Seven."), TIED],
    ),
    "nvidia/HelpSteer3": Shape(
        "judged",
        [
            {
                "domain": "general",
                "language": "english",
                "context": [*TALK],
                "response1": first,
                "response2": second,
                "overall_preference": strength,
                "individual_preference": [{"score": 2, "reasoning": "r", "feedback1": "f", "feedback2": "f"}],
            }
            for strength, first, second in ((2, "Seven.", "Blue."), (-1, "Blue.", "Seven."))
        ],
        "response1 response2 overall_preference",
        [(TALK, "Blue.", "Seven.")] * 2,
    ),
    "a prompt that both texts repeat": Shape(
        "doubled",
        [
            {"prompt": Q, "chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."},
            {"prompt": f"{Q2}\n", "chosen": f"{Q2}\n7", "rejected": f"{Q2}\nBlue"},
        ],
        "prompt chosen rejected",
        ONE,
        prompt_texts=[f"{Q} ", f"{Q2}\n"],
    ),
    "contents in parts": Shape(
        "implicit",
        [
            {
                side: [
                    {"role": "user", "content": [part("Name a  "), part("colour 🎨.")]},
                    {"role": "assistant", "content": [part(text)]},
                ]
                for side, text in (("chosen", "Blue."), ("rejected", "Seven."))
            }
        ]
        * 2,
        "chosen rejected",
        [((user(Q),), "Blue.", "Seven.")] * 2,
    ),
    "HH dialogues behind a system text": Shape(
        "hh_rlhf",
        [{side: f"{lead}\n\nHuman: {Q}\n\nAssistant: {text}" for side, text in BLUE_SEVEN.items()}
         for lead in ("Be brief.", "\n\nSystem: Be brief.", "")],
        "chosen rejected",
        [((system("Be brief."), user(Q)), "Blue.", "Seven.")] * 2 + [((user(Q),), "Blue.", "Seven.")],
    ),
    "an HH dialogue as prompt, behind a system text": Shape(
        "hh_rlhf",
        [{"prompt": f"Be brief.\n\nHuman: {Q}\n\nAssistant:", **BLUE_SEVEN}] * 2,
        "prompt chosen rejected",
        [((system("Be brief."), user(Q)), "Blue.", "Seven.")] * 2,
    ),
    "questions about templates": Shape(
        "explicit",
        [
            {"prompt": "What does [INST] mean?", "chosen": "A start.", "rejected": "It ends with </s> and no more"},
            {"prompt": "Is <|im_start|> a token?", "chosen": "Yes: `<|im_start|>`.", "rejected": "No"},
        ],
        "prompt chosen rejected",
        [
            ((user("What does [INST] mean?"),), "A start.", "It ends with </s> and no more"),
            ((user("Is <|im_start|> a token?"),), "Yes: `<|im_start|>`.", "No"),
        ],
    ),
}  # fmt: skip


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
        "system": "system", "prompt": "question", "chosen": "chosen", "rejected": "rejected"}  # fmt: skip
    whole = SHAPES["HuggingFaceH4/ultrafeedback_binarized"].rows
    assert detect(whole)[0].columns == {"chosen": "chosen", "rejected": "rejected"}
    pairs = SHAPES["LLaMA-Factory's older alpaca, with history"].rows
    assert set(detect(pairs)[0].columns) == {"prompt", "input", "output", "history"}  # a blank input too


@pytest.mark.parametrize("spell", [str.capitalize, str.upper, " {} ".format])
@pytest.mark.parametrize("shape", SHAPES)
def test_case_and_spaces_of_a_column_make_no_difference(shape: str, spell: Callable[[str], str]) -> None:
    ours = {"prompt", "chosen", "rejected", "system", "instruction", "input", "messages", "preferred_output"}
    rows = [{spell(key) if key in ours else key: value for key, value in row.items()} for row in SHAPES[shape].rows]
    assert read(rows) == read(SHAPES[shape].rows)
    assert set(detect(rows)[0].columns.values()) <= set(rows[0])


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_dialogue_may_have_the_line_ends_of_windows(ends: str) -> None:
    row = {side: f"{HH} {text}".replace("\n", ends) for side, text in BLUE_SEVEN.items()}
    detected, _ = detect([row] * 2)
    assert detected.name == "hh_rlhf"
    pair = detected.read(row, "x")
    assert (pair.messages, pair.chosen, pair.rejected, pair.prompt_text) == (HH_TURNS, "Blue.", "Seven.", f"{HH} ")


@pytest.mark.parametrize("settings", [{}, {"name": "hh_rlhf"}])
def test_the_replies_to_a_dialogue_may_bring_their_marker(settings: dict[str, Any]) -> None:
    row = {"prompt": HH, "chosen": "\n\nAssistant: Blue.", "rejected": "\n\nAssistant: Seven."}
    ((pair,), name) = read([row], **settings), detect([row], **settings)[0].name
    assert (name, pair.messages, pair.chosen, pair.rejected) == ("hh_rlhf", HH_TURNS, "Blue.", "Seven.")
    (pair,) = read([row | {"prompt": HH.removesuffix("\n\nAssistant:")}], plain=True)
    assert (pair.messages, pair.chosen, pair.prompt_text) == (HH_TURNS, "Blue.", f"{HH} ")


@pytest.mark.parametrize(
    "name", ["System Prompt", "system-prompt", "systemPrompt", " SYSTEM_MESSAGE", "SystemMessage", "system_instruction"]
)
def test_the_words_of_a_name_may_be_put_together_in_any_way(name: str) -> None:
    rows = [{name: "Be  brief.", "question": Q, **BLUE_SEVEN}] * 2
    assert [(pair.messages, pair.chosen) for pair in read(rows)] == [((system("Be  brief."), user(Q)), "Blue.")] * 2
    openai = {"input": {"messages": [*TALK]}, "preferredOutput": [bot("Blue.")], "Non-Preferred Output": [bot("7")]}
    assert read([openai])[0].chosen == "Blue."


# --- what stands before the reply

EARLIER = (user("Hi"), bot("Hello."))


def wholes(*turns: dict[str, str]) -> dict[str, Any]:
    return {"chosen": [*turns, bot("Blue.")], "rejected": [*turns, bot("Seven.")]}


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
        ({"prompt": Q, "history": [*TALK, bot("Blue.")], **BLUE_SEVEN}, (user(Q),)),  # not the reply before the reply
        ({"prompt": f"Hi\nHello.\n{Q}", "history": [["Hi", "Hello."]], **BLUE_SEVEN}, (user(f"Hi\nHello.\n{Q}"),)),
        ({"prompt": Q, "history": [*EARLIER], **wholes(user(Q))}, TALK),
        ({"prompt": Q, "history": [*EARLIER], **wholes(*TALK)}, TALK),
        ({"system": "Be  brief.", "prompt": Q, "history": [*EARLIER], **BLUE_SEVEN}, (BRIEF[0], *TALK)),
        ({"prompt": Q, "history": [*EARLIER], "response_0": "Blue.", "response_1": "Seven.", "winner": 0}, TALK),
        ({"system": "Be  brief.", "prompt": f"Be brief.\n{Q}", **BLUE_SEVEN}, (user(f"Be brief.\n{Q}"),)),
        ({"system": "Be", "prompt": "Beware of it", **BLUE_SEVEN}, (system("Be"), user("Beware of it"))),
    ],
)
def test_nothing_stands_twice_and_nothing_is_lost(row: dict[str, Any], turns: Turns) -> None:
    for pair in read([row] * 3):
        assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (turns, "Blue.", "Seven.", None)


@pytest.mark.parametrize("wrong", ["chosen", "rejected"])
@pytest.mark.parametrize("before", [(), EARLIER])
def test_a_reply_at_the_end_of_the_prompt_is_not_asked_again(wrong: str, before: Turns) -> None:
    asked = [*before, user(Q)]
    prompt = [*asked, bot(BLUE_SEVEN[wrong])]
    replies = {side: [bot(text)] for side, text in BLUE_SEVEN.items()}
    for row in (replies, wholes(user(Q)), wholes(*asked)):
        (pair,) = read([{"prompt": prompt} | row])
        assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (tuple(asked), "Blue.", "Seven.", None)
    with pytest.raises(DataError, match="x:2, field prompt: it ends with an assistant's turn that is neither reply"):
        read([{"prompt": asked} | replies, {"prompt": [*asked, bot("Red.")]} | replies])


def test_earlier_turns_may_end_with_the_words_of_the_reply() -> None:
    (pair,) = read([{"prompt": [user("Hi"), bot("Blue.")], **wholes(user(Q))}])
    assert pair.messages == (user("Hi"), bot("Blue."), user(Q))


@pytest.mark.parametrize("kind", [bot, lambda text: [bot(text)], str])
def test_a_conversation_that_holds_the_reply_is_read_up_to_it(kind: Callable[[str], Any]) -> None:
    row = {"conversations": [*EARLIER, user(Q), bot("Blue.")]} | {side: kind(text) for side, text in BLUE_SEVEN.items()}
    assert [(pair.messages, pair.chosen, pair.rejected) for pair in read([row] * 2)] == [(TALK, "Blue.", "Seven.")] * 2


@pytest.mark.parametrize("listed", ["chosen", "rejected"])
@pytest.mark.parametrize("asked", [{"prompt": Q}, {"prompt": [user(Q)]}, {}])
def test_a_text_may_stand_beside_a_list(listed: str, asked: dict[str, Any]) -> None:
    row = BLUE_SEVEN | asked | {listed: [*([] if asked else [user(Q)]), bot(BLUE_SEVEN[listed])]}
    (pair,) = read([row])
    assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == ((user(Q),), "Blue.", "Seven.", None)


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


@pytest.mark.parametrize("style", [lambda turn: turn, lambda turn: said(NAMES[turn["role"]], turn["content"])])
@pytest.mark.parametrize("begins", [Q, "Hello."])
def test_a_prompt_stands_in_front_of_turns_that_begin_with_a_reply(style: Callable[[Any], Any], begins: str) -> None:
    turns = (bot("Hello."), user("More?"))
    row = {side: [*map(style, turns), style(bot(text))] for side, text in BLUE_SEVEN.items()}
    (pair, *_) = read([{"prompt": Q} | row] * 3)
    assert (pair.messages, pair.chosen, pair.rejected) == ((user(Q), *turns), "Blue.", "Seven.")
    (pair, *_) = read([{"prompt": "More?"} | row] * 3)  # it is there already
    assert pair.messages == turns


@pytest.mark.parametrize(
    ("column", "held"),
    [
        *(("system", held) for held in (system("Be kind."), [system("Be kind.")], ["You are kind."], {"text": "x"}, 3)),
        ("system_prompt", ["You are kind."]),
        *(("history", held) for held in (["Hi", "Hello."], [{"q": "Hi", "a": "Hello."}], {"Hi": "Hello."}, 3)),
    ],
)
@pytest.mark.parametrize("line", [{}, {"prompt": "question"}, {"name": "explicit"}])
def test_a_known_column_that_cannot_be_read_is_not_left_out_unsaid(column: str, held: Any, line: Any) -> None:
    rows = [{column: held, "question": Q, **BLUE_SEVEN}] * 3
    column_map = {key: value for key, value in line.items() if key != "name"}
    for table in (rows, [row | {column: json.dumps(held)} for row in rows] if isinstance(held, list) else rows):
        with pytest.raises(DataError) as raised:
            detect(table, column_map, **{key: value for key, value in line.items() if key == "name"})
        assert f"{column} holds " in str(raised.value)
        assert f"no setting helps: leave the column out, or write it as {raised.value.expected}" in str(raised.value)


@pytest.mark.parametrize(
    ("row", "column_map", "found"),
    [
        ({**TEXTS, "about": bot("x")}, {"system": "about"}, "about is to be system, and holds message"),
        ({**TEXTS, "n": 3}, {"history": "n"}, "n is to be history, and holds number"),
        (
            {"prompt": Q, "responses": ["Blue.", "Seven."], "scores": [9, 1]},
            {"completions": "scores", "scores": "responses"},
            "scores is to be completions, and holds numbers",
        ),
        ({"prompt": Q, "responses": ["a", "b"], "n": [True]}, {"scores": "n"}, "n is to be scores, and holds"),
    ],
)
def test_a_mapped_column_that_cannot_be_that_is_refused(row: Any, column_map: dict[str, str], found: str) -> None:
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
    assert lines == [f"data.column_map=chosen=good,rejected=bad,prompt={column}" for column in ("question", "query")]


def test_the_first_rows_may_have_no_earlier_turns() -> None:
    row = {"prompt": Q, "history": [], **BLUE_SEVEN}
    detected, _ = detect([row] * 3)
    assert detected.columns["history"] == "history"
    assert detected.read(row | {"history": [["Hi", "Hello."]]}, "x").messages == TALK


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
    assert "in front as a system turn where the conversation has none" in detect(rows)[0].because


# --- refused, with the line to write; and what the line leads to

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
CHATML = "<|im_start|>user\nName a  colour 🎨.<|im_end|>\n<|im_start|>assistant\n"
BLUE, SEVEN = ((user(Q),), "Blue.", "Seven."), ((user(Q),), "Seven.", "Blue.")
OTHER = ((user("Other text"),), "Blue.", "Seven.")
DOUBLED = [
    {"prompt": Q, "chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."},
    {"prompt": Q, "chosen": "Blue.", "rejected": "Seven."},
]

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
        [{"prompt": Q, "response_1": "Seven.", "response_2": "Blue.", "overall_preference": n} for n in (1, 2)],
        {
            "data.column_map=preference_strength=overall_preference": ("judged", [BLUE] * 2),
            "data.column_map=better=overall_preference": ("judged", [SEVEN, BLUE]),
        },
    ),
    "a strength of that name without a sign": (
        [{"prompt": Q, "response_1": "Seven.", "response_2": "Blue.", "preference_strength": n} for n in ("1", 2.0)],
        {
            "data.column_map=preference_strength=preference_strength": ("judged", [BLUE] * 2),
            "data.column_map=better=preference_strength": ("judged", [SEVEN, BLUE]),
        },
    ),
    "a context beside the question": (
        [{"context": "A long text", "question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 2,
        {
            "data.column_map=prompt=question": ("explicit", [BLUE] * 2),
            "data.column_map=prompt=context": ("explicit", [((user("A long text"),), "Blue.", "Seven.")] * 2),
            "data.column_map=prompt=question,input=context": (
                "explicit", [((user(f"{Q}\nA long text"),), "Blue.", "Seven.")] * 2),
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
            "data.column_map=system=system_prompt": ("orca", [((system("Other text"), user(Q)), *BLUE[1:])] * 2),
        },
    ),
    "a conversation and a prompt that it does not hold": (
        [{"messages": [*TALK], "prompt": "Other text", "chosen": "Blue.", "rejected": "Seven."}] * 2,
        {
            "data.column_map=conversation=messages": ("conversation", [(TALK, "Blue.", "Seven.")] * 2),
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
        [{"prompt": Q, "answer_a": "Seven.", "answer_b": "Blue.", "chosen": "answer_b", "rejected": "answer_a"},
         {"prompt": Q, "answer_a": "Blue.", "answer_b": "Seven.", "chosen": "Answer_a", "rejected": "Answer_b"}],
        {"data.column_map=better=chosen": ("judged", [BLUE, BLUE])},
    ),
    "replies that are letters of the two answers": (
        [{"prompt": Q, "response_a": "Seven.", "response_b": "Blue.", "chosen": "B", "rejected": "A"}] * 2,
        {"data.column_map=better=chosen": ("judged", [BLUE, BLUE])},
    ),
    "replies that name two columns": (
        [{"prompt": Q, "small": "Seven.", "large": "Blue.", "chosen": "large", "rejected": "small"}] * 2,
        {"data.column_map=response_a=small,response_b=large,better=chosen": ("judged", [BLUE, BLUE])},
    ),
    "two pairs of answers": (
        [
            {"prompt": Q, "winner": "a", "answer_a": "Blue.", "answer_b": "Seven.", "reply_a": "Seven.",
             "reply_b": "Blue."}
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
    "replies under other names": (
        [{"question": Q, "good_answer": "Blue.", "bad_answer": "Seven.", "good_score": 3, "good_model": "m"}] * 2,
        {"data.column_map=prompt=question,chosen=good_answer,rejected=bad_answer": ("explicit", [BLUE] * 2)},
    ),
    "replies in camel case": (
        [{"prompt": Q, "WorstResponse": "Seven.", "BestResponse": "Blue."}] * 2,
        {"data.column_map=chosen=BestResponse,rejected=WorstResponse": ("explicit", [BLUE] * 2)},
    ),
    "replies in lists under other names": (
        [{"prompt": Q, "reply_accepted": [user(Q), bot("Blue.")], "reply_rejected": [user(Q), bot("Seven.")]}] * 2,
        {"data.column_map=chosen=reply_accepted,rejected=reply_rejected": ("messages", [BLUE] * 2)},
    ),
    "chosen under its name alone": (
        [{"prompt": Q, "chosen": "Blue.", "rejected_response": "Seven."}] * 2,
        {"data.column_map=rejected=rejected_response": ("explicit", [BLUE] * 2)},
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
        [{"prompt": CHATML, "chosen": "Blue.<|im_end|>", "rejected": "Seven.<|im_end|>", "system": "Be  brief."}] * 2,
        {"data.chat_template=none": ("explicit", [((user(CHATML),), "Blue.<|im_end|>", "Seven.<|im_end|>")] * 2)},
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
            "data.column_map=conversation=messages": ("conversation", [(TALK, "Blue.", "Seven.")] * 2),
            "data.column_map=prompt=prompt": ("messages", [BLUE] * 2),
        },
    ),
    "earlier turns beside whole conversations and no prompt": (
        [{"messages": [*EARLIER], **wholes(user(Q))}] * 2,
        {
            "data.column_map=conversation=messages": ("conversation", [(TALK, "Blue.", "Seven.")] * 2),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "earlier turns and the question beside whole conversations": (
        [{"messages": [*TALK], **wholes(user(Q))}] * 2,
        {
            "data.column_map=conversation=messages": ("conversation", [(TALK, "Blue.", "Seven.")] * 2),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "a system turn in ShareGPT's conversations beside whole ones": (
        [{"conversations": [said("system", "Be  brief."), said("human", Q)], **wholes(user(Q))}] * 2,
        {
            "data.column_map=conversation=conversations": ("conversation", [(BRIEF, "Blue.", "Seven.")] * 2),
            "data.format=implicit": ("implicit", [BLUE] * 2),
        },
    ),
    "a system turn in messages that end with the better reply": (
        [{"prompt": Q, "messages": [*BRIEF, bot("Blue.")], **wholes(user(Q))}] * 2,
        {
            "data.column_map=conversation=messages": ("conversation", [(BRIEF, "Blue.", "Seven.")] * 2),
            "data.column_map=prompt=prompt": ("messages", [BLUE] * 2),
        },
    ),
    "a system turn under another name, in messages that end with the better reply": (
        [{"prompt": Q, "turns": [*BRIEF, bot("Blue.")], **BLUE_SEVEN}] * 2,
        {
            "data.column_map=conversation=turns": ("conversation", [(BRIEF, "Blue.", "Seven.")] * 2),
            "data.column_map=prompt=prompt": ("explicit", [BLUE] * 2),
        },
    ),
    "earlier turns in messages that end with a third reply": (
        [{"prompt": Q, "messages": [*TALK, bot("Red?")], **BLUE_SEVEN}] * 2,
        {"data.column_map=prompt=prompt": ("explicit", [BLUE] * 2)},
    ),
    "a system turn in messages beside two whole answers": (
        [{"messages": [*BRIEF], "response_a": [user(Q), bot("Blue.")], "response_b": [user(Q), bot("Seven.")],
          "winner": "a"}] * 2,
        {"data.column_map=conversation=messages": ("judged", [(BRIEF, "Blue.", "Seven.")] * 2)},
    ),
    "texts that begin alike beside what they reply to": (
        [{"task": f"{Q} {i}", "chosen": f"It is blue {i}", "rejected": f"It is seven {i}"} for i in range(2)],
        {
            "data.column_map=prompt=task": (
                "explicit", [((user(f"{Q} {i}"),), f"It is blue {i}", f"It is seven {i}") for i in range(2)]),
            "data.format=implicit": ("implicit", [((user("It is"),), f" blue {i}", f" seven {i}") for i in range(2)]),
        },
    ),
    "texts that begin alike beside the turns that they reply to": (
        [{"id": f"a{i}", "task": "Code", "trajectory": [said("human", f"{Q} {i}")],
          "chosen": f"It is blue {i}", "rejected": f"It is seven {i}"} for i in range(2)],
        {
            "data.column_map=prompt=trajectory": (
                "explicit", [((user(f"{Q} {i}"),), f"It is blue {i}", f"It is seven {i}") for i in range(2)]),
            "data.format=implicit": ("implicit", [((user("It is"),), f" blue {i}", f" seven {i}") for i in range(2)]),
        },
    ),
    "texts that begin alike beside a word": (
        [{"word": word, "chosen": f"It is blue, {word}", "rejected": f"It is seven, {word}"} for word in WORDS_ALONE],
        {
            "data.column_map=prompt=word": (
                "explicit", [((user(w),), f"It is blue, {w}", f"It is seven, {w}") for w in WORDS_ALONE]),
            "data.format=implicit": (
                "implicit", [((user("It is"),), f" blue, {w}", f" seven, {w}") for w in WORDS_ALONE]),
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
        [{"prompt": "Be  brief.", "response_a": [user(Q), bot("Blue.")], "response_b": [user(Q), bot("Seven.")],
          "winner": "a"}] * 2,
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
            "data.column_map=system=context": ("explicit", [((BRIEF[0], *TALK), "Blue.", "Seven.")] * 2),
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
            "data.column_map=conversation=dialog": ("conversation", [(TALK, "Blue.", "Seven.")] * 2),
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
        [{"messages": [user(Q)], **row} for row in ({"chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."}, BLUE_SEVEN)],
        {"data.format=conversation": ("conversation", [((user(Q),), f"{Q} Blue.", f"{Q} Seven."), BLUE])},
    ),
    "implicit texts with a template": (
        [{"chosen": "[INST] Hi [/INST] Blue.", "rejected": "[INST] Hi [/INST] Seven."}] * 2,
        {"data.chat_template=none": ("implicit", [((user("[INST] Hi [/INST]"),), " Blue.", " Seven.")] * 2)},
    ),
}  # fmt: skip


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
    assert "write winner so" in refused(rows)


def test_a_number_of_neither_answer_puts_all_numbers_in_doubt() -> None:
    rows = [{"prompt": Q, "answer_1": "Blue.", "answer_2": "Seven.", "winner": 1}] * 2
    detected, _ = detect(rows)
    with pytest.raises(DataError, match="fix: write winner as a or b in every row"):
        detected.read(rows[0] | {"winner": 0}, "x:3")
    with pytest.raises(DataError, match="fix: mend or remove the row"):
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


TEMPLATES = {
    "ChatML": "<|im_start|>user\nHi<|im_end|>",
    "ChatML after a space": " <|im_start|>system\nx<|im_end|>",
    "Llama 2": "<s>[INST] Hi [/INST]",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "Gemma": "<start_of_turn>user\nHi<end_of_turn>",
    "Zephyr": "<|user|>\nHi</s>\n<|assistant|>\n",
    "Alpaca": "### Instruction:\nHi\n\n### Response:",
    "Alpaca's preamble": "Below is an instruction that describes a task.\n\n### Instruction:\nHi\n",
    "Guanaco": "### Human: Hi\n### Assistant:",
    "Vicuna": "USER: Hi ASSISTANT:",
    "Vicuna behind a system text": "You are kind. USER: Hi ASSISTANT:",
    "Vicuna behind a system text, in lines": "You are kind.\n\nUSER: Hi\nASSISTANT: Hello.\nUSER: And?",
    "Mistral behind a system text": "You are kind.\n\n[INST] Hi [/INST]",
    "Zephyr behind a system text": "You are kind.\n<|user|>\nHi\n<|assistant|>\n",
    "RedPajama": "<human>: Hi\n<bot>:",
    "Phi": "Instruct: Hi\nOutput:",
    "an instruction and a response": "Instruction: Hi\nResponse:",
    "a bare marker of the reply": "Hi\n\nAssistant:",
    "a bare marker of the reply in capitals": "Hi\nASSISTANT: ",
    "Alpaca's marker alone": "Hi\n\n### Response:\n",
    "Llama 4": "<|header_start|>user<|header_end|>\n\nHi<|eot|>",
    "Llama 4 behind a system text": "You are kind.<|header_start|>assistant<|header_end|>\n\n",
    "harmony": "<|start|>user<|message|>Hi<|end|><|start|>assistant",
    "harmony behind a system text": "You are kind.<|end|>\n<|start|>assistant",
    "Granite": "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>",
    "Granite behind a system text": "You are kind.\n<|start_of_role|>assistant<|end_of_role|>",
    "EXAONE": "[|user|]Hi\n[|assistant|]",
    "EXAONE behind a system text": "You are kind.[|endofturn|]\n[|assistant|]",
    "Kimi": "<|im_user|>user<|im_middle|>Hi<|im_end|>",
    "Kimi behind a system text": "You are kind.<|im_assistant|>assistant<|im_middle|>",
    "StackLLaMA": "Question: Hi\n\nAnswer: ",
    "a question and an answer as headings": "### Question: Hi\n### Answer:",
    "an answer as a heading": "Hi\n\n### Answer:\n",
    "Vicuna's preamble": "A chat between a curious user and an artificial intelligence assistant. USER: Hi",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_in_the_prompt_is_refused(template: str) -> None:
    templated = {"prompt": TEMPLATES[template], "chosen": "Blue.", "rejected": "Seven."}
    raw = {"prompt": Q, "chosen": "Blue.", "rejected": "Seven."}
    assert "prompt holds text" in refused([templated] * 2, "data.chat_template=none")
    assert read([templated], plain=True)[0].prompt_text == TEMPLATES[template]
    # One in a hundred is chance; one in ten is none.
    assert detect_format([raw] * 99 + [templated]).name == "explicit"
    refused([raw] * 9 + [templated], "data.chat_template=none")


@pytest.mark.parametrize("marker", ["Assistant: ", "ASSISTANT: ", "<bot>: "])
def test_a_marker_before_the_replies_is_a_template_too(marker: str) -> None:
    rows = [{"prompt": Q, **{side: marker + text for side, text in BLUE_SEVEN.items()}}] * 2
    assert "chosen and rejected hold text" in refused(rows, "data.chat_template=none")


@pytest.mark.parametrize(
    "question",
    [
        "Does Vicuna write USER: before a question, and what after it?",
        "Which model ends its prompt with ASSISTANT: and which with [/INST]?",
        "What is an Assistant: a person, or a program?",
        "Instruction: a word I never understood.\nWhat does it mean?",
        "Name the parts of a form.\nResponse:\nis one of them",
        "Assistant professors: how many are there?",
        "Is `### Response:` a heading?",
        "Question: does harmony write <|start|>assistant, or [|assistant|]?\nAnswer in one word.",
        "Question: what is it?\nAnswer:",
    ],
)
def test_a_question_about_templates_is_none(question: str) -> None:
    row = {"prompt": question, "chosen": "The assistant: a program.", "rejected": "Output: none"}
    assert [pair.messages for pair in read([row] * 2)] == [(user(question),)] * 2


@pytest.mark.parametrize(
    "reply",
    ["<|channel|>final<|message|>Blue.<|return|>", "Blue.<|return|>", "Blue.<|eot|>", "Blue.[|endofturn|]\n"],
)
def test_a_template_in_the_reply_is_refused(reply: str) -> None:
    rows = [{"prompt": Q, "chosen": reply, "rejected": "Seven."}] * 2
    assert ("off the ends of chosen" in refused(rows, "data.chat_template=none")) == reply.startswith("Blue.")


def test_kimis_texts_are_no_texts_with_an_end_alone() -> None:
    rows = [{"prompt": TEMPLATES["Kimi"], "chosen": "Blue.<|im_end|>", "rejected": "Seven.<|im_end|>"}] * 2
    assert "take" not in refused(rows, "data.chat_template=none")


def test_end_markers_alone_are_to_be_taken_off() -> None:
    rows = [{"prompt": Q, "chosen": "Blue.</s>", "rejected": "Seven.<|im_end|>"}] * 2
    error = refused(rows, "data.chat_template=none")
    assert "take </s> and <|im_end|> off the ends of chosen and rejected" in error
    assert "or data.chat_template=none to train on the texts as they are" in error
    assert "take" not in refused([{"prompt": CHATML, "chosen": "Blue.<|im_end|>", "rejected": "Seven."}] * 2,
                                 "data.chat_template=none")  # fmt: skip


def test_a_template_in_the_messages_is_refused_without_a_setting() -> None:
    rows = [{"chosen": [user(CHATML), bot("Blue.")], "rejected": [user(CHATML), bot("Seven.")]}] * 2
    assert "take the template's markers out of the messages" in refused(rows)


def test_templated_replies_leave_no_raw_reading_until_the_template_is_none() -> None:
    rows = [{"prompt": CHATML, "question": Q, "chosen": "Blue.<|im_end|>", "rejected": "Seven.<|im_end|>"}] * 2
    refused(rows, "data.chat_template=none")
    refused(rows, "data.column_map=prompt=prompt", "data.column_map=prompt=question", plain=True)
    assert read(rows, {"prompt": "prompt"}, plain=True)[0].prompt_text == CHATML
    assert read(rows, {"prompt": "question"}, plain=True)[0].prompt_text == Q


def test_plain_drops_the_system_that_stands_in_a_templated_prompt() -> None:
    row = {"prompt": CHATML, "chosen": "Blue.", "rejected": "Seven.", "system": "Be  brief."}
    assert read([row], plain=True)[0].prompt_text == CHATML
    assert read([ORCA], plain=True)[0].prompt_text is None  # nobody said how a system text is joined


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": Q, "completion": "Blue.", "label": True}, "prompt, completion and label are unpaired preferences"),
        ({"prompt": [user(Q)], "completion": [bot("Blue.")], "label": False}, "are unpaired preferences"),
        ({"messages": [user(Q), bot("Blue.")]}, "messages holds one conversation a row"),
        ({"conversations": [said("human", Q), said("gpt", "Blue.")]}, "conversations holds one conversation a row"),
        ({"messages": [user(Q), bot("Blue.")], "label": True}, "messages and label are unpaired preferences"),
        ({"prompt": Q, "completion": "Blue."}, "prompt and completion are one reply to each prompt"),
        ({"instruction": Q, "input": "", "output": "Blue."}, "instruction and output are one reply to each prompt"),
        ({"question": Q, "answer": "Blue."}, "question and answer are one reply to each prompt"),
    ],
)
def test_one_reply_is_no_pair(row: dict[str, Any], sentence: str) -> None:
    error = refused([row] * 3)
    assert sentence in error
    assert "a pair needs two replies to one prompt" in error
    assert "no setting helps: write each pair as prompt, chosen and rejected" in error


JUDGED = {"question": Q, "gpt": "Blue.", "claude_2": "Seven."}
JUDGED_MAP = {"prompt": "question", "response_a": "gpt", "response_b": "claude_2", "better": "Winner"}


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
    assert raised.value.found.startswith(f"Winner is to say which of gpt and claude_2 is the better, and holds {held}")
    assert raised.value.expected == "a or gpt for the first, b or claude_2 for the second, or tie"


def test_a_verdict_that_is_a_text_is_not_shown() -> None:
    row = {"prompt": Q, "answer_a": "Blue.", "answer_b": "Seven.", "winner": "The first one, by a wide margin."}
    refused([row] * 3)


def test_a_verdict_that_names_the_one_and_the_other_says_nothing() -> None:
    rows = [{"prompt": Q, "text_a": "Blue.", "text_b": "Seven.", "winner": end} for end in "ab"]
    with pytest.raises(DataError, match="winner is to say which of text_b and text_a is the better"):
        detect(rows, {"response_a": "text_b", "response_b": "text_a"})


def test_the_odd_verdict_is_named_with_its_row() -> None:
    rows = [JUDGED | {"Winner": verdict} for verdict in [*["gpt"] * 5, "x"]]
    with pytest.raises(DataError, match="x:6, field better: a text"):
        read(rows, JUDGED_MAP)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "answer_a": "Blue.", "answer_b": "Seven."},
        {"prompt": Q, "answer_a": "Blue.", "answer_b": "Seven.", "label": 1},  # of which? Nobody wrote it down
        {"prompt": Q, "response_a": "Blue.", "response_b": "Seven.", "preference_strength": 2},
        {"prompt": Q, "completions": [{"response": "Blue.", "helpfulness": 3}, {"response": "7", "helpfulness": 1}]},
        {"prompt": Q, "completions": [{"response": "Blue.", "score": 3, "rank": 3}] * 2},
    ],
)
def test_the_polarity_is_never_guessed(row: dict[str, Any]) -> None:
    assert "no setting helps" in refused([row] * 3)


ANSWERS = {"prompt": Q, "answer_0": "Blue.", "answer_1": "Seven."}


@pytest.mark.parametrize("column", ["vote", "best", "Preferred", "chosen_answer", "verdict", "human_choice", "label"])
def test_a_column_that_names_the_better_answer_is_offered(column: str) -> None:
    rows = [ANSWERS | {column: i % 2, "loser": 1 - i % 2} for i in range(4)]
    refused(rows, f"data.column_map=better={column}")
    pairs = follow(rows, f"data.column_map=better={column}")[1]
    assert [pair.chosen for pair in pairs] == ["Blue.", "Seven."] * 2


@pytest.mark.parametrize(
    "column",
    ["loser", "worse", "worst_answer", "reject", "rejected_label", "less_preferred", "non_preferred", "not_chosen",
     "second_best", "best_score", "label_rank", "correct", "grade", "score_0", "best_0", "rating", "reward", "x"],
)  # fmt: skip
def test_no_other_column_is_offered_as_the_verdict(column: str) -> None:
    rows = [ANSWERS | {column: i % 2} for i in range(4)]
    assert "no setting helps: write each pair as prompt, chosen and rejected" in refused(rows)


@pytest.mark.parametrize("name", ["score", "rating", "Reward", "rank", "correct"])
def test_measures_of_two_answers_are_named_and_left_to_the_person(name: str) -> None:
    error = refused([ANSWERS | {f"{name}_0": i % 2, f"{name}_1": 1 - i % 2} for i in range(4)])
    assert f"{name}_0 and {name}_1 measure them" in error
    assert "only you know whether the higher or the lower is the better" in error


@pytest.mark.parametrize(
    ("one", "other", "guesses"),
    [
        ("less_preferred_answer", "more_preferred_answer", "chosen=more_preferred_answer,rejected=COLUMN"),
        ("least_preferred_answer", "most_preferred_answer", "chosen=most_preferred_answer,rejected=COLUMN"),
        ("worse_than_best", "best", "chosen=best,rejected=COLUMN"),
        ("second_best", "best", "chosen=best,rejected=COLUMN"),
        ("good_answer", "better_answer", "chosen=COLUMN,rejected=COLUMN"),
        ("not_chosen_text", "chosen_text", "chosen=chosen_text,rejected=not_chosen_text"),
        ("non_rejected", "rejected_text", "chosen=COLUMN,rejected=rejected_text"),
        ("unpreferred", "preferred", "chosen=preferred,rejected=COLUMN"),
        ("best_of_the_worst", "text_b", "chosen=COLUMN,rejected=COLUMN"),
        ("response_j", "response_k", "chosen=COLUMN,rejected=COLUMN"),
    ],
)
def test_a_guess_never_takes_the_wrong_side(one: str, other: str, guesses: str) -> None:
    error = refused([{"question": Q, one: "Seven.", other: "Blue."}] * 2, f"data.column_map=prompt=question,{guesses}")
    by_hand = "where no column always holds the better reply, write each pair as prompt, chosen and rejected"
    assert (by_hand in error) == (guesses == "chosen=COLUMN,rejected=COLUMN")


@pytest.mark.parametrize(
    "names",
    [
        ("my question", "good, answer", "bad, answer"),
        ("user_query", "good=1", "bad='0'"),
        ("the $question", '"best"', "{worst}"),
        ("question\x07", "good\ttext", "bad\\text 🎨"),
        (" my question ", "good#", "bad: text"),
    ],
)
def test_the_line_can_be_pasted_whatever_the_columns_names(names: tuple[str, str, str]) -> None:
    rows = [dict(zip(names, (Q, "Blue.", "Seven."), strict=True))] * 2
    with pytest.raises(DataError) as raised:
        detect(rows)
    assert all(character.isprintable() or character == "\n" for character in str(raised.value))
    (line,) = (word for word in shlex.split(raised.value.fix) if word.startswith("data."))
    column_map = load_recipe("demo", [line]).data.column_map
    assert column_map == dict(zip(("prompt", "chosen", "rejected"), names, strict=True))
    assert [pair.chosen for pair in read(rows, column_map)] == ["Blue."] * 2


def test_roles_that_nobody_has_here_are_named() -> None:
    turns = [said("human", Q), said("function_call", "f"), said("observation", "o")]
    row = {"conversations": turns, "chosen": said("gpt", "Blue."), "rejected": said("gpt", "Seven.")}
    with pytest.raises(DataError) as raised:
        detect([row] * 3)
    assert "conversations have roles that are not known: 'function_call', 'observation'" in raised.value.found
    assert "system, user, assistant, developer, model, human, gpt" in raised.value.expected
    assert "COLUMN" not in raised.value.fix


def test_newer_names_of_the_roles_are_read() -> None:
    asked = [{"role": "developer", "content": "Be brief."}, user(Q)]
    row = {"prompt": asked, "chosen": [{"role": "model", "content": "Blue."}], "rejected": [bot("Seven.")]}
    (pair,) = read([row])
    assert (pair.messages, pair.chosen) == ((system("Be brief."), user(Q)), "Blue.")


@pytest.mark.parametrize(
    ("row", "lines"),
    [
        ({"text": "q", "label": 1}, ["data.column_map=prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"]),
        ({"chosen": "yes", "rejected": "no"}, ["data.column_map=prompt=COLUMN", "data.format=implicit"]),
        ({"prompt": "q", "chosen": 3, "rejected": "no", "y": "Yes, so"}, ["data.column_map=chosen=COLUMN"]),
        ({"prompt": "q", "chosen": 3, "rejected": "no"}, []),
        ({"prompt": "q", "chosen": HH, "rejected": [bot("no")]}, []),
        ({"prompt": user("q"), "chosen": "yes", "rejected": "no"}, ["data.format=implicit"]),
        ({"prompt": "q", "chosen": {"content": "yes"}, "rejected": {"content": "no"}}, []),
        ({"chosen": "It is so", "rejected": "It is no", "messages": [user("q"), bot("It was so")]},
         ["data.column_map=prompt=COLUMN", "data.format=implicit"]),
        *(({"chosen": "It is so", "rejected": "It is no", name: held}, ["data.format=implicit"])
          for name in ("prompt", "question", "input", "instruction", "about")
          for held in ({"text": "Why?"}, ["Why?"], {"en": "Why?", "id": 3}) if (name, held) != ("prompt", ["Why?"])),
        ({"prompt": "q", "y_w": "a", "y_l": "b"}, ["data.column_map=chosen=y_w,rejected=y_l"]),
        ({"prompt": "q", "completion": "a", "rejected": "b"}, ["data.column_map=chosen=COLUMN"]),
        ({"prompt": "q", "output_preferred": "a", "output_non_preferred": "b"},
         ["data.column_map=chosen=output_preferred,rejected=output_non_preferred"]),
    ],
)  # fmt: skip
def test_what_fits_nothing_is_refused_with_the_columns(row: dict[str, Any], lines: list[str]) -> None:
    error = refused([row] * 2, *lines)
    assert all(repr(column) in error for column in row)


def test_two_replies_that_begin_alike_by_chance_are_no_implicit_prompt() -> None:
    rows = [{"chosen": "It is so", "rejected": "It is no"}, {"chosen": "Yes", "rejected": "No"}]
    refused(rows * 9, "data.column_map=prompt=COLUMN", "data.format=implicit")
    assert follow(rows, "data.format=implicit")[1][1].drop == PROMPTS_DIFFER


def test_a_phrase_that_all_replies_begin_with_is_no_prompt() -> None:
    rows = [{"topic": f"t{i}", "chosen": f"I think yes {i}", "rejected": f"I think no {i}"} for i in range(9)]
    refused(rows, "data.column_map=prompt=COLUMN", "data.format=implicit")
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    assert detect(rows)[0].name == "implicit"


def test_a_line_can_be_pasted_whatever_the_columns_name() -> None:
    row = {"prompt": "Other text", "Query": Q, "chosen": "Blue.", "rejected": "Seven.", "the system": "x"}
    refused([row], "data.column_map=prompt=prompt", "data.column_map=prompt=Query")
    row = {"prompt": Q, "good answer": "Blue.", "bad answer": "Seven."}
    with pytest.raises(DataError, match=r"'data\.column_map=chosen=good answer,rejected=bad answer'"):
        detect_format([row])


def test_columns_that_agree_are_no_ambiguity() -> None:
    rows = [{"prompt": Q, "question": Q, "chosen": "Blue.", "rejected": "Seven."}] * 2
    assert read(rows) == read([{k: v for k, v in row.items() if k != "question"} for row in rows])
    assert detect([row | {"question": ""} for row in rows])[0].name == "explicit"
    assert detect([row | {"question": None} for row in rows])[0].name == "explicit"


def test_a_prompt_that_is_the_instruction_keeps_its_input() -> None:
    row = {"instruction": "Name it.", "input": "The sky", "prompt": CHATML, "chosen": "Blue.", "rejected": "Seven."}
    refused([row] * 2, "data.column_map=prompt=instruction")
    name, (pair, _) = follow([row] * 2, "data.column_map=prompt=instruction")
    assert (name, pair.messages) == ("alpaca", (user("Name it.\nThe sky"),))


def test_python_lists_in_a_csv_are_refused() -> None:
    for value in (repr([user(Q), bot("Blue.")]), repr([user("it's"), bot("Blue.")]).replace("}, {", "}\n {")):
        error = refused([{"prompt": Q, "chosen": value, "rejected": value}] * 2)
        assert "chosen and rejected hold lists as Python prints them" in error
        assert "write the column with json.dumps, or save the set as .jsonl or .parquet" in error


@pytest.mark.parametrize("value", ["array([{'content': 'Blue.'}], dtype=object)", "['Blue.']", "['it''s', \"Blue.\"]"])
@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("response_a", "response_b"), ("answer_1", "answer_2")])
def test_lists_of_numpy_and_of_texts_are_refused(value: str, sides: tuple[str, str]) -> None:
    error = refused([{"prompt": Q, "winner": 1, **dict.fromkeys(sides, value)}] * 2)
    assert f"{' and '.join(sides)} hold lists as Python prints them" in error
    assert read([TEXTS | {"chosen": text} for text in ("['a', 'b']", "no list")])[0].chosen == "['a', 'b']"


@pytest.mark.parametrize("first", ["id", "name", "index", "weight"])
@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape.csv])
def test_json_in_a_table_is_read_whatever_its_first_key(shape: str, first: str) -> None:
    def packed(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            return json.dumps([{first: 1, **item} for item in value])
        return json.dumps({first: 1, **value}) if isinstance(value, Mapping) else value

    SHAPES[shape].check([{key: packed(value) for key, value in row.items()} for row in SHAPES[shape].rows])


@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if not shape.csv])
def test_lists_of_texts_and_of_numbers_are_read_from_a_table(shape: str) -> None:
    def cell(value: Any) -> Any:
        return json.dumps(value) if isinstance(value, list) else "" if value is None else value

    SHAPES[shape].check([{key: cell(value) for key, value in row.items()} for row in SHAPES[shape].rows])


@pytest.mark.parametrize("turns", [[bot("Blue.")], [user(Q), bot("Blue.")], [said("human", Q), said("gpt", "Blue.")]])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_messages_in_a_column_of_texts_are_a_fault(turns: list[Any], column: str) -> None:
    odd = TEXTS | {column: json.dumps(turns)}
    for rows in ([TEXTS] * 9, [odd, odd, *[TEXTS] * 4]):
        with pytest.raises(DataError) as raised:
            detect(rows)[0].read(odd, "x:10")
        assert f"x:10, field {column}: messages as JSON" in str(raised.value)
        assert ("data.format=explicit" in raised.value.fix) == (column != "prompt")
    if column != "prompt":
        (pair,) = read([odd], name="explicit")
        assert json.dumps(turns) in (pair.chosen, pair.rejected)


def test_a_reply_that_is_json_is_a_text() -> None:
    rows = [{"prompt": "As JSON!", "chosen": '{"role": "x", "content": "y"}', "rejected": "no"}]
    rows += [{"prompt": "As JSON!", "chosen": "[1, 2]", "rejected": '["a"]'}] * 2
    assert [pair.chosen for pair in read(rows)] == ['{"role": "x", "content": "y"}', "[1, 2]", "[1, 2]"]


# --- the row that deviates


ABOUT_TEXT = {"instruction": "Sum up.", "input": "A long text."}


@pytest.mark.parametrize(
    "replies",
    [
        {"output_1": "a", "output_2": "b", "winner": "1"},
        {"completions": [{"response": "b", "overall_score": 2}, {"response": "a", "overall_score": 8}]},
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
    "reply", [{"role": "user", "content": "Blue."}, [{"text": "Blue."}], [bot("Blue.")], {"messages": ["Blue."]}]
)
def test_replies_that_are_json_can_be_read_as_texts(reply: Any) -> None:
    rows = [{"prompt": "Write it as JSON.", "chosen": json.dumps(reply), "rejected": json.dumps([reply, reply])}] * 9
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
    {"role": "user", "content": "Blue."},
    [{"role": "user", "content": "Blue."}],
]


@pytest.mark.parametrize("reply", NO_MESSAGES)
@pytest.mark.parametrize("column", ["prompt", "question", "ask"])
def test_json_that_only_looks_like_messages_is_offered_as_texts(reply: Any, column: str) -> None:
    sides = {"chosen": json.dumps(reply), "rejected": json.dumps(reply) + " "}
    rows = [{column: f"Write {i} as JSON.", **sides} for i in range(4)]
    pasted: dict[str, Any] = {"name": "explicit", "column_map": {"prompt": "ask"} if column == "ask" else {}}
    lines = ["data.format=explicit", *(["data.column_map=prompt=ask"] if column == "ask" else [])]
    refused(rows, *lines)
    assert [(pair.messages, pair.chosen) for pair in read(rows, **pasted)] == [
        ((user(row[column]),), row["chosen"]) for row in rows
    ]


def test_a_message_in_a_text_is_read_and_the_other_reading_said() -> None:
    rows = [{"prompt": Q, "chosen": json.dumps(bot("Blue.")), "rejected": json.dumps(bot("Seven."))}] * 3
    detected, _ = detect(rows)
    assert "(JSON in texts, which data.format=explicit would read as they are)" in detected.sentence
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


def test_tools_in_every_row_are_refused_for_what_they_are() -> None:
    gave = {"role": "tool", "content": "21 degrees"}
    sides = {side: [gave, {"role": "model", "content": f"It is {side}."}] for side in ("chosen", "rejected")}
    error = refused([sides] * 3)
    assert "; turns of tool are not read" in error
    assert "no setting helps: leave out the rows with tools, or write each call" in error


def test_a_first_row_in_place_of_the_names_is_suspected() -> None:
    row = {"Name a colour.": "Name a number.", "It is blue.": "Seven.", "It is seven.": "Blue."}
    with pytest.raises(DataError) as raised:
        detect([row] * 3)
    assert "if the first line of the file is a row" in raised.value.fix


@pytest.mark.parametrize("listed", [["prompt"], ["chosen", "rejected"], ["prompt", "chosen", "rejected"]])
def test_lists_of_texts_are_refused_by_what_they_are(listed: list[str]) -> None:
    row = {"prompt": Q, **BLUE_SEVEN}
    error = refused([row | {column: [row[column]] for column in listed}] * 2)
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
    rows = [{"task": "Math", "trajectory": [user(f"Q{i}")], "good": f"a{i}", "bad": f"b{i}"} for i in range(12)]
    with pytest.raises(DataError) as raised:
        detect_format(rows)
    assert "data.column_map=prompt=trajectory,chosen=good,rejected=bad" in str(raised.value)


def test_whole_conversations_under_other_names_need_no_prompt() -> None:
    rows = [{"chosen_conversations": [user(Q), bot("a")], "rejected_conversations": [user(Q), bot("b")]}] * 3
    with pytest.raises(DataError) as raised:
        detect_format(rows)
    line = "data.column_map=chosen=chosen_conversations,rejected=rejected_conversations"
    assert str(raised.value).endswith(f"name the columns: {line}")


def test_turns_within_a_text_are_a_template_too() -> None:
    text = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nQ?"
    with pytest.raises(DataError, match="a chat template was applied already"):
        detect_format([{"prompt": text, "response_1": "a", "response_2": "b", "preference_strength": -2}] * 3)


@pytest.mark.parametrize(
    ("form", "row", "place"),
    [
        ("explicit", {"prompt": "q", "chosen": "a"}, "field rejected: missing; the columns are 'prompt', 'chosen'"),
        ("explicit", TEXTS | {"chosen": None}, "field chosen: null"),
        ("explicit", TEXTS | {"chosen": 3}, "field chosen: a number"),
        ("explicit", TEXTS | {"chosen": True}, "field chosen: true or false"),
        ("explicit", TEXTS | {"prompt": {"a": 1}}, "field prompt: an object"),
        ("explicit", TEXTS | {"prompt": "\ud800"}, "field prompt: a lone surrogate"),
        ("implicit", WHOLE | {"chosen": [user(Q)]}, "field chosen: the last turn is the user's"),
        ("implicit", {"chosen": [bot("a")], "rejected": [bot("b")]}, "nothing stands before the reply"),
        ("implicit", WHOLE | {"chosen": [user(Q), {"role": "assistant"}]}, "field chosen[1].content: missing"),
        ("implicit", WHOLE | {"chosen": [user(Q), {"role": "assistant", "content": None}]}, "chosen[1].content: "),
        ("implicit", WHOLE | {"chosen": [Q]}, "field chosen[0]: a text"),
        (
            "implicit",
            WHOLE | {"chosen": [user(Q), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "field chosen[1]: a call of a tool",
        ),
        (
            "implicit",
            WHOLE | {"rejected": [user(Q), {**bot("I look it up."), "function_call": {"name": "f"}}, bot("b")]},
            "field rejected[1]: a call of a tool",
        ),
        (
            "implicit",
            WHOLE | {"chosen": [user(Q), {"role": "ipython", "content": "x"}, bot("b")]},
            "field chosen[1].role: 'ipython', a tool's turn",
        ),
        ("messages", WHOLE | {"rejected": []}, "field rejected: an empty list"),
        ("messages", {"chosen": [bot("a")], "rejected": [bot("b")]}, "field prompt: missing"),
        ("hh_rlhf", {"chosen": HH, "rejected": "Hello."}, "field rejected: there is no assistant turn"),
        (
            "hh_rlhf",
            {"chosen": HH, "rejected": "Hi\n\nAssistant: a"},
            "field rejected: the text does not begin with a turn",
        ),
        ("hh_rlhf", {"chosen": HH, "rejected": HH + "\n\nHuman: bye"}, "field rejected: the last turn is the human's"),
    ],
)
def test_a_faulty_row_is_named(form: str, row: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError) as raised:
        READERS[form](row, "pairs.jsonl:7")
    text = str(raised.value)
    assert "expected: " in text
    assert "fix: " in text
    assert text.startswith("pairs.jsonl:7, field ")
    assert place in text


@pytest.mark.parametrize(
    ("shape", "change", "place"),
    [
        ("TRL explicit texts", {"chosen": [bot("Blue.")]}, "field chosen: a list"),
        ("TRL implicit conversations", {"chosen": "[{"}, "field chosen: a text"),
        (
            "TRL implicit conversations",
            {"chosen": [user(Q), {"role": "tool", "content": "x"}]},
            "chosen[1].role: 'tool'",
        ),
        ("TRL implicit conversations", {"chosen": [user(Q), {"role": "gpt", "content": "x"}]}, "chosen[1].role: 'gpt'"),
        ("TRL implicit conversations", {"chosen": [user(Q)]}, "field chosen: the last turn is the user's"),
        (
            "TRL implicit conversations",
            {"chosen": [{"role": "user", "content": [{"type": "image"}]}, bot("a")]},
            "chosen[0].content[0]: a part that is no text",
        ),
        ("LLaMA-Factory's dpo_en_demo", {"chosen": said("observation", "x")}, "chosen[0].from: 'observation'"),
        ("LLaMA-Factory's dpo_en_demo", {"conversations": None}, "nothing stands before the reply"),
        ("Intel/orca_dpo_pairs", {"system": 3}, "field system: a number"),
        ("LLaMA-Factory's older alpaca, with history", {"output": ["a", "b", "c"]}, "field output: a list of 3"),
        ("LLaMA-Factory's older alpaca, with history", {"history": ["Hi"]}, "field history[0]: a text"),
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
def test_the_odd_row_is_its_readers_to_report(shape: str, change: dict[str, Any], place: str) -> None:
    rows = SHAPES[shape].rows * 20
    detected, _ = detect(rows)
    assert detected.name == SHAPES[shape].name
    with pytest.raises(DataError) as raised:
        detected.read(SHAPES[shape].rows[0] | change, "pairs.jsonl:7")
    assert raised.value.where.startswith("pairs.jsonl:7, field ")
    assert place in str(raised.value)
    assert raised.value.expected
    assert raised.value.fix


def test_scores_may_be_written_as_texts() -> None:
    texts = {"prompt": Q, "completions": ["Seven.", "12"], "scores": ["2.0", "10"]}
    rows = [texts, texts | {"completions": ["4", "5"]}] * 10
    assert [(pair.chosen, pair.rejected) for pair in read(rows)][:2] == [("12", "Seven."), ("5", "4")]
    answers = [{"response": "Blue.", "rating": "10"}, {"response": "Seven.", "rating": "9"}]
    unscored = {"response": "Red.", "rating": "N/A"}
    rows = [{"prompt": Q, "completions": [unscored, *answers]}, {"prompt": Q, "completions": [unscored, answers[0]]}]
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
    with pytest.raises(DataError, match="field prompt: missing"):
        detected.read({"query": Q, "chosen": "Blue.", "rejected": "Seven."}, "x:1")


@pytest.mark.parametrize("chosen", ["Blue.", f"{Q} Blue."])
@pytest.mark.parametrize("rejected", ["Seven.", f"{Q} Seven."])
def test_a_repetition_is_taken_off_where_it_is(chosen: str, rejected: str) -> None:
    rows = [{"prompt": Q, "chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."}] * 19
    pair = detect(rows)[0].read({"prompt": Q, "chosen": chosen, "rejected": rejected}, "x")
    assert (pair.messages, pair.chosen, pair.rejected, pair.drop) == (*BLUE, None)


@pytest.mark.parametrize(
    ("prompt", "again"),
    [("Q 1?\n", "Q 1?"), ("Q 1?", " Q 1?"), ("Q\r\n1?", "Q\n1?"), (" Q\t 1?", "Q 1?\n"), ("Q 1?", "Q\u00a01?")],
)
def test_a_repetition_is_found_whatever_the_white_space(prompt: str, again: str) -> None:
    rows = [{"prompt": prompt, "chosen": f"{again} Blue.", "rejected": f"{again} Seven."}] * 3
    assert detect(rows)[0].name == "doubled"
    (pair, *_) = read(rows)
    assert (pair.messages, pair.chosen, pair.rejected) == ((user(prompt.rstrip()),), "Blue.", "Seven.")
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
def test_a_repetition_may_be_of_several_turns(before: dict[str, Any], again: str, turns: Turns) -> None:
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
        {"prompt": [*EARLIER, user(Q)], "chosen": [bot(f"{Q} Blue.")], "rejected": [bot(f"{Q} Seven.")]},
        {"prompt": Q, "chosen": [bot(f"{Q} Blue.")], "rejected": [bot(f"{Q} Seven.")]},
        {"prompt": Q, "response_a": f"{Q} Blue.", "response_b": f"{Q} Seven.", "winner": "a"},
        {"prompt": Q, "responses": [f"{Q} Seven.", f"{Q} Blue."], "scores": [1, 2]},
    ],
    ids=lambda row: " ".join(row),
)
def test_a_repetition_is_taken_off_in_every_format(row: dict[str, Any]) -> None:
    detected, _ = detect([row] * 3)
    assert detected.because.endswith(", and both replies begin with the prompt again, which is taken off")
    for pair in read([row] * 3):
        assert (pair.messages[-1], pair.chosen, pair.rejected, pair.drop) == (user(Q), "Blue.", "Seven.", None)
    blank = {"chosen": None, "output": None, "winner": None, "responses": []}
    assert detected.read(row | {key: value for key, value in blank.items() if key in row}, "x").drop
    (pair, *_) = read([row] * 3, name=detected.name)
    assert (pair.chosen.split(), pair.rejected.split()) == ([*Q.split(), "Blue."], [*Q.split(), "Seven."])


def test_a_habit_of_the_set_is_no_matter_of_one_row() -> None:
    doubled, plain = DOUBLED
    assert detect([doubled] + [plain] * 19)[0].name == "explicit"
    assert detect([doubled] * 19 + [plain])[0].name == "doubled"
    refused([doubled] * 2 + [plain] * 18, "data.format=doubled", "data.format=explicit")
    refused([doubled] * 17 + [plain] * 3, "data.format=doubled", "data.format=explicit")


# --- any text at all

WORDS = st.text("abc  é🎨'\"[]{}:,\\", min_size=1, max_size=12).filter(str.strip).map(lambda text: f"x{text}")


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
    before = [message for one, other in turns for message in (user(one), bot(other))] + [user(question)]
    dialogue = "".join(
        f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in before
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
        "judged": {"context": before, "response1": chosen, "response2": rejected, "overall_preference": -1},
        "alpaca": {"instruction": question, "input": "", "history": [list(turn) for turn in turns], **replies},
        "orca": {"question": question, **replies} if not turns else {},
    }
    stands_already = brief and any(begins_with(brief, turn["content"]) for turn in before if turn["role"] == "user")
    for name, row in shapes.items():
        # The last case: history goes on to the prompt and the reply, so it is none.
        if not row or (name == "alpaca" and turns[-1:] == [(question, chosen)]):
            continue
        row = {"system": brief or " ", **row}
        expected = tuple(before) if stands_already else ((system(brief),) if brief else ()) + tuple(before)
        named = detect_format([row], name=name)
        assert (named.read(row, "x").messages, named.read(row, "x").chosen, named.read(row, "x").rejected) == (
            expected,
            chosen,
            rejected,
        ), name
        if behind(question, chosen) is behind(question, rejected) is None:
            orca = name == "orca" and (not brief or stands_already)
            assert detect_format([row]).name == ("explicit" if orca else name)


@pytest.mark.parametrize("values", [(1, 2), (0, 1), (0, 2), (1, 3), (0, 1, 2)])
@pytest.mark.parametrize("column", ["overall_preference", "preference_strength"])
def test_a_strength_below_0_in_no_row_is_refused(column: str, values: tuple[int, ...]) -> None:
    rows = [{"prompt": Q, "response_1": "Blue.", "response_2": "Seven.", column: value} for value in values]
    with pytest.raises(DataError, match="below 0 in no row"):
        detect_format(rows)
    assert detect_format([*rows, rows[0] | {column: -1}]).name == "judged"


# --- anything at all

ODD: list[Any] = [
    *(None, "", " ", [], {}, 0, -1, 1.5, True, float("nan"), 10**400, "1", "a", "tie", "[{", '[{"role": "user"', "[]"),
    *([None], [[]], [{}], ["a"], [["a", "b"]], [["a"]], [1, 2], [2, None], {"messages": []}, {"messages": [user("q")]}),
    *({"role": "user"}, [{"role": None}], [{"role": "user", "content": None}], [{"role": ["x"], "content": "c"}]),
    *([bot("a"), "a"], [{"role": "assistant", "content": [part("a")]}], [{"role": "assistant", "content": []}]),
    *([{**user("q"), "tool_calls": "x"}], [said("human", "q")], [{"from": "gpt", "value": ["a"]}], [user("q")]),
    *([{"input": "q", "output": "a"}], [{"input": "q"}], [{"answer": "a", "score": 1}, {"answer": "b", "score": None}]),
    [user("q"), bot("a")],
    *([{"response": None, "rank": 1}, {"answer": "a", "rank": "x"}], [{"text": "a"}], {"role": "user", "content": {}}),
    *("\ud800", "{'role': 'user'}", "['a']", "array([{'role': 'user'}])", HH, f"{HH} a\n\nHuman: b", CHATML, "text", Q),
]  # fmt: skip
LIKELY = ("prompt", "chosen", "rejected")
NAMED = sorted({*COLUMNS, "instruction", "question", "messages", "answers", "responses", "ranking", "output", "winner",
                "preferred_output", "non_preferred_output", "context", " Chosen", "response_0", "response_1", "labels",
                "better_response_id", "human_ref_A", "human_ref_B", "overall_preference", "dialog"}
               - {*LIKELY})  # fmt: skip


def anything(chance: random.Random) -> tuple[list[Row], dict[str, str], str, bool]:
    """Rows whose columns mostly hold one kind of value each, and what a person may have set."""
    columns = [*(name for name in LIKELY if chance.random() < 0.7), *chance.sample(NAMED, chance.randint(0, 5))]
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
    column_map = {chance.choice(COLUMNS): chance.choice(columns) for _ in range(chance.randint(0, 2)) if columns}
    return rows, column_map, chance.choice(["auto", "auto", *READERS]), chance.random() < 0.2


def test_no_rows_escape_as_a_traceback() -> None:
    chance = random.Random(0)
    read_rows = refused_sets = 0
    for _ in range(8000):
        rows, column_map, name, plain = anything(chance)
        column_map = {ours: theirs for ours, theirs in column_map.items() if any(theirs in row for row in rows)}
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
