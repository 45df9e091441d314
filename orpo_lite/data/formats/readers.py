"""Convert rows to pairs. Each format has a reader, a function (row, place) -> pair."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orpo_lite.data.formats.messages import (
    ANSWER_KEYS,
    MEASURES,
    ROLES,
    TOOL_CALLS,
    UNREAD_KEYS,
    is_message,
    normalize,
)
from orpo_lite.data.formats.text import (
    ABSENT,
    ASSISTANT_MARKER,
    STARTS_WITH_MARKER,
    begins_dialogue,
    begins_with,
    common_start,
    common_words,
    describe,
    is_numeric,
    is_whole_dialogue,
    read_dialogue_prompt,
    row_error,
    split_dialogue,
    text_after,
    text_of,
)
from orpo_lite.data.formats.values import is_from_start
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

# Roles of tool calls and of tool results.
TOOL_ROLES = ("tool", "function", "ipython", "observation", "tool_call", "function_call",
              "tool_response", "function_response", "tool_result")  # fmt: skip
NO_TOOLS = "turns of system, user and assistant only: tool calls and tool results are not read"
WITHOUT_TOOLS = (
    "remove the rows with tools, or write each call and its result as text into the turn next to it"
)

Reader = Callable[[Row, str], Pair]


def read_pair(row: Row, where: str) -> Pair:
    """Read a row with two replies, or a row with two whole conversations.

    The replies answer the same prompt or the same conversation. Each reply may be a text, a single
    message or a list of messages.
    """
    return _join(row, *_prompt_turns(row, where), where)


def read_implicit(row: Row, where: str) -> Pair:
    """Read a row in which the prompt is the common start of chosen and rejected.

    Chosen and rejected hold messages or texts. TRL calls such a prompt implicit.
    """
    if not isinstance(row.get("chosen"), str) or isinstance(row.get("rejected"), list):
        return _join(row, (), None, where)
    chosen, rejected = (text_of(row, reply, where) for reply in ("chosen", "rejected"))
    if begins_dialogue(chosen):
        return read_hh_rlhf(row, where)
    prompt = common_words(chosen, rejected)
    drop = None if prompt or chosen == rejected else PROMPTS_DIFFER
    replies = chosen[len(prompt) :], rejected[len(prompt) :]
    return _pair(row, _user(prompt), *replies, where, prompt, drop)


def read_hh_rlhf(row: Row, where: str) -> Pair:
    """Read Anthropic's HH-RLHF: chosen and rejected are texts, each a dialogue with turn markers.

    The reply follows the last assistant marker. The space after a marker belongs to the marker.
    Text before the first turn is a system text. In some datasets, prompt holds the dialogue, and
    chosen and rejected hold only the replies.
    """
    if isinstance(row.get("prompt"), str) and not is_whole_dialogue(text_of(row, "chosen", where)):
        turns, prompt = read_dialogue_prompt(row, where)
        chosen, rejected = (
            STARTS_WITH_MARKER.sub("", text_of(row, reply, where))
            for reply in ("chosen", "rejected")
        )
        drop = None
    else:
        prompt, turns, chosen = split_dialogue(row, "chosen", where)
        _, other_turns, rejected = split_dialogue(row, "rejected", where)
        drop = None if turns == other_turns else PROMPTS_DIFFER
    have_space = chosen.startswith(" ") and rejected.startswith(" ")
    if prompt.endswith(ASSISTANT_MARKER) and have_space:
        prompt, chosen, rejected = prompt + " ", chosen[1:], rejected[1:]
    return _pair(row, turns, chosen, rejected, where, prompt, drop)


def read_doubled(row: Row, where: str) -> Pair:
    """Read a row whose texts chosen and rejected repeat the prompt at their start.

    The repeated prompt is removed from each reply that begins with the prompt.
    """
    return without_repeated_prompt(read_pair(row, where))


def read_alpaca(row: Row, where: str) -> Pair:
    """Read Alpaca: an instruction (as prompt), an optional input, and two replies.

    The replies are in the columns chosen and rejected, or in one list, output: [chosen, rejected].
    """
    output = row.get("output")
    if row.get("chosen") is None and isinstance(output, list):
        if len(output) != 2:
            found = f"a list of {len(output)}"
            expected = "a list of two texts: [chosen, rejected]"
            raise row_error(where, "output", found, expected)
        row = {**row, "chosen": output[0], "rejected": output[1]}
    return read_pair(row, where)


def read_ranked(row: Row, where: str) -> Pair:
    """Read any number of answers with scores or ranks, as in UltraFeedback and Nectar.

    The best and the worst answer become the pair.
    """
    turns, prompt_text = _prompt_turns_of_answers(row, where)
    answers = list(_ranked(row, where))
    if len(answers) < 2:
        return _pair(row, turns, "", "", where, prompt_text, TOO_FEW)
    best = max(answers, key=lambda answer: answer[0])
    worst = min(answers, key=lambda answer: answer[0])
    drop = TIED if best[0] == worst[0] else None
    return _pair(row, turns, best[1], worst[1], where, prompt_text, drop)


def read_judged(row: Row, where: str) -> Pair:
    """Read two answers and a verdict. The answers are texts or whole conversations.

    The verdict is in the column ``better``: "a", "b" or "tie". Blank: nobody judged the answers.
    """
    if "better" in row and not str(row["better"] or "").strip():
        return Pair((), "", "", where, drop=UNJUDGED)
    verdict = str(row.get("better")).strip().lower()
    if verdict not in ("a", "b", "tie"):
        expected = "a verdict that names one of the two answers, or a tie"
        raise row_error(where, "better", describe(row, "better"), expected)
    fields = ("response_b", "response_a") if verdict == "b" else ("response_a", "response_b")
    turns, prompt_text = _prompt_turns_of_answers(row, where, "response_a")
    if blank := pair_without_reply(row, fields, where):
        return blank
    pair = _join(row, turns, prompt_text, where, fields)
    return replace(pair, drop=TIED) if verdict == "tie" else pair


READERS: dict[str, Reader] = {
    # These formats differ in how their columns are found.
    **dict.fromkeys(
        ("explicit", "messages", "conversation", "sharegpt", "openai", "orca"), read_pair
    ),
    "implicit": read_implicit,
    "hh_rlhf": read_hh_rlhf,
    "doubled": read_doubled,
    "alpaca": read_alpaca,
    "ranked": read_ranked,
    "judged": read_judged,
}


def pair_without_reply(row: Row, fields: Sequence[str], where: str) -> Pair | None:
    """Return None if no reply in the row is null. Otherwise return a pair that will be dropped.

    Its ``drop`` is the reason. ``fields``: the columns chosen and rejected, or one column that
    holds both replies. An empty cell of a csv file is null.
    """
    for field, reason in zip(fields, (EMPTY_CHOSEN, EMPTY_REJECTED), strict=False):
        if field in row and row[field] is None:
            return Pair((), "", "", where, drop=reason)
    return None


def without_repeated_prompt(pair: Pair) -> Pair:
    """Return the pair. If a reply begins with the prompt, remove the prompt from this reply.

    If a reply begins with only the last turns of the prompt, remove these turns from this reply.
    """
    texts = (pair.chosen, pair.rejected)
    rests = texts_after_prompt(pair)
    repeats = [(text, rest) for text, rest in zip(texts, rests, strict=True) if rest is not None]
    if not repeats:
        return pair
    # The space between prompt and reply belongs to the prompt.
    spaces = [rest[: len(rest) - len(rest.lstrip())] for _, rest in repeats]
    space = common_start(spaces[0], spaces[-1])
    chosen, rejected = (
        text if rest is None else rest[len(space) :]
        for text, rest in zip(texts, rests, strict=True)
    )
    *before, last = pair.messages
    question, prompt_text = last["content"], pair.prompt_text
    if prompt_text == question:
        text, rest = repeats[0]
        prompt_text = text[: len(text) - len(rest)] + space
    messages = (*before, {**last, "content": question.rstrip()})
    return replace(
        pair, messages=messages, chosen=chosen, rejected=rejected, prompt_text=prompt_text
    )


def texts_after_prompt(pair: Pair) -> list[str | None]:
    """Return [rest of chosen, rest of rejected]: the replies without the repeated prompt.

    A reply may begin with the whole prompt, or with only the last turns of the prompt. For any
    other reply, the rest is None.
    """
    return [_text_after_turns(pair.messages, text) for text in (pair.chosen, pair.rejected)]


def _text_after_turns(turns: Sequence[Message], text: str) -> str | None:
    for i in range(len(turns)):  # a pair that is left out may have no turns
        rest: str | None = text
        for turn in turns[i:]:
            if rest is not None:
                rest = text_after(turn["content"], rest)
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
    """Return the pair, with the row's earlier turns and system text in front. For all formats.

    The system text is not added if the conversation already has a system turn, or a user turn that
    begins with the system text.
    """
    if earlier := _history(row, where):
        before = _join_turns(earlier, before)
        # It is a conversation now, and nothing says how its turns are joined as plain text.
        prompt_text = None
    if row.get("system") is not None and (system := text_of(row, "system", where)).strip():
        questions = [turn["content"] for turn in before if turn["role"] == "user"]
        is_inside = any(begins_with(system, text) for text in questions)
        if not _split_system(before)[0] and not is_inside:
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
    """Return a pair of replies or of whole conversations.

    ``prompt`` is put before both replies, unless they contain it. If only one of the two replies is
    a conversation, its turns are used for the other reply too.
    """
    conversations = []
    for field in fields:
        *turns, reply = _reply_messages(row, field, where)
        if reply["role"] != "assistant":
            found = f"the last turn is the {reply['role']}'s"
            expected = "a conversation that ends with the assistant's reply"
            raise row_error(where, field, found, expected)
        conversations.append((turns, reply))
    if any(turns for turns, _ in conversations):
        prompt_text = None
    prompt = _without_answer(prompt, conversations, where)
    before, other_before = (_join_turns(prompt, turns) for turns, _ in conversations)
    chosen, rejected = (reply["content"] for _, reply in conversations)
    before, other_before = before or other_before, other_before or before
    if not before:
        expected = "a user turn before the reply, or a prompt"
        raise row_error(where, fields[0], "there is nothing before the reply", expected)
    drop = None
    if not _same_turns(before, other_before):
        without_systems = (_split_system(turns)[1] for turns in (before, other_before))
        drop = SYSTEMS_DIFFER if _same_turns(*without_systems) else PROMPTS_DIFFER
    return _pair(row, before, chosen, rejected, where, prompt_text, drop)


def _without_answer(
    prompt: Sequence[Message],
    conversations: Sequence[tuple[Sequence[Message], Message]],
    where: str,
) -> Sequence[Message]:
    """Return the prompt without a reply at its end, which some datasets include.

    If the prompt ends with an assistant turn, there are two cases. Usually this turn is one of the
    two replies and is removed. But if chosen and rejected hold conversations that continue the
    prompt, the prompt is returned unchanged.
    """
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt
    question = _split_system(prompt[:-1])[1]
    for turns, _ in conversations:
        own = _split_system(turns)[1]
        if not _same_turns(question[len(question) - len(own) :], own):
            return prompt
    if any(_same_turns(prompt[-1:], [reply]) for _, reply in conversations):
        return prompt[:-1]
    found = "it ends with an assistant turn that is neither of the two replies"
    raise row_error(where, "prompt", found, "a prompt that ends with a user turn")


def _join_turns(earlier: Sequence[Message], turns: Sequence[Message]) -> list[Message]:
    """Return the earlier turns followed by ``turns``. Turns that are in both appear once.

    If both have a system turn, the system turn of ``turns`` is used.
    """
    earlier_system, earlier = _split_system(earlier)
    system, turns = _split_system(turns)
    system, size = system or earlier_system, len(earlier)
    if any(_same_turns(turns[i : i + size], earlier) for i in range(len(turns) - size + 1)):
        return [*system, *turns]
    overlap = min(size, len(turns))
    while not _same_turns(earlier[size - overlap :], turns[:overlap]):
        overlap -= 1
    return [*system, *earlier, *turns[overlap:]]


def _split_system(turns: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
    start = 1 if turns and turns[0]["role"] == "system" else 0
    return turns[:start], turns[start:]


def _same_turns(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Return whether two lists of turns have the same roles and words."""
    return len(one) == len(other) and all(map(_same_turn, one, other))


