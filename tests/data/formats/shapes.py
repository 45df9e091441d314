"""Sets of every format, as rows with what they are to be read as; and how tests read them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from orpo_lite.data.formats.column_map import apply_column_map
from orpo_lite.data.formats.detect import Detected, detect_format
from orpo_lite.data.pair import COLUMNS, PROMPTS_DIFFER, TIED, TOO_FEW, Pair, Row
from orpo_lite.errors import DataError

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


def detect(
    rows: list[Any], column_map: Mapping[str, str] = {}, **settings: Any
) -> tuple[Detected, list[Row]]:
    """As pairs.py asks: the rows as data.column_map leaves them."""
    mapped: list[Row] = [
        apply_column_map(row, {ours: [theirs] for ours, theirs in column_map.items()})
        for row in rows
    ]
    return detect_format(mapped, mapped=column_map, **settings), mapped


def read(rows: list[Any], column_map: Mapping[str, str] = {}, **settings: Any) -> list[Pair]:
    detected, mapped = detect(rows, column_map, **settings)
    return [detected.read(row, f"x:{i}") for i, row in enumerate(mapped, start=1)]


def refused(rows: list[Any], *lines: str, **settings: Any) -> str:
    """The refusal of these rows, which holds all three parts, each line, and nothing of what the
    rows say."""
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
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    )
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
            assert all(
                re.search(rf"(?<!\w){re.escape(name)}(?!\w)", detected.because)
                for name in self.columns.split()
            )
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


ONE: list[tuple[Turns, str, str] | str] = [
    ((user(Q),), "Blue.", "Seven."),
    ((user(Q2),), "7", "Blue"),
]


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
            {
                "prompt": [*TALK],
                "chosen": [bot("Blue.")],
                "rejected": [bot("Seven.")],
                "question": "other",
            },
            {
                "prompt": [user(Q2)],
                "chosen": [bot("7")],
                "rejected": [bot("Blue")],
                "question": "another",
            },
        ],
        "prompt chosen rejected",
        [(TALK, "Blue.", "Seven."), ((user(Q2),), "7", "Blue")],
        prompt_texts=[None],
    ),
    "explicit conversations with single messages": Shape(
        "explicit",
        [
            {
                "prompt": [system("Be  brief."), user(Q)],
                "chosen": bot("Blue."),
                "rejected": bot("Seven."),
            }
        ]
        * 2,
        "prompt chosen rejected",
        [(BRIEF, "Blue.", "Seven.")] * 2,
    ),
    "explicit conversations that repeat the prompt behind a system turn": Shape(
        "explicit",
        [
            {
                "prompt": [user(Q)],
                "chosen": [*BRIEF, bot("Blue.")],
                "rejected": [*BRIEF, bot("Seven.")],
            }
        ]
        * 2,
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
        [
            ((user("The sky is"),), " blue and wide", " black"),
            ((user("Grass is"),), "  green 🌱", "  grey"),
        ],
        prompt_texts=["The sky is"],
    ),
    "TRL implicit conversations": Shape(
        "implicit",
        [
            {"chosen": [*TALK, bot("Blue.")], "rejected": [*TALK, bot("Seven.")], "prompt": None},
            {
                "chosen": [user(Q2), bot("7")],
                "rejected": [user("Other?"), bot("Blue")],
                "prompt": None,
            },
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
                "chosen": "\n\nHuman: I said:\nHuman: no\n\nHuman: And?\n\nAssistant: "
                "a\n\nAssistant:  two spaces",
                "rejected": "\n\nHuman: I said:\nHuman: no\n\nHuman: And?\n\nAssistant: "
                "a\n\nAssistant: b",
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
        [
            ((user(Q),), "Blue.", "Seven."),
            ((user(Q),), "Blue.", "Seven."),
            (BRIEF, "Blue.", "Seven."),
        ],
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
                "conversation": [
                    {"input": "Hi", "output": "Hello."},
                    {"input": Q, "output": "Blue."},
                ],
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
            {
                "id": "1",
                "source": "t",
                "system": "Be  brief.",
                "prompt": Q,
                "chosen": "Blue.",
                "rejected": "Seven.",
            },
            {
                "id": "2",
                "source": "t",
                "system": "  ",
                "prompt": Q2,
                "chosen": "7",
                "rejected": "Blue",
            },
        ],
        "system prompt chosen rejected",
        [(BRIEF, "Blue.", "Seven."), ONE[1]],
    ),
    "alpaca-like": Shape(
        "alpaca",
        [
            {
                "instruction": "Name it.",
                "input": "The sky's colour",
                "chosen": "Blue.",
                "rejected": "Seven.",
            },
            {"instruction": Q2, "input": "", "chosen": "7", "rejected": "Blue"},
        ],
        "instruction input chosen rejected",
        [((user("Name it.\nThe sky's colour"),), "Blue.", "Seven."), ONE[1]],
        prompt_texts=["Name it.\nThe sky's colour", Q2],
    ),
    "LLaMA-Factory's older alpaca, with history": Shape(
        "alpaca",
        [
            {
                "instruction": Q,
                "input": "",
                "output": ["Blue.", "Seven."],
                "history": [["Hi", "Hello."]],
            },
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
            {
                "conversations": [said("human", Q2)],
                "chosen": said("gpt", "7"),
                "rejected": said("gpt", "Blue"),
            },
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
            for text, before in (
                ("Be  brief.", []),
                ("", []),
                ("Not this.", [said("system", "Be  brief.")]),
            )
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
            for strength, one, other in (
                (-3, "Blue.", "Seven."),
                (1, "Seven.", "Blue."),
                (0, "Red", "Blue"),
            )
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
                "individual_preference": [
                    {"score": 2, "reasoning": "r", "feedback1": "f", "feedback2": "f"}
                ],
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
        [
            {
                side: f"{lead}\n\nHuman: {Q}\n\nAssistant: {text}"
                for side, text in BLUE_SEVEN.items()
            }
            for lead in ("Be brief.", "\n\nSystem: Be brief.", "")
        ],
        "chosen rejected",
        [((system("Be brief."), user(Q)), "Blue.", "Seven.")] * 2
        + [((user(Q),), "Blue.", "Seven.")],
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
            {
                "prompt": "What does [INST] mean?",
                "chosen": "A start.",
                "rejected": "It ends with </s> and no more",
            },
            {
                "prompt": "Is <|im_start|> a token?",
                "chosen": "Yes: `<|im_start|>`.",
                "rejected": "No",
            },
        ],
        "prompt chosen rejected",
        [
            ((user("What does [INST] mean?"),), "A start.", "It ends with </s> and no more"),
            ((user("Is <|im_start|> a token?"),), "Yes: `<|im_start|>`.", "No"),
        ],
    ),
    "a reply alone beside a whole conversation": Shape(
        "implicit",
        [
            {"chosen": [user(Q), bot("Blue.")], "rejected": [bot("Seven.")]},
            {"chosen": [bot("7")], "rejected": [user(Q2), bot("Blue")]},
            {"chosen": [*TALK, bot("Blue.")], "rejected": [bot("Seven.")]},
        ],
        "chosen rejected",
        [*ONE, (TALK, "Blue.", "Seven.")],
        csv=False,
    ),
    "ms-swift's messages and a rejected response": Shape(
        "implicit",
        [
            {"messages": [*turns, bot(good)], "rejected_response": bad}
            for turns, good, bad in (((user(Q),), "Blue.", "Seven."), ((user(Q2),), "7", "Blue"))
        ],
        "chosen rejected",
        ONE,
    ),
    "ms-swift's two lists of messages": Shape(
        "implicit",
        [{"messages": [*TALK, bot("Blue.")], "rejected_messages": [*TALK, bot("Seven.")]}] * 2,
        "chosen rejected",
        [(TALK, "Blue.", "Seven.")] * 2,
    ),
    "replies as objects around a text": Shape(
        "explicit",
        [
            {
                "prompt": Q,
                "chosen": {"text": "Blue.", "score": 9},
                "rejected": {"text": "Seven.", "score": 1},
            },
            {
                "prompt": Q2,
                "chosen": {"text": "7", "score": None},
                "rejected": {"text": "Blue", "score": 2},
            },
        ],
        "prompt chosen rejected",
        ONE,
        csv=False,
    ),
    "Argilla's values, and an answer with its score": Shape(
        "explicit",
        [
            {
                "prompt": {"value": Q},
                "chosen": {"answer": "Blue.", "score": 9.5},
                "rejected": {"value": "Seven."},
            }
        ]
        * 2,
        "prompt chosen rejected",
        [((user(Q),), "Blue.", "Seven.")] * 2,
        csv=False,
    ),
    "NeMo's ranked messages": Shape(
        "ranked",
        [
            {
                "context": [*turns],
                "completions": [
                    {"rank": i, "completion": [bot(text)]} for i, text in ((1, bad), (0, good))
                ],
            }
            for turns, good, bad in ((TALK, "Blue.", "Seven."), ((user(Q2),), "7", "Blue"))
        ],
        "completions rank",
        [(TALK, "Blue.", "Seven."), ONE[1]],
    ),
    "roles in capitals and by other names": Shape(
        "explicit",
        [
            {
                "prompt": [{"role": asks, "content": Q}],
                "chosen": [{"role": says, "content": "Blue."}],
                "rejected": [{"role": says, "content": "Seven."}],
            }
            for asks, says in (
                ("USER", "ASSISTANT"),
                ("Human", "Assistant"),
                ("prompter", "bot"),
                ("User", "AI"),
            )
        ],
        "prompt chosen rejected",
        [((user(Q),), "Blue.", "Seven.")] * 4,
    ),
    "messages under a key of their own": Shape(
        "implicit",
        [{side: {"messages": [*TALK, bot(text)]} for side, text in BLUE_SEVEN.items()}] * 2,
        "chosen rejected",
        [(TALK, "Blue.", "Seven.")] * 2,
        csv=False,
    ),
    "a struct of lists": Shape(
        "messages",
        [
            {"prompt": Q}
            | {
                side: {"role": ["user", "assistant"], "content": [Q, text]}
                for side, text in BLUE_SEVEN.items()
            }
        ]
        * 2,
        "prompt chosen rejected",
        [((user(Q),), "Blue.", "Seven.")] * 2,
        csv=False,
    ),
    "HTML in replies": Shape(
        "explicit",
        [{"prompt": Q, "chosen": "<s>Green.</s> Blue.", "rejected": "It was <s>Seven.</s>"}] * 2,
        "prompt chosen rejected",
        [((user(Q),), "<s>Green.</s> Blue.", "It was <s>Seven.</s>")] * 2,
    ),
}


EARLIER = (user("Hi"), bot("Hello."))


def wholes(*turns: dict[str, str]) -> dict[str, Any]:
    return {"chosen": [*turns, bot("Blue.")], "rejected": [*turns, bot("Seven.")]}


CHATML = "<|im_start|>user\nName a  colour 🎨.<|im_end|>\n<|im_start|>assistant\n"


BLUE, SEVEN = ((user(Q),), "Blue.", "Seven."), ((user(Q),), "Seven.", "Blue.")


DOUBLED = [
    {"prompt": Q, "chosen": f"{Q} Blue.", "rejected": f"{Q} Seven."},
    {"prompt": Q, "chosen": "Blue.", "rejected": "Seven."},
]
