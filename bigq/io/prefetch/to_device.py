"""Prefetch for a job that computes on a GPU: through a bounded buffer of host memory (the ring) onto the device.

    disk ── threads ──▶ region of the ring ── copy stream ──▶ device tensor
                             ▲                      │
                             └── freed after its copy

Tensors are read in pieces, each with its own region, so a tensor may be larger than the ring. Announced tensors stay in the ring
until they are taken. If a tensor is taken before its reads have begun, its pieces use separate memory, the direct lane. Only ``take``
holds regions of the direct lane, so tensors can be taken in any order without a deadlock.

Knows nothing of CUDA: the ``Copier`` copies bytes to the device.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bigq.io.index import TensorInfo
from bigq.io.prefetch import pieces
from bigq.io.prefetch.arena import Arena, Region, segments
from bigq.io.prefetch.pieces import PAUSE, PendingRead, Piece, PieceReader, merge_spans
from bigq.io.reader import nonfinite_error
from bigq.kernels.finiteness import finite_flag
from bigq.progress.trace import Trace

#: Capacity of the direct lane in pieces: one per reading thread, and as many that are being copied.
DIRECT_PIECES = 2 * pieces.THREADS
#: Host memory is allocated in segments of at most this size, each at its first use.
SEGMENT_BYTES = 256 * 2**20


class Copy(Protocol):
    """A copy in progress."""

    def wait(self) -> None:
        """Block until it is done. May be called in any thread."""


class Copier(Protocol):
    """Copies bytes to a device in the order of the calls, overlapping with the device's computation."""

    def host_memory(self, size: int) -> Tensor:
        """uint8 [size] on the host, a source for copies. size must be a power of two. May be called in any thread."""

    def target(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the device, for copies that begin after this call."""

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Start copying uint8 [k] from host memory, which must not change until the copy is done."""

    def join(self) -> None:
        """Make the device's further work wait for all copies started so far."""


def least_budget() -> int:
    """The minimum of host memory in bytes: the direct lane."""
    return DIRECT_PIECES * pieces.CHUNK_BYTES


class DevicePrefetch:
    """A ``Prefetch`` of tensors to the device, in their stored dtype.

    budget: bytes of host memory, at least ``least_budget()``. Allocations stay within it. peak: peak bytes in use.
    Methods may be called from any thread that computes on the copier's current stream.
    """

    def __init__(self, budget: int, copier: Copier, trace: Trace | None = None) -> None:
        self._copier, self._trace = copier, trace or Trace()
        self._chunk = pieces.CHUNK_BYTES
        direct = least_budget()
        self._direct = _Lane([direct], copier)
        self._ring = _Lane(segments(budget - direct, self._chunk, max(SEGMENT_BYTES, self._chunk)), copier)
        self._reader = PieceReader(self._trace, check_finite=False)
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="copied")
        #: Guards the attributes below, and the arenas and queues of both lanes.
        self._changed = threading.Condition()
        self._announced: dict[TensorInfo, _Transfer] = {}
        self._takers = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._finite: list[tuple[TensorInfo, Tensor]] = []
        self._copied_until = 0.0
        self.peak = 0

    @property
    def capacity(self) -> int:
        """Maximum bytes of host memory that are allocated."""
        return self._direct.arena.capacity + self._ring.arena.capacity

    def announce(self, infos: Iterable[TensorInfo]) -> None:
        """Queue tensors that will be taken, in about this order. They are read as soon as the ring has room."""
        with self._changed:
            for info in infos:
                if info not in self._announced:
                    transfer = self._announced[info] = _Transfer(info, self._chunk)
                    self._ring.queue.extend(transfer.parts)
            self._admit()

    def take(self, info: TensorInfo) -> Tensor:
        """The tensor on the device. Its copy may still be running: the current stream waits for it, the caller does not.

        Raises CheckpointError, CancelledError if this is closed meanwhile, or the device's error. For NaN and Inf see ``check``.
        """
        with self._changed:
            if self._closed or self._failure is not None:
                raise self._failure or CancelledError
            self._takers += 1
            transfer = self._announced.pop(info, None) or _Transfer(info, self._chunk)
            for part in transfer.parts:
                if part.lane is None:
                    part.direct = True
                    self._direct.queue.append(part)
            self._admit()
        try:
            return self._receive(transfer)
        except CancelledError:
            raise self._failure or CancelledError from None
        finally:
            with self._changed:
                self._takers -= 1
                self._changed.notify_all()

    def _receive(self, transfer: _Transfer) -> Tensor:
        info, sent = transfer.pending.info, 0
        try:
            target = self._copier.target(info.shape, info.dtype)
            flat = target.view(-1).view(torch.uint8)
            for part in transfer.parts:
                part.piece.done.result()
                assert part.lane is not None and part.region is not None
                source, begin = part.lane.memory(part.region), time.perf_counter()
                copy = self._copier.copy(flat[part.piece.start - info.start : part.piece.stop - info.start], source)
                sent += 1
                self._releaser.submit(self._after_copy, copy, transfer, part, begin)
            self._copier.join()
        finally:
            for part in transfer.parts[sent:]:
                part.piece.done.cancel()
                part.piece.done.add_done_callback(partial(self._release_after_read, part))
        if info.dtype.is_floating_point and info.dtype.itemsize > 1:
            self._finite.append((info, finite_flag(target)))
        return target

    def check(self) -> None:
        """Raise NumericsError if a tensor taken since the last check contains NaN or Inf. Synchronizes with the device once."""
        taken, self._finite = self._finite, []
        if taken:
            for (info, _), fine in zip(taken, torch.stack([flag for _, flag in taken]).tolist(), strict=True):
                if not fine:
                    raise nonfinite_error(info)

    def close(self) -> None:
        """Cancel pending reads. Waits for copies in progress, and for at most one system call per thread."""
        with self._changed:
            self._closed = True
            waiting = [part for transfer in self._announced.values() for part in transfer.parts]
            waiting += [*self._direct.queue, *self._ring.queue]
            self._announced.clear()
            self._direct.queue.clear()
            self._ring.queue.clear()
        for part in waiting:
            part.piece.done.cancel()
        self._reader.close()
        with self._changed:
            self._changed.wait_for(lambda: self._takers == 0)
        self._releaser.shutdown()
        self._direct.forget()
        self._ring.forget()

    def _admit(self) -> None:
        """Allocate regions for waiting pieces while there is room, and start to read them."""
        if self._closed or self._failure is not None:
            return
        for lane in (self._direct, self._ring):
            while lane.queue:
                part = lane.queue[0]
                if not (part.piece.done.cancelled() or (part.direct and lane is self._ring)):
                    region = lane.arena.allocate(part.piece.stop - part.piece.start)
                    if region is None:
                        break
                    part.lane, part.region = lane, region
                    self._reader.start(part.pending, part.piece, partial(lane.memory, region))
                lane.queue.popleft()
        self.peak = max(self.peak, self._direct.arena.held + self._ring.arena.held)

    def _release(self, part: _Part) -> None:
        with self._changed:
            if part.lane is not None and part.region is not None:
                part.lane.arena.release(part.region)
                part.region = None
            self._admit()

    def _release_after_read(self, part: _Part, _: object) -> None:
        self._release(part)

    def _after_copy(self, copy: Copy, transfer: _Transfer, part: _Part, begin: float) -> None:
        """Free a region after its copy. Runs in the releaser's thread, in the order of the copies."""
        try:
            copy.wait()
            end = time.perf_counter()
            for span in transfer.add_span(max(begin, self._copied_until), end):
                self._trace.add("copy to device", transfer.pending.info.name, *span)
            self._copied_until = end
            self._release(part)
        except BaseException as error:
            # The device may still read the region, so it is never reused.
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Stop after an error of the device, and wake up all who wait for a piece."""
        with self._changed:
            self._failure = error
            waiting = [*self._direct.queue, *self._ring.queue]
        for part in waiting:
            part.piece.done.cancel()


class _Lane:
    """A part of the host memory, and the pieces that wait for space in it."""

    def __init__(self, sizes: Sequence[int], copier: Copier) -> None:
        self.arena = Arena(sizes)
        self.queue: deque[_Part] = deque()
        self._sizes, self._copier = sizes, copier
        self._memory: list[Tensor | None] = [None] * len(sizes)
        self._lock = threading.Lock()

    def memory(self, region: Region) -> Tensor:
        """The bytes of a region. Its segment is allocated at the first use."""
        with self._lock:
            segment = self._memory[region.segment]
            if segment is None:
                segment = self._memory[region.segment] = self._copier.host_memory(self._sizes[region.segment])
        return segment[region.offset : region.offset + region.size]

    def forget(self) -> None:
        with self._lock:
            self._memory = [None] * len(self._sizes)


class _Part:
    """A piece and its region. lane, region: None until it has one. direct: the tensor was taken before this piece had a region."""

    __slots__ = ("direct", "lane", "pending", "piece", "region")

    def __init__(self, pending: PendingRead, piece: Piece) -> None:
        self.pending, self.piece = pending, piece
        self.lane: _Lane | None = None
        self.region: Region | None = None
        self.direct = False


class _Transfer:
    """A tensor that is read into the ring and copied to the device."""

    def __init__(self, info: TensorInfo, chunk: int) -> None:
        self.pending = PendingRead(info, chunk)
        self.parts = [_Part(self.pending, piece) for piece in self.pending.pieces]
        self._copies: list[tuple[float, float]] = []

    def add_span(self, begin: float, end: float) -> list[tuple[float, float]]:
        """Record the time of a piece's copy. Returns the merged spans of the whole tensor after the last piece, before that none."""
        self._copies.append((begin, end))
        return merge_spans(self._copies, PAUSE) if len(self._copies) == len(self.parts) else []
