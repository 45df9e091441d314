"""Choose the chat template, and render the texts of a pair with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orpo_lite.data.formats.text import common_start
from orpo_lite.data.pair import Message, Pair
from orpo_lite.errors import (
    DataError,
    ModelError,
    OrpoLiteError,
    Overrides,
    RecipeError,
    first_line,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.recipe.schema import DataSection


# Reasons to leave a pair out, found when it is rendered. SPECIAL is followed by the token.
SPECIAL = "special token inside the text"
REWRITTEN = "reply changed by the chat template"
TURN_LOST = "a turn before the reply is left out by the chat template"
TURN_CHANGED = "a turn before the reply is changed by the chat template"
NO_BOUNDARY = "the chat template does not show where the reply begins"
UNFAITHFUL = (REWRITTEN, TURN_LOST, TURN_CHANGED, NO_BOUNDARY)
OWN_TEMPLATE = "set data.chat_template to a file with a template of your own"

PAPER_CHAT_TEMPLATE = (  # "<|user|>\n{}</s>\n<|assistant|>\n{}</s>"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# This module sets these variables, so data.chat_template_kwargs cannot set them.
RESERVED = {"add_generation_prompt", "chat_template", "continue_final_message", "conversations",
            "messages", "return_assistant_tokens_mask"}  # fmt: skip

# The limits of a template.
SECONDS = 10  # of processor time for the four texts of one pair; usually it takes less than 1 ms
MEMORY = 4 << 30  # bytes of address space
# A rendered text may be GROWTH times as long as its messages, plus SLACK for long system prompts.
GROWTH = 16
SLACK = 1 << 20


@dataclass(frozen=True)
class Template:
    """A chat template and its variables. All values can be sent to another process as JSON."""

    text: str | None
    """The Jinja text. None (``data.chat_template: none``) joins prompt and reply unchanged."""
    variables: dict[str, Any]
    """The tokenizer's special tokens by name, and data.chat_template_kwargs."""
    special_tokens: list[str]
    """Texts that the tokenizer converts to special tokens."""
    end_tokens: list[str]
    """Tokens that may end a reply: special tokens, and added tokens such as ChatML's <|im_end|>."""
    description: str
    """A sentence that names the template."""

    named_tokens: list[str] = field(default_factory=list)
    """The special tokens that the tokenizer names: bos, eos, pad, unk."""
    keeps_tail: bool = False
    """True: keep the text that the template writes after the token that ends a reply."""

    @cached_property
    def layouts(self) -> dict[tuple[str, ...], Layout | None]:
        """Roles in order, such as (user, assistant, user) -> the layout found for this order."""
        return {}

    @cached_property
    def special(self) -> re.Pattern[str]:
        """A pattern that matches the special tokens that no message may contain.

        There are three kinds: ``named_tokens``; tokens that the template writes; tokens that end a
        turn or a text. Other special tokens, such as <think>, are allowed in messages.
        """
        if self.text is None:
            return _any_of(self.special_tokens)
        plain = _plain_conversation(self)
        written = [
            token for token in self.special_tokens if plain is None or _ENDS.fullmatch(token)
        ]
        if plain is not None:
            written += [token for token in self.end_tokens if token in plain]
        return _any_of([*self.named_tokens, *written])

    @cached_property
    def end(self) -> re.Pattern[str]:
        """A pattern that matches any token in ``end_tokens``."""
        return _any_of(self.end_tokens)


# Tokens that end turns or texts. A base may have some that its template and its names do not show.
_ENDS = re.compile(
    r"</s>|<[|｜]?(?:eo[a-z](?:_id)?|(?:im_)?end|end[_▁]?of[_▁]?(?:text|turn|sentence))[|｜]?>",
    re.IGNORECASE,
)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(texts) - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class PairTexts(NamedTuple):
    """The rendered texts of a pair. The model sees prompt + chosen, and prompt + rejected."""

    prompt: str
    chosen: str
    rejected: str
    end: str
    """The special token that the template writes after a reply; "" if it writes none."""
    remarks: tuple[str, ...] = ()
    """The remarks on the pair: MOVED_SYSTEM, EMPTY_THOUGHT or NO_THOUGHT."""


# Remarks on pairs that are kept: keys of ``statistics.WARNINGS``.
# The system text is put in front of the user's text, because the template takes no system turn.
MOVED_SYSTEM = "moved_systems"
# The template writes an empty <think> block before the reply, and the model is trained on it.
EMPTY_THOUGHT = "empty_thoughts"
# The generation prompt opens a <think> block that the reply does not have.
NO_THOUGHT = "missing_thoughts"


