"""Copies from pinned host memory to a CUDA device on a stream of their own.

    current stream  … work ─┬─ target allocated ────────────────┬─ uses the tensor …
                            ▼ wait                              ▲ wait
    copy stream             └── piece ── piece ── piece ────────┘
                                    event    event    event ──▶ the piece's host memory may be overwritten

A target's memory belongs to the current stream, where all else lives too; the caching allocator may have handed it out while
earlier work of that stream still uses it, so copies wait for that work. ``record_stream`` keeps it from going to another tensor
while a copy into it is under way, where its taker fails before the streams were joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigq.errors import ResourceError


class CudaCopier:
    """One copy stream of one device. See ``bigq.io.prefetch.to_device.Copier``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def host_memory(self, size: int) -> Tensor:
        """Pinned. Raises ResourceError. PyTorch rounds such memory up to a power of two, so only those are asked for."""
        assert size & (size - 1) == 0
        try:
            # A thread begins on device 0, where pinning would set up a context of its own.
            with torch.cuda.device(self._device):
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise ResourceError(
                f"{size} bytes of host memory cannot be pinned to read ahead through ({str(error).splitlines()[0]}); "
                "use a smaller --read-ahead"
            ) from error

    def target(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)
        return tensor

    def copy(self, target: Tensor, source: Tensor) -> _CudaCopy:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            # blocking: whoever waits for it sleeps rather than spins.
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        return _CudaCopy(event, self._device)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _CudaCopy:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        with torch.cuda.device(self._device):
            self._event.synchronize()
