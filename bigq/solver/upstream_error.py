"""Asymmetric calibration (Li et al. 2025, "GPTAQ"): make up for what the quantized Linears before this one have done to its inputs.

GPTQ asks a Linear for what it gave on the inputs X̂ that it has now, behind quantized Linears. Asymmetric calibration asks for
what it gave in the original model, on the inputs X there: ``min ‖X̂·Qᵀ − X·Wᵀ‖²``. With ``H = 2/T · X̂ᵀX̂`` and the cross matrix
``D = 2/T · (X − X̂)ᵀX̂``, that is up to a constant ``(Q − W*)·H·(Q − W*)ᵀ`` with the corrected target

    W* = W + W·D·H⁻¹

so it is GPTQ on another weight, and since ``H = R·Rᵀ`` is factored for GPTQ anyway, the correction takes one product and two
triangular solves. A strength α scales the correction; 0 leaves plain GPTQ.

The paper spreads the same residual column by column, and of ``D·Uᵀ·U`` (``H⁻¹ = UᵀU``) only what lies right of the diagonal of
``D·Uᵀ``: no column is corrected for a residual of its own or of one behind it. The whole correction is the exact least-squares target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import finite
from bigq.kernels.precision import fp32_products
from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.solver.hessian import OTHER_DTYPE, Factor, Reduction, finite_tokens


class CrossSum:
    """Accumulates ``(X − X̂)ᵀX̂`` over batches of activations in one fp32 buffer [n, n].

    finite_only: leave out tokens that hold NaN or Inf on either side.
    """

    def __init__(self, n: int, device: torch.device, *, finite_only: bool = False) -> None:
        self._sum = torch.zeros(n, n, dtype=torch.float32, device=device)
        self._finite_only = finite_only

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Add the inputs [..., n] of the same tokens in the original model (X) and in the quantized one (X̂), of one floating type.

        The difference is taken in fp32. On a GPU the product of 16-bit activations takes TF32 factors, which X̂ fits exactly.
        """
        n = original.shape[-1]
        pairs = zip(original.reshape(-1, n).split(CHUNK_TOKENS), quantized.reshape(-1, n).split(CHUNK_TOKENS), strict=True)
        with fp32_products(self._sum, tf32=quantized.dtype.itemsize == 2):
            for x, now in pairs:
                now = now.float()
                drift = x.float().sub_(now) if x.dtype != torch.float32 else x - now
                if self._finite_only and not finite(drift):  # so it is where either is not
                    lost = ~(finite_tokens(drift) & finite_tokens(now))[:, None]
                    drift, now = drift.masked_fill_(lost, 0), now.masked_fill(lost, 0)
                self._sum.addmm_(drift.T, now)

    def reduce(self, reduction: Reduction) -> None:
        """Add up the shares of all processes."""
        reduction.tensor_(self._sum)

    def finish(self, tokens: int, name: str = "the Linear") -> Tensor:
        """D of so many tokens (those of the Hessian) in the accumulator's own storage. Ends this object's life.

        Raises NumericsError, naming ``name``, where it is not finite.
        """
        d = self._sum
        del self._sum
        if not finite(d):
            raise NumericsError(
                f"{name}: its inputs in the original model are not finite, or too large (NaN or Inf in the cross matrix); {OTHER_DTYPE}, "
                "or leave such tokens out with --on-nonfinite skip"
            )
        return d.mul_(2.0 / tokens)


@dataclass(frozen=True, slots=True)
class Correction:
    """How weights are corrected before they are quantized. cross: D [n, n] in natural order, of the factor's dtype. alpha: its strength."""

    cross: Tensor
    alpha: float

    def apply(self, rows: Tensor, factor: Factor) -> Tensor:
        """``W + α·W·D·H'⁻¹`` for rows W [k, n] of a weight in the factor's dtype, where H' is damped as it was factored. Overwrites rows.

        Inputs that are always 0 in the quantized model are not corrected, but what they contributed in the original one is made up for.
        """
        with fp32_products(rows, tf32=True):
            spread = rows @ self.cross
        if factor.perm is not None:
            spread = spread[:, factor.perm]
        # Columns of a transposed matrix are contiguous, which is how the library wants them.
        spread = torch.linalg.solve_triangular(factor.r, spread.T, upper=True)
        spread = torch.linalg.solve_triangular(factor.r.T, spread, upper=False).T
        if factor.perm is None:
            return rows.add_(spread, alpha=self.alpha)
        return rows.index_add_(1, factor.perm, spread, alpha=self.alpha)
