"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs are scaled by what they are on average, then each weight is rounded to nearest.

The range of a group, which the paper clips, is searched for the least error of what the group adds to the outputs.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from bigq.kernels.cholesky import Sharing
from bigq.methods.base import CalibratedMethod, Scaling
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.hessian import Reduction
from bigq.solver.input_products import InputProducts
from bigq.solver.rtn import round_to_nearest


class Awq(CalibratedMethod):
    """``--method awq``."""

    name = "awq"
    title = "AWQ"
    passes = 1
    hessians = False
    error_meaning = (
        "Relative errors of outputs on the calibration text: ‖(W − Q)X‖² / ‖WX‖², where products of inputs count that belong to the "
        "same group, and up to 128 of its inputs at a time; products of others count as 0."
    )

    def __init__(self, scaling: Scaling | None) -> None:
        self.scaling = scaling

    def collector(self, n: int, device: torch.device, *, finite_only: bool) -> ProductsCollector:
        return ProductsCollector(InputProducts(n, device, finite_only=finite_only))


class ProductsCollector:
    """Accumulates products of neighbouring inputs."""

    def __init__(self, products: InputProducts) -> None:
        self._products = products

    @property
    def left_out(self) -> int:
        return self._products.left_out

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        self._products.add(x)

    def reduce(self, reduction: Reduction) -> None:
        self._products.reduce(reduction)

    def finish(self, label: str) -> ProductsSolver:
        return ProductsSolver(self._products.finish(label))


class ProductsSolver:
    """Rounds Linears to nearest by mean products of their inputs. It is its own factor: there is nothing to factor."""

    def __init__(self, products: Tensor) -> None:
        self._products = products

    def kind(self, scheme: QuantScheme) -> Hashable:
        return 0

    def factor(self, scheme: QuantScheme, label: str, *, last: bool, sharing: Sharing | None = None) -> ProductsSolver:
        return self

    def solve(self, weights: list[Tensor], scheme: QuantScheme, label: str) -> list[QuantizedWeight]:
        return [round_to_nearest(weight, scheme, label, self._products) for weight in weights]
