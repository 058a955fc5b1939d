"""What a source is: the seam between stored tensors and the weights that they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bigq.io.index import TensorInfo

#: Reads one stored tensor into host memory, from the file or from what was prefetched.
Read = Callable[[TensorInfo], Tensor]


class Source(Protocol):
    """How one weight is stored.

    name: of the weight in the checkpoint, under which the output has it too. dtype: of the weight, which readers give the scales.
    is_plain: whether the one stored tensor is the weight itself, so that it can be copied without being loaded.
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

    def check(self, shape: tuple[int, ...]) -> None:
        """From headers alone: raise CheckpointError where no weight of this shape is stored, UnsupportedModelError where it cannot be
        read."""

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight on the device. Linears are [outputs, inputs]. Raises CheckpointError, NumericsError."""
