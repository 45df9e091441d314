"""Chat templates: which one, and the texts of a pair rendered with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orpo_lite.data.formats.text import shared_start
from orpo_lite.data.pair import Message, Pair
from orpo_lite.errors import DataError, ModelError, OrpoLiteError, Overrides, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.recipe.schema import DataSection


# Reasons to leave a pair out, seen when it is rendered.
SPECIAL = "special token inside the text"
REWRITTEN = "reply changed by the chat template"
TURN_LOST = "a turn before the reply is left out by the chat template"

PAPER_CHAT_TEMPLATE = (  # "<|user|>\n{}</s>\n<|assistant|>\n{}</s>"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# What a template is rendered with by us; data.chat_template_kwargs cannot set these.
RESERVED = {"add_generation_prompt", "chat_template", "continue_final_message", "conversations", "messages",
            "return_assistant_tokens_mask"}  # fmt: skip

# What a template may take and write.
SECONDS = 10  # of processor time for the four texts of one pair; a template takes less than a thousandth of a second
MEMORY = 4 << 30  # bytes of address space
GROWTH = 16  # times its content that a text may grow to; the slack is for long system prompts
SLACK = 1 << 20


@dataclass(frozen=True)
class Template:
    """A template and all that it is rendered with; plain values, so that JSON can carry them to another process."""

    text: str | None
    """Jinja; None joins prompt and reply as plain text (``data.chat_template: none``)."""
    variables: dict[str, Any]
    """The tokenizer's special tokens by name, and data.chat_template_kwargs."""
    special_tokens: list[str]
    """Texts that the tokenizer would take for special tokens, which no message may hold."""
    end_tokens: list[str]
    """Those, and added tokens that are not special: a template may end a reply with one (ChatML's <|im_end|>)."""
    said: str
    """The sentence that says which template it is."""

    @cached_property
    def lost(self) -> dict[tuple[str, ...], list[int]]:
        """The turns that the template leaves out of a conversation of such roles, for those that were tried."""
        return {}

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Finds a special token."""
        return _any_of(self.special_tokens)

    @cached_property
    def end(self) -> re.Pattern[str]:
        """Finds a token that can end a reply."""
        return _any_of(self.end_tokens)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(texts) - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class PairTexts(NamedTuple):
    """A pair as the model will see it: prompt + chosen, prompt + rejected."""

    prompt: str
    chosen: str
    rejected: str
    end: str
    """The special token that the template ends a reply with; empty when it writes none."""
    without_system: bool = False
    """The template leaves the system text out."""


Rendered = PairTexts | str | OrpoLiteError  # or the reason to leave the pair out, or what is wrong with it


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> Template:
    """Choose the template that data.chat_template asks for and install it in the tokenizer, which saves it.

    Raises RecipeError for a template file that cannot be read, ModelError when nothing ends a reply.
    """
    choice, text = data.chat_template, None
    if choice == "none":
        said = "no chat template: prompt and response are joined as plain text"
        eos_id(tokenizer)
    elif choice == "auto" and tokenizer.chat_template not in (None, "", PAPER_CHAT_TEMPLATE):
        try:
            text = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                where="tokenizer",
                found=str(error).splitlines()[0],
                expected="a default chat template",
                fix="data.chat_template=FILE.jinja",
            ) from None
        said = "the tokenizer's own chat template"
    elif choice == "auto":
        eos_id(tokenizer)  # the template writes it
        text, said = (
            PAPER_CHAT_TEMPLATE,
            "the paper's chat template, <|user|> and <|assistant|>: the tokenizer has none",
        )
    elif not is_file(choice):
        text, said = choice, "the chat template written in data.chat_template"
    else:
        text, said = template_file(choice), f"the chat template of {choice}"
    if text is not None:
        tokenizer.chat_template = text
        if "strftime_now" in text and "date_string" not in data.chat_template_kwargs:
            said += " (it writes today's date; data.chat_template_kwargs can fix one)"
    if taken := RESERVED & data.chat_template_kwargs.keys():
        raise RecipeError(
            where="data.chat_template_kwargs",
            found=f"sets {', '.join(sorted(taken))}",
            expected=f"other names than {', '.join(sorted(RESERVED))}",
            fix="leave it out",
        )
    variables = {**tokenizer.special_tokens_map, **data.chat_template_kwargs}
    return Template(text, variables, *_end_texts(tokenizer), said)


def is_file(choice: str) -> bool:
    """Whether data.chat_template names a file."""
    return choice not in ("auto", "none") and "{%" not in choice and "{{" not in choice


def template_file(choice: str) -> str:
    """The text of the template file that data.chat_template names. Raises RecipeError when it cannot be read."""
    try:
        return Path(choice).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(
            where="data.chat_template",
            found=f"{choice}: {error}",
            expected="auto, none, a .jinja file, or a template",
            fix="check the path",
        ) from None


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's eos. Raises ModelError when it has none."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            where="tokenizer",
            found="nothing ends a reply",
            expected="an eos_token, or a chat template that ends a reply with a special token",
            fix="set eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _end_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens, and with them the added ones that look like marks: not words, not runs of spaces."""
    added = list(tokenizer.added_tokens_decoder.values())
    special = {str(token) for token in tokenizer.all_special_tokens} | {t.content for t in added if t.special}
    marks = {t.content for t in added if t.content.strip() and not t.content.strip().isalnum()}
    return sorted(special), sorted(special | marks)


