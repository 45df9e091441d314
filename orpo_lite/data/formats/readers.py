"""Rows to pairs: one reader per format, all with one signature."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orpo_lite.data.formats.messages import ANSWER_KEYS, BESIDE, MEASURES, ROLES, TOOL_CALLS, is_message, normal
from orpo_lite.data.formats.text import (
    ABSENT,
    MARKED,
    REPLY,
    begins_dialogue,
    begins_with,
    behind,
    fault,
    is_whole_dialogue,
    numeric,
    read_dialogue_prompt,
    seen,
    shared_start,
    shared_words,
    split_dialogue,
    text_of,
)
from orpo_lite.data.formats.values import opens
from orpo_lite.data.pair import (
    EMPTY_CHOSEN,
    EMPTY_REJECTED,
    PROMPTS_DIFFER,
    SYSTEMS_DIFFER,
    TIED,
    TOO_FEW,
    UNJUDGED,
    Message,
    NotJson,
    Pair,
    Row,
    RowError,
)

# Whose turns are no one's here: what a tool was asked, and what it gave.
TOOL_ROLES = ("tool", "function", "ipython", "observation", "tool_call", "function_call", "tool_response",
              "function_response", "tool_result")  # fmt: skip

NO_TOOLS = "turns of system, user and assistant alone: calls of tools, and what tools give, are not read"
WITHOUT_TOOLS = "leave out the rows with tools, or write each call and what it gave as text, into the turn beside it"

Reader = Callable[[Row, str], Pair]


def read_pair(row: Row, where: str) -> Pair:
    """Replies to a prompt or to a conversation, or whole conversations: as texts, as single messages, or as lists."""
    return _join(row, *_before(row, where), where)


def read_implicit(row: Row, where: str) -> Pair:
    """TRL's implicit prompt: chosen and rejected begin alike, as lists of messages or as texts."""
    if not isinstance(row.get("chosen"), str) or isinstance(row.get("rejected"), list):
        return _join(row, (), None, where)
    chosen, rejected = (text_of(row, side, where) for side in ("chosen", "rejected"))
    if begins_dialogue(chosen):
        return read_hh_rlhf(row, where)
    prompt = shared_words(chosen, rejected)
    drop = None if prompt or chosen == rejected else PROMPTS_DIFFER
    return _pair(row, _user(prompt), chosen[len(prompt) :], rejected[len(prompt) :], where, prompt, drop)


def read_hh_rlhf(row: Row, where: str) -> Pair:
    """Anthropic's HH-RLHF: chosen and rejected are dialogues in one text, told apart by their turn markers.

    The reply follows the last assistant marker. The space after a marker belongs to the marker. What stands in front
    of the first turn is a system text. Some sets hold the dialogue in prompt, and only the replies in chosen and
    rejected.
    """
    if isinstance(row.get("prompt"), str) and not is_whole_dialogue(text_of(row, "chosen", where)):
        turns, prompt = read_dialogue_prompt(row, where)
        chosen, rejected = (MARKED.sub("", text_of(row, side, where)) for side in ("chosen", "rejected"))
        drop = None
    else:
        (prompt, turns, chosen), (_, other_turns, rejected) = (
            split_dialogue(row, side, where) for side in ("chosen", "rejected")
        )
        drop = None if turns == other_turns else PROMPTS_DIFFER
    if prompt.endswith(REPLY) and chosen.startswith(" ") and rejected.startswith(" "):
        prompt, chosen, rejected = prompt + " ", chosen[1:], rejected[1:]
    return _pair(row, turns, chosen, rejected, where, prompt, drop)


def read_doubled(row: Row, where: str) -> Pair:
    """Texts with the prompt in its own column and again at the start of chosen and rejected: taken off where it is."""
    return undoubled(read_pair(row, where))


def read_alpaca(row: Row, where: str) -> Pair:
    """Alpaca: an instruction (as prompt), the input it is about, and two replies; or output, [chosen, rejected]."""
    if row.get("chosen") is None and isinstance(output := row.get("output"), list):
        if len(output) != 2:
            raise fault(where, "output", f"a list of {len(output)}", "a list of two texts: [chosen, rejected]")
        row = {**row, "chosen": output[0], "rejected": output[1]}
    return read_pair(row, where)


