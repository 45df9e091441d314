"""What is known before weights load: sides from the cache, their figures, the preview, and a disk
that is full."""

import json
import math
import resource
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
from conftest import byte_tokenizer, write_pairs

from orpo_lite.base.find import load_tokenizer
from orpo_lite.data import cache
from orpo_lite.data import dataset as data_dataset
from orpo_lite.data.cache import TokenizedPairs
from orpo_lite.data.chat_template import SPECIAL, set_chat_template
from orpo_lite.data.pair import EMPTY_CHOSEN, Pair, TokenizedPair
from orpo_lite.data.pairs import EQUAL, MAX_PLACES, PairReader
from orpo_lite.data.prepare import find_sources, tokenized_splits
from orpo_lite.data.render_process import LimitedRenderer, Renderer
from orpo_lite.data.split import prompt_key
from orpo_lite.data.statistics import PADDED_BATCH, QUANTILES, SHUFFLES
from orpo_lite.data.tokenize import EQUAL_CUT, LONG_PROMPT, tokenize_pairs
from orpo_lite.errors import DataError, FitError, ModelError
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.runs.inputs import _check_ids, prepare_inputs, preview, with_absolute_paths
from orpo_lite.updates import Update, run_to_end

Build = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("token_cache", "rendered_here")


@pytest.fixture
def rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates are rendered in this process, which takes no second to start."""
    monkeypatch.setattr(data_dataset, "LimitedRenderer", Renderer)


def sides(
    recipe: Recipe, show: Callable[[Update], object] = lambda _: None
) -> tuple[TokenizedPairs, TokenizedPairs, Any]:
    return run_to_end(tokenized_splits(recipe, Path("base"), *find_sources(recipe.data)), show)


def ids(pairs: TokenizedPairs) -> list[tuple[list[int], list[int]]]:
    return [(list(pair.chosen_ids), list(pair.rejected_ids)) for pair in pairs]


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.suffix != ".lock")


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(prompt: str, chosen: str = "Blue.", rejected: str = "Seven.") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# --- a set is tokenised once


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A place for each pair that goes through the tokenizer."""
    places: list[str] = []

    def count(pairs: Any, *rest: Any) -> Iterator[Any]:
        for pair, tokens in tokenize_pairs(pairs, *rest):
            places.append(pair.where)
            yield pair, tokens

    monkeypatch.setattr(data_dataset, "tokenize_pairs", count)
    return places


@pytest.mark.parametrize("template", ["auto", "none"])
def test_a_second_start_does_not_tokenise(
    small_recipe: Build, tokenised: list[str], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_dataset, "LimitedRenderer", LimitedRenderer)
    recipe = small_recipe(f"data.chat_template={template}")
    train, test, found = sides(recipe)
    assert tokenised == [f"pairs.jsonl:{line}" for line in range(1, 41)]
    assert (len(train), len(test)) == (32, 8)
    again, test_again, found_again = sides(recipe)
    assert len(tokenised) == 40
    assert (ids(again), ids(test_again)) == (ids(train), ids(test))
    assert json.dumps(found_again) == json.dumps(found)
    # Another split is another view of the same entry.
    other, _, _ = sides(
        small_recipe(f"data.chat_template={template}", "training.seed=7", "data.test_split_size=4")
    )
    assert len(tokenised) == 40
    assert len(other) == 36


def test_both_sides_are_cached(
    small_recipe: Build, tokenised: list[str], token_cache: Path
) -> None:
    write_pairs(Path("held.jsonl"), 5, seed=1)
    recipe = small_recipe("data.dataset_test_split=held.jsonl")
    train, test, found = sides(recipe)
    assert (len(train), len(test), len(tokenised), found["rows_read"]) == (40, 5, 45, 45)
    sides(recipe)
    assert len(tokenised) == 45
    write_pairs(Path("held.jsonl"), 6, seed=1)  # the other side stays
    sides(recipe)
    assert len(tokenised) == 45 + 6
    assert len(names(token_cache)) == 3


