"""Asymmetric calibration (GPTAQ, Li et al. 2025): correct a Linear's weight for the upstream error.

The upstream error is the change that quantized Linears before this one cause in its inputs. X are the inputs in the original
model, X̂ those in the quantized model. GPTQ preserves the output on X̂: ``min ‖X̂·Qᵀ − X̂·Wᵀ‖²``. Asymmetric calibration preserves
the output of the original model: ``min ‖X̂·Qᵀ − X·Wᵀ‖²``. With ``H = 2/T · X̂ᵀX̂`` and the cross matrix ``D = 2/T · (X − X̂)ᵀX̂``, this
is, up to a constant, ``(Q − W*)·H·(Q − W*)ᵀ`` with the corrected target

    W* = W + W·D·H⁻¹

So it is GPTQ on another weight. Since ``H = R·Rᵀ`` is factored for GPTQ anyway, the correction costs one product and two
triangular solves. A strength α scales the correction; with 0 it is plain GPTQ.

The paper spreads the same residual column by column. Of ``D·Uᵀ·U`` (``H⁻¹ = UᵀU``) it uses only the part of ``D·Uᵀ`` right of the
diagonal, so no column is corrected for its own residual or for those of later columns. The full correction here is the exact
least-squares target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite
from bigq.kernels.precision import fp32_products
from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.solver.hessian import OTHER_DTYPE, Factor, Reduction, finite_tokens


class CrossSum:
    """Accumulates ``(X − X̂)ᵀX̂`` over batches of activations in one fp32 buffer [n, n].

    finite_only: leave out tokens with NaN or Inf in X or X̂.
    """

    def __init__(self, n: int, device: torch.device, *, finite_only: bool = False) -> None:
        self._sum = torch.zeros(n, n, dtype=torch.float32, device=device)
        self._finite_only = finite_only

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Add the inputs [..., n] of the same tokens in the original model (X) and in the quantized one (X̂), of one floating type.

        The difference is computed in fp32. On a GPU, 16-bit activations are multiplied in TF32, which represents X̂ exactly.
        """
        n = original.shape[-1]
        pairs = zip(original.reshape(-1, n).split(CHUNK_TOKENS), quantized.reshape(-1, n).split(CHUNK_TOKENS), strict=True)
        with fp32_products(self._sum, tf32=quantized.dtype.itemsize == 2):
            for x, now in pairs:
                now = now.float()
                drift = x.float().sub_(now) if x.dtype != torch.float32 else x - now
                if self._finite_only and not is_finite(drift):  # NaN or Inf in X or X̂ shows in their difference
                    lost = ~(finite_tokens(drift) & finite_tokens(now))[:, None]
                    drift, now = drift.masked_fill_(lost, 0), now.masked_fill(lost, 0)
                self._sum.addmm_(drift.T, now)

    def reduce(self, reduction: Reduction) -> None:
        """Add up the shares of all processes."""
        reduction.tensor_(self._sum)

    def finish(self, tokens: int, name: str = "the Linear") -> Tensor:
        """D, in the accumulator's storage. This object cannot be used afterwards. tokens: the number of tokens in the Hessian.

        Raises NumericsError, naming ``name``, if it is not finite.
        """
        d = self._sum
        del self._sum
        if not is_finite(d):
            raise NumericsError(
                f"{name}: its inputs in the original model contain NaN or Inf, or are too large (NaN or Inf in the cross matrix); "
                f"{OTHER_DTYPE}, or leave out such tokens with --on-nonfinite skip"
            )
        return d.mul_(2.0 / max(1, tokens))


@dataclass(frozen=True, slots=True)
class Correction:
    """The correction of weights before they are quantized. cross: D [n, n] in natural order, in the factor's dtype. alpha: its strength."""

    cross: Tensor
    alpha: float

    def apply(self, rows: Tensor, factor: Factor) -> Tensor:
        """``W + α·W·D·H'⁻¹`` for rows W [k, n] of a weight in the factor's dtype, with the damped H' of the factor. Overwrites rows.

        Weights of inputs that are always 0 in the quantized model get no correction, since their columns of D and H are 0. Their
        contribution in the original model is compensated by the other weights.
        """
        with fp32_products(rows, tf32=True):
            spread = rows @ self.cross
        if factor.perm is not None:
            spread = spread[:, factor.perm]
        # LAPACK and cuSOLVER need contiguous columns, which a transposed matrix has.
        spread = torch.linalg.solve_triangular(factor.r, spread.T, upper=True)
        spread = torch.linalg.solve_triangular(factor.r.T, spread, upper=False).T
        if factor.perm is None:
            return rows.add_(spread, alpha=self.alpha)
        return rows.index_add_(1, factor.perm, spread, alpha=self.alpha)
