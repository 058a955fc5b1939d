"""The shards of a model that stay on a server: their headers, and their bytes with or without a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bigq.io.byte_file import RemoteFile
from bigq.io.index import TensorInfo, header_length, parse_header
from bigq.io.remote.parts import PartCache, Span
from bigq.io.remote.ranged import Patience, RangeReader
from bigq.io.remote.transport import Status, Transport

#: Headers that are fetched at a time.
HEADERS_AT_ONCE = 8
#: Bytes of a shard that are fetched for its header at first. Most headers are smaller.
_HEADER_GUESS = 256 * 2**10
#: The cache, in the folder of a job's records.
CACHE_FOLDER = "fetched"
#: A server that is silent ends a command at once, unless a job has begun.
QUICK, PATIENT = Patience(silence=20.0), Patience(silence=900.0)


class RemoteShards:
    """Shards on a server. Without a cache, each read is a request of its own; that is for the few bytes that are read before a job."""

    def __init__(self, transport: Transport, patience: Patience = QUICK) -> None:
        self._reader = RangeReader(transport, patience)
        self._files: dict[str, RemoteFile] = {}
        self._headers: dict[str, bytes] = {}
        self._cache: PartCache | None = None

    @property
    def received(self) -> int:
        """Bytes received from the server."""
        return self._reader.received

    def fetch_headers(self, names: Iterable[str]) -> None:
        """Fetch the headers of some shards, several at a time. Raises CheckpointError, ResourceError."""
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            for name, (file, header) in zip(names, pool.map(self._fetch_header, names), strict=True):
                self._files[name], self._headers[name] = file, header

    def header(self, shard: str) -> tuple[dict[str, TensorInfo], bytes]:
        """The tensors of a shard and the bytes of its header. Raises CheckpointError, ResourceError."""
        if shard not in self._headers:
            self.fetch_headers([shard])
        return parse_header(self._files[shard], self._headers[shard], self._files[shard].size), self._headers[shard]

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each shard whose header was fetched, by file name."""
        return {name: file.size for name, file in self._files.items()}

    @contextlib.contextmanager
    def cached(self, state: Path, limit: int, say: Callable[[str], None]) -> Iterator[None]:
        """Read through a cache while the context is open. state: the folder of the job's records. limit: bytes of the cache.

        say: shows the user a sentence. Raises ResourceError.
        """
        self._reader.say, self._reader.patience = say, PATIENT
        self._cache = PartCache(state / CACHE_FOLDER, limit, self._fetch)
        try:
            yield
        finally:
            self._reader.close()
            self._cache.close()
            with contextlib.suppress(OSError):
                (state / CACHE_FOLDER).rmdir()

    def follow(self, stages: Iterable[tuple[Hashable, Sequence[TensorInfo]]]) -> None:
        """Fetch ahead what some stages of the job need, in this order. Each has a name."""
        if self._cache is not None:
            self._cache.follow((name, [span for info in infos for span in _spans(info)]) for name, infos in stages)

    def done(self, stage: Hashable) -> None:
        """A stage needs its tensors no longer."""
        if self._cache is not None:
            self._cache.done(stage)

    def read(self, file: RemoteFile, view: memoryview, position: int, stopped: Callable[[], bool]) -> int:
        """As ``ByteFile.read_into``."""
        if self._cache is not None:
            return self._cache.read(file, view, position, stopped)

        def write(piece: bytes, at: int) -> None:
            view[at - position : at - position + len(piece)] = piece

        self._fetch(file, position, position + len(view), write)
        return len(view)

    def _fetch(self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes, int], None]) -> None:
        self._reader.read(file.name, Status(size=file.size, version=file.version), start, stop, write)

    def _fetch_header(self, name: str) -> tuple[RemoteFile, bytes]:
        reader = self._reader
        status = reader.status(name)
        file = RemoteFile(name=name, address=reader.transport.address(name), size=status.size, version=status.version, source=self)
        begin = bytearray()
        reader.read(name, status, 0, min(_HEADER_GUESS, file.size), lambda piece, _: begin.extend(piece))
        end = 8 + header_length(file, bytes(begin[:8]), file.size)
        if end > len(begin):
            reader.read(name, status, len(begin), end, lambda piece, _: begin.extend(piece))
        return file, bytes(begin[8:end])


def _spans(info: TensorInfo) -> Iterator[Span]:
    for part in info.stored:
        if isinstance(part.file, RemoteFile) and part.stop > part.start:
            yield part.file, part.start, part.stop
