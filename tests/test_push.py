"""Pushes to a loopback server that speaks the hub's protocol: what arrives, what never does, and every refusal."""

import json
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Answer, write_base, write_pairs
from hub_server import COMMIT, NAME, SET, TOKEN, Hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http
from safetensors import safe_open

from orpo_lite import licence, upload
from orpo_lite.base import find_base
from orpo_lite.errors import CheckpointError, HubError, ModelError, OrpoLiteError, RecipeError
from orpo_lite.generate import NEUTRAL
from orpo_lite.merge import merge
from orpo_lite.push import PushResult, push, push_command, pushing
from orpo_lite.recipe import load_recipe
from orpo_lite.run import Weights
from orpo_lite.train import train

REPO = "someone/tuned"
CANARY = "xylophone-canary"  # of the data; a path's and a token's are beside it
CANARY_PATH = "canary-folder"
LFS = "PUT /lfs/"
COMMITTING = f"POST /api/models/{REPO}/commit"
AGREEMENT = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT, made short for a test."

Call = Callable[..., Answer]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on local data and a local base, merged; every row of the data says a canary, and so does every path."""
    folder = tmp_path_factory.mktemp(CANARY_PATH)
    write_base(folder / "base")
    lines = (
        write_pairs(folder / "pairs.jsonl", 24).read_text().replace("Item", f"{CANARY} item").replace("It is", CANARY)
    )
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "small.yaml").write_text(
        f"model:\n  model_name_or_path: {folder}/base\ndata:\n  dataset_name: {folder}/pairs.jsonl\n"
        "  test_split_size: 0.2\n  max_length: 128\n  max_prompt_length: 96\n"
        f"training:\n  output_dir: {folder}/run\n  global_batch_size: 8\n  eval_steps: 0.5\n"
        "output:\n  samples: 1\n  max_new_tokens: 8\n"
    )
    result = train(load_recipe(str(folder / "small.yaml")))
    merge(result.run)
    sample = {"source": "held-out", "prompt": f"{CANARY}?", "before": "```\nno", "after": f"yes {TOKEN}"}
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


def licensed(run: Path, **licence: str) -> Path:
    """The run with what the card of its base says of the licence."""
    lock = json.loads((run / "lock.json").read_text())
    lock["licences"]["base"] = licence
    (run / "lock.json").write_text(json.dumps(lock))
    return run


def refused(kind: type[OrpoLiteError], do: Callable[[], object], *, code: int = 8) -> str:
    """The message of the error that ``do`` must raise; with the command that goes on, and without the token."""
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
    result = push(a_run, REPO)
    repository = hub.written[REPO]
    names = {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "chat_template.jinja", "README.md",
    }  # fmt: skip
    assert repository.is_private
    assert set(repository.files) == names == set(result.files)
    assert len(repository.commits) == 1
    assert repository.files["adapter_model.safetensors"] == (a_run / "adapter/adapter_model.safetensors").read_bytes()
    assert (result.repository, result.page) == (REPO, f"{hub.endpoint}/{REPO}")
    assert result.commit == f"{hub.endpoint}/{REPO}/commit/{1:040x}"
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] is None


def test_a_merged_model_and_nothing_of_the_adapter(a_run: Path, hub: Hub) -> None:
    result = push(a_run, REPO, merged="original")
    files = hub.written[REPO].files
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files) == set(result.files)
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
    assert "what 4 bit had left of the base's" in files["README.md"].decode()
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
    base = AutoModelForCausalLM.from_pretrained(json.loads((a_run / "lock.json").read_text())["base"]["path"])
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
    whole = merged / "model.safetensors"
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        shutil.copy(whole, merged / name)
    whole.unlink()
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {*names, "model.safetensors.index.json"} <= set(push(a_run, REPO, merged="original").files)
    (merged / names[1]).unlink()
    message = refused(CheckpointError, lambda: push(a_run, REPO, merged="original"), code=5)
    assert names[1] in message


# --- what never does


def test_only_what_is_on_the_list(a_run: Path, hub: Hub) -> None:
    for folder in ("adapter", "merged"):
        for name in ("train.jsonl", "optimizer.pt", "pytorch_model.bin", ".env", "run.py", "notes.txt"):
            (a_run / folder / name).write_text("private")
        (a_run / folder / "more").mkdir()
        (a_run / folder / "more" / "tokenizer.json").write_text("private")
        (a_run / folder / "merges.txt").symlink_to(a_run / "recipe.yaml")
    notes = [update.text for update in pushing(a_run, REPO) if update.kind == "note"]
    push(a_run, "someone/merged", merged="original")
    for repository in hub.written.values():
        assert not {"train.jsonl", "optimizer.pt", "pytorch_model.bin", ".env", "run.py", "notes.txt", "merges.txt",
                    "more/tokenizer.json"} & set(repository.files)  # fmt: skip
    assert not any(b"private" in content for r in hub.written.values() for content in r.files.values())
    assert notes[0].startswith("not pushed: .env, merges.txt, more, ")


@pytest.mark.parametrize("merged", [None, "original"])
def test_no_text_of_the_data_no_path_and_no_token(a_run: Path, hub: Hub, merged: Weights | None) -> None:
    """Every byte that was sent is looked at, decoded where it was encoded."""
    push(a_run, REPO, merged=merged)
    sent = [*hub.bodies, *hub.written[REPO].files.values(), *(line.encode() for line in hub.requests)]
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
@pytest.mark.parametrize("name", ["README.md", "adapter/chat_template.jinja", "adapter/generation_config.json"])
def test_a_file_that_says_too_much_is_not_sent(a_run: Path, hub: Hub, name: str, secret: str) -> None:
    file = a_run / name
    said = file.read_text() if file.is_file() else "{}"
    file.write_text(said + (str(a_run.resolve()) if secret == "path" else TOKEN))
    message = refused(CheckpointError, lambda: push(a_run, REPO), code=5)
    assert f"{Path(name).name}: holds {'a path of this machine' if secret == 'path' else 'an access token'}" in message
    assert hub.written == {}


# --- a hub that refuses


@pytest.mark.parametrize("at", ["whoami", "GET /api/models", "repos/create", "preupload", "lfs/objects", "commit"])
@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(401, "", "401"), (403, "", "may not write"), (403, "GatedRepo", "gated"), (404, "RepoNotFound", "not there")],
)
def test_a_refusal_is_not_asked_for_twice(
    a_run: Path, hub: Hub, slept: list[float], at: str, status: int, code: str, said: str
) -> None:
    if (at, status) == ("GET /api/models", 404):
        return  # which is how a new repository looks
    hub.fail(at, status, code)
    message = no_push(a_run, hub)
    assert said in message or (status == 401 and "is not there" in message)
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
    assert len(slept) == upload.ATTEMPTS - 1


@pytest.mark.parametrize("name", ["a b/c", "x--y", "someone/../x", "someone/x.git", "a/b/c", "", "-x"])
def test_a_name_that_no_repository_can_have(a_run: Path, hub: Hub, name: str) -> None:
    message = refused(RecipeError, lambda: push(a_run, name), code=2)
    assert "owner/name" in message
    assert hub.requests == []


WRITE = {"permissions": ["repo.content.read", "repo.write"]}
READ = {"permissions": ["repo.content.read"]}
ME, OTHER = ({"entity": {"type": "user", "name": name}} for name in ("someone", "other"))
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
        ("fineGrained", {"global": []}, False),
    ],
)
def test_the_rights_of_a_token(a_run: Path, hub: Hub, role: str, rights: dict[str, Any], is_fine: bool) -> None:
    hub.grant(role, **rights)
    if is_fine:
        push(a_run, REPO)
        return
    message = no_push(a_run, hub)
    assert "the access token is a" in message
    assert "hf auth login" in message
    assert hub.requests == ["GET /api/whoami-v2"]


def test_somebody_elses_name(a_run: Path, hub: Hub) -> None:
    hub.who["orgs"] = [{"name": "lab", "roleInOrg": "read"}]
    assert "an owner among someone, lab" in refused(HubError, lambda: push(a_run, "stranger/tuned"))
    assert "may only read at lab" in refused(HubError, lambda: push(a_run, "lab/tuned"))
    assert hub.written == {}


@pytest.mark.parametrize("is_public", [False, True])
def test_a_repository_that_is_there_keeps_its_visibility(a_run: Path, hub: Hub, is_public: bool) -> None:
    push(a_run, REPO, is_public=not is_public)
    before = (hub.written[REPO].is_private, list(hub.written[REPO].commits))
    message = refused(HubError, lambda: push(a_run, REPO, is_public=is_public))
    assert ("is private already" if is_public else "is public already") in message
    assert "/settings" in message
    assert (hub.written[REPO].is_private, hub.written[REPO].commits) == before


def test_a_name_that_is_taken_and_cannot_be_seen(a_run: Path, hub: Hub) -> None:
    hub.fail("repos/create", 409, body=b'{"error": "taken"}')
    assert "cannot be made (409)" in no_push(a_run, hub)


def test_made_by_the_attempt_whose_answer_was_lost(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail("repos/create", late=True, times=1)
    push(a_run, REPO)
    assert len(hub.asked("repos/create")) == 2
    assert hub.written[REPO].is_private


# --- a hub in trouble


@pytest.mark.parametrize("at", ["whoami", "GET /api/models", "repos/create", "validate-yaml", "preupload", "lfs/objects", LFS, "verify", COMMITTING])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("status", [429, 500, 503])
def test_trouble_that_passes(a_run: Path, hub: Hub, slept: list[float], at: str, status: int) -> None:
    hub.fail(at, status, times=2)
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1
    assert 2 <= len(slept) <= 4
    assert sum(slept) < 30


@pytest.mark.parametrize("at", ["whoami", "repos/create", "preupload", LFS, COMMITTING])
@pytest.mark.parametrize("status", [429, 503])
def test_trouble_that_stays(a_run: Path, hub: Hub, slept: list[float], at: str, status: int) -> None:
    hub.fail(at, status)
    message = no_push(a_run, hub)
    assert str(status) in message
    assert len(hub.requests) < 80
    assert sum(slept) < 300


@pytest.mark.parametrize("at", ["whoami", "repos/create", "preupload", LFS, COMMITTING])
def test_a_hub_that_never_answers(
    a_run: Path, hub: Hub, slept: list[float], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(upload, "TIMEOUT", 0.2)
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
    assert files["adapter_model.safetensors"] == (a_run / "adapter/adapter_model.safetensors").read_bytes()


def test_a_commit_whose_answer_is_lost_is_not_made_twice(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail(COMMITTING, late=True, times=1)
    push(a_run, REPO)
    assert len(hub.written[REPO].commits) == 1


def test_an_upload_that_was_cut_off_goes_on_where_it_was(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail(COMMITTING, 503)
    no_push(a_run, hub)
    sent = len(hub.asked(LFS))
    hub.faults.clear()
    push(a_run, REPO)
    assert len(hub.asked(LFS)) == sent == 2


@pytest.mark.parametrize("asked", [7, 40])
def test_the_wait_that_the_hub_asks_for(a_run: Path, hub: Hub, slept: list[float], asked: int) -> None:
    hub.fail("whoami", 429, headers={"Retry-After": str(asked)}, times=1)
    push(a_run, REPO)
    assert slept == [asked]


def test_a_wait_that_is_too_long_is_left_to_the_person(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail("whoami", 429, headers={"Retry-After": "3600"})
    assert "asks to wait 3,600 s" in no_push(a_run, hub)
    assert slept == []


def test_waits_grow_and_are_not_those_of_everybody(hub: Hub) -> None:
    first, second, third = ({upload._wait(TimeoutError(), n) for _ in range(20)} for n in (1, 2, 3))
    assert max(first) < min(second) <= max(second) < min(third)  # type: ignore[type-var]
    assert len(first) > 1


def test_a_page_that_is_not_the_hubs(a_run: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail("/", 200, body=b"<html>Welcome! Room number?</html>")
    assert "the hub's answer is not one" in no_push(a_run, hub)
    hub.faults.clear()
    hub.fail("/", 200, body=b"{}")
    assert "the hub's answer is not one" in no_push(a_run, hub)


def test_the_clients_patience_is_given_back(a_run: Path, hub: Hub) -> None:
    before = _http._GLOBAL_CLIENT_FACTORY
    push(a_run, REPO)
    assert _http._GLOBAL_CLIENT_FACTORY is before


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
    notice = "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc."
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
    assert (files["LICENSE.txt"].decode(), files["USE_POLICY.md"].decode()) == (AGREEMENT, "Be good.")
    assert b"Llama 3.3 Community License" in files["NOTICE"]


def test_a_base_without_a_licence_is_not_given_one(a_run: Path, hub: Hub) -> None:
    notes = [update.text for update in pushing(a_run, REPO) if update.kind == "note"]
    assert any("names no licence" in note for note in notes)
    card = ModelCard(hub.written[REPO].files["README.md"].decode())
    assert not [key for key in (*licence.KEYS, "base_model") if card.data.get(key)]
    assert "is not known here" in card.text


def test_a_hub_that_cannot_be_reached_is_not_waited_for_to_learn_a_licence(hub: Hub, slept: list[float]) -> None:
    base = find_base(NAME, "main")
    hub.fail("/", 503)
    before = len(hub.requests)
    assert licence.read_licences(NAME, COMMIT, base.path, ["lab/pairs"]) == {"base": {}, "data": {"lab/pairs": {}}}
    hub.stop()
    assert licence.read_licences(NAME, COMMIT, base.path, ["lab/pairs"]) == {"base": {}, "data": {"lab/pairs": {}}}
    assert len(hub.requests) == before + 2
    assert slept == []


def test_licences_of_base_and_data_from_their_cards(hub: Hub) -> None:
    hub.set.mkdir()
    (hub.set / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (hub.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    base = find_base(NAME, "main")
    known = {"base": {"license": "apache-2.0"}, "data": {SET: {"license": "cc-by-nc-4.0"}}}
    assert licence.read_licences(NAME, COMMIT, base.path, [SET, "/a/file.jsonl", "builtin:two-tones"]) == known
    hub.stop()
    assert licence.read_licences(NAME, COMMIT, base.path, [SET]) == known


# --- a card changed by hand


def test_a_card_changed_by_hand_is_pushed_as_it_is(a_run: Path, hub: Hub) -> None:
    card = a_run / "README.md"
    card.write_text(card.read_text().replace("## Limits", "My own words.\n\n## Limits").replace("pipeline_tag", "language: en\npipeline_tag"))  # fmt: skip  # noqa: E501
    push(a_run, REPO, merged="original")
    pushed = ModelCard(hub.written[REPO].files["README.md"].decode())
    assert "My own words." in pushed.text
    assert (pushed.data.language, pushed.data.library_name) == ("en", "transformers")
    assert "OWNER/NAME" not in pushed.text
    assert "--samples: given" in refused(RecipeError, lambda: push(a_run, REPO, merged="original", samples=1), code=2)
    card.write_text("No metadata at all.")
    assert "metadata" in refused(CheckpointError, lambda: push(a_run, REPO), code=5)


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
    assert f"{hub.endpoint}/{REPO} (to be seen by everybody)" in said
    assert hub.written[REPO].is_private is False
    hub.fail("whoami", 503)
    code, _, said = call("push", str(a_run), REPO, "--merged", "--public")
    assert code == 8
    assert said.splitlines()[-1].endswith(f"then: orpo-lite push {a_run} {REPO} --merged --public")
    assert "Traceback" not in said
    code, _, said = call("push", str(a_run), "a b")
    assert code == 2


@pytest.fixture
def small(workspace: Path, small_recipe: Callable[..., Any], call: Call, hub: Hub) -> Callable[..., Answer]:
    """Trains with the recipe of the workspace, pushed to REPO when all is done."""
    small_recipe()
    pushed = ("output.push_to_hub=true", f"output.hub_model_id={REPO}", "training.max_steps=2")
    return lambda *overrides: call("train", "--recipe", "./small.yaml", *pushed, *overrides)


def test_a_recipe_that_pushes(small: Callable[..., Answer], hub: Hub, workspace: Path) -> None:
    code, said, complained = small()
    assert code == 0, complained
    assert f"{hub.endpoint}/{REPO} (to be seen by you" in said
    assert hub.written[REPO].is_private
    assert "adapter_model.safetensors" in hub.written[REPO].files
    with safe_open(workspace / "run/adapter/adapter_model.safetensors", "pt") as file:
        assert list(file.keys())
    written = [path for path in (workspace / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("trouble", ["no token", "reads", "fine-grained", "refused", "stranger", "public", "offline"])
def test_what_cannot_be_pushed_is_not_trained(
    small: Callable[..., Answer], hub: Hub, workspace: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
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
        from hub_server import Repository

        hub.written[REPO] = Repository(is_private=False)
    else:
        hub.grant("read" if trouble == "reads" else "fineGrained", **({} if trouble == "reads" else {"scoped": []}))
    monkeypatch.setattr(
        import_module("orpo_lite.train"), "load_pair_model", lambda *_: pytest.fail("weights were loaded")
    )
    code, said, complained = small()
    assert code == 8
    assert "output.push_to_hub=false" in complained
    if trouble not in ("stranger", "public", "offline"):
        assert "hf auth login" in complained
    assert not (workspace / "run").exists()
    assert "proving" not in said


def test_a_name_that_the_licence_refuses_is_not_trained(
    small: Callable[..., Answer], hub: Hub, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        import_module("orpo_lite.train"), "load_pair_model", lambda *_: pytest.fail("weights were loaded")
    )
    (workspace / "base/README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n")
    code, _, complained = small()
    assert code == 2
    assert "“Llama 3” at the beginning" in complained
    assert "someone/Llama-3-tuned" in complained
    code, _, complained = small("output.hub_model_id=someone/Llama-3-tuned")
    assert code == 4
    assert f"put it into {workspace}/base" in complained
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


def test_a_run_that_goes_on_is_not_held_up_by_the_hub(
    small: Callable[..., Answer], hub: Hub, workspace: Path, call: Call
) -> None:
    hub.fail(LFS, 403)
    assert small("output.merge=false")[0] == 8
    shutil.rmtree(workspace / "run/adapter")
    hub.fail("whoami", 401)
    code, said, _ = call("train", "--resume", "run")
    assert code == 8
    assert "the push at the end may fail" in said
    assert (workspace / "run/adapter/adapter_model.safetensors").is_file()


def test_from_python(a_run: Path, hub: Hub) -> None:
    import orpo_lite

    assert isinstance(orpo_lite.push(a_run, REPO), PushResult)
