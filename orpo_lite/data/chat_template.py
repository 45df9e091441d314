"""Chat templates: which one, and the texts of a pair rendered with it."""

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


# Reasons to leave a pair out, seen when it is rendered. Behind SPECIAL stands which token.
SPECIAL = "special token inside the text"
REWRITTEN = "reply changed by the chat template"
TURN_LOST = "a turn before the reply is left out by the chat template"
TURN_CHANGED = "a turn before the reply is changed by the chat template"
NO_BOUNDARY = "the chat template does not show where the reply begins"
UNFAITHFUL = (REWRITTEN, TURN_LOST, TURN_CHANGED, NO_BOUNDARY)
OWN_TEMPLATE = "a template of your own, whose file data.chat_template names"

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
    """Texts that the tokenizer takes for special tokens."""
    end_tokens: list[str]
    """Those, and added tokens that are not special: a template may end a reply with one (ChatML's <|im_end|>)."""
    said: str
    """The sentence that says which template it is."""

    named_tokens: list[str] = field(default_factory=list)
    """Those with a purpose of their own: bos, eos, pad, unk."""

    @cached_property
    def layouts(self) -> dict[tuple[str, ...], Layout | None]:
        """How the template writes a conversation of such roles, for those that were tried."""
        return {}

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Finds a special token that no message may hold: a named one, one that the template writes, one that ends.

        Others, as <think> added for replies that hold it, are tokenised as what they are.
        """
        if self.text is None:
            return _any_of(self.special_tokens)
        plain = _plain_conversation(self)
        written = [
            token for token in self.special_tokens if plain is None or _ENDS.fullmatch(token)
        ]
        written += [
            token for token in self.end_tokens if plain is not None and token in plain
        ]  # special or not
        return _any_of([*self.named_tokens, *written])

    @cached_property
    def end(self) -> re.Pattern[str]:
        """Finds a token that can end a reply."""
        return _any_of(self.end_tokens)


# Ends of turns and of texts, of which a base may have more than its template and its names show.
_ENDS = re.compile(
    r"</s>|<[|｜]?(?:eo[a-z](?:_id)?|(?:im_)?end|end[_▁]?of[_▁]?(?:text|turn|sentence))[|｜]?>",
    re.IGNORECASE,
)


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
    remarks: tuple[str, ...] = ()
    """Of the names below, those that hold."""


# What a person should know of a pair that is kept: names of figures.
MOVED_SYSTEM = "moved_systems"  # the system text stands in front of the user's: the template takes no system turn
EMPTY_THOUGHT = "empty_thoughts"  # the template writes an empty <think> block before the reply: it is trained on
NO_THOUGHT = (
    "missing_thoughts"  # the generation prompt opens a <think> that the reply does not have
)


class Layout(NamedTuple):
    """How a template writes a conversation of certain roles."""

    moves_system: bool = False
    """The system text has to stand in front of the first user turn's."""
    tails: tuple[str, str] | None = None
    """What stands behind the last turn's text when a reply is asked for, and in front of the reply when it follows.
    None when everything up to there is the same with and without a reply."""


Rendered = (
    PairTexts | str | OrpoLiteError
)  # or the reason to leave the pair out, or what is wrong with it


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
                found=first_line(error),
                expected="a default chat template",
                fix=OWN_TEMPLATE,
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
            fix=Overrides(
                {
                    "data.chat_template_kwargs": {
                        k: v for k, v in data.chat_template_kwargs.items() if k not in taken
                    }
                }
            ),
        )
    variables = {**tokenizer.special_tokens_map, **data.chat_template_kwargs}
    special, ends = _end_texts(tokenizer)
    named = [str(token) for token in tokenizer.special_tokens_map.values()]
    if text is None and isinstance(
        tokenizer.chat_template, str
    ):  # it is not rendered, but says which tokens are marks
        special = [token for token in special if token in named or token in tokenizer.chat_template]
    return Template(text, variables, special, ends, said, named)


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
            fix=Overrides({"data.chat_template": "auto"}, ", or another path"),
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
    special = {str(token) for token in tokenizer.all_special_tokens} | {
        t.content for t in added if t.special
    }
    marks = {t.content for t in added if t.content.strip() and not t.content.strip().isalnum()}
    return sorted(special), sorted(special | marks)


def special_in(texts: Iterable[str], special: re.Pattern[str]) -> str:
    """The reason to leave such texts out, with the first special token that they hold; "" when they hold none."""
    found = next(filter(None, map(special.search, texts)), None)
    return f"{SPECIAL}: {found.group()}" if found else ""