def read_ranked(row: Row, where: str) -> Pair:
    """Any number of answers with scores or ranks, as in UltraFeedback and Nectar: the best against the worst."""
    before, prompt_text = _before_answers(row, where)
    answers = list(_ranked(row, where))
    if len(answers) < 2:
        return _pair(row, before, "", "", where, prompt_text, TOO_FEW)
    best, worst = max(answers, key=lambda answer: answer[0]), min(answers, key=lambda answer: answer[0])
    drop = TIED if best[0] == worst[0] else None
    return _pair(row, before, best[1], worst[1], where, prompt_text, drop)


def read_judged(row: Row, where: str) -> Pair:
    """Two answers, texts or whole conversations, and a verdict: better is a, b or tie; blank where nobody judged."""
    if "better" in row and not str(row["better"] or "").strip():
        return Pair((), "", "", where, drop=UNJUDGED)
    verdict = str(row.get("better")).strip().lower()
    if verdict not in ("a", "b", "tie"):
        raise fault(where, "better", seen(row, "better"), "a verdict that names one of the two answers, or a tie")
    fields = ("response_b", "response_a") if verdict == "b" else ("response_a", "response_b")
    before, prompt_text = _before_answers(row, where, "response_a")
    if blank := without_reply(row, fields, where):
        return blank
    pair = _join(row, before, prompt_text, where, fields)
    return replace(pair, drop=TIED) if verdict == "tie" else pair


READERS: dict[str, Reader] = {
    # What sets these apart is how their columns are found.
    **dict.fromkeys(("explicit", "messages", "conversation", "sharegpt", "openai", "orca"), read_pair),
    "implicit": read_implicit,
    "hh_rlhf": read_hh_rlhf,
    "doubled": read_doubled,
    "alpaca": read_alpaca,
    "ranked": read_ranked,
    "judged": read_judged,
}


def without_reply(row: Row, fields: Sequence[str], where: str) -> Pair | None:
    """The pair of a row in which the chosen reply or the rejected one is null, as it is empty in a csv; else None."""
    for field, reason in zip(fields, (EMPTY_CHOSEN, EMPTY_REJECTED), strict=False):  # or one for both
        if field in row and row[field] is None:
            return Pair((), "", "", where, drop=reason)
    return None


def undoubled(pair: Pair) -> Pair:
    """Without the prompt, or its last turns, at the start of the replies that begin with it again."""
    texts = (pair.chosen, pair.rejected)
    ends = repeated(pair)
    repeats = [(text, end) for text, end in zip(texts, ends, strict=True) if end is not None]
    if not repeats:
        return pair
    # The space between prompt and reply is the set's seam, no part of the reply.
    spaces = [end[: len(end) - len(end.lstrip())] for _, end in repeats]
    seam = shared_start(spaces[0], spaces[-1])
    good, bad = (text if end is None else end[len(seam) :] for text, end in zip(texts, ends, strict=True))
    *before, last = pair.messages
    (text, end), asked = repeats[0], last["content"]
    prompt_text = text[: len(text) - len(end)] + seam if pair.prompt_text == asked else pair.prompt_text
    messages = (*before, {**last, "content": asked.rstrip()})
    return replace(pair, messages=messages, chosen=good, rejected=bad, prompt_text=prompt_text)


def repeated(pair: Pair) -> list[str | None]:
    """What follows in chosen and in rejected on the prompt, or on its last turns, where they begin so; else None."""
    return [_behind_turns(pair.messages, text) for text in (pair.chosen, pair.rejected)]


def _behind_turns(turns: Sequence[Message], text: str) -> str | None:
    for i in range(len(turns)):  # a pair that is left out may have none
        rest: str | None = text
        for turn in turns[i:]:
            rest = behind(turn["content"], rest) if rest is not None else None
        if rest is not None:
            return rest
    return None


def _pair(
    row: Row,
    before: Sequence[Message],
    chosen: str,
    rejected: str,
    where: str,
    prompt_text: str | None = None,
    drop: str | None = None,
) -> Pair:
    """Every pair is made here, so that earlier turns and a system text go in front in every format.

    No system text where the conversation has a system turn, or a user's turn that begins with that text.
    """
    if earlier := _history(row, where):
        before = _joined(earlier, before)
        prompt_text = None  # a conversation now; nobody said how its turns would be joined as plain text
    if row.get("system") is not None and (system := text_of(row, "system", where)).strip():
        asked = [turn["content"] for turn in before if turn["role"] == "user"]
        if not _split_system(before)[0] and not any(begins_with(system, text) for text in asked):
            before = ({"role": "system", "content": system}, *before)
            prompt_text = None
    return Pair(tuple(before), chosen, rejected, where, prompt_text, drop)


