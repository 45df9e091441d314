"""The hub as a base's source, on a loopback server that speaks its protocol: what is fetched, and
every refusal."""

import errno
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_pairs
from hub_server import COMMIT, NAME, PICKLES, SET, TOKEN, WEIGHTS, Hub, environment
from huggingface_hub import constants, file_download, hf_hub_download

from orpo_lite.base import download as base_download
from orpo_lite.base.adapter import find_adapter
from orpo_lite.base.find import Base, fetch_weights, find_base
from orpo_lite.errors import FitError, HubError, ModelError, OrpoLiteError
from orpo_lite.merging.merge import merge

NAMED_TEMPLATE = "additional_chat_templates/rag.jinja"


def fetch(name: str = NAME, revision: str = "main") -> Base:
    return fetch_weights(find_base(name, revision))


def refused(kind: type[OrpoLiteError], do: Callable[[], object]) -> str:
    """The message of the error that ``do`` must raise, after what every such message must hold."""
    with pytest.raises(kind) as raised:
        do()
    assert type(raised.value) is kind
    assert raised.value.exit_code == {HubError: 8, FitError: 6, ModelError: 4}[kind]
    assert raised.value.fix or raised.value.expected
    assert TOKEN not in str(raised.value)
    return str(raised.value)


# --- what is fetched


def test_text_first_then_weights_and_never_a_pickle(hub: Hub) -> None:
    for name in (NAMED_TEMPLATE, "original/params.json", "adapters/config.json"):
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_text("{}")
    base = find_base(NAME, "main")
    assert (base.name, base.revision, base.config.model_type) == (NAME, COMMIT, "llama")
    text = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        NAMED_TEMPLATE,
    }
    assert hub.fetched() == text
    whole = fetch_weights(base)
    assert hub.fetched() == text | {WEIGHTS}
    assert (whole.path / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    assert base.fingerprint == ""
    assert whole.fingerprint == fetch_weights(find_base(str(hub.folder), "main")).fingerprint
    assert not [line for line in hub.requests if any(name in line for name in PICKLES)]
    assert f"Bearer {TOKEN}" in hub.tokens


def test_what_is_cached_is_not_fetched_again(hub: Hub) -> None:
    fetch()
    hub.requests.clear()
    fetch()
    assert hub.requests == [f"GET /api/models/{NAME}/revision/main"]


def test_a_commit_pins_the_revision(hub: Hub) -> None:
    assert fetch(revision=COMMIT).revision == COMMIT
    assert not [line for line in hub.requests if "main" in line]


def test_an_adapter_without_its_pickle(hub: Hub) -> None:
    (hub.folder / "adapter_config.json").write_text("{}")
    shutil.copy(hub.folder / WEIGHTS, hub.folder / "adapter_model.safetensors")
    assert (find_adapter(NAME) / "adapter_model.safetensors").is_file()
    assert hub.fetched() == {"adapter_config.json", "adapter_model.safetensors"}
    hub.stop()
    assert (find_adapter(NAME) / "adapter_model.safetensors").is_file()


def test_another_peoples_format_is_neither_fetched_nor_part_of_the_base(hub: Hub) -> None:
    """Mistral's own consolidated.safetensors doubles the download; ``hf download`` leaves it in the
    same folder."""
    base = fetch()
    assert not (base.path / "consolidated.safetensors").exists()
    hf_hub_download(NAME, "consolidated.safetensors")
    assert (base.path / "consolidated.safetensors").exists()
    assert fetch().fingerprint == base.fingerprint


# --- refused before any weight


@pytest.mark.parametrize("at", ["/api/", "/resolve/"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_base_names_its_page_and_the_login(hub: Hub, at: str, status: int) -> None:
    hub.fail(
        at, status, "GatedRepo"
    )  # the hub lists a gated repository for everybody and refuses its files
    message = refused(HubError, fetch)
    assert "gated" in message
    assert f"{hub.endpoint}/{NAME}" in message
    assert "hf auth login" in message
    assert hub.fetched() == set()


@pytest.mark.parametrize("at", ["/api/", "/resolve/"])
@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {}),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        (401, {"X-Error-Code": "RepoNotFound"}),
        (403, {}),
    ],
)
def test_no_access_names_the_login(hub: Hub, at: str, status: int, headers: dict[str, str]) -> None:
    hub.fail(at, status, headers=headers)
    message = refused(HubError, fetch)
    assert NAME in message
    assert "hf auth login" in message
    assert "connected machine" not in message


def test_an_unknown_repository(hub: Hub) -> None:
    message = refused(HubError, lambda: fetch("someone/tyni"))
    assert "someone/tyni" in message
    assert "spelling" in message


@pytest.mark.parametrize("name", ["someone/a model", "someone--tiny", "someone/tiny.git"])
def test_a_name_that_no_repository_can_have(hub: Hub, name: str) -> None:
    message = refused(HubError, lambda: fetch(name))
    assert name in message
    assert "spelling" in message
    assert hub.requests == []


