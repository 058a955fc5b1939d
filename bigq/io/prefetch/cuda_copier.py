"""Copies from pinned host memory to a CUDA device on a separate stream.

    current stream  … work ─┬─ target allocated ────────────────┬─ uses the tensor …
                            ▼ wait                              ▲ wait
    copy stream             └── piece ── piece ── piece ────────┘
                                    event    event    event ──▶ the piece's host memory may be overwritten

A target is allocated on the current stream. The caching allocator may reuse memory that earlier work on that stream still
accesses, so copies wait for that work. ``record_stream`` keeps the target's memory from being reused during a copy, in case the
caller fails before the streams are joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigq.errors import ResourceError


class CudaCopier:
    """A ``bigq.io.prefetch.to_device.Copier`` with one copy stream of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def host_memory(self, size: int) -> Tensor:
        """Pinned memory. PyTorch rounds its size up to a power of two, so size must be one. Raises ResourceError."""
        assert size & (size - 1) == 0
        try:
            # The current device of a new thread is 0. Pinning there would create a second CUDA context.
            with torch.cuda.device(self._device):
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise ResourceError(
                f"cannot pin {size} bytes of host memory for prefetch ({str(error).splitlines()[0]}); use a smaller --read-ahead"
            ) from error

    def target(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)
        return tensor

    def copy(self, target: Tensor, source: Tensor) -> _CudaCopy:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            # blocking=True: a waiting thread sleeps instead of spinning.
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
