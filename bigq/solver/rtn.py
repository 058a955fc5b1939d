"""Round to nearest (RTN): each weight becomes the closest point of its group's grid.

Without calibration, or with a search of grids for the least error of what the group adds to the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite
from bigq.kernels.grid import codes_of, find_grid, nearest, searched_grid
from bigq.kernels.pick import piece
from bigq.nested_scales import TINY
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.input_products import of_groups, quadratic
from bigq.solver.settling import settled_
from bigq.solver.storage_range import require_storable


def round_to_nearest(weight: Tensor, scheme: QuantScheme, name: str = "the Linear", products: Tensor | None = None) -> QuantizedWeight:
    """Quantize a weight [m, n], each element by itself. Loss and energy are sums of squares, or of quadratic forms in the products.

    products: mean products of neighbouring inputs (``InputProducts.finish``); by default every input counts by itself, and all alike.
    Takes some rows at a time: 25 bytes for each of their weights are needed besides the result.
    Raises NumericsError if the weight is not finite, UsageError if the group size does not divide n.
    """
    m, n = weight.shape
    width, spec = scheme.group_width(n), scheme.grid
    codes = torch.empty(m, n, dtype=torch.uint8, device=weight.device)
    scales, zeros = (torch.empty(m, n // width, device=weight.device) for _ in range(2))
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    rows = max(1, piece(on_gpu=weight.is_cuda) // n)
    form = None if products is None else of_groups(products, width, scheme.damping)
    pieces = [slice(lo, lo + rows) for lo in range(0, m, rows)]

    def find(at: slice) -> None:
        if not is_finite(weight[at]):
            raise NumericsError(f"{name}: the weight contains NaN or Inf")
        if form is None or not spec.search:
            scales[at], zeros[at] = find_grid(_groups(weight[at], width), spec)
            return
        rows_last = weight[at].float().view(-1, n // width, width).transpose(0, 1)
        low, high = rows_last.amin(-1).clamp_(max=0), rows_last.amax(-1).clamp_(min=0)

        def error(scale: Tensor, zero: Tensor) -> Tensor:
            points = nearest(rows_last / scale[..., None], zero[..., None], spec)
            return quadratic(rows_last - points * scale[..., None], form)

        scales[at], zeros[at] = (found.T for found in searched_grid(low, high, spec, error))

    nested, settled = None, scales
    if spec.settles:  # the scales of all pieces are rounded together
        for at in pieces:
            find(at)
        settled = scales.clone()
        (nested,) = settled_(settled.T, [m], spec.scale_form)
    for at in pieces:
        if not spec.settles:
            find(at)
        groups = _groups(weight[at], width)
        scaled = groups / settled[at] if nested is None or spec.search else _in_units_of(scales[at], groups)
        points = nearest(scaled, zeros[at], spec)
        codes[at] = codes_of(scaled if spec.book else points, zeros[at], spec).permute(1, 2, 0).reshape(-1, n)
        sums += torch.stack([_size(part, form) for part in (groups - points * settled[at], groups)])
    require_storable(settled, name, spec.scale_form)
    loss, energy = sums.tolist()
    return QuantizedWeight(
        codes=codes,
        scales=settled if spec.settles else settled.to(torch.float16),
        zeros=zeros.to(torch.uint8),
        scheme=scheme,
        loss=loss,
        energy=energy,
        damping=0.0,
        nested=nested,
    )


def _groups(rows: Tensor, width: int) -> Tensor:
    """Rows [k, n] as fp32 groups [width, k, n / width]."""
    return rows.float().reshape(len(rows), -1, width).permute(2, 0, 1)


def _size(groups: Tensor, form: Tensor | None) -> Tensor:
    """The sum of squares of groups [width, k, n / width], or of their quadratic forms, fp64."""
    if form is None:
        return groups.double().square().sum()
    return quadratic(groups.permute(2, 1, 0), form).sum(dtype=torch.float64)


def _in_units_of(scale: Tensor, groups: Tensor) -> Tensor:
    """Groups in units of a scale that spans their weights, and is not rounded yet: so bitsandbytes does it."""
    return groups * (1.0 / scale.clamp(min=TINY))