class Layout(NamedTuple):
    """How a template writes conversations with a certain sequence of roles."""

    moves_system: bool = False
    """True if the system text must be put in front of the next user turn's text."""
    tails: tuple[str, str] | None = None
    """The texts after the last turn: with a generation prompt, and before a reply. None if the
    template writes the turns in the same way in both cases."""


Rendered = PairTexts | str | OrpoLiteError
"""The texts of a pair, the reason to leave it out, or an error."""


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> Template:
    """Return the template that data.chat_template chooses, and store it in the tokenizer.

    Raises RecipeError for unusable settings, ModelError if a needed eos or template is missing.
    """
    text, description = _choose_template(tokenizer, data)
    if text is not None:
        tokenizer.chat_template = text
    if taken := RESERVED & data.chat_template_kwargs.keys():
        allowed = {k: v for k, v in data.chat_template_kwargs.items() if k not in taken}
        raise RecipeError(
            where="data.chat_template_kwargs",
            found=f"sets {', '.join(sorted(taken))}",
            expected=f"no variable that orpo-lite sets: {', '.join(sorted(RESERVED))}",
            fix=Overrides({"data.chat_template_kwargs": allowed}),
        )
    variables = {**tokenizer.special_tokens_map, **data.chat_template_kwargs}
    special, ends = _end_texts(tokenizer)
    named = [str(token) for token in tokenizer.special_tokens_map.values()]
    own_template = tokenizer.chat_template
    if text is None and isinstance(own_template, str):
        # The template is not rendered, but it shows which tokens are markers.
        special = [token for token in special if token in named or token in own_template]
    return Template(text, variables, special, ends, description, named)


def _choose_template(
    tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> tuple[str | None, str]:
    """Return the template's text (None: no template is used) and a sentence that names it."""
    choice = data.chat_template
    if choice == "none":
        eos_id(tokenizer)
        return None, "no chat template: prompt and response are joined as plain text"
    if choice == "auto" and tokenizer.chat_template not in (None, "", PAPER_CHAT_TEMPLATE):
        text, description = _own_template(tokenizer), "the tokenizer's own chat template"
    elif choice == "auto":
        eos_id(tokenizer)  # the template writes it
        text = PAPER_CHAT_TEMPLATE
        names = "<|user|> and <|assistant|>"
        description = f"the paper's chat template, {names}: the tokenizer has none"
    elif is_file(choice):
        text, description = template_file(choice), f"the chat template of {choice}"
    else:
        text, description = choice, "the chat template written in data.chat_template"
    if "strftime_now" in text and "date_string" not in data.chat_template_kwargs:
        description += " (it writes today's date; set date_string in data.chat_template_kwargs)"
    return text, description


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ModelError(
            where="tokenizer",
            found=first_line(error),
            expected="a default chat template",
            fix=OWN_TEMPLATE,
        ) from None


def is_file(choice: str) -> bool:
    """Return whether data.chat_template is a path: not auto, not none and without Jinja tags."""
    return choice not in ("auto", "none") and "{%" not in choice and "{{" not in choice


def template_file(choice: str) -> str:
    """Return the text of a template file. Raises RecipeError if it cannot be read."""
    try:
        return Path(choice).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(
            where="data.chat_template",
            found=f"{choice}: {error}",
            expected="auto, none, the path of a .jinja file, or the text of a template",
            fix=Overrides({"data.chat_template": "auto"}, ", or another path"),
        ) from None


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the tokenizer's eos token. Raises ModelError if there is no eos token."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            where="tokenizer",
            found="there is no eos_token, so no token ends a reply",
            expected="an eos_token, or a chat template that ends a reply with a special token",
            fix="set eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _end_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Return the special tokens, and all tokens that may end a reply (special tokens included)."""
    added = list(tokenizer.added_tokens_decoder.values())
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in added if token.special}
    texts = {token.content for token in added}
    markers = {text for text in texts if text.strip() and not text.strip().isalnum()}
    return sorted(special), sorted(special | markers)


def special_in(texts: Iterable[str], special: re.Pattern[str]) -> str:
    """Return the reason to leave out the pair if a text has a ``special`` token, else ""."""
    found = next(filter(None, map(special.search, texts)), None)
    return f"{SPECIAL}: {found.group()}" if found else ""


