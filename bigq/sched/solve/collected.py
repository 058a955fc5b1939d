"""What calibration gathers at the inputs of a group of Linears: the sums of the method, and the largest input where the format needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.methods.base import CalibratedMethod, Collector, Solver
from bigq.solver.hessian import Reduction
from bigq.solver.largest_input import LargestInput


class Collected:
    """A collector for inputs of n features. largest: whether the largest input is gathered too. finite_only: see ``CalibratedMethod``."""

    def __init__(self, method: CalibratedMethod, n: int, device: torch.device, *, finite_only: bool, largest: bool) -> None:
        self._collector: Collector = method.collector(n, device, finite_only=finite_only)
        self._largest = LargestInput(device, finite_only=finite_only) if largest else None

    @property
    def left_out(self) -> int:
        """Tokens that were left out because they are not finite."""
        return self._collector.left_out

    @property
    def largest_input(self) -> float | None:
        """The largest magnitude of an input; None if it was not gathered."""
        return None if self._largest is None else self._largest.value

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add the inputs [..., n] of a batch. reference: see ``Collector.add``; it has no part in the largest input."""
        self._collector.add(x, reference)
        if self._largest is not None:
            self._largest.add(x)

    def reduce(self, reduction: Reduction) -> None:
        """Add up the shares of several processes."""
        self._collector.reduce(reduction)
        if self._largest is not None:
            self._largest.reduce(reduction)

    def finish(self, label: str) -> Solver:
        """End the accumulation of sums. Raises NumericsError, see ``Collector.finish``."""
        return self._collector.finish(label)
