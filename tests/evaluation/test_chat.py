"""A conversation: its history, its commands, base and tuned model side by side, Ctrl-C."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, byte_tokenizer, tiny_llama, write_base

from orpo_lite.cli.console import harmless
from orpo_lite.errors import DataError
from orpo_lite.evaluation.chat import Chat
from orpo_lite.evaluation.open_run import OpenRun, open_run
from orpo_lite.model.generate import Decoding
from orpo_lite.updates import run_to_end

Trained = tuple[list[Any], Any]
Call = Callable[..., Answer]
SHORT = Decoding(8, temperature=0.7)


def opened(run: Path) -> OpenRun:
    return run_to_end(open_run(run), lambda _: None)


def said(chat: Chat, text: str) -> list[str]:
    """What each speaker answers."""
    answers = []
    for speaker in chat.speakers:
        ids, _ = chat.prompt(speaker, text)
        answers.append("".join(chat.answer(speaker, text, ids)).strip())
    return answers


def test_base_and_tuned_model_answer_each_with_a_history_of_its_own(
    trained: Trained, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained[1].run
    model = opened(run)
    lines = "Hello\n\n/system Be brief\nHello\nMore\n/nonsense\n/save talk.json\n/quit\nunread\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, printed, complaint = call("chat", str(run), "--compare", "--max-new-tokens", "8")
    assert code == 0
    assert "/reset" in complaint
    turns = json.loads(Path("talk.json").read_text("utf-8"))["conversations"]
    with model.prompt_tokenizer() as tokenizer:
        answerer = model.answerer(tokenizer.end_id)
        for name, adapter in (("base", False), ("tuned", True)):
            assert [turn["content"] for turn in turns[name] if turn["role"] != "assistant"] == [
                "Be brief",
                "Hello",
                "More",
            ]
            for end in (2, 4):
                (ids,) = tokenizer.ids([turns[name][:end]])
                (found,) = answerer.answer([ids], SHORT, adapter=adapter)
                assert turns[name][end]["content"] == model.text(found[0])
                assert f"{name}: {harmless(turns[name][end]['content'])}" in printed
    assert turns["base"][4] != turns["tuned"][4]
    assert printed.count("tuned: ") == 3


def test_the_oldest_turns_are_dropped_when_the_context_is_full(trained: Trained) -> None:
    with Chat(opened(trained[1].run), SHORT, system="S") as chat:
        (speaker,) = chat.speakers
        dropped = 0
        for number in range(6):
            ids, gone = chat.prompt(speaker, f"{number} {'x' * 40}")
            dropped += gone
            assert len(ids) + 8 <= 256
            "".join(chat.answer(speaker, f"{number}", ids))
        assert 0 < dropped < 6
        assert speaker.history[0] == {"role": "user", "content": f"{dropped}"}
        with pytest.raises(DataError, match="fewer than the model's 256 positions"):
            chat.prompt(speaker, "x" * 300)
        with pytest.raises(DataError, match="special token"):
            chat.prompt(speaker, "an end</s>")


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(trained: Trained) -> None:
    with Chat(opened(trained[1].run), Decoding(150, temperature=1.0)) as chat:
        (speaker,) = chat.speakers
        ids, _ = chat.prompt(speaker, "Hello")
        answer = chat.answer(speaker, "Hello", ids)
        first = next(answer)
        answer.close()
        assert speaker.history[1]["content"] == first.strip()
        chat.reset()
        assert said(chat, "Hello")[0].startswith(first.strip())


def test_an_answer_cannot_command_the_terminal() -> None:
    assert (
        harmless("a\x1b]0;title\x07\n\tb\x9b\u202e\u00e9")
        == "a\\x1b]0;title\\x07\n\tb\\x9b\\u202e\u00e9"
    )


def test_an_interrupt_stops_one_answer(
    trained: Trained, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = []

    def interrupted_once(text: str) -> str:
        pieces.append(text)
        if len(pieces) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return text

    monkeypatch.setattr("orpo_lite.cli.chat_loop.harmless", interrupted_once)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nMore\n/save talk.json\n"))
    code, _, complaint = call(
        "chat", str(trained[1].run), "--temperature", "1", "--max-new-tokens", "40"
    )
    assert (code, complaint.split("\n")[0]) == (0, "stopped")
    (turns,) = json.loads(Path("talk.json").read_text("utf-8"))["conversations"].values()
    assert [turn["content"] for turn in turns[::2]] == ["Hello", "More"]
    assert turns[1]["content"] == pieces[0].strip()
    assert turns[3]["content"] == "".join(pieces[1:]).strip() != ""


@pytest.mark.long
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    model = tiny_llama(len(byte_tokenizer()), max_position_embeddings=8192)
    model.lm_head.weight.data[2] = 0.0  # it never ends an answer
    base = write_base(tmp_path / "base", model)
    here, there = pty.openpty()
    command = [sys.executable, "-m", "orpo_lite", "chat", str(base), "--temperature", "0"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "6000"],
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(there)
    screen = ""

    def wait_for(text: str, seconds: float = 120.0) -> None:
        nonlocal screen
        end = time.monotonic() + seconds
        while text not in screen:
            assert time.monotonic() < end, screen[-2000:]
            if select.select([here], [], [], 1.0)[0]:
                screen += os.read(here, 65536).decode(errors="replace")
        screen = screen.partition(text)[2]

    try:
        wait_for("> ")
        os.write(here, b"Hello there\n")
        wait_for("Hello there")
        wait_for(" ")  # a piece of the answer
        os.write(here, b"\x03")
        wait_for("stopped", 5)
        wait_for("> ", 5)
        os.write(here, b"\x03")
        wait_for("Ctrl-D ends")
        wait_for("> ")
        os.write(here, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(here)
