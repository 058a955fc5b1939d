"""A weight that is stored as a tensor of its own shape, in fp32, fp16 or bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import TensorInfo
from bigq.io.sources.base import Read


@dataclass(frozen=True, slots=True)
class PlainSource:
    """One stored tensor."""

    info: TensorInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    @property
    def is_plain(self) -> bool:
        return True

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        return (self.info,)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.info.shape)

    def check(self, shape: tuple[int, ...]) -> None:
        info = self.info
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} has shape {list(info.shape)}, but config.json says {list(shape)}; "
                "the two belong to different models"
            )
        if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            raise UnsupportedModelError(f"{info.file}: tensor {info.name} is {info.dtype}; bigq reads fp32, fp16 and bf16 sources")

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        return read(self.info).to(device=device, dtype=dtype)
