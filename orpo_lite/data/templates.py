"""Chat templates: which one, and pairs rendered with it. A template is somebody's program, so it runs under limits.

``LimitedRenderer`` renders in a process of its own and beside the other work; ``Renderer`` renders right here, the
plain way that the other is compared with. Only JSON passes between the two processes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self, cast

from orpo_lite.data.formats import Message, Pair, shared_start
from orpo_lite.errors import DataError, ModelError, OrpoLiteError, Overrides, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.recipe import DataSection

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
SECONDS = 10  # of processor time for the four texts of one pair; a template takes less than a thousandth of a second
STUCK = 120.0  # seconds without an answer, after which the process is killed: a single operation cannot be interrupted
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


Limit = Callable[[], AbstractContextManager[None]]
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
            found = str(error).splitlines()[0]
            raise ModelError(
                where="tokenizer", found=found, expected="a default chat template", fix="data.chat_template=FILE.jinja"
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
        expected = f"other names than {', '.join(sorted(RESERVED))}"
        raise RecipeError(
            where="data.chat_template_kwargs",
            found=f"sets {', '.join(sorted(taken))}",
            expected=expected,
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
        expected = "auto, none, a .jinja file, or a template"
        raise RecipeError(
            where="data.chat_template", found=f"{choice}: {error}", expected=expected, fix="check the path"
        ) from None


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's eos. Raises ModelError when it has none."""
    if tokenizer.eos_token_id is None:
        expected = "an eos_token, or a chat template that ends a reply with a special token"
        raise ModelError(
            where="tokenizer",
            found="nothing ends a reply",
            expected=expected,
            fix="set eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _end_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens, and with them the added ones that look like marks: not words, not runs of spaces."""
    added = list(tokenizer.added_tokens_decoder.values())
    special = {str(token) for token in tokenizer.all_special_tokens} | {t.content for t in added if t.special}
    marks = {t.content for t in added if t.content.strip() and not t.content.strip().isalnum()}
    return sorted(special), sorted(special | marks)


# --- one pair


def pair_texts(pair: Pair, template: Template) -> PairTexts | str:
    """The texts of a pair, or why it is left out. Raises ModelError and DataError, placed at the pair."""
    if template.text is None:
        return _joined(pair, template.special)
    # It would be tokenised as the token: an end in mid-response, or a turn that nobody took.
    contents = (pair.chosen, pair.rejected, *(turn["content"] for turn in pair.messages))
    if any(template.special.search(text) for text in contents):
        return SPECIAL
    asked = _render(pair.messages, template, pair.where, generation=True)
    answered = _render([*pair.messages, _reply(_MARK)], template, pair.where)
    before, mark, after = answered.rpartition(_MARK)
    if not mark:
        fix = "data.chat_template=FILE.jinja with a template that shows the assistant's turns"
        raise ModelError(
            where=pair.where, found="the chat template leaves out the reply", expected="the reply in the text", fix=fix
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
        text = _render([*pair.messages, _reply(reply)], template, pair.where)
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
        text = _render(turns, template, pair.where, generation=True).casefold()
        template.lost[roles] = [i for i, word in enumerate(words) if word not in text]
    return [pair.messages[i] for i in template.lost[roles]]


_MARK = "\ue0fe"  # private use: stands where the reply will stand


def _reply(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _joined(pair: Pair, special: re.Pattern[str]) -> PairTexts | str:
    """Prompt and reply as they stand. The person may have written a template's tokens into the prompt; a reply may
    end with a token, but not hold one."""
    if pair.prompt_text is None:
        found = "a conversation, and data.chat_template: none joins plain texts"
        raise DataError(
            where=pair.where,
            found=found,
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


def _render(messages: Iterable[Message], template: Template, where: str, generation: bool = False) -> str:
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
        raise _too_long(where) from None
    except MemoryError:
        raise BeyondLimitsError(where, f"the chat template takes more than {MEMORY >> 30} GiB of memory") from None
    except Exception as error:  # a template can raise anything
        found = f"the chat template raises {type(error).__name__}: {error}"
        fix = "data.chat_template=FILE.jinja with a template that takes such turns, or mend the row"
        raise ModelError(where=where, found=found, expected="a template that renders these turns", fix=fix) from None
    if len(texts[0]) > SLACK + GROWTH * sum(len(turn["content"]) for turn in turns):
        raise BeyondLimitsError(where, f"the chat template writes {len(texts[0]):,} characters")
    return str(texts[0])


def _too_long(where: str) -> BeyondLimitsError:
    return BeyondLimitsError(where, f"the chat template takes more than {SECONDS} seconds of processor time")


class BeyondLimitsError(ModelError):
    """A template that takes too long or writes too much: the first pair that shows it is the last one rendered."""

    def __init__(self, where: str, found: str) -> None:
        fix = "data.chat_template=FILE.jinja"
        super().__init__(where=where, found=found, expected="a template that renders these turns", fix=fix)


# --- many pairs


class Renderer:
    """Renders batch after batch: ``send`` one, do something else, ``receive`` its texts. Use as a context manager."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.sent: Sequence[Pair] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing to end."""

    def send(self, pairs: Sequence[Pair]) -> None:
        """Hand over a batch; the one before must have been received."""
        self.sent = pairs

    def receive(self) -> list[Rendered]:
        """The texts of the batch that was sent, in its order. Raises BeyondLimitsError."""
        return _raise_limit(_attempt(self.sent, self.template))


class LimitedRenderer(Renderer):
    """The same in a process of its own, which a template can neither hold up nor fill with memory."""

    def __init__(self, template: Template) -> None:
        super().__init__(template)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        # -P: no file of the current folder is taken for a module; this package is, wherever it stands.
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(  # noqa: S603 - this module
            [sys.executable, "-P", "-m", __name__],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._late = False
        self._write(asdict(template))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def send(self, pairs: Sequence[Pair]) -> None:
        super().send(pairs)
        self._write([[pair.messages, pair.chosen, pair.rejected, pair.where, pair.prompt_text] for pair in pairs])

    def receive(self) -> list[Rendered]:
        watch = threading.Timer(STUCK, self._stop)
        watch.start()
        try:
            line = cast(IO[bytes], self._process.stdout).readline()
        finally:
            watch.cancel()
        if not line.endswith(b"\n"):
            raise self._died()
        return _raise_limit([_unpack(item) for item in json.loads(line)])

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def _write(self, value: Any) -> None:
        stream = cast(IO[bytes], self._process.stdin)
        try:
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> Exception:
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        if code >= 0:  # not killed, neither by the watch nor for its memory: a fault of ours
            return RuntimeError(f"the process that renders chat templates ended with {code}: {last}")
        first = self.sent[0].where if self.sent else "data"
        places = f"one of the {len(self.sent)} pairs from {first}" if len(self.sent) > 1 else first
        if self._late:
            return BeyondLimitsError(places, f"the chat template did not end within {STUCK:.0f} seconds")
        found = f"the process that renders the chat template was killed (signal {-code}), perhaps for its memory"
        return BeyondLimitsError(places, found)


def _raise_limit(results: list[Rendered]) -> list[Rendered]:
    if results and isinstance(results[-1], BeyondLimitsError):
        raise results[-1]
    return results


def _attempt(pairs: Iterable[Pair], template: Template, limited: Limit = nullcontext) -> list[Rendered]:
    """The texts of each pair; the last one is what went beyond the limits, if one did."""
    results: list[Rendered] = []
    for pair in pairs:
        try:
            with limited():
                results.append(pair_texts(pair, template))
        except BeyondLimitsError as fault:
            return [*results, fault]
        except TimeoutError:  # between two of the pair's texts
            return [*results, _too_long(pair.where)]
        except (DataError, ModelError) as fault:
            results.append(fault)
    return results


def _pack(item: Rendered) -> list[str | bool]:
    if isinstance(item, BeyondLimitsError):
        return [type(item).__name__, item.where, item.found]
    if isinstance(item, OrpoLiteError):
        return [type(item).__name__, item.where, item.found, item.expected, item.fix]
    return [item] if isinstance(item, str) else list(item)


def _unpack(parts: list[Any]) -> Rendered:
    match parts:
        case [reason]:
            return str(reason)
        case [prompt, chosen, rejected, end, bool(without_system)]:
            return PairTexts(prompt, chosen, rejected, end, without_system)
        case [name, *fields]:
            kinds: dict[str, Callable[..., OrpoLiteError]]
            kinds = {"DataError": DataError, "ModelError": ModelError, "BeyondLimitsError": BeyondLimitsError}
            return kinds[name](**dict(zip(("where", "found", "expected", "fix"), fields, strict=False)))
    raise ValueError(f"{len(parts)} parts")


def _serve() -> None:
    """The process apart: a template, then batches, a line each, in and out."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    values: Mapping[str, Any] = json.loads(sys.stdin.buffer.readline() or b"{}")
    template = Template(**values)
    _render(({"role": "user", "content": ""},), Template("", {}, [], [], ""), "")  # imports, before the limits
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _out_of_time)
    for line in sys.stdin.buffer:
        sent = (Pair(tuple(turns), *texts) for turns, *texts in json.loads(line))
        results = [_pack(item) for item in _attempt(sent, template, _alarm)]
        answers.write(json.dumps(results).encode() + b"\n")
        answers.flush()


@contextmanager
def _alarm() -> Iterator[None]:
    """TimeoutError after SECONDS of this process's own time; waiting for a busy machine does not count."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _out_of_time(_number: int, _frame: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    _serve()
