"""Files and hub sets to pairs, split by prompt, and pairs to tokens.

``read_pairs`` needs no tokenizer and ``tokenize_pairs`` no files. Every pair that is left out is counted by reason.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from orpo_lite.data.formats import READERS, Detected, Message, Pair, Row, detect_format, shared_start
from orpo_lite.data.rows import is_local, is_path, open_rows
from orpo_lite.errors import DataError, ModelError, RecipeError, raise_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.recipe import DataSection

# Reasons to leave a pair out (formats.PROMPTS_DIFFER is one more). The first three are the paper's, Appendix C.
EQUAL = "chosen and rejected are equal"
EMPTY_CHOSEN = "empty chosen"
EMPTY_REJECTED = "empty rejected"
LONG_PROMPT = "prompt longer than data.max_prompt_length"
NO_ROOM = "no room for a response in data.max_length"
EQUAL_CUT = "chosen and rejected are equal after the cut at data.max_length"
SPECIAL = "special token inside the text"
REWRITTEN = "reply changed by the chat template"
# Counted beside them, but kept: responses, not pairs, that end without their end token.
CUT = "responses cut by data.max_length"

Held = TypeVar("Held")  # whatever is split by prompt

PAPER_CHAT_TEMPLATE = (  # "<|user|>\n{}</s>\n<|assistant|>\n{}</s>"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

LOOK = 100  # rows that detection looks at
BATCH = 128  # pairs tokenised in one call


@dataclass(frozen=True)
class PairSet:
    """What a run trains and evaluates on."""

    train: list[Pair]
    test: list[Pair]
    detected: str  # the sentence that says which format was read, and why
    read: int  # rows read, of both sides
    drops: dict[str, int]  # reason -> pairs left out
    sha256: str  # of the pairs' content and order


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as two whole sequences, prompt + response + end token, each cut at data.max_length."""

    chosen_ids: array[int]
    rejected_ids: array[int]
    chosen_start: int  # index of the first response token
    rejected_start: int
    where: str
    prompt: str = ""  # hash of the pair's prompt_key: the held-out side is split by it


# --- reading


def read_pairs(data: DataSection) -> PairSet:
    """Read and filter. ``data.max_samples`` takes the first rows of each side, before anything is dropped.

    The test side holds data.dataset_test_split; without one it is empty, and ``hold_out`` splits what tokens leave.
    Raises DataError for faulty rows (all of them at once), for a set of which nothing is left, and for a prompt that
    stands on both sides of a given split; HubError when the hub does not deliver.
    """
    drops: Counter[str] = Counter()
    train, detected = _read_side(data, data.dataset_name, data.dataset_train_split, drops)
    read = len(train)
    test: list[Pair] = []
    if data.dataset_test_split is not None:
        test, _ = _read_side(data, *_test_source(data, data.dataset_test_split), drops)
        _refuse_shared_prompts(train, test)
        read += len(test)
    return PairSet(train, test, detected.sentence, read + drops.total(), dict(drops), data_hash(train, test))


def data_hash(*sides: Sequence[Pair]) -> str:
    """sha256 of what the pairs say, in order; where they were read from does not count."""
    digest = hashlib.sha256()
    for side in sides:
        digest.update(f"{len(side)}\n".encode())
        for pair in side:
            content = [pair.messages, pair.prompt_text, pair.chosen, pair.rejected]
            digest.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _read_side(data: DataSection, name: str, split: str, drops: Counter[str]) -> tuple[list[Pair], Detected]:
    """One side's pairs and its format; the pairs left out are added to ``drops``."""
    faults: list[DataError] = []
    rows = islice(open_rows(name, split, data.dataset_config, faults), data.max_samples)
    first = list(islice(rows, LOOK))
    if not first:
        raise_all(faults)
        raise DataError(name, "no rows", "at least one preference pair", "check data.dataset_name")
    columns = _map_columns([row for _, row in first], data.column_map)
    try:
        detected = _choose_format(data.format, columns)
    except DataError as fault:
        raise_all([*faults, fault])
        raise
    pairs, left_out = [], Counter[str]()
    for where, row in chain(first, rows):
        try:
            pair = detected.read(_mapped(row, data.column_map), where)
        except DataError as fault:
            faults.append(fault)
            continue
        if reason := _drop_reason(pair):
            left_out[reason] += 1
        else:
            pairs.append(pair)
    raise_all(faults)
    if not pairs:
        _raise_nothing_left(name, left_out)
    drops.update(left_out)
    return pairs, detected


