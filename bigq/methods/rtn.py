"""Rounding to nearest: each weight to the closest point of its group's grid, without calibration."""

from __future__ import annotations

from torch import Tensor

from bigq.methods.base import DataFreeMethod
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.rtn import round_to_nearest


class Rtn(DataFreeMethod):
    """``--method rtn``."""

    name = "rtn"
    title = "round-to-nearest"
    error_meaning = "Relative rounding errors of weights (squared norms): ‖W − Q‖² / ‖W‖²."

    def quantize(self, weight: Tensor, scheme: QuantScheme, label: str) -> QuantizedWeight:
        return round_to_nearest(weight, scheme, label)
