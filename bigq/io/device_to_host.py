"""Bytes of a GPU's tensors for whoever writes them, on a stream of their own beside what the GPU computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bigq.io.reader import CHUNK_BYTES, as_bytes


class Outgoing:
    """Two pinned buffers, one filled by the device while the other's bytes are written. For one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor] = []

    def mark(self) -> torch.cuda.Event:
        """Something to wait for: all that the caller's thread has let the device compute so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def chunks(self, tensor: Tensor, computed: torch.cuda.Event) -> Iterator[memoryview]:
        """A contiguous tensor's bytes in order, from any thread, once ``computed`` has happened. Each piece is valid until the next.

        Copies have ended when their piece comes out, so with the last piece the tensor's memory may be used for something else.
        """
        with torch.cuda.device(self._device):
            if not self._buffers:
                self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._stream.wait_event(computed)
            pieces = tensor.view(-1).view(torch.uint8).split(CHUNK_BYTES)
            coming = self._begin(pieces[0], 0)
            for i in range(len(pieces)):
                buffer, copied = coming
                if i + 1 < len(pieces):
                    coming = self._begin(pieces[i + 1], (i + 1) % 2)
                copied.synchronize()
                yield as_bytes(buffer)

    def _begin(self, piece: Tensor, which: int) -> tuple[Tensor, torch.cuda.Event]:
        buffer = self._buffers[which][: len(piece)]
        with torch.cuda.stream(self._stream):
            buffer.copy_(piece, non_blocking=True)
            # blocking: the writing thread sleeps meanwhile.
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
        return buffer, copied
