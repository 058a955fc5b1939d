"""Where the hidden states of the calibration rows are kept: on the GPU, in host memory or in a file.

All tiers give the same bytes. A tier makes row buffers; a row is a fixed number of elements. Reads and writes of the disk
tier happen in a thread of their own, in the order in which they were asked for, so a read sees the writes before it.
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
from bigq.progress.clock import Clock
from bigq.progress.trace import Trace

#: Batches of a disk buffer whose writing has not ended yet, at most.
WRITES_IN_FLIGHT = 2


class RowBuffer(Protocol):
    """Rows of equal size, read and overwritten in runs. What was never written is undefined."""

    def get(self, lo: int, hi: int) -> Tensor:
        """Rows lo … hi, [hi − lo, elements], on the compute device."""

    def put(self, lo: int, rows: Tensor) -> None:
        """Overwrite the rows from lo on with rows [k, ...] of any device."""

    def prefetch(self, lo: int, hi: int) -> None:
        """These rows will be asked for next."""

    def close(self) -> None:
        """Give up the memory or the file."""


@dataclass(frozen=True, slots=True)
class Tier:
    """kind: "gpu", "host" or "disk". device: where rows are computed with. scratch: the folder of the disk tier's files.

    clock: times the coming and going of rows that are kept elsewhere than where they are computed with; the disk tier's reads and
    writes are a lane of its trace.
    """

    kind: str
    device: torch.device
    scratch: Path | None = None
    clock: Clock | None = None

    def buffer(self, rows: int, elements: int, dtype: torch.dtype) -> RowBuffer:
        """Room for rows of that many elements. Raises ResourceError where the disk has none."""
        if self.kind == "disk":
            assert self.scratch is not None
            trace = self.clock.trace if self.clock is not None else Trace(keep=False)
            return self._time_transfers(_FileBuffer(self.scratch, rows, elements, dtype, self.device, trace))
        if self.kind == "host" and self.device.type == "cuda":
            return self._time_transfers(_PinnedBuffer(rows, elements, dtype, self.device))
        return _TensorBuffer(rows, elements, dtype, self.device)

    def _time_transfers(self, buffer: RowBuffer) -> RowBuffer:
        return buffer if self.clock is None else _TimedBuffer(buffer, self.clock)


def choose_tier(device: torch.device, needed: int, scratch: Path) -> Tier:
    """The fastest tier that takes ``needed`` bytes without filling more than half of what is free; for what has no plan."""
    return Tier(fastest_tier(needed, gpu_budget(device), host_budget(resident=0)), device, scratch)


def fastest_tier(needed: int, device_free: int, host_free: int) -> str:
    """The first of GPU, host and disk whose free bytes are at least twice those needed; the disk is never asked."""
    if needed <= device_free // 2:
        return "gpu"
    return "host" if needed <= host_free // 2 else "disk"


class _TimedBuffer:
    """A buffer whose rows' coming and going is a phase of its own."""

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

    def close(self) -> None:
        self._buffer.close()


class _TensorBuffer:
    """One tensor where it is computed with."""

    def __init__(self, rows: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty(rows, elements, dtype=dtype, device=device)

    def get(self, lo: int, hi: int) -> Tensor:
        return self._rows[lo:hi]

    def put(self, lo: int, rows: Tensor) -> None:
        self._rows[lo : lo + rows.shape[0]].copy_(rows.reshape(rows.shape[0], -1))

    def prefetch(self, lo: int, hi: int) -> None:
        pass

    def close(self) -> None:
        del self._rows


class _PinnedBuffer:
    """Pinned memory of a GPU's host. Rows come and go on a stream of their own, in the order in which they were asked for."""

    def __init__(self, rows: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._rows = torch.empty(rows, elements, dtype=dtype, pin_memory=True)
        self._stream = torch.cuda.Stream(device)
        self._next: tuple[int, int, Tensor, torch.cuda.Event] | None = None

    def get(self, lo: int, hi: int) -> Tensor:
        expected, self._next = self._next, None
        if expected is None or expected[:2] != (lo, hi):
            expected = None  # memory may have ended: what was fetched for a larger batch goes first
            expected = (lo, hi, *self._fetch(lo, hi))
        # Not for the stream: the rows put last may still be on their way out.
        torch.cuda.current_stream(self._device).wait_event(expected[3])
        return expected[2]

    def put(self, lo: int, rows: Tensor) -> None:
        if self._next is not None and lo < self._next[1] and self._next[0] < lo + rows.shape[0]:
            self._next = None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._rows[lo : lo + rows.shape[0]].copy_(rows.reshape(rows.shape[0], -1), non_blocking=True)
        rows.record_stream(self._stream)

    def prefetch(self, lo: int, hi: int) -> None:
        self._next = (lo, hi, *self._fetch(lo, hi))

    def _fetch(self, lo: int, hi: int) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy rows to the device: the tensor, and what to wait for before using it.

        Its memory belongs to the current stream, whose earlier work may still use it: the copy waits for that.
        """
        target = torch.empty(hi - lo, self._rows.shape[1], dtype=self._rows.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(self._rows[lo:hi], non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        target.record_stream(self._stream)
        return target, arrived

    def close(self) -> None:
        """The memory may be handed out again at once, so copies end first."""
        self._next = None
        self._stream.synchronize()
        del self._rows


class _FileBuffer:
    """A file without a name: the system removes it with the process, however that ends.

    Once a write failed, nothing can be read any more: the rows there are not those that were put.
    """

    def __init__(self, folder: Path, rows: int, elements: int, dtype: torch.dtype, device: torch.device, trace: Trace) -> None:
        self._trace = trace
        self._folder, self._elements, self._dtype, self._device = folder, elements, dtype, device
        self._row_bytes = elements * dtype.itemsize
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

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):  # a network file system may tell only now of a write that failed; nobody reads it any more
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
                    raise ResourceError(f"{self._folder}: the activations' file ends too soon; is something cutting it short?")
                done += got
            self._drop(position, len(view))
        return rows

    def _write(self, lo: int, rows: Tensor) -> None:
        view, position, done = as_bytes(rows), lo * self._row_bytes, 0
        try:
            with self._errors(), self._trace.span("activations", f"write {lo} … {lo + len(rows)}"):
                while done < len(view):
                    done += os.pwritev(self._file.fileno(), [view[done:]], position + done)
                # Only clean pages can be dropped; otherwise a whole pass would pile up in memory.
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
                f"{self._folder}: keeping activations there failed: {error.strerror}; free some space or use --activations host"
            ) from error
