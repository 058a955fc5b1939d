"""Reading tensors before they are asked for, beside the computation, within a budget of host memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from bigq.io.index import TensorInfo
from bigq.io.prefetch.cuda_copier import CudaCopier
from bigq.io.prefetch.to_device import IntoDevice
from bigq.io.prefetch.to_host import IntoHost
from bigq.progress.trace import Trace


class ReadAhead(Protocol):
    """Tensors on their way from the disk to the device, in the order in which they are announced."""

    @property
    def peak(self) -> int:
        """The most bytes of host memory that were held at once for tensors that were not taken yet."""

    def announce(self, infos: Iterable[TensorInfo]) -> None:
        """These will be taken next, in about this order; those that are announced already stay where they are."""

    def take(self, info: TensorInfo) -> Tensor:
        """The whole tensor, announced or not, on the device. Raises CheckpointError, or NumericsError now or in ``check``."""

    def check(self) -> None:
        """Raise NumericsError where a tensor that was taken holds NaN or Inf, naming it. Call it before using what was taken."""

    def close(self) -> None:
        """Give up what was not taken, and give back the memory."""


def open_read_ahead(device: torch.device, budget: int, trace: Trace) -> ReadAhead:
    """For a job that computes on ``device``. budget: bytes of host memory; on a GPU at least ``into_device.least_budget()``
    are used."""
    return IntoDevice(budget, CudaCopier(device), trace) if device.type == "cuda" else IntoHost(budget, trace)
