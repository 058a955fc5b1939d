"""Asymmetric calibration in the column-by-column form of Li et al. 2025, with the signature of ``bigq.solver.gptq.solve``.

With column q quantized, ``α·w_q·P[q]`` is added to the columns behind it, ``P = triu(D·Uᵀ, 1)·U`` and ``H⁻¹ = Uᵀ·U``; w_q is the weight
as corrected so far. With natural order a group's scales are found when the loop reaches it, otherwise from the original weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.grid import find_grid
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.hessian import Factor
from bigq.solver.upstream_error import Correction


def solve_by_columns(
    weights: list[Tensor], factor: Factor, scheme: QuantScheme, name: str = "", correction: Correction | None = None
) -> list[QuantizedWeight]:
    assert correction is not None
    n, dtype = factor.r.shape[0], factor.r.dtype
    w = torch.cat(weights).to(dtype)
    perm = torch.arange(n) if factor.perm is None else factor.perm
    width, top = scheme.group_width(n), 2**scheme.bits - 1
    u = torch.linalg.inv(factor.r.triu())
    p = correction.alpha * (correction.cross[perm][:, perm] @ u.T).triu(1) @ u
    scale, zero = find_grid(w.view(len(w), -1, width).permute(2, 1, 0), scheme.grid)
    now, codes, loss = w[:, perm], torch.zeros_like(w), 0.0
    for q in range(n):
        g = int(perm[q]) // width
        if factor.perm is None and width < n and q % width == 0:
            scale[g], zero[g] = find_grid(now[:, q : q + width].T, scheme.grid)
        value = now[:, q].clone()
        code = ((value / scale[g]).round() + zero[g]).clamp(0, top)
        codes[:, perm[q]] = code
        error = (value - (code - zero[g]) * scale[g]) / u[q, q]
        loss += float(error.square().sum())
        now[:, q:] -= error[:, None] * u[q, q:] - value[:, None] * p[q, q:]
    rows = [len(part) for part in weights]
    parts = zip(codes.split(rows), scale.T.split(rows), zero.T.split(rows), strict=True)
    return [
        QuantizedWeight(
            codes=part.to(torch.uint8),
            scales=scales.to(torch.float16),
            zeros=zeros.to(torch.uint8),
            scheme=scheme,
            loss=loss,
            energy=float(w.square().sum()),
            damping=factor.damping,
        )
        for part, scales, zeros in parts
    ]