def _join(
    row: Row,
    prompt: Sequence[Message],
    prompt_text: str | None,
    where: str,
    fields: tuple[str, str] = ("chosen", "rejected"),
) -> Pair:
    """A pair of replies or whole conversations; ``prompt`` goes before both unless they already hold it.

    A reply alone answers what the other side's conversation asks.
    """
    sides = []
    for field in fields:
        *turns, reply = _side(row, field, where)
        if reply["role"] != "assistant":
            found = f"the last turn is the {reply['role']}'s"
            raise fault(where, field, found, "a conversation that ends with the assistant's reply")
        sides.append((turns, reply))
    if any(turns for turns, _ in sides):
        prompt_text = None
    prompt = _unanswered(prompt, sides, where)
    (before, other_before) = (_joined(prompt, turns) for turns, _ in sides)
    chosen, rejected = (reply["content"] for _, reply in sides)
    before, other_before = before or other_before, other_before or before
    if not before:
        raise fault(where, fields[0], "nothing stands before the reply", "the user's turn, or a prompt")
    drop = None if _alike(before, other_before) else PROMPTS_DIFFER
    if drop and _alike(_split_system(before)[1], _split_system(other_before)[1]):
        drop = SYSTEMS_DIFFER
    return _pair(row, before, chosen, rejected, where, prompt_text, drop)


def _unanswered(
    prompt: Sequence[Message], sides: Sequence[tuple[Sequence[Message], Message]], where: str
) -> Sequence[Message]:
    """The turns that the replies answer: some sets have one of the two replies at the end of the prompt as well.

    A prompt that ends with an assistant's turn may also be what was said before the sides' own turns.
    """
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt
    asked = _split_system(prompt[:-1])[1]
    own = [_split_system(turns)[1] for turns, _ in sides]
    if not all(_alike(asked[len(asked) - len(turns) :], turns) for turns in own):
        return prompt
    if any(_alike(prompt[-1:], [reply]) for _, reply in sides):
        return prompt[:-1]
    found = "it ends with an assistant's turn that is neither reply"
    raise fault(where, "prompt", found, "turns that wait for a reply")


def _joined(earlier: Sequence[Message], turns: Sequence[Message]) -> list[Message]:
    """The earlier turns and then these, none of them twice, under one system turn: the later one's."""
    earlier_system, earlier = _split_system(earlier)
    system, turns = _split_system(turns)
    system, size = system or earlier_system, len(earlier)
    if any(_alike(turns[i : i + size], earlier) for i in range(len(turns) - size + 1)):
        return [*system, *turns]
    longest = min(size, len(turns))
    overlap = next(n for n in range(longest, -1, -1) if _alike(earlier[size - n :], turns[:n]))
    return [*system, *earlier, *turns[overlap:]]


