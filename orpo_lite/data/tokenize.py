"""Tokenize pairs, find the response among the tokens, and cut sequences that are too long."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from orpo_lite.data.chat_template import SPECIAL, BeyondLimitsError, PairTexts, Rendered, eos_id
from orpo_lite.data.formats.text import common_start
from orpo_lite.data.pair import Pair, TokenizedPair
from orpo_lite.data.render_process import Renderer
from orpo_lite.data.split import prompt_key
from orpo_lite.errors import ModelError, OrpoLiteError, raise_all
from orpo_lite.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


# Reasons to leave a pair out, found when it is tokenized.
LONG_PROMPT = "prompt longer than data.max_prompt_length"
NO_ROOM = "no room for a response in data.max_length"
EQUAL_CUT = "chosen and rejected are equal after the cut at data.max_length"
EQUAL_TOKENS = "chosen and rejected are equal as tokens"

MAX_REASON = 120  # characters of the message of an error that a template raises

BATCH = 128  # pairs rendered and tokenized in one call

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the text that the model sees, or that is cut."""

    kind: str
    """prompt, response, end or cut."""
    text: str


def end_token_id(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a reply.

    It is the special token that the template writes after a reply, else the tokenizer's eos. The
    template is tried on a question. Raises ModelError if it fails, or if nothing ends a reply.
    """
    question = Pair(
        ({"role": "user", "content": "?"},),
        "Yes.",
        "No.",
        "a question and its answer",
        prompt_text="?",
    )
    renderer.send([question])
    (texts,) = renderer.receive()
    if isinstance(texts, OrpoLiteError):
        raise texts
    if isinstance(texts, PairTexts) and texts.end:
        return int(tokenizer.convert_tokens_to_ids(texts.end))
    return eos_id(tokenizer)


def tokenize_pairs(
    pairs: Iterable[Pair], renderer: Renderer, tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> Iterator[tuple[Pair, TokenizedPair | str]]:
    """Yield each pair in order, with its tokens or with the reason to leave it out.

    A text is tokenized once and as a whole, as in generation. A token across the boundary belongs
    to the response, unless it is a token of the prompt that includes the spaces after it
    (``rstrip``). While this function assembles one batch, the next is tokenized (on all cores) and
    the one after that is rendered.

    If a template raises an error on a pair, that is the reason to leave it out. Raises ModelError
    for a tokenizer without offsets, and for a template that fails on a plain question or exceeds
    its limits. At the end raises DataError that lists all conversations without a template.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            where="tokenizer",
            found=f"{type(tokenizer).__name__} is a slow tokenizer",
            expected="a fast tokenizer, which reports the position of each token in the text",
            fix="add a tokenizer.json",
        )
    end = end_token_id(renderer, tokenizer)
    ends = _sequence_ends(tokenizer, end)
    faults: list[OrpoLiteError] = []
    for batch, rendered, encoded in _encoded(
        _rendered(_batches(pairs, BATCH), renderer), tokenizer
    ):
        row = 0
        for pair, texts in zip(batch, rendered, strict=True):
            if isinstance(texts, ModelError) and not isinstance(texts, BeyondLimitsError):
                yield pair, _without_content(texts.found, pair)
            elif isinstance(texts, OrpoLiteError):
                faults.append(texts)
            elif isinstance(texts, str):
                yield pair, texts
            else:
                chosen = _whole_sequence(encoded, row, texts.prompt, texts.chosen, ends)
                rejected = _whole_sequence(encoded, row + 1, texts.prompt, texts.rejected, ends)
                row += 2
                yield pair, _cut_pair(pair, chosen, rejected, ends, data, texts.remarks)
    raise_all(faults)


def _without_content(message: str, pair: Pair) -> str:
    """Return the message of an error of a template; only its start if it quotes the pair."""
    contents = (pair.chosen, pair.rejected, *(turn["content"] for turn in pair.messages))
    is_quoted = any(len(text) > 8 and text.strip()[:MAX_REASON] in message for text in contents)
    return message.partition(": ")[0] if is_quoted else message[:MAX_REASON]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _rendered(
    batches: Iterator[list[Pair]], renderer: Renderer
) -> Iterator[tuple[list[Pair], list[Rendered]]]:
    """Yield each batch with its texts. Rows are read while the batch before them is rendered."""
    batch = next(batches, None)
    if batch:
        renderer.send(batch)
    while batch:
        following = next(batches, None)
        results = renderer.receive()
        if following:
            renderer.send(following)
        yield batch, results
        batch = following


def _encoded(
    rendered: Iterator[tuple[list[Pair], list[Rendered]]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[Pair], list[Rendered], BatchEncoding]]:
    """Yield each batch with its tokens: two sequences for each pair that has texts.

    One batch is tokenized ahead.
    """
    with ThreadPoolExecutor(1) as thread:
        ahead: tuple[list[Pair], list[Rendered], Future[BatchEncoding]] | None = None
        for batch, results in rendered:
            texts: list[str] = []
            for item in results:
                if isinstance(item, PairTexts):
                    texts += [item.prompt + item.chosen, item.prompt + item.rejected]
            future = thread.submit(_encode, texts, tokenizer)
            if ahead:
                yield ahead[0], ahead[1], ahead[2].result()
            ahead = (batch, results, future)
        if ahead:
            yield ahead[0], ahead[1], ahead[2].result()


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Any:
    if not texts:
        return None
    flags = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **flags)


