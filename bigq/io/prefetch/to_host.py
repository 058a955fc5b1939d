"""Prefetch for a job that computes on the CPU: tensors are read into the memory that the model then uses."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from bigq.io.index import TensorInfo
from bigq.io.prefetch import pieces
from bigq.io.prefetch.pieces import PendingRead, PieceReader
from bigq.progress.trace import Trace


class HostPrefetch:
    """A ``Prefetch`` of tensors to host memory. The reading threads check them for NaN and Inf.

    budget: maximum bytes of announced tensors that were not taken yet. A larger tensor is read when it is taken.
    peak: peak bytes of such tensors. Methods may be called from any thread.
    """

    def __init__(self, budget: int, trace: Trace | None = None) -> None:
        self._budget = budget
        self._reader = PieceReader(trace or Trace(), check_finite=True)
        self._lock = threading.Lock()
        #: Announced tensors whose reads have not begun, in order (a dict used as an ordered set).
        self._waiting: dict[TensorInfo, None] = {}
        self._pending: dict[TensorInfo, tuple[PendingRead, Tensor]] = {}
        self._held = 0
        self.peak = 0

    def announce(self, infos: Iterable[TensorInfo]) -> None:
        """Queue tensors that will be taken, in about this order. They are read as soon as the budget allows."""
        with self._lock:
            for info in infos:
                if info not in self._pending and info.nbytes <= self._budget:
                    self._waiting[info] = None
            self._admit()

    def take(self, info: TensorInfo) -> Tensor:
        """The whole tensor. Raises CheckpointError or NumericsError; CancelledError if this is closed meanwhile."""
        with self._lock:
            begun = self._pending.pop(info, None)
            if begun is not None:
                self._held -= info.nbytes
            self._waiting.pop(info, None)
        pending, tensor = begun or self._begin(info, here=True)
        with self._lock:
            self._admit()
        try:
            for piece in pending.pieces:
                piece.done.result()
        except BaseException:
            _cancel(pending)
            raise
        return tensor

    def check(self) -> None:
        """Does nothing: ``take`` has checked the tensors."""

    def close(self) -> None:
        """Cancel pending reads. Waits for at most one system call per thread."""
        with self._lock:
            self._waiting.clear()
            for pending, _ in self._pending.values():
                _cancel(pending)
            self._pending.clear()
            self._held = 0
        self._reader.close()

    def _admit(self) -> None:
        while self._waiting:
            info = next(iter(self._waiting))
            if self._held + info.nbytes > self._budget:
                return
            del self._waiting[info]
            self._held += info.nbytes
            self.peak = max(self.peak, self._held)
            self._pending[info] = self._begin(info)

    def _begin(self, info: TensorInfo, *, here: bool = False) -> tuple[PendingRead, Tensor]:
        """Start to read a tensor. here: if it is a single piece, read it in the caller's thread, which would wait anyway."""
        pending, tensor = PendingRead(info, pieces.CHUNK_BYTES), torch.empty(info.shape, dtype=info.dtype)
        flat = tensor.view(-1).view(torch.uint8)
        read = self._reader.read if here and len(pending.pieces) == 1 else self._reader.start
        for piece in pending.pieces:
            read(pending, piece, partial(_part, flat, piece.start - info.start, piece.stop - info.start))
        return pending, tensor


def _part(flat: Tensor, begin: int, end: int) -> Tensor:
    return flat[begin:end]


def _cancel(pending: PendingRead) -> None:
    for piece in pending.pieces:
        piece.done.cancel()
