"""The range of scales that can be stored."""

from __future__ import annotations

from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite
from bigq.kernels.grid_spec import LARGEST_OF_FORM, ScaleForm


def require_storable(scale: Tensor, name: str, form: ScaleForm) -> None:
    """Raise NumericsError, naming the Linear, if a scale is above what its form holds. Above fp16, ``find_grid`` returns Inf."""
    largest = LARGEST_OF_FORM.get(form)
    if largest is not None and bool((scale > largest).any()):
        raise NumericsError(
            f"{name}: its weights need a scale above {largest:g}, the largest one of the format; leave this Linear unquantized with --skip"
        )
    if not is_finite(scale):
        raise NumericsError(f"{name}: its weights need a scale above 65504, the maximum of fp16; leave this Linear unquantized with --skip")
