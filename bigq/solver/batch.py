"""Several Hessians of one size, in one buffer, and their factors: of experts that are solved side by side.

On a GPU a step of the factorization is one launch for all of them; on a CPU they are factored one by one. One that fails drops out, and
those behind it move up, so that the remaining factors are one tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.cholesky import upper_cholesky_many_
from bigq.kernels.triangles import mirror_
from bigq.solver.hessian import Factor, HessianSum, Order, Reduction, Undamped


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of Hessians of one size, at least one. r: [k, n, n]; that of ``each[i]`` is ``r[i]``. All have a permutation, or none."""

    r: Tensor
    each: tuple[Factor, ...]


class HessianSums:
    """Accumulators for inputs of n features, in one buffer. sums: [count, n, n]. each: those of single inputs, whose sums these are."""

    def __init__(self, sums: Tensor, each: list[HessianSum]) -> None:
        self.n = sums.shape[1]
        self._sums, self.each = sums, each

    @classmethod
    def zeros(cls, count: int, n: int, device: torch.device, *, finite_only: bool = False) -> HessianSums:
        """Accumulators for ``count`` inputs. finite_only: see ``HessianSum``."""
        sums = torch.zeros(count, n, n, dtype=torch.float32, device=device)
        return cls(sums, [HessianSum(n, device, finite_only=finite_only, into=one) for one in sums])

    def deal(self, reduction: Reduction) -> None:
        """Add up the shares of all processes: of the Hessians, each process gets some."""
        reduction.dealt_triangles_(self._sums)
        tokens = reduction.numbers([each.tokens for each in self.each])
        left_out = reduction.numbers([each.left_out for each in self.each])
        for each, *numbers in zip(self.each, tokens, left_out, strict=True):
            each.tokens, each.left_out = numbers

    def only(self, span: range) -> HessianSums:
        """Those of a span of the inputs, in the same buffer."""
        return HessianSums(self._sums[span.start : span.stop], self.each[span.start : span.stop])

    def factorize(self, *, order: Order, damping: float, names: Sequence[str]) -> tuple[Factors | None, list[NumericsError | None]]:
        """End the accumulation and factor the Hessians in their own storage, see ``hessian.factorize``. This object is used up.

        Returns the factors of those that did not fail, in order, None if there are none; and for each sum why it failed, or None.
        """
        h, each = self._sums, self.each
        del self._sums, self.each
        failures: list[NumericsError | None] = [None] * len(each)
        undamped: dict[int, Undamped] = {}
        for i, (accumulated, name) in enumerate(zip(each, names, strict=True)):
            try:
                accumulated.scaled(name)
            except NumericsError as error:
                failures[i] = error
        mirror_(h)
        for i in (i for i, failure in enumerate(failures) if failure is None):
            try:
                undamped[i] = Undamped.of(h[i], order=order, name=names[i])
            except NumericsError as error:
                failures[i] = error
        if not undamped:
            return None, failures
        h = _moved_up(h, list(undamped))
        for matrix, one in zip(h, undamped.values(), strict=True):
            one.damp_(matrix, damping)
        factors: dict[int, Factor] = {}
        for place, ((i, one), done) in enumerate(zip(undamped.items(), upper_cholesky_many_(h), strict=True)):
            try:
                factors[place] = one.factor(h[place], damping, names[i], done=done)
            except NumericsError as error:
                failures[i] = error
        if not factors:
            return None, failures
        h = _moved_up(h, list(factors))
        return Factors(h, tuple(dataclasses.replace(factor, r=h[i]) for i, factor in enumerate(factors.values()))), failures


def _moved_up(h: Tensor, kept: Sequence[int]) -> Tensor:
    """The matrices of h [k, n, n] with these numbers, in ascending order, in the front of h's own storage."""
    for to, at in enumerate(kept):
        if to != at:
            h[to].copy_(h[at])
    return h[: len(kept)]
