"""Reading tensors before they are asked for, in threads, within a budget of host memory.

Reading, and looking for NaN, releases Python's lock, so it runs beside the computation of the block before.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from bigq.io.index import TensorInfo
from bigq.io.reader import read_tensor
from bigq.trace import Trace

THREADS = 2


class ReadAhead:
    """Tensors on their way from the disk, in the order in which they were announced.

    budget: bytes that may be held for tensors that were announced and not taken yet. A tensor that does not fit is read when
    it is taken. peak: the most bytes that were held so.
    """

    def __init__(self, budget: int, trace: Trace | None = None) -> None:
        self._budget = budget
        self._trace = trace or Trace()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
        self._coming: dict[TensorInfo, Future[Tensor]] = {}
        self._held = 0
        self.peak = 0

    def announce(self, infos: Iterable[TensorInfo]) -> None:
        """Begin to read these, as far as the budget allows."""
        for info in infos:
            if info in self._coming or self._held + info.nbytes > self._budget:
                continue
            self._held += info.nbytes
            self.peak = max(self.peak, self._held)
            self._coming[info] = self._pool.submit(self._read, info)

    def take(self, info: TensorInfo) -> Tensor:
        """The whole tensor, in host memory. Raises what ``read_tensor`` raises."""
        coming = self._coming.pop(info, None)
        if coming is None:
            return self._read(info)
        self._held -= info.nbytes
        return coming.result()

    def _read(self, info: TensorInfo) -> Tensor:
        with self._trace.span("read", info.name):
            return read_tensor(info)

    def close(self) -> None:
        """Give up what was not taken. Reads that have begun are waited for."""
        self._coming.clear()
        self._held = 0
        self._pool.shutdown(cancel_futures=True)