def test_an_entry_that_broke_is_made_anew(
    small_recipe: Build, tokenised: list[str], token_cache: Path
) -> None:
    before, _, found = sides(small_recipe())
    (name,) = names(token_cache)
    file = token_cache / name / "ids.bin"
    file.write_bytes(file.read_bytes()[:-4])
    after, _, found_again = sides(small_recipe())
    assert len(tokenised) == 80
    assert (ids(after), found_again) == (ids(before), found)
    assert names(token_cache) == [name]


class KeyFound(Exception):  # noqa: N818 - not an error
    pass


def key_of(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> str:
    """The key that the training side is looked up by."""

    def stop(key: str) -> Any:
        raise KeyFound(key)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "locked", stop)
        with pytest.raises(KeyFound) as raised:
            sides(recipe)
    return str(raised.value)


CHANGES = [
    "data.max_length=127",
    "data.max_prompt_length=95",
    "data.chat_template=none",
    "data.chat_template=paper.jinja",
    "data.chat_template_kwargs={mood: calm}",
    "data.format=explicit",
    "data.column_map={prompt: prompt}",
    "data.max_samples=39",
    "data.dataset_name=copy.jsonl",
    "data.dataset_name=copy.jsonl,pairs.jsonl",
]
NO_CHANGES = [
    "training.seed=7",
    "data.test_split_size=0.5",
    "training.learning_rate=1e-4",
    "data.dataset_test_split=copy.jsonl",
]


def test_the_key_is_of_all_that_tokens_depend_on(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("paper.jinja").write_text("{{ messages }}")
    Path("copy.jsonl").write_bytes(
        Path("pairs.jsonl").read_bytes() + b"\n"
    )  # a row more, or the same pairs
    key = key_of(small_recipe(), monkeypatch)
    assert [
        change for change in NO_CHANGES if key_of(small_recipe(change), monkeypatch) != key
    ] == []
    keys = {change: key_of(small_recipe(change), monkeypatch) for change in CHANGES} | {"": key}
    assert len(set(keys.values())) == len(keys)
    Path("paper.jinja").write_text("{{ messages }} ")  # the same name with another content
    keys["file"] = key_of(small_recipe("data.chat_template=paper.jinja"), monkeypatch)
    text = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(text.replace("Item 39", "Item 93"))
    keys["row"] = key_of(small_recipe(), monkeypatch)
    Path("pairs.jsonl").write_text(text)
    assert key_of(small_recipe(), monkeypatch) == key
    config = json.loads(Path("base/tokenizer_config.json").read_text())
    Path("base/tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": "{{ messages }}"})
    )
    keys["tokenizer"] = key_of(small_recipe(), monkeypatch)
    assert len(set(keys.values())) == len(keys)


# --- what is found


def test_what_is_left_out_is_counted_and_placed(small_recipe: Build) -> None:
    rows = [row(f"Question {i}?") for i in range(10)]
    rows += [
        row("a"),
        row("b", ""),
        row("c", "same", "same"),
        row("d" * 97),
        row("e", "</s>"),
        row("f" * 90, "g" * 99),
    ]
    write_rows("pairs.jsonl", rows)
    _, _, found = sides(small_recipe("data.test_split_size=0"))
    assert found["dropped"] == {
        EMPTY_CHOSEN: {"pairs": 1, "first": ["pairs.jsonl:12"]},
        EQUAL: {"pairs": 1, "first": ["pairs.jsonl:13"]},
        f"{SPECIAL}: </s>": {"pairs": 1, "first": ["pairs.jsonl:15"]},
        LONG_PROMPT: {"pairs": 2, "first": ["pairs.jsonl:14", "pairs.jsonl:16"]},
    }
    assert (found["rows_read"], found["train_pairs"]) == (16, 11)


