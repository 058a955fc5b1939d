"""What a grid must be to be stored."""

from __future__ import annotations

from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import finite


def require_storable(scale: Tensor, name: str) -> None:
    """Raise NumericsError, naming the Linear, where a scale does not fit fp16: finding it gave Inf."""
    if not finite(scale):
        raise NumericsError(f"{name}: its weights take a scale above fp16's largest number 65504; leave this Linear out with --skip")
