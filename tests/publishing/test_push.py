"""Pushes to a loopback server that speaks the hub's protocol: what arrives, what never does, and
every refusal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Answer, first_and_long, write_base, write_pairs
from hub_server import COMMIT, NAME, SET, TOKEN, Hub, Repository, environment
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import _http
from safetensors import safe_open

from orpo_lite.api import train
from orpo_lite.base.find import find_base
from orpo_lite.errors import CheckpointError, HubError, ModelError, OrpoLiteError, RecipeError
from orpo_lite.evaluation.samples import NEUTRAL
from orpo_lite.merging.merge import merge
from orpo_lite.publishing import licences, upload
from orpo_lite.publishing import retry as publishing_retry
from orpo_lite.publishing.push import PushResult, push, push_command, push_events
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.runs.commands import Weights, quoted
from orpo_lite.runs.folder import locked

REPO = "someone/tuned"
CANARY = "xylophone-canary"  # of the data; a path's and a token's are beside it
CANARY_PATH = "canary-folder"
LFS = "PUT /lfs/"
COMMITTING = f"POST /api/models/{REPO}/commit"
AGREEMENT = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT, made short for a test."

Call = Callable[..., Answer]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on local data and a local base, merged; every row of the data says a canary, and so
    does every path."""
    folder = tmp_path_factory.mktemp(CANARY_PATH)
    write_base(folder / "base")
    lines = (
        write_pairs(folder / "pairs.jsonl", 24)
        .read_text()
        .replace("Item", f"{CANARY} item")
        .replace("It is", CANARY)
    )
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "small.yaml").write_text(
        f"model:\n  model_name_or_path: {folder}/base\n"
        f"data:\n  dataset_name: {folder}/pairs.jsonl\n"
        "  test_split_size: 0.2\n  max_length: 128\n  max_prompt_length: 96\n"
        f"training:\n  output_dir: {folder}/run\n  global_batch_size: 8\n  eval_steps: 0.5\n"
        "output:\n  samples: 1\n  max_new_tokens: 8\n"
    )
    result = train(load_recipe(str(folder / "small.yaml")))
    merge(result.run)
    sample = {
        "source": "held-out",
        "prompt": f"{CANARY}?",
        "before": "```\nno",
        "after": f"yes {TOKEN}",
    }
    with (result.run / "samples.jsonl").open("a") as stream:
        stream.write(json.dumps(sample) + "\n")
    return result.run


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / CANARY_PATH / "run"))


@pytest.fixture
def on_the_hub(a_run: Path, hub: Hub) -> Path:
    """The same run, as if its base had come from the hub."""
    lock = json.loads((a_run / "lock.json").read_text())
    lock["base"] |= {"name": NAME, "revision": COMMIT}
    (a_run / "lock.json").write_text(json.dumps(lock))
    return a_run


def licensed(run: Path, **licences: str) -> Path:
    """The run with what the card of its base says of the licence."""
    lock = json.loads((run / "lock.json").read_text())
    lock["licences"]["base"] = licences
    (run / "lock.json").write_text(json.dumps(lock))
    return run


def refused(kind: type[OrpoLiteError], do: Callable[[], object], *, code: int = 8) -> str:
    """The message of the error that ``do`` must raise; with the command that goes on, and without
    the token."""
    with pytest.raises(kind) as raised:
        do()
    assert raised.value.exit_code == code
    assert TOKEN not in str(raised.value)
    return str(raised.value)


def no_push(run: Path, hub: Hub, **options: Any) -> str:
    """The message of a push that must fail at the hub, of which nothing may be left there."""
    message = refused(HubError, lambda: push(run, REPO, **options))
    assert f"orpo-lite push {run} {REPO}" in message.splitlines()[-1]
    assert not any(repository.commits for repository in hub.written.values())
    return message


# --- what arrives


def test_an_adapter_in_one_commit_private(a_run: Path, hub: Hub) -> None:
    named = "additional_chat_templates/rag.jinja"
    (a_run / "adapter" / named).parent.mkdir()
    (a_run / "adapter" / named).write_text("{{ messages }}")
    result = push(a_run, REPO)
    repository = hub.written[REPO]
    names = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
        named,
    }
    assert repository.is_private
    assert set(repository.files) == names == set(result.files)
    assert len(repository.commits) == 1
    assert (
        repository.files["adapter_model.safetensors"]
        == (a_run / "adapter/adapter_model.safetensors").read_bytes()
    )
    assert (result.repository, result.page) == (REPO, f"{hub.endpoint}/{REPO}")
    assert result.commit == f"{hub.endpoint}/{REPO}/commit/{1:040x}"
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] is None