def pair_texts(pair: Pair, template: Template) -> PairTexts | str:
    """Render a pair, or return why the pair is left out. Raises ModelError and DataError."""
    if template.text is None:
        return _joined(pair, template.special)
    # A special token in a text would end the response too early or begin another turn.
    replies = (pair.chosen, pair.rejected)
    contents = (*replies, *(turn["content"] for turn in pair.messages))
    if reason := special_in(contents, template.special):
        return reason
    layout = _layout(pair, template)
    if layout is None:
        return TURN_LOST
    turns = _system_moved(pair.messages) if layout.moves_system else pair.messages
    asked = render(turns, template, pair.where, generation=True)
    answered = render([*turns, _reply(_MARK)], template, pair.where)
    before, mark, after = answered.rpartition(_MARK)
    if not mark:
        raise ModelError(
            where=pair.where,
            found="the chat template leaves out the reply",
            expected="a template that writes the reply",
            fix=f"{OWN_TEMPLATE} that writes the assistant's turns",
        )
    prompt, head = _prompt_and_head(asked, before, layout)
    if prompt is None:
        return NO_BOUNDARY
    if not _contains_turns(prompt, turns):
        return TURN_CHANGED
    end = template.end.search(after)
    if end and (reason := special_in(contents, re.compile(re.escape(end.group())))):
        return reason
    # The model does not have to learn the text after the end token.
    tail = after if template.keeps_tail else after[: end.end() if end else 0]
    rendered = []
    for reply in replies:
        text = render([*turns, _reply(reply)], template, pair.where)
        body = text[len(head) : len(text) - len(after)]
        # Stripping white space is allowed. Any other change gives a text that nobody judged.
        is_complete = text.startswith(head) and text.endswith(after)
        if not is_complete or not body.rstrip().endswith(reply.strip()):
            return REWRITTEN
        rendered.append(body + tail)
    remarks = []
    systems = [turn["content"] for turn in pair.messages if turn["role"] == "system"]
    if layout.moves_system and any(map(str.strip, systems)):
        remarks.append(MOVED_SYSTEM)
    if not all("<think>" in reply for reply in replies):
        remarks += _thought_remarks(asked[len(prompt) :], before[len(head) :])
    chosen, rejected = rendered
    return PairTexts(prompt, chosen, rejected, end.group() if end else "", tuple(remarks))


def _prompt_and_head(asked: str, before: str, layout: Layout) -> tuple[str, str] | tuple[None, str]:
    """Return the rendered turns for generation (None if unknown), and the same turns with a reply.

    ``asked``: the rendered turns with the generation prompt. ``before``: the rendered text up to a
    reply. If ``asked`` ends with a text that ``before`` lacks, such as an opened <think> block,
    that text is not part of the prompt.
    """
    if layout.tails is None:
        prompt = common_start(asked, before)
        return prompt, prompt
    if not (asked.endswith(layout.tails[0]) and before.endswith(layout.tails[1])):
        return None, ""
    shared = len(common_start(*layout.tails))
    beyond = [len(tail) - shared for tail in layout.tails]
    return asked[: len(asked) - beyond[0]], before[: len(before) - beyond[1]]


def _thought_remarks(opened: str, written: str) -> list[str]:
    """Return the remark on a pair whose replies have no <think> block; [] if there is none.

    ``opened``: the end of the generation prompt. ``written``: the text between prompt and reply.
    """
    if "</think>" in written:
        return [EMPTY_THOUGHT]
    is_open = "<think>" in opened and "</think>" not in opened
    return [NO_THOUGHT] if is_open else []


def _layout(pair: Pair, template: Template) -> Layout | None:
    """Return the layout of a pair's sequence of roles; None if the template leaves a turn out.

    Each layout is found once, with one word as the text of each turn. The real texts are not used,
    because a template may trim, escape or move them, or remove <think> blocks.
    """
    roles = tuple(turn["role"] for turn in pair.messages)
    if roles not in template.layouts:
        turns = [
            {"role": role, "content": f"turn{i}of{len(roles)}"} for i, role in enumerate(roles)
        ]
        template.layouts[roles] = _try_layout(turns, template, pair.where)
    return template.layouts[roles]


