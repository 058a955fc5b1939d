"""The largest magnitude among the inputs of a Linear, from which readers that round inputs have their scale."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.finiteness import is_finite
from bigq.solver.hessian import Reduction, finite_tokens


class LargestInput:
    """Accumulates max |x| over batches of activations, fp32 [], on their device.

    finite_only: leave out tokens with NaN or Inf. Otherwise nothing is checked, and such tokens make it NaN or Inf.
    """

    def __init__(self, device: torch.device, *, finite_only: bool = False) -> None:
        self._largest = torch.zeros((), dtype=torch.float32, device=device)
        self._finite_only = finite_only

    def add(self, x: Tensor) -> None:
        """Add activations [..., n] of any floating type."""
        if self._finite_only and not is_finite(x):
            x = x[finite_tokens(x)]
        if x.numel():
            low, high = torch.aminmax(x)  # needs no copy as large as x
            self._largest = torch.maximum(self._largest, torch.maximum(-low, high).float())

    def reduce(self, reduction: Reduction) -> None:
        """The largest of the shares of all processes."""
        reduction.largest_(self._largest)

    @property
    def value(self) -> float:
        """0 where no token was there to be added. Waits for the device."""
        return float(self._largest)