class _SequenceEnds(NamedTuple):
    """The tokens at the ends of a sequence, and those that include the white space after them."""

    lead: list[int]
    """What the tokenizer adds before a text: [bos] for many, [] for some."""
    end: int
    stripping: frozenset[int]
    end_text: str


def _sequence_ends(tokenizer: PreTrainedTokenizerBase, end: int) -> _SequenceEnds:
    bare, whole = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    lead: list[int] = whole[: starts[0]] if starts else []
    stripping = frozenset(
        index for index, token in tokenizer.added_tokens_decoder.items() if token.rstrip
    )
    return _SequenceEnds(lead, end, stripping, str(tokenizer.convert_ids_to_tokens(end)))


def _whole_sequence(
    encoded: BatchEncoding, row: int, prompt: str, reply: str, ends: _SequenceEnds
) -> tuple[array[int], int]:
    """Return a sequence with its first and last token once, and the start of the response in it.

    ``row``: the index of the text in the batch.
    """
    ids, lead, boundary = encoded.input_ids[row], ends.lead, len(prompt)
    start = _response_start(encoded, row, boundary)
    if start < len(ids) and ids[start] in ends.stripping:
        # Only the white space of a prompt's token can be after the boundary.
        _, stop = encoded.encodings[row].offsets[start]
        if reply[: stop - boundary].isspace():
            start += 1
    if ids[: len(lead)] != lead:  # the template may have written it
        ids, start = lead + ids, start + len(lead)
    if ids[-1:] != [ends.end]:
        ids = [*ids, ends.end]
    return array("i", ids), start


def _response_start(encoded: BatchEncoding, row: int, boundary: int) -> int:
    """Return the index of the first token that ends after the boundary.

    One character may be several tokens (bytes, a sentencepiece's added space), and a trimmed space
    is none. The token of the character at the boundary is found directly. If that character has no
    token, all offsets are searched.
    """
    start = encoded.char_to_token(row, boundary)
    if start is None:
        return bisect_right(encoded.encodings[row].offsets, boundary, key=lambda offset: offset[1])
    return int(start)


def _cut_pair(
    pair: Pair,
    chosen: tuple[array[int], int],
    rejected: tuple[array[int], int],
    ends: _SequenceEnds,
    data: DataSection,
    remarks: tuple[str, ...],
) -> TokenizedPair | str:
    """Return the pair cut at data.max_length, or the reason to leave it out."""
    if max(chosen[1], rejected[1]) > data.prompt_limit:
        return LONG_PROMPT
    if any(ends.end in ids[start:-1] for ids, start in (chosen, rejected)):
        return f"{SPECIAL}: {ends.end_text}"
    chosen_ids, rejected_ids = chosen[0][: data.max_length], rejected[0][: data.max_length]
    # Nothing predicts a sequence's first token, so a response of only that token has no score.
    if len(chosen_ids) <= max(chosen[1], 1) or len(rejected_ids) <= max(rejected[1], 1):
        return NO_ROOM
    if chosen_ids == rejected_ids:
        return EQUAL_TOKENS if chosen[0] == rejected[0] else EQUAL_CUT
    cut = (len(chosen[0]) - len(chosen_ids), len(rejected[0]) - len(rejected_ids))
    starts = (chosen[1], rejected[1])
    return TokenizedPair(
        chosen_ids, rejected_ids, *starts, pair.where, prompt_key(pair), *cut, remarks
    )


def show_texts(
    texts: PairTexts, tokenizer: PreTrainedTokenizerBase, data: DataSection, end: int
) -> dict[str, list[Segment]]:
    """Return chosen and rejected as the text that their tokens decode to.

    The text is decoded from tokens. If a tokenizer loses something, such as case or unknown
    characters, it is missing here too. ``end`` is :func:`end_token_id`.
    """
    encoded = _encode([texts.prompt + texts.chosen, texts.prompt + texts.rejected], tokenizer)
    ends = _sequence_ends(tokenizer, end)
    shown = {}
    for row, (name, reply) in enumerate((("chosen", texts.chosen), ("rejected", texts.rejected))):
        ids, start = _whole_sequence(encoded, row, texts.prompt, reply, ends)
        limit = data.max_length
        last = max(start, min(len(ids) - 1, limit))  # a prompt beyond the limit is shown whole
        rest = "end" if len(ids) <= limit else "cut"
        segments, done = [], ""
        for kind, stop in (("prompt", start), ("response", last), (rest, None)):
            text = str(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
            # A character may consist of tokens on both sides of the boundary.
            done = common_start(done, text)
            segments.append(Segment(kind, text[len(done) :]))
            done = text
        shown[name] = [segment for segment in segments if segment.text]
    return shown