def _try_layout(turns: Sequence[Message], template: Template, where: str) -> Layout | None:
    """Return the layout of the turns. The system text is moved only if the template requires it."""
    found: Layout | None = Layout()  # if all attempts fail, rendering the pair shows the error
    for moves, tried in ((False, turns), (True, _system_moved(turns))):
        if moves and tried == turns:
            break
        try:
            asked = render(tried, template, where, generation=True)
            before = render([*tried, _reply(_MARK)], template, where).rpartition(_MARK)[0]
        except BeyondLimitsError:
            raise
        except ModelError:
            continue
        if not _contains_turns(asked.casefold(), tried):
            found = None
        elif _contains_turns(common_start(asked, before).casefold(), tried):
            return Layout(moves)
        else:
            last = tried[-1]["content"]
            return Layout(moves, (asked.rpartition(last)[2], before.rpartition(last)[2]))
    return found


def _system_moved(turns: Sequence[Message]) -> list[Message]:
    """Return the turns after moving each system text to the start of the next user turn."""
    kept: list[Message] = []
    held: list[str] = []
    for turn in turns:
        if turn["role"] == "system":
            held += filter(str.strip, [turn["content"]])
        elif turn["role"] == "user":
            kept.append({**turn, "content": "\n\n".join([*held, turn["content"]])})
            held = []
        else:
            kept.append(turn)
    return kept if not held else [*turns]


def _contains_turns(text: str, turns: Iterable[Message]) -> bool:
    """Return whether a text contains all turns in order.

    A system text may be at another position, and earlier replies may lack their <think> blocks.
    """
    at = 0
    for turn in turns:
        content = turn["content"].strip()
        if turn["role"] == "assistant":
            content = content.rpartition("</think>")[2].strip()
        found = text.find(content, 0 if turn["role"] == "system" else at)
        if found < 0:
            return False
        at = at if turn["role"] == "system" else found + len(content)
    return True


def _plain_conversation(template: Template) -> str | None:
    """Return the rendered text of messages without special tokens; None if the template fails."""
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    for tried in (turns, turns[1:], turns[1:3]):
        try:
            return render(tried, template, "a plain conversation")
        except BeyondLimitsError:
            raise
        except ModelError:
            continue
    return None


_MARK = "\ue0fe"  # a private-use character in the place of the reply


def _reply(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _joined(pair: Pair, special: re.Pattern[str]) -> PairTexts | str:
    """Return prompt and replies unchanged, for data.chat_template: none.

    The prompt may contain special tokens. A reply may only end with one.
    """
    if pair.prompt_text is None:
        raise DataError(
            where=pair.where,
            found="the row holds a conversation, but data.chat_template=none needs plain texts",
            expected="a prompt that is one text",
            fix=Overrides({"data.chat_template": "auto"}),
        )
    replies = []
    for reply in (pair.chosen, pair.rejected):
        end = special.search(reply)
        if end and (reply[end.end() :].strip() or not reply[: end.start()].strip()):
            return special_in([reply], special)
        replies.append(reply[: end.end()] if end else reply)
    chosen, rejected = replies
    return PairTexts(pair.prompt_text, chosen, rejected, "")


def render(
    messages: Iterable[Message], template: Template, where: str, generation: bool = False
) -> str:
    """Render messages. ``generation``: add the generation prompt. Raises ModelError."""
    # The tokenizer's apply_chat_template uses the same function.
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = list(messages)
    try:
        texts, _ = render_jinja_template(
            conversations=[turns],
            chat_template=template.text,
            add_generation_prompt=generation,
            **template.variables,
        )
    except TimeoutError:
        raise too_long(where) from None
    except MemoryError:
        raise BeyondLimitsError(
            where, f"the chat template takes more than {MEMORY >> 30} GiB of memory"
        ) from None
    except Exception as error:  # a template can raise anything
        raise ModelError(
            where=where,
            found=f"the chat template raises {type(error).__name__}: {error}",
            expected="a template that renders these turns",
            fix=f"{OWN_TEMPLATE} that accepts such turns, or correct the row",
        ) from None
    if len(texts[0]) > SLACK + GROWTH * sum(len(turn["content"]) for turn in turns):
        raise BeyondLimitsError(where, f"the chat template writes {len(texts[0]):,} characters")
    return str(texts[0])


def too_long(where: str) -> BeyondLimitsError:
    return BeyondLimitsError(
        where, f"the chat template takes more than {SECONDS} seconds of processor time"
    )


class BeyondLimitsError(ModelError):
    """A template takes too much time or memory, or writes too much text. Rendering stops."""

    def __init__(self, where: str, found: str) -> None:
        super().__init__(
            where=where,
            found=found,
            expected="a template that stays within the limits",
            fix=OWN_TEMPLATE,
        )
