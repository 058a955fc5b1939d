"""The energy ``w·H·wᵀ`` of a weight, to which its loss is compared."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.precision import product

#: Maximum rows of a weight whose energy is computed. The energy of the others is estimated from their loss.
ENERGY_ROWS = 128

#: Columns of one product.
COLUMNS = 512


def sampled_energy(work: Tensor, r: Tensor) -> Tensor:
    """``w·H·wᵀ = ‖w·R‖²`` of evenly spaced rows w, before anything is quantized. work: [..., n, m].

    Returns fp64 [..., at most ENERGY_ROWS].

    All rows would cost as much as the solve itself.
    """
    n = work.shape[-2]
    sample = work[..., :: _energy_step(work.shape[-1])].contiguous()
    total = torch.zeros(*sample.shape[:-2], sample.shape[-1], dtype=torch.float64, device=work.device)
    for a in range(0, n, COLUMNS):
        b = min(a + COLUMNS, n)
        part = torch.empty_like(sample[..., a:b, :], memory_format=torch.contiguous_format)
        product(r[..., a:b, a:b].triu().mT, sample[..., a:b, :], part)
        if a:
            product(r[..., :a, a:b].mT, sample[..., :a, :], part, add=part)
        total += part.square_().sum(-2)
    return total


def _energy_step(m: int) -> int:
    return -(-m // ENERGY_ROWS)


def total_energy(energy: Tensor, loss: Tensor) -> float:
    """The energy of all rows from that of some: as much larger as their loss [m] is than the loss of those.

    Rows of larger weights have more of both, so this is closer than the number of rows would be.
    """
    step = _energy_step(len(loss))
    of_sample, sampled_loss = float(energy.sum()), float(loss[::step].sum())
    if step == 1 or sampled_loss == 0:
        return of_sample * len(loss) / len(energy)
    return of_sample * float(loss.sum()) / sampled_loss
