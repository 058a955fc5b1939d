"""Files of hub repositories and of plain web servers, by ranged requests of the hub client's HTTP session."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from bigq.errors import CheckpointError, ResourceError
from bigq.io.remote.transport import Status, Transient, changed, too_large

#: Seconds without an answer, or without a further byte, after which a request is made again.
TIMEOUT = 30.0
#: Statuses of requests that may succeed later.
_BUSY = (408, 425, 429, 500, 502, 503, 504)
#: Statuses that a signed address has once it has expired.
_EXPIRED = (400, 401, 403, 404, 410)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_WINDOW = re.compile(r";\s*t=(\d+)")
#: Seconds to wait at most because a server says so.
_LONGEST_WAIT = 300.0


class WebFolder:
    """A ``Transport`` to a folder of a web server. url: of the folder; a query in it goes with every request."""

    def __init__(self, url: str) -> None:
        self._url = url

    def address(self, name: str) -> str:
        parts = urlsplit(self._url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], f"{parts.path.rstrip('/')}/{quote(name)}", "", ""))

    def status(self, name: str) -> Status:
        with _Answer(self._address(name), {"Range": "bytes=0-0"}, self.address(name)) as answer:
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status == 200 and answer.headers.get("Content-Length") == "0":
                return Status(size=0, version="")
            if answer.status != 206 or found is None:
                raise _no_ranges(self.address(name))
            return Status(size=int(found[3]), version=_version(answer.headers))

    def stream(self, name: str, status: Status, start: int, stop: int) -> Iterator[bytes]:
        with _Answer(self._address(name), _range(start, stop), self.address(name)) as answer:
            if status.version and _version(answer.headers) != status.version:
                raise changed(self.address(name))
            yield from answer.part(start, stop, status.size)

    def whole(self, name: str, limit: int) -> bytes | None:
        """A small file; None if there is none. Raises ResourceError if it has more than ``limit`` bytes."""
        found = b""
        with _Answer(self._address(name), {}, self.address(name), missing=(403, 404, 410)) as answer:
            if answer.status != 200:
                return None
            for piece in answer.pieces():
                found += piece
                if len(found) > limit:
                    raise too_large(self.address(name), limit)
            length = answer.headers.get("Content-Length")
            if length is not None and int(length) != len(found):
                raise Transient(f"the connection ended after {len(found)} of {length} bytes")
        return found

    def _address(self, name: str) -> str:
        parts = urlsplit(self._url)
        return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quote(name)}", parts.query, ""))


class HubFolder:
    """A ``Transport`` to a hub repository at one commit, whose files never change.

    The hub answers a request for a large file with the address of its storage, which is asked for once per file, until it expires.
    """

    def __init__(self, repository: str, commit: str) -> None:
        self._repository, self._commit = repository, commit
        self._lock = threading.Lock()
        self._locations: dict[str, str] = {}

    def address(self, name: str) -> str:
        return f"{self._repository}/{name}"

    def status(self, name: str) -> Status:
        found = self._metadata(name)
        if found.size is None or not found.etag:
            raise ResourceError(f"{self.address(name)}: the hub does not say its size and version; use --fetch download")
        return Status(size=found.size, version=found.etag)

    def stream(self, name: str, status: Status, start: int, stop: int) -> Iterator[bytes]:
        with self._lock:
            known = self._locations.get(name)
        location = known or self._metadata(name).location
        with _Answer(location, {**_range(start, stop), **self._credentials(location)}, self.address(name), missing=_EXPIRED) as answer:
            if answer.status in _EXPIRED:
                with self._lock:
                    self._locations.pop(name, None)
                if known is None and answer.status in (404, 410):
                    raise CheckpointError(f"{self.address(name)}: is not in the repository any more; use another revision of it")
                raise Transient(f"its storage answered with status {answer.status}")
            yield from answer.part(start, stop, status.size)

    def _metadata(self, name: str) -> Any:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

        url = huggingface_hub.hf_hub_url(self._repository, name, revision=self._commit)
        try:
            found = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
        except EntryNotFoundError:
            raise CheckpointError(f"{self.address(name)}: its index names it, but the repository lacks it; use another revision") from None
        except OfflineModeIsEnabled:
            raise _offline(self.address(name)) from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status and status not in _BUSY:
                raise ResourceError(
                    f"{self.address(name)}: the hub answered with status {status}; check the name and your login"
                ) from error
            raise Transient(_reason(error), asked_wait(error.response.headers) if status else None) from error
        except (_http_error(), OSError) as error:
            raise Transient(_reason(error)) from error
        with self._lock:
            self._locations[name] = found.location
        return found

    def _credentials(self, location: str) -> Mapping[str, str]:
        """The login, for the hub itself: addresses of its storage are signed, and must not see it."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        same = urlsplit(location).netloc == urlsplit(constants.ENDPOINT).netloc
        return build_hf_headers() if same else {}