def test_nothing_left_is_refused_with_all_reasons(small_recipe: Build, token_cache: Path) -> None:
    write_rows(
        "pairs.jsonl", [row("a"), row("b", ""), row("c" * 97), row("d", "123456789", "123456780")]
    )
    with pytest.raises(DataError, match="every pair was left out") as raised:
        sides(
            small_recipe("data.chat_template=none", "data.max_length=8", "data.max_prompt_length=1")
        )
    for line in (f"1  {EMPTY_CHOSEN}", f"3  {LONG_PROMPT}"):
        assert line in str(raised.value)
    write_rows("pairs.jsonl", [row("b", ""), row("c" * 97), row("d", "123456789", "123456780")])
    with pytest.raises(DataError, match="every pair was left out") as raised:
        sides(
            small_recipe("data.chat_template=none", "data.max_length=8", "data.max_prompt_length=4")
        )
    for line in (f"1  {EMPTY_CHOSEN}", f"1  {LONG_PROMPT}", f"1  {EQUAL_CUT}"):
        assert line in str(raised.value)
    assert names(token_cache) == []


def test_faulty_rows_leave_no_entry(small_recipe: Build, token_cache: Path) -> None:
    faulty = {"prompt": "q", "chosen": 3, "rejected": "a"}
    write_rows("pairs.jsonl", [*(row(f"{i}?") for i in range(300)), *[faulty] * 4])
    for _ in range(2):
        with pytest.raises(DataError, match="4 of 304 rows cannot be read"):
            sides(small_recipe())
        assert names(token_cache) == []


def test_few_pairs_are_put_down_to_the_rows_that_were_left_out(small_recipe: Build) -> None:
    write_rows("pairs.jsonl", [row("One?"), {"prompt": "q", "chosen": "", "rejected": "a"}])
    with pytest.raises(
        DataError, match=r"1 of 2 rows were left out: 1 empty chosen \(first pairs.jsonl:2\)"
    ) as raised:
        sides(small_recipe())
    assert "For the other rows: a size of 0.2 holds out every pair (pairs: 1, " in str(raised.value)
    assert raised.value.fix.values == {"data.test_split_size": 0}  # type: ignore[attr-defined]


def test_shared_prompts_are_said(small_recipe: Build) -> None:
    write_rows("pairs.jsonl", [row("One?"), row("Two?"), row("Three?")])
    write_rows("held.jsonl", [row("  two? "), row("Four?"), row("Two?", "Red.")])
    recipe = small_recipe("data.dataset_test_split=held.jsonl")
    said: list[Update] = []
    ready = run_to_end(prepare_inputs(recipe), said.append)
    assert ready.figures["prompts"] == {"train": 3, "held_out": 2, "shared": 1}
    (warning,) = [update.text for update in said if "warning" in update.text]
    assert "1 of 2 held-out prompts are also in the training set" in warning


def test_a_stop_in_the_middle_leaves_nothing(
    small_recipe: Build, token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_dataset, "LimitedRenderer", LimitedRenderer)
    write_pairs(Path("pairs.jsonl"), 600)
    threads, processes = threading.active_count(), psutil.Process().children()
    for stop in (GeneratorExit, KeyboardInterrupt):
        recipe = small_recipe()
        updates = tokenized_splits(recipe, Path("base"), *find_sources(recipe.data))
        update = next(updates)
        while not (update.text == "tokenizing" and update.step > 200):
            update = next(updates)
        assert update.steps == 600
        assert len(names(token_cache)) == 1  # half an entry
        with pytest.raises(stop):
            updates.throw(stop())
        assert names(token_cache) == []
        assert psutil.Process().children() == processes
        assert threading.active_count() == threads


# --- the figures, computed once more in the plain way

WORDS = ["red", "blue", "a rather long word", "🦜", "x" * 40]


def uneven_rows(count: int) -> list[dict[str, str]]:
    texts = [
        " ".join(WORDS[(i * k) % 5] for k in range(1, 2 + i % 4)).replace("🦜", "!")
        for i in range(count)
    ]
    rows = [
        row(f"Item {i // 3}: {texts[i]}?", texts[i - 1] + ".", texts[i - 2] + f" {i}!")
        for i in range(count)
    ]
    return [*rows, row("e", ""), row("f" * 99)]


def nearest(values: list[int], share: int) -> set[int]:
    """The value at that share of the way from the least to the greatest, or either of two that are
    as near."""
    at, ordered = (len(values) - 1) * share / 100, sorted(values)
    if at % 1 == 0.5:
        return {ordered[math.floor(at)], ordered[math.ceil(at)]}
    return {ordered[round(at)]}


