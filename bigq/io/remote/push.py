"""A hub repository that a job's output is uploaded to, by the hub's client. Requests that fail are made again, with patience."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bigq.errors import BigqError, ResourceError, UsageError
from bigq.io.json_file import show_name
from bigq.io.remote.http import asked_wait
from bigq.io.remote.ranged import Closed, Patience
from bigq.io.remote.transport import Transient

_T = TypeVar("_T")

#: With ``--push-drop``, a job waits while more shards than these, with more bytes than these, are committed and not on the hub.
WAITING_SHARDS, WAITING_BYTES = 2, 2 * 2**30
#: Seconds without a byte from the hub, or to it, after which a request has failed. The hub takes long to check a large file.
TIMEOUT = 300.0
#: Tries before an upload is given up, however long each takes.
LEAST_TRIES = 4
#: Files that are asked about in one request.
NAMES_AT_ONCE = 500
#: Statuses of requests that may succeed later. 409 and 412: of a commit beside another one.
_BUSY = (408, 409, 412, 425, 429)
#: Seconds that an upload waits at most because the hub asks for it, all waits together. They are no silence: limits count by the hour.
_LONGEST_WAITS = 7200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A file in a repository. size: in bytes. sha256: None for a small file that is kept in git itself. blob: git's hash."""

    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A file to upload. name: in the repository. path: here."""

    name: str
    path: Path
    size: int
    sha256: str

    def is_held(self, held: Held | None) -> bool:
        """Whether the repository has the same bytes. Raises ResourceError if the file has to be read and cannot be."""
        if held is None or held.size != self.size:
            return False
        return held.sha256 == self.sha256 if held.sha256 is not None else held.blob == self._blob()

    def _blob(self) -> str:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be read: {error.strerror}; check the disk, then run the same command again"
            ) from error
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class HubRepository:
    """A model repository on the hub. say: shows the user a sentence, such as that the hub does not answer.

    Methods raise ResourceError where requests keep failing or are of no use, UsageError for a name that no repository can have, and
    Closed once ``close`` was called.
    """

    def __init__(self, name: str, patience: Patience, say: Callable[[str], None] = lambda _: None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, get_session, logging

        self.name, self.patience, self.say = name, patience, say
        self._closed = threading.Event()
        self._api: Any = HfApi()
        disable_progress_bars()
        logging.set_verbosity_error()  # the client warns of every request that it makes again
        session: Any = get_session()
        if session.timeout.read is None:  # the client would wait for ever
            session.timeout = TIMEOUT

    def close(self) -> None:
        """Make running and later methods raise Closed, at their next request or pause."""
        self._closed.set()

    def prepare(self) -> bool:
        """Make sure that the repository exists and can be written to; a new one is private. Returns whether it is new."""

        def create() -> bool:
            there = self._api.repo_exists(self.name)
            if not there:
                self._api.create_repo(self.name, private=True, exist_ok=True)
            self._check_access()
            return not there

        return self._try("", create)

    def _check_access(self) -> None:
        """Raise the client's error if the login may read the repository but not write there. Old versions of the client cannot ask."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = f"{constants.ENDPOINT}/api/models/{self.name}/auth-check/write"
        answer: Any = get_session().get(url, headers=build_hf_headers())
        if answer.status_code in (401, 403):
            hf_raise_for_status(answer)

    def head(self) -> str:
        """The newest commit."""
        return str(self._try("", lambda: self._api.repo_info(self.name).sha))

    def names(self) -> list[str]:
        """All files of the repository, with their folders."""

        def listed() -> list[str]:
            return [entry.path for entry in self._api.list_repo_tree(self.name, recursive=True) if hasattr(entry, "blob_id")]

        return self._try("", listed)

    def held(self, names: Iterable[str], revision: str) -> dict[str, Held]:
        """Those of some files that a commit holds, by name."""
        asked, found = list(names), {}
        for start in range(0, len(asked), NAMES_AT_ONCE):
            part = asked[start : start + NAMES_AT_ONCE]
            found.update(self._try("", lambda part=part: self._held(part, revision)))  # type: ignore[misc]
        return found

    def _held(self, names: Sequence[str], revision: str) -> dict[str, Held]:
        infos = self._api.get_paths_info(self.name, list(names), revision=revision)
        files = [info for info in infos if hasattr(info, "blob_id")]
        return {info.path: Held(size=info.size, sha256=None if info.lfs is None else info.lfs.sha256, blob=info.blob_id) for info in files}

    def upload(self, files: Sequence[Local], message: str) -> tuple[str, dict[str, Held]]:
        """Put files into the repository, by one commit, and ask whether they are there. What is there already is not sent again.

        Returns a commit that holds them, and what it holds. Raises ResourceError where the repository then has other bytes.
        """
        commit = self._try("", lambda: self._commit_of(files))
        if commit is None:
            operations = self._operations(files)
            for operation in operations:  # one at a time: several would need threads of the client, which a stopped job waits for
                self._try(operation.path_in_repo, lambda one=operation: self._send(one))  # type: ignore[misc]
            tries = itertools.count()
            commit = self._try("", lambda: self._commit(files, operations, message, again=next(tries) > 0))
        held = self.held([file.name for file in files], commit)
        for file in files:
            if not file.is_held(held.get(file.name)):
                raise ResourceError(
                    f"{self.name}/{file.name}: after its upload, the hub does not hold the bytes of {file.path}; run the same command again"
                )
        return commit, held

    def _commit_of(self, files: Sequence[Local]) -> str | None:
        """The newest commit if it holds all these files, else None."""
        commit = str(self._api.repo_info(self.name).sha)
        held: dict[str, Held] = {}
        names = [file.name for file in files]
        for start in range(0, len(names), NAMES_AT_ONCE):
            held.update(self._held(names[start : start + NAMES_AT_ONCE], commit))
        return commit if all(file.is_held(held.get(file.name)) for file in files) else None

    def _operations(self, files: Sequence[Local]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd

        operations = []
        for file in files:
            try:
                operations.append(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path)))
            except (OSError, ValueError) as error:
                raise ResourceError(f"{file.path}: cannot be read for its upload: {_line(error)}; run the same command again") from error
        return operations

    def _send(self, operation: Any) -> None:
        """Send the bytes of a file, if it is a large one."""
        self._api.preupload_lfs_files(self.name, [operation], num_threads=1, free_memory=False)

    def _commit(self, files: Sequence[Local], operations: Sequence[Any], message: str, *, again: bool) -> str:
        # An earlier try may have been carried out although its answer was an error.
        if again and (commit := self._commit_of(files)) is not None:
            return commit
        with warnings.catch_warnings():
            if any(file.name == "README.md" for file in files):  # the client warns of a card's metadata
                warnings.simplefilter("ignore")
            return str(self._api.create_commit(self.name, list(operations), commit_message=message).oid)

    def _try(self, name: str, attempt: Callable[[], _T]) -> _T:
        """Make a request again while it fails in a way that may pass, until the patience ends. name: of the file it is about, or empty."""
        about = f"{self.name}/{name}" if name else self.name
        since, asked, pause, tries = None, 0.0, self.patience.first, 0
        while True:
            if self._closed.is_set():
                raise Closed
            try:
                return attempt()
            except Exception as error:
                transient = self._transient(about, error)
            tries += 1
            now = time.monotonic()
            since = now if since is None else since
            wait = pause if transient.wait is None else transient.wait
            if tries >= LEAST_TRIES and now - since - min(asked, _LONGEST_WAITS) + pause > self.patience.silence:
                raise ResourceError(
                    f"{about}: the hub does not take it: {transient}, for {now - since:.0f} s; the job can go on later: run the same "
                    "command again"
                ) from transient
            if tries == 2 or wait > 60:
                self.say(f"warning: {about}: {transient}; trying again, in {wait:.0f} s")
            self._closed.wait(wait * random.uniform(1.0, 1.25))
            asked += transient.wait or 0.0
            pause = min(2 * pause, self.patience.longest)

    def _transient(self, about: str, error: Exception) -> Transient:
        """A failed request as one that may succeed later. Raises a BigqError or Closed for the others."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

        if isinstance(error, (BigqError, Closed)):
            raise error
        status = _status(error)
        if isinstance(error, LocalTokenNotFoundError) or (status in (401, 403) and not isinstance(error, RuntimeError)):
            raise ResourceError(
                f"--push {self.name}: the hub does not let you write there ({_line(error)}); log in with 'hf auth login' and a token that "
                "may write, or name a repository of yours"
            ) from error
        if isinstance(error, ValueError) and "README.md" in str(error):
            raise ResourceError(
                f"--push {self.name}: the hub refuses the metadata at the top of README.md ({show_name(str(error).splitlines()[-1])}); "
                "correct MODEL's README.md and remove OUT's, then run the same command again"
            ) from error
        if isinstance(error, HFValidationError):
            raise UsageError(f"--push {show_name(self.name)}: is not a repository's name; give --push owner/name") from None
        if isinstance(error, OfflineModeIsEnabled):
            raise ResourceError(f"--push {self.name}: HF_HUB_OFFLINE forbids asking the hub; unset it, or leave out --push") from None
        # A RuntimeError is about the storage behind the hub. Its addresses expire, and new ones come with the next try.
        if status is not None and not isinstance(error, RuntimeError) and status not in _BUSY and status < 500:
            raise ResourceError(f"--push {about}: the hub answered with status {status}: {_line(error)}; check the repository") from error
        if status is not None:
            return Transient(f"the hub answered with status {status}", _asked_wait(error))
        http_error: type[Exception] = HfHubHTTPError.__bases__[0]
        if isinstance(error, (http_error, OSError, RuntimeError, json.JSONDecodeError)):
            return Transient(_line(error))
        raise ResourceError(f"--push {about}: the hub's client refuses it: {_line(error)}; check the repository") from error


def _response(error: BaseException | None) -> Any:
    """The hub's answer that led to an error, or None."""
    while error is not None:
        if (found := getattr(error, "response", None)) is not None:
            return found
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    """The status of the answer that led to an error."""
    found = getattr(_response(error), "status_code", None)
    return found if isinstance(found, int) else None


def _asked_wait(error: BaseException) -> float | None:
    """Seconds after which the hub wants to be asked again, if it says so."""
    headers: Mapping[str, str] = getattr(_response(error), "headers", {})
    return asked_wait(headers)


def _line(error: BaseException) -> str:
    """The reason of an error in one line: what the hub says, or else the innermost one."""
    said = ""
    while True:
        said = said or str(getattr(error, "server_message", None) or "")
        if error.__cause__ is None:
            break
        error = error.__cause__
    return show_name(((said or str(error)).splitlines() or [""])[0] or type(error).__name__)
