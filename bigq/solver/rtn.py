"""Plain rounding to nearest: no calibration, each weight to the closest point of its group's grid."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import finite
from bigq.kernels.grid import find_grid
from bigq.kernels.grid_spec import MSE_POWER, GridSpec
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.storage_range import require_storable


def plain_grid(scheme: QuantScheme) -> GridSpec:
    """What a group's grid may be where no errors are spread, so that a search need not leave room for them."""
    return dataclasses.replace(scheme.grid, mse_power=scheme.mse_power or MSE_POWER)


def round_to_nearest(weight: Tensor, scheme: QuantScheme, name: str = "the Linear") -> QuantizedWeight:
    """Quantize a weight [m, n] without looking at any input. Loss and energy are plain squares (H = identity).

    Raises NumericsError where the weight is not finite, UsageError where the group size does not divide n.
    """
    if not finite(weight):
        raise NumericsError(f"{name}: the weight contains NaN or Inf")
    m, n = weight.shape
    width = scheme.group_width(n)
    groups = weight.float().reshape(m, n // width, width).permute(2, 0, 1)
    scale, zero = find_grid(groups, plain_grid(scheme))
    require_storable(scale, name)
    steps = torch.clamp(torch.round(groups / scale), -zero, scheme.grid.max_code - zero)
    codes = (steps + zero).to(torch.uint8).permute(1, 2, 0).reshape(m, n)
    return QuantizedWeight(
        codes=codes,
        scales=scale.to(torch.float16),
        zeros=zero.to(torch.uint8),
        scheme=scheme,
        loss=float((groups - steps * scale).double().square().sum()),
        energy=float(groups.double().square().sum()),
        damping=0.0,
    )
