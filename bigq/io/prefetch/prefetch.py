"""The interface of prefetch: tensors are read while the device computes, within a budget of host memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from bigq.io.index import TensorInfo
from bigq.io.prefetch.cuda_copier import CudaCopier
from bigq.io.prefetch.to_device import DevicePrefetch
from bigq.io.prefetch.to_host import HostPrefetch
from bigq.progress.trace import Trace


class Prefetch(Protocol):
    """Reads tensors from disk to the device in the order in which they are announced."""

    @property
    def peak(self) -> int:
        """Peak bytes of host memory held for tensors that were not taken yet."""

    def announce(self, infos: Iterable[TensorInfo]) -> None:
        """Queue tensors that will be taken, in about this order. Tensors already announced keep their place."""

    def take(self, info: TensorInfo) -> Tensor:
        """The tensor on the device, whether it was announced or not. Raises CheckpointError. NaN and Inf raise NumericsError here or in
        ``check``.
        """

    def check(self) -> None:
        """Raise NumericsError, naming the tensor, if a taken tensor contains NaN or Inf. Call it before using taken tensors."""

    def close(self) -> None:
        """Cancel pending reads and free the memory."""


def open_prefetch(device: torch.device, budget: int, trace: Trace) -> Prefetch:
    """The prefetch for a job that computes on ``device``. budget: bytes of host memory; on a GPU, ``to_device.least_budget()`` is the
    minimum.
    """
    return DevicePrefetch(budget, CudaCopier(device), trace) if device.type == "cuda" else HostPrefetch(budget, trace)