def _test_source(data: DataSection, test: str) -> tuple[str, str]:
    """(name, split) of the held-out side: a file or folder of its own, else a split of the training set."""
    if is_path(test):  # a bare word is a split, even when a folder of that name stands near by
        return test, "test"
    if is_local(data.dataset_name) and not Path(data.dataset_name).expanduser().is_dir():
        expected = "a file (a single file has no splits), or null to hold out data.test_split_size"
        raise DataError("data.dataset_test_split", repr(test), expected, "data.dataset_test_split=held-out.jsonl")
    return data.dataset_name, test


def _choose_format(name: str, rows: Sequence[Row]) -> Detected:
    return detect_format(rows) if name == "auto" else Detected(name, "data.format says so", READERS[name])


def _drop_reason(pair: Pair) -> str | None:
    if pair.drop:
        return pair.drop
    if pair.chosen == pair.rejected:
        return EQUAL
    if not pair.chosen.strip():
        return EMPTY_CHOSEN
    return None if pair.rejected.strip() else EMPTY_REJECTED


def _raise_nothing_left(where: str, drops: Mapping[str, int]) -> NoReturn:
    table = "".join(f"\n  {count:>8}  {reason}" for reason, count in drops.items())
    raise DataError(where, f"every pair was left out:{table}", "pairs to train on", "mend the data, or its limits")


def _mapped(row: Row, column_map: Mapping[str, str]) -> dict[str, Any]:
    taken = {ours: row[theirs] for ours, theirs in column_map.items() if theirs in row}
    return {key: value for key, value in row.items() if key not in column_map} | taken


def _map_columns(rows: Sequence[Row], column_map: Mapping[str, str]) -> list[dict[str, Any]]:
    columns = {key: None for row in rows for key in row}
    ours = ("prompt", "chosen", "rejected")
    faults = []
    for name, options in [(key, ours) for key in column_map] + [(key, tuple(columns)) for key in column_map.values()]:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "data.column_map=prompt=COLUMN"
            faults.append(DataError("data.column_map", f"{name!r}", f"one of {', '.join(options)}", remedy))
    raise_all(faults)
    return [_mapped(row, column_map) for row in rows]


# --- the held-out side


def prompt_key(pair: Pair) -> str:
    """What makes two prompts the same: roles and words, whatever their case and spacing."""
    return "\n".join(f"{turn['role']}: {' '.join(turn['content'].split()).casefold()}" for turn in pair.messages)


