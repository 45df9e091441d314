"""The cache of tokens: what was written is read again, what is not whole is never read, and it
stays small."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ragged_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orpo_lite.data import cache
from orpo_lite.data.cache import NUMBERS, TokenizedPairs
from orpo_lite.data.pair import TokenizedPair, common_prefix
from orpo_lite.data.split import hold_out

KEY = "0123456789abcdef" * 2
FACTS = {"format": ["détecté"], "largest_id": [9, "x"], "nested": {"a": [1, None]}}


def some_pairs(count: int) -> list[TokenizedPair]:
    """Pairs of random tokens, two to a prompt, some of them cut."""
    return [
        replace(
            pair,
            rejected_start=pair.rejected_start - index % 2,
            where=f"pairs.jsonl:{index}é",
            prompt=bytes([index // 2] * 16),
            chosen_cut=index % 3,
            rejected_cut=index % 5,
        )
        for index, pair in enumerate(ragged_pairs(count))
    ]


def write(pairs: Sequence[TokenizedPair], key: str = KEY, facts: Any = FACTS) -> TokenizedPairs:
    with cache.new_entry(key) as writer:
        for pair in pairs:
            writer.add(pair)
        writer.close(facts)
    loaded = cache.load(key)
    assert loaded is not None
    return loaded


def plain(pair: TokenizedPair) -> dict[str, Any]:
    values = {field.name: getattr(pair, field.name) for field in fields(pair)}
    return values | {name: list(map(int, values[name])) for name in ("chosen_ids", "rejected_ids")}


def check_equal(found: Sequence[TokenizedPair], expected: Sequence[TokenizedPair]) -> None:
    assert len(found) == len(expected)
    assert [plain(pair) for pair in found] == [plain(pair) for pair in expected]


def names(folder: Path) -> list[str]:
    """What stands in the cache, but for the locks."""
    return sorted(child.name for child in folder.iterdir() if child.suffix != ".lock")


pytestmark = pytest.mark.usefixtures("token_cache")


# --- what was written is read again


def test_pairs_come_back_as_they_were() -> None:
    pairs = some_pairs(30)
    found = write(pairs)
    check_equal(found, pairs)
    assert found.facts == FACTS
    assert found[0].chosen_ids.dtype == np.int32  # type: ignore[union-attr]
    assert found.prompts() == [pair.prompt for pair in pairs]
    for name in NUMBERS[2:]:
        assert found.column(name).tolist() == [getattr(pair, name) for pair in pairs]
    assert found.column("chosen_tokens").tolist() == [len(pair.chosen_ids) for pair in pairs]
    prefixes = [
        common_prefix(np.array(pair.chosen_ids), np.array(pair.rejected_ids)) for pair in pairs
    ]
    assert found.column("prefix").tolist() == prefixes


SIDE = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
PLACE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=9)


@given(
    st.lists(
        st.tuples(SIDE, SIDE, PLACE, st.binary(min_size=16, max_size=16)), min_size=1, max_size=9
    )
)
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_any_pairs_come_back(drawn: list[tuple[list[int], list[int], str, bytes]]) -> None:
    pairs = [TokenizedPair(*sides, 1, 2, where, prompt, 3, 4) for *sides, where, prompt in drawn]
    check_equal(write(pairs), pairs)


def test_it_is_a_sequence() -> None:
    pairs = some_pairs(20)
    found = write(pairs)
    for index in (0, 7, 19, -1, -20):
        check_equal([found[index]], [pairs[index]])
    for index in (20, -21):
        with pytest.raises(IndexError):
            found[index]
    for cut in (
        slice(None),
        slice(3, 9),
        slice(None, None, -1),
        slice(15, 99),
        slice(-4, None),
        slice(9, 3),
    ):
        check_equal(found[cut], pairs[cut])
    check_equal(list(found), pairs)
    chosen = found.select([5, 1, 1, 19])
    check_equal(chosen, [pairs[i] for i in (5, 1, 1, 19)])
    check_equal(chosen[1:].select([2, 0]), [pairs[19], pairs[1]])  # a view of a view
    check_equal([chosen[-1]], [pairs[19]])
    assert chosen.column("chosen_start").tolist() == [pairs[i].chosen_start for i in (5, 1, 1, 19)]
    assert chosen.prompts() == [pairs[i].prompt for i in (5, 1, 1, 19)]
    assert chosen.facts is found.facts
    assert len(found.select([])) == 0
    assert list(found.select([])) == []
    assert len(found) == 20  # views leave it as it was


def test_a_held_out_side_is_a_view() -> None:
    pairs = some_pairs(24)
    found = write(pairs)
    train, test = (
        found.select(rows) for rows in hold_out(range(len(found)), found.prompts(), 0.25, 0)
    )
    assert (len(train), len(test)) == (18, 6)
    assert not set(train.prompts()) & set(test.prompts())
    sides = hold_out(pairs, [pair.prompt for pair in pairs], 0.25, 0)
    for side, expected in zip((train, test), sides, strict=True):
        check_equal(side, expected)


def test_the_files_are_plain_arrays(token_cache: Path) -> None:
    pairs = some_pairs(10)
    write(pairs)
    folder = token_cache / KEY
    assert sorted(file.name for file in folder.iterdir()) == [
        "entry.json",
        "ids.bin",
        "pairs.bin",
        "places.txt",
    ]
    ids = [i for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids) for i in side]
    assert np.fromfile(folder / "ids.bin", "<i4").tolist() == ids
    records = np.fromfile(folder / "pairs.bin", cache.PAIR)
    assert records.dtype.itemsize == 4 * (len(NUMBERS) + 1) + 16
    assert records["chosen_cut"].tolist() == [pair.chosen_cut for pair in pairs]
    assert (folder / "places.txt").read_text("utf-8") == "".join(
        f"{pair.where}\n" for pair in pairs
    )


def test_a_line_break_in_a_place_becomes_a_space() -> None:
    found = write([replace(pair, where="a\nb:1") for pair in some_pairs(3)])
    assert [pair.where for pair in found] == ["a b:1"] * 3


def test_the_largest_token_is_known() -> None:
    with cache.new_entry(KEY) as writer:
        assert writer.largest == (-1, "")
        for ids, where in (([3, 4], "x:1"), ([9, 1], "x:2"), ([9], "x:3")):
            writer.add(TokenizedPair([1], ids, 0, 0, where, bytes(16)))
        assert (writer.largest, len(writer)) == ((9, "x:2"), 3)
        writer.close(FACTS)


# --- what is not whole is never read


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0b100
    file.write_bytes(data)


@pytest.mark.parametrize("name", cache.FILES)
def test_a_changed_byte_is_seen(token_cache: Path, name: str) -> None:
    pairs = some_pairs(9)
    write(pairs)
    file = token_cache / KEY / name
    for at in (0, 9, 100, file.stat().st_size // 2, file.stat().st_size - 1):
        flip(file, at)
        assert cache.load(KEY) is None, at
        flip(file, at)
        assert cache.load(KEY) is not None, at
    whole = file.read_bytes()
    for changed in (whole[:-1], whole + b"\0", b""):
        file.write_bytes(changed)
        assert cache.load(KEY) is None
        file.write_bytes(whole)
    file.unlink()
    assert cache.load(KEY) is None
    check_equal(write(pairs), pairs)  # it is made anew


ENTRIES = [
    "",
    "{",
    "{}",
    "[]",
    "3",
    "null",
    '{"sha256": {}}',
    '{"sha256": [], "facts": 1}',
    '{"sha256": null}',
    "\udcff",
]


@pytest.mark.parametrize("text", ENTRIES)
def test_a_broken_entry_is_not_read(token_cache: Path, text: str) -> None:
    write(some_pairs(6))
    file = token_cache / KEY / "entry.json"
    whole = json.loads(file.read_text("utf-8"))
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert cache.load(KEY) is None
    for key in whole:
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        assert cache.load(KEY) is None
    file.unlink()
    assert cache.load(KEY) is None


def test_an_entry_is_whole_or_none(token_cache: Path) -> None:
    write(some_pairs(6))
    file = token_cache / KEY / "entry.json"
    entry = json.loads(file.read_text("utf-8"))
    for name in entry["sha256"]:  # nothing goes without its sum, the facts neither
        sums = {other: sha256 for other, sha256 in entry["sha256"].items() if other != name}
        file.write_text(json.dumps(entry | {"sha256": sums}))
        assert cache.load(KEY) is None
    file.write_text(json.dumps(entry | {"facts": FACTS | {"format": ["detecte"]}}))
    assert cache.load(KEY) is None
    file.write_text(json.dumps(entry))
    assert cache.load(KEY) is not None


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, GeneratorExit, OSError(28, "No space left")]
)
def test_an_error_leaves_nothing(token_cache: Path, error: Any) -> None:
    for close in (False, True):
        with (
            pytest.raises(error if isinstance(error, type) else OSError),
            cache.new_entry(KEY) as writer,
        ):
            writer.add(some_pairs(1)[0])
            if close:
                writer.close(FACTS)
            raise error
        assert names(token_cache) == []
        assert cache.load(KEY) is None


def test_an_error_leaves_the_entry_that_was_there() -> None:
    pairs = some_pairs(5)
    write(pairs)
    with pytest.raises(ValueError, match="stop"), cache.new_entry(KEY) as writer:
        writer.add(pairs[0])
        raise ValueError("stop")
    found = cache.load(KEY)
    assert found is not None
    check_equal(found, pairs)


CHILD = """
import sys, time
from orpo_lite.data import cache
from orpo_lite.data.pair import TokenizedPair
KEY = sys.argv[1]
PAIRS = [TokenizedPair([1, 2, i], [1, 3], 1, 1, f"x:{i}", bytes(16)) for i in range(9)]
"""


def start(code: str) -> "subprocess.Popen[str]":
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CHILD + code, KEY], **options)


def test_a_process_that_is_killed_leaves_nothing_that_is_read(token_cache: Path) -> None:
    code = (
        "with cache.locked(KEY), cache.new_entry(KEY) as writer:\n"
        "    [writer.add(pair) for pair in PAIRS]\n"
        "    [stream.flush() for stream in writer._streams]\n    print('half', flush=True)\n    "
        "time.sleep(60)"
    )
    with start(code) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "half\n"
        (left,) = names(token_cache)
        running.kill()
    assert left.startswith(f".{KEY}-")
    assert cache.load(KEY) is None
    with cache.locked(KEY):  # the lock went with the process
        check_equal(write(some_pairs(2)), some_pairs(2))
    assert names(token_cache) == [left, KEY]  # it may be another's that is still at work
    long_ago = time.time() - 2 * cache.DAY
    os.utime(token_cache / left, (long_ago, long_ago))
    write(some_pairs(2))
    assert names(token_cache) == [KEY]


def test_several_processes_make_an_entry_once(token_cache: Path) -> None:
    code = (
        "print('ready', flush=True); sys.stdin.readline()\n"
        "with cache.locked(KEY):\n"
        "    if cache.load(KEY) is None:\n"
        "        print('made')\n"
        "        with cache.new_entry(KEY) as writer:\n"
        "            [writer.add(pair) for pair in PAIRS]\n"
        "            time.sleep(0.2)\n"
        "            writer.close({})\n"
        "print(len(cache.load(KEY)))"
    )
    running = [start(code) for _ in range(3)]
    for process in running:
        assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    for process in running:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    said = [process.communicate()[0].split() for process in running]
    assert sorted(said) == [["9"], ["9"], ["made", "9"]]
    assert names(token_cache) == [KEY]


def test_a_lock_of_another_key_does_not_wait() -> None:
    with cache.locked(KEY), cache.locked(KEY[::-1]):
        pass


# --- it stays small


def keys(count: int) -> list[str]:
    return [f"{index:032x}" for index in range(count)]


def test_entries_that_are_not_used_make_room(
    token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    pairs = some_pairs(8)
    first, second, third, fourth, fifth = keys(5)
    held = {}
    for age, key in enumerate((first, second, third)):
        with cache.locked(key):
            held[key] = write(pairs, key)
        os.utime(token_cache / key, (1000 + age, 1000 + age))
    assert cache.load(first) is not None  # used now
    write(pairs, fourth)
    assert names(token_cache) == [first, third, fourth]
    assert not (token_cache / f"{second}.lock").exists()
    write(pairs, fifth)
    assert names(token_cache) == [first, fourth, fifth]
    for key in (second, third):  # who reads one goes on reading
        check_equal(held[key], pairs)
        assert cache.load(key) is None
    assert cache.MAX_ENTRIES == 3


def test_nothing_but_entries_is_ever_removed(
    token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable may name a folder that holds other things."""
    monkeypatch.setattr(cache, "MAX_ENTRIES", 1)
    others = [".ssh", "photos", "0" * 31, "0" * 33, ".config-2", "G" * 32]
    for name in others:
        (token_cache / name).mkdir()
        (token_cache / name / "mine").touch()
        os.utime(token_cache / name, (1000, 1000))
    (token_cache / ("f" * 32 + ".txt")).touch()
    for key in keys(3):
        write(some_pairs(1), key)
    assert names(token_cache) == sorted([*others, "f" * 32 + ".txt", keys(3)[-1]])
    assert all((token_cache / name / "mine").exists() for name in others)


