"""A loopback server that speaks the hub's protocol, downloads and uploads, and fails in each way that it is told to."""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http

NAME = "someone/tiny"
SET = "someone/pairs"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"
PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "flax_model.msgpack")
TOKEN = "hf_canaryTokenThatMustStayUnseen"


@dataclass
class Fault:
    """What the server does instead of answering, at requests whose "METHOD path" matches."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hang: bool = False
    cut: bool = False
    """Send half of the file, then close the connection."""
    late: bool = False
    """Do what is asked, then close the connection in place of an answer."""
    times: int = 1 << 30


@dataclass
class Repository:
    """One that can be written to."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Message and paths of each."""


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that downloads of models and data sets need, and pushes of models."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.set = folder.with_name("set")
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.who: dict[str, Any] = {"type": "user", "name": "someone", "orgs": [], "auth": {}}
        self.grant("write")
        self.written: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        """LFS objects by sha256."""
        self.bodies: list[bytes] = []
        """Every byte that was sent, request by request."""
        self.closing = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def fail(self, pattern: str, status: int = 0, code: str = "", **options: Any) -> None:
        """Answer matching requests with a fault; ``code`` is the hub's X-Error-Code."""
        headers = {"X-Error-Code": code} if code else {}
        self.faults.append(Fault(pattern, status, headers | options.pop("headers", {}), **options))

    def grant(self, role: str, **rights: Any) -> None:
        """What the access token may do; ``rights`` are those of a fine-grained one."""
        self.who["auth"] = {
            "accessToken": {"role": role, **({"fineGrained": rights} if rights else {})}
        }

    def asked(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [line for line in self.requests if re.search(pattern, line)]

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.closing.set()
        self.shutdown()
        self.server_close()
        close_session()  # the client keeps connections open

    def files(self, name: str = NAME) -> dict[str, Path]:
        """A repository's files by name."""
        folder = self.set if name == SET else self.folder
        return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        lines = (line for line in self.requests if line.startswith("GET ") and "/resolve/" in line)
        return {re.sub(r".*/resolve/[^/]+/", "", line) for line in lines}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    late = False
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        line = f"{self.command} {path}"
        self.server.requests.append(line)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        fault = next(
            (f for f in self.server.faults if f.times > 0 and re.search(f.pattern, line)), None
        )
        if fault:
            fault.times -= 1
        if fault and fault.cut and self.command in ("POST", "PUT"):
            self.rfile.read(1)
            self.close_connection = True
            return
        body = self.read_body()
        self.server.bodies.append(body)
        self.late = bool(fault and fault.late)
        if fault and fault.hang:
            self.server.closing.wait(20)
            self.close_connection = True
        elif fault and fault.status:
            self.answer(fault.status, fault.body, fault.headers)
        elif self.command in ("POST", "PUT"):
            self.take(path, body)
        else:
            self.give(path, parse_qs(url.query), cut=bool(fault))

    def give(self, path: str, query: dict[str, list[str]], *, cut: bool) -> None:
        """A request that reads."""
        if path == "/api/whoami-v2":
            self.answer_json(self.server.who)
        elif found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)", path.removesuffix("/revision/main")
        ):
            if found[1] == NAME:
                self.answer_listing(NAME, "revision", "main", query)
            else:
                self.answer_repository(found[1])
        elif found := re.fullmatch(
            rf"/api/(?:models|datasets)/({NAME}|{SET})/(revision|tree)/([^/]+)/?", path
        ):
            self.answer_listing(found[1], found[2], found[3], query)
        elif path == f"/api/datasets/{SET}":
            self.answer_listing(SET, "revision", "main", {})
        elif path.startswith(f"/api/datasets/{SET}/tree/"):
            self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        elif found := re.fullmatch(rf"/(?:datasets/)?({NAME}|{SET})/resolve/([^/]+)/(.+)", path):
            self.answer_file(found[1], found[2], found[3], cut=cut)
        else:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # --- what a push asks

    def answer_json(self, body: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def answer_repository(self, name: str) -> None:
        found = self.server.written.get(name)
        if found is None:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        sha = f"{len(found.commits):040x}"
        siblings = [{"rfilename": file} for file in found.files]
        self.answer_json(
            {
                "_id": "1",
                "id": name,
                "private": found.is_private,
                "sha": sha,
                "tags": [],
                "siblings": siblings,
            }
        )

    def take(self, path: str, body: bytes) -> None:
        """A request that writes."""
        server = self.server
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self.preupload(server.written[found[1]], json.loads(body)["files"])
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.answer_json(
                {
                    "transfer": "basic",
                    "objects": [self.place(o) for o in json.loads(body)["objects"]],
                }
            )
        elif found := re.fullmatch("/lfs/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            server.stored[found[1]] = body
            self.answer(200)
        elif path == "/lfs/verify":
            self.answer(200 if json.loads(body)["oid"] in server.stored else 404)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or self.server.who['name']}/{asked['name']}"
        if name in self.server.written:
            self.answer_json({"error": "You already created this model repo"}, 409)
            return
        self.server.written[name] = Repository(asked["visibility"] == "private")
        self.answer_json({"url": f"{self.server.endpoint}/{name}"})

    def preupload(self, repository: Repository, asked: list[dict[str, Any]]) -> None:
        files = []
        for file in asked:
            mode = "lfs" if file["path"].endswith((".safetensors", "tokenizer.json")) else "regular"
            there = repository.files.get(file["path"])
            oid = (
                None
                if there is None
                else hashlib.sha256(there).hexdigest()
                if mode == "lfs"
                else git_hash(there)
            )
            files.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer_json({"files": files})

    def place(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where an LFS object goes; nowhere when it is there."""
        object_ = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.server.stored:
            return object_
        where = {"upload": f"/lfs/{asked['oid']}", "verify": "/lfs/verify"}
        return object_ | {
            "actions": {name: {"href": self.server.endpoint + to} for name, to in where.items()}
        }

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository, files = self.server.written[name], {}
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        if absent := [path for path in deleted if path not in repository.files]:
            body = {"error": f"A file with this name doesn't exist: {absent[0]}"}
            self.answer(404, json.dumps(body).encode(), {"X-Error-Code": "EntryNotFound"})
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                continue
            is_lfs = line["key"] == "lfsFile"
            files[value["path"]] = (
                self.server.stored[value["oid"]] if is_lfs else base64.b64decode(value["content"])
            )
        repository.files = {
            path: had for path, had in repository.files.items() if path not in deleted
        } | files
        repository.commits.append((lines[0]["value"]["summary"], tuple(sorted(files))))
        oid = f"{len(repository.commits):040x}"
        self.answer_json(
            {"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid}
        )

    # --- what a download asks

    def answer_listing(
        self, repository: str, kind: str, revision: str, query: dict[str, list[str]]
    ) -> None:
        if revision not in ("main", COMMIT):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        files = {
            name: (path.stat().st_size, digest(path))
            for name, path in self.server.files(repository).items()
        }
        if kind == "revision":
            siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
            if query.get("blobs") == ["True"] or query.get("blobs") == ["true"]:
                siblings = [
                    {"rfilename": n, "size": size, "blobId": oid}
                    for n, (size, oid) in files.items()
                ]
            body: Any = {
                "_id": "1",
                "id": repository,
                "modelId": repository,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
            }
        else:
            body = [
                {"type": "file", "path": n, "size": size, "oid": oid}
                for n, (size, oid) in files.items()
            ]
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def answer_file(self, repository: str, revision: str, name: str, *, cut: bool) -> None:
        path = self.server.files(repository).get(name)
        if revision not in ("main", COMMIT) or path is None:
            self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        body = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(path)}"', "Accept-Ranges": "bytes"}
        first = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["0"])[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        self.answer(206 if first else 200, body[first:], headers, cut=cut)

    def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        cut: bool = False,
    ) -> None:
        if self.late:
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository: a tiny base, pickles of it, and what other people leave in sub-folders."""
    from conftest import write_base

    folder = write_base(tmp_path / "repository")
    for name in (
        *PICKLES,
        "README.md",
        "original/params.json",
        "onnx/model.safetensors",
        "consolidated.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'{{"file": "{name}"}}')
    server = Hub(folder)
    for key, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, key, value)
    # The hub's client tells a repository's 401 by an https address.
    monkeypatch.setattr(_http, "REPO_API_REGEX", re.compile(r"/api/models/.+|/resolve/"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # This hub has no certificate. Without this, each client reads those of the machine.
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    close_session()  # one without the proxies of this machine
    yield server
    server.stop()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have waited between its attempts; it does not wait here."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Of a process that knows the hub from its environment alone, as people's processes do."""
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    gone = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return {key: value for key, value in os.environ.items() if key not in gone} | own