def hold_out(pairs: Sequence[Held], prompts: Sequence[str], size: float, seed: int) -> tuple[list[Held], list[Held]]:
    """Split by prompt: a share of the prompts (size < 1), or whole prompts until there are ``size`` pairs.

    Args:
        pairs: those that are left when all filters have been passed, so that no filter can empty a side.
        prompts: what makes two prompts the same, one for each pair (:func:`prompt_key`).

    A prompt's rank is a hash of seed and prompt, so the order of the rows does not matter.
    """
    if size == 0:
        return list(pairs), []
    counts = Counter(prompts)
    ranked = sorted(counts, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    if size < 1:
        held = set(ranked[: max(1, round(size * len(ranked)))])
    else:
        before = accumulate((counts[key] for key in ranked), initial=0)  # pairs held before each prompt
        held = {key for key, pairs_held in zip(ranked, before, strict=False) if pairs_held < size}
    if len(held) == len(ranked):
        found = f"{size:g} of {len(pairs)} pairs with {len(ranked)} different prompts leaves none to train on"
        raise DataError("data.test_split_size", found, "less than all prompts", "data.test_split_size=0, or more pairs")
    train: list[Held] = []
    test: list[Held] = []
    for pair, prompt in zip(pairs, prompts, strict=True):
        (test if prompt in held else train).append(pair)
    return train, test


def _refuse_shared_prompts(train: list[Pair], test: list[Pair]) -> None:
    places = {prompt_key(pair): pair.where for pair in reversed(train)}
    shared = {key: pair.where for pair in reversed(test) if (key := prompt_key(pair)) in places}
    remedy = "remove it from one side, or leave out data.dataset_test_split: data.test_split_size splits by prompt"
    faults = []
    for key, where in reversed(shared.items()):
        found = f"the same prompt as in the training pair {places[key]}"
        faults.append(DataError(f"held-out pair {where}", found, "a prompt on one side only", remedy))
    raise_all(faults)


# --- chat templates


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> str:
    """Install the template that data.chat_template asks for, try it, and return the sentence that says which it is."""
    choice = data.chat_template
    if choice == "none":
        said = "no chat template: prompt and response are joined as plain text"
    elif choice == "auto" and tokenizer.chat_template not in (None, "", PAPER_CHAT_TEMPLATE):
        said = "the tokenizer's own chat template"
    elif choice == "auto":
        _eos_id(tokenizer)  # the template writes it
        tokenizer.chat_template = PAPER_CHAT_TEMPLATE
        said = "the paper's chat template, <|user|> and <|assistant|>: the tokenizer has none"
    elif "{%" in choice or "{{" in choice:
        tokenizer.chat_template = choice
        said = "the chat template written in data.chat_template"
    else:
        try:
            tokenizer.chat_template = Path(choice).expanduser().read_text("utf-8")
        except (OSError, ValueError) as error:
            expected = "auto, none, a .jinja file, or a template"
            raise RecipeError("data.chat_template", f"{choice}: {error}", expected, "check the path") from None
        said = f"the chat template of {choice}"
    end_token_id(tokenizer, data)
    return said


def end_token_id(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> int:
    """The token that ends a reply: the special token that the template writes after it, else the tokenizer's eos."""
    if data.chat_template != "none":
        _, after = _frame(({"role": "user", "content": "?"},), tokenizer, data, "a question and its answer")
        if end := _special_tokens(tokenizer).search(after):
            return int(tokenizer.convert_tokens_to_ids(end.group()))
    return _eos_id(tokenizer)


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        expected = "an eos_token, or a chat template that ends a reply with a special token"
        raise ModelError("tokenizer", "nothing ends a reply", expected, "set eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token) for token in tokenizer.all_special_tokens} | {t.content for t in added if t.special}
    return re.compile("|".join(map(re.escape, sorted(texts - {""}, key=len, reverse=True))) or r"(?!)")


def _render(
    messages: Iterable[Message],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    where: str,
    generation: bool = False,
) -> str:
    try:
        kwargs = {"tokenize": False, "add_generation_prompt": generation, **data.chat_template_kwargs}
        return str(tokenizer.apply_chat_template(list(messages), **kwargs))
    except Exception as error:  # a template can raise anything
        found = f"the chat template raises {type(error).__name__}: {error}"
        remedy = "data.chat_template=FILE.jinja with a template that takes such turns, or mend the row"
        raise ModelError(where, found, "a template that renders these turns", remedy) from None


_MARK = "\ue0fe"  # private use: stands where the reply will stand


def _frame(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, data: DataSection, where: str
) -> tuple[str, str]:
    """The prompt as it is asked for at generation, and what the template writes after the reply."""
    asked = _render(messages, tokenizer, data, where, generation=True)
    answered = _render([*messages, {"role": "assistant", "content": _MARK}], tokenizer, data, where)
    before, mark, after = answered.rpartition(_MARK)
    if not mark:
        remedy = "data.chat_template=FILE.jinja with a template that shows the assistant's turns"
        raise ModelError(where, "the chat template leaves out the reply", "the reply in the text", remedy)
    # Not the generation prompt itself: some templates open a <think> there that the reply does not have.
    return shared_start(asked, before), after


# --- tokens


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, data: DataSection, vocab_size: int | None = None
) -> tuple[list[TokenizedPair], dict[str, int]]:
    """Render, tokenise and cut; ``set_chat_template`` comes first. Returns the pairs and the counts: of pairs left out
    by reason, and under CUT of responses that lost their end token.

    A text is tokenised once and whole, as in generation; a token that straddles the boundary belongs to the response.
    Raises ModelError for a tokenizer without offsets, a template that fails, an id beyond ``vocab_size`` rows of
    embedding; DataError for conversations without a template and when every pair is left out.
    """
    if not tokenizer.is_fast:
        expected = "a fast tokenizer, which says where in the text each token stands"
        raise ModelError("tokenizer", f"{type(tokenizer).__name__} is a slow one", expected, "add a tokenizer.json")
    end, lead, special = end_token_id(tokenizer, data), _leading_ids(tokenizer), _special_tokens(tokenizer)
    kept: list[TokenizedPair] = []
    counts: Counter[str] = Counter()
    faults: list[DataError | ModelError] = []
    for first in range(0, len(pairs), BATCH):
        batch: list[tuple[Pair, int]] = []
        texts: list[str] = []  # two for each pair of the batch
        for pair in pairs[first : first + BATCH]:
            try:
                rendered = _pair_texts(pair, tokenizer, data, special)
            except (DataError, ModelError) as fault:
                faults.append(fault)
                continue
            if isinstance(rendered, str):
                counts[rendered] += 1
                continue
            batch.append((pair, rendered[0]))
            texts += rendered[1]
        whole = _encode(texts, tokenizer)
        for pair, boundary in batch:
            chosen, rejected = (_place(*next(whole), boundary, lead, end) for _ in ("chosen", "rejected"))
            tokens = _cut_pair(pair, chosen, rejected, end, data)
            if isinstance(tokens, str):
                counts[tokens] += 1
                continue
            kept.append(tokens)
            counts[CUT] += (tokens.chosen_ids[-1] != end) + (tokens.rejected_ids[-1] != end)
            _check_ids(tokens, vocab_size)
    raise_all(faults)
    if pairs and not kept:
        _raise_nothing_left("data", counts)
    return kept, {reason: count for reason, count in counts.items() if count}


def _pair_texts(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, data: DataSection, special: re.Pattern[str]
) -> tuple[int, list[str]] | str:
    """The length of the prompt and the two whole texts that begin with it; or why the pair is left out."""
    # It would be tokenised as the token: an end in mid-response, or a turn that nobody took.
    if any(special.search(text) for text in (pair.chosen, pair.rejected, *(m["content"] for m in pair.messages))):
        return SPECIAL
    if data.chat_template == "none":
        if pair.prompt_text is None:
            found = "a conversation, and data.chat_template: none joins plain texts"
            raise DataError(pair.where, found, "a prompt that is one text", "data.chat_template=auto")
        return len(pair.prompt_text), [pair.prompt_text + reply for reply in (pair.chosen, pair.rejected)]
    prompt, after = _frame(pair.messages, tokenizer, data, pair.where)
    end = special.search(after)
    texts = []
    for reply in (pair.chosen, pair.rejected):
        text = _render([*pair.messages, {"role": "assistant", "content": reply}], tokenizer, data, pair.where)
        body = text[len(prompt) : len(text) - len(after)]
        # Some templates strip the reply; one that rewrites it would teach what nobody chose.
        if not (text.startswith(prompt) and text.endswith(after) and body.rstrip().endswith(reply.strip())):
            return REWRITTEN
        # What the template writes after the end token is not the model's to say.
        texts.append(prompt + body + (after[: end.end()] if end else ""))
    return len(prompt), texts


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by itself: [bos] for many, [] for some."""
    bare, whole = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Per text, the ids and the (start, end) characters that each stands for."""
    if not texts:
        return iter(())
    flags = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, **flags)
    return zip(encoded.input_ids, encoded.offset_mapping, strict=True)


def _place(
    ids: list[int], offsets: list[tuple[int, int]], boundary: int, lead: list[int], end: int
) -> tuple[array[int], int]:
    """The whole sequence with its first and last token, each exactly once, and where the response starts.

    The response starts with the first token that reaches beyond the boundary. Several tokens may stand for one
    character (bytes, a sentencepiece's added space), and a trimmed space for none; either way that finds the first.
    """
    start = bisect_right(offsets, boundary, key=lambda offset: offset[1])
    if ids[: len(lead)] != lead:  # unless the template wrote it
        ids, start = lead + ids, start + len(lead)
    if ids[-1:] != [end]:
        ids = [*ids, end]
    return array("i", ids), start


def _cut_pair(
    pair: Pair, chosen: tuple[array[int], int], rejected: tuple[array[int], int], end: int, data: DataSection
) -> TokenizedPair | str:
    """The pair cut at data.max_length, or why it is left out."""
    if max(chosen[1], rejected[1]) > data.max_prompt_length:
        return LONG_PROMPT
    if any(end in ids[start:-1] for ids, start in (chosen, rejected)):
        return SPECIAL
    chosen_ids, rejected_ids = chosen[0][: data.max_length], rejected[0][: data.max_length]
    # Nothing predicts a sequence's first token, so a response of that alone has no score either.
    if len(chosen_ids) <= max(chosen[1], 1) or len(rejected_ids) <= max(rejected[1], 1):
        return NO_ROOM
    if chosen_ids == rejected_ids:
        return EQUAL_CUT
    prompt = hashlib.sha256(prompt_key(pair).encode()).hexdigest()
    return TokenizedPair(chosen_ids, rejected_ids, chosen[1], rejected[1], pair.where, prompt)


def _check_ids(pair: TokenizedPair, vocab_size: int | None) -> None:
    largest = max(max(pair.chosen_ids), max(pair.rejected_ids))
    if vocab_size is not None and largest >= vocab_size:
        found = f"token id {largest}, and the model's embedding has {vocab_size} rows"
        raise ModelError(pair.where, found, "a tokenizer that belongs to the model", "use the base's own tokenizer")