def test_an_unknown_revision(hub: Hub) -> None:
    message = refused(HubError, lambda: fetch(revision="v9"))
    assert f"{NAME} at v9" in message
    assert "revision" in message


def test_weights_in_pickle_only(hub: Hub) -> None:
    (hub.folder / WEIGHTS).unlink()
    assert "safetensors" in refused(ModelError, fetch)
    assert hub.fetched() == set()


def test_a_base_that_needs_its_own_code(hub: Hub) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.Model"}})
    )
    (hub.folder / "code.py").write_text("raise SystemExit(1)")
    assert "auto_map" in refused(ModelError, fetch)
    assert not any(name.endswith((".safetensors", ".py")) for name in hub.fetched())


def test_a_disk_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(hub.folder)
    needed = sum(
        path.stat().st_size
        for name, path in hub.files().items()
        if name.endswith((".json", WEIGHTS))
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed // 2))
    message = refused(FitError, fetch)
    assert "MiB free" in message
    assert "HF_HOME" in message
    assert hub.fetched() == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    fetch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    fetch()  # nothing left to fetch


# --- a hub in trouble


@pytest.mark.parametrize("at", ["/api/", "HEAD .*/resolve/", "GET .*/resolve/.*safetensors"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy(hub: Hub, slept: list[float], at: str, status: int) -> None:
    hub.fail(at, status)
    started = time.monotonic()
    message = refused(HubError, fetch)
    assert time.monotonic() - started < 10
    assert sum(slept) < 120
    assert len(hub.requests) < 60
    assert f"{NAME} at " in message
    assert str(status) in message
    assert f"hf download {NAME}" in message


def test_a_hub_that_never_answers(
    hub: Hub, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_download, "HUB_TIMEOUT", 0.3)
    hub.fail("/revision/", hang=True)
    started = time.monotonic()
    message = refused(HubError, fetch)
    assert time.monotonic() - started < 5
    assert "ReadTimeout" in message
    assert f"hf download {NAME}" in message


def test_a_file_that_never_comes(
    hub: Hub, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, limit, 0.3)
    hub.fail(f"GET .*{WEIGHTS}", hang=True)
    started = time.monotonic()
    message = refused(HubError, fetch)
    assert time.monotonic() - started < 15
    assert f"{NAME} at {COMMIT}" in message


def test_a_page_that_is_not_the_hubs(hub: Hub) -> None:
    """A hotel's login page answers everything with 200 and HTML."""
    hub.fail("/", 200, body=b"<html>Welcome! Room number?</html>")
    assert f"hf download {NAME}" in refused(HubError, fetch)


def test_half_a_download_and_the_second_attempt(hub: Hub, slept: list[float]) -> None:
    hub.fail(f"GET .*{WEIGHTS}", cut=True, times=1)
    hub.fail(f"GET .*{WEIGHTS}", 500)
    message = refused(HubError, fetch)
    assert f"{NAME} at {COMMIT}" in message
    assert not list((Path(constants.HF_HUB_CACHE)).rglob(WEIGHTS))
    hub.faults.clear()
    assert (fetch().path / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()


def test_one_cut_connection_is_mended_on_the_way(hub: Hub, slept: list[float]) -> None:
    hub.fail(f"GET .*{WEIGHTS}", cut=True, times=1)
    assert (fetch().path / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    assert len([line for line in hub.requests if line.startswith("GET") and WEIGHTS in line]) == 2


def test_a_disk_that_fills_up_on_the_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    base = find_base(NAME, "main")
    monkeypatch.setattr(file_download, "http_get", full)
    assert "HF_HOME" in refused(FitError, lambda: fetch_weights(base))


# --- without a network


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_unreachable_but_cached(hub: Hub, caplog: pytest.LogCaptureFixture, revision: str) -> None:
    before = fetch(revision=revision)
    hub.stop()
    with caplog.at_level(logging.WARNING, "orpo_lite"):
        after = fetch(revision=revision)
    assert after.path == before.path
    assert (after.revision, after.fingerprint) == (before.revision, before.fingerprint)
    assert f"using the cached copy of {NAME}" in caplog.text


def test_a_busy_hub_and_a_cached_base(
    hub: Hub, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    before = fetch()
    hub.fail("/", 503)
    assert fetch().path == before.path
    assert "cached copy" in caplog.text


def test_unreachable_and_not_cached(hub: Hub, slept: list[float]) -> None:
    hub.stop()
    message = refused(HubError, fetch)
    assert f"{NAME} at main" in message
    assert f"hf download {NAME}" in message


def test_unreachable_and_only_the_text_cached(hub: Hub, slept: list[float]) -> None:
    find_base(NAME, "main")
    hub.stop()
    message = refused(HubError, fetch)
    assert f"hf download {NAME} --revision {COMMIT}" in message


def test_unreachable_and_only_the_configuration_cached(hub: Hub, slept: list[float]) -> None:
    """By another program, which leaves no listing of the files that there should be."""
    hf_hub_download(NAME, "config.json")
    hub.stop()
    assert f"hf download {NAME}" in refused(HubError, fetch)


# --- the whole program, which learns of the hub from its environment


def see_data(hub: Hub, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """`orpo-lite data` on a set of the hub, with the hub's client and the cache of a home of its
    own."""
    command = [sys.executable, "-m", "orpo_lite", "data", "--recipe", "./pairs.yaml"]
    (folder / "pairs.yaml").write_text(
        f"model:\n  model_name_or_path: {hub.folder}\ndata:\n  dataset_name: {SET}\n"
        "  max_length: 128\n  max_prompt_length: 96\n"
    )
    env = environment(hub, folder / "home") | changes
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("proxied", [False, True])
def test_a_set_through_a_mirror_or_a_proxy_and_later_from_the_cache(
    hub: Hub, tmp_path: Path, proxied: bool
) -> None:
    hub.set.mkdir()
    write_pairs(hub.set / "train.jsonl", 10)
    own = dict.fromkeys(("http_proxy", "HTTP_PROXY"), hub.endpoint if proxied else "")
    own |= dict.fromkeys(("no_proxy", "NO_PROXY"), "" if proxied else "127.0.0.1")
    own |= {"HF_ENDPOINT": "http://hub.invalid"} if proxied else {}
    host = "hub.invalid" if proxied else hub.endpoint.removeprefix("http://")
    served = see_data(hub, tmp_path, **own)
    assert served.returncode == 0, served.stderr
    assert served.stdout.startswith(f"asking {host} for {SET} ...\n")
    assert "10 rows: " in served.stdout
    assert "cannot be reached" not in served.stdout
    hub.requests.clear()
    offline = see_data(hub, tmp_path, **own, HF_HUB_OFFLINE="1")
    assert "10 rows: " in offline.stdout
    assert "asking" not in offline.stdout
    assert hub.requests == []
    hub.stop()
    started = time.monotonic()
    gone = see_data(hub, tmp_path, **own)
    assert time.monotonic() - started < 20
    assert "10 rows: " in gone.stdout
    assert f"{SET}: {host} cannot be reached (" in gone.stdout
    assert "; read from the cache" in gone.stdout


def test_a_set_that_is_not_cached_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    started = time.monotonic()
    refused = see_data(hub, tmp_path)
    assert time.monotonic() - started < 20
    assert refused.returncode == 8
    host = hub.endpoint.removeprefix("http://")
    assert refused.stdout == f"asking {host} for {SET} ...\n"
    first, *_, last = refused.stderr.splitlines()
    assert (
        first == f"data.dataset_name {SET}: {host} cannot be reached (ConnectError), "
        "and the dataset is not in the cache"
    )
    assert (
        f"hf download --repo-type dataset {SET} --local-dir {SET.rpartition('/')[2]}, "
        "then data.dataset_name=" in last
    )


def test_a_slow_hub_is_waited_for_as_long_as_was_asked(hub: Hub, tmp_path: Path) -> None:
    hub.fail(f"HEAD .*{SET}", hang=True)
    refused = see_data(hub, tmp_path, HF_HUB_ETAG_TIMEOUT="1")
    assert len([line for line in hub.requests if SET in line]) == 1
    assert "cannot be reached (ReadTimeout)" in refused.stderr
    assert "; if it is slow, HF_HUB_ETAG_TIMEOUT=60 waits longer" in refused.stderr


@pytest.mark.long
def test_a_run_on_a_hub_base_and_its_merge_without_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 10)
    (tmp_path / "small.yaml").write_text(
        f"model:\n  model_name_or_path: {NAME}\n"
        "data:\n  dataset_name: ./pairs.jsonl\n  test_split_size: 0\n"
        "  max_length: 128\n  max_prompt_length: 96\n"
        "training:\n  global_batch_size: 4\n  max_steps: 2\n"
        "  output_dir: run\noutput:\n  merge: false\n  samples: 0\n"
    )
    command = [sys.executable, "-m", "orpo_lite", "train", "--recipe", "./small.yaml"]
    env = environment(hub, tmp_path / "home")
    trained = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert trained.returncode == 0, trained.stderr
    lock = json.loads((tmp_path / "run/lock.json").read_text())
    assert (lock["base"]["name"], lock["base"]["revision"]) == (NAME, COMMIT)
    assert f"Bearer {TOKEN}" in hub.tokens
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    assert (merge(tmp_path / "run").folder / WEIGHTS).is_file()
    assert not [line for line in hub.requests if any(name in line for name in PICKLES)]
    written = [
        path
        for folder in ("run", "home")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    ]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
