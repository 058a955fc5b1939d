"""A bounded cache on disk of parts of remote files, filled by threads ahead of the reader.

A part is an aligned range of a file. The cache is one file of equal slots. A job announces its ``stages`` in order: the byte ranges that
each needs. Threads fetch their parts in this order as long as slots are free. A part stays until all stages that need it are done, so a
stage may read it again; then its slot is free for others. What a reader waits for comes first: if no slot is free, it takes the one of
the part that is needed last.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigq.errors import ResourceError
from bigq.io.atomic import remedy
from bigq.io.byte_file import RemoteFile
from bigq.io.remote.ranged import Closed

#: Threads that fetch, each a part at a time over a connection of its own.
THREADS = 16
#: Sizes of a part in bytes. A cache holds at least ``FEWEST_PARTS``, of which half may be on their way.
LARGEST_PART, SMALLEST_PART, FEWEST_PARTS = 16 * 2**20, 2**20, 2 * THREADS
#: The smallest cache in bytes.
LEAST_CACHE = FEWEST_PARTS * SMALLEST_PART
#: Seconds between two looks at whether a waiting reader is still wanted.
_POLL = 0.1

#: Bytes [start, stop) of a file.
Span = tuple[RemoteFile, int, int]
#: Fetches bytes [start, stop) of a file; calls back with each piece and its position.
Fetch = Callable[[RemoteFile, int, int, Callable[[bytes, int], None]], None]
_Key = tuple[RemoteFile, int]


def part_bytes(limit: int) -> int:
    """The size of the parts of a cache of ``limit`` bytes: a power of two."""
    size = LARGEST_PART
    while size > SMALLEST_PART and limit // size < 4 * THREADS:
        size //= 2
    return size


@dataclass(slots=True, eq=False)
class _Part:
    """slot: where it is or will be, None if it is neither here nor on its way. readers: that wait for it or read it.

    stages: that need it and are not done. place: among the parts in the order of stages. needed_to: the end of what stages need of it,
    in bytes from its beginning. error: why it could not be fetched.
    """

    key: _Key
    place: int
    slot: int | None = None
    here: bool = False
    readers: int = 0
    stages: set[Hashable] = field(default_factory=set)
    needed_to: int = 0
    error: BaseException | None = None


class PartCache:
    """The cache. folder: where its file is. limit: bytes of it, at least ``LEAST_CACHE``. Raises ResourceError where it cannot be made."""

    def __init__(self, folder: Path, limit: int, fetch: Fetch) -> None:
        self._size = part_bytes(limit)
        self._fetch = fetch
        self._path = folder / "fetched.bin"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # What a killed run left is of no use: it may be half a part.
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ResourceError(f"{self._path}: cannot be written: {error.strerror}; {remedy(error)}") from error
        self._changed = threading.Condition()
        self._slots = list(range(limit // self._size))[::-1]
        self._parts: dict[_Key, _Part] = {}
        #: Parts in the order of stages; those before ``_next`` were begun, unless they were given up since.
        self._order: list[_Part] = []
        self._next = 0
        self._wanted: deque[_Part] = deque()
        #: Parts that are here and that no stage needs, the oldest first (a dict used as an ordered set).
        self._spare: dict[_Key, _Part] = {}
        #: Parts that are here and were read to the end of what is needed of them, the one that was read least recently first.
        self._read: dict[_Key, _Part] = {}
        self._stages: dict[Hashable, list[_Part]] = {}
        #: Stages of which something was read.
        self._active: set[Hashable] = set()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"fetch-{i}", daemon=True) for i in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def follow(self, stages: Iterable[tuple[Hashable, Sequence[Span]]]) -> None:
        """Announce stages, in their order: a name, and the bytes that it needs. They come after those announced before."""
        with self._changed:
            for name, spans in stages:
                if name in self._stages:
                    continue
                self._stages[name] = needed = list({id(part): part for span in spans for part in self._parts_of(span)}.values())
                for part in needed:
                    part.stages.add(name)
                    self._spare.pop(part.key, None)
            self._changed.notify_all()

    def done(self, stage: Hashable) -> None:
        """A stage needs its parts no longer. A stage that was not announced is ignored."""
        with self._changed:
            self._active.discard(stage)
            for part in self._stages.pop(stage, ()):
                part.stages.discard(stage)
                if not part.stages and part.here:
                    self._spare[part.key] = part
            self._changed.notify_all()

    def read(self, file: RemoteFile, view: memoryview, position: int, stopped: Callable[[], bool]) -> int:
        """Fill the beginning of ``view`` with bytes of one part. Returns their number; 0 once ``stopped()``. Raises as ``fetch``."""
        with self._changed:
            part = self._part((file, position // self._size))
            part.readers += 1
            try:
                while not part.here:
                    if part.error is not None:
                        raise part.error
                    if self._closed:
                        raise Closed
                    if part.slot is None and part not in self._wanted:
                        self._wanted.append(part)
                        self._changed.notify_all()
                    self._changed.wait(_POLL)
                    if stopped():
                        part.readers -= 1
                        return 0
            except BaseException:
                part.readers -= 1
                raise
            assert part.slot is not None
            at = part.slot * self._size + position % self._size
        end = 0
        try:
            view = view[: self._length(part) - position % self._size]
            got = os.preadv(self._fd, [view], at)
            if got != len(view):
                raise ResourceError(f"{self._path}: gave {got} of {len(view)} bytes; check the disk, then run the same command again")
            end = position % self._size + got
            return got
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be read: {error.strerror}; check the disk, then run the same command again"
            ) from error
        finally:
            with self._changed:
                part.readers -= 1
                self._active |= part.stages
                self._read.pop(part.key, None)
                if end >= part.needed_to:
                    self._read[part.key] = part
                self._changed.notify_all()

    def close(self) -> None:
        """Stop the threads, as soon as their connections let them, and remove the file."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        os.close(self._fd)
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _parts_of(self, span: Span) -> Iterator[_Part]:
        file, start, stop = span
        for index in range(start // self._size, -(-stop // self._size)):
            part = self._part((file, index), ahead=True)
            part.needed_to = max(part.needed_to, min(self._size, stop - index * self._size))
            yield part

    def _part(self, key: _Key, *, ahead: bool = False) -> _Part:
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = _Part(key, len(self._order))
            self._order.append(part)
        elif ahead and not part.stages and part.slot is None:
            # It was read before any stage needed it, or by stages that are done: it comes in the order of now.
            part.place = len(self._order)
            self._order.append(part)
        return part

    def _length(self, part: _Part) -> int:
        file, index = part.key
        return min(self._size, file.size - index * self._size)

    def _work(self) -> None:
        """Fetch parts until the cache is closed. Runs in each of the threads."""
        while True:
            with self._changed:
                part = self._begin()
                while part is None:
                    if self._closed:
                        return
                    self._changed.wait()
                    part = self._begin()
                assert part.slot is not None
                start = part.key[1] * self._size
                write = functools.partial(self._write, part.slot * self._size - start)
            error: BaseException | None = None
            try:
                self._fetch(part.key[0], start, start + self._length(part), write)
            except BaseException as failure:  # given to the readers
                error = failure
            with self._changed:
                if error is None:
                    part.here = True
                    if not part.stages:
                        self._spare[part.key] = part
                else:
                    self._free(part)
                    part.error = error
                self._changed.notify_all()

    def _write(self, offset: int, piece: bytes, at: int) -> None:
        """Write a piece of a part. at: its position in its file; offset: from there to its place in the cache."""
        at += offset
        try:
            while piece:
                count = os.pwrite(self._fd, piece, at)
                piece, at = piece[count:], at + count
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be written: {error.strerror}; {remedy(error)}, or make the cache smaller with --fetch-cache"
            ) from error

    def _begin(self) -> _Part | None:
        """The next part to fetch, with a slot; None if there is nothing to do or no room."""
        if self._closed:
            return None
        while self._wanted:
            part = self._wanted[0]
            if part.slot is None and part.error is None and part.readers:
                part.slot = self._take_slot(part, wanted=True)
                if part.slot is None:
                    return None
                self._wanted.popleft()
                return part
            self._wanted.popleft()
        while self._next < len(self._order):
            part = self._order[self._next]
            if part.place == self._next and part.slot is None and part.stages and part.error is None:
                part.slot = self._take_slot(part, wanted=False)
                if part.slot is None:
                    return None
                self._next += 1
                return part
            self._next += 1
        return None

    def _take_slot(self, part: _Part, *, wanted: bool) -> int | None:
        """A free slot for a part, perhaps that of another one. wanted: a reader waits for it."""
        if self._slots:
            return self._slots.pop()
        given_up = next((each for each in self._spare.values() if not each.readers), None)
        if given_up is None and (wanted or not self._active.isdisjoint(part.stages)):
            given_up = next((each for each in self._read.values() if not each.readers), None)
        if given_up is None and wanted:
            idle = (each for each in self._parts.values() if each.here and not each.readers)
            given_up = max(idle, key=lambda each: each.place, default=None)
            if given_up is not None and given_up.stages:
                self._next = min(self._next, given_up.place)  # it is fetched again in its turn
        if given_up is None:
            return None
        self._free(given_up)
        return self._slots.pop()

    def _free(self, part: _Part) -> None:
        assert part.slot is not None
        self._slots.append(part.slot)
        self._spare.pop(part.key, None)
        self._read.pop(part.key, None)
        part.slot, part.here = None, False


def spans_bytes(spans: Iterable[Span], size: int) -> int:
    """Bytes of the parts of ``size`` bytes that hold some spans."""
    found: set[_Key] = {(file, i) for file, start, stop in spans for i in range(start // size, -(-stop // size))}
    return sum(min(size, file.size - i * size) for file, i in found)
