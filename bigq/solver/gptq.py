"""GPTQ (Frantar et al. 2022) for all the rows of one weight, left-looking and without an inverse.

With ``H = R·Rᵀ`` (R upper), ``U = R⁻¹`` is the factor that GPTQ spreads errors with. Let ``E = W − Q`` be the
error of the columns quantized so far. For the next columns G = [a, b) the weight that GPTQ would have reached is

    W'_G = W_G + (E[:, :a] · R[:a, G]) · U_GG,     U_GG = R_GG⁻¹

so each block of columns is corrected once, when its turn comes, and only small triangles are ever inverted. The
algorithm keeps E in W's storage: a column of W gives way to its error as soon as it is quantized.

Weights are kept transposed, [n, m], one input's weights contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError, UsageError
from bigq.kernels.cholesky import upper_inverse
from bigq.kernels.finite import finite
from bigq.kernels.gptq_block import gptq_block_
from bigq.scheme import QuantizedWeight, QuantScheme
from bigq.solver.grid import find_grid
from bigq.solver.hessian import Factor, factorize

#: Columns corrected at once by a matrix product, where the group size does not ask for more.
BLOCK = 128

#: Columns between which errors are spread one at a time; further columns of the block get them as one product.
#: A compromise: on two CPU cores a solve with 16, 32, 64, 128 takes 0.27, 0.27, 0.22, 0.22 s for 2816 columns of 1024 rows,
#: but 0.17, 0.21, 0.21, 0.22 s for 1024 columns of 5632 rows.
SUB_BLOCK = 32


def solve(weights: list[Tensor], factor: Factor, scheme: QuantScheme, name: str = "the Linear") -> list[QuantizedWeight]:
    """Quantize the weights [m_i, n] of Linears that share an input, in one pass over their stacked rows.

    Computes in the dtype of the factor (fp32 or fp64). Raises NumericsError where something is not finite, UsageError
    where the group size does not divide n.
    """
    natural = _stack_transposed(weights, factor)
    width = scheme.group_width(natural.shape[0])
    grid = _Grid.prepare(natural, width, factor.perm, scheme, name)
    work = natural if factor.perm is None else natural[factor.perm]
    del natural
    energy = _energy(work, factor.r)
    codes, loss = _quantize_columns(work, factor.r, grid, scheme)
    if factor.perm is not None:
        codes = torch.empty_like(codes).index_copy_(0, factor.perm, codes)
    if not bool(torch.isfinite(loss).all()):
        raise NumericsError(f"{name}: the solve produced NaN or Inf")
    rows = [w.shape[0] for w in weights]
    parts = zip(
        codes.split(rows, 1), grid.scale.split(rows, 1), grid.zero.split(rows, 1), loss.split(rows), energy.split(rows), strict=True
    )
    return [
        QuantizedWeight(
            codes=part_codes.T,
            scales=scale.T.to(torch.float16),
            zeros=zero.T.to(torch.uint8),
            scheme=scheme,
            loss=float(part_loss.sum()),
            energy=float(part_energy.sum()),
            damping=factor.damping,
        )
        for part_codes, scale, zero, part_loss, part_energy in parts
    ]


def quantize_linear(weight: Tensor, hessian: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Quantize one Linear with GPTQ.

    weight: [m, n], any floating type. hessian: symmetric [n, n], ``2/T · XᵀX`` of the layer's inputs (any positive
    multiple gives the same codes); it is not changed. Computes in fp64 where either is fp64, else in fp32.

    Raises NumericsError where a value is not finite or H cannot be factored, UsageError where shapes or the
    group size do not fit.
    """
    m, n = weight.shape
    if hessian.shape != (n, n):
        raise UsageError(f"weight is {m} × {n}, so the Hessian must be {n} × {n}, not {tuple(hessian.shape)}")
    if not finite(weight):
        raise NumericsError("the weight contains NaN or Inf")
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    factor = factorize(hessian.to(dtype, copy=True), act_order=scheme.act_order, damping=scheme.damping)
    return solve([weight.to(hessian.device)], factor, scheme)[0]


