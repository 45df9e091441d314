"""Texts to which already has a chat template applied."""

import pytest
from shapes import BLUE_SEVEN, CHATML, ORCA, Q, bot, read, refused, user

from orpo_lite.data.formats.detect import detect_format

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
    "Vicuna behind a system text, in lines": "You are kind.\n\nUSER: Hi\nASSISTANT: "
    "Hello.\nUSER: And?",
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
    "Vicuna's preamble": "A chat between a curious user and an artificial intelligence "
    "assistant. USER: Hi",
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
    [
        "<|channel|>final<|message|>Blue.<|return|>",
        "Blue.<|return|>",
        "Blue.<|eot|>",
        "Blue.[|endofturn|]\n",
    ],
)
def test_a_template_in_the_reply_is_refused(reply: str) -> None:
    rows = [{"prompt": Q, "chosen": reply, "rejected": "Seven."}] * 2
    assert (
        "from the end of the texts in chosen" in refused(rows, "data.chat_template=none")
    ) == reply.startswith("Blue.")


def test_kimis_texts_are_no_texts_with_an_end_alone() -> None:
    rows = [
        {"prompt": TEMPLATES["Kimi"], "chosen": "Blue.<|im_end|>", "rejected": "Seven.<|im_end|>"}
    ] * 2
    assert "remove" not in refused(rows, "data.chat_template=none")


def test_end_markers_alone_are_to_be_taken_off() -> None:
    rows = [{"prompt": Q, "chosen": "Blue.</s>", "rejected": "Seven.<|im_end|>"}] * 2
    error = refused(rows, "data.chat_template=none")
    assert "remove </s> and <|im_end|> from the end of the texts in chosen and rejected" in error
    assert "or data.chat_template=none to train on the unchanged texts" in error
    assert "remove" not in refused(
        [{"prompt": CHATML, "chosen": "Blue.<|im_end|>", "rejected": "Seven."}] * 2,
        "data.chat_template=none",
    )


def test_a_template_in_the_messages_is_refused_without_a_setting() -> None:
    rows = [{"chosen": [user(CHATML), bot("Blue.")], "rejected": [user(CHATML), bot("Seven.")]}] * 2
    assert "remove the template's markers from the messages" in refused(rows)


def test_templated_replies_leave_no_raw_reading_until_the_template_is_none() -> None:
    rows = [
        {
            "prompt": CHATML,
            "question": Q,
            "chosen": "Blue.<|im_end|>",
            "rejected": "Seven.<|im_end|>",
        }
    ] * 2
    refused(rows, "data.chat_template=none")
    refused(rows, "data.column_map=prompt=prompt", "data.column_map=prompt=question", plain=True)
    assert read(rows, {"prompt": "prompt"}, plain=True)[0].prompt_text == CHATML
    assert read(rows, {"prompt": "question"}, plain=True)[0].prompt_text == Q


def test_plain_drops_the_system_that_stands_in_a_templated_prompt() -> None:
    row = {"prompt": CHATML, "chosen": "Blue.", "rejected": "Seven.", "system": "Be  brief."}
    assert read([row], plain=True)[0].prompt_text == CHATML
    assert (
        read([ORCA], plain=True)[0].prompt_text is None
    )  # nobody said how a system text is joined
