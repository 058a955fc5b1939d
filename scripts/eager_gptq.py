"""GPTQ as it is usually written, to measure against: three-step inverse, eager loop over columns. Symmetric groups only."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def eager_gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int, damping: float = 0.01) -> tuple[Tensor, float]:
    """The dequantized weight [m, n] and the loss; fp32 throughout, inputs are not changed.

    Frantar et al. 2022, algorithm 1: Cholesky, inverse, Cholesky of the inverse; the errors of a block of 128 columns are
    applied to all columns behind it at once.
    """
    w, h = weight.float().clone(), hessian.float().clone()
    n = w.shape[1]
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    top = 2.0 ** (bits - 1)
    loss = torch.zeros((), device=w.device)
    scale = torch.ones(w.shape[0], device=w.device)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        block, errors, part = w[:, a:b].clone(), torch.zeros_like(w[:, a:b]), u[a:b, a:b]
        for j in range(b - a):
            if (a + j) % group_size == 0:
                scale = (block[:, j : j + group_size].abs().amax(1) * (2 / (2 * top - 1))).half().float()
            column = block[:, j]
            quantized = (column / scale).round().clamp(-top, top - 1) * scale
            error = (column - quantized) / part[j, j]
            loss += error.square().sum()
            block[:, j:] -= error[:, None] @ part[j : j + 1, j:]
            w[:, a + j] = quantized
            errors[:, j] = error
        w[:, b:] -= errors @ u[a:b, b:]
    return w, float(loss)
