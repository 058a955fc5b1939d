"""A weight that is stored in pieces along its first dimension, such as one convolution for queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.io.index import TensorInfo
from bigq.io.sources.base import Read
from bigq.io.sources.plain import PlainSource


@dataclass(frozen=True, slots=True)
class JoinedSource:
    """Several stored tensors of one dtype, in the order in which they are joined. At least one."""

    tensors: Sequence[TensorInfo]

    @property
    def name(self) -> str:
        return self.tensors[0].name

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def is_plain(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.tensors[0]
        for info in self.tensors:
            if not info.shape or info.shape[1:] != first.shape[1:] or info.dtype != first.dtype:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} is {info.dtype} {list(info.shape)}, which cannot be joined to {first.name}, "
                    f"{first.dtype} {list(first.shape)}; fetch the checkpoint again"
                )
        return (sum(info.shape[0] for info in self.tensors), *first.shape[1:])

    def check(self, shape: tuple[int, ...]) -> None:
        if self.shape != shape:
            raise CheckpointError(
                f"{self.tensors[0].file}: tensor {self.name} and those that are joined to it have shape {list(self.shape)}, but "
                f"config.json says {list(shape)}; the two belong to different models"
            )
        for info in self.tensors:
            PlainSource(info).check(tuple(info.shape))

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.cat([read(info).to(device=device, dtype=dtype) for info in self.tensors])
