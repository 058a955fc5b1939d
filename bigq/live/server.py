"""A server for the page and the metrics of jobs: on the loopback address, read only, a few fixed paths.

Other programs of this machine's users can read it as they can read the folders. Pages of other sites cannot: a browser sends the name that
it was given, and only names of this machine are answered.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bigq.errors import ResourceError
from bigq.live.metrics import metrics
from bigq.live.page import render
from bigq.live.watched import WatchedJob, watched
from bigq.reports.document import POLICY
from bigq.version import __version__

ADDRESS = "127.0.0.1"
#: Names by which a browser may call this machine.
NAMES = ("127.0.0.1", "localhost")
#: Seconds for which the records are not read again, however many look.
KEPT = 1.0


class Server(ThreadingHTTPServer):
    """Answers until ``shutdown``. port: 0 takes a free one. refresh: seconds after which a browser asks again.

    Raises ResourceError where the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, places: Sequence[Path], port: int, refresh: int) -> None:
        self._places, self._refresh = places, refresh
        self._guard = threading.Lock()
        self._kept: tuple[float, list[WatchedJob]] | None = None
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ResourceError(f"--port {port}: cannot be listened on ({reason}); name another port, or 0 for any that is free") from error

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def answer(self, path: str) -> tuple[str, str] | None:
        """The content type and the text for a path; None where there is nothing."""
        makers: dict[str, tuple[str, Callable[[list[WatchedJob]], str]]] = {
            "/": ("text/html", lambda jobs: render(jobs, self._refresh)),
            "/status.json": ("application/json", lambda jobs: json.dumps({"jobs": [job.to_json() for job in jobs]})),
            "/metrics": ("text/plain; version=0.0.4", metrics),
        }
        if path not in makers:
            return None
        kind, make = makers[path]
        return f"{kind}; charset=utf-8", make(self._jobs())

    def _jobs(self) -> list[WatchedJob]:
        with self._guard:
            if self._kept is None or time.monotonic() - self._kept[0] > KEPT:
                jobs = watched(self._places)
                self._kept = time.monotonic(), jobs
            return self._kept[1]


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = f"bigq/{__version__}", ""
    protocol_version = "HTTP/1.1"
    #: Seconds that a silent connection is kept.
    timeout = 30

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if name not in NAMES:
            self._send(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", "This server is for this machine only.\n")
            return
        found = self.server.answer(self.path.partition("?")[0])
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", "There are /, /status.json and /metrics.\n")
        else:
            self._send(HTTPStatus.OK, *found)

    do_HEAD = do_GET

    def _send(self, status: HTTPStatus, kind: str, content: str) -> None:
        data = content.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing is logged: whoever looks on is no event."""