def test_a_merged_model_and_nothing_of_the_adapter(a_run: Path, hub: Hub) -> None:
    result = push(a_run, REPO, merged="original")
    files = hub.written[REPO].files
    assert (
        {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
        <= set(files)
        == set(result.files)
    )
    assert not any(name.startswith("adapter") for name in files)
    assert files["model.safetensors"] == (a_run / "merged/model.safetensors").read_bytes()
    assert ModelCard(files["README.md"].decode()).data.library_name == "transformers"


def test_the_merge_onto_the_dequantised_weights(a_run: Path, hub: Hub, call: Call) -> None:
    command = f"orpo-lite push {a_run} {REPO} --merged --base dequantized"
    code, _, said = call(*command.split()[1:])
    assert (code, f"orpo-lite merge {a_run} --base dequantized" in said) == (5, True)
    folder = merge(a_run, weights="dequantized").folder
    assert call(*command.split()[1:])[0] == 0
    files = hub.written[REPO].files
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert files["model.safetensors"] != (a_run / "merged/model.safetensors").read_bytes()
    assert "as rounded to 4 bit in training" in files["README.md"].decode()
    assert push_command(a_run, REPO, merged="dequantized") == command
    code, _, said = call("push", str(a_run), REPO, "--base", "dequantized")
    assert (code, "--merged" in said) == (2, True)


def test_what_was_pushed_loads_as_an_adapter(a_run: Path, hub: Hub, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    push(a_run, REPO)
    there = tmp_path / "there"
    there.mkdir()
    for name, content in hub.written[REPO].files.items():
        (there / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((a_run / "lock.json").read_text())["base"]["path"]
    )
    PeftModel.from_pretrained(base, there)
    AutoTokenizer.from_pretrained(there)


def test_a_base_of_the_hub_is_named_with_its_revision(on_the_hub: Path, hub: Hub) -> None:
    push(on_the_hub, REPO)
    files = hub.written[REPO].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == NAME
    assert ModelCard(files["README.md"].decode()).data.base_model == NAME
    assert COMMIT in files["README.md"].decode()


def test_public_only_when_asked(a_run: Path, hub: Hub) -> None:
    push(a_run, REPO, is_public=True)
    assert hub.written[REPO].is_private is False


def test_a_name_alone_is_ones_own(a_run: Path, hub: Hub) -> None:
    assert push(a_run, "tuned").repository == REPO
    assert f'from_pretrained(base, "{REPO}")' in hub.written[REPO].files["README.md"].decode()


def test_an_organisation(a_run: Path, hub: Hub) -> None:
    hub.who["orgs"] = [{"name": "lab", "roleInOrg": "write"}]
    assert push(a_run, "lab/tuned").repository == "lab/tuned"


def test_a_second_push_sends_what_changed_alone(a_run: Path, hub: Hub) -> None:
    push(a_run, REPO)
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1
    (a_run / "adapter/generation_config.json").write_text('{"max_new_tokens": 5}')
    hub.requests.clear()
    push(a_run, REPO)
    assert hub.written[REPO].commits[1][1] == ("generation_config.json",)
    assert hub.asked(LFS) == []


def test_the_shards_of_a_merged_model_all_of_them(a_run: Path, hub: Hub) -> None:
    merged = a_run / "merged"
    names = in_shards(merged)
    assert set(names) <= set(push(a_run, REPO, merged="original").files)
    (merged / names[1]).unlink()
    message = refused(CheckpointError, lambda: push(a_run, REPO, merged="original"), code=5)
    assert names[1] in message


def in_shards(merged: Path) -> list[str]:
    """Two shards and an index in place of the one file of a merged model, the same tensors in
    each."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        shutil.copy(merged / "model.safetensors", merged / name)
    (merged / "model.safetensors").unlink()
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    return [*names, "model.safetensors.index.json"]


def test_what_an_earlier_push_left_of_ours_goes(a_run: Path, hub: Hub) -> None:
    """Else transformers would load the old file, or the merged model and the adapter on top of
    it."""
    push(a_run, REPO, merged="original")
    theirs = {
        "mine.txt": b"1",
        "LICENSE": b"2",
        "pytorch_model.bin": b"3",
        "original/config.json": b"4",
    }
    hub.written[REPO].files |= theirs
    in_shards(a_run / "merged")
    result = push(a_run, REPO, merged="original")
    assert set(hub.written[REPO].files) == {*result.files, *theirs}
    assert "model.safetensors" not in hub.written[REPO].files
    notes = [update.text for update in push_events(a_run, REPO) if update.kind == "note"]
    gone = (
        "config.json, model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, "
        "model.safetensors.index.j"
    )
    removed = "removed files of an earlier push, which remain in the repository's history: "
    assert notes[-1] == f"{removed}{gone}son"
    assert {"config.json", "model.safetensors.index.json"}.isdisjoint(hub.written[REPO].files)
    result = push(a_run, REPO, merged="original")
    assert set(hub.written[REPO].files) == {*result.files, *theirs}
    assert len(hub.written[REPO].commits) == 4


def test_what_is_stale_is_asked_again_after_a_commit_whose_answer_was_lost(
    a_run: Path, hub: Hub, slept: list[float]
) -> None:
    push(a_run, REPO, merged="original")
    hub.fail(COMMITTING, late=True, times=1)
    result = push(a_run, REPO)
    assert set(hub.written[REPO].files) == set(result.files)
    assert len(hub.written[REPO].commits) == 2


# --- what never does


def test_only_what_is_on_the_list(a_run: Path, hub: Hub) -> None:
    for folder in ("adapter", "merged"):
        for name in (
            "train.jsonl",
            "optimizer.pt",
            "pytorch_model.bin",
            ".env",
            "run.py",
            "notes.txt",
        ):
            (a_run / folder / name).write_text("private")
        (a_run / folder / "more").mkdir()
        (a_run / folder / "more" / "tokenizer.json").write_text("private")
        (a_run / folder / "notes.md").symlink_to(a_run / "recipe.yaml")
    notes = [update.text for update in push_events(a_run, REPO) if update.kind == "note"]
    push(a_run, "someone/merged", merged="original")
    for repository in hub.written.values():
        assert not {
            "train.jsonl",
            "optimizer.pt",
            "pytorch_model.bin",
            ".env",
            "run.py",
            "notes.txt",
            "notes.md",
            "more/tokenizer.json",
        } & set(repository.files)
    assert not any(
        b"private" in content for r in hub.written.values() for content in r.files.values()
    )
    assert notes[0].startswith("not pushed: .env, more, notes.md, ")


@pytest.mark.parametrize("merged", [None, "original"])
def test_no_text_of_the_data_no_path_and_no_token(
    a_run: Path, hub: Hub, merged: Weights | None
) -> None:
    """Every byte that was sent is looked at, decoded where it was encoded."""
    push(a_run, REPO, merged=merged)
    sent = [
        *hub.bodies,
        *hub.written[REPO].files.values(),
        *(line.encode() for line in hub.requests),
    ]
    for word in (CANARY, CANARY_PATH, str(Path.home()) + "/", TOKEN, "hf_canary"):
        assert not [body[:200] for body in sent if word.encode() in body], word
    assert f"Bearer {TOKEN}" in hub.tokens


def test_samples_of_the_data_only_when_asked_and_never_a_token(a_run: Path, hub: Hub) -> None:
    push(a_run, REPO)
    card = hub.written[REPO].files["README.md"].decode()
    assert NEUTRAL[0] in card
    assert CANARY not in card
    push(a_run, REPO, samples=2)
    card = hub.written[REPO].files["README.md"].decode()
    assert NEUTRAL[0] not in card
    assert "````text\n```\nno\n````" in card
    assert f"{CANARY}?" in card
    assert TOKEN not in card
    assert "hf_***" in card
    (a_run / "samples.jsonl").unlink()
    assert "samples.jsonl" in refused(CheckpointError, lambda: push(a_run, REPO, samples=1), code=5)


@pytest.mark.parametrize("secret", ["path", "token"])
@pytest.mark.parametrize(
    "name", ["README.md", "adapter/chat_template.jinja", "adapter/generation_config.json"]
)
def test_a_file_that_says_too_much_is_not_sent(
    a_run: Path, hub: Hub, name: str, secret: str
) -> None:
    file = a_run / name
    said = file.read_text() if file.is_file() else "{}"
    file.write_text(said + (str(a_run.resolve()) if secret == "path" else TOKEN))
    message = refused(CheckpointError, lambda: push(a_run, REPO), code=5)
    found = "a path of this machine" if secret == "path" else "an access token"
    assert f"{Path(name).name}: contains {found}" in message
    assert hub.written == {}


PLACES = ("run", "base", "data", "cache", "home")


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_no_place_of_the_machine(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, place: str, escaped: bool
) -> None:
    monkeypatch.setenv("HOME", "/home/jörg")
    base = json.loads((a_run / "lock.json").read_text())["base"]["path"]
    data = str(Path(base).with_name("pairs.jsonl"))
    found = dict(
        zip(PLACES, (str(a_run), base, data, constants.HF_HUB_CACHE, "/home/jörg"), strict=True)
    )[place]
    config = a_run / "adapter/generation_config.json"
    said = json.dumps({"x": f"{found}/y"}, ensure_ascii=escaped)
    config.write_text(said.replace("/", "\\/") if escaped else said)
    message = refused(CheckpointError, lambda: push(a_run, REPO), code=5)
    assert f"generation_config.json: contains a path of this machine, {found}" in message
    assert not hub.asked("POST")
    config.write_text(json.dumps({"x": f"{found}s"}))
    push(a_run, REPO)


def test_a_home_that_may_be_a_word(a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    config, vocabulary = a_run / "adapter/generation_config.json", a_run / "adapter/vocab.json"
    vocabulary.write_text('{"/root/": 1}')
    config.write_text('{"x": "/root"}')
    push(a_run, REPO)
    config.write_text('{"x": "/root/secret"}')
    assert "machine, /root/" in refused(CheckpointError, lambda: push(a_run, REPO), code=5)


OAUTH = "hf_oauth_eyJhbGciOi.eyJzY29wZSI6-WyJvcGVuaW_QifQ"
SECRETS = {
    "user": TOKEN,
    "oauth": OAUTH,
    "jwt": OAUTH.replace("oauth", "jwt"),
    "own": "s3cret-of-mine",
}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "chat_template.jinja", "adapter_model.safetensors"]
)
def test_a_token_of_any_form_in_any_file(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["own"])
    file = a_run / "adapter" / name
    said = file.read_text() if file.is_file() and not name.endswith(".safetensors") else ""
    for kind, secret in SECRETS.items():
        if name.endswith(".safetensors"):
            text = json.dumps({"__metadata__": {"x": secret}}).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text)
        else:
            file.write_text(f'{said} "{secret}"')
        message = refused(CheckpointError, lambda: push(a_run, REPO), code=5)
        assert f"{name}: contains an access token" in message, kind
    assert hub.written == {}


@pytest.mark.parametrize("token", [OAUTH, "s3cret-of-mine"])
def test_a_token_that_the_hub_quotes_is_not_shown(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fail("whoami", 403, body=json.dumps({"error": f"bad token {token} here"}).encode())
    message = no_push(a_run, hub)
    assert token not in message
    assert "bad token hf_*** here" in message


@pytest.mark.parametrize("token", ["hf_üabcdefghijklmnopqrs", "hf_abcdefghij klmnopqrst"])
def test_what_cannot_be_a_token_is_not_sent(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert "the access token is invalid" in no_push(a_run, hub)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "merged/config.json",
        "adapter/merges.txt",
        "adapter/tokenizer.json",
        "README.md",
    ],
)
def test_a_link_is_not_left_out_but_refused(a_run: Path, hub: Hub, name: str) -> None:
    file = a_run / name
    there = a_run.parent / "elsewhere"
    there.write_bytes(file.read_bytes() if file.is_file() else b"a b")
    file.unlink(missing_ok=True)
    file.symlink_to(there)
    message = refused(
        CheckpointError,
        lambda: push(a_run, REPO, merged="original" if "merged" in name else None),
        code=5,
    )
    assert message.startswith(f"{file}: is a symbolic link")
    assert "by a copy of the file" in message
    assert not hub.asked("POST")


@pytest.mark.parametrize("merged", [None, "original", "dequantized"])
@pytest.mark.parametrize(
    "fault", ["cut", "no tokenizer", "no config", "no weights", "broken config"]
)
def test_a_model_that_is_not_whole(
    a_run: Path, hub: Hub, merged: Weights | None, fault: str
) -> None:
    command = f"orpo-lite merge {a_run}" if merged else f"orpo-lite train --resume {a_run}"
    if merged == "dequantized":
        shutil.copytree(a_run / "merged", a_run / "merged-dequantized")
        command += " --base dequantized"
    folder = (
        a_run / {None: "adapter", "original": "merged", "dequantized": "merged-dequantized"}[merged]
    )
    weights = folder / ("model.safetensors" if merged else "adapter_model.safetensors")
    name = {
        "no tokenizer": "tokenizer.json",
        "no config": "config.json" if merged else "adapter_config.json",
    }
    file = folder / name.get(fault, weights.name)
    if fault == "broken config" and merged:
        return  # which is the base's, and not read here
    if fault == "broken config":
        file = folder / "adapter_config.json"
        file.write_text("{")
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        file.unlink()
    message = refused(CheckpointError, lambda: push(a_run, REPO, merged=merged), code=5)
    if (fault, merged) != ("no weights", None):
        assert file.name in message
    assert message.splitlines()[-1] == f"  fix: {command}"
    assert hub.requests == []


def test_a_shard_that_is_not_whole_or_an_index_that_is_none(a_run: Path, hub: Hub) -> None:
    _, second, index = (a_run / "merged" / name for name in in_shards(a_run / "merged"))
    second.write_bytes(second.read_bytes()[:-8])
    message = refused(CheckpointError, lambda: push(a_run, REPO, merged="original"), code=5)
    assert second.name in message
    index.write_text("[]")
    message = refused(CheckpointError, lambda: push(a_run, REPO, merged="original"), code=5)
    assert index.name in message
    assert message.endswith(f"fix: orpo-lite merge {a_run}")


def test_a_card_that_is_not_utf_8(a_run: Path, hub: Hub) -> None:
    (a_run / "README.md").write_bytes(b"---\nlicense: mit\n---\nM\xfcller\n")
    message = refused(CheckpointError, lambda: push(a_run, REPO), code=5)
    assert message.startswith(f"{a_run}/README.md: cannot be read")
    assert "then:" not in message


def test_a_run_in_use_is_not_pushed(a_run: Path, hub: Hub) -> None:
    with locked(a_run):
        assert "in use" in refused(CheckpointError, lambda: push(a_run, REPO), code=5)
    assert hub.requests == []


def test_weights_that_go_while_the_hub_is_waited_for(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = a_run / "adapter/adapter_model.safetensors"
    monkeypatch.setattr(time, "sleep", lambda _: file.unlink(missing_ok=True))
    for at in ("repos/create", "preupload", COMMITTING):
        shutil.copy(a_run / "merged/model.safetensors", file)
        hub.written.clear()
        hub.stored.clear()
        hub.fail(at, 503, times=1)
        message = refused(CheckpointError, lambda: push(a_run, REPO), code=5)
        assert str(file) in message, at
        assert message.endswith(f"fix: orpo-lite train --resume {a_run}")


# --- a hub that refuses


@pytest.mark.parametrize(
    "at", ["whoami", "GET /api/models", "repos/create", "preupload", "lfs/objects", "commit"]
)
@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "", "401"),
        (403, "", "no write access"),
        (403, "GatedRepo", "gated"),
        (404, "RepoNotFound", "does not exist"),
    ],
)
def test_a_refusal_is_not_asked_for_twice(
    a_run: Path, hub: Hub, slept: list[float], at: str, status: int, code: str, said: str
) -> None:
    if (at, status) == ("GET /api/models", 404):
        return  # which is how a new repository looks
    hub.fail(at, status, code)
    message = no_push(a_run, hub)
    assert said in message or (status == 401 and "does not exist" in message)
    assert "hf auth login" in message
    assert slept == []
    assert len(hub.asked(at)) == 1


def test_no_token(a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = no_push(a_run, hub)
    assert "no access token" in message
    assert "hf auth login" in message
    assert hub.requests == []


def test_offline(a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in no_push(a_run, hub)
    assert hub.requests == []


def test_a_hub_that_is_not_there(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.stop()
    assert "cannot be reached (ConnectError" in no_push(a_run, hub)
    assert len(slept) == publishing_retry.ATTEMPTS - 1


@pytest.mark.parametrize(
    "name", ["a b/c", "x--y", "someone/../x", "someone/x.git", "a/b/c", "", "-x"]
)
def test_a_name_that_no_repository_can_have(a_run: Path, hub: Hub, name: str) -> None:
    message = refused(RecipeError, lambda: push(a_run, name), code=2)
    assert "owner/name" in message
    assert hub.requests == []


WRITE = {"permissions": ["repo.content.read", "repo.write"]}
READ = {"permissions": ["repo.content.read"]}
ME, OTHER = ({"entity": {"type": "user", "name": name}} for name in ("someone", "other"))
DATA, OWNER_OF_DATA = ({"entity": {"type": "dataset", "name": name}} for name in (REPO, "someone"))
THIS, THAT = ({"entity": {"type": "model", "name": name}} for name in (REPO, "someone/else"))


@pytest.mark.parametrize(
    ("role", "rights", "is_fine"),
    [
        ("write", {}, True),
        ("read", {}, False),
        ("fineGrained", {"global": [], "scoped": [ME | WRITE]}, True),
        ("fineGrained", {"global": [], "scoped": [THIS | WRITE]}, True),
        ("fineGrained", {"global": ["repo.write"], "scoped": []}, True),
        ("fineGrained", {"global": ["discussion.write"], "scoped": [ME | READ]}, False),
        ("fineGrained", {"global": [], "scoped": [OTHER | WRITE, THAT | WRITE]}, False),
        ("fineGrained", {"global": [], "scoped": [DATA | WRITE, OWNER_OF_DATA | WRITE]}, False),
        ("fineGrained", {"global": []}, False),
    ],
)
def test_the_rights_of_a_token(
    a_run: Path, hub: Hub, role: str, rights: dict[str, Any], is_fine: bool
) -> None:
    hub.grant(role, **rights)
    if is_fine:
        push(a_run, REPO)
        return
    message = no_push(a_run, hub)
    assert "access token has" in message
    assert "hf auth login" in message
    assert hub.requests == ["GET /api/whoami-v2"]


def test_somebody_elses_name(a_run: Path, hub: Hub) -> None:
    hub.who["orgs"] = [{"name": "lab", "roleInOrg": "read"}]
    assert "one of these owners: someone, lab" in refused(
        HubError, lambda: push(a_run, "stranger/tuned")
    )
    assert "only read access at lab" in refused(HubError, lambda: push(a_run, "lab/tuned"))
    assert hub.written == {}


@pytest.mark.parametrize("role", ["read", "no_access", None, "contributor", "write", "admin"])
def test_the_roles_of_an_organisation(a_run: Path, hub: Hub, role: str | None) -> None:
    hub.who["orgs"] = [{"name": "Lab", "roleInOrg": role}]
    if role in ("contributor", "write", "admin"):
        push(a_run, "lab/tuned")
        hub.grant("fineGrained", scoped=[{"entity": {"type": "org", "name": "Lab"}} | WRITE])
        push(a_run, "lab/tuned")
        return
    assert "ask an admin" in refused(HubError, lambda: push(a_run, "lab/tuned"))
    assert hub.requests == ["GET /api/whoami-v2"]


@pytest.mark.parametrize("is_public", [False, True])
def test_a_repository_that_is_there_keeps_its_visibility(
    a_run: Path, hub: Hub, is_public: bool
) -> None:
    push(a_run, REPO, is_public=not is_public)
    before = (hub.written[REPO].is_private, list(hub.written[REPO].commits))
    message = refused(HubError, lambda: push(a_run, REPO, is_public=is_public))
    assert ("is already private" if is_public else "is already public") in message
    assert "/settings" in message
    assert message.endswith(
        f"\n  then: orpo-lite push {a_run} {REPO}{'' if is_public else ' --public'}"
    )
    assert (hub.written[REPO].is_private, hub.written[REPO].commits) == before


def test_commands_that_repeat_a_fault_are_not_printed(a_run: Path, hub: Hub) -> None:
    message = refused(HubError, lambda: push(a_run, "stranger/tuned", merged="original"))
    assert message.endswith(f"\n  then: orpo-lite push {a_run} {REPO} --merged")
    address = f"https://huggingface.co/{REPO}"
    message = refused(RecipeError, lambda: push(a_run, address), code=2)
    assert message.endswith(f"fix: orpo-lite push {a_run} {REPO}")
    message = refused(RecipeError, lambda: push(a_run, "a b"), code=2)
    assert message.endswith(f"fix: orpo-lite push {a_run} OWNER/NAME")
    message = refused(CheckpointError, lambda: push(a_run / "adapter", REPO), code=5)
    assert message.endswith(f"fix: {a_run}")
    (a_run / "samples.jsonl").write_text("{")
    assert "orpo-lite push" not in refused(CheckpointError, lambda: push(a_run, REPO), code=5)
    (a_run / "samples.jsonl").unlink()
    message = refused(CheckpointError, lambda: push(a_run, REPO, samples=1), code=5)
    assert message.endswith("fix: leave --samples out")


@pytest.mark.parametrize(
    "name",
    ["-run", "a\tb", "a\nb", "it's", "two  words", "\u2028", "$(touch x)", "back\\slash\t", "ü"],
)
def test_a_path_in_a_command_is_that_path(a_run: Path, hub: Hub, call: Call, name: str) -> None:
    run = a_run.rename(a_run.with_name(name))
    hub.fail("whoami", 403)
    code, _, said = call("push", str(run), REPO)
    command = said[said.index("then: ") + 6 :].rstrip("\n")
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    ).stdout
    assert (code, shown.decode().split("\0")[2]) == (8, str(run))
    assert quoted(Path("-run")) == "./-run"
    assert push_command(Path("-run"), REPO) == f"orpo-lite push ./-run {REPO}"


def test_metadata_that_the_hub_refuses_before_anything_is_made(a_run: Path, hub: Hub) -> None:
    body = b'{"errors": [{"message": "license must be one of [a, b]"}], "warnings": []}'
    hub.fail("validate-yaml", 400, body=body, headers={"Content-Type": "application/json"})
    message = no_push(a_run, hub)
    assert message.startswith(
        f"{a_run}/README.md: the hub refuses the metadata of the card: license must be one of [a, b]"
    )
    assert "fix: correct the metadata" in message
    assert hub.written == {}


def test_a_file_that_the_hub_refuses_by_its_name(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_server import Handler

    def refuse(_: Handler, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "oid": asked["oid"],
            "size": asked["size"],
            "error": {"code": 422, "message": "too big"},
        }

    monkeypatch.setattr(Handler, "place", refuse)
    message = no_push(a_run, hub)
    assert "the hub refuses a file (uploading): adapter_model.safetensors: too big" in message
    assert "not one" not in message


@pytest.mark.parametrize(
    ("status", "said"),
    [(402, "quota"), (413, "too large"), (403, "Private repository storage limit reached")],
)
def test_no_more_room(a_run: Path, hub: Hub, slept: list[float], status: int, said: str) -> None:
    hub.fail(COMMITTING, status, headers={"X-Error-Message": said})
    message = no_push(a_run, hub)
    assert f"the hub's storage limit is reached ({status}, uploading): {said}" in message
    assert "hf auth login" not in message
    assert "later" not in message
    assert slept == []


def test_an_address_without_a_scheme(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")
    message = no_push(a_run, hub)
    assert message.startswith("HF_ENDPOINT: 'hub.example' is not a URL")
    assert "HF_ENDPOINT=https://hub.example" in message
    assert slept == []


def test_a_name_that_is_taken_and_cannot_be_seen(a_run: Path, hub: Hub) -> None:
    hub.fail("repos/create", 409, body=b'{"error": "taken"}')
    assert "cannot be created (409)" in no_push(a_run, hub)


def test_made_by_the_attempt_whose_answer_was_lost(
    a_run: Path, hub: Hub, slept: list[float]
) -> None:
    hub.fail("repos/create", late=True, times=1)
    push(a_run, REPO)
    assert len(hub.asked("repos/create")) == 2
    assert hub.written[REPO].is_private


# --- a hub in trouble


@pytest.mark.parametrize(
    "at",
    [
        "whoami",
        "GET /api/models",
        "repos/create",
        "validate-yaml",
        "preupload",
        "lfs/objects",
        LFS,
        "verify",
        COMMITTING,
    ],
)
@pytest.mark.parametrize("status", first_and_long([503, 429, 500]))
def test_trouble_that_passes(
    a_run: Path, hub: Hub, slept: list[float], at: str, status: int
) -> None:
    hub.fail(at, status, times=2)
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1
    assert 2 <= len(slept) <= 4
    assert sum(slept) < 30


@pytest.mark.parametrize("at", ["whoami", "repos/create", "preupload", LFS, COMMITTING])
@pytest.mark.parametrize("status", [429, 503])
def test_trouble_that_stays(
    a_run: Path, hub: Hub, slept: list[float], at: str, status: int
) -> None:
    hub.fail(at, status)
    message = no_push(a_run, hub)
    assert str(status) in message
    assert len(hub.requests) < 80
    assert sum(slept) < 300


def test_files_that_share_an_address_share_no_attempts(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on a thread of the client's: a short trouble of all is passed over, as that of one
    is."""
    sleep = time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda _: sleep(0.3)
    )  # so long that all of them have met with it
    merge(a_run, max_shard_size=20_000)
    assert len(list((a_run / "merged").glob("*.safetensors"))) > 5
    hub.fail("verify", 503, times=5)
    push(a_run, REPO, merged="original")
    assert len(hub.written[REPO].commits) == 1


@pytest.mark.parametrize("at", ["whoami", "repos/create", "preupload", LFS, COMMITTING])
def test_a_hub_that_never_answers(
    a_run: Path, hub: Hub, slept: list[float], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(publishing_retry, "TIMEOUT", 0.2)
    hub.fail(at, hang=True)
    assert "ReadTimeout" in no_push(a_run, hub)
    hub.faults.clear()
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1


@pytest.mark.parametrize("at", ["repos/create", "preupload", LFS, COMMITTING])
def test_a_connection_cut_on_the_way(a_run: Path, hub: Hub, slept: list[float], at: str) -> None:
    hub.fail(at, cut=True, times=1)
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1
    files = hub.written[REPO].files
    assert (
        files["adapter_model.safetensors"]
        == (a_run / "adapter/adapter_model.safetensors").read_bytes()
    )


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    a_run: Path, hub: Hub, slept: list[float]
) -> None:
    hub.fail(COMMITTING, late=True, times=1)
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1


def test_an_upload_that_was_cut_off_goes_on_where_it_was(
    a_run: Path, hub: Hub, slept: list[float]
) -> None:
    hub.fail(COMMITTING, 503)
    no_push(a_run, hub)
    sent = len(hub.asked(LFS))
    hub.faults.clear()
    push(a_run, REPO)
    assert len(hub.asked(LFS)) == sent == 2


@pytest.mark.parametrize(
    "at", ["whoami", "repos/create", "preupload", "lfs/objects", LFS, "verify", COMMITTING]
)
def test_a_request_is_made_four_times_in_all(
    a_run: Path, hub: Hub, slept: list[float], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(publishing_retry, "TIMEOUT", 0.2)
    troubles: list[dict[str, Any]] = [{"hang": True}, {"status": 503}, {"cut": True}]
    for trouble in troubles[
        : 2 if at == "whoami" else 3
    ]:  # of a request that reads it is the answer that is cut
        hub.faults.clear()
        hub.written.clear()
        hub.stored.clear()
        hub.requests.clear()
        slept.clear()
        hub.fail(at, **trouble)
        no_push(a_run, hub)
        assert max(Counter(hub.asked(at)).values()) <= 4 * (
            2 if at == "verify" else 1
        )  # which both files have
        assert len(slept) <= 6


@pytest.mark.parametrize("status", [409, 412])
def test_another_commit_meanwhile(a_run: Path, hub: Hub, slept: list[float], status: int) -> None:
    hub.fail(COMMITTING, status, times=1)
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1
    hub.fail(COMMITTING, status)
    message = refused(HubError, lambda: push(a_run, REPO, merged="original"))
    assert f"conflicts with the current state of the repository ({status}, uploading)" in message


@pytest.mark.parametrize("asked", [7, 40])
def test_the_wait_that_the_hub_asks_for(
    a_run: Path, hub: Hub, slept: list[float], asked: int
) -> None:
    hub.fail("whoami", 429, headers={"Retry-After": str(asked)}, times=1)
    push(a_run, REPO)
    assert slept == [asked]


def test_a_wait_that_is_too_long_is_left_to_the_person(
    a_run: Path, hub: Hub, slept: list[float]
) -> None:
    hub.fail("whoami", 429, headers={"Retry-After": "3600"})
    assert "asks to wait 3,600 s" in no_push(a_run, hub)
    assert slept == []


def test_the_wait_of_the_hubs_own_header(a_run: Path, hub: Hub, slept: list[float]) -> None:
    headers = {
        "RateLimit": '"api";r=0;t=40',
        "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
    }
    hub.fail("whoami", 429, headers=headers, times=1)
    push(a_run, REPO)
    assert slept == [40]
    hub.fail("whoami", 429, headers={"RateLimit": '"api";r=0;t=400'})
    assert "asks to wait 400 s" in refused(HubError, lambda: push(a_run, REPO))


def test_a_wait_that_is_no_number(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail("whoami", 429, headers={"Retry-After": "²"}, times=1)
    push(a_run, REPO)
    assert len(slept) == 1


def test_a_wait_that_is_too_long_for_the_client_too(
    a_run: Path, hub: Hub, slept: list[float]
) -> None:
    hub.fail("preupload", 429, headers={"Retry-After": "3600"})
    assert "asks to wait 3,600 s" in no_push(a_run, hub)
    assert slept == []


def test_waits_grow_and_are_not_those_of_everybody(hub: Hub) -> None:
    first, second, third = (
        {publishing_retry._wait(TimeoutError(), n) for _ in range(20)} for n in (1, 2, 3)
    )
    assert max(first) < min(second) <= max(second) < min(third)  # type: ignore[type-var]
    assert len(first) > 1


def test_a_page_that_is_not_the_hubs(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail("/", 200, body=b"<html>Welcome! Room number?</html>")
    assert "the answer is not from the hub" in no_push(a_run, hub)
    hub.faults.clear()
    hub.fail("/", 200, body=b"{}")
    assert "the answer is not from the hub" in no_push(a_run, hub)


ANSWERS = [b"null", b"[]", b"{}", b'"text"', b'["text"]', b"1"]


@pytest.mark.parametrize(
    "at",
    [
        "whoami",
        "GET /api/models",
        "repos/create",
        "validate-yaml",
        "preupload",
        "lfs/objects",
        COMMITTING,
    ],
)
def test_an_answer_of_an_odd_type(a_run: Path, hub: Hub, slept: list[float], at: str) -> None:
    for body in ANSWERS:
        if (at, body) == ("validate-yaml", b"{}"):
            continue  # which says that nothing is wrong
        hub.faults.clear()
        hub.stored.clear()
        hub.fail(at, 200, body=body, headers={"Content-Type": "application/json"})
        assert "the answer is not from the hub" in no_push(a_run, hub), body
        assert at != "validate-yaml" or hub.written == {}, body
    assert slept == []


def test_a_whoami_of_odd_types(a_run: Path, hub: Hub) -> None:
    right = dict(hub.who)
    for odd in (
        {"name": None},
        {"name": ""},
        {"orgs": {"a": 1}},
        {"orgs": ["lab"]},
        {"auth": "x"},
        {"auth": []},
        {"auth": {"accessToken": "x"}},
        {"auth": {"accessToken": {"role": 1}}},
        {"auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": ["x"]}}}},
        {"auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"global": "repo.write"}}}},
        {
            "auth": {
                "accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": "x"}]}}
            }
        },
    ):
        hub.who = right | odd
        assert "the answer is not from the hub (reading the account: ValueError): " in no_push(
            a_run, hub
        ), odd


