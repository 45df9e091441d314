"""Serve the report of a running training on 127.0.0.1, so that no other machine can read it."""

import threading
from collections.abc import Generator, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from orpo_lite.errors import Command, RecipeError
from orpo_lite.evaluation.report import make_body, read_runs, wrap_body
from orpo_lite.runs.commands import quoted
from orpo_lite.runs.folder import is_in_use
from orpo_lite.updates import Update

HOST = "127.0.0.1"
PORT = 8790  # the default; if it is in use, any free port is taken
NAMES = (HOST, "localhost")
WATCHED = (
    "metrics.jsonl",
    "samples.jsonl",
    "verdict.json",
    "eval.json",
    "result.json",
    "lock.json",
)
POLL = 0.5  # seconds


class LivePage:
    """The report of some runs as a web page. If a file of a run changes, the page is made again."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.is_finished = False
        self._lock = threading.Lock()  # matplotlib's settings are global
        self._version, self._page, self._body = "", "", ""

    def read(self) -> tuple[str, str, str]:
        """Return (version, page, body).

        ``version`` is a text that changes whenever a watched file changes. ``page`` is the whole
        page, for a browser that opens it. ``body`` is only the body of the page, for a browser that
        has the page open already: a script in the page shows the new body.

        Raises:
            OrpoLiteError: a run cannot be read; see :func:`orpo_lite.evaluation.report.report`.
        """
        with self._lock:
            version = self._newest()
            if version != self._version:
                records = read_runs(self.paths)
                body = make_body(records, live=True)
                self._page, self._body = wrap_body(body, records, live=True), str(body)
                self.is_finished = all(record.is_finished for record in records)
                self._version = version
            return self._version, self._page, self._body

    def _newest(self) -> str:
        """Return a text that changes if a watched file changes, or a training starts or ends."""
        found = [f"{is_in_use(path):d}" for path in self.paths]
        for file in (path / name for path in self.paths for name in WATCHED):
            if file.is_file():
                status = file.stat()
                found.append(f"{status.st_mtime_ns:x}.{status.st_size:x}")
            else:
                found.append("0")
        return "-".join(found)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests for the page (``/``) and for its body (``/body``)."""

    timeout = 30  # seconds; a browser may open connections and never use them

    def __init__(self, page: LivePage, *args: Any) -> None:
        self.page = page
        super().__init__(*args)

    def do_GET(self) -> None:
        """Send the page, or its body if it has changed, or an error."""
        # Refuse other host names. Otherwise a web page on another host name could make that name
        # resolve to this machine (DNS rebinding) and read the run.
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in NAMES:
            self._send(HTTPStatus.FORBIDDEN, f"use http://{HOST}")
            return
        asked = urlsplit(self.path)
        if asked.path not in ("/", "/body"):
            self._send(HTTPStatus.NOT_FOUND, "not found")
            return
        version, page, body = self.page.read()
        if asked.path == "/":
            self._send(HTTPStatus.OK, page, version)
        elif parse_qs(asked.query).get("version") == [version]:
            self._send(HTTPStatus.NO_CONTENT, "")
        else:
            self._send(HTTPStatus.OK, body, version)

    def _send(self, status: HTTPStatus, text: str, version: str = "") -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        if version:
            self.send_header("X-Version", version)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    """An HTTP server with a thread for each request, so that a slow reader blocks no other."""

    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing. A browser closed the page, or a file of a run cannot be read now."""


def live_events(
    run_folders: Sequence[Path], *, port: int | None = None
) -> Generator[Update, None, None]:
    """Serve the report of runs on 127.0.0.1 until the generator is closed.

    Yields the report's address as a note. The generator never ends on its own.

    Args:
        run_folders: the runs to show.
        port: the port of the server. None: :data:`PORT` if it is free, else any free port.

    Raises:
        CheckpointError: a folder is not a run.
        RecipeError: ``port`` is in use.
    """
    page = LivePage([path.expanduser() for path in run_folders])
    with _listen(page, port, run_folders) as server:
        server.timeout = POLL
        yield Update("stage", "drawing the report")
        page.read()
        address = f"http://{HOST}:{server.server_port}"
        yield Update("note", f"the report is on {address} (press Ctrl-C to stop)")
        finished = False
        while True:
            server.handle_request()
            if page.is_finished and not finished:
                yield Update(
                    "note", "the training has ended; press Ctrl-C to stop serving the report"
                )
            finished = page.is_finished


def _listen(page: LivePage, port: int | None, run_folders: Sequence[Path]) -> _Server:
    handler = partial(_Handler, page)
    try:
        return _Server((HOST, PORT if port is None else port), handler)
    except OSError as error:
        free = _Server((HOST, 0), handler)
        if port is None:
            return free
        with free:
            other = free.server_port
        runs = " ".join(quoted(path) for path in run_folders)
        raise RecipeError(
            where=f"--port {port}",
            found=f"cannot be used ({error.strerror})",
            expected="a free port",
            fix=Command(f"orpo-lite report {runs} --live --port {other}"),
        ) from error