def _same_turn(one: Message, other: Message) -> bool:
    if one == other:
        return True
    return one["role"] == other["role"] and one["content"].split() == other["content"].split()


def _history(row: Row, where: str) -> list[Message]:
    history = row.get("history")
    is_blank = not history or (isinstance(history, str) and not history.strip())
    return [] if is_blank else _messages(row, "history", where)


def _prompt_turns(
    row: Row, where: str, reply: str = "chosen"
) -> tuple[Sequence[Message], str | None]:
    """Return the turns that the reply answers, and their plain text if it is known.

    The turns are () if the reply is a whole conversation, which contains them.
    """
    if "conversation" in row:
        return _messages(row, "conversation", where), None
    if isinstance(row.get("prompt"), list):
        return _messages(row, "prompt", where), None
    if is_from_start(row.get(reply)):
        return (), None
    text = _prompt_text(row, where)
    return _user(text), text


def _prompt_turns_of_answers(
    row: Row, where: str, reply: str = ""
) -> tuple[Sequence[Message], str | None]:
    """Return the turns that several answers reply to, and their plain text if it is known.

    In these formats the prompt may also be a dialogue in one text.
    """
    if "conversation" not in row and begins_dialogue(str(row.get("prompt"))):
        return read_dialogue_prompt(row, where)
    return _prompt_turns(row, where, reply)


