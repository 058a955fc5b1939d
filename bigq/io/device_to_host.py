"""Copies of tensors from a GPU to the host for writing, on a separate CUDA stream that overlaps with computation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bigq.io.reader import CHUNK_BYTES, as_bytes


class DeviceToHost:
    """Double buffering with two pinned buffers: the device fills one while the other is written. For one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor] = []

    def mark(self) -> torch.cuda.Event:
        """An event after all work that is on the current stream now."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def chunks(self, tensor: Tensor, computed: torch.cuda.Event) -> Iterator[memoryview]:
        """The bytes of a contiguous tensor in order, copied after the event ``computed``. Each piece is valid until the next.

        May be called in any thread. The copy of a piece has ended when it is yielded, so after the last one the tensor may be freed.
        """
        with torch.cuda.device(self._device):
            if not self._buffers:
                self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._stream.wait_event(computed)
            pieces = tensor.view(-1).view(torch.uint8).split(CHUNK_BYTES)
            pending = self._begin(pieces[0], 0)
            for i in range(len(pieces)):
                buffer, copied = pending
                if i + 1 < len(pieces):
                    pending = self._begin(pieces[i + 1], (i + 1) % 2)
                copied.synchronize()
                yield as_bytes(buffer)

    def _begin(self, piece: Tensor, which: int) -> tuple[Tensor, torch.cuda.Event]:
        buffer = self._buffers[which][: len(piece)]
        with torch.cuda.stream(self._stream):
            buffer.copy_(piece, non_blocking=True)
            # blocking=True: the writing thread sleeps instead of spinning.
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
        return buffer, copied
