"""The range of scales that can be stored."""

from __future__ import annotations

from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite


def require_storable(scale: Tensor, name: str) -> None:
    """Raise NumericsError, naming the Linear, if a scale overflows fp16, for which ``find_grid`` returns Inf."""
    if not is_finite(scale):
        raise NumericsError(f"{name}: its weights need a scale above 65504, the maximum of fp16; leave this Linear unquantized with --skip")