def _split_system(turns: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
    start = 1 if turns and turns[0]["role"] == "system" else 0
    return turns[:start], turns[start:]


def _alike(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """The same turns, compared by words."""
    return len(one) == len(other) and all(
        a == b or (a["role"] == b["role"] and a["content"].split() == b["content"].split())
        for a, b in zip(one, other, strict=True)
    )


def _history(row: Row, where: str) -> list[Message]:
    history = row.get("history")
    blank = not history or (isinstance(history, str) and not history.strip())
    return [] if blank else _messages(row, "history", where)


def _before(row: Row, where: str, reply: str = "chosen") -> tuple[Sequence[Message], str | None]:
    """Return what the reply answers, and the same as plain text where it is one; () of a whole conversation."""
    if "conversation" in row:
        return _messages(row, "conversation", where), None
    if isinstance(row.get("prompt"), list):
        return _messages(row, "prompt", where), None
    if opens(row.get(reply)):
        return (), None
    text = _asked(row, where)
    return _user(text), text


def _before_answers(row: Row, where: str, reply: str = "") -> tuple[Sequence[Message], str | None]:
    """Return the same, where the prompt may also be a dialogue in one text."""
    is_dialogue = "conversation" not in row and begins_dialogue(str(row.get("prompt")))
    return read_dialogue_prompt(row, where) if is_dialogue else _before(row, where, reply)


def _asked(row: Row, where: str) -> str:
    """The prompt, and below it what an instruction of Alpaca's kind is about."""
    blank = "prompt" in row and row["prompt"] is None  # as an empty cell is: it will be left out, and counted
    prompt = "" if blank else text_of(row, "prompt", where)
    if row.get("input") is not None and (about := text_of(row, "input", where)).strip():
        return f"{prompt}\n{about}"
    return prompt


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _side(row: Row, field: str, where: str, label: str = "") -> list[Message]:
    """A reply as a text, or a reply or a whole conversation as messages."""
    if isinstance(row.get(field), str):
        return [{"role": "assistant", "content": text_of(row, field, where, label)}]
    return _messages(row, field, where, label)


def _messages(row: Row, field: str, where: str, label: str = "") -> list[Message]:
    value, label = row.get(field), label or field
    if not isinstance(value, list) or not value:
        raise fault(where, label, seen(row, field), "a list of messages {role, content}")
    messages: list[Message] = []
    for i, item in enumerate(value):
        place = f"{label}[{i}]"
        if not isinstance(item, Mapping):
            raise fault(where, place, seen({"": item}, ""), "a message {role, content}")
        role = item.get("role")
        if str(role).lower() in TOOL_ROLES or any(map(item.get, TOOL_CALLS)):
            found = "a call of a tool" if any(map(item.get, TOOL_CALLS)) else f"{role!r:.24}, a tool's turn"
            raise RowError(where=f"{where}, field {place}", found=found, expected=NO_TOOLS, fix=WITHOUT_TOOLS)
        if not isinstance(role, str) or role not in ROLES.values():
            found = f"{role!r:.24}" if isinstance(role, str) else seen(item, "role")
            raise fault(where, f"{place}.role", found, f"one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": text_of(item, "content", where, f"{place}.content")})
    return messages


def _ranked(row: Row, where: str) -> Iterator[tuple[float, str]]:
    """(the higher the better, answer); answers that nobody scored are left out."""
    answers = row.get("completions")
    if not isinstance(answers, list):
        raise fault(where, "completions", seen(row, "completions"), "a list of answers")
    if any(isinstance(answer, str) for answer in answers):
        field, sign = ("ranks", -1) if row.get("scores") is None else ("scores", 1)
        values = row.get(field)
        if not isinstance(values, list) or len(values) != len(answers):
            raise fault(where, field, seen(row, field), f"a list of numbers, one for each of {len(answers)} answers")
        for i, value in enumerate(values):
            if (number := _number(value, where, f"{field}[{i}]")) is not None:
                yield sign * number, text_of({"": answers[i]}, "", where, f"completions[{i}]")
        return
    for i, answer in enumerate(answers):
        if not isinstance(answer, Mapping):
            raise fault(where, f"completions[{i}]", seen({"": answer}, ""), "an answer {response, overall_score}")
    # One measure for all: a score of one kind says nothing beside a score of another.
    measure = next((key for key in MEASURES if any(answer.get(key) is not None for answer in answers)), "")
    for i, answer in enumerate(answers):
        number = _number(answer.get(measure), where, f"completions[{i}].{measure}")
        key = next((key for key in ANSWER_KEYS if answer.get(key) is not None), None)
        if key and number is not None:
            *turns, reply = _side({key: normal(answer[key])}, key, where, label := f"completions[{i}].{key}")
            if turns or reply["role"] != "assistant":
                raise fault(where, label, "messages", "a text, or one message of the assistant")
            yield MEASURES[measure] * number, reply["content"]


def _number(value: Any, where: str, label: str) -> float | None:
    """A score; None and nan are none, and so is N/A."""
    if isinstance(value, str) and numeric(value):
        value = None if value.strip().lower() in ABSENT else float(value)
    if value is None:
        return None
    if isinstance(value, bool | NotJson) or not isinstance(value, int | float):
        raise fault(where, label, seen({"": value}, ""), "a number")
    return None if math.isnan(value) else float(value)


def says_more(row: Row) -> bool:
    """The row holds what belongs to the pair for those who made it, and is not read."""
    values = [value if isinstance(value, list) else [value] for value in row.values()]
    messages = [item for items in values for item in items if is_message(item)]
    beside = (item.get(key) for item in (row, *messages) for key in BESIDE)
    return any(value and value not in ("[]", "{}") for value in beside)