def pair_texts(pair: Pair, template: Template) -> PairTexts | str:
    """The texts of a pair, or why it is left out. Raises ModelError and DataError, placed at the pair."""
    if template.text is None:
        return _joined(pair, template.special)
    # It would be tokenised as the token: an end in mid-response, or a turn that nobody took.
    contents = (pair.chosen, pair.rejected, *(turn["content"] for turn in pair.messages))
    if any(template.special.search(text) for text in contents):
        return SPECIAL
    asked = render(pair.messages, template, pair.where, generation=True)
    answered = render([*pair.messages, _reply(_MARK)], template, pair.where)
    before, mark, after = answered.rpartition(_MARK)
    if not mark:
        raise ModelError(
            where=pair.where,
            found="the chat template leaves out the reply",
            expected="the reply in the text",
            fix="data.chat_template=FILE.jinja with a template that shows the assistant's turns",
        )
    lost = [turn["role"] for turn in _lost_turns(pair, template) if turn["content"].strip()]
    if any(role != "system" for role in lost):
        return TURN_LOST
    # Not the generation prompt itself: some templates open a <think> there that the reply does not have.
    prompt, end = shared_start(asked, before), template.end.search(after)
    if end and any(end.group() in text for text in contents):
        return SPECIAL
    # What the template writes after the end token is not the model's to say.
    kept = after[: end.end()] if end else ""
    whole = []
    for reply in (pair.chosen, pair.rejected):
        text = render([*pair.messages, _reply(reply)], template, pair.where)
        body = text[len(prompt) : len(text) - len(after)]
        # Some templates strip the reply; one that rewrites it would teach what nobody chose.
        if not (text.startswith(prompt) and text.endswith(after) and body.rstrip().endswith(reply.strip())):
            return REWRITTEN
        whole.append(body + kept)
    chosen, rejected = whole
    return PairTexts(prompt, chosen, rejected, end.group() if end else "", bool(lost))


def _lost_turns(pair: Pair, template: Template) -> list[Message]:
    """The turns of which a template writes nothing.

    Tried with a word in the place of each text, once for each sequence of roles: templates may trim a text, escape it,
    move it, or take the thoughts out of it.
    """
    roles = tuple(turn["role"] for turn in pair.messages)
    if roles not in template.lost:
        words = [f"turn{i}of{len(roles)}" for i in range(len(roles))]
        turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        text = render(turns, template, pair.where, generation=True).casefold()
        template.lost[roles] = [i for i, word in enumerate(words) if word not in text]
    return [pair.messages[i] for i in template.lost[roles]]


_MARK = "\ue0fe"  # private use: stands where the reply will stand


def _reply(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _joined(pair: Pair, special: re.Pattern[str]) -> PairTexts | str:
    """Prompt and reply as they stand. The person may have written a template's tokens into the prompt; a reply may
    end with a token, but not hold one."""
    if pair.prompt_text is None:
        raise DataError(
            where=pair.where,
            found="a conversation, and data.chat_template: none joins plain texts",
            expected="a prompt that is one text",
            fix=Overrides({"data.chat_template": "auto"}),
        )
    replies = []
    for reply in (pair.chosen, pair.rejected):
        end = special.search(reply)
        if end and (reply[end.end() :].strip() or not reply[: end.start()].strip()):
            return SPECIAL
        replies.append(reply[: end.end()] if end else reply)
    chosen, rejected = replies
    return PairTexts(pair.prompt_text, chosen, rejected, "")


def render(messages: Iterable[Message], template: Template, where: str, generation: bool = False) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template  # what apply_chat_template calls

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
        raise BeyondLimitsError(where, f"the chat template takes more than {MEMORY >> 30} GiB of memory") from None
    except Exception as error:  # a template can raise anything
        raise ModelError(
            where=where,
            found=f"the chat template raises {type(error).__name__}: {error}",
            expected="a template that renders these turns",
            fix="data.chat_template=FILE.jinja with a template that takes such turns, or mend the row",
        ) from None
    if len(texts[0]) > SLACK + GROWTH * sum(len(turn["content"]) for turn in turns):
        raise BeyondLimitsError(where, f"the chat template writes {len(texts[0]):,} characters")
    return str(texts[0])


def too_long(where: str) -> BeyondLimitsError:
    return BeyondLimitsError(where, f"the chat template takes more than {SECONDS} seconds of processor time")


class BeyondLimitsError(ModelError):
    """A template that takes too long or writes too much: the first pair that shows it is the last one rendered."""

    def __init__(self, where: str, found: str) -> None:
        fix = "data.chat_template=FILE.jinja"
        super().__init__(where=where, found=found, expected="a template that renders these turns", fix=fix)
