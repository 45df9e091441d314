"""Chat templates: which is taken, what is said of it, texts equal to transformers' own, and
templates out of bounds."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenize import CHATML, TURNS, bot, byte_level, colour, message, section, user
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orpo_lite.data import render_process as data_render_process
from orpo_lite.data.chat_template import (
    EMPTY_THOUGHT,
    MOVED_SYSTEM,
    NO_BOUNDARY,
    NO_THOUGHT,
    PAPER_CHAT_TEMPLATE,
    REWRITTEN,
    SECONDS,
    SPECIAL,
    TURN_CHANGED,
    TURN_LOST,
    BeyondLimitsError,
    PairTexts,
    Rendered,
    Template,
    is_file,
    pair_texts,
    set_chat_template,
    template_file,
)
from orpo_lite.data.pair import Pair
from orpo_lite.data.render_process import LimitedRenderer, Renderer
from orpo_lite.data.tokenize import BATCH, end_token_id, tokenize_pairs
from orpo_lite.errors import DataError, ModelError, OrpoLiteError, RecipeError


@pytest.fixture
def bpe() -> PreTrainedTokenizerFast:
    return byte_level()


# --- which template


def test_the_templates_and_what_is_said_of_them(
    bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def said(**fields: Any) -> str:
        return set_chat_template(bpe, section(**fields)).description

    assert "the tokenizer has none" in said()
    assert "the tokenizer has none" in said()  # also when ours was installed before
    turns = [{"role": "system", "content": "Be brief."}, user("Hi"), bot("Hello.")]
    text = bpe.apply_chat_template(turns, tokenize=False)
    end = "<|endoftext|>"
    assert text == f"<|system|>\nBe brief.{end}\n<|user|>\nHi{end}\n<|assistant|>\nHello.{end}"
    asked = bpe.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert asked == f"<|system|>\nBe brief.{end}\n<|user|>\nHi{end}\n<|assistant|>\n"
    bpe.chat_template = CHATML
    assert "the tokenizer's own" in said()
    assert bpe.chat_template == CHATML
    (tmp_path / "mine.jinja").write_text(CHATML.replace("\n", "_"))
    assert "mine.jinja" in said(chat_template=str(tmp_path / "mine.jinja"))
    assert bpe.chat_template == CHATML.replace("\n", "_")
    assert "data.chat_template" in said(chat_template=CHATML)
    assert "joined as plain text" in said(chat_template="none")


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ("auto", False),
        ("none", False),
        (CHATML, False),
        ("{{ messages }}", False),
        ("mine.jinja", True),
        ("x", True),
    ],
)
def test_a_template_is_told_from_a_file(choice: str, named: bool) -> None:
    assert is_file(choice) == named


def test_a_template_file_that_cannot_be_read(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\x00")
    for name in ("no-such.jinja", "bytes.jinja", "."):
        with pytest.raises(RecipeError, match=r"data\.chat_template: ") as raised:
            set_chat_template(bpe, section(chat_template=str(tmp_path / name)))
        assert str(tmp_path / name) in message(raised)
    with pytest.raises(RecipeError, match="no-such"):
        template_file("~/no-such.jinja")


def test_a_tokenizer_with_several_templates(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bpe.chat_template = {"default": CHATML, "tool_use": "{{ 1 }}"}
    bpe.save_pretrained(tmp_path)  # a folder of additional templates
    for tokenizer in (bpe, AutoTokenizer.from_pretrained(tmp_path)):
        template = set_chat_template(tokenizer, section())
        assert template.text == CHATML == tokenizer.chat_template
        assert "the tokenizer's own" in template.description
    bpe.chat_template = {"rag": CHATML, "tool_use": "{{ 1 }}"}
    with pytest.raises(ModelError, match="tokenizer: ") as raised:
        set_chat_template(bpe, section())
    assert "set data.chat_template to a file with a template of your own" in message(raised)
    assert set_chat_template(bpe, section(chat_template=CHATML)).text == CHATML


def test_a_template_that_writes_the_date_is_remarked_on(bpe: PreTrainedTokenizerFast) -> None:
    dated = "{{ date_string or strftime_now('%Y') }}" + CHATML
    assert "today's date" in set_chat_template(bpe, section(chat_template=dated)).description
    fixed = section(chat_template=dated, chat_template_kwargs={"date_string": "1999"})
    template = set_chat_template(bpe, fixed)
    assert "today's date" not in template.description
    assert texts_of(colour(), template).prompt.startswith("1999<|im_start|>")


def test_chat_template_kwargs_reach_the_template(bpe: PreTrainedTokenizerFast) -> None:
    kwargs = {"mood": "calm", "tools": [{"name": "look"}], "eos_token": "<|im_end|>"}
    data = section(
        chat_template="{{ mood }} {{ tools[0].name }} {{ eos_token }} " + CHATML,
        chat_template_kwargs=kwargs,
    )
    template = set_chat_template(bpe, data)
    assert texts_of(colour(), template).prompt.startswith("calm look <|im_end|> <|im_start|>")
    with LimitedRenderer(template) as renderer:
        renderer.send([colour()])
        assert renderer.receive() == [pair_texts(colour(), template)]


@pytest.mark.parametrize(
    "name", ["add_generation_prompt", "messages", "conversations", "chat_template"]
)
def test_what_we_render_with_is_not_a_kwarg(bpe: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.chat_template_kwargs: sets {name}") as raised:
        set_chat_template(bpe, section(chat_template=CHATML, chat_template_kwargs={name: 1}))
    message(raised)


def test_an_end_token_that_is_not_special_ends_a_reply_all_the_same() -> None:
    """ChatML put on a base whose tokenizer holds its marks as ordinary added tokens."""
    tokenizer = byte_level(marks=())
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "covid", "  "])
    tokenizer.chat_template = CHATML
    template = set_chat_template(tokenizer, section())
    assert template.special_tokens == ["<|endoftext|>"]
    renderer = Renderer(template)
    assert end_token_id(renderer, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    pairs = [colour(), colour(chosen="a<|im_end|>b"), colour("a<|im_end|>b"), colour("covid", "  ")]
    renderer.send(pairs)
    kept, *left_out, other = renderer.receive()
    assert kept == PairTexts(
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
        "Blue.<|im_end|>",
        "Seven.<|im_end|>",
        "<|im_end|>",
    )
    assert left_out == [f"{SPECIAL}: <|im_end|>"] * 2
    assert isinstance(other, PairTexts)
    assert (
        pair_texts(colour(chosen="a<|im_start|>assistant"), template) == f"{SPECIAL}: <|im_start|>"
    )


def texts_of(pair: Pair, template: Template) -> PairTexts:
    texts = pair_texts(pair, template)
    assert isinstance(texts, PairTexts)
    return texts


# --- templates like those in the wild: the same text as transformers makes

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
WILD = {
    "chatml": CHATML,
    "chatml with a default system turn": "{% if messages[0].role != 'system' "
    "%}<|im_start|>system\nYou are helpful."
    "<|im_end|>\n{% endif %}" + CHATML,
    "llama-2": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system "
    "= '<<SYS>>\\n' + "
    "messages[0].content + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}{% set "
    "system = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if "
    "loop.first else '') + "
    "m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token "
    "}}{% endif %}{% endfor %}",
    "llama-3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + "
    "m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% "
    "endif %}{{ c }}"
    "{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}\n{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor "
    "%}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System "
    "role not supported') }}"
    "{% endif %}"
    + ALTERNATE
    + "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "no header of its own": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}",
    "paper": PAPER_CHAT_TEMPLATE,
}
ENDS = {
    "chatml": "<|im_end|>",
    "chatml with a default system turn": "<|im_end|>",
    "llama-3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "no header of its own": "",
}
CONVERSATIONS = {
    "one question": (user("Name a colour."),),
    "three turns": TURNS,
    "spaces and lines": (user("  Name\n\n a {{ colour }}.  "),),
    "a system turn": ({"role": "system", "content": "Be brief."}, user("Name a colour.")),
}
REPLIES = ("Blue.", "Not {% a %} colour:\n\n1. <b>é🦜</b>")


@pytest.fixture(scope="module")
def wild() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(bos="<|begin_of_text|>")
    ends = [
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    tokenizer.add_tokens(ends, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("name", WILD)
def test_texts_equal_those_of_transformers(
    wild: PreTrainedTokenizerFast, name: str, turns: str
) -> None:
    messages = list(CONVERSATIONS[turns])
    template = set_chat_template(wild, section(chat_template=WILD[name]))
    pair = Pair(tuple(messages), *REPLIES, "x:1")
    renderer = Renderer(template)
    renderer.send([pair])
    (texts,) = renderer.receive()
    assert isinstance(texts, PairTexts)
    if name == "gemma" and turns == "a system turn":  # which it does not take
        messages = [user("Be brief.\n\nName a colour.")]
        assert texts.remarks == (MOVED_SYSTEM,)
    assert texts.end == ENDS.get(name, wild.eos_token)
    asked = wild.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for body, reply in ((texts.chosen, REPLIES[0]), (texts.rejected, REPLIES[1])):
        whole = wild.apply_chat_template([*messages, bot(reply)], tokenize=False)
        said = texts.prompt + body
        assert whole.startswith(said)
        assert body.rstrip().removesuffix(texts.end).rstrip().endswith(reply)
        assert (
            whole[len(said) :].strip() == ""
        )  # a line break after the end, which nobody has to say
        assert said.endswith(texts.end)
    assert asked.startswith(texts.prompt)
    assert (
        asked[len(texts.prompt) :].strip() == ""
    )  # the generation prompt is the prompt's end, but for spaces


INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
FIRST = INST.replace("m.role == 'user'", "m.role == 'user' and loop.index0 < 2")
ASKED_TWICE = ({"role": "system", "content": "Be brief."}, *TURNS)


@pytest.mark.parametrize(
    ("text", "turns", "found"),
    [
        (INST, ASKED_TWICE, True),  # the system text alone, which is moved
        (INST, ASKED_TWICE[1:], False),
        (INST, ({"role": "system", "content": " "}, user("q")), False),
        (FIRST, ASKED_TWICE, TURN_LOST),
        (FIRST, (user("q"),), False),
        (INST.replace("'assistant'", "'assistant' and loop.last"), TURNS, TURN_LOST),
        (CHATML, (user("a"), bot("<think>b</think>c"), user("<d> & e")), False),
    ],
)
def test_turns_that_a_template_leaves_out_are_seen(
    wild: PreTrainedTokenizerFast, text: str, turns: tuple[dict[str, str], ...], found: str | bool
) -> None:
    template = set_chat_template(wild, section(chat_template=text))
    for renderer in (Renderer(template), LimitedRenderer(template)):
        with renderer:
            (texts,) = render(renderer, [Pair(turns, *REPLIES, "x:1")])
        assert (bool(texts.remarks) if isinstance(texts, PairTexts) else texts) == found


def test_a_turn_may_be_moved(wild: PreTrainedTokenizerFast) -> None:
    moved = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' and loop.last %}{{ "
        "messages[0].content }} "
        "{% endif %}{{ m.role }}: {{ m.content.split('</think>')[-1] | trim }}\n{% endfor %}"
    )
    turns = (
        {"role": "system", "content": "Be brief."},
        user("a <b>"),
        bot("<think>c</think> d"),
        user(" e\n"),
    )
    texts = texts_of(
        Pair(turns, *REPLIES, "x:1"), set_chat_template(wild, section(chat_template=moved))
    )
    assert texts.remarks == ()


# Mistral's later templates: the system text stands in the last user turn, unless a reply follows.
LAST_TURN = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = "
    "messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}<s>{% for m in rest %}{% if m.role == 'user' %}{% if "
    "loop.last and system is "
    "defined %}[INST] {{ system }}\n\n{{ m.content }}[/INST]{% else %}[INST] {{ m.content "
    "}}[/INST]{% endif %}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
OTHER_START = "{{ 'ASK ' if add_generation_prompt else 'TOLD ' }}" + CHATML
THOUGHT_LAST = OTHER_START.replace(
    "assistant\n", "assistant\n<think>\n"
)  # and the generation prompt opens a thought


@pytest.mark.parametrize(
    ("text", "prompt", "reply"),
    [
        (LAST_TURN, "[/INST][INST] Be brief.\n\nName a colour.[/INST]", " Blue.</s>"),
        (OTHER_START, "<|im_end|>\n<|im_start|>assistant\n", "Blue.<|im_end|>"),
        (THOUGHT_LAST, "<|im_end|>\n<|im_start|>assistant\n", "Blue.<|im_end|>"),
    ],
)
@pytest.mark.parametrize(
    "turns", [ASKED_TWICE, (ASKED_TWICE[0], user("[INST] TOLD"), user("Name a colour."))]
)
def test_the_prompt_is_what_the_model_is_asked_with(
    wild: PreTrainedTokenizerFast,
    text: str,
    prompt: str,
    reply: str,
    turns: tuple[dict[str, str], ...],
) -> None:
    """Where a template writes earlier turns otherwise once a reply follows."""
    wild.add_tokens(["</s>"], special_tokens=True)
    texts = texts_of(
        Pair(turns, *REPLIES, "x:1"), set_chat_template(wild, section(chat_template=text))
    )
    asked = wild.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    assert asked.removesuffix("<think>\n") == texts.prompt
    assert texts.prompt.endswith(prompt.removeprefix("[/INST]"))
    assert texts.chosen == reply
    assert all(turn["content"] in texts.prompt for turn in turns)


@pytest.mark.parametrize(
    ("text", "turns", "reason"),
    [
        (
            CHATML.replace("m.content", "m.content[:20]"),
            (user("Name a colour. " * 3),),
            TURN_CHANGED,
        ),
        (
            CHATML.replace("m.content", "m.content | replace('b', '')"),
            (user("a b"), bot("c"), user("d")),
            TURN_CHANGED,
        ),
        (
            OTHER_START.replace("|>\n{%", "|>{{ messages[0].content[-1] }}\n{%"),
            (user("Name a colour."),),
            NO_BOUNDARY,
        ),
        (OTHER_START, (user(" Name a colour.\n"),), None),
        (
            CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
            (bot("<think>a</think>b"), user("c")),
            None,
        ),
    ],
)
def test_a_turn_that_a_template_changes_is_not_trained_on(
    wild: PreTrainedTokenizerFast, text: str, turns: tuple[dict[str, str], ...], reason: str | None
) -> None:
    found = pair_texts(
        Pair(turns, *REPLIES, "x:1"), set_chat_template(wild, section(chat_template=text))
    )
    assert (found if isinstance(found, str) else None) == reason


# It writes a block of thoughts before the last reply, and into the prompt if it must not think.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{% if '</think>' in m.content %}{{ m.content }}{% else %}<think>\n\n</think>\n\n{{ "
    "m.content }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% "
    "endif %}{% endif %}"
)
OPENS = CHATML.replace("t\n{% endif", "t\n<think>\n{% endif")


@pytest.mark.parametrize(
    ("text", "replies", "kwargs", "remarks"),
    [
        (QWEN3, REPLIES, {}, (EMPTY_THOUGHT,)),
        (QWEN3, REPLIES, {"enable_thinking": False}, ()),
        (QWEN3, ("<think>\na\n</think>\n\nb", "<think>\nc\n</think>\n\nd"), {}, ()),
        (
            QWEN3.replace("t\n{% if", "t\n<think>\n{% if"),
            REPLIES,
            {},
            (EMPTY_THOUGHT,),
        ),  # half of it in the prompt
        (OPENS, REPLIES, {}, (NO_THOUGHT,)),
        (OPENS, ("<think>\na\n</think>\n\nb", "<think>\nc\n</think>\n\nd"), {}, ()),
        (CHATML, REPLIES, {}, ()),
    ],
)
def test_what_a_template_makes_of_thoughts(
    wild: PreTrainedTokenizerFast,
    text: str,
    replies: tuple[str, str],
    kwargs: dict[str, Any],
    remarks: tuple[str, ...],
) -> None:
    data = section(chat_template=text, chat_template_kwargs=kwargs)
    assert texts_of(Pair(TURNS, *replies, "x:1"), set_chat_template(wild, data)).remarks == remarks


# --- many pairs, in a process of its own


def render(renderer: Renderer, pairs: list[Pair]) -> list[Rendered]:
    renderer.send(pairs)
    return renderer.receive()


def comparable(results: list[Rendered]) -> list[Any]:
    """Errors are equal when their kind and all that they say is."""
    return [
        (type(item), item.args) if isinstance(item, OrpoLiteError) else item for item in results
    ]


STRICT = ALTERNATE + CHATML.replace("m.content", "m.content | replace('SHOUT', 'shout')")
MIXED = [
    colour(),
    colour(prompt="a<|im_end|>b"),  # left out
    colour(chosen="a SHOUT"),  # rewritten
    Pair((bot("a"),), "b", "c", "x:4"),  # refused
    Pair((), "b", "c", "x:5"),
    colour("", "\x00\ufeff", "\u2028\u2029\r\n\x1b"),
    colour("é🦜\ue0fe", "\ue0fe", "a\ue0fe\ue0feb"),
    colour("\ud800", "a\udfff", "b"),  # no reader lets these pass
    colour("{{ 1 }}{% raw %}", '"\\u0022\\', "[]\n{}"),
    Pair(
        (*TURNS, bot("a" * 100_000), user("b" * 50_000)),
        "c" * 100_000,
        "d\n" * 1000,
        "a name\nof two lines:7",
    ),
    Pair(TURNS, "a", "b", "x:9", prompt_text="p"),
]


@pytest.fixture(scope="module")
def strict() -> Iterator[tuple[LimitedRenderer, Template]]:
    template = set_chat_template(byte_level(), section(chat_template=STRICT))
    with LimitedRenderer(template) as renderer:
        yield renderer, template


def test_a_process_apart_gives_equal_texts(strict: tuple[LimitedRenderer, Template]) -> None:
    limited, template = strict
    for batch in (MIXED, [], MIXED[::-1], *([pair] for pair in MIXED), MIXED * 20):
        expected = comparable(render(Renderer(template), batch))
        assert comparable(render(limited, batch)) == expected
    kinds = [item if isinstance(item, str) else type(item) for item in render(limited, MIXED)]
    assert kinds[:5] == [PairTexts, f"{SPECIAL}: <|im_end|>", REWRITTEN, ModelError, ModelError]
    assert set(kinds[5:]) == {PairTexts}


WEIRD = st.text(max_size=30) | st.text("<|im_end>{%}\ue0fe \n\\\"'", max_size=30)


@given(st.lists(st.tuples(st.lists(WEIRD, max_size=3), WEIRD, WEIRD, WEIRD), max_size=6))
@settings(max_examples=100, deadline=None)
def test_whatever_the_pairs_hold_the_texts_are_equal(
    strict: tuple[LimitedRenderer, Template], drawn: list[tuple[list[str], str, str, str]]
) -> None:
    limited, template = strict
    batch = [
        Pair(tuple((bot if i % 2 else user)(text) for i, text in enumerate(turns)), *texts)
        for turns, *texts in drawn
    ]
    assert comparable(render(limited, batch)) == comparable(render(Renderer(template), batch))


def test_plain_text_in_a_process_apart(bpe: PreTrainedTokenizerFast) -> None:
    template = set_chat_template(bpe, section(chat_template="none"))
    batch = [
        colour(),
        Pair(TURNS, "a", "b", "x:2"),
        colour(chosen="a<|im_end|>b"),
        colour(chosen="a<|im_end|>\n"),
    ]
    with LimitedRenderer(template) as limited:
        found = comparable(render(limited, batch))
    assert found == comparable(render(Renderer(template), batch))
    assert found[1][0] is DataError


def test_a_module_of_the_current_folder_is_not_run(
    bpe: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("jinja2", "transformers", "orpo_lite", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    with LimitedRenderer(set_chat_template(bpe, section())) as limited:
        assert isinstance(render(limited, [colour()])[0], PairTexts)


# --- faults of a template


def test_a_pair_on_which_a_template_fails_is_left_out_with_the_reason(
    bpe: PreTrainedTokenizerFast,
) -> None:
    data = section(chat_template=ALTERNATE + CHATML)
    bad = Pair((bot("S"), user("q")), "a", "b", "x:2")
    _, (_, reason) = tokenize_pairs(
        [colour(), bad], Renderer(set_chat_template(bpe, data)), bpe, data
    )
    assert isinstance(reason, str)
    assert reason.startswith("the chat template raises TemplateError: Conversation roles")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for", "TemplateSyntaxError"),
        ("{{ messages[0].content }}", "leaves out the reply"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError"),
        ("{% for m in messages %}{{ m.content.__class__.mro() }}{% endfor %}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
    ],
)
def test_a_template_that_no_pair_passes_is_refused_at_once(
    bpe: PreTrainedTokenizerFast, template: str, found: str
) -> None:
    data = section(chat_template=template)
    pairs = iter([colour()])
    with pytest.raises(ModelError, match=found) as raised:
        next(tokenize_pairs(pairs, Renderer(set_chat_template(bpe, data)), bpe, data))
    message(raised)
    assert next(pairs) == colour()  # before any pair is read


# --- templates out of bounds

LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
# One comparison of 2 ** 60 steps, all of them inside one operation, which no signal interrupts.
STUCK = (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% "
    "set n.y = [n.y, n.y] %}"
    "{% endfor %}{{ n.x == n.y }}"
)
BOMBS = {
    "time": LOOPS,
    "memory": "{{ ('x' * 10 ** 10) | length }}",
    "size": "{{ 'x' * 10 ** 7 }}",
    "stuck": STUCK,
}
BOMB = CHATML + "".join(
    f"{{% if messages[0].content == '{name}' %}}{bomb}{{% endif %}}" for name, bomb in BOMBS.items()
)
FOUND = {
    "time": "takes more than 1 seconds",
    "memory": "takes more than 4 GiB of memory",
    "size": r"writes 10,000,\d+ characters",
}


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process and no thread is there that was not there before."""
    before, threads = children(), set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (
        children() - before or set(threading.enumerate()) - threads
    ) and time.monotonic() < deadline:
        time.sleep(0.02)  # a thread that has done its work may still be ending
    assert children() <= before
    assert set(threading.enumerate()) <= threads


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the separate process SECONDS is 1."""
    start = subprocess.Popen
    imports = "from orpo_lite.data import chat_template as c, render_process as r"
    serve = f"{imports}; c.SECONDS = r.SECONDS = 1; r._serve()"

    def start_shortened(command: list[str], **options: Any) -> Any:
        assert command == [sys.executable, "-P", "-m", data_render_process.__name__]
        return start([sys.executable, "-P", "-c", serve], **options)

    monkeypatch.setattr(data_render_process.subprocess, "Popen", start_shortened)


def bomb() -> Template:
    return set_chat_template(byte_level(), section(chat_template=BOMB))


@pytest.mark.usefixtures("nothing_left", "one_second")
def test_a_template_out_of_bounds_is_refused_and_placed() -> None:
    with LimitedRenderer(bomb()) as limited:
        assert isinstance(render(limited, [colour()])[0], PairTexts)
        for name, found in FOUND.items():
            bad = Pair((user(name),), "a", "b", "x:3")
            began = time.monotonic()
            with pytest.raises(
                BeyondLimitsError, match=f"^x:3: the chat template {found}"
            ) as raised:
                render(limited, [colour(), colour("a<|im_end|>"), bad, colour()])
            assert time.monotonic() - began < 10
            assert raised.value.exit_code == 4
            message(raised)
        assert isinstance(render(limited, [colour()])[0], PairTexts)  # and it goes on


@pytest.mark.usefixtures("nothing_left")
def test_a_template_that_no_signal_stops_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with LimitedRenderer(bomb()) as limited:
        assert isinstance(render(limited, [colour()])[0], PairTexts)
        monkeypatch.setattr(data_render_process, "STUCK", 1.0)
        began = time.monotonic()
        with pytest.raises(
            BeyondLimitsError, match=r"one of the 2 pairs from x:1: .* did not end within 1 seconds"
        ) as raised:
            render(limited, [colour(), colour("stuck")])
        assert 1 <= time.monotonic() - began < 10
        message(raised)


@pytest.mark.usefixtures("nothing_left", "one_second")
def test_a_bomb_among_many_pairs_stops_the_run(bpe: PreTrainedTokenizerFast) -> None:
    data = section(chat_template=BOMB)
    pairs = [colour(str(i)) for i in range(3 * BATCH)]
    pairs[2 * BATCH + 1] = Pair((user("time"),), "a", "b", "x:here")
    with (
        LimitedRenderer(set_chat_template(bpe, data)) as limited,
        pytest.raises(BeyondLimitsError, match=r"^x:here: "),
    ):
        list(tokenize_pairs(pairs, limited, bpe, data))


@pytest.mark.long
@pytest.mark.usefixtures("nothing_left")
def test_the_seconds_are_those_of_the_process(bpe: PreTrainedTokenizerFast) -> None:
    with LimitedRenderer(bomb()) as limited:
        began = time.monotonic()
        with pytest.raises(BeyondLimitsError, match=f"takes more than {SECONDS} seconds"):
            render(limited, [colour("time")])
        assert SECONDS <= time.monotonic() - began < 10 * SECONDS


# --- the process ends


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("sent", [False, True])
def test_a_process_that_is_killed_from_outside(bpe: PreTrainedTokenizerFast, sent: bool) -> None:
    with LimitedRenderer(set_chat_template(bpe, section())) as limited:
        render(limited, [colour()])
        pid = limited._process.pid
        if sent:
            os.kill(pid, signal.SIGSTOP)
            limited.send([colour()])
        os.kill(pid, signal.SIGKILL)
        limited._process.wait()
        with pytest.raises(BeyondLimitsError, match=r"was killed \(signal 9\)") as raised:
            limited.receive() if sent else render(limited, [colour()])
        message(raised)


@pytest.mark.usefixtures("nothing_left")
def test_a_process_that_fails_is_our_own_fault(bpe: PreTrainedTokenizerFast) -> None:
    with LimitedRenderer(set_chat_template(bpe, section())) as limited:
        limited._write({"no": "batch"})
        with pytest.raises(RuntimeError, match=r"ended with 1: .*Error"):
            limited.receive()


@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_is_not_the_childs_to_handle(bpe: PreTrainedTokenizerFast) -> None:
    with LimitedRenderer(set_chat_template(bpe, section())) as limited:
        render(limited, [colour()])
        os.kill(limited._process.pid, signal.SIGINT)
        assert isinstance(render(limited, [colour()])[0], PairTexts)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_who_stops_early_leaves_nothing_behind(
    bpe: PreTrainedTokenizerFast, error: type[BaseException]
) -> None:
    data = section()

    def run() -> Iterator[None]:
        pairs = (colour(str(i)) for i in range(20 * BATCH))
        with LimitedRenderer(set_chat_template(bpe, data)) as limited:
            for _ in tokenize_pairs(pairs, limited, bpe, data):
                yield

    running = run()
    for _ in range(BATCH + 3):
        next(running)
    with pytest.raises(error):
        running.throw(error())  # type: ignore[attr-defined]
    del running


@pytest.mark.usefixtures("nothing_left")
def test_it_ends_with_its_parent(bpe: PreTrainedTokenizerFast) -> None:
    """Nobody is left to kill it when the parent was killed: then its input ends."""
    code = (
        "import os; from orpo_lite.data.chat_template import Template\n"
        "from orpo_lite.data.render_process import LimitedRenderer\n"
        "limited = LimitedRenderer(Template('{{ 1 }}', {}, [], [], ''))\n"
        "print(limited._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(done.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