@pytest.mark.parametrize("held", ["split off", "a set of its own"])
def test_the_figures_are_those_of_the_rows(small_recipe: Build, held: str) -> None:
    write_rows("pairs.jsonl", uneven_rows(101))
    write_rows("held.jsonl", uneven_rows(17))
    own = ["data.dataset_test_split=held.jsonl"] if held == "a set of its own" else []
    recipe = small_recipe("data.max_length=90", "data.max_prompt_length=80", *own)
    train, test, found = sides(recipe)

    tokenizer = byte_tokenizer()
    long = recipe.data.model_copy(update={"max_length": 10_000})
    template = set_chat_template(tokenizer, long)
    reads = [PairReader(long, sources) for sources in find_sources(recipe.data) if sources]
    pairs: list[tuple[Pair, TokenizedPair]] = []
    left_out: dict[str, list[str]] = {}
    for reader in reads:
        for pair, tokens in tokenize_pairs(reader, Renderer(template), tokenizer, long):
            if isinstance(tokens, TokenizedPair):
                pairs.append((pair, tokens))
            else:
                left_out.setdefault(tokens, []).append(pair.where)
    whole = {
        pair.where: [list(tokens.chosen_ids), list(tokens.rejected_ids)] for pair, tokens in pairs
    }
    assert len(whole) == len(pairs)
    starts = {pair.where: (tokens.chosen_start, tokens.rejected_start) for pair, tokens in pairs}
    places = [tokens.where for side in (train, test) for tokens in side]
    assert sorted(places) == sorted(whole)
    cut = {where: [max(0, len(side) - 90) for side in both] for where, both in whole.items()}
    for tokens in [*train, *test]:
        assert [list(tokens.chosen_ids), list(tokens.rejected_ids)] == [
            side[:90] for side in whole[tokens.where]
        ]
        assert [tokens.chosen_cut, tokens.rejected_cut] == cut[tokens.where]

    lengths = {
        "prompt": [starts[where][0] for where in places],
        "chosen": [len(whole[where][0]) - starts[where][0] for where in places],
        "rejected": [len(whole[where][1]) - starts[where][1] for where in places],
    }
    for name, values in lengths.items():
        figures = found["tokens"][name]
        assert figures["mean"] == pytest.approx(sum(values) / len(values), abs=0.051)
        assert (figures["min"], figures["max"]) == (min(values), max(values))
        for share in QUANTILES:
            assert figures[f"p{share}"] in nearest(values, share), (name, share)
    some = [where for where in places if any(cut[where])]
    assert 0 < len(some) < len(places)
    without_end = sum(tokens > 0 for where in places for tokens in cut[where])
    assert found["cut"] == {
        "pairs": len(some),
        "pairs_share": pytest.approx(len(some) / len(places)),
        "responses_without_end": without_end,
        "responses_without_end_share": pytest.approx(without_end / (2 * len(places))),
    }
    by_length = Counter(
        (one > other) - (one < other)
        for one, other in zip(lengths["chosen"], lengths["rejected"], strict=True)
    )
    assert found["chosen_longer"] == pytest.approx(by_length[1] / len(places))
    assert found["rejected_longer"] == pytest.approx(by_length[-1] / len(places))
    keys = {pair.where: prompt_key(pair) for pair, _ in pairs}
    prompts = [{keys[tokens.where] for tokens in side} for side in (train, test)]
    shared = len(prompts[0] & prompts[1])
    assert found["prompts"] == {
        "train": len(prompts[0]),
        "held_out": len(prompts[1]),
        "shared": shared,
    }
    assert (shared > 0) == (held == "a set of its own")

    kept = [[side[:90] for side in whole[where]] for where in places]
    prefixes = [
        next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), 90)
        for both in kept
    ]
    padded = 0
    for seed in range(SHUFFLES):
        longest = (
            np.random.default_rng(seed).permutation([max(map(len, both)) for both in kept]).tolist()
        )
        for at in range(0, len(longest), PADDED_BATCH):
            batch = longest[at : at + PADDED_BATCH]
            padded += 2 * len(batch) * max(batch)
    total = sum(len(side) for both in kept for side in both)
    assert found["step"] == {
        f"tokens_per_pair_padded_in_batches_of_{PADDED_BATCH}": pytest.approx(
            padded / SHUFFLES / len(kept), abs=0.051
        ),
        "tokens_per_pair_without_padding": pytest.approx(total / len(kept), abs=0.051),
        "tokens_per_pair_prompt_shared": pytest.approx(
            (total - sum(prefixes)) / len(kept), abs=0.051
        ),
    }

    assert (found["train_pairs"], found["held_out_pairs"]) == (len(train), len(test))
    assert found["rows_read"] == sum(reader.read for reader in reads) == 103 + 19 * bool(own)
    assert sum(found["rows_of_sets"]) == 103
    assert len(found["rows_of_sets"]) == len(recipe.data.names)
    assert list(left_out) == [LONG_PROMPT]
    assert found["dropped"][LONG_PROMPT]["pairs"] == len(left_out[LONG_PROMPT]) > 2 * MAX_PLACES
    of_each = [
        [where for where in left_out[LONG_PROMPT] if where.startswith(name)][:MAX_PLACES]
        for name in ("p", "h")
    ]
    assert found["dropped"][LONG_PROMPT]["first"] == [
        where for wheres in of_each for where in wheres
    ]
    empty = ["pairs.jsonl:102", *(["held.jsonl:18"] if own else [])]
    assert found["dropped"][EMPTY_CHOSEN] == {"pairs": len(empty), "first": empty}
    assert len(places) + len(left_out[LONG_PROMPT]) + len(empty) == found["rows_read"]
    assert found["format"] == list(
        dict.fromkeys(sentence for reader in reads for sentence in reader.detected)
    )
    assert found["chat_template"] == template.description


