"""The interface of a source, between stored tensors and the weights that they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bigq.io.index import TensorInfo

#: Reads one stored tensor into host memory, from the file or from prefetched bytes.
Read = Callable[[TensorInfo], Tensor]


class Source(Protocol):
    """How one weight is stored.

    name: of the weight in the checkpoint, under which the output has it too. dtype: of the weight, which readers give the scales.
    is_plain: whether what is stored are the weight's own values, so that it can be copied without being loaded.
    """

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def is_plain(self) -> bool: ...

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        """The stored tensors, in the order in which ``value`` reads them; prefetching follows it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, by the headers. Raises CheckpointError, UnsupportedModelError."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Check headers. Raises CheckpointError if the stored weight has another shape, UnsupportedModelError if bigq cannot read it."""

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight on the device. Linears are [outputs, inputs]. Raises CheckpointError, NumericsError."""
