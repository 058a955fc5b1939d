"""A thread pool that reads tensors in pieces into memory that its callers provide.

Reading and checking for NaN release Python's global lock, so they overlap with computation.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from bigq.io.byte_file import ByteFile, RemoteFile
from bigq.io.index import TensorInfo
from bigq.io.reader import fill, open_file, require_finite
from bigq.progress.trace import Trace

#: Measured with 1 GiB on a virtual disk, two cores and four threads: 2.0 GB/s with pieces of 4 MiB (16.4 from the page cache), 1.2 (16.5)
#: with 8 MiB, 1.6 (16.1) with 16 MiB. One thread reads 2.2 (12.6). One descriptor per file gives 2.0, one per piece 1.5.
THREADS = 4
CHUNK_BYTES = 4 * 2**20

#: Reads of a tensor with pauses of at most this many seconds are one span in the trace.
PAUSE = 0.002


class Piece:
    """Bytes [start, stop) of a file, part of one tensor.

    done: finished when they are read; cancelled if they are not needed any more or the reader is closed.
    """

    __slots__ = ("done", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.done: Future[None] = Future()


class PendingRead:
    """A tensor that is read in pieces, in the order of its bytes. An empty tensor has no pieces."""

    def __init__(self, info: TensorInfo, chunk: int) -> None:
        self.info = info
        self.pieces = [Piece(start, stop) for start, stop in cut(info, chunk)]
        self._lock = threading.Lock()
        self._reads: list[tuple[float, float]] = []

    def add_span(self, begin: float, end: float) -> list[tuple[float, float]]:
        """Record the time of a piece. Returns the merged spans of the whole tensor after the last piece, before that none."""
        with self._lock:
            self._reads.append((begin, end))
            return merge_spans(self._reads, PAUSE) if len(self._reads) == len(self.pieces) else []


class PieceReader:
    """The thread pool. Pages that were read are dropped from the page cache. check_finite: raise NumericsError for NaN and Inf."""

    def __init__(self, trace: Trace, *, check_finite: bool) -> None:
        self._trace, self._check_finite = trace, check_finite
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self._stopped = threading.Event()
        self._files = _OpenFiles()

    def start(self, pending: PendingRead, piece: Piece, memory: Callable[[], Tensor]) -> None:
        """Queue a piece for reading. The thread calls ``memory`` for a buffer: uint8 [piece's size].

        ``piece.done`` raises CheckpointError, NumericsError, or what ``memory`` raises.
        """

        def cancel_piece(job: Future[None]) -> None:
            if job.cancelled():
                piece.done.cancel()

        self._pool.submit(self.read, pending, piece, memory).add_done_callback(cancel_piece)

    def read(self, pending: PendingRead, piece: Piece, memory: Callable[[], Tensor]) -> None:
        """Read a piece in the caller's thread. Errors are set in ``piece.done``, as with ``start``."""
        if not piece.done.set_running_or_notify_cancel():
            return
        try:
            buffer = memory()
            begin = time.perf_counter()
            try:
                read_piece(self._files, pending.info, piece, buffer, self._stopped.is_set)
                if self._stopped.is_set():
                    raise CancelledError
                if self._check_finite:
                    require_finite(buffer.view(pending.info.dtype), pending.info)
            finally:
                for span in pending.add_span(begin, time.perf_counter()):
                    self._trace.add("read", pending.info.name, *span)
        except BaseException as error:
            piece.done.set_exception(error)
        else:
            piece.done.set_result(None)

    def close(self) -> None:
        """Stop reading. Waits for at most one system call per thread."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


def cut(info: TensorInfo, chunk: int) -> list[tuple[int, int]]:
    """Cut the byte range of a tensor at file offsets that are multiples of ``chunk``, or at the last element boundary before.

    Folios of the page cache begin at multiples of ``chunk``. So a piece can be dropped from the cache without its neighbours.
    """
    assert chunk >= info.dtype.itemsize
    cuts = [info.start]
    for aligned in range((info.start // chunk + 1) * chunk, info.stop, chunk):
        between = aligned - (aligned - info.start) % info.dtype.itemsize
        if between > cuts[-1]:
            cuts.append(between)
    cuts.append(info.stop)
    return [(begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]


def merge_spans(spans: list[tuple[float, float]], pause: float) -> list[tuple[float, float]]:
    """The union of time spans, ascending. Spans at most ``pause`` apart become one."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1] + pause:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union


class _OpenFiles:
    """Open files shared by the threads. Each is closed when no thread uses it.

    Linux's readahead works per descriptor, so with a shared one it detects a sequential read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path | RemoteFile, tuple[ByteFile, int]] = {}

    @contextlib.contextmanager
    def using(self, info: TensorInfo) -> Iterator[ByteFile]:
        with self._lock:
            file, users = self._open[info.file] if info.file in self._open else (open_file(info), 0)
            self._open[info.file] = file, users + 1
        try:
            yield file
        finally:
            with self._lock:
                file, users = self._open.pop(info.file)
                if users > 1:
                    self._open[info.file] = file, users - 1
                else:
                    file.close()


def read_piece(files: _OpenFiles, info: TensorInfo, piece: Piece, buffer: Tensor, stopped: Callable[[], bool]) -> None:
    """Read a piece into a buffer of its size, and drop its pages from the page cache."""
    with files.using(info) as file:
        fill(file, info, buffer, piece.start, stopped)
        file.drop_cached(piece.start, piece.stop)
