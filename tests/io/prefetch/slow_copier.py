"""A simulated device: copies are made one after the other, some time after they were requested."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class SlowCopier:
    """Bytes move when a copy ends, not when it begins: host memory that is overwritten too early arrives wrong.

    gate: copies wait while it is cleared. fail_at: the number of the copy, from 0, that fails. allocated: bytes of host memory.
    """

    def __init__(self, delay: float = 0.0, fail_at: int | None = None) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.allocated = 0
        self.copies = 0
        self._delay, self._fail_at = delay, fail_at
        self._stream = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._lock = threading.Lock()

    def host_memory(self, size: int) -> Tensor:
        assert size & (size - 1) == 0
        with self._lock:
            self.allocated += size
        return torch.full((size,), 0xAA, dtype=torch.uint8)

    def target(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> SlowCopy:
        assert target.shape == source.shape and target.dtype == source.dtype == torch.uint8
        with self._lock:
            number, self.copies = self.copies, self.copies + 1
            self._last = self._stream.submit(self._run, number, target, source)
            return SlowCopy(self._last)

    def join(self) -> None:
        if self._last is not None:
            self._last.result()

    def _run(self, number: int, target: Tensor, source: Tensor) -> None:
        assert self.gate.wait(30)
        time.sleep(self._delay)
        if number == self._fail_at:
            raise RuntimeError("the device fell off the bus")
        target.copy_(source)


class SlowCopy:
    def __init__(self, done: Future[None]) -> None:
        self._done = done

    def wait(self) -> None:
        self._done.result()