def _prompt_text(row: Row, where: str) -> str:
    """Return the prompt. If there is an input (Alpaca), it follows on a new line."""
    prompt = ""  # for a null prompt, as in an empty cell: the pair is left out and counted
    if "prompt" not in row or row["prompt"] is not None:
        prompt = text_of(row, "prompt", where)
    if row.get("input") is not None and (extra := text_of(row, "input", where)).strip():
        return f"{prompt}\n{extra}"
    return prompt


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _reply_messages(row: Row, field: str, where: str, label: str = "") -> list[Message]:
    """Return a reply (a text or messages) or a whole conversation as messages."""
    if isinstance(row.get(field), str):
        return [{"role": "assistant", "content": text_of(row, field, where, label)}]
    return _messages(row, field, where, label)


def _messages(row: Row, field: str, where: str, label: str = "") -> list[Message]:
    """Return the messages in a field. Raises RowError. ``label``: the field's name in the error."""
    value, label = row.get(field), label or field
    if not isinstance(value, list) or not value:
        raise row_error(where, label, describe(row, field), "a list of messages {role, content}")
    messages: list[Message] = []
    for i, item in enumerate(value):
        place = f"{label}[{i}]"
        if not isinstance(item, Mapping):
            raise row_error(where, place, describe({"": item}, ""), "a message {role, content}")
        role = item.get("role")
        has_tool_call = any(map(item.get, TOOL_CALLS))
        if has_tool_call or str(role).lower() in TOOL_ROLES:
            found = "a tool call" if has_tool_call else f"{role!r:.24}, a tool's turn"
            raise RowError(
                where=f"{where}, field {place}", found=found, expected=NO_TOOLS, fix=WITHOUT_TOOLS
            )
        if not isinstance(role, str) or role not in ROLES.values():
            found = f"{role!r:.24}" if isinstance(role, str) else describe(item, "role")
            raise row_error(where, f"{place}.role", found, f"one of {', '.join(ROLES)}")
        content = text_of(item, "content", where, f"{place}.content")
        messages.append({"role": role, "content": content})
    return messages


