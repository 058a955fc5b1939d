"""The weight of a packed Linear: codes, scales and zero points in one of the formats of ``bigq.io.formats``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.formats import Format
from bigq.io.formats.base import PackedWeight, module_of
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.sources.base import Read
from bigq.kernels.dequantize import dequantize_packed
from bigq.scheme import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSource:
    """One packed Linear. prefix: of its tensors' names. checkpoint: the one that holds them."""

    format: Format
    prefix: str
    scheme: QuantScheme
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        return f"{module_of(self.prefix)}.weight"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        return [self.checkpoint[self.format.tensor(self.prefix, suffix)] for suffix in self.format.suffixes(self.scheme.symmetric)]

    @property
    def shape(self) -> tuple[int, ...]:
        packed = self.format.geometry(self.prefix, self.checkpoint.tensors)
        return packed.outputs, packed.inputs

    def check(self, shape: tuple[int, ...]) -> None:
        outputs, inputs = shape
        first = self.tensors[0]
        try:
            packed = self.format.geometry(self.prefix, self.checkpoint.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{first.file}: {error}; fetch it again") from None
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{first.file}: {error}") from None
        if (packed.bits, packed.outputs, packed.inputs) != (self.scheme.bits, outputs, inputs):
            raise CheckpointError(
                f"{first.file}: tensor {first.name} is packed as {packed}, but config.json says {self.scheme.bits} bits, "
                f"{outputs} × {inputs}; the two belong to different models"
            )

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        words, scales, zeros = (t.to(device) for t in self.stored(read))
        return dequantize_packed(words, scales, zeros, self.scheme.bits, dtype, self.scheme.points)

    def input_number(self, read: Read) -> Tensor | None:
        """What the format stores for the inputs, fp32 [1]; None if nothing."""
        suffix = self.format.input_suffix
        return read(self.checkpoint[self.format.tensor(self.prefix, suffix)]).float().reshape(1) if suffix else None

    def stored(self, read: Read) -> PackedWeight:
        """The packed tensors, in host memory."""
        return self.format.read(self.prefix, lambda name: read(self.checkpoint[name]), self.scheme)
