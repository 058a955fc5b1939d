"""Copies between host and device. On a side stream they are made as late as CUDA allows."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fake_cuda.findings import DONE, LOCK, PAGEABLE, place, problem, waited
from fake_cuda.memory import Memory, memory_of, pinned_memory, poison
from fake_cuda.streams import MAIN, STREAMS, Clock, Stream, current_stream, host_waits


class Copy:
    """A copy that was queued on a stream. target, source: CPU tensors, those inside of CUDA tensors too.

    needs: what the copy comes after. number: its own, on its stream. kept: the source's bytes when it was queued, if they are on the
    host: they must not change until the host has waited for the copy.
    """

    def __init__(self, stream: Stream, target: Tensor, source: Tensor, memories: tuple[Memory | None, Memory | None]) -> None:
        self.stream, self.target, self.source = stream, target, source
        written, read = memories
        #: Not held: memory that is freed while it is copied must be seen to go.
        self._written = None if written is None else weakref.ref(written)
        self.number = stream.advance()
        self.needs: Clock = dict(stream.clock)
        self.place = place()
        self.made = False
        self.kept = source.clone() if read is None or read.pinned else None

    def before(self, clock: Clock) -> bool:
        """Whether work of a clock comes after this copy."""
        return clock.get(self.stream.number, 0) >= self.number

    def writes(self, memory: Memory) -> bool:
        return self._written is not None and self._written() is memory

    def overlaps(self, other: Copy) -> bool:
        """Whether one writes bytes that the other reads or writes."""
        return _overlap(self.target, other.target) or _overlap(self.target, other.source) or _overlap(self.source, other.target)

    def touches(self, tensor: Tensor) -> bool:
        return _overlap(self.source, tensor) or _overlap(self.target, tensor)

    def make(self) -> None:
        """Move the bytes, after all that comes before."""
        for number, count in self.needs.items():
            if number != self.stream.number:
                STREAMS[number].drain(count)
        self._check_source()
        settle_sources(self.target)
        with torch.no_grad():
            self.target.copy_(self.source)
        self.made = True
        for later in self.stream.queue:  # they read what this copy wrote
            if later.kept is not None and _overlap(later.source, self.target):
                later.kept = later.source.clone()
        if self.kept is not None:
            self.stream.unconfirmed.append(self)

    def confirm(self) -> None:
        """The host knows that the copy is done; until now its source had to stay as it was."""
        self._check_source()
        self.stream.unconfirmed.remove(self)

    def _check_source(self) -> None:
        if self.kept is not None and not _same_bytes(self.kept, self.source):
            problem("the host memory that a copy reads was overwritten before the copy was waited for", self.place)
            self.kept = self.source.clone()


def settle_sources(target: Tensor) -> None:
    """The device is about to write host memory: copies that read it before, in order, have done so."""
    for stream in STREAMS:
        for copy in [copy for copy in stream.unconfirmed if _overlap(copy.source, target)]:
            copy.confirm()


def copy_between(target: Tensor, source: Tensor, *, to_device: bool, from_device: bool, asynchronous: bool) -> None:
    """``target.copy_(source)`` on the current stream. target, source: CPU tensors; to_device, from_device: which are of CUDA tensors."""
    stream = current_stream()
    memories = (_memory(target, to_device), _memory(source, from_device))
    with LOCK:
        if stream is MAIN:
            _copy_on_main(target, source, memories, to_device=to_device, from_device=from_device, asynchronous=asynchronous)
            return
        if to_device != from_device:
            if not asynchronous:
                problem("a copy on a side stream that waits")
            elif None in memories:
                problem("an asynchronous copy of host memory that is not pinned")
        copy = Copy(stream, target, source, memories)
        for memory in {id(m): m for m in memories if m is not None}.values():
            memory.use_in_copy(copy)
        earlier = [queued.number for queued in stream.queue if queued.touches(target)]
        stream.drain(max(earlier, default=0))
        settle_sources(target)
        poison(target)
        stream.queue.append(copy)
        DONE["late copy to the device" if to_device else "late copy to the host"] += 1


def _copy_on_main(
    target: Tensor, source: Tensor, memories: tuple[Memory | None, Memory | None], *, to_device: bool, from_device: bool, asynchronous: bool
) -> None:
    MAIN.advance()
    written, read = memories
    if read is not None and from_device:
        read.use_on_main(write=False)
    if written is not None and to_device:
        written.use_on_main(write=True)
    late = asynchronous and None not in memories
    if from_device and not to_device:
        if late:
            copy = Copy(MAIN, target, source.clone(), memories)
            settle_sources(target)
            poison(target)
            MAIN.queue.append(copy)
            return
        waited("copy to the host")
        host_waits(MAIN.clock)
    elif to_device and not from_device:
        if late:
            Copy(MAIN, target, source, memories).make()
            return
        PAGEABLE["copy to the device", place()] += 1
    target.copy_(source)


def _memory(tensor: Tensor, on_device: bool) -> Memory | None:
    return memory_of(tensor) if on_device else pinned_memory(tensor)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share bytes; strides are taken as if everything in between belonged to them."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (first_a, last_a), (first_b, last_b) = _extent(a), _extent(b)
    return first_a < last_b and first_b < last_a


def _extent(t: Tensor) -> tuple[int, int]:
    size = t.element_size()
    begin = t.storage_offset() * size
    if not t.numel():
        return begin, begin
    return begin, begin + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * size


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
