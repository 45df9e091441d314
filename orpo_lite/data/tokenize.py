"""Pairs to tokens: each text tokenised once and whole, the response found in it, cut at data.max_length."""

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


# Reasons to leave a pair out, seen when it is tokenised.
LONG_PROMPT = "prompt longer than data.max_prompt_length"
NO_ROOM = "no room for a response in data.max_length"
EQUAL_CUT = "chosen and rejected are equal after the cut at data.max_length"
EQUAL_TOKENS = "chosen and rejected are equal as tokens"

LONGEST_REASON = 120  # characters; what a template says when it raises an error

BATCH = 128  # pairs rendered and tokenised in one call

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the text that the model sees, or is kept from seeing."""

    kind: str
    """prompt, response, end or cut."""
    text: str


def end_token_id(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a reply: the special token that the template writes after it, else the tokenizer's eos.

    Tries the template on a question; raises ModelError when it fails, and when nothing ends a reply.
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
    """Yield each pair with its tokens, or with the reason to leave it out; in order.

    A text is tokenised once and whole, as in generation; a token that straddles the boundary belongs to the response,
    but not one that is the prompt's and takes the spaces behind it along (``rstrip``).
    While one batch is put together here, the next is tokenised (all cores) and the one after that rendered.

    A template that raises an error on a pair gives the reason to leave it out. Raises ModelError for a tokenizer
    without offsets and a template that fails on a plain question or goes beyond its limits, DataError for conversations
    without a template, at the end, with all places.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            where="tokenizer",
            found=f"{type(tokenizer).__name__} is a slow one",
            expected="a fast tokenizer, which says where in the text each token stands",
            fix="add a tokenizer.json",
        )
    end = end_token_id(renderer, tokenizer)
    marks = _marks(tokenizer, end)
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
                chosen, rejected = (_place(encoded, row + i, texts, i, marks) for i in (0, 1))
                row += 2
                yield pair, _cut_pair(pair, chosen, rejected, marks, data, texts.remarks)
    raise_all(faults)


def _without_content(said: str, pair: Pair) -> str:
    """What a template says when it raises an error; without the message where it quotes the pair."""
    contents = (pair.chosen, pair.rejected, *(turn["content"] for turn in pair.messages))
    quotes = any(len(text) > 8 and text.strip()[:LONGEST_REASON] in said for text in contents)
    return said.partition(": ")[0] if quotes else said[:LONGEST_REASON]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _rendered(
    batches: Iterator[list[Pair]], renderer: Renderer
) -> Iterator[tuple[list[Pair], list[Rendered]]]:
    """Each batch with its texts. Rows are read while the batch before them is rendered."""
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
    """Each batch with its tokens, two texts for each pair that has texts, one batch ahead of who asks for them."""
    with ThreadPoolExecutor(1) as thread:
        ahead: tuple[list[Pair], list[Rendered], Future[BatchEncoding]] | None = None
        for batch, results in rendered:
            texts = [
                item.prompt + reply
                for item in results
                if isinstance(item, PairTexts)
                for reply in item[1:3]
            ]
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


class _Marks(NamedTuple):
    """The tokens that a sequence has at its ends, and those that take the white space behind them along."""

    lead: list[int]
    end: int
    stripping: frozenset[int]
    end_text: str


def _marks(tokenizer: PreTrainedTokenizerBase, end: int) -> _Marks:
    """What the tokenizer puts before a text by itself ([bos] for many, [] for some), and the rest of the marks."""
    bare, whole = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
    lead: list[int] = next(
        (whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), []
    )
    stripping = frozenset(
        index for index, token in tokenizer.added_tokens_decoder.items() if token.rstrip
    )
    return _Marks(lead, end, stripping, str(tokenizer.convert_ids_to_tokens(end)))


def _place(
    encoded: BatchEncoding, row: int, texts: PairTexts, side: int, marks: _Marks
) -> tuple[array[int], int]:
    """A whole sequence with its first and last token, each exactly once, and where the response starts in it.

    ``row`` is that of the text in the batch, ``side`` 0 for chosen and 1 for rejected.
    """
    ids, lead, boundary = encoded.input_ids[row], marks.lead, len(texts.prompt)
    reply = texts.rejected if side else texts.chosen
    start = _response_start(encoded, row, boundary)
    if start < len(ids) and ids[start] in marks.stripping:
        # Of a token that stands in the prompt only white space can lie beyond it.
        start += reply[: encoded.encodings[row].offsets[start][1] - boundary].isspace()
    if ids[: len(lead)] != lead:  # unless the template wrote it
        ids, start = lead + ids, start + len(lead)
    if ids[-1:] != [marks.end]:
        ids = [*ids, marks.end]
    return array("i", ids), start


def _response_start(encoded: BatchEncoding, row: int, boundary: int) -> int:
    """The first token that reaches beyond the boundary.

    Several tokens may stand for one character (bytes, a sentencepiece's added space), and a trimmed space for none:
    the character at the boundary answers at once, and where it has no token, all offsets are looked through.
    """
    start = encoded.char_to_token(row, boundary)
    if start is None:
        return bisect_right(encoded.encodings[row].offsets, boundary, key=lambda offset: offset[1])
    return int(start)


def _cut_pair(
    pair: Pair,
    chosen: tuple[array[int], int],
    rejected: tuple[array[int], int],
    marks: _Marks,
    data: DataSection,
    remarks: tuple[str, ...],
) -> TokenizedPair | str:
    """The pair cut at data.max_length, or why it is left out."""
    if max(chosen[1], rejected[1]) > data.prompt_limit:
        return LONG_PROMPT
    if any(marks.end in ids[start:-1] for ids, start in (chosen, rejected)):
        return f"{SPECIAL}: {marks.end_text}"
    chosen_ids, rejected_ids = chosen[0][: data.max_length], rejected[0][: data.max_length]
    # Nothing predicts a sequence's first token, so a response of that alone has no score either.
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
    """Chosen and rejected as the text that their tokens decode to; ``end`` is :func:`end_token_id`.

    Decoded, not copied: what a tokenizer loses (case, unknown characters) is lost here too.
    """
    encoded = _encode([texts.prompt + texts.chosen, texts.prompt + texts.rejected], tokenizer)
    marks = _marks(tokenizer, end)
    shown = {}
    for row, side in enumerate(("chosen", "rejected")):
        ids, start = _place(encoded, row, texts, row, marks)
        room = data.max_length
        last = max(start, min(len(ids) - 1, room))  # a prompt beyond the limit is shown whole
        parts = [
            ("prompt", start),
            ("response", last),
            ("end" if len(ids) <= room else "cut", None),
        ]
        pieces, done = [], ""
        for kind, stop in parts:
            text = str(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
            done = common_start(
                done, text
            )  # a character may be made of tokens on both sides of the boundary
            pieces.append(Segment(kind, text[len(done) :]))
            done = text
        shown[side] = [piece for piece in pieces if piece.text]
    return shown
