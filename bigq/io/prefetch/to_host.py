"""Reading ahead for a job that computes on the CPU: what is read becomes the parameters themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from bigq.io.index import TensorInfo
from bigq.io.prefetch import pieces
from bigq.io.prefetch.pieces import Coming, PieceReader
from bigq.progress.trace import Trace


class IntoHost:
    """Whole tensors in fresh memory, checked for NaN and Inf in the threads that read them.

    budget: bytes that may be held for tensors that were announced and not taken yet. One larger than that is read when it is taken.
    peak: the most bytes that were held so. Everything may be called from any thread.
    """

    def __init__(self, budget: int, trace: Trace | None = None) -> None:
        self._budget = budget
        self._reader = PieceReader(trace or Trace(), check_finite=True)
        self._lock = threading.Lock()
        #: Announced and not begun, in that order (a dict for its order; the values are nothing).
        self._waiting: dict[TensorInfo, None] = {}
        self._coming: dict[TensorInfo, tuple[Coming, Tensor]] = {}
        self._held = 0
        self.peak = 0

    def announce(self, infos: Iterable[TensorInfo]) -> None:
        """These will be taken, in about this order: they are read as far as the budget allows, the rest as others are taken."""
        with self._lock:
            for info in infos:
                if info not in self._coming and info.nbytes <= self._budget:
                    self._waiting[info] = None
            self._admit()

    def take(self, info: TensorInfo) -> Tensor:
        """The whole tensor. Raises CheckpointError or NumericsError; CancelledError where the reader is closed meanwhile."""
        with self._lock:
            begun = self._coming.pop(info, None)
            if begun is not None:
                self._held -= info.nbytes
            self._waiting.pop(info, None)
        coming, tensor = begun or self._begin(info, here=True)
        with self._lock:
            self._admit()
        try:
            for piece in coming.pieces:
                piece.done.result()
        except BaseException:
            _give_up(coming)
            raise
        return tensor

    def check(self) -> None:
        """What was taken is checked already."""

    def close(self) -> None:
        """Give up what was not taken. Waits for at most one request to the system per thread."""
        with self._lock:
            self._waiting.clear()
            for coming, _ in self._coming.values():
                _give_up(coming)
            self._coming.clear()
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
            self._coming[info] = self._begin(info)

    def _begin(self, info: TensorInfo, *, here: bool = False) -> tuple[Coming, Tensor]:
        """here: the caller waits, and does a single piece itself rather than let a thread do it."""
        coming, tensor = Coming(info, pieces.CHUNK_BYTES), torch.empty(info.shape, dtype=info.dtype)
        flat = tensor.view(-1).view(torch.uint8)
        read = self._reader.read if here and len(coming.pieces) == 1 else self._reader.start
        for piece in coming.pieces:
            read(coming, piece, partial(_part, flat, piece.start - info.start, piece.stop - info.start))
        return coming, tensor


def _part(flat: Tensor, begin: int, end: int) -> Tensor:
    return flat[begin:end]


def _give_up(coming: Coming) -> None:
    for piece in coming.pieces:
        piece.done.cancel()
