"""The factorization ``H = R·Rᵀ`` with R upper triangular, in place.

It is a Cholesky factorization read from the last column to the first, so that ``R⁻¹`` is the upper
Cholesky factor of ``H⁻¹`` that GPTQ (Frantar et al. 2022, algorithm 1) wants, and no inverse is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def upper_cholesky_(h: Tensor) -> bool:
    """Overwrite the upper triangle of h [n, n] (fp32 or fp64) with R, where ``h = R·Rᵀ``.

    Only the upper triangle is read or written. Returns False, with h's upper triangle spoilt, where h is not
    positive definite in its precision.
    """
    n = h.shape[0]
    for hi in range(n, 0, -BLOCK):
        lo = max(0, hi - BLOCK)
        corner = h[lo:hi, lo:hi]
        full = corner.triu() + corner.triu(1).T
        lower, info = torch.linalg.cholesky_ex(full.flip(0, 1))
        if int(info) != 0:
            return False
        r = lower.flip(0, 1)
        corner.copy_(corner.tril(-1) + r)
        if lo == 0:
            break
        panel = h[:lo, lo:hi]
        panel.copy_(torch.linalg.solve_triangular(r.T, panel, upper=False, left=False))
        for a in range(0, lo, BLOCK):
            b = min(a + BLOCK, lo)
            h[:a, a:b].addmm_(panel[:a], panel[a:b].T, alpha=-1)
            h[a:b, a:b].sub_((panel[a:b] @ panel[a:b].T).triu_())
    return True


def upper_inverse(r: Tensor) -> Tensor:
    """The inverse of a small upper triangular matrix [k, k]."""
    eye = torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    inverse: Tensor = torch.linalg.solve_triangular(r, eye, upper=True)
    return inverse