def pair_texts(pair: Pair, template: Template) -> PairTexts | str:
    """The texts of a pair, or why it is left out. Raises ModelError and DataError, placed at the pair."""
    if template.text is None:
        return _joined(pair, template.special)
    # It would be tokenised as the token: an end in mid-response, or a turn that nobody took.
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
            expected="the reply in the text",
            fix=f"{OWN_TEMPLATE}, and which shows the assistant's turns",
        )
    prompt, head = _prompt_and_head(asked, before, layout)
    if prompt is None:
        return NO_BOUNDARY
    if not _holds(prompt, turns):
        return TURN_CHANGED
    end = template.end.search(after)
    if end and (reason := special_in(contents, re.compile(re.escape(end.group())))):
        return reason
    # What the template writes after the end token is not the model's to say.
    kept = after[: end.end()] if end else ""
    whole = []
    for reply in replies:
        text = render([*turns, _reply(reply)], template, pair.where)
        body = text[len(head) : len(text) - len(after)]
        # Some templates strip the reply; one that rewrites it would teach what nobody chose.
        if not (
            text.startswith(head) and text.endswith(after) and body.rstrip().endswith(reply.strip())
        ):
            return REWRITTEN
        whole.append(body + kept)
    chosen, rejected = whole
    remarks = []
    if layout.moves_system and any(
        turn["role"] == "system" and turn["content"].strip() for turn in pair.messages
    ):
        remarks.append(MOVED_SYSTEM)
    if not all("<think>" in reply for reply in replies):
        remarks += _thoughts(asked[len(prompt) :], before[len(head) :])
    return PairTexts(prompt, chosen, rejected, end.group() if end else "", tuple(remarks))


def _prompt_and_head(asked: str, before: str, layout: Layout) -> tuple[str, str] | tuple[None, str]:
    """The prompt as the model is asked with it, and the text of the same turns when a reply follows; None: unknown.

    Without the rest of the generation prompt: some templates open a <think> there that the reply does not have.
    """
    if layout.tails is None:
        prompt = common_start(asked, before)
        return prompt, prompt
    if not (asked.endswith(layout.tails[0]) and before.endswith(layout.tails[1])):
        return None, ""
    shared = len(common_start(*layout.tails))
    beyond = [len(tail) - shared for tail in layout.tails]
    return asked[: len(asked) - beyond[0]], before[: len(before) - beyond[1]]


def _thoughts(opened: str, written: str) -> list[str]:
    """The remark on a reply without thoughts, from what stands behind the prompt: when asked, and before a reply."""
    if "</think>" in written:
        return [EMPTY_THOUGHT]
    return [NO_THOUGHT] if "<think>" in opened and "</think>" not in opened else []


def _layout(pair: Pair, template: Template) -> Layout | None:
    """How the template writes turns of such roles; None when it leaves one out.

    Tried with a word in the place of each text, once for each sequence of roles: templates may trim a text, escape it,
    move it, or take the thoughts out of it.
    """
    roles = tuple(turn["role"] for turn in pair.messages)
    if roles not in template.layouts:
        turns = [
            {"role": role, "content": f"turn{i}of{len(roles)}"} for i, role in enumerate(roles)
        ]
        template.layouts[roles] = _try_layout(turns, template, pair.where)
    return template.layouts[roles]


def _try_layout(turns: Sequence[Message], template: Template, where: str) -> Layout | None:
    """The layout of the turns as they are, else with the system text moved: templates drop it, or raise an error."""
    found: Layout | None = Layout()  # where all fails, the pair itself is rendered, and says why
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
        if not _holds(asked.casefold(), tried):
            found = None
        elif _holds(common_start(asked, before).casefold(), tried):
            return Layout(moves)
        else:
            last = tried[-1]["content"]
            return Layout(moves, (asked.rpartition(last)[2], before.rpartition(last)[2]))
    return found


def _system_moved(turns: Sequence[Message]) -> list[Message]:
    """The turns without system turns: their texts stand in front of the text of the user turn that follows."""
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


def _holds(text: str, turns: Iterable[Message]) -> bool:
    """Whether each turn stands in the text, in order.

    Some templates write the system text further down, and leave out the thoughts of earlier replies.
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
    """A conversation without anything special in it, rendered; None where the template renders none."""
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    for tried in (turns, turns[1:], turns[1:3]):
        try:
            return render(tried, template, "a plain conversation")
        except BeyondLimitsError:
            raise
        except ModelError:
            continue
    return None


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
            return special_in([reply], special)
        replies.append(reply[: end.end()] if end else reply)
    chosen, rejected = replies
    return PairTexts(pair.prompt_text, chosen, rejected, "")


def render(
    messages: Iterable[Message], template: Template, where: str, generation: bool = False
) -> str:
    from transformers.utils.chat_template_utils import (
        render_jinja_template,
    )  # what apply_chat_template calls

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
            fix=f"{OWN_TEMPLATE}, and which takes such turns; or mend the row",
        ) from None
    if len(texts[0]) > SLACK + GROWTH * sum(len(turn["content"]) for turn in turns):
        raise BeyondLimitsError(where, f"the chat template writes {len(texts[0]):,} characters")
    return str(texts[0])


def too_long(where: str) -> BeyondLimitsError:
    return BeyondLimitsError(
        where, f"the chat template takes more than {SECONDS} seconds of processor time"
    )


class BeyondLimitsError(ModelError):
    """A template that takes too long or writes too much: the first pair that shows it is the last one rendered."""

    def __init__(self, where: str, found: str) -> None:
        super().__init__(
            where=where,
            found=found,
            expected="a template that renders these turns",
            fix=OWN_TEMPLATE,
        )
