"""Finding scales and zero points for groups of weights.

Both are rounded to what is stored (fp16, integers) before anything is quantized with them, so that the codes
are solved against exactly the grid that a reader will see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finite import finite
from bigq.scheme import QuantScheme

FP16_TINY = 2.0**-24

#: The grid search of the paper's own code: ranges down to 20 % of the full one in steps of 1 %, errors to the power 2.4.
MSE_STEPS = 80
MSE_POWER = 2.4


def find_grid(w: Tensor, scheme: QuantScheme, name: str = "the Linear") -> tuple[Tensor, Tensor]:
    """Scale and zero for groups of weights.

    w: [g, ...], g weights in each group. Returns (scale, zero), each [...], in w's dtype, the scale already rounded
    to fp16 and the zero a whole number. Raises NumericsError, naming ``name``, where a scale does not fit fp16.
    """
    low = w.amin(0).clamp_(max=0)
    high = w.amax(0).clamp_(min=0)
    scale, zero = _grid_for_range(low, high, scheme)
    if not finite(scale):
        raise NumericsError(
            f"{name}: its weights reach {float(torch.maximum(-low, high).max()):.3g}, which takes a scale "
            "above fp16's largest number 65504; leave this Linear out with --skip"
        )
    if not scheme.mse:
        return scale, zero
    best = _rounding_error(w, scale, zero, scheme)
    for step in range(1, MSE_STEPS):
        shrink = 1 - step / 100
        candidate_scale, candidate_zero = _grid_for_range(low * shrink, high * shrink, scheme)
        error = _rounding_error(w, candidate_scale, candidate_zero, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate_scale, scale)
        zero = torch.where(better, candidate_zero, zero)
    return scale, zero


def _grid_for_range(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """The grid that spans [low, high], low ≤ 0 ≤ high."""
    if scheme.symmetric:
        reach = torch.maximum(-low, high)
        scale = _as_stored(2 * reach / scheme.max_code)
        return scale, torch.full_like(scale, 2.0 ** (scheme.bits - 1))
    scale = _as_stored((high - low) / scheme.max_code)
    zero = torch.round(-low / scale).clamp_(0, scheme.max_code)
    if scheme.min_zero:
        # A group without negative weights wants zero = 0; where that cannot be stored, it keeps its reach instead.
        raised = zero < scheme.min_zero
        widened = _as_stored(high / (scheme.max_code - scheme.min_zero))
        scale = torch.where(raised, torch.maximum(scale, widened), scale)
        zero = zero.clamp_(min=scheme.min_zero)
    return scale, zero


def _as_stored(scale: Tensor) -> Tensor:
    """Round to fp16 and back; an all-zero group gets scale 1, one that would underflow the smallest fp16 number, one too large Inf."""
    stored = scale.to(torch.float16).to(scale.dtype)
    stored = torch.where(stored == 0, torch.full_like(stored, FP16_TINY), stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def _rounding_error(w: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    step = torch.clamp(torch.round(w / scale), -zero, scheme.max_code - zero)
    return (w - step * scale).abs_().pow_(MSE_POWER).sum(0)