def test_the_hash_is_of_the_pairs(small_recipe: Build) -> None:
    _, _, found = sides(small_recipe())
    Path("other.jsonl").write_bytes(b"\n" + Path("pairs.jsonl").read_bytes())
    assert sides(small_recipe("data.dataset_name=other.jsonl"))[2]["sha256"] == found["sha256"]
    write_pairs(Path("other.jsonl"), 41)
    assert sides(small_recipe("data.dataset_name=other.jsonl"))[2]["sha256"] != found["sha256"]


def test_without_a_held_out_side(small_recipe: Build) -> None:
    train, test, found = sides(small_recipe("data.test_split_size=0"))
    assert (len(train), len(test)) == (40, 0)
    assert found["prompts"] == {"train": 40, "held_out": 0, "shared": 0}


# --- the preview


def joined(sample: dict[str, Any], side: str) -> list[tuple[str, str]]:
    return [(piece["kind"], piece["text"]) for piece in sample[side]]


def test_the_preview_shows_the_first_pair_and_the_first_that_is_cut(small_recipe: Build) -> None:
    write_rows(
        "pairs.jsonl",
        [row("", "left out", "left out"), row("One?"), row("Two?", "b" * 150), row("Three?")],
    )
    shown = run_to_end(preview(small_recipe("data.test_split_size=0")), lambda _: None)
    first, cut = shown.samples["first"], shown.samples["cut"]
    assert (first["where"], cut["where"], shown.warnings) == ("pairs.jsonl:2", "pairs.jsonl:3", [])
    asked = "<|user|>\nOne?</s>\n<|assistant|>\n"
    assert joined(first, "chosen") == [
        ("prompt", "<s>" + asked),
        ("response", "Blue."),
        ("end", "</s>"),
    ]
    assert joined(first, "rejected") == [
        ("prompt", "<s>" + asked),
        ("response", "Seven."),
        ("end", "</s>"),
    ]
    (_, prompt), (_, reply), (kind, rest) = joined(cut, "chosen")
    assert (reply + rest, kind) == ("b" * 150 + "</s>", "cut")
    tokenizer = load_tokenizer(Path("base"))
    assert len(tokenizer(prompt + reply, add_special_tokens=False).input_ids) == 128
    assert [kind for kind, _ in joined(cut, "rejected")] == ["prompt", "response", "end"]
    assert shown.figures["train_pairs"] == 3


