"""Convert a chat template to a template for Ollama.

Ollama's templates are written in Go, but a tokenizer's chat template is written in Jinja. The Jinja
code is not translated. Instead, the chat template renders conversations whose messages are
placeholders, and the texts between the placeholders are extracted. The Go template writes these
texts. As a check, the prompts of conversations with 1 to ``LONGEST`` questions are built from the
texts. If the chat template gives another prompt, the export is refused. Three differences only add
a note to the export: a system text is written differently, white space around a message is
stripped, or <think> is removed from earlier answers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orpo_lite.errors import ModelError

Message = dict[str, str]
# Returns the prompt of a conversation. Raises an error if the template refuses its messages.
Render = Callable[[list[Message]], str]
SYSTEM, USERS, ANSWER = "System-mark", ("First-mark", "Second-mark"), "Answer-mark"
LONGEST = 4  # largest number of questions in a conversation that is compared


@dataclass(frozen=True)
class Turns:
    """The texts that a chat template writes around the messages of a conversation."""

    head: str
    """The text before the first question, if there is no system text."""
    asked: str
    """The text between a question and its answer."""
    generate: str
    """The text after the last question, before the model's answer."""
    answered: str
    """The text between an answer and the next question."""
    system: Literal["", "start", "last question"] = ""
    """Position of the system text, or "" if the template does not support a system text."""
    system_head: str = ""
    """The text before a system text."""
    system_end: str = ""
    """The text between a system text and the next question."""

    def rebuild(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the template of :meth:`to_go` gives for a conversation."""
        system = next((turn["content"] for turn in messages if turn["role"] == "system"), "")
        text = ""
        for index, turn in enumerate(messages):
            is_last = index == len(messages) - 1
            if turn["role"] == "system":
                if self.system == "start":
                    text += self.system_head + system + self.system_end
            elif turn["role"] == "user":
                follows_system = index == 1 and bool(system)
                if index == 0 or (follows_system and self.system != "start"):
                    text += self.head
                if is_last and system and self.system == "last question":
                    text += system + self.system_end
                text += turn["content"] + (self.generate if is_last else self.asked)
            else:
                text += turn["content"] + ("" if is_last else self.answered)
        return text

    def with_heads(self, change: Callable[[str], str]) -> "Turns":
        """Return a copy in which ``change`` has been applied to ``head`` and ``system_head``."""
        return replace(self, head=change(self.head), system_head=change(self.system_head))

    def to_go(self) -> str:
        """Return a Go template for Ollama. It writes this object's texts around each message."""
        at_start = self.system == "start"
        first = "eq $i 0" if at_start else "or (eq $i 0) (and (eq $i 1) $.System)"
        lines = [
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        ]
        lines += ['{{- if eq .Role "system" }}']
        if at_start:
            lines += [_quoted(self.system_head), "{{- .Content }}", _quoted(self.system_end)]
        lines += ['{{- else if eq .Role "user" }}']
        lines += [f"{{{{- if {first} }}}}", _quoted(self.head), "{{- end }}"]
        if self.system == "last question":
            lines += ["{{- if and $last $.System }}", "{{- $.System }}"]
            lines += [_quoted(self.system_end), "{{- end }}"]
        lines += ["{{- .Content }}"]
        if self.generate == self.asked:
            lines += [_quoted(self.asked)]
        else:
            lines += ["{{- if $last }}", _quoted(self.generate)]
            lines += ["{{- else }}", _quoted(self.asked), "{{- end }}"]
        lines += ['{{- else if eq .Role "assistant" }}', "{{- .Content }}"]
        lines += ["{{- if not $last }}", _quoted(self.answered), "{{- end }}"]
        lines += ["{{- end }}", "{{- end }}"]
        return "\n".join(line for line in lines if line)


def _quoted(text: str) -> str:
    """Return a Go action that writes a text, or "" for an empty text.

    The text is quoted as JSON, because Go reads JSON escapes. A JSON string never contains three
    quotes in a row, which would end the template in a Modelfile.
    """
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def find_turns(render: Render, where: str) -> tuple[Turns, list[str]]:
    """Return (turns, notes) for a chat template.

    ``turns`` holds the texts that the chat template writes around messages. Each note describes one
    difference between the chat template and the template for Ollama (:meth:`Turns.to_go`).

    Args:
        render: the function that renders the chat template.
        where: the name of the chat template for error messages.

    Raises:
        ModelError: the chat template raises an error, or :class:`Turns` cannot give the same
            prompts as the chat template.
    """
    try:
        one = render(_conversation(USERS[:1]))
        two = render(_conversation(USERS, [ANSWER]))
    except Exception as error:  # a template can raise anything
        raise _refused(where, f"raises {type(error).__name__}: {error}") from None
    short, long = _split(one, [USERS[0]]), _split(two, [USERS[0], ANSWER, USERS[1]])
    if short is None or long is None:
        raise _refused(where, "does not write each message exactly once and in order")
    turns = Turns(head=short[0], asked=long[1], answered=long[2], generate=short[1])
    different = _first_difference(turns, render, system=False)
    if different is not None:
        found = f"writes other texts around the messages if the number of questions is {different}"
        raise _refused(where, found)
    padded = _conversation([" a \n", "\n b "], [" c "])
    notes = []
    if render(padded) != turns.rebuild(padded):
        notes.append(
            "the chat template strips white space around a message; Ollama's template does not"
        )
    thinking = _conversation(["a", "b"], ["<think>\nc\n</think>\n\nd"])
    if render(thinking) != turns.rebuild(thinking):
        notes.append(
            "the chat template removes <think> from earlier answers; Ollama's template keeps it"
        )
    with_system = _with_system(turns, render)
    if with_system and _first_difference(with_system, render, system=True) is None:
        return with_system, notes
    notes.append(
        "the chat template does not support system texts, so Ollama leaves system texts out"
    )
    return turns, notes


def _with_system(turns: Turns, render: Render) -> Turns | None:
    """Return ``turns`` with the texts around a system text, or None if it is not supported."""
    try:
        short = render(_conversation(USERS[:1], system=SYSTEM))
        long = render(_conversation(USERS, [ANSWER], SYSTEM))
    except Exception:  # the template refuses a system text
        return None
    pieces = _split(short, [SYSTEM, USERS[0]])
    if not pieces:
        return None
    if _split(long, [SYSTEM, USERS[0], ANSWER, USERS[1]]):
        return replace(turns, system="start", system_head=pieces[0], system_end=pieces[1])
    return replace(turns, system="last question", system_end=pieces[1])


def _first_difference(turns: Turns, render: Render, *, system: bool) -> int | None:
    """Compare the prompts from ``turns`` and ``render`` for conversations of 1, 2, ... questions.

    Return the number of questions in the first conversation whose prompts differ. Return None if
    all prompts are the same.
    """
    for count in range(1, LONGEST + 1):
        messages = _conversation(
            [f"what is {n} and why?" for n in range(count)],
            [f"it is {n}, for short." for n in range(count - 1)],
            "say little" if system else "",
        )
        try:
            if render(messages) != turns.rebuild(messages):
                return count
        except Exception:  # a template can raise anything
            return count
    return None


def _conversation(
    questions: Sequence[str], answers: Sequence[str] = (), system: str = ""
) -> list[Message]:
    """Return the messages of a conversation: a system text, then questions and answers."""
    turns = [{"role": "system", "content": system}] if system else []
    for number, question in enumerate(questions):
        turns.append({"role": "user", "content": question})
        if number < len(answers):
            turns.append({"role": "assistant", "content": answers[number]})
    return turns


def _split(text: str, marks: Sequence[str]) -> list[str] | None:
    """Return the texts around the marks, or None if a mark is missing, repeated or out of order."""
    pieces: list[str] = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    pieces.append(text)
    return None if any(mark in piece for mark in marks for piece in pieces) else pieces


def _refused(where: str, found: str) -> ModelError:
    """Return the error for a template that cannot be converted. ``found`` begins with a verb."""
    return ModelError(
        where=where,
        found=f"cannot be converted for Ollama, because it {found}",
        expected="a template that writes each message once and in order, with texts between the "
        "messages that do not depend on the number of questions",
        fix="orpo-lite export RUN --to gguf, which keeps the chat template unchanged",
    )


def renderer(tokenizer: Any, variables: dict[str, Any]) -> Render:
    """Return a function that renders messages with the tokenizer's chat template.

    If the tokenizer has no chat template, the function joins the texts of the messages.
    ``variables`` are passed to the chat template.
    """
    if not tokenizer.chat_template:
        return lambda messages: "".join(turn["content"] for turn in messages)

    def render(messages: list[Message]) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **variables
            )
        )

    return render