@dataclass(slots=True)
class _Grid:
    """scale, zero: [G, m] in the working dtype, for groups of ``width`` inputs.

    perm: the order of columns, None for the natural one. static: found from the original weights before any error is
    spread; else each group's when the column loop reaches it.
    """

    scale: Tensor
    zero: Tensor
    width: int
    perm: Tensor | None
    static: bool
    name: str

    @classmethod
    def prepare(cls, natural: Tensor, width: int, perm: Tensor | None, scheme: QuantScheme, name: str) -> _Grid:
        shape = (natural.shape[0] // width, natural.shape[1])
        static = perm is not None or width == natural.shape[0]
        grid = cls(natural.new_empty(shape), natural.new_empty(shape), width, perm, static, name)
        for g in range(shape[0] if static else 0):
            grid.find(g, natural[g * width : (g + 1) * width], scheme)
        return grid

    def find(self, g: int, weights: Tensor, scheme: QuantScheme) -> None:
        self.scale[g], self.zero[g] = find_grid(weights, scheme, self.name)

    def columns(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Scale and zero [hi − lo, m] of columns lo … hi in the order of the loop; in natural order they are of one group."""
        if self.perm is not None:
            groups = self.perm[lo:hi] // self.width
            return self.scale[groups], self.zero[groups]
        g = lo // self.width
        return self.scale[g].expand(hi - lo, -1), self.zero[g].expand(hi - lo, -1)


def _stack_transposed(weights: list[Tensor], factor: Factor) -> Tensor:
    """The stacked weights as [n, Σm] in the factor's dtype, dead inputs zeroed, in natural order."""
    n = factor.r.shape[0]
    work = torch.empty(n, sum(w.shape[0] for w in weights), dtype=factor.r.dtype, device=factor.r.device)
    lo = 0
    for w in weights:
        work[:, lo : lo + w.shape[0]] = w.T
        lo += w.shape[0]
    if bool(factor.dead.any()):
        work[factor.dead] = 0
    return work


def _energy(work: Tensor, r: Tensor) -> Tensor:
    """``w·H·wᵀ = ‖w·R‖²`` of every row w before anything is quantized, fp64 [m]. Costs as much as the error products."""
    n = work.shape[0]
    total = torch.zeros(work.shape[1], dtype=torch.float64, device=work.device)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        corner = r[a:b, a:b].triu()
        part = corner.T @ work[a:b]
        if a:
            part.addmm_(r[:a, a:b].T, work[:a])
        total += part.square_().sum(0)
    return total


def _quantize_columns(work: Tensor, r: Tensor, grid: _Grid, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """The loop over blocks of columns. work [n, m] is overwritten by the error W − Q.

    Returns codes uint8 [n, m] in the order of work, and the loss of each row, fp64 [m].
    """
    n, m = work.shape
    codes = torch.empty(n, m, dtype=torch.uint8, device=work.device)
    loss = torch.zeros(m, dtype=torch.float64, device=work.device)
    block, sub_block = (BLOCK, SUB_BLOCK) if grid.static else _block_sizes(grid.width)
    half = 2.0 ** (scheme.bits - 1)
    for a in range(0, n, block):
        b = min(a + block, n)
        u = upper_inverse(r[a:b, a:b].triu())
        target = work[a:b].clone()
        if a:
            target.addmm_(u.T, r[:a, a:b].T @ work[:a])
        for s in range(0, b - a, sub_block):
            e = min(s + sub_block, b - a)
            if not grid.static and (a + s) % grid.width == 0:
                grid.find((a + s) // grid.width, target[s : s + grid.width], scheme)
            scale, zero = grid.columns(a + s, a + e)
            low, high = (-half, half - 1) if scheme.symmetric else (-zero, scheme.max_code - zero)
            steps, errors = gptq_block_(target[s:e], u[s:e, s:e], scale, low, high)
            target[e:].addmm_(u[s:e, e:].T, errors, alpha=-1)
            work[a + s : a + e].addcmul_(steps, scale, value=-1)
            codes[a + s : a + e] = steps.add_(zero)
            loss += errors.square_().sum(0)
    return codes, loss


def _block_sizes(width: int) -> tuple[int, int]:
    """(columns per block, columns per sub-block) for groups of ``width``: no group straddles a block, no sub-block a group."""
    block = width if width > BLOCK else BLOCK // width * width
    sub_block = next(size for size in (SUB_BLOCK, 16, 8) if width % size == 0)
    return block, sub_block
