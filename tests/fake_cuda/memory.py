"""What happens to a piece of memory: who used it last, what is still copied from and to it, and whether it is freed too early."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fake_cuda.findings import LOCK, problem
from fake_cuda.streams import HOST, MAIN

if TYPE_CHECKING:
    from fake_cuda.copies import Copy


@dataclass
class Usage:
    """Bytes of live device memory, their peak, and a limit above which an allocation fails."""

    limit: int
    allocated: int = 0
    peak: int = 0


USAGE = Usage(80 * 2**30)


class Memory:
    """The memory of one storage. pinned: on the host, else on the device.

    written, used: the number of the default stream's last work that wrote, or read or wrote it.
    copies: by side streams, until the default stream comes after them. recorded: streams of ``record_stream``.
    Goes away with the last tensor in it.
    """

    def __init__(self, inner: Tensor, *, pinned: bool = False) -> None:
        storage = inner.untyped_storage()
        self.pinned, self.nbytes, self.allocated_at = pinned, 0 if pinned else storage.nbytes(), ""
        self.written = self.used = 0 if pinned else MAIN.advance()
        self.copies: list[Copy] = []
        self.recorded: set[int] = set()
        if USAGE.allocated + self.nbytes > USAGE.limit:
            self.nbytes = 0
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.")
        USAGE.allocated += self.nbytes
        USAGE.peak = max(USAGE.peak, USAGE.allocated)

    def __del__(self) -> None:
        with LOCK:
            USAGE.allocated -= self.nbytes
            for copy in self.copies:
                if not (copy.before(MAIN.clock) or copy.before(HOST) or copy.stream.number in self.recorded or self.pinned):
                    problem("memory is freed while a copy on another stream uses it", copy.place)

    def use_on_main(self, *, write: bool) -> None:
        """The default stream reads or writes this memory now."""
        if self.copies:
            self._after_copies(write)
        self.used = MAIN.clock[0]
        if write:
            self.written = self.used

    def _after_copies(self, write: bool) -> None:
        left = []
        for copy in self.copies:
            if copy.before(MAIN.clock):
                copy.stream.drain(copy.number)
                continue
            left.append(copy)
            if write or copy.writes(self):
                problem(f"{'written' if write else 'read'} while a copy on another stream uses it")
        self.copies = left

    def use_in_copy(self, copy: Copy) -> None:
        """A copy was queued that reads or writes this memory."""
        write = copy.writes(self)
        if copy.needs.get(0, 0) < (self.used if write else self.written):
            problem(f"a copy that does not wait for the work that {'uses' if write else 'makes'} its {'target' if write else 'source'}")
        for other in self.copies:
            if other.stream is not copy.stream and (write or other.writes(self)) and other.overlaps(copy) and not other.before(copy.needs):
                problem("copies on two streams use the same memory at once")
        self.copies = [other for other in self.copies if not (other.made and other.before(MAIN.clock))]
        self.copies.append(copy)


_known: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
#: Pinned memory lives as long as the process: nobody sees when a storage goes.
_pinned: dict[int, tuple[Memory, Tensor]] = {}


def memory_of(inner: Tensor) -> Memory:
    """The device memory that holds the bytes of a CUDA tensor."""
    with LOCK:
        key = inner.untyped_storage()._cdata
        memory = _known.get(key)
        if memory is None:
            memory = _known[key] = Memory(inner)
        return memory


def pin(tensor: Tensor) -> Tensor:
    """Note that a CPU tensor is pinned."""
    with LOCK:
        _pinned[tensor.untyped_storage()._cdata] = (Memory(tensor, pinned=True), tensor)
    return tensor


def pinned_memory(tensor: Tensor) -> Memory | None:
    """The pinned memory that holds a CPU tensor, or None."""
    found = _pinned.get(tensor.untyped_storage()._cdata)
    return None if found is None else found[0]


def forget_pinned() -> None:
    """Forget all pinned memory, between jobs."""
    _pinned.clear()


def poison(tensor: Tensor) -> Tensor:
    """Fill a CPU tensor with what no computation should see: NaN or bytes of 0xA5."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    info = torch.iinfo(tensor.dtype)
    return tensor.fill_(0xA5 if info.min == 0 else info.max // 3)
