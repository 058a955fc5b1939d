"""The half of the fake hub that takes files: repositories are created, large files stored by their hash, and commits name them.

It speaks what huggingface_hub's client does without Xet: create, preupload, the LFS batch API, PUT, verify, commit. It can be a bad server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote

Answer = tuple[int, bytes, dict[str, str]]

#: What a repository holds when it is made.
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
#: Endings of the files that it keeps as large ones.
LARGE: tuple[str, ...] = (".safetensors", ".gguf")
#: The steps of an upload, which can fail.
STEPS = ("create", "access", "preupload", "batch", "put", "verify", "validate-yaml", "commit", "paths-info")


@dataclass
class Repository:
    """commits: hash → what it holds, by path; the last one is the newest. messages: of the commits that were made."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        return oid

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """What the newest commit holds."""
        return self.commits[self.head]

    def put(self, **files: bytes) -> None:
        """Somebody else's commit."""
        self.commit({**self.files, **files}, "by hand")

    def remove(self, name: str) -> None:
        self.commit({path: data for path, data in self.files.items() if path != name}, "by hand")


@dataclass
class Uploads:
    """repositories: "owner/name" → what was uploaded. faults: (step, kind) of the requests to come, each used once.

    A kind is a status ("429"), or "cut": the connection ends; "lost": the request is carried out, and answered with 500; "wrong": other
    bytes than those sent are kept. asked: the steps, in their order. authorized: the Authorization headers that came. writers:
    owners that may be written to; None for all.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    authorized: set[str] = field(default_factory=set)
    puts: list[int] = field(default_factory=list)
    writers: tuple[str, ...] | None = None
    retry_after: str = "0"
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, **files: bytes) -> Repository:
        """A repository that exists already."""
        repository = self.repositories[name] = Repository(private=False)
        repository.commit({".gitattributes": ATTRIBUTES, **files}, "initial commit")
        return repository

    def _fault(self, step: str) -> str | None:
        with self._guard:
            self.asked.append(step)
            due = next((fault for fault in self.faults if fault[0] == step), None)
            if due is not None:
                self.faults.remove(due)
            return None if due is None else due[1]

    def _may_write(self, name: str) -> bool:
        return self.writers is None or name.partition("/")[0] in self.writers

    # What the server asks.

    def find(self, path: str) -> Answer | None:
        """The answer to a GET or HEAD for something of these repositories; None if it is of none."""
        for name, repository in self.repositories.items():
            api = f"api/models/{name}"
            if path == f"{api}/auth-check/write":
                fault = self._fault("access")
                return _json({}, 403 if fault == "403" or not self._may_write(name) else 200)
            if path in (api, f"{api}/revision/main") or (
                path.startswith(f"{api}/revision/") and path.rpartition("/")[2] in repository.commits
            ):
                oid = repository.head if path.rpartition("/")[2] not in repository.commits else path.rpartition("/")[2]
                files = repository.commits[oid]
                return _json({"id": name, "sha": oid, "private": repository.private, "siblings": [{"rfilename": each} for each in files]})
            if path.startswith(f"{api}/tree/"):
                return _json([_entry(each, data) for each, data in repository.files.items()])
            for oid in ("main", *repository.commits):
                start = f"{name}/resolve/{oid}/"
                if path.startswith(start):
                    files = repository.files if oid == "main" else repository.commits[oid]
                    if (data := files.get(path.removeprefix(start))) is None:
                        return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.head}
                    return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repository.head}
        return None

    def answer(self, handler: BaseHTTPRequestHandler, path: str, url: str) -> None:
        """Answer a POST or a PUT."""
        self.authorized.add(handler.headers.get("Authorization", ""))
        step = self._step(path)
        length = int(handler.headers.get("Content-Length") or 0)
        fault = self._fault(step)
        if fault == "cut":
            handler.rfile.read(length // 2)
            handler.close_connection = True
            handler.connection.close()
            return
        body = handler.rfile.read(length) if length or "chunked" not in handler.headers.get("Transfer-Encoding", "") else _chunks(handler)
        if fault is not None and fault.isdigit():
            status, data, headers = int(fault), b"{}", {"Retry-After": self.retry_after} if fault == "429" else {}
        else:
            status, data, headers = self._carry_out(step, path, body, url, wrong=fault == "wrong")
            if fault == "lost":
                status, data = 500, b"{}"
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def _step(self, path: str) -> str:
        if path == "api/repos/create":
            return "create"
        if path.endswith("/info/lfs/objects/batch"):
            return "batch"
        if path.startswith("storage/"):
            return "put"
        if path in ("verify", "api/validate-yaml"):
            return path.rpartition("/")[2]
        return path.split("/")[4]

    def _carry_out(self, step: str, path: str, body: bytes, url: str, *, wrong: bool) -> Answer:
        if step == "put":
            self.stored[path.rpartition("/")[2]] = body[:-1] + bytes([body[-1] ^ 1]) if wrong else body
            self.puts.append(len(body))
            return 200, b"", {}
        if step == "paths-info":
            repository = self.repositories[_repository(path)]
            files = repository.commits.get(path.split("/")[5], repository.files)
            asked = [unquote(name) for name in parse_qs(body.decode()).get("paths", [])]
            return _json([_entry(name, files[name]) for name in asked if name in files])
        if step == "commit":
            return self._commit(_repository(path), [json.loads(line) for line in body.splitlines()], url)
        value = json.loads(body)
        if step == "create":
            return self._create(value, url)
        if step == "validate-yaml":
            bad = "license: [" in value["content"]
            return _json({"errors": [{"message": "is no YAML"}] if bad else [], "warnings": [{"message": "empty"}]}, 400 if bad else 200)
        if step == "preupload":
            files = self.repositories[_repository(path)].files
            return _json({"files": [_mode(each, files) for each in value["files"]]})
        if step == "batch":
            return _json({"transfer": "basic", "objects": [self._object(each, url) for each in value["objects"]]})
        assert step == "verify"
        data = self.stored.get(value["oid"], b"")
        return _json({}, 200 if len(data) == value["size"] else 422)

    def _create(self, value: dict[str, Any], url: str) -> Answer:
        name = f"{value['organization']}/{value['name']}"
        if not self._may_write(name):
            return _json({"error": "no rights"}, 403)
        if name in self.repositories:
            return _json({"url": f"{url}/{name}"}, 409)
        self.add(name)
        self.repositories[name].private = value.get("visibility") == "private" or bool(value.get("private"))
        return _json({"url": f"{url}/{name}"})

    def _object(self, value: dict[str, Any], url: str) -> dict[str, Any]:
        if value["oid"] in self.stored:
            return value
        return {**value, "actions": {"upload": {"href": f"{url}/storage/{value['oid']}"}, "verify": {"href": f"{url}/verify"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]], url: str) -> Answer:
        repository = self.repositories[name]
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    return _json({"error": "no such object"}, 400)
                files[value["path"]] = self.stored[value["oid"]]
        oid = repository.commit(files, lines[0]["value"]["summary"])
        return _json({"commitUrl": f"{url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})


def _repository(path: str) -> str:
    return "/".join(path.split("/")[2:4])


def _is_large(name: str) -> bool:
    return name.endswith(LARGE)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
    return {**entry, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}} if _is_large(name) else entry


def _mode(asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    name = asked["path"]
    data = files.get(name)
    oid = None
    if data is not None:
        oid = hashlib.sha256(data).hexdigest() if _is_large(name) else _entry(name, data)["oid"]
    return {"path": name, "uploadMode": "lfs" if _is_large(name) else "regular", "shouldIgnore": False, "oid": oid}


def _chunks(handler: BaseHTTPRequestHandler) -> bytes:
    """A body that is sent in chunks, whose length was not known."""
    found = b""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        found += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return found


def _json(value: Any, status: int = 200) -> Answer:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}