class _Answer:
    """The answer to one request, which is open during a ``with`` block. missing: statuses above 400 that the caller handles.

    Raises Transient, CheckpointError or ResourceError in place of the HTTP library's errors, also inside the block.
    """

    def __init__(self, url: str, headers: Mapping[str, str], address: str, missing: tuple[int, ...] = ()) -> None:
        self._url, self._asked, self._address, self._missing = url, headers, address, missing

    def __enter__(self) -> _Answer:
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import get_session

        try:
            # Uncompressed: the bytes are counted.
            headers = {**self._asked, "Accept-Encoding": "identity"}
            self._stream = get_session().stream("GET", self._url, headers=headers, timeout=TIMEOUT, follow_redirects=True)
            self._response = self._stream.__enter__()
        except OfflineModeIsEnabled:
            raise _offline(self._address) from None
        except (_http_error(), OSError) as error:
            raise Transient(_reason(error)) from error
        self.status: int = self._response.status_code
        self.headers: Mapping[str, str] = self._response.headers
        try:
            self._require_success()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stream.__exit__(None, None, None)
        except (_http_error(), OSError):
            pass  # of a connection that failed before

    def _require_success(self) -> None:
        if self.status < 400 or self.status in self._missing:
            return
        if self.status in _BUSY:
            raise Transient(f"the server answered with status {self.status}", asked_wait(self.headers))
        if self.status in (404, 410):
            raise CheckpointError(f"{self._address}: the server has no such file; check the address")
        if self.status == 416:
            raise changed(self._address)
        raise ResourceError(f"{self._address}: the server answered with status {self.status}; check the address and your login")

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the answer."""
        try:
            yield from self._response.iter_raw()
        except (_http_error(), OSError) as error:
            raise Transient(_reason(error)) from error

    def part(self, start: int, stop: int, size: int) -> Iterator[bytes]:
        """The bytes of an answer to a request for bytes [start, stop) of a file of ``size`` bytes."""
        if self.status != 206:
            if self.status == 200 and (start, stop) == (0, size):
                yield from self.pieces()
                return
            raise _no_ranges(self._address)
        found = _CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", ""))
        if found is not None and int(found[3]) != size:
            raise changed(self._address)
        if found is None or (int(found[1]), int(found[2])) != (start, stop - 1):
            raise Transient("the server sent another part of the file than was asked for")
        yield from self.pieces()


def _range(start: int, stop: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{stop - 1}"}


def _version(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _http_error() -> type[Exception]:
    """The base class of the errors of the hub client's HTTP library, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds after which the server wants to be asked again, if it says so. The hub's own header says when its count starts anew."""
    window = _WINDOW.search(headers.get("RateLimit", ""))
    try:
        return min(max(float(window[1] if window else headers.get("Retry-After", "")), 0.0), _LONGEST_WAIT)
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _offline(address: str) -> ResourceError:
    return ResourceError(f"{address}: HF_HUB_OFFLINE forbids requests to servers; unset it, or download the model first")


def _no_ranges(address: str) -> ResourceError:
    return ResourceError(f"{address}: the server does not send parts of files, which streaming needs; download the model first")
