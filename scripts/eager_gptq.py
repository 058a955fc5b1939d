"""An eager GPTQ for comparison, as existing quantizers run it: three-step inverse, loop over columns.

Written from algorithm 1 of the paper, with the operations of their loops: quantize and dequantize with scale and zero point, a
matrix of losses, an outer product per column. Symmetric groups only.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def eager_gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int, damping: float = 0.01) -> tuple[Tensor, float]:
    """The dequantized weight [m, n] and the loss, all in fp32. The inputs are not changed."""
    w, h = weight.float().clone(), hessian.float().clone()
    m, n = w.shape
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    top = 2**bits - 1
    scale, zero = torch.ones(m, 1, device=w.device), torch.full((m, 1), (top + 1) / 2, device=w.device)
    result, losses = torch.zeros_like(w), torch.zeros_like(w)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        block, part = w[:, a:b].clone(), u[a:b, a:b]
        quantized, errors, block_losses = (torch.zeros_like(block) for _ in range(3))
        for j in range(b - a):
            if (a + j) % group_size == 0:
                reach = block[:, j : j + group_size].abs().amax(1, keepdim=True)
                scale = (2 * reach / top).half().float()
            column, pivot = block[:, j], part[j, j]
            codes = torch.clamp(torch.round(column.unsqueeze(1) / scale) + zero, 0, top)
            value = (scale * (codes - zero)).flatten()
            quantized[:, j] = value
            block_losses[:, j] = (column - value) ** 2 / pivot**2
            error = (column - value) / pivot
            block[:, j:] -= error.unsqueeze(1).matmul(part[j, j:].unsqueeze(0))
            errors[:, j] = error
        result[:, a:b] = quantized
        losses[:, a:b] = block_losses
        w[:, b:] -= errors.matmul(u[a:b, b:])
    return result, float(losses.sum())
