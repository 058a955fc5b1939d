"""GPTQ's column loop over a few columns: round one column, spread its error over the columns to its right.

Weights come transposed, [k, m]: k columns of the Linear's weight, each contiguous over its m rows, so that every
step of the loop is a handful of long vector operations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_block_(w: Tensor, u: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """Quantize k columns in order (Frantar et al. 2022, algorithm 1, inner loop).

    w: [k, m], the columns as corrected so far; spoilt on return.
    u: [k, k] upper triangular, the diagonal block of ``R⁻¹``.
    scale: [k, m]. low, high: the range of ``code − zero``, each a number or [k, m].
    Returns (code − zero) and the errors ``(w − scale·(code − zero)) / u_jj``, both [k, m] in w's type.
    """
    k = w.shape[0]
    steps = torch.empty_like(w)
    errors = torch.empty_like(w)
    inverse_pivot = u.diagonal().reciprocal().tolist()
    for j in range(k):
        step, error = steps[j], errors[j]
        torch.div(w[j], scale[j], out=step)
        step.round_()
        if isinstance(low, Tensor):
            assert isinstance(high, Tensor)
            torch.clamp(step, low[j], high[j], out=step)
        else:
            assert not isinstance(high, Tensor)
            step.clamp_(low, high)
        torch.mul(step, scale[j], out=error)
        torch.sub(w[j], error, out=error)
        error.mul_(inverse_pivot[j])
        if j + 1 < k:
            w[j + 1 :].addr_(u[j, j + 1 :], error, alpha=-1)
    return steps, errors