def test_the_preview_shows_a_row(small_recipe: Build) -> None:
    write_rows(
        "pairs.jsonl",
        [row("One?"), row("Two?", ""), row("c" * 97), row("d", "a </s> b"), row("Five?")],
    )
    write_rows("held.jsonl", [row("Six?", "Held.")])
    recipe = small_recipe("data.dataset_test_split=held.jsonl")
    for place, dropped, chosen in (
        ("pairs.jsonl:1", None, "Blue."),
        ("pairs.jsonl:2", EMPTY_CHOSEN, ""),
        ("pairs.jsonl:3", LONG_PROMPT, "Blue."),
        ("pairs.jsonl:4", f"{SPECIAL}: </s>", None),
        ("held.jsonl:1", None, "Held."),
    ):
        shown = run_to_end(preview(recipe, place), lambda _: None).samples
        assert list(shown) == ["first"]
        assert (shown["first"]["where"], shown["first"]["dropped"]) == (place, dropped)
        if chosen is None:
            assert "chosen" not in shown["first"]  # it cannot be rendered
        else:
            pieces = dict(joined(shown["first"], "chosen"))
            assert pieces.get("response", "") + pieces.get("cut", "").removesuffix("</s>") == chosen


def test_the_preview_of_a_row_that_is_not_there(small_recipe: Build) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl:41: no such row in ./pairs.jsonl"):
        run_to_end(preview(small_recipe(), "pairs.jsonl:41"), lambda _: None)


def test_the_preview_warns_where_training_would_stop(small_recipe: Build, workspace: Path) -> None:
    config = json.loads(Path("base/config.json").read_text())
    for name, value, found in (
        ("vocab_size", 50, "but the model's embedding has 50 rows"),
        ("max_position_embeddings", 20, "base allows at most 20 (max_position_embeddings)"),
    ):
        Path("base/config.json").write_text(json.dumps(config | {name: value}))
        shown = run_to_end(preview(small_recipe()), lambda _: None)
        (warning,) = shown.warnings
        assert warning.startswith("training would stop: ")
        assert found in warning
        assert shown.figures["train_pairs"] == 32
        assert shown.samples["first"]["where"] == "pairs.jsonl:1"


def test_a_token_without_an_embedding_is_refused(small_recipe: Build) -> None:
    pairs, _, _ = sides(small_recipe("data.test_split_size=0"))
    largest, where = pairs.facts["largest_id"]
    assert largest == max(max(side) for both in ids(pairs) for side in both)
    (holder,) = [pair for pair in pairs if pair.where == where]
    assert largest in [*holder.chosen_ids, *holder.rejected_ids]
    _check_ids(pairs, largest + 1)
    _check_ids(pairs, None)
    with pytest.raises(
        ModelError,
        match=f"{where}: token id {largest}, but the model's embedding has {largest} rows",
    ):
        _check_ids(pairs, largest)


