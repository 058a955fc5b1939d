"""The work of solving Linears once their factor is there. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigq.kernels.grid_spec import REFINED
from bigq.sched.plan.shape import LinearShape
from bigq.scheme import QuantScheme
from bigq.solver.gptq import has_static_grids
from bigq.solver.input_products import block_width

#: Bytes that a sweep moves for each weight on a GPU: some 25 reads and writes of fp32 blocks, besides products.
MOVED_BY_SWEEP = 100.0
#: Operations for a weight that is rounded to one of the grids of a search: scaled, rounded, clamped, compared.
ROUNDED = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvingTerms:
    """schemes: of Linears by name. hessians: whether the method has any; else each weight is rounded by itself. calibrated: whether it
    knows products of inputs nevertheless."""

    schemes: Mapping[str, QuantScheme]
    hessians: bool
    calibrated: bool

    def searched(self, linears: Sequence[LinearShape]) -> float:
        """Operations of the search for grids. In the column loop each of them takes a pass over the columns of a group."""
        found = 0.0
        for linear in linears:
            scheme, weights = self.schemes[linear.name], linear.m * linear.n
            search = scheme.scales == "search"
            if not self.hessians:
                squared = 2.0 * math.gcd(block_width(linear.n), scheme.group_width(linear.n)) * self.calibrated
                found += (ROUNDED + squared) * (len(scheme.grid.tried) if search else 1) * weights
            elif search and not has_static_grids(scheme, linear.n):
                found += 2.0 * (len(scheme.grid.solved) + 2 * len(REFINED)) * scheme.group_width(linear.n) * weights
        return found

    def swept(self, linears: Sequence[LinearShape]) -> float:
        """Operations of the sweeps over Linears: each takes a product of H and the errors."""
        return sum(2.0 * self.schemes[linear.name].sweeps * linear.m * linear.n**2 for linear in linears) * self.hessians

    def moved(self, linear: LinearShape) -> float:
        """Bytes of device memory read and written while a Linear is solved, outside of products."""
        return (14 + self.schemes[linear.name].sweeps * self.hessians * MOVED_BY_SWEEP) * float(linear.m * linear.n)