def test_a_repository_of_odd_types(a_run: Path, hub: Hub) -> None:
    for odd in (
        {"private": None},
        {"private": "yes"},
        {"siblings": "x"},
        {"siblings": [1]},
        {"siblings": [{}]},
    ):
        body = json.dumps({"id": REPO, "private": True, "siblings": []} | odd).encode()
        hub.faults.clear()
        hub.fail("GET /api/models", 200, body=body, headers={"Content-Type": "application/json"})
        assert "the answer is not from the hub" in no_push(a_run, hub)


def test_a_fault_of_ours_stays_one(a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client makes of an odd answer is the hub's; the same in our lines is not."""
    push(a_run, REPO)
    monkeypatch.setattr(upload, "fnmatch", None)
    with pytest.raises(AttributeError, match="fnmatchcase"):
        push(a_run, REPO, merged="original")


def test_a_page_in_answer_to_a_file(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail(
        LFS,
        200,
        body=b"<html>Welcome!</html>",
        headers={"Content-Type": "text/html; charset=utf-8"},
    )
    assert "an answer from the hub, not a web page from a proxy or a login" in no_push(a_run, hub)


def test_the_clients_patience_is_given_back(a_run: Path, hub: Hub) -> None:
    before = _http._GLOBAL_CLIENT_FACTORY
    push(a_run, REPO)
    assert _http._GLOBAL_CLIENT_FACTORY is before


# --- Ctrl-C


def interrupted(hub: Hub, tmp_path: Path, at: str, *arguments: str) -> tuple[int, str, float]:
    """Exit code and complaints of a command that gets SIGINT while a request hangs, and how long it
    took to end."""
    hub.fail(at, hang=True)
    command = [sys.executable, "-m", "orpo_lite", *arguments]
    env = environment(hub, tmp_path / "home") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    end = time.monotonic() + 60
    while not hub.asked(at) and time.monotonic() < end and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    try:
        _, said = child.communicate(timeout=15)
    finally:
        child.kill()
    return child.returncode, said, time.monotonic() - began


@pytest.mark.parametrize("at", ["whoami", "preupload", LFS, COMMITTING])
def test_stopped_while_the_hub_is_waited_for(
    a_run: Path, hub: Hub, tmp_path: Path, at: str
) -> None:
    code, said, seconds = interrupted(hub, tmp_path, at, "push", str(a_run), REPO, "--merged")
    assert (code, said) == (
        130,
        f"stopped; continue with: orpo-lite push {a_run} {REPO} --merged\n",
    )
    assert seconds < 2


def test_stopped_while_a_licence_is_asked_for(on_the_hub: Path, hub: Hub, tmp_path: Path) -> None:
    code, said, seconds = interrupted(
        hub, tmp_path, f"/{NAME}/resolve/", "push", str(on_the_hub), REPO
    )
    assert (code, said) == (130, f"stopped; continue with: orpo-lite push {on_the_hub} {REPO}\n")
    assert seconds < 2


@pytest.mark.long
def test_a_training_stopped_while_it_pushes(
    small_recipe: Callable[..., Any], hub: Hub, workspace: Path
) -> None:
    small_recipe()
    keys = [
        "output.push_to_hub=true",
        f"output.hub_model_id={REPO}",
        "training.max_steps=1",
        "output.merge=false",
    ]
    code, said, seconds = interrupted(
        hub, workspace, LFS, "train", "--recipe", "./small.yaml", *keys
    )
    last = f"stopped; the adapter is safe in run/adapter; continue with: orpo-lite push run {REPO}"
    assert (code, said.splitlines()[-1]) == (130, last)
    assert seconds < 3


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_stopped_anywhere_else(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)  # this process goes on, whatever threads it has
    for module, place in (("app", "app"), ("setup_commands", "choose_recipe")):
        with monkeypatch.context() as patch:
            patch.setattr(import_module(f"orpo_lite.cli.{module}"), place, interrupt)
            assert call("plan", "--recipe", "demo") == (
                130,
                "",
                "stopped; nothing more was saved\n",
            )


def test_a_push_of_a_library_that_is_stopped_makes_no_commit(
    a_run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()
    upload_files = HfApi.preupload_lfs_files

    def wait(*arguments: Any, **options: Any) -> None:
        begun.set()
        go.wait(10)
        upload_files(*arguments, **options)

    def stop() -> None:
        begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        while not ended.wait(2):  # Python loses an interrupt that arrives within a destructor
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", wait)
    before = set(threading.enumerate())
    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        try:
            push(a_run, REPO)
        finally:
            ended.set()
    go.set()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(10)
    assert hub.asked(LFS)
    assert not hub.asked(COMMITTING)


# --- runs that are not finished


def test_nothing_to_push(a_run: Path, hub: Hub) -> None:
    shutil.rmtree(a_run / "merged")
    message = refused(CheckpointError, lambda: push(a_run, REPO, merged="original"), code=5)
    assert f"orpo-lite merge {a_run}" in message
    shutil.rmtree(a_run / "adapter")
    message = refused(CheckpointError, lambda: push(a_run, REPO), code=5)
    assert f"orpo-lite train --resume {a_run}" in message
    assert hub.requests == []


# --- licences


def test_llama_asks_for_its_name_its_notice_and_its_line(on_the_hub: Path, hub: Hub) -> None:
    licensed(on_the_hub, license="llama3.1")
    message = refused(RecipeError, lambda: push(on_the_hub, REPO), code=2)
    assert "include “Llama” at the beginning of any such AI model name" in message
    assert "someone/Llama-tuned" in message
    message = refused(ModelError, lambda: push(on_the_hub, "someone/Llama-tuned"), code=4)
    assert "provide a copy of this Agreement" in message
    assert not hub.asked("whoami|POST|PUT")
    secret = on_the_hub.parent / "secret.txt"
    secret.write_text("nobody's business")
    (on_the_hub / "adapter/LICENSE").symlink_to(secret)  # a link out of the folder is no licence
    refused(ModelError, lambda: push(on_the_hub, "someone/Llama-tuned"), code=4)
    (on_the_hub / "adapter/LICENSE").unlink()
    (on_the_hub / "adapter/LICENSE").write_text(AGREEMENT)
    push(on_the_hub, "someone/Llama-tuned")
    files = hub.written["someone/Llama-tuned"].files
    assert files["LICENSE"].decode() == AGREEMENT
    notice = (
        "Llama 3.1 is licensed under the Llama 3.1 Community License, "
        "Copyright © Meta Platforms, Inc."
    )
    assert files["NOTICE"].decode().startswith(notice)
    card = ModelCard(files["README.md"].decode())
    assert "**Built with Llama**" in card.text
    assert card.data.license == "llama3.1"


def test_the_agreement_beside_the_base_on_the_hub(on_the_hub: Path, hub: Hub) -> None:
    (hub.folder / "README.md").write_text("---\nlicense: llama3.3\n---\n")
    (hub.folder / "LICENSE.txt").write_text(AGREEMENT)
    (hub.folder / "USE_POLICY.md").write_text("Be good.")
    push(on_the_hub, "someone/Llama-tuned")
    files = hub.written["someone/Llama-tuned"].files
    assert (files["LICENSE.txt"].decode(), files["USE_POLICY.md"].decode()) == (
        AGREEMENT,
        "Be good.",
    )
    assert b"Llama 3.3 Community License" in files["NOTICE"]


def test_a_base_without_a_licence_is_not_given_one(a_run: Path, hub: Hub) -> None:
    notes = [update.text for update in push_events(a_run, REPO) if update.kind == "note"]
    assert any("names no licence" in note for note in notes)
    card = ModelCard(hub.written[REPO].files["README.md"].decode())
    assert not [key for key in (*licences.KEYS, "base_model") if card.data.get(key)]
    assert "is not known:" in card.text


def test_a_hub_that_cannot_be_reached_is_not_waited_for_to_learn_a_licence(
    hub: Hub, slept: list[float]
) -> None:
    base = find_base(NAME, "main")
    hub.fail("/", 503)
    before = len(hub.requests)
    assert licences.read_licences(NAME, COMMIT, base.path, ["lab/pairs"]) == {
        "base": {},
        "data": {"lab/pairs": {}},
    }
    hub.stop()
    assert licences.read_licences(NAME, COMMIT, base.path, ["lab/pairs"]) == {
        "base": {},
        "data": {"lab/pairs": {}},
    }
    assert len(hub.requests) == before + 2
    assert slept == []


def test_licences_of_base_and_data_from_their_cards(hub: Hub) -> None:
    hub.set.mkdir()
    (hub.set / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (hub.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    base = find_base(NAME, "main")
    known = {"base": {"license": "apache-2.0"}, "data": {SET: {"license": "cc-by-nc-4.0"}}}
    assert (
        licences.read_licences(NAME, COMMIT, base.path, [SET, "/a/file.jsonl", "builtin:two-tones"])
        == known
    )
    hub.stop()
    assert licences.read_licences(NAME, COMMIT, base.path, [SET]) == known


# --- a card changed by hand


def test_a_card_changed_by_hand_is_pushed_as_it_is(a_run: Path, hub: Hub) -> None:
    card = a_run / "README.md"
    card.write_text(
        card.read_text()
        .replace("## Limits", "My own words.\n\n## Limits")
        .replace("pipeline_tag", "language: en\npipeline_tag")
    )
    push(a_run, REPO, merged="original")
    pushed = ModelCard(hub.written[REPO].files["README.md"].decode())
    assert "My own words." in pushed.text
    assert (pushed.data.language, pushed.data.library_name) == ("en", "transformers")
    assert "OWNER/NAME" not in pushed.text
    assert "--samples: cannot be used" in refused(
        RecipeError, lambda: push(a_run, REPO, merged="original", samples=1), code=2
    )
    card.write_text("No metadata at all.")
    assert "metadata" in refused(CheckpointError, lambda: push(a_run, REPO), code=5)


def test_licences_that_the_run_lacks_are_asked_for(a_run: Path, hub: Hub) -> None:
    hub.set.mkdir()
    (hub.set / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    for name in ("recipe.yaml", "lock.json"):
        file = a_run / name
        file.write_text(re.sub(r'(dataset_name"?: )[^,\n]*', rf'\1"{SET}"', file.read_text()))
    push(licensed(a_run, license="mit"), REPO)
    card = hub.written[REPO].files["README.md"]
    assert (
        f"**Not for commercial use because of its data**: {SET} is under cc-by-nc-4.0.".encode()
        in card
    )
    assert b"as its base" not in card


def test_a_changed_card_of_an_adapter_is_said_to_be_one_beside_a_merged_model(
    a_run: Path, hub: Hub
) -> None:
    def notes(merged: Weights | None) -> str:
        return "\n".join(update.text for update in push_events(a_run, REPO, merged=merged))

    said = f"{a_run}/README.md explains how to load an adapter, but a merged model is pushed"
    assert said not in notes("original")
    card = a_run / "README.md"
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n") + b"Mine.")
    assert said in notes("original")
    assert hub.written[REPO].files["README.md"].endswith(b"\r\nMine.")
    assert said not in notes(None)


def test_the_runs_card_is_the_one_that_is_pushed(a_run: Path, hub: Hub) -> None:
    push(a_run, REPO)
    ours, pushed = (a_run / "README.md").read_text(), hub.written[REPO].files["README.md"].decode()
    same = {line for line in ours.splitlines() if line.startswith("|")}
    assert same <= set(pushed.splitlines())
    assert yaml.safe_load(pushed.split("---")[1])["library_name"] == "peft"


# --- the command line, and a recipe that asks for it


def test_the_command(a_run: Path, hub: Hub, call: Call, slept: list[float]) -> None:
    code, said, _ = call("push", str(a_run), REPO, "--public", "--samples", "1")
    assert code == 0
    assert f"{hub.endpoint}/{REPO} (public)" in said
    assert hub.written[REPO].is_private is False
    hub.fail("whoami", 503)
    code, _, said = call("push", str(a_run), REPO, "--merged", "--public")
    assert code == 8
    assert said.splitlines()[-1].endswith(f"then: orpo-lite push {a_run} {REPO} --merged --public")
    assert "Traceback" not in said
    code, _, said = call("push", str(a_run), "a b")
    assert code == 2


@pytest.fixture
def small(
    workspace: Path, small_recipe: Callable[..., Any], call: Call, hub: Hub
) -> Callable[..., Answer]:
    """Trains with the recipe of the workspace, pushed to REPO when all is done."""
    small_recipe()
    pushed = ("output.push_to_hub=true", f"output.hub_model_id={REPO}", "training.max_steps=2")
    return lambda *overrides: call("train", "--recipe", "./small.yaml", *pushed, *overrides)


def test_a_recipe_that_pushes(small: Callable[..., Answer], hub: Hub, workspace: Path) -> None:
    code, said, complained = small()
    assert code == 0, complained
    assert f"{hub.endpoint}/{REPO} (private)" in said
    assert hub.written[REPO].is_private
    assert "adapter_model.safetensors" in hub.written[REPO].files
    with safe_open(workspace / "run/adapter/adapter_model.safetensors", "pt") as file:
        assert list(file.keys())
    written = [path for path in (workspace / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "trouble", ["no token", "reads", "fine-grained", "refused", "stranger", "public", "offline"]
)
def test_what_cannot_be_pushed_is_not_trained(
    small: Callable[..., Answer],
    hub: Hub,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    if trouble == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "refused":
        hub.fail("whoami", 401)
    elif trouble == "stranger":
        hub.who["name"] = "other"
    elif trouble == "public":
        hub.written[REPO] = Repository(is_private=False)
    else:
        hub.grant(
            "read" if trouble == "reads" else "fineGrained",
            **({} if trouble == "reads" else {"scoped": []}),
        )
    monkeypatch.setattr(
        "orpo_lite.training.session.load_pair_model", lambda *_: pytest.fail("weights were loaded")
    )
    code, said, complained = small()
    assert code == 8
    assert "output.push_to_hub=false" in complained
    if trouble not in ("stranger", "public", "offline"):
        assert "hf auth login" in complained
    assert not (workspace / "run").exists()
    assert "loading" not in said


def test_a_name_that_the_licence_refuses_is_not_trained(
    small: Callable[..., Answer], hub: Hub, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "orpo_lite.training.session.load_pair_model", lambda *_: pytest.fail("weights were loaded")
    )
    (workspace / "base/README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"
    )
    code, _, complained = small()
    assert code == 2
    assert "“Llama 3” at the beginning" in complained
    assert "someone/Llama-3-tuned" in complained
    code, _, complained = small("output.hub_model_id=someone/Llama-3-tuned")
    assert code == 4
    assert f"put the file LICENSE into {workspace}/base" in complained
    assert not (workspace / "run").exists()


def test_a_push_that_fails_costs_no_training(
    small: Callable[..., Answer], hub: Hub, workspace: Path, slept: list[float], call: Call
) -> None:
    hub.fail(LFS, 503)
    code, _, complained = small("output.hub_private_repo=false")
    assert code == 8
    command = re.search(r"then: (orpo-lite push .*)", complained)
    assert command
    assert command[1] == f"orpo-lite push run {REPO} --public"
    assert "the adapter is safe in run/adapter" in complained
    assert (workspace / "run/merged/model.safetensors").is_file()
    hub.faults.clear()
    assert call(*command[1].split()[1:])[0] == 0
    assert len(hub.written[REPO].commits) == 1


def test_a_push_that_asks_for_a_change_after_training(
    small: Callable[..., Answer], hub: Hub, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-word-of-the-template")
    turns = "{% for turn in messages %}{{ turn['content'] }}{{ eos_token }}{% endfor %}"
    (workspace / "template.jinja").write_text("{# a-word-of-the-template #}" + turns)
    code, _, complained = small(
        "output.merge=false", "data.chat_template=./template.jinja", "output.samples=0"
    )
    assert code == 5, complained
    safe = f"the adapter is safe in run/adapter; after you have fixed this, run: orpo-lite push run {REPO}"
    assert complained.splitlines()[-1].strip() == safe
    assert "then:" not in complained


def test_a_run_that_goes_on_is_not_held_up_by_the_hub(
    small: Callable[..., Answer], hub: Hub, workspace: Path, call: Call
) -> None:
    hub.fail(LFS, 403)
    assert small("output.merge=false")[0] == 8
    shutil.rmtree(workspace / "run/adapter")
    hub.fail("whoami", 401)
    code, said, _ = call("train", "--resume", "run")
    assert code == 8
    assert "the push after the training may fail" in said
    assert (workspace / "run/adapter/adapter_model.safetensors").is_file()


def test_from_python(a_run: Path, hub: Hub) -> None:
    import orpo_lite

    assert isinstance(orpo_lite.push(a_run, REPO), PushResult)


def test_a_push_begins_at_once() -> None:
    """What its card says of the loss is in lock.json: torch is not waited for."""
    code = "import sys, orpo_lite.publishing.push; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
