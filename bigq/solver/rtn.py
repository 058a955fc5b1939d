"""Round to nearest (RTN): each weight becomes the closest point of its group's grid, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite
from bigq.kernels.grid import find_grid
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.storage_range import require_storable


def round_to_nearest(weight: Tensor, scheme: QuantScheme, name: str = "the Linear") -> QuantizedWeight:
    """Quantize a weight [m, n] without calibration. Loss and energy are sums of squares (H is the identity).

    Raises NumericsError if the weight is not finite, UsageError if the group size does not divide n.
    """
    if not is_finite(weight):
        raise NumericsError(f"{name}: the weight contains NaN or Inf")
    m, n = weight.shape
    width = scheme.group_width(n)
    groups = weight.float().reshape(m, n // width, width).permute(2, 0, 1)
    scale, zero = find_grid(groups, scheme.grid)
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
