"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs are scaled by what they are on average, then each weight is rounded to nearest.

The range of a group, which the paper clips, is searched for the least squared error, weighted by the mean square of each input.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from bigq.methods.base import CalibratedMethod, Scaling
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.hessian import Reduction
from bigq.solver.input_squares import InputSquares
from bigq.solver.rtn import round_to_nearest


class Awq(CalibratedMethod):
    """``--method awq``."""

    name = "awq"
    title = "AWQ"
    passes = 1
    hessians = False
    error_meaning = (
        "Relative errors of weights on the calibration text, each weighted by the mean square of its input: ‖(W − Q)D‖² / ‖WD‖², "
        "D² = diag(XXᵀ); products of different inputs do not count."
    )

    def __init__(self, scaling: Scaling | None) -> None:
        self.scaling = scaling

    def collector(self, n: int, device: torch.device, *, finite_only: bool) -> SquaresCollector:
        return SquaresCollector(InputSquares(n, device, finite_only=finite_only))


class SquaresCollector:
    """Accumulates the squares of one input."""

    def __init__(self, squares: InputSquares) -> None:
        self._squares = squares

    @property
    def left_out(self) -> int:
        return self._squares.left_out

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        self._squares.add(x)

    def reduce(self, reduction: Reduction) -> None:
        self._squares.reduce(reduction)

    def finish(self, label: str) -> SquaresSolver:
        return SquaresSolver(self._squares.finish(label))


class SquaresSolver:
    """Rounds Linears to nearest by the mean squares of their input. It is its own factor: there is nothing to factor."""

    def __init__(self, squares: Tensor) -> None:
        self._squares = squares

    def kind(self, scheme: QuantScheme) -> Hashable:
        return 0

    def factor(self, scheme: QuantScheme, label: str, *, last: bool) -> SquaresSolver:
        return self

    def solve(self, weights: list[Tensor], scheme: QuantScheme, label: str) -> list[QuantizedWeight]:
        return [round_to_nearest(weight, scheme, label, self._squares) for weight in weights]
