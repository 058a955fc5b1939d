"""Reading ahead for a job that computes on a GPU: through a bounded ring of host memory onto the device.

    disk ── threads ──▶ region of the ring ── copy stream ──▶ device tensor of whoever takes it
                             ▲                      │
                             └── free again when its copy is done

Tensors travel in pieces, each with a region of the ring of its own, so one larger than the ring passes through it. Announced
tensors wait in the ring until they are taken. The pieces of a tensor that is taken before they were begun go another way, the
direct lane, whose regions only takers hold: whatever the order of takes, nobody waits for room that nobody gives back.

Knows nothing of CUDA: how bytes get to the device is the ``Copier``'s affair.
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
from bigq.io.prefetch.pieces import PAUSE, Coming, Piece, PieceReader, merged
from bigq.io.reader import not_finite
from bigq.kernels.finiteness import finite_flag
from bigq.progress.trace import Trace

#: Pieces that the direct lane has room for: one per thread that reads, and as many that are being copied.
DIRECT_PIECES = 2 * pieces.THREADS
#: Host memory is allocated in segments of at most this size, when they are first read into.
SEGMENT_BYTES = 256 * 2**20


class Copy(Protocol):
    """A copy that was begun."""

    def wait(self) -> None:
        """Until it is done, from any thread."""


class Copier(Protocol):
    """Moves bytes to a device in the order in which it is told to, beside what the device computes."""

    def host_memory(self, size: int) -> Tensor:
        """uint8 [size] on the host that copies can be made from; size is a power of two. May be called in any thread."""

    def target(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the device, for copies that begin after this call."""

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Begin to copy uint8 [k] from host memory; it must not be touched until the copy is done."""

    def join(self) -> None:
        """What the caller lets the device compute from now on comes after all copies begun so far."""


def least_budget() -> int:
    """Bytes of host memory that the ring takes at least: the direct lane."""
    return DIRECT_PIECES * pieces.CHUNK_BYTES


class IntoDevice:
    """Whole tensors on the device, in their stored dtype.

    budget: bytes of host memory, counted as ``least_budget()`` where it is less; all that is allocated stays within it.
    peak: the most bytes of it that were in use at once. Everything may be called from any thread that computes on the copier's
    current stream.
    """

    def __init__(self, budget: int, copier: Copier, trace: Trace | None = None) -> None:
        self._copier, self._trace = copier, trace or Trace()
        self._chunk = pieces.CHUNK_BYTES
        direct = least_budget()
        self._direct = _Lane([direct], copier)
        self._ring = _Lane(segments(budget - direct, self._chunk, max(SEGMENT_BYTES, self._chunk)), copier)
        self._reader = PieceReader(self._trace, check_finite=False)
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="copied")
        #: Guards everything below and both lanes' arenas and queues.
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
        """Bytes of host memory that may come to be allocated."""
        return self._direct.arena.capacity + self._ring.arena.capacity

    def announce(self, infos: Iterable[TensorInfo]) -> None:
        """These will be taken, in about this order: they are read as far as the ring has room, the rest as others leave it."""
        with self._changed:
            for info in infos:
                if info not in self._announced:
                    transfer = self._announced[info] = _Transfer(info, self._chunk)
                    self._ring.queue.extend(transfer.parts)
            self._admit()

    def take(self, info: TensorInfo) -> Tensor:
        """The whole tensor on the device, its copy perhaps still under way: the current stream waits for it, the caller does not.

        Raises CheckpointError, CancelledError where the reader is closed meanwhile, or what the device raises. Whether it
        is finite, ``check`` says.
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
        info, sent = transfer.coming.info, 0
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
        """Raise NumericsError where a tensor that was taken since the last check holds NaN or Inf. Waits for the device, once."""
        taken, self._finite = self._finite, []
        if taken:
            for (info, _), fine in zip(taken, torch.stack([flag for _, flag in taken]).tolist(), strict=True):
                if not fine:
                    raise not_finite(info)

    def close(self) -> None:
        """Give up what was not taken. Waits for copies that were begun, and for at most one request to the system per thread."""
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
        """Give room to the pieces that wait for it, as far as there is some, and let them be read."""
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
                    self._reader.start(part.coming, part.piece, partial(lane.memory, region))
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
        """In the releaser's thread, in the order of the copies."""
        try:
            copy.wait()
            end = time.perf_counter()
            for span in transfer.was_copied(max(begin, self._copied_until), end):
                self._trace.add("copy to device", transfer.coming.info.name, *span)
            self._copied_until = end
            self._release(part)
        except BaseException as error:
            # The device is lost, and whether it still reads the region unknown: nobody gets it any more.
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Nothing goes on: who waits for a piece is told."""
        with self._changed:
            self._failure = error
            waiting = [*self._direct.queue, *self._ring.queue]
        for part in waiting:
            part.piece.done.cancel()


class _Lane:
    """A part of the ring: room, and the pieces that wait for it."""

    def __init__(self, sizes: Sequence[int], copier: Copier) -> None:
        self.arena = Arena(sizes)
        self.queue: deque[_Part] = deque()
        self._sizes, self._copier = sizes, copier
        self._memory: list[Tensor | None] = [None] * len(sizes)
        self._lock = threading.Lock()

    def memory(self, region: Region) -> Tensor:
        """A region's bytes. Its segment is allocated by whoever comes first."""
        with self._lock:
            segment = self._memory[region.segment]
            if segment is None:
                segment = self._memory[region.segment] = self._copier.host_memory(self._sizes[region.segment])
        return segment[region.offset : region.offset + region.size]

    def forget(self) -> None:
        with self._lock:
            self._memory = [None] * len(self._sizes)


class _Part:
    """A piece on its way through the ring. lane, region: once it has room. direct: it was taken before it had."""

    __slots__ = ("coming", "direct", "lane", "piece", "region")

    def __init__(self, coming: Coming, piece: Piece) -> None:
        self.coming, self.piece = coming, piece
        self.lane: _Lane | None = None
        self.region: Region | None = None
        self.direct = False


class _Transfer:
    """A tensor on its way through the ring."""

    def __init__(self, info: TensorInfo, chunk: int) -> None:
        self.coming = Coming(info, chunk)
        self.parts = [_Part(self.coming, piece) for piece in self.coming.pieces]
        self._copies: list[tuple[float, float]] = []

    def was_copied(self, begin: float, end: float) -> list[tuple[float, float]]:
        """Note one more piece's time; with the last one, the spans of the whole tensor's."""
        self._copies.append((begin, end))
        return merged(self._copies, PAUSE) if len(self._copies) == len(self.parts) else []