# --- where it stands


def unwritable(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").touch()
    found = [tmp_path / "file" / "tokens", Path("/proc/tokens")]
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        found += [tmp_path / "closed", tmp_path / "closed" / "tokens"]
    return found


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    for folder in unwritable(tmp_path):
        monkeypatch.setenv(cache.VARIABLE, str(folder))
        cache.cache_folder.cache_clear()
        found = cache.cache_folder()
        assert found.parent == tmp_path
        assert found.name.startswith("orpo-lite-tokens-")
        assert cache.cache_folder() == found  # one for the whole session
        check_equal(write(some_pairs(3)), some_pairs(3))


def test_the_folder_is_the_persons_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache.cache_folder.cache_clear()
    assert cache.cache_folder() == tmp_path / "cache" / "orpo-lite" / "tokens"
    assert cache.cache_folder().stat().st_mode & 0o077 == 0  # tokens are as private as the text
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    cache.cache_folder.cache_clear()
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "orpo-lite" / "tokens"
    monkeypatch.setenv(cache.VARIABLE, "~/other")
    cache.cache_folder.cache_clear()
    assert cache.cache_folder() == tmp_path / "home" / "other"


# --- the key


def test_the_key_changes_with_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, Any] = {"one": [1, 2], "two": {"a": None, "b": "x"}}
    key = cache.make_key(**parts)
    assert key == cache.make_key(**dict(reversed(parts.items())))
    assert cache.ENTRY.fullmatch(key)
    others = [
        parts | {"one": [2, 1]},
        parts | {"two": {"a": 0, "b": "x"}},
        {"one": [1, 2]},
        parts | {"three": None},
    ]
    found = {key, *(cache.make_key(**other) for other in others)}
    monkeypatch.setattr(cache, "_code", lambda: "other code")
    found.add(cache.make_key(**parts))
    monkeypatch.setattr(cache, "version", lambda _: "0.0")
    found.add(cache.make_key(**parts))
    assert len(found) == 1 + len(others) + 2


