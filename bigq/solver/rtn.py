"""Round to nearest (RTN): each weight becomes the closest point of its group's grid, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite
from bigq.kernels.grid import find_grid
from bigq.kernels.pick import piece
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.storage_range import require_storable


def round_to_nearest(weight: Tensor, scheme: QuantScheme, name: str = "the Linear", importance: Tensor | None = None) -> QuantizedWeight:
    """Quantize a weight [m, n], each element by itself. Loss and energy are sums of squares.

    importance: [n], what the squared error of a weight counts, by its input; by default all count 1 (H is the identity).
    Takes some rows at a time: 25 bytes for each of their weights are needed besides the result.
    Raises NumericsError if the weight is not finite, UsageError if the group size does not divide n.
    """
    m, n = weight.shape
    width = scheme.group_width(n)
    codes = torch.empty(m, n, dtype=torch.uint8, device=weight.device)
    scales, zeros = (torch.empty(m, n // width, device=weight.device) for _ in range(2))
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    rows = max(1, piece(on_gpu=weight.is_cuda) // n)
    # As [inputs per group, groups, 1]: rows come last, since weights of squared errors have the first dimensions.
    weights = torch.ones(1, 1, 1, device=weight.device) if importance is None else importance.float().view(-1, width).T[..., None]
    order = (2, 0, 1) if importance is None else (2, 1, 0)
    back = (1, 2, 0) if importance is None else (2, 1, 0)
    for lo in range(0, m, rows):
        at = slice(lo, lo + rows)
        if not is_finite(weight[at]):
            raise NumericsError(f"{name}: the weight contains NaN or Inf")
        groups = weight[at].float().reshape(-1, n // width, width).permute(order)
        scale, zero = find_grid(groups, scheme.grid, None if importance is None else weights[..., 0])
        steps = torch.clamp(torch.round(groups / scale), -zero, scheme.grid.max_code - zero)
        codes[at] = (steps + zero).to(torch.uint8).permute(back).reshape(-1, n)
        scales[at], zeros[at] = (scale, zero) if importance is None else (scale.T, zero.T)
        sums += torch.stack([(part.double().square() * weights).sum() for part in (groups - steps * scale, groups)])
    require_storable(scales, name)
    loss, energy = sums.tolist()
    return QuantizedWeight(
        codes=codes,
        scales=scales.to(torch.float16),
        zeros=zeros.to(torch.uint8),
        scheme=scheme,
        loss=loss,
        energy=energy,
        damping=0.0,
    )
