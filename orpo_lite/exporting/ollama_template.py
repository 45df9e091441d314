"""A chat template as Ollama's: what the template writes between the turns, found by rendering turns that are marks.

Ollama's templates are Go's, a tokenizer's are Jinja. Nothing is translated: conversations of placeholders are rendered,
what stands between the placeholders is taken, and conversations of all other shapes must come out the same when they
are put together of those pieces. A template for which they do not is refused.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orpo_lite.errors import ModelError

Message = dict[str, str]
Render = Callable[
    [list[Message]], str
]  # up to where the model goes on; raises for turns that the template refuses
SYSTEM, USERS, ANSWER = "System-mark", ("First-mark", "Second-mark"), "Answer-mark"
LONGEST = 4  # questions of the conversations that are compared


@dataclass(frozen=True)
class Turns:
    """What stands around the texts of a conversation."""

    head: str
    """Before a first question without a system text."""
    asked: str
    """Between a question and its answer."""
    generate: str
    """After the last question: where the model goes on."""
    answered: str
    """Between an answer and the next question."""
    system: Literal["", "start", "last question"] = ""
    """Where a system text stands; nowhere, when the template has no place for one."""
    system_head: str = ""
    """Before a system text at the start."""
    system_end: str = ""
    """Between a system text and its question."""

    def rebuild(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, in the steps of :meth:`to_go`."""
        system = next((turn["content"] for turn in messages if turn["role"] == "system"), "")
        text = ""
        for index, turn in enumerate(messages):
            last = index == len(messages) - 1
            if turn["role"] == "system":
                text += (
                    self.system_head + system + self.system_end if self.system == "start" else ""
                )
            elif turn["role"] == "user":
                first = index == 0 or (index == 1 and bool(system) and self.system != "start")
                text += self.head if first else ""
                text += (
                    system + self.system_end
                    if system and last and self.system == "last question"
                    else ""
                )
                text += turn["content"] + (self.generate if last else self.asked)
            else:
                text += turn["content"] + ("" if last else self.answered)
        return text

    def with_heads(self, change: Callable[[str], str]) -> "Turns":
        """The same with another start of a conversation."""
        return replace(self, head=change(self.head), system_head=change(self.system_head))

    def to_go(self) -> str:
        """The same as a Go template over Ollama's ``.Messages``; every text of ours is a quoted string in it."""
        at_start = self.system == "start"
        first = "eq $i 0" if at_start else "or (eq $i 0) (and (eq $i 1) $.System)"
        lines = [
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        ]
        lines += ['{{- if eq .Role "system" }}']
        lines += (
            [_said(self.system_head), "{{- .Content }}", _said(self.system_end)] if at_start else []
        )
        lines += [
            '{{- else if eq .Role "user" }}',
            f"{{{{- if {first} }}}}",
            _said(self.head),
            "{{- end }}",
        ]
        if self.system == "last question":
            lines += [
                "{{- if and $last $.System }}",
                "{{- $.System }}",
                _said(self.system_end),
                "{{- end }}",
            ]
        lines += ["{{- .Content }}"]
        if self.generate == self.asked:
            lines += [_said(self.asked)]
        else:
            lines += [
                "{{- if $last }}",
                _said(self.generate),
                "{{- else }}",
                _said(self.asked),
                "{{- end }}",
            ]
        lines += ['{{- else if eq .Role "assistant" }}', "{{- .Content }}"]
        lines += [
            "{{- if not $last }}",
            _said(self.answered),
            "{{- end }}",
            "{{- end }}",
            "{{- end }}",
        ]
        return "\n".join(line for line in lines if line)


def _said(text: str) -> str:
    # JSON's escapes are Go's as well; and no three quotes in a row, which would end the Modelfile's text.
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def find_turns(render: Render, where: str) -> tuple[Turns, list[str]]:
    """The pieces of a chat template, and what is not the same there.

    Args:
        render: the template.
        where: what to call it in messages.

    Raises:
        ModelError: pieces do not make up its conversations, or it fails on them.
    """
    try:
        one, two = render(_talk(USERS[:1])), render(_talk(USERS, [ANSWER]))
    except Exception as error:  # a template can raise anything
        raise _refused(where, f"raises {type(error).__name__}: {error}") from None
    alone, both = _cut(one, [USERS[0]]), _cut(two, [USERS[0], ANSWER, USERS[1]])
    if alone is None or both is None:
        raise _refused(where, "does not write each text once, in its order")
    turns = Turns(head=alone[0], asked=both[1], answered=both[2], generate=alone[1])
    if (different := _different(turns, render, system=False)) is not None:
        raise _refused(
            where, f"writes a conversation of {different} questions otherwise than a shorter one"
        )
    padded = _talk([" a \n", "\n b "], [" c "])
    notes = []
    if render(padded) != turns.rebuild(padded):
        notes.append(
            "the chat template takes white space off the ends of a text, which Ollama's cannot"
        )
    thought = _talk(["a", "b"], ["<think>\nc\n</think>\n\nd"])
    if render(thought) != turns.rebuild(thought):
        notes.append(
            "the chat template takes <think> out of earlier answers, which Ollama's does not"
        )
    for guess in _with_system(turns, render):
        if _different(guess, render, system=True) is None:
            return guess, notes
    return turns, [
        *notes,
        "the chat template has no place of its own for a system text: Ollama will leave one out",
    ]


def _with_system(turns: Turns, render: Render) -> Iterator[Turns]:
    try:
        short, long = (
            render(_talk(USERS[:1], system=SYSTEM)),
            render(_talk(USERS, [ANSWER], SYSTEM)),
        )
    except Exception:  # it takes no system text, and says so
        return
    if pieces := _cut(short, [SYSTEM, USERS[0]]):
        if _cut(long, [SYSTEM, USERS[0], ANSWER, USERS[1]]):
            yield replace(turns, system="start", system_head=pieces[0], system_end=pieces[1])
        else:
            yield replace(turns, system="last question", system_end=pieces[1])


def _different(turns: Turns, render: Render, *, system: bool) -> int | None:
    """How many questions the first conversation has that is put together wrongly; None when there is none."""
    for count in range(1, LONGEST + 1):
        talk = _talk(
            [f"what is {n} and why?" for n in range(count)],
            [f"it is {n}, for short." for n in range(count - 1)],
            "say little" if system else "",
        )
        try:
            if render(talk) != turns.rebuild(talk):
                return count
        except Exception:  # a template can raise anything
            return count
    return None


def _talk(questions: Sequence[str], answers: Sequence[str] = (), system: str = "") -> list[Message]:
    turns = [{"role": "system", "content": system}] if system else []
    for number, question in enumerate(questions):
        turns.append({"role": "user", "content": question})
        if number < len(answers):
            turns.append({"role": "assistant", "content": answers[number]})
    return turns


def _cut(text: str, marks: Sequence[str]) -> list[str] | None:
    """What stands before, between and after the marks; None unless each is there once, in this order."""
    pieces: list[str] = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    pieces.append(text)
    return None if any(mark in piece for mark in marks for piece in pieces) else pieces


def _refused(where: str, found: str) -> ModelError:
    return ModelError(
        where=where,
        found=f"{found}: it has no Ollama template",
        expected="one that writes each turn between the same texts",
        fix="orpo-lite export RUN --to gguf, which keeps it",
    )


def renderer(tokenizer: Any, variables: dict[str, Any]) -> Render:
    """The tokenizer's own template; or, where it has none, questions as plain text."""
    if not tokenizer.chat_template:
        return lambda messages: "".join(turn["content"] for turn in messages)

    def render(messages: list[Message]) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **variables
            )
        )

    return render