def test_the_sum_of_a_tokenizer(tmp_path: Path) -> None:
    files = [
        "tokenizer.json",
        "tokenizer_config.json",
        "spiece.model",
        "vocab.txt",
        "chat_template.jinja",
    ]
    files.append("additional_chat_templates/rag.jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    for name in files:
        (tmp_path / name).write_text(name)
    before = cache.tokenizer_sha256(tmp_path)
    found = {before}
    for name in files:
        (tmp_path / name).write_text("changed")
        found.add(cache.tokenizer_sha256(tmp_path))
        (tmp_path / name).write_text(name)
    (tmp_path / "merges.txt").touch()
    found.add(cache.tokenizer_sha256(tmp_path))
    (tmp_path / "merges.txt").unlink()
    assert len(found) == len(files) + 2
    for name in ("model.safetensors", "generation_config.json", "README.md", "trainer_state.json"):
        (tmp_path / name).write_text("no part of it")
    assert cache.tokenizer_sha256(tmp_path) == before


def test_the_newest_entry_stays_whatever_the_clock_says(token_cache: Path) -> None:
    """Where the clock has gone back since, all others look newer."""
    for key in keys(cache.MAX_ENTRIES):
        write(some_pairs(1), key)
        os.utime(token_cache / key, (time.time() + 60, time.time() + 60))
    check_equal(write(some_pairs(2)), some_pairs(2))


def test_code_in_any_folder_of_the_package_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else tokens that older code made would be taken for those of today."""
    reader, loader = tmp_path / "data" / "formats" / "readers.py", tmp_path / "base" / "find.py"
    for file in (reader, loader):
        file.parent.mkdir(parents=True)
        file.write_text("", encoding="utf-8")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "data" / "cache.py"))
    keys = []
    for file, text in ((reader, ""), (reader, "one"), (reader, "other"), (loader, "one")):
        file.write_text(text, encoding="utf-8")
        cache._code.cache_clear()
        keys.append(cache.make_key())
    cache._code.cache_clear()
    assert len(set(keys)) == 4
