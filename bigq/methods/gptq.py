"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, and correct the columns to the right."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.methods.base import CalibratedMethod
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.gptq import solve
from bigq.solver.hessian import Factor, HessianSum, Reduction, factorize
from bigq.solver.upstream_error import Correction


class Gptq(CalibratedMethod):
    """``--method gptq``."""

    name = "gptq"
    title = "GPTQ"
    passes = 1
    error_meaning = "Relative errors of outputs on the calibration text (squared norms): ‖(W − Q)X‖² / ‖WX‖²."

    def collector(self, n: int, device: torch.device, *, finite_only: bool) -> HessianCollector:
        return HessianCollector(n, device, finite_only=finite_only)


class HessianCollector:
    """Accumulates the Hessian of one input."""

    def __init__(self, n: int, device: torch.device, *, finite_only: bool) -> None:
        self._hessian = HessianSum(n, device, finite_only=finite_only)

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
        return scheme.act_order, scheme.damping

    def factor(self, scheme: QuantScheme, label: str, *, last: bool) -> HessianFactor:
        h = self._hessian if last else self._hessian.clone()
        return HessianFactor(factorize(h, act_order=scheme.act_order, damping=scheme.damping, name=label), self._correction)


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """The factor of a Hessian."""

    factor: Factor
    correction: Correction | None

    def solve(self, weights: list[Tensor], scheme: QuantScheme, label: str) -> list[QuantizedWeight]:
        return solve(weights, self.factor, scheme, label, self.correction)
