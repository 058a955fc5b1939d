"""Storage tiers for the hidden states of the calibration rows: GPU memory, host memory or a file.

All tiers return the same bytes. A tier makes row buffers; a row is a fixed number of elements. The disk tier reads and writes in a
separate thread, in the order of the calls, so a read sees the writes before it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bigq.errors import ResourceError
from bigq.io.reader import as_bytes
from bigq.machine.budget import gpu_budget, host_budget
from bigq.machine.pinned import PinnedMemory
from bigq.progress.clock import Clock
from bigq.progress.trace import Trace

#: The most batches of a file buffer that wait to be written.
WRITES_IN_FLIGHT = 2
#: Bytes of a file buffer that are read at a time when single rows are wanted.
PIECE_BYTES = 2**24


class RowBuffer(Protocol):
    """Rows of equal size, read and overwritten in ranges. Rows that were never written are undefined."""

    def get(self, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) as a tensor [hi − lo, elements] on the compute device."""

    def put(self, lo: int, rows: Tensor) -> None:
        """Overwrite rows, starting at lo, with ``rows`` [k, ...] on any device."""

    def prefetch(self, lo: int, hi: int) -> None:
        """Start to read rows that ``get`` will ask for next."""

    def take(self, index: Tensor) -> Tensor:
        """The rows at ``index`` [k], in this order, as a tensor [k, elements] on the compute device."""

    def add(self, index: Tensor, rows: Tensor) -> None:
        """Add ``rows`` [k, elements] to the rows at ``index`` [k], none of which is there twice."""

    def close(self) -> None:
        """Free the memory or the file."""


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier. kind: "gpu", "host" or "disk". device: the compute device. scratch: the folder for the disk tier's files.

    clock: times transfers of rows between their tier and the compute device; reads and writes of the disk tier are a lane of its trace.
    """

    kind: str
    device: torch.device
    scratch: Path
    clock: Clock | None = None

    @property
    def pinned(self) -> bool:
        """Whether its buffers are pinned host memory."""
        return self.kind == "host" and self.device.type == "cuda"

    def buffer(self, rows: int, elements: int, dtype: torch.dtype) -> RowBuffer:
        """An uninitialized buffer [rows, elements]. Raises ResourceError where the disk has no space for it."""
        if self.kind == "disk":
            trace = self.clock.trace if self.clock is not None else Trace(keep=False)
            return self._time_transfers(_FileBuffer(self.scratch, rows, elements, dtype, self.device, trace))
        if self.pinned:
            return self._time_transfers(_PinnedBuffer(rows, elements, dtype, self.device))
        return _TensorBuffer(rows, elements, dtype, self.device)

    def _time_transfers(self, buffer: RowBuffer) -> RowBuffer:
        return buffer if self.clock is None else _TimedBuffer(buffer, self.clock)


def choose_tier(device: torch.device, needed: int, scratch: Path, processes: int = 1) -> Tier:
    """The fastest tier for ``needed`` bytes, see ``fastest_tier``; for commands without a plan. processes: that share the host's memory."""
    return Tier(fastest_tier(needed, gpu_budget(device), host_budget(resident=0) // processes), device, scratch)


def fastest_tier(needed: int, device_free: int, host_free: int) -> str:
    """The first of GPU and host memory whose free bytes are at least twice ``needed``; otherwise the disk, without a check."""
    if needed <= device_free // 2:
        return "gpu"
    return "host" if needed <= host_free // 2 else "disk"


class _TimedBuffer:
    """A buffer whose transfers are timed as the phase "transfer"."""

    def __init__(self, buffer: RowBuffer, clock: Clock) -> None:
        self._buffer, self._clock = buffer, clock

    def get(self, lo: int, hi: int) -> Tensor:
        with self._clock.phase("transfer"):
            return self._buffer.get(lo, hi)

    def put(self, lo: int, rows: Tensor) -> None:
        with self._clock.phase("transfer"):
            self._buffer.put(lo, rows)

    def prefetch(self, lo: int, hi: int) -> None:
        self._buffer.prefetch(lo, hi)

    def take(self, index: Tensor) -> Tensor:
        with self._clock.phase("transfer"):
            return self._buffer.take(index)

    def add(self, index: Tensor, rows: Tensor) -> None:
        with self._clock.phase("transfer"):
            self._buffer.add(index, rows)

    def close(self) -> None:
        self._buffer.close()


class _TensorBuffer:
    """One tensor on the compute device."""

    def __init__(self, rows: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty(rows, elements, dtype=dtype, device=device)

    def get(self, lo: int, hi: int) -> Tensor:
        return self._rows[lo:hi]

    def put(self, lo: int, rows: Tensor) -> None:
        self._rows[lo : lo + rows.shape[0]].copy_(rows.reshape(rows.shape[0], -1))

    def prefetch(self, lo: int, hi: int) -> None:
        pass

    def take(self, index: Tensor) -> Tensor:
        return self._rows[index]

    def add(self, index: Tensor, rows: Tensor) -> None:
        self._rows.index_add_(0, index, rows)

    def close(self) -> None:
        del self._rows


class _PinnedBuffer:
    """Pinned host memory. Rows are copied on a separate CUDA stream, in the order of the calls."""

    def __init__(self, rows: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._elements, self._dtype = elements, dtype
        self._rows = PinnedMemory(rows * elements, dtype)
        self._stream = torch.cuda.Stream(device)
        self._next: tuple[int, int, Tensor, torch.cuda.Event] | None = None

    def get(self, lo: int, hi: int) -> Tensor:
        expected, self._next = self._next, None
        if expected is None or expected[:2] != (lo, hi):
            expected = None  # frees rows prefetched for a larger batch, before the batch was halved
            expected = (lo, hi, *self._fetch(lo, hi))
        # Wait for this copy only, not for the stream: rows that were put last may still be in transit.
        torch.cuda.current_stream(self._device).wait_event(expected[3])
        return expected[2]

    def put(self, lo: int, rows: Tensor) -> None:
        if self._next is not None and lo < self._next[1] and self._next[0] < lo + rows.shape[0]:
            self._next = None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            pieces = list(self._pieces(lo, lo + rows.shape[0]))
            for piece, source in zip(pieces, rows.reshape(-1).split([len(piece) for piece in pieces]), strict=True):
                piece.copy_(source, non_blocking=True)
        rows.record_stream(self._stream)

    def prefetch(self, lo: int, hi: int) -> None:
        self._next = (lo, hi, *self._fetch(lo, hi))

    def take(self, index: Tensor) -> Tensor:
        """The processor gathers the rows, since the device would read them one by one."""
        self._stream.synchronize()  # what was put last has arrived
        wanted = index.cpu()
        found = torch.empty(len(wanted), self._elements, dtype=self._dtype)
        left = torch.ones(len(wanted), dtype=torch.bool)
        for start, part in self._rows.whole_rows(self._elements):
            here = (wanted >= start) & (wanted < start + len(part))
            found[here] = part[wanted[here] - start]
            left &= ~here
        for place in left.nonzero().flatten().tolist():  # rows across two segments
            row = int(wanted[place])
            found[place] = torch.cat(list(self._pieces(row, row + 1)))
        return found.to(self._device)

    def add(self, index: Tensor, rows: Tensor) -> None:
        self._next = None
        self._stream.synchronize()
        wanted, values = index.cpu(), rows.cpu()
        left = torch.ones(len(wanted), dtype=torch.bool)
        for start, part in self._rows.whole_rows(self._elements):
            here = (wanted >= start) & (wanted < start + len(part))
            part.index_add_(0, wanted[here] - start, values[here])
            left &= ~here
        for place in left.nonzero().flatten().tolist():
            row = int(wanted[place])
            pieces = list(self._pieces(row, row + 1))
            for piece, value in zip(pieces, values[place].split([len(piece) for piece in pieces]), strict=True):
                piece += value

    def _fetch(self, lo: int, hi: int) -> tuple[Tensor, torch.cuda.Event]:
        """Start to copy rows to the device. Returns the tensor, and the event to wait for before using it.

        The tensor's memory comes from the current stream, whose earlier work may still use it. So the copy waits for that work.
        """
        target = torch.empty(hi - lo, self._elements, dtype=self._dtype, device=self._device)
        pieces = list(self._pieces(lo, hi))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for part, piece in zip(target.view(-1).split([len(piece) for piece in pieces]), pieces, strict=True):
                part.copy_(piece, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        target.record_stream(self._stream)
        return target, arrived

    def _pieces(self, lo: int, hi: int) -> Iterator[Tensor]:
        """Rows [lo, hi), flat."""
        return self._rows.pieces(lo * self._elements, hi * self._elements)

    def close(self) -> None:
        """Wait for all copies, since the memory may be reused at once."""
        self._next = None
        self._stream.synchronize()
        del self._rows


class _FileBuffer:
    """An unlinked temporary file: the system frees it however the process ends.

    After a failed write every read raises its error, since the rows on disk are not those that were put.
    """

    def __init__(self, folder: Path, rows: int, elements: int, dtype: torch.dtype, device: torch.device, trace: Trace) -> None:
        self._trace = trace
        self._folder, self._elements, self._dtype, self._device = folder, elements, dtype, device
        self._count, self._row_bytes = rows, elements * dtype.itemsize
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self._writes: deque[Future[None]] = deque()
        self._next: tuple[int, int, Future[Tensor]] | None = None
        self._failed: ResourceError | None = None
        with self._errors(), contextlib.ExitStack() as undo:
            self._file = undo.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            os.posix_fallocate(self._file.fileno(), 0, max(1, rows * self._row_bytes))
            undo.pop_all()

    def get(self, lo: int, hi: int) -> Tensor:
        expected, self._next = self._next, None
        if expected is None or expected[:2] != (lo, hi):
            expected = (lo, hi, self._pool.submit(self._read, lo, hi))
        return expected[2].result().to(self._device)

    def put(self, lo: int, rows: Tensor) -> None:
        if self._next is not None and lo < self._next[1] and self._next[0] < lo + rows.shape[0]:
            self._next = None
        host = rows.detach().reshape(rows.shape[0], -1).to("cpu", self._dtype, copy=True)
        self._writes.append(self._pool.submit(self._write, lo, host))
        while len(self._writes) > WRITES_IN_FLIGHT:
            self._writes.popleft().result()

    def prefetch(self, lo: int, hi: int) -> None:
        self._next = (lo, hi, self._pool.submit(self._read, lo, hi))

    def take(self, index: Tensor) -> Tensor:
        """Reads the whole file once, in order: rows at random places would be read one by one."""
        wanted = index.cpu()
        found = torch.empty(len(wanted), self._elements, dtype=self._dtype)
        for lo, hi in self._pieces():
            here = (wanted >= lo) & (wanted < hi)
            if bool(here.any()):
                found[here] = self._pool.submit(self._read, lo, hi).result()[wanted[here] - lo]
        return found.to(self._device)

    def add(self, index: Tensor, rows: Tensor) -> None:
        wanted, values = index.cpu(), rows.detach().cpu()
        for lo, hi in self._pieces():
            here = (wanted >= lo) & (wanted < hi)
            if bool(here.any()):
                part = self._pool.submit(self._read, lo, hi).result()
                self.put(lo, part.index_add_(0, wanted[here] - lo, values[here]))

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """All rows, in ranges of a few MiB."""
        step = max(1, PIECE_BYTES // self._row_bytes)
        return ((lo, min(lo + step, self._count)) for lo in range(0, self._count, step))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):  # a network file system may report a failed write only here; nobody reads the file any more
            self._file.close()

    def _read(self, lo: int, hi: int) -> Tensor:
        if self._failed is not None:
            raise self._failed
        rows = torch.empty(hi - lo, self._elements, dtype=self._dtype)
        view, position, done = as_bytes(rows), lo * self._row_bytes, 0
        with self._errors(), self._trace.span("activations", f"read {lo} … {hi}"):
            while done < len(view):
                got = os.preadv(self._file.fileno(), [view[done:]], position + done)
                if got == 0:
                    raise ResourceError(
                        f"{self._folder}: the activations file was truncated, perhaps by another program; run the command again"
                    )
                done += got
            self._drop(position, len(view))
        return rows

    def _write(self, lo: int, rows: Tensor) -> None:
        view, position, done = as_bytes(rows), lo * self._row_bytes, 0
        try:
            with self._errors(), self._trace.span("activations", f"write {lo} … {lo + len(rows)}"):
                while done < len(view):
                    done += os.pwritev(self._file.fileno(), [view[done:]], position + done)
                # Only clean pages can be dropped from the page cache. Without this a whole pass would stay in memory.
                os.fdatasync(self._file.fileno())
                self._drop(position, len(view))
        except ResourceError as error:
            self._failed = error
            raise

    def _drop(self, position: int, size: int) -> None:
        os.posix_fadvise(self._file.fileno(), position, size, os.POSIX_FADV_DONTNEED)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"{self._folder}: cannot store activations there: {error.strerror}; free some space, or use --activations host"
            ) from error
