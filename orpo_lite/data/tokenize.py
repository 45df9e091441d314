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

MAX_REASON = 120  # characters that are kept of a template's error message

BATCH = 128  # pairs rendered and tokenized in one call

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the text of a sequence, for display."""

    kind: str
    """prompt, response, end (the end token) or cut (removed because of data.max_length)."""
    text: str


def end_token_id(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a reply.

    It is the special token that the template writes after a reply, or the tokenizer's eos token if
    the template writes none. To find it, a sample question is rendered. Raises ModelError if the
    rendering fails, or if there is no such token.
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
    """Yield each pair in order, with its tokens or with the reason to leave the pair out.

    Prompt and response are tokenized together as one text, as in generation. A token with
    characters of both prompt and response belongs to the response, with one exception. A token
    with ``rstrip`` absorbs the white space that follows it. If the prompt ends with such a token,
    and the token absorbs white space of the response, the token belongs to the prompt.

    Three batches are processed at the same time: this function assembles one batch, the next batch
    is tokenized (on all cores), and the batch after that is rendered.

    If the template raises an error for a pair, the pair is left out.

    Raises:
        ModelError: the tokenizer is slow (it reports no offsets), the template fails on a plain
            question, no token ends a reply, or the template exceeds its limits for a pair.
        DataError: rows have a conversation, but data.chat_template is none. The error is raised
            after the last pair. It shows the number of such rows, and the first twenty.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            where="tokenizer",
            found=f"{type(tokenizer).__name__} is a slow tokenizer",
            expected="a fast tokenizer, which reports the position of each token in the text",
            fix="add a tokenizer.json to the folder of the tokenizer",
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
    """Return a template's error message. If it quotes the pair, cut it off at the first colon."""
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
    """Yield each batch with its rendered texts. The next batch is read during the rendering."""
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

    A thread tokenizes the next batch while the caller uses this one.
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
    """The tokens at the start and the end of all sequences, and the tokens with ``rstrip``."""

    lead: list[int]
    """The tokens that the tokenizer adds before a text: often [bos], sometimes []."""
    end: int
    """The token that ends a reply."""
    stripping: frozenset[int]
    """The tokens with ``rstrip``: they absorb the white space that follows."""
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
    """Return a sequence with lead and end tokens, and the index of its first response token.

    A lead or end token is added only if the template did not write it. ``row``: the index of the
    text in the batch.
    """
    ids, lead, boundary = encoded.input_ids[row], ends.lead, len(prompt)
    start = _response_start(encoded, row, boundary)
    if start < len(ids) and ids[start] in ends.stripping:
        # A token that has only white space after the boundary belongs to the prompt.
        _, stop = encoded.encodings[row].offsets[start]
        if reply[: stop - boundary].isspace():
            start += 1
    if ids[: len(lead)] != lead:  # the template may have written it
        ids, start = lead + ids, start + len(lead)
    if ids[-1:] != [ends.end]:
        ids = [*ids, ends.end]
    return array("i", ids), start


def _response_start(encoded: BatchEncoding, row: int, boundary: int) -> int:
    """Return the index of the first token that ends after the end of the prompt.

    ``boundary``: the number of characters of the prompt. Usually, the result is the first token of
    the character after the prompt. A character may have several tokens (bytes, a space that
    sentencepiece adds) or none (a trimmed space). If the character after the prompt has no token,
    the offsets of all tokens are searched.
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
    # The first token of a sequence is not predicted, so a response of only that token has no score.
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
    """Return the text segments of chosen and rejected, for display.

    The text is decoded from the tokens. So a person can see what the tokenizer changes. For
    example, a tokenizer may change capital letters to small letters, or drop unknown characters.
    ``end`` is the id of the end token (:func:`end_token_id`).
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
