"""One side of the data as tokens: read, rendered, tokenised and kept in the cache, or found there."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
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
from orpo_lite.data.formats.values import is_templated
from orpo_lite.data.pair import Pair
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
LIMITED = (LONG_PROMPT, NO_ROOM, EQUAL_CUT)  # reasons that longer limits do away with

# What tokens depend on, besides the rows, the tokenizer and the template.
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
    """One side from the cache, or tokenised into it; yields (rows read, rows), the second 0 where nobody knows.

    Args:
        data: what tokens depend on, besides rows and tokenizer.
        sources: the sets of this side.
        tokenizer_folder: what the tokenizer is made of, for the key.
        load: called for the tokenizer when the cache does not have the side.

    Raises DataError and ModelError for what cannot be read or rendered, FitError for a full disk.
    """
    prints = [source.fingerprint() for source in sources]
    key = cache.make_key(
        sets=[(source.name, sha256) for source, (sha256, _) in zip(sources, prints, strict=True)],
        tokenizer=cache.tokenizer_sha256(tokenizer_folder),
        template=_template_key(data.chat_template),
        fields=data.model_dump(include=set(TOKEN_FIELDS)),
    )
    try:
        with cache.locked(key):
            if (entry := cache.load(key)) is None:
                rows = sum(
                    count if data.max_samples is None else min(count, data.max_samples)
                    for _, count in prints
                )
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
            expected="room for the tokens",
            fix=f"free some space, or name a folder on another disk in {cache.VARIABLE}",
        ) from error
    if entry is None:
        raise FitError(
            where=str(cache.cache_folder()),
            found="what was written cannot be read",
            expected="a sound disk",
            fix="try it again",
        )
    return entry


def _template_key(choice: str) -> str:
    """The template, with the name of its file, which is said of the tokens."""
    return f"{choice}\n{template_file(choice)}" if is_file(choice) else choice


def _tokenize(
    data: DataSection, tokenizer: Any, reader: PairReader, writer: cache.Writer, rows: int
) -> Generator[tuple[int, int], None, None]:
    """Read, render, tokenise and write one side; ``rows`` is what the bar counts to, 0 when nobody knows."""
    template = set_chat_template(tokenizer, data)
    if tokenizer.unk_token_id != tokenizer.eos_token_id:  # GPT-2's one special token is both
        writer.unknown_id = tokenizer.unk_token_id
    samples: dict[str, Pair] = {}
    remarked: dict[str, Pair] = {}
    dropped: dict[str, Pair] = {}
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
            is_marked = template.text is not None and is_templated(
                [*pair.messages, pair.chosen, pair.rejected]
            )
            remarks.update([*tokens.remarks, *["templated_pairs"] * is_marked])
            remarked.update({remark: pair for remark in tokens.remarks if remark not in remarked})
            samples.setdefault("first", pair)
            if tokens.chosen_cut or tokens.rejected_cut:
                samples.setdefault("cut", pair)
        _check_unfaithful(reader.drops, reader.read, data)
        hints = _hints(reader.drops.counts)
        hints |= {
            reason: _limits(dropped[reason], renderer, tokenizer, data)
            for reason in LIMITED
            if reason in dropped
        }
        if not len(writer):
            reader.drops.raise_nothing_left("data", hints)
        if thoughts := [remarked[name] for name in THOUGHTS if name in remarked]:
            hints |= _thoughts_off(thoughts, template, data)
        if (count := remarks["templated_pairs"]) >= NOTABLE_SHARE * len(writer):
            raise _templated(count, len(writer))
        end = end_token_id(renderer, tokenizer)
        shown = dict(
            zip(
                samples, _shown_samples([*samples.values()], renderer, tokenizer, data), strict=True
            )
        )
    writer.close(
        {
            "format": reader.detected,
            "columns": reader.columns,
            "chat_template": template.said,
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
            "samples": shown,
        }
    )


def _hints(reasons: Iterable[str]) -> dict[str, str]:
    """What to do about pairs that are left out, for each reason about which something can be done."""
    hints = dict.fromkeys(UNFAITHFUL, f"{OWN_TEMPLATE}, and which writes every turn as it is")
    for reason in reasons:
        if reason.startswith(SPECIAL):
            hints[reason] = f"take{reason.removeprefix(SPECIAL).lstrip(':')} out of the texts"
    return {reason: hints[reason] for reason in reasons if reason in hints}


def _limits(pair: Pair, renderer: Renderer, tokenizer: Any, data: DataSection) -> str:
    """The limits that keep a pair which is left out for its length."""
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
    return Overrides(limits, f" keep the one at {pair.where}")


def _check_unfaithful(drops: Drops, read: int, data: DataSection) -> None:
    """Refuse a template that loses or changes turns of more pairs than data.max_bad_rows allows, or raises on them."""
    reasons = [
        reason
        for reason in drops.counts
        if reason in UNFAITHFUL or reason.startswith("the chat template ")
    ]
    count = sum(drops.counts[reason] for reason in reasons)
    if count <= max(ALLOWED_BAD_ROWS, data.max_bad_rows * read):
        return
    said = [
        f"{reason} ({drops.counts[reason]:,}, the first at {', '.join(drops.places[reason])})"
        for reason in reasons
    ]
    fix = f"{OWN_TEMPLATE}, and which writes every turn as it is"
    if count < read:
        share = math.ceil(100 * count / read) / 100
        fix = Overrides(
            {"data.max_bad_rows": share},
            text=f"{fix}; or data.max_bad_rows={share} leaves these out",
        )
    raise ModelError(
        where="data.chat_template",
        found=f"{count:,} of {read:,} pairs: {'; '.join(said)}",
        expected=f"at most {max(ALLOWED_BAD_ROWS, int(data.max_bad_rows * read)):,} such pairs",
        fix=fix,
    )


def _thoughts_off(pairs: Sequence[Pair], template: Template, data: DataSection) -> dict[str, str]:
    """The line that makes the template write and ask for no thoughts, for both remarks; {} where it has none."""
    off = {"enable_thinking": False}
    with (
        suppress(ModelError),
        _renderer(replace(template, variables=template.variables | off)) as renderer,
    ):
        renderer.send(pairs)
        if all(
            isinstance(texts, PairTexts) and not {*THOUGHTS} & {*texts.remarks}
            for texts in renderer.receive()
        ):
            line = shlex.quote(
                f"data.chat_template_kwargs={json.dumps(data.chat_template_kwargs | off)}"
            )
            return dict.fromkeys(THOUGHTS, f"{line} turns thoughts off")
    return {}


def _templated(count: int, pairs: int) -> DataError:
    return DataError(
        where="data.chat_template",
        found=f"{count:,} of {pairs:,} pairs hold markers of a chat template, though hardly any of the first rows did",
        expected="text without markers: the template puts them in again",
        fix="write all rows alike, without the markers",
    )


def show_row(
    data: DataSection, sources: Sequence[Source], load: LoadTokenizer, place: str
) -> dict[str, Any]:
    """The row at a place as segments of text, and under ``dropped`` why it is left out, if it is. Raises DataError."""
    pair, reason = PairReader(data, sources).find(place)
    tokenizer = load()
    with _renderer(set_chat_template(tokenizer, data)) as renderer:
        if reason is None:
            ((_, tokens),) = tokenize_pairs([pair], renderer, tokenizer, data)
            reason = tokens if isinstance(tokens, str) else None
        (shown,) = _shown_samples([pair], renderer, tokenizer, data) or [{"where": place}]
    return shown | {"dropped": reason}


def prompt_ids(data: DataSection, prompts: Sequence[str], load: LoadTokenizer) -> list[list[int]]:
    """Questions as the tokens that a pair with such a prompt would begin with; [] for one that is too long."""
    turns = [({"role": "user", "content": text},) for text in prompts]
    pairs = [
        Pair(turn, "Yes.", "No.", text, prompt_text=text)
        for turn, text in zip(turns, prompts, strict=True)
    ]
    tokenizer = load()
    with _renderer(set_chat_template(tokenizer, data)) as renderer:
        found = [tokens for _, tokens in tokenize_pairs(pairs, renderer, tokenizer, data)]
    return [
        [] if isinstance(tokens, str) else list(tokens.chosen_ids[: tokens.chosen_start])
        for tokens in found
    ]


def _renderer(template: Template) -> Renderer:
    """Plain text needs no template, and a template is not trusted with this process."""
    return Renderer(template) if template.text is None else LimitedRenderer(template)


def _shown_samples(
    pairs: Sequence[Pair], renderer: Renderer, tokenizer: Any, data: DataSection
) -> list[dict[str, Any]]:
    """Pairs as segments of text, for a person to read; a pair that cannot be rendered is not among them."""
    end = end_token_id(renderer, tokenizer)
    renderer.send(pairs)
    rows = []
    for pair, texts in zip(pairs, renderer.receive(), strict=True):
        if isinstance(texts, PairTexts):
            sides = show_texts(texts, tokenizer, data, end).items()
            rows.append(
                {"where": pair.where}
                | {side: [asdict(piece) for piece in pieces] for side, pieces in sides}
            )
    return rows
