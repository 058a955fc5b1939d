"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, and correct the columns to the right."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.cholesky import Sharing
from bigq.methods.base import CalibratedMethod, Collectors, OneByOne, Scaling
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.batch import Factors, HessianSums
from bigq.solver.gptq import column_order, solve, solve_many
from bigq.solver.hessian import Factor, HessianSum, Reduction, factorize
from bigq.solver.upstream_error import Correction


class Gptq(CalibratedMethod):
    """``--method gptq``."""

    name = "gptq"
    title = "GPTQ"
    passes = 1
    error_meaning = "Relative errors of outputs on the calibration text (squared norms): ‖(W − Q)X‖² / ‖WX‖²."

    def __init__(self, scaling: Scaling | None = None) -> None:
        self.scaling = scaling

    def collector(self, n: int, device: torch.device, *, finite_only: bool) -> HessianCollector:
        return HessianCollector(HessianSum(n, device, finite_only=finite_only))

    def collectors(self, count: int, n: int, device: torch.device, *, finite_only: bool) -> Collectors:
        if count < 2:
            return OneByOne([self.collector(n, device, finite_only=finite_only) for _ in range(count)])
        return HessianCollectors(HessianSums.zeros(count, n, device, finite_only=finite_only))


class HessianCollector:
    """Accumulates the Hessian of one input."""

    def __init__(self, hessian: HessianSum) -> None:
        self._hessian = hessian

    @property
    def left_out(self) -> int:
        return self._hessian.left_out

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        self._hessian.add(x)

    def reduce(self, reduction: Reduction) -> None:
        self._hessian.reduce(reduction)

    def finish(self, label: str) -> HessianSolver:
        return HessianSolver(self._hessian.finish(label))


class HessianSolver:
    """Solves Linears with the Hessian of their input. correction: of the upstream error, or None."""

    def __init__(self, hessian: Tensor, correction: Correction | None = None) -> None:
        self._hessian = hessian
        self._correction = correction

    def kind(self, scheme: QuantScheme) -> Hashable:
        order = column_order(scheme, len(self._hessian))
        return order.name, order.width, scheme.damping

    def factor(self, scheme: QuantScheme, label: str, *, last: bool, sharing: Sharing | None = None) -> HessianFactor:
        h = self._hessian if last else self._hessian.clone()
        order = column_order(scheme, len(h))
        return HessianFactor(factorize(h, order=order, damping=scheme.damping, name=label, sharing=sharing), self._correction)


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """The factor of a Hessian."""

    factor: Factor
    correction: Correction | None

    def solve(self, weights: list[Tensor], scheme: QuantScheme, label: str) -> list[QuantizedWeight]:
        return solve(weights, self.factor, scheme, label, self.correction)


class HessianCollectors:
    """Accumulates the Hessians of several inputs of one size, whose Linears are solved side by side."""

    def __init__(self, hessians: HessianSums) -> None:
        self._hessians = hessians
        self.each = [HessianCollector(hessian) for hessian in hessians.each]

    def reduce(self, reduction: Reduction, *, dealt: bool) -> None:
        if dealt:
            self._hessians.deal(reduction)
        else:
            for each in self.each:
                each.reduce(reduction)

    def only(self, span: range) -> HessianCollectors:
        return HessianCollectors(self._hessians.only(span))

    def factor(self, scheme: QuantScheme, labels: Sequence[str]) -> HessianFactors:
        return HessianFactors(*self._hessians.factorize(order=column_order(scheme, self._hessians.n), damping=scheme.damping, names=labels))


@dataclass(frozen=True, slots=True)
class HessianFactors:
    """The factors of such Hessians. failures: why a Hessian has none, or None; ``factors`` has those of the others, in order."""

    factors: Factors | None
    failures: Sequence[NumericsError | None]

    def solve(
        self, weights: Sequence[list[Tensor]], scheme: QuantScheme, labels: Sequence[str]
    ) -> list[list[QuantizedWeight] | NumericsError]:
        going = [i for i, failure in enumerate(self.failures) if failure is None]
        solved: list[list[QuantizedWeight] | NumericsError] = []
        if self.factors is not None:
            solved = solve_many([weights[i] for i in going], self.factors, scheme, [labels[i] for i in going])
        rest = iter(solved)
        return [next(rest) if failure is None else failure for failure in self.failures]