def _ranked(row: Row, where: str) -> Iterator[tuple[float, str]]:
    """Yield (score, answer). A higher score is better. Answers without a score are left out."""
    answers = row.get("completions")
    if not isinstance(answers, list):
        raise row_error(where, "completions", describe(row, "completions"), "a list of answers")
    if any(isinstance(answer, str) for answer in answers):
        yield from _ranked_texts(row, answers, where)
        return
    for i, answer in enumerate(answers):
        if not isinstance(answer, Mapping):
            found = describe({"": answer}, "")
            expected = "an answer {response, overall_score}"
            raise row_error(where, f"completions[{i}]", found, expected)
    # One measure for all: scores of different measures cannot be compared.
    present = [key for key in MEASURES if any(answer.get(key) is not None for answer in answers)]
    measure = present[0] if present else ""
    for i, answer in enumerate(answers):
        score = _score(answer.get(measure), where, f"completions[{i}].{measure}")
        key = next((key for key in ANSWER_KEYS if answer.get(key) is not None), None)
        if key and score is not None:
            label = f"completions[{i}].{key}"
            *turns, reply = _reply_messages({key: normalize(answer[key])}, key, where, label)
            if turns or reply["role"] != "assistant":
                expected = "a text, or one message of the assistant"
                raise row_error(where, label, "messages", expected)
            yield MEASURES[measure] * score, reply["content"]


def _ranked_texts(row: Row, answers: Sequence[Any], where: str) -> Iterator[tuple[float, str]]:
    """Yield (score, answer) for texts with a list of scores or ranks."""
    field, sign = ("ranks", -1) if row.get("scores") is None else ("scores", 1)
    values = row.get(field)
    if not isinstance(values, list) or len(values) != len(answers):
        expected = f"a list of numbers, one for each of {len(answers)} answers"
        raise row_error(where, field, describe(row, field), expected)
    for i, value in enumerate(values):
        score = _score(value, where, f"{field}[{i}]")
        if score is not None:
            yield sign * score, text_of({"": answers[i]}, "", where, f"completions[{i}]")


def _score(value: Any, where: str, label: str) -> float | None:
    """Return a score as a number; None for null, nan and texts such as N/A."""
    if isinstance(value, str) and is_numeric(value):
        value = None if value.strip().lower() in ABSENT else float(value)
    if value is None:
        return None
    if isinstance(value, bool | NotJson) or not isinstance(value, int | float):
        raise row_error(where, label, describe({"": value}, ""), "a number")
    return None if math.isnan(value) else float(value)


def has_unread_fields(row: Row) -> bool:
    """Return whether a row or its messages have fields that are not read: tools, images etc."""
    values = [value if isinstance(value, list) else [value] for value in row.values()]
    messages = [item for items in values for item in items if is_message(item)]
    unread = [item.get(key) for item in (row, *messages) for key in UNREAD_KEYS]
    return any(value and value not in ("[]", "{}") for value in unread)
