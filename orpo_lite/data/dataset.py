"""Read, render and tokenize one split of the data, and keep it in the cache."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orpo_lite.data import cache
from orpo_lite.data.cache import TokenizedPairs
from orpo_lite.data.chat_template import (
    EMPTY_THOUGHT,
    NO_THOUGHT,
    OWN_TEMPLATE,
    SPECIAL,
    UNFAITHFUL,
    PairTexts,
    Template,
    is_file,
    set_chat_template,
    template_file,
)
from orpo_lite.data.formats.columns import NOTABLE_SHARE
from orpo_lite.data.formats.text import LONE_SURROGATE
from orpo_lite.data.formats.values import is_templated
from orpo_lite.data.pair import Message, Pair, TokenizedPair
from orpo_lite.data.pairs import ALLOWED_BAD_ROWS, Drops, PairReader
from orpo_lite.data.render_process import LimitedRenderer, Renderer
from orpo_lite.data.sources.source import Source
from orpo_lite.data.tokenize import (
    EQUAL_CUT,
    LONG_PROMPT,
    NO_ROOM,
    end_token_id,
    show_texts,
    tokenize_pairs,
)
from orpo_lite.errors import FULL, DataError, FitError, ModelError, Overrides
from orpo_lite.recipe.schema import DataSection

THOUGHTS = (EMPTY_THOUGHT, NO_THOUGHT)
TOO_LONG = (LONG_PROMPT, NO_ROOM, EQUAL_CUT)  # with higher limits, these pairs would be kept

# The settings that change the tokens. The rows, the tokenizer and the template change them too.
TOKEN_FIELDS = (
    "format",
    "column_map",
    "max_samples",
    "max_bad_rows",
    "max_length",
    "max_prompt_length",
    "chat_template_kwargs",
)
LoadTokenizer = Callable[[], Any]


def tokenized(
    data: DataSection, sources: Sequence[Source], tokenizer_folder: Path, load: LoadTokenizer
) -> Generator[tuple[int, int], None, TokenizedPairs]:
    """Yield progress as (rows read, total rows); finally return one tokenized split.

    If the split is in the cache, the tokens are read from the cache. Otherwise, the split is
    tokenized and added to the cache. If the number of rows is unknown, the total is 0.

    Args:
        data: the settings.
        sources: the datasets of this split.
        tokenizer_folder: the folder of the tokenizer. The hash of its files is in the cache key.
        load: a function that loads the tokenizer. It is called only if the cache lacks the split.

    Raises DataError or ModelError if rows cannot be read or rendered, FitError if the disk is full.
    """
    fingerprints = [source.fingerprint() for source in sources]
    key = cache.make_key(
        sets=[
            (source.name, sha256) for source, (sha256, _) in zip(sources, fingerprints, strict=True)
        ],
        tokenizer=cache.tokenizer_sha256(tokenizer_folder),
        template=_template_key(data.chat_template),
        fields=data.model_dump(include=set(TOKEN_FIELDS)),
    )
    limit = sys.maxsize if data.max_samples is None else data.max_samples
    rows = sum(min(count, limit) for _, count in fingerprints)
    try:
        with cache.locked(key):
            entry = cache.load(key)
            if entry is None:
                with cache.new_entry(key) as writer:
                    reader = PairReader(data, sources)
                    yield from _tokenize(data, load(), reader, writer, rows)
                entry = cache.load(key)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise FitError(
            where=str(cache.cache_folder()),
            found="the disk is full",
            expected="space for the tokens",
            fix=f"free some space, or set {cache.VARIABLE} to a folder on another disk",
        ) from error
    if entry is None:
        raise FitError(
            where=str(cache.cache_folder()),
            found="tokens were written to this folder, but they cannot be read",
            expected="a disk without errors",
            fix="try again",
        )
    return entry


def _template_key(choice: str) -> str:
    """Return data.chat_template for the cache key; for a file, its name and its content.

    The name is included because the cache stores a description of the template that contains it.
    """
    return f"{choice}\n{template_file(choice)}" if is_file(choice) else choice


def _tokenize(
    data: DataSection, tokenizer: Any, reader: PairReader, writer: cache.Writer, rows: int
) -> Generator[tuple[int, int], None, None]:
    """Read, render, tokenize and write one split.

    Yields progress as (rows read, total rows). ``rows``: the expected total, 0 if unknown.
    """
    template = set_chat_template(tokenizer, data)
    if tokenizer.unk_token_id != tokenizer.eos_token_id:  # in GPT-2 one token is both
        writer.unknown_id = tokenizer.unk_token_id
    samples: dict[str, Pair] = {}
    remarked: dict[str, Pair] = {}  # the first pair with each remark
    dropped: dict[str, Pair] = {}  # the first pair that is left out for each reason
    remarks = Counter[str]()
    with _renderer(template) as renderer:
        for number, (pair, tokens) in enumerate(tokenize_pairs(reader, renderer, tokenizer, data)):
            if number % 100 == 0:
                yield reader.read, max(rows, reader.read) if rows else 0
            if isinstance(tokens, str):
                reader.drops.add(tokens, pair.where)
                dropped.setdefault(tokens, pair)
                continue
            writer.add(tokens)
            remarks.update(tokens.remarks)
            remarks["templated_pairs"] += _is_templated(pair, template)
            remarked = dict.fromkeys(tokens.remarks, pair) | remarked
            samples.setdefault("first", pair)
            if tokens.chosen_cut or tokens.rejected_cut:
                samples.setdefault("cut", pair)
        _check_unfaithful(reader.drops, reader.read, data)
        hints = _hints(reader.drops.counts)
        for reason in TOO_LONG:
            if reason in dropped:
                hints[reason] = _fix_length(dropped[reason], renderer, tokenizer, data)
        if not len(writer):
            reader.drops.raise_nothing_left("data", hints)
        if with_thoughts := [remarked[name] for name in THOUGHTS if name in remarked]:
            hints |= _thoughts_off(with_thoughts, template, data)
        templated = remarks["templated_pairs"]
        if templated >= NOTABLE_SHARE * len(writer):
            raise _templated(templated, len(writer))
        end = end_token_id(renderer, tokenizer)
        shown = _shown_samples([*samples.values()], renderer, tokenizer, data)
    writer.close(
        {
            "format": reader.detected,
            "columns": reader.columns,
            "chat_template": template.description,
            "rows_read": reader.read,
            "rows_of_sets": reader.rows,
            "dropped": dict(reader.drops.counts),
            "places": reader.drops.places,
            "sha256": reader.sha256,
            "end_token_id": end,
            "largest_id": writer.largest,
            "counted": reader.remarks + remarks + Counter(unknown_tokens=writer.unknown),
            "hints": hints,
            "tokenizer": getattr(tokenizer, "replaced", ""),
            "samples": dict(zip(samples, shown, strict=True)),
        }
    )


def _is_templated(pair: Pair, template: Template) -> bool:
    texts = [*pair.messages, pair.chosen, pair.rejected]
    return template.text is not None and is_templated(texts)


def _hints(reasons: Iterable[str]) -> dict[str, str]:
    """Return fixes for reasons to leave pairs out: reason -> fix. Some reasons have no fix."""
    hints = dict.fromkeys(UNFAITHFUL, f"{OWN_TEMPLATE} that writes every turn unchanged")
    for reason in reasons:
        if reason.startswith(SPECIAL):
            hints[reason] = f"remove{reason.removeprefix(SPECIAL).lstrip(':')} from the texts"
    return {reason: hints[reason] for reason in reasons if reason in hints}


def _fix_length(pair: Pair, renderer: Renderer, tokenizer: Any, data: DataSection) -> str:
    """Return the settings that raise the length limits enough to keep a pair that is too long."""
    free = data.model_copy(update=dict.fromkeys(("max_length", "max_prompt_length"), sys.maxsize))
    ((_, tokens),) = tokenize_pairs([pair], renderer, tokenizer, free)
    if isinstance(tokens, str):
        return ""
    prompt = max(tokens.chosen_start, tokens.rejected_start)
    whole = max(len(tokens.chosen_ids), len(tokens.rejected_ids))
    limits = {
        "data.max_length": max(whole, data.max_length),
        "data.max_prompt_length": max(prompt, data.prompt_limit),
    }
    return Overrides(limits, f" keep the pair at {pair.where}")


def _check_unfaithful(drops: Drops, read: int, data: DataSection) -> None:
    """Raise ModelError if the template fails on more pairs than data.max_bad_rows allows.

    A template fails on a pair if it loses or changes a turn, or raises an error.
    """
    reasons = [
        reason
        for reason in drops.counts
        if reason in UNFAITHFUL or reason.startswith("the chat template ")
    ]
    count = sum(drops.counts[reason] for reason in reasons)
    allowed = max(ALLOWED_BAD_ROWS, data.max_bad_rows * read)
    if count <= allowed:
        return
    details = [
        f"{reason} ({drops.counts[reason]:,}, the first at {', '.join(drops.places[reason])})"
        for reason in reasons
    ]
    fix = f"{OWN_TEMPLATE} that writes every turn unchanged"
    if count < read:
        share = math.ceil(100 * count / read) / 100
        fix = Overrides(
            {"data.max_bad_rows": share},
            text=f"{fix}; or data.max_bad_rows={share} leaves these pairs out",
        )
    raise ModelError(
        where="data.chat_template",
        found=f"it fails on {count:,} of {read:,} pairs: {'; '.join(details)}",
        expected=f"at most {int(allowed):,} such pairs",
        fix=fix,
    )


def _thoughts_off(pairs: Sequence[Pair], template: Template, data: DataSection) -> dict[str, str]:
    """Return remark -> fix for the remarks in THOUGHTS. The fix sets enable_thinking to false.

    Returns {} if the template still writes a <think> block for these pairs with this setting.
    """
    variables = {"enable_thinking": False}
    changed = replace(template, variables=template.variables | variables)
    with suppress(ModelError), _renderer(changed) as renderer:
        renderer.send(pairs)
        for texts in renderer.receive():
            if not isinstance(texts, PairTexts) or {*THOUGHTS} & {*texts.remarks}:
                return {}
        value = json.dumps(data.chat_template_kwargs | variables)
        setting = shlex.quote(f"data.chat_template_kwargs={value}")
        return dict.fromkeys(THOUGHTS, f"{setting} turns thinking off")
    return {}


def _templated(count: int, pairs: int) -> DataError:
    return DataError(
        where="data.chat_template",
        found=f"{count:,} of {pairs:,} pairs already hold markers of a chat template",
        expected="texts without markers, because the chat template adds its own markers",
        fix="remove the markers from all rows",
    )


def show_row(
    data: DataSection, sources: Sequence[Source], load: LoadTokenizer, place: str
) -> dict[str, Any]:
    """Return the row at ``place``, such as pairs.csv:3, as text segments.

    The dict has these keys: where (the place of the row), chosen and rejected (lists of segments,
    missing if the row cannot be rendered), and dropped (the reason to leave the row out, or None).
    Raises DataError.
    """
    pair, reason = PairReader(data, sources).find(place)
    tokenizer = load()
    with _renderer(set_chat_template(tokenizer, data)) as renderer:
        if reason is None:
            ((_, tokens),) = tokenize_pairs([pair], renderer, tokenizer, data)
            reason = tokens if isinstance(tokens, str) else None
        (shown,) = _shown_samples([pair], renderer, tokenizer, data) or [{"where": place}]
    return shown | {"dropped": reason}


class PromptTokenizer(AbstractContextManager["PromptTokenizer"]):
    """Tokenize conversations and replies in the same way as training pairs.

    Use it as a context manager, because it starts a process that renders the chat template.

    Args:
        data: the settings. A conversation that exceeds the length limits is not tokenized.
        tokenizer: the tokenizer. Its chat template is set to ``data.chat_template``.
    """

    def __init__(self, data: DataSection, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.template = set_chat_template(tokenizer, data)
        self.renderer = _renderer(self.template)

    def __exit__(self, *error: Any) -> None:
        self.renderer.__exit__(*error)

    @cached_property
    def end_id(self) -> int:
        """The id of the token that ends an answer."""
        return end_token_id(self.renderer, self.tokenizer)

    def ids(self, conversations: Sequence[Sequence[Message]]) -> list[list[int] | str]:
        """Return the token ids of each conversation, or the reason why it cannot be tokenized.

        Each conversation must end with a user turn. Special tokens are removed from the texts of
        earlier answers, because a model may have written such a token as text. If
        data.chat_template is none, the turns are joined by line ends.

        Raises:
            ModelError: the template exceeds its limits, or fails on a plain question.
        """
        pairs = [
            Pair(
                turns := tuple(map(self._without_special, conversation)),
                "Yes.",
                "No.",
                f"prompt {number}",
                prompt_text="\n".join(turn["content"] for turn in turns),
            )
            for number, conversation in enumerate(conversations, 1)
        ]
        broken = {pair.where for pair in pairs if LONE_SURROGATE.search(pair.prompt_text or "")}
        whole = [pair for pair in pairs if pair.where not in broken]
        found = {
            pair.where: tokens
            if isinstance(tokens, str)
            else [*map(int, tokens.chosen_ids[: tokens.chosen_start])]
            for pair, tokens in self.pairs(whole)
        }
        return [found.get(pair.where, "the text is not valid Unicode") for pair in pairs]

    def pairs(self, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, TokenizedPair | str]]:
        """Yield each pair with its tokens, or with the reason why it cannot be tokenized."""
        return tokenize_pairs(pairs, self.renderer, self.tokenizer, self.data)

    def _without_special(self, turn: Message) -> Message:
        if turn["role"] != "assistant":
            return turn
        return {**turn, "content": self.template.special.sub("", turn["content"])}


def whole_text(tokenizer: PromptTokenizer) -> str:
    """Return the text of a short conversation as the template writes it, to its very end.

    Other texts are cut after the token that ends a reply.
    """
    pair = Pair(({"role": "user", "content": "Is it?"},), "Yes.", "No.", "a question")
    template = replace(tokenizer.template, keeps_tail=True)
    with _renderer(template) as renderer:
        renderer.send([pair])
        (texts,) = renderer.receive()
    return texts.prompt + texts.chosen if isinstance(texts, PairTexts) else ""


def _renderer(template: Template) -> Renderer:
    """Return a renderer. A Jinja template is untrusted, so it is rendered in another process."""
    return Renderer(template) if template.text is None else LimitedRenderer(template)


def _shown_samples(
    pairs: Sequence[Pair], renderer: Renderer, tokenizer: Any, data: DataSection
) -> list[dict[str, Any]]:
    """Return the pairs as text segments for display, except pairs that cannot be rendered."""
    end = end_token_id(renderer, tokenizer)
    renderer.send(pairs)
    rows = []
    for pair, texts in zip(pairs, renderer.receive(), strict=True):
        if isinstance(texts, PairTexts):
            row: dict[str, Any] = {"where": pair.where}
            for reply, segments in show_texts(texts, tokenizer, data, end).items():
                row[reply] = [asdict(segment) for segment in segments]
            rows.append(row)
    return rows
