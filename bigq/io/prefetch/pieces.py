"""A few threads that read tensors piece by piece into memory that they are handed.

Where that memory comes from, and when there is some, is for others to say. Reading, and looking for NaN, releases Python's
lock, so it runs beside the computation.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from bigq.io.index import TensorInfo
from bigq.io.reader import drop_cached, fill, open_file, require_finite
from bigq.progress.trace import Trace

#: 1 GiB on a virtual disk, two cores, four threads: pieces of 4 MiB 2.0 GB/s (16.4 when cached), of 8 MiB 1.2 (16.5), of 16 MiB
#: 1.6 (16.1); one thread reads 2.2 (12.6). Pieces through one descriptor per file, rather than each its own: 2.0 against 1.5.
THREADS = 4
CHUNK_BYTES = 4 * 2**20

#: Reads of one tensor that are so many seconds apart, or less, are one span of the trace.
PAUSE = 0.002


class Piece:
    """Bytes [start, stop) of a file, part of one tensor.

    done: ends when they are read; cancelled where they are given up, by the reader's end too.
    """

    __slots__ = ("done", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.done: Future[None] = Future()


class Coming:
    """A tensor on its way in pieces, in the order of its bytes. A tensor without bytes has none."""

    def __init__(self, info: TensorInfo, chunk: int) -> None:
        self.info = info
        self.pieces = [Piece(start, stop) for start, stop in cut(info, chunk)]
        self._lock = threading.Lock()
        self._reads: list[tuple[float, float]] = []

    def was_read(self, begin: float, end: float) -> list[tuple[float, float]]:
        """Note one more piece's time; with the last one, the spans of the whole tensor's."""
        with self._lock:
            self._reads.append((begin, end))
            return merged(self._reads, PAUSE) if len(self._reads) == len(self.pieces) else []


class PieceReader:
    """check_finite: refuse NaN and Inf where they are read. Pages that were read are dropped from the page cache."""

    def __init__(self, trace: Trace, *, check_finite: bool) -> None:
        self._trace, self._check_finite = trace, check_finite
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self._stopped = threading.Event()
        self._files = _OpenFiles()

    def start(self, coming: Coming, piece: Piece, memory: Callable[[], Tensor]) -> None:
        """Read a piece in a thread, as soon as one is free, into what ``memory`` returns there: uint8 of the piece's size.

        ``piece.done`` raises CheckpointError, NumericsError, or what ``memory`` raises.
        """

        def give_up(job: Future[None]) -> None:
            if job.cancelled():
                piece.done.cancel()

        self._pool.submit(self.read, coming, piece, memory).add_done_callback(give_up)

    def read(self, coming: Coming, piece: Piece, memory: Callable[[], Tensor]) -> None:
        """The same at once, in the caller's thread; errors go to ``piece.done`` too."""
        if not piece.done.set_running_or_notify_cancel():
            return
        try:
            buffer = memory()
            begin = time.perf_counter()
            try:
                read_piece(self._files, coming.info, piece, buffer, self._stopped.is_set)
                if self._stopped.is_set():
                    raise CancelledError
                if self._check_finite:
                    require_finite(buffer.view(coming.info.dtype), coming.info)
            finally:
                for span in coming.was_read(begin, time.perf_counter()):
                    self._trace.add("read", coming.info.name, *span)
        except BaseException as error:
            piece.done.set_exception(error)
        else:
            piece.done.set_result(None)

    def close(self) -> None:
        """Read no more. Waits for the one request to the system that each thread may be in."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


def cut(info: TensorInfo, chunk: int) -> list[tuple[int, int]]:
    """The byte range of a tensor, cut where the file's offset is a multiple of ``chunk``, or just before, between two elements.

    Folios of the page cache begin at such offsets, so a piece's can be dropped without its neighbours'.
    """
    assert chunk >= info.dtype.itemsize
    cuts = [info.start]
    for aligned in range((info.start // chunk + 1) * chunk, info.stop, chunk):
        between = aligned - (aligned - info.start) % info.dtype.itemsize
        if between > cuts[-1]:
            cuts.append(between)
    cuts.append(info.stop)
    return [(begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]


def merged(spans: list[tuple[float, float]], pause: float) -> list[tuple[float, float]]:
    """The union of spans of time, ascending; those not further apart than ``pause`` become one."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1] + pause:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union


class _OpenFiles:
    """File descriptors shared by the threads, each open while one of them uses it.

    The system reads ahead by descriptor: with one for all, it sees one long read instead of many short ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, tuple[int, int]] = {}

    @contextlib.contextmanager
    def using(self, info: TensorInfo) -> Iterator[int]:
        with self._lock:
            fd, users = self._open[info.file] if info.file in self._open else (open_file(info), 0)
            self._open[info.file] = fd, users + 1
        try:
            yield fd
        finally:
            with self._lock:
                fd, users = self._open.pop(info.file)
                if users > 1:
                    self._open[info.file] = fd, users - 1
                else:
                    os.close(fd)


def read_piece(files: _OpenFiles, info: TensorInfo, piece: Piece, buffer: Tensor, stopped: Callable[[], bool]) -> None:
    """Read a piece's bytes into a buffer of its size, and let the page cache forget them."""
    with files.using(info) as fd:
        fill(fd, info, buffer, piece.start, stopped)
        drop_cached(fd, piece.start, piece.stop)
