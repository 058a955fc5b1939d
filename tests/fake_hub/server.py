"""A hub on 127.0.0.1: folders are repositories, over the HTTP API that huggingface_hub's client speaks. It can be a bad server.

Faults are data: ``Faults`` says how many of the next requests for parts of shards go wrong, and how.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fake_hub.uploads import Uploads

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: What can be wrong with an answer to a request for part of a shard.
KINDS = ("cut", "short", "long", "elsewhere", "busy", "error", "stall")


@dataclass(slots=True)
class Faults:
    """kinds: of the answers to come, in turn; empty: all are good. share: of the requests that go wrong, after ``after`` good ones.

    stall: seconds of a stalled one. rate: bytes per second of a connection, or None. seen: how many went wrong, by kind.
    """

    kinds: tuple[str, ...] = ()
    share: float = 1.0
    after: int = 0
    stall: float = 1.0
    rate: float | None = None
    seen: dict[str, int] = dataclasses.field(default_factory=dict)
    _random: random.Random = dataclasses.field(default_factory=lambda: random.Random(0))
    _count: int = 0

    def next(self) -> str | None:
        if self.after > 0:
            self.after -= 1
            return None
        if not self.kinds or self._random.random() >= self.share:
            return None
        kind = self.kinds[self._count % len(self.kinds)]
        self._count += 1
        self.seen[kind] = self.seen.get(kind, 0) + 1
        return kind


class Hub(ThreadingHTTPServer):
    """repositories: "owner/name" or "datasets/owner/name" → folder. requests: "METHOD path" of everything asked for.

    ranges: bytes that requests for parts of files were answered with. faults: of the answers to requests for parts of shards.
    denied: the status of every answer; 0: none.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.repositories: dict[str, Path] = {}
        self.requests: list[str] = []
        self.ranges: list[int] = []
        self.faults = Faults()
        self.uploads = Uploads()
        self.denied = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients end connections whose answers are wrong."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> set[str]:
        """Names of the files whose contents were asked for."""
        return {line.partition(f"/{COMMIT}/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line}

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that uses this hub. home: for its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer with a body takes 40 ms

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        self.server.uploads.answer(self, self._log(), self.server.url)

    def do_PUT(self) -> None:
        self.do_POST()

    def _log(self) -> str:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} /{path}")
        return path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self._log()
        found = (self.server.denied, b"", {}) if self.server.denied else self.server.uploads.find(path)
        status, body, headers = found or self._find(path)
        wanted = self.headers.get("Range", "")
        fault = None
        if status == 200 and wanted.startswith("bytes="):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            whole, stop = body if isinstance(body, Path) else None, last + 1
            fault = self.server.faults.next() if whole is not None and whole.suffix == ".safetensors" else None
            first, stop = (first + 8, stop + 8) if fault == "elsewhere" else (first, stop)
            size = whole.stat().st_size if whole is not None else len(body)
            status, body = 206, _part(body, first, min(stop, size))
            headers = {**headers, "Content-Range": f"bytes {first}-{first + len(body) - 1}/{size}"}
            self.server.ranges.append(len(body))
        elif isinstance(body, Path):
            body = body.read_bytes() if with_body else body.stat().st_size
        if fault == "busy":
            status, body, headers = 429, b"", {"Retry-After": "0"}
        elif fault == "error":
            status, body, headers = 503, b"", {}
        elif fault == "short":
            body = body[: len(body) // 2]
        elif fault == "long":
            body += b"x" * 100
        length = body if isinstance(body, int) else len(body)
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and not isinstance(body, int):
            self._send(body, fault)

    def _send(self, body: bytes, fault: str | None) -> None:
        if fault in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(self.server.faults.stall)
            self.close_connection = True
            return
        rate = self.server.faults.rate
        step = len(body) if rate is None else max(1, int(rate / 20))
        for start in range(0, len(body), max(step, 1)):
            self.wfile.write(body[start : start + step])
            if rate is not None:
                time.sleep(1 / 20)

    def _find(self, path: str) -> tuple[int, bytes | Path, dict[str, str]]:
        for name, folder in self.server.repositories.items():
            api = f"api/{name}" if name.startswith("datasets/") else f"api/models/{name}"
            files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
            if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}", api):
                value = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}
            if path.startswith(f"{api}/revision/"):
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            if path.startswith(f"{api}/tree/"):
                tree = [{"type": "file", "path": f, "size": p.stat().st_size, "oid": digest(p)[:40]} for f, p in files.items()]
                return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
            for revision in ("main", COMMIT):
                start = f"{name}/resolve/{revision}/"
                if path.startswith(start):
                    file = files.get(path.removeprefix(start))
                    if file is None:
                        return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                    return 200, file, {"ETag": f'"{digest(file)[:40]}"', "X-Repo-Commit": COMMIT}
            plain = folder / path.removeprefix(f"{name}/plain/")
            if path.startswith(f"{name}/plain/") and plain.is_file():  # as a web server that is no hub
                return 200, plain, {"ETag": f'"{digest(plain)[:40]}"'}
        return 404, b"", {"X-Error-Code": "RepoNotFound"}


def _part(body: bytes | Path, start: int, stop: int) -> bytes:
    if isinstance(body, bytes):
        return body[start:stop]
    with open(body, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


_digests: dict[tuple[Path, int], str] = {}


def digest(path: Path) -> str:
    key = (path, path.stat().st_mtime_ns)
    if key not in _digests:
        with open(path, "rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
