"""GPTQ (Frantar et al. 2022) for all rows of a weight, left-looking and without forming ``H⁻¹``.

With ``H = R·Rᵀ`` (R upper triangular), ``U = R⁻¹`` is the factor by which GPTQ spreads errors. Let ``E = W − Q`` be the error of
the columns quantized so far. For the next columns G = [a, b), GPTQ's updated weight is

    W'_G = W_G + (E[:, :a] · R[:a, G]) · U_GG,     U_GG = R_GG⁻¹

So each block of columns is corrected once, just before it is quantized, and only small triangles are inverted. E is stored in
place of W: a column of W is overwritten by its error as soon as it is quantized.

The product with E has two levels. Columns before a panel (a few blocks) contribute to the whole panel in one large product.
Columns inside the panel contribute to one block at a time.

Weights are indexed [n, m], inputs first. Where there are several weights of one shape, as of experts, all tensors have one more leading
dimension: the weights are quantized side by side, and on a GPU each step is one launch for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError, UsageError
from bigq.kernels.cholesky import diagonal_inverses
from bigq.kernels.feedback import feedback
from bigq.kernels.finiteness import is_finite
from bigq.kernels.gptq_block import Scratch, gptq_block_
from bigq.kernels.grid import GridSpec, GroupGrid, find_grid, points_of
from bigq.kernels.pick import empty_columns, piece, use_compiled
from bigq.kernels.precision import fp32_products, product
from bigq.machine.memory import return_freed_memory
from bigq.nested_scales import NestedScales
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.batch import Factors
from bigq.solver.energy import sampled_energy, total_energy
from bigq.solver.hessian import LEAVE_OUT, Factor, Order, factorize
from bigq.solver.settling import settled_
from bigq.solver.storage_range import require_storable
from bigq.solver.sweeps import Solution, sweep_
from bigq.solver.upstream_error import Correction

#: Maximum columns of one call of the column loop.
BLOCK = 128

#: Columns of a panel, unless groups are wider.
PANEL = 512

#: Up to this many bits, grids are those of the original weights, unless there is a grid search. Error feedback widens the range of
#: weights: in Linears of the shipped model by 6 to 32 % at 2 bits, by 1 to 5 % at 3 bits. So grids of corrected weights are coarser.
#: At 2 bits in groups of 32, KL is 0.047 with original and 0.057 with corrected weights (symmetric), 0.031 and 0.033 (asymmetric).
#: Choosing for each row the grid with the lower loss gave 0.053.
STATIC_BITS = 2


def has_static_grids(scheme: QuantScheme, n: int) -> bool:
    """Whether the grids of a Linear of n inputs are found before any error is spread.

    A search in the loop solves each group with several grids, so the group must fit into a block.
    """
    width = scheme.group_width(n)
    if scheme.order == "activation" or width == n or scheme.grid.settles:
        return True
    return width > BLOCK if scheme.scales == "search" else scheme.bits <= STATIC_BITS


def column_order(scheme: QuantScheme, n: int) -> Order:
    """The order of the columns of a Linear of n inputs. Raises UsageError where the group size does not divide n."""
    return Order(scheme.order, scheme.group_width(n) if scheme.order == "group" else 0)


def solve(
    weights: list[Tensor], factor: Factor, scheme: QuantScheme, name: str = "the Linear", correction: Correction | None = None
) -> list[QuantizedWeight]:
    """Quantize the weights [m_i, n] of Linears that share an input, in one pass over their stacked rows.

    correction: applied to the weights first. Losses and energies are then those of the corrected weights.
    Computes in the dtype of the factor (fp32 or fp64). Raises NumericsError if a result is not finite, UsageError if the group
    size does not divide n.
    """
    with fp32_products(factor.r, tf32=False):
        return _solve(weights, factor, scheme, name, correction)


def solve_many(
    weights: Sequence[list[Tensor]], factors: Factors, scheme: QuantScheme, names: Sequence[str]
) -> list[list[QuantizedWeight] | NumericsError]:
    """``solve`` for several groups of Linears, each with its own factor: the results of each group, or why it failed.

    All groups have the same shapes. On a CPU the results have the bits of ``solve``.
    """
    with fp32_products(factors.r, tf32=False):
        columns = _Columns.empty(weights[0], factors.r, scheme)
        for one, group, factor in zip(columns.each(), weights, factors.each, strict=True):
            one.load(group, factor)
        done = _quantize(columns, factors.r, [w.shape[0] for w in weights[0]])
    results: list[list[QuantizedWeight] | NumericsError] = []
    for one, solved, factor, name in zip(columns.each(), done.each(), factors.each, names, strict=True):
        try:
            results.append(_results(one, solved, factor, scheme, name))
        except NumericsError as error:
            results.append(error)
    return results


def _solve(weights: list[Tensor], factor: Factor, scheme: QuantScheme, name: str, correction: Correction | None) -> list[QuantizedWeight]:
    columns = _Columns.empty(weights, factor.r, scheme)
    columns.load(weights, factor, correction)
    return _results(columns, _quantize(columns, factor.r, [w.shape[0] for w in weights]), factor, scheme, name)


@dataclass(frozen=True, slots=True)
class _Solved:
    """What the loop leaves. codes: uint8 [..., n, m] in the order of work. loss: of each row, fp64 [..., m].

    energy: fp64 [..., at most ENERGY_ROWS] of each Linear. rows: of each Linear. nested: how its scales are stored, or None.
    """

    codes: Tensor
    loss: Tensor
    energy: list[Tensor]
    rows: list[int]
    nested: Sequence[NestedScales | None]

    def each(self) -> Iterator[_Solved]:
        """Those of a batch."""
        for i in range(len(self.codes)):
            yield _Solved(self.codes[i], self.loss[i], [energy[i] for energy in self.energy], self.rows, self.nested)


def _quantize(columns: _Columns, r: Tensor, rows: list[int]) -> _Solved:
    energy = [sampled_energy(part, r) for part in columns.work.split(rows, -1)]
    if not columns.work.is_cuda:
        # Conversions leave holes between what stays, into which the loop's buffers would not fit.
        return_freed_memory()
    nested = columns.settled(rows)
    if columns.static and columns.spec.search:
        _search_again(columns, r)
        nested = columns.settled(rows)
    codes, loss = _quantize_columns(columns, r)
    _sweep(columns, codes, loss, r)
    return _Solved(codes, loss, energy, rows, nested)


def _sweep(columns: _Columns, codes: Tensor, loss: Tensor, r: Tensor) -> None:
    """Improve codes and scales by coordinate descent, as often as the scheme says. Overwrites all but r."""
    if not columns.sweeps:
        return
    if not columns.work.is_cuda:
        return_freed_memory()
    blocks = [block for panel in columns.panels() for block in panel]
    whole = not columns.static and columns.width <= BLOCK
    solution = Solution(error=columns.work, codes=codes, scale=columns.scale, zero=columns.zero, group=columns.group, loss=loss)
    sweep_(solution, r, columns.spec, blocks, columns.width if whole else 0, columns.sweeps)


def _search_again(columns: _Columns, r: Tensor) -> None:
    """Search static grids again, for the weights that the loop meets with the grids found so far.

    Errors of other columns widen them, at few bits by more than the weights themselves. A search on the original weights clips all that:
    on the shipped model with one scale per row of 2 bits, KL is 0.50 with it and 0.056 without a search.
    """
    work = columns.work
    met = empty_columns(work.shape[-2], work.shape[-1], work.dtype, work.device, work.shape[:-2])
    codes, _ = _quantize_columns(columns, r, met)
    if work.ndim == 2:
        columns.search_again(codes, met)
    else:
        for one, *parts in zip(columns.each(), codes, met, strict=True):
            one.search_again(*parts)


def _results(columns: _Columns, done: _Solved, factor: Factor, scheme: QuantScheme, name: str) -> list[QuantizedWeight]:
    codes, loss, rows = done.codes, done.loss, done.rows
    solved = is_finite(loss)
    if solved or bool(torch.isinf(columns.scale).any()):  # NaN scales without an Inf come from the solve
        require_storable(columns.scale, name, columns.spec.scale_form)
    if not solved:
        raise NumericsError(f"{name}: the solve produced NaN or Inf; use a higher --damping, or {LEAVE_OUT}")
    if factor.perm is not None:
        codes = torch.empty_like(codes).index_copy_(0, factor.perm, codes)
    scale, zero = columns.natural_grids(factor)
    parts = zip(codes.split(rows, 1), scale.split(rows, 1), zero.split(rows, 1), loss.split(rows), done.energy, done.nested, strict=True)
    return [
        QuantizedWeight(
            codes=part_codes.T,
            scales=scale.T.to(torch.float32 if columns.spec.settles else torch.float16),
            zeros=zero.T.to(torch.uint8),
            scheme=scheme,
            loss=float(part_loss.sum()),
            energy=total_energy(part_energy, part_loss),
            damping=factor.damping,
            dead_inputs=factor.dead_inputs,
            nested=nested,
        )
        for part_codes, scale, zero, part_loss, part_energy, nested in parts
    ]


def quantize_linear(
    weight: Tensor, hessian: Tensor, scheme: QuantScheme, cross: Tensor | None = None, alpha: float = 1.0
) -> QuantizedWeight:
    """Quantize one Linear with GPTQ, or with asymmetric calibration (GPTAQ) if a cross matrix is given.

    weight: [m, n], any floating type.
    hessian: symmetric [n, n], ``2/T · XᵀX`` of the Linear's inputs. Any positive multiple gives the same codes. Not modified.
    cross: ``2/T · (X₀ − X)ᵀX`` [n, n], where X₀ are the inputs in the original model; the same multiple as the Hessian.
    alpha: strength of the correction, see ``bigq.solver.upstream_error``.

    Computes in fp64 if weight or Hessian is fp64, else in fp32. Raises NumericsError if a value is not finite or H cannot be
    factored, UsageError if shapes or the group size do not fit.
    """
    m, n = weight.shape
    if hessian.shape != (n, n):
        raise UsageError(f"hessian: must be {n} × {n} for a weight of {m} × {n}, not {' × '.join(map(str, hessian.shape))}")
    if cross is not None and cross.shape != (n, n):
        raise UsageError(f"cross: must be {n} × {n} for a weight of {m} × {n}, not {' × '.join(map(str, cross.shape))}")
    if cross is not None and not is_finite(cross):
        raise NumericsError("the cross matrix contains NaN or Inf")
    if not is_finite(weight):
        raise NumericsError("the weight contains NaN or Inf")
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    # Triton launches on the current device, which may differ from the one that holds the tensors.
    with torch.cuda.device(hessian.device) if hessian.is_cuda else contextlib.nullcontext():
        factor = factorize(hessian.to(dtype, copy=True), order=column_order(scheme, n), damping=scheme.damping)
        correction = None if cross is None else Correction(cross.to(hessian.device, dtype), alpha)
        return solve([weight.to(hessian.device)], factor, scheme, correction=correction)[0]


@dataclass(slots=True)
class _Columns:
    """The stacked weights in the column loop.

    work: [..., n, m] in the working dtype and in the order of the loop. Weights are overwritten by W − Q, column by column.
    group: int32 [..., n], the group of each column. width: inputs per group. spec: the grids that are allowed.
    scale, zero: [..., G, m] in the working dtype.
    static: the grids are found before any error is spread, from the original weights (with asymmetric calibration, the corrected
        ones). Otherwise each is found when the loop reaches its group; groups are then whole, and ``group`` counts them in the order of
        the loop.
    weight: [..., n], of the columns' squared errors in a search: ``1 / U_jj² = R_jj²``, up to a factor. None without a search.
    sweeps: see ``QuantScheme``.
    """

    work: Tensor
    group: Tensor
    width: int
    spec: GridSpec
    scale: Tensor
    zero: Tensor
    static: bool
    weight: Tensor | None
    sweeps: int

    @classmethod
    def empty(cls, weights: list[Tensor], r: Tensor, scheme: QuantScheme) -> _Columns:
        """Room for weights [m_i, n], for each factor in r [..., n, n]."""
        batch, n, dtype, device = r.shape[:-2], r.shape[-1], r.dtype, r.device
        m = sum(w.shape[0] for w in weights)
        width = scheme.group_width(n)
        scale = torch.empty(*batch, n // width, m, dtype=dtype, device=device)
        group = torch.empty(*batch, n, dtype=torch.int32, device=device)
        work = empty_columns(n, m, dtype, device, batch)
        weight = torch.empty(*batch, n, dtype=dtype, device=device) if scheme.scales == "search" else None
        return cls(work, group, width, scheme.grid, scale, torch.empty_like(scale), has_static_grids(scheme, n), weight, scheme.sweeps)

    def load(self, weights: list[Tensor], factor: Factor, correction: Correction | None = None) -> None:
        """Convert weights [m_i, n] of any floating type, some rows at a time, and correct them."""
        n, dtype, device = factor.r.shape[0], factor.r.dtype, factor.r.device
        group = torch.arange(n, device=device) if factor.perm is None or not self.static else factor.perm
        self.group.copy_(group // self.width)
        if self.weight is not None:
            pivots = factor.r.diagonal()
            torch.square(pivots / pivots.max(), out=self.weight)
        at = 0
        for rows in (part for w in weights for part in w.split(max(1, piece(on_gpu=device.type == "cuda") // n))):
            natural = rows if correction is None else correction.apply(rows.to(dtype, copy=True), factor)
            to = slice(at, at + len(rows))
            if self.static:
                grouped = natural.to(dtype).view(len(rows), -1, self.width).permute(2, 1, 0)
                self.scale[:, to], self.zero[:, to] = find_grid(grouped, self.spec, self._natural_weight(factor))
            self.work[:, to] = natural.T if factor.perm is None else natural.T[factor.perm]
            at += len(rows)

    def _natural_weight(self, factor: Factor) -> Tensor | None:
        """The weights of squared errors, [inputs per group, groups] in natural order."""
        if self.weight is None:
            return None
        natural = self.weight if factor.perm is None else torch.empty_like(self.weight).index_copy_(0, factor.perm, self.weight)
        return natural.view(-1, self.width).T

    def search_again(self, codes: Tensor, met: Tensor) -> None:
        """Restore the weights from their errors, and find grids for the weights that the loop has met, [n, m] in its order."""
        n, m = self.work.shape
        order = torch.argsort(self.group, stable=True)
        weight = None if self.weight is None else self.weight[order].view(-1, self.width).T
        for at in range(0, m, rows := max(1, piece(on_gpu=met.is_cuda) // n)):
            to = slice(at, at + rows)
            self.work[:, to] += points_of(codes[:, to], self.zero[self.group, to], self.spec) * self.scale[self.group, to]
            grouped = met[order, to].view(-1, self.width, met[:, to].shape[1]).transpose(0, 1)
            self.scale[:, to], self.zero[:, to] = find_grid(grouped, self.spec, weight)

    def settled(self, rows: list[int]) -> Sequence[NestedScales | None]:
        """Round the scales of each Linear together, where the form of scales is such. rows: of the Linears."""
        return settled_(self.scale, rows, self.spec.scale_form) if self.spec.settles else [None] * len(rows)

    def natural_grids(self, factor: Factor) -> tuple[Tensor, Tensor]:
        """Scales and zero points in the natural order of the groups, each [groups, m]."""
        if self.static or factor.perm is None:
            return self.scale, self.zero
        groups = factor.perm[:: self.width] // self.width
        scale, zero = (torch.empty_like(x).index_copy_(0, groups, x) for x in (self.scale, self.zero))
        return scale, zero

    def each(self) -> Iterator[_Columns]:
        """The columns of each weight of a batch."""
        for i in range(len(self.work)):
            tensors = {name: getattr(self, name)[i] for name in ("work", "group", "scale", "zero")}
            yield dataclasses.replace(self, **tensors, weight=None if self.weight is None else self.weight[i])

    def panels(self) -> Iterator[list[tuple[int, int]]]:
        """The blocks [a, b) of each panel. A group is inside one block; a wider group consists of whole blocks of one panel."""
        n = self.work.shape[-2]
        if self.static:
            group, block = n, BLOCK
        elif self.width > BLOCK:
            group, block = self.width, BLOCK
        else:
            group = block = BLOCK // self.width * self.width
        panel = PANEL if self.static else group * max(1, PANEL // group)
        for lo in range(0, n, panel):
            hi = min(lo + panel, n)
            starts = range(lo, hi, group)
            yield [(a, min(a + block, s + group, hi)) for s in starts for a in range(s, min(s + group, hi), block)]

    def grid(self, a: int, b: int) -> GroupGrid:
        """The grid of columns [a, b)."""
        if self.static or self.width > b - a:
            return GroupGrid(self.spec, self.scale, self.zero, self.group[..., a:b], False)
        first, stop = a // self.width, b // self.width
        scale, zero = self.scale[..., first:stop, :], self.zero[..., first:stop, :]
        return GroupGrid(self.spec, scale, zero, self.group[..., a:b] - first, True)


def _quantize_columns(columns: _Columns, r: Tensor, met: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loop over panels and blocks. ``columns.work`` is overwritten by the error W − Q.

    met: overwritten by the weights that are quantized: with the errors of all columns before them, [..., n, m].
    Returns codes uint8 [..., n, m] in the order of work, and the loss of each row, fp64 [..., m].
    """
    work = columns.work
    *batch, n, m = work.shape
    panels = list(columns.panels())
    inverses = iter(diagonal_inverses(r, [block for panel in panels for block in panel]).unbind(-3))
    codes = empty_columns(n, m, torch.uint8, work.device, batch)
    loss = torch.zeros(*batch, m, dtype=torch.float64, device=work.device)
    spread = empty_columns(max(panel[-1][1] - panel[0][0] for panel in panels), m, work.dtype, work.device, batch)
    target = empty_columns(BLOCK, m, work.dtype, work.device, batch)
    scratch = None if work.is_cuda or use_compiled(work) else Scratch(m, work.dtype, work.device)
    for panel in panels:
        lo, hi = panel[0][0], panel[-1][1]
        if lo:
            feedback(r[..., :lo, lo:hi], work[..., :lo, :], out=spread[..., : hi - lo, :])
        for a, b in panel:
            if not columns.static and columns.width > b - a and a % columns.width == 0:
                _find_wide(columns, a, spread[..., a - lo : a - lo + columns.width, :], lo, r)
            u = next(inverses)[..., : b - a, : b - a]
            corrected = _correct(work, r, u, spread[..., a - lo : b - lo, :], (lo, a, b), out=target[..., : b - a, :])
            if met is not None:
                met[..., a:b, :] = work[..., a:b, :]
            loss += gptq_block_(corrected, u, work[..., a:b, :], codes[..., a:b, :], columns.grid(a, b), scratch)
            if met is not None:  # the value of the code, and the weight's error from it
                met[..., a:b, :].sub_(work[..., a:b, :]).addcmul_(corrected, u.diagonal(dim1=-2, dim2=-1)[..., None])
    return codes, loss


def _correct(work: Tensor, r: Tensor, u: Tensor, spread: Tensor, at: tuple[int, int, int], out: Tensor) -> Tensor:
    """Columns [a, b) of work, corrected for all columns before them. at: (lo, a, b).

    spread: [..., b − a, m], the product of columns [0, lo).
    """
    lo, a, b = at
    if a == 0:
        return out.copy_(work[..., a:b, :])
    if a > lo:
        product(r[..., lo:a, a:b].mT, work[..., lo:a, :], spread, add=spread, beta=float(lo > 0))
    return product(u.mT, spread, out, add=work[..., a:b, :])


def _find_wide(columns: _Columns, a: int, spread: Tensor, lo: int, r: Tensor) -> None:
    """Find the grid of a group that is wider than a block and begins at column a. ``spread`` is not modified."""
    b = a + columns.width
    u = diagonal_inverses(r, [(a, b)])[..., 0, :, :]
    corrected = _correct(columns.work, r, u, spread.clone(), (lo, a, b), out=torch.empty_like(spread))
    g = a // columns.width
    columns.scale[..., g, :], columns.zero[..., g, :] = find_grid(corrected.movedim(-2, 0), columns.spec)