# --- a full disk


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file can be written beyond ``size``: what a full disk does, at a place of our choice."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "limit", "file"),
    [("pairs.jsonl", 60_000, "ids"), ("p" * 200 + ".jsonl", 300_000, "places")],
)
def test_a_full_disk_ends_with_the_fix(
    small_recipe: Build, token_cache: Path, name: str, limit: int, file: str
) -> None:
    recipe = small_recipe("data.chat_template=none", f"data.dataset_name={name}")
    write_rows(name, [row(f"{i}", "a", "b") for i in range(3000)])
    with file_limit(limit), pytest.raises(FitError, match="the disk is full") as raised:
        sides(recipe)
    assert raised.value.exit_code == 6
    assert f"set {cache.VARIABLE} to a folder on another disk" in str(raised.value)
    assert str(token_cache) in str(raised.value)
    assert names(token_cache) == []
    sides(recipe)
    (entry,) = names(token_cache)
    sizes = {path.stem: path.stat().st_size for path in (token_cache / entry).iterdir()}
    assert sizes[file] > limit  # it was this file that did not fit
    assert file == "ids" or sizes["ids"] < limit


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(
    small_recipe: Build, token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache.Writer, "add", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sides(small_recipe())
    assert names(token_cache) == []


def test_an_entry_that_cannot_be_read_again(
    small_recipe: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "load", lambda _: None)
    with pytest.raises(
        FitError, match="tokens were written to this folder, but they cannot be read"
    ):
        sides(small_recipe())


def test_a_folder_with_a_tokenizer_is_all_that_a_preview_needs(small_recipe: Build) -> None:
    Path("base/model.safetensors").unlink()
    assert run_to_end(preview(small_recipe()), lambda _: None).figures["train_pairs"] == 32


def test_names_with_commas_and_several_names(small_recipe: Any, workspace: Path) -> None:
    """A comma parts names, unless a file has one in its name; a run keeps them as absolute paths
    all the same."""
    (workspace / "co,mma").mkdir()
    for name in ("co,mma/a,b.jsonl", "c.jsonl"):
        shutil.copy(workspace / "pairs.jsonl", workspace / name)
    recipe = small_recipe("data.dataset_name=co,mma/a,b.jsonl")
    assert recipe.data.names == ["co,mma/a,b.jsonl"]
    (name,) = with_absolute_paths(recipe).data.names
    assert name == str(workspace / "co,mma" / "a,b.jsonl")
    both = small_recipe("data.dataset_name=c.jsonl, pairs.jsonl,some/set")
    assert both.data.names == ["c.jsonl", "pairs.jsonl", "some/set"]
    absolute = with_absolute_paths(both)
    assert absolute.data.names == [
        str(workspace / "c.jsonl"),
        str(workspace / "pairs.jsonl"),
        "some/set",
    ]
    (workspace / "written.yaml").write_text(absolute.to_yaml())
    assert load_recipe("./written.yaml").data.names == absolute.data.names
    pattern = with_absolute_paths(small_recipe("data.dataset_name=*.jsonl"))
    assert pattern.data.names == [str(workspace / "*.jsonl")]


def test_places_tell_files_of_one_name_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"one": "Blue.", "two": "Green.", "one/more": "Red."}
    for folder, chosen in rows.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jsonl").write_text(
            json.dumps({"prompt": "Name a colour.", "chosen": chosen, "rejected": "Seven."}) + "\n"
        )
    monkeypatch.chdir(tmp_path)
    data = DataSection(
        dataset_name=f"one/p.jsonl,{tmp_path}/two/p.jsonl",
        dataset_test_split=str(tmp_path / "one" / "more" / "p.jsonl"),
    )
    train, test = find_sources(data)
    places = {where: row["chosen"] for source in (*train, *test) for where, row in source.rows([])}
    assert places == {f"{folder}/p.jsonl:1": chosen for folder, chosen in rows.items()}
    reader = PairReader(data, [*train, *test])
    for folder, chosen in rows.items():
        for place in (f"{folder}/p.jsonl:1", f"{tmp_path}/{folder}/p.jsonl:1"):
            assert reader.find(place)[0].chosen == chosen
    with pytest.raises(DataError, match=r"3 rows in different folders match(.|\n)*fix: one/p"):
        reader.find("p.jsonl:1")
    alone, _ = find_sources(DataSection(dataset_name="one/p.jsonl"))
    assert [where for where, _ in alone[0].rows([])] == ["p.jsonl:1"]


def test_places_tell_splits_of_one_name_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list(
        [{"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: table)
    data = DataSection(
        dataset_name="a/x,a/y", dataset_train_split="train", dataset_test_split="test"
    )
    train, test = find_sources(data)
    places = [where for source in (*train, *test) for where, _ in source.rows([])]
    assert places == ["a/x/train[0]", "a/y/train[0]", "a/x/test[0]", "a/y/test[0]"]
    train, test = find_sources(
        DataSection(dataset_name="a/x", dataset_train_split="train", dataset_test_split="test")
    )
    assert [where for source in (*train, *test) for where, _ in source.rows([])] == [
        "train[0]",
        "test[0]",
    ]
